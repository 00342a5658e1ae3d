"""The rules for alpha and beta, one a file; one line below adds a rule.

Belongs here: subclasses of `rule.Rule`, which turn an iteration's signals into the next rates. Pure: small tensors in, small
tensors out, and nothing waits for the host. May import: `alpha_maml.registry`, torch.
Offers: RULES (here, without torch); `rule.Rule`, `rule.Rates`, `rule.Signals`.

The facts are what a rule takes where the configuration leaves a key null: relative steps, an average of theta, an alpha for
each tensor and inner step; "bounds" says that both rates start within rates.minimum and rates.maximum.
"""
from __future__ import annotations

from alpha_maml.registry import Registry

RULES = Registry("rates.rule")
RULES.register("adaptive", "alpha_maml.trainer.core.rules.adaptive:Adaptive", "relative", "average", "layer_step", "bounds")
RULES.register("paper", "alpha_maml.trainer.core.rules.paper:Paper")
RULES.register("fixed", "alpha_maml.trainer.core.rules.fixed:Fixed")
