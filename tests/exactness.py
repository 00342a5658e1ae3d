"""What any model's meta-gradient is held against, in float64: finite differences, and plain autograd task by task."""
from __future__ import annotations

import pytest
import torch
from conftest import Small

from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.inner import InnerLoop
from alpha_maml.trainer.core.meta_gradient import meta_gradient
from alpha_maml.trainer.core.sweep import MetaGradient


def dot(a: Params, b: Params) -> torch.Tensor:
    """Inner product over all tensors."""
    return sum((a[name] * b[name]).sum() for name in a)


def relative(a: Params, b: Params) -> float:
    difference = {name: a[name] - b[name] for name in a}
    return float((dot(difference, difference) / dot(b, b)).sqrt())


def query_loss(problem: Small, theta: Params, alpha: torch.Tensor, steps: int, second_order: bool = True) -> torch.Tensor:
    """Sum over tasks of L_te(theta'), by autograd without torch.func."""
    total = 0.0
    for b in range(len(problem.tasks.support_x)):
        task, phi = problem.task(b), theta
        for _ in range(steps):
            loss = problem.loss(problem.apply(phi, task.support), task.support)[0]
            gradients = torch.autograd.grad(loss, list(phi.values()), create_graph=second_order)
            phi = {name: p - alpha * g for (name, p), g in zip(phi.items(), gradients)}
        total = total + problem.loss(problem.apply(phi, task.query), task.query)[0]
    return total


def expected(problem: Small, steps: int, order: str) -> tuple[Params, torch.Tensor]:
    """The meta-gradient and alpha's hypergradient, by autograd through the unrolled inner loop."""
    theta = {name: p.clone().requires_grad_() for name, p in problem.theta.items()}
    alpha = problem.alpha.clone().requires_grad_()
    *gradient, on_alpha = torch.autograd.grad(query_loss(problem, theta, alpha, steps, order == "second"),
                                              [*theta.values(), alpha])
    return dict(zip(theta, gradient)), on_alpha


def beside(gradient: Params, generator: torch.Generator) -> Params:
    """A random direction, as much of it along the gradient: a slope that is not small."""
    v = {name: torch.randn(p.shape, generator=generator, dtype=p.dtype) for name, p in gradient.items()}
    length, norm = dot(v, v).sqrt(), dot(gradient, gradient).sqrt()
    return {name: x / length + gradient[name] / norm for name, x in v.items()}


def slope(problem: Small, direction: Params, steps: int, h: float = 1e-7) -> float:
    """The derivative of the query loss along `direction`, by central differences. h is small: a ReLU that switches between the
    two points would spoil the difference."""
    ahead, behind = ({name: (p + s * direction[name]).requires_grad_() for name, p in problem.theta.items()} for s in (h, -h))
    difference = query_loss(problem, ahead, problem.alpha, steps) - query_loss(problem, behind, problem.alpha, steps)
    return float(difference.detach()) / (2 * h)


def assert_exact(problem: Small, steps: int, order: str) -> MetaGradient:
    """Inside vmap, equal to the loop over tasks; and to finite differences, which first order does not aim at."""
    total = meta_gradient(problem.apply, problem.loss, problem.theta, problem.alpha, problem.tasks, InnerLoop(steps, order))
    gradient, on_alpha = expected(problem, steps, order)
    assert relative(total.gradient, gradient) < 1e-12
    assert float(total.alpha_gradient) == pytest.approx(float(on_alpha), rel=1e-11)
    if order == "second":
        v = beside(total.gradient, torch.Generator().manual_seed(1))
        assert slope(problem, v, steps) == pytest.approx(float(dot(total.gradient, v)), rel=1e-6)
    return total
