"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised by Newton-Schulz iterations."""
from __future__ import annotations

from collections import defaultdict

import torch
from torch import Tensor
from torch.nn import functional as F

from alpha_maml.trainer.core.algebra import Params, flat, named
from alpha_maml.trainer.optim.adamw import AdamW
from alpha_maml.trainer.optim.optimizer import State

MOMENTUM, STEPS, EPSILON = 0.95, 5, 1e-7
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # the quintic whose slope at 0 is the largest that still converges
SMALL = 64  # shorter sides up to this cost less as one batch than one after the other
RMS = 0.2  # of an entry of AdamW's direction (Liu et al. 2025, "Muon is Scalable for LLM Training"): one beta serves both


class Muon(AdamW):
    """Tensors of two axes and more, as matrices [first axis, all others], take orthogonalised Nesterov momentum, scaled to the
    size of AdamW's direction; vectors and scalars take AdamW's own. Weight decay is decoupled for all of them.

    A matrix's step depends on all of its entries, so an engine that cuts tensors into pieces cannot take it.
    """

    whole = True
    memory = ("momentum", "mean", "square")

    def init(self, params: Params) -> State:
        state = super().init(params)
        return {part: {name: t for name, t in tensors.items() if (t.dim() > 1) == (part == "momentum")}
                for part, tensors in state.items()}

    def update(self, gradients: Params, state: State, params: Params, count: Tensor) -> tuple[Params, State]:
        vectors = {name: g for name, g in gradients.items() if g.dim() <= 1}
        kernels = {name: g for name, g in gradients.items() if name not in vectors}
        directions, new = self._of_vectors(vectors, state, params, count) if vectors else ({}, {"mean": {}, "square": {}})
        new["momentum"] = {name: torch.lerp(state["momentum"][name], g, 1 - MOMENTUM) for name, g in kernels.items()}
        nesterov = [torch.lerp(g, new["momentum"][name], MOMENTUM).flatten(1) for name, g in kernels.items()]
        for (name, g), matrix in zip(kernels.items(), orthogonalised(nesterov)):
            size = RMS * max(matrix.shape) ** 0.5
            directions[name] = torch.add(size * matrix.view_as(g), params[name], alpha=self.weight_decay)
        return {name: directions[name] for name in gradients}, new

    def _of_vectors(self, gradients: Params, state: State, params: Params, count: Tensor) -> tuple[Params, State]:
        """AdamW's, of all vectors as one: they are small and many."""
        one = {part: {"": flat({name: state[part][name] for name in gradients})} for part in super().memory}
        found, one = super().update({"": flat(gradients)}, one, {"": flat({name: params[name] for name in gradients})}, count)
        return named(found[""], gradients), {part: named(t[""], gradients) for part, t in one.items()}


def orthogonalised(matrices: list[Tensor]) -> list[Tensor]:
    """About U V^T of each matrix's singular value decomposition U S V^T: all singular values are about 1.

    X <- (a + b A + c A^2) X with A = X X^T, [n, n] for the shorter side n. The polynomials are multiplied up and meet X once,
    so that the longer side hardly costs. Matrices of one shorter side are one batch; small ones, padded with zeros, too.
    """
    wide = [m if m.shape[0] <= m.shape[1] else m.mT for m in matrices]
    groups: dict[int, list[int]] = defaultdict(list)
    for i, matrix in enumerate(wide):
        groups[max(SMALL, len(matrix))].append(i)
    found = list(matrices)
    for members in groups.values():
        side, grams = max(len(wide[i]) for i in members), []
        for i in members:
            x, missing = wide[i], side - len(wide[i])
            gram = x @ x.mT
            grams.append(F.pad(gram, (0, missing, 0, missing)) if missing else gram)
        gram = torch.stack(grams)
        norm = gram.diagonal(dim1=-2, dim2=-1).sum(-1)[:, None, None].sqrt().clamp(min=EPSILON)
        polynomials = _polynomials(gram / norm**2) / norm
        for i, polynomial in zip(members, polynomials.unbind()):
            rows = len(wide[i])
            x = polynomial[:rows, :rows] @ wide[i]
            found[i] = x if wide[i] is matrices[i] else x.mT
    return found


def _polynomials(gram: Tensor) -> Tensor:
    """The product of the iterations' polynomials, of A = X X^T [batch, n, n] with |X| = 1."""
    a, b, c = COEFFICIENTS
    one = a * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    product = None
    for step in range(STEPS):
        polynomial = torch.baddbmm(one + b * gram, gram, gram, alpha=c)
        product = polynomial if product is None else polynomial @ product
        if step < STEPS - 1:
            gram = polynomial @ gram @ polynomial
    assert product is not None
    return product
