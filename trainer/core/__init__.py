"""The mathematics: the inner loop, the meta-gradient with both hypergradients, the rules for alpha and beta.

Belongs here: pure functions of tensors. No configuration, no process group, no file, no name of a kernel.
May import: `alpha_maml.errors`, `alpha_maml.registry`, `data` for the shapes of tasks, `models.ops`.
Offers: `meta_gradient.meta_gradient`, `adaptation.adapt`, `inner.InnerLoop`, `decide.decide`, `rules`, and `names`, those
of the tensors of a training state.
"""
