"""Muon (Jordan et al. 2024): momentum whose matrices are orthogonalised by Newton-Schulz iterations."""
from __future__ import annotations

import torch
from torch import Tensor

from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.optim.adamw import AdamW
from alpha_maml.trainer.optim.optimizer import State

MOMENTUM, STEPS, EPSILON = 0.95, 5, 1e-7
COEFFICIENTS = (3.4445, -4.775, 2.0315)  # the quintic whose slope at 0 is the largest that still converges
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
        directions, new = super().update(vectors, state, params, count)
        new["momentum"] = {}
        for name, gradient in gradients.items():
            if name in vectors:
                continue
            momentum = torch.lerp(state["momentum"][name], gradient, 1 - MOMENTUM)
            matrix = torch.lerp(gradient, momentum, MOMENTUM).flatten(1)  # Nesterov's
            size = RMS * max(matrix.shape) ** 0.5
            direction = size * orthogonalised(matrix).to(gradient.dtype).view_as(gradient)
            directions[name] = torch.add(direction, params[name], alpha=self.weight_decay)
            new["momentum"][name] = momentum
        return {name: directions[name] for name in gradients}, new


def orthogonalised(matrix: Tensor) -> Tensor:
    """About U V^T of the matrix's singular value decomposition U S V^T, [m, n] in bfloat16, which is enough: the singular
    values end between 0.7 and 1.2 anyway."""
    x = matrix.bfloat16()
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / x.norm().clamp(min=EPSILON)
    a, b, c = COEFFICIENTS
    for _ in range(STEPS):
        gram = x @ x.mT
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.addmm(x, polynomial, x, beta=a)
    return x.mT if tall else x
