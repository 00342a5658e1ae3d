"""What adapts, rates per tensor, step and number, and the objectives, in float64: finite differences and plain loops."""
from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from conftest import Small
from exactness import beside, dot

from alpha_maml.errors import InputError
from alpha_maml.trainer.core import inner
from alpha_maml.trainer.core.adaptation import adaptation
from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.core.inner import InnerLoop
from alpha_maml.trainer.core.meta_gradient import meta_gradient

WAYS = ("one by one in vmap", "all at once")


def total_loss(problem: Small, theta: dict, alpha: torch.Tensor, loop: InnerLoop) -> torch.Tensor:
    """The sum over tasks of what the meta-gradient differentiates, from the values phi_k alone."""
    total = 0.0
    for b in range(len(problem.tasks.support_x)):
        task = problem.task(b)
        _, *phis = adaptation(problem.apply, problem.loss, theta, alpha, task.support, loop)
        losses = torch.stack([problem.loss(problem.apply(phi, task.query), task.query)[0] for phi in phis])
        total = total + (losses[-1] if loop.weights is None else losses @ loop.weights)
    return total


def measured(problem: Small, alpha: torch.Tensor, loop: InnerLoop, way: str):
    return meta_gradient(problem.apply, problem.loss, problem.theta, alpha, problem.tasks, loop,
                         forward_tasks=problem.forward_tasks if way == "all at once" else None)


def assert_slope(loss: Callable[[Params], torch.Tensor], at: Params, gradient: Params, generator: torch.Generator) -> None:
    """Central differences along a direction."""
    v, h = beside(gradient, generator), 1e-7
    ahead, behind = (loss({n: p + s * v[n] for n, p in at.items()}) for s in (h, -h))
    assert float(ahead - behind) / (2 * h) == pytest.approx(float(dot(gradient, v)), rel=1e-6)


OBJECTIVES = {
    "plain": {}, "clipped": {"clip": 0.05}, "weight decay": {"weight_decay": 0.3},
    "multi-step": {"weights": torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)},
    "all of them": {"weights": torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64), "clip": 0.05, "weight_decay": 0.3},
}
OBJECTIVES["all of them, computed anew"] = OBJECTIVES["all of them"] | {"recompute": True}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("shape", ("scalar", "layer", "layer_step", "parameter"))
@pytest.mark.parametrize(("name", "adapts"), (("mlp", "all"), ("mlp", "head"), ("conv4", "body")))
def test_agrees_with_central_differences(name: str, adapts: str, shape: str, objective: str, way: str):
    problem, generator = Small(name), torch.Generator().manual_seed(2)
    loop = InnerLoop(3, "second", inner.adapted_names(problem.theta, adapts), shape, **OBJECTIVES[objective])
    alpha = 0.1 + 0.1 * torch.rand(inner.alpha_sizes(loop, problem.theta), generator=generator, dtype=torch.float64)
    total = measured(problem, alpha, loop, way)
    assert total.alpha_gradient.shape == total.alignment_norm.shape == alpha.shape
    assert_slope(lambda theta: total_loss(problem, theta, alpha, loop), problem.theta, total.gradient, generator)
    assert_slope(lambda rates: total_loss(problem, problem.theta, rates["alpha"], loop), {"alpha": alpha},
                 {"alpha": total.alpha_gradient}, generator)


def unrolled(problem: Small, names: list[str], rate_of: dict, steps: int, clip: float = 0.0) -> tuple[dict, list]:
    """A plain implementation: autograd through the inner loop of one task after the other. `rate_of` maps a tensor's name to
    its rates, a tensor or one for each step. Returns the gradients of theta and of the rates."""
    theta = {n: p.clone().requires_grad_() for n, p in problem.theta.items()}
    leaves = [r for r in rate_of.values() for r in (r if isinstance(r, list) else [r])]
    total = 0.0
    for b in range(3):
        task, phi = problem.task(b), dict(theta)
        for k in range(steps):
            loss = problem.loss(problem.apply(phi, task.support), task.support)[0]
            gradients = torch.autograd.grad(loss, [phi[n] for n in names], create_graph=True)
            if clip:
                norm = torch.sqrt(sum((g**2).sum() for g in gradients))
                gradients = [g * (clip / norm) if norm > clip else g for g in gradients]
            for n, g in zip(names, gradients):
                rate = rate_of[n][k] if isinstance(rate_of[n], list) else rate_of[n]
                phi[n] = phi[n] - rate * g
        total = total + problem.loss(problem.apply(phi, task.query), task.query)[0]
    found = torch.autograd.grad(total, [*theta.values(), *leaves])
    return dict(zip(theta, found)), list(found[len(theta):])


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("recompute", (False, True))
def test_what_is_per_step_is_exact(recompute: bool, way: str):
    problem, generator = Small("conv4"), torch.Generator().manual_seed(5)
    names = inner.per_step_names(problem.theta, "*norm*")
    assert len(names) == 8
    for name in names:
        p = problem.theta[name]
        problem.theta[name] = p + 0.1 * torch.randn(3, *p.shape, generator=generator, dtype=torch.float64)
    loop = InnerLoop(3, "second", inner.adapted_names(problem.theta, "all", names), recompute=recompute, per_step=names,
                     weights=torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64))
    total = measured(problem, problem.alpha, loop, way)
    assert all(total.gradient[name].shape == p.shape for name, p in problem.theta.items())
    assert_slope(lambda theta: total_loss(problem, theta, problem.alpha, loop), problem.theta, total.gradient, generator)


@pytest.mark.parametrize("way", WAYS)
def test_per_step_is_a_plain_loop_in_which_step_k_has_its_own(way: str):
    """The queries take the last step's."""
    problem, generator, steps = Small("conv4"), torch.Generator().manual_seed(6), 2
    names = inner.per_step_names(problem.theta, "*norm*")
    own = {n: [(p + 0.1 * torch.randn(p.shape, generator=generator, dtype=p.dtype)).requires_grad_() for _ in range(steps)]
           for n, p in problem.theta.items() if n in names}
    adapted = {n: p.clone().requires_grad_() for n, p in problem.theta.items() if n not in names}
    total = 0.0
    for b in range(3):
        task, phi = problem.task(b), adapted
        for k in range(steps):
            given = phi | {n: own[n][k] for n in names}
            loss = problem.loss(problem.apply(given, task.support), task.support)[0]
            gradients = torch.autograd.grad(loss, list(phi.values()), create_graph=True)
            phi = {n: p - problem.alpha * g for (n, p), g in zip(phi.items(), gradients)}
        given = phi | {n: own[n][-1] for n in names}
        total = total + problem.loss(problem.apply(given, task.query), task.query)[0]
    found = torch.autograd.grad(total, [*adapted.values(), *(p for ps in own.values() for p in ps)])
    expected = dict(zip(adapted, found)) | {
        n: torch.stack(found[len(adapted) + steps * i :][:steps]) for i, n in enumerate(names)}
    problem.theta |= {n: torch.stack(ps).detach() for n, ps in own.items()}
    loop = InnerLoop(steps, adapted=inner.adapted_names(problem.theta, "all", names), per_step=names)
    assert same(measured(problem, problem.alpha, loop, way).gradient, expected)


def near(a: torch.Tensor, b: torch.Tensor) -> bool:
    return bool((a - b).norm() <= 1e-12 * b.norm())


def same(a: dict, b: dict) -> bool:
    return near(torch.cat([a[n].flatten() for n in a]), torch.cat([b[n].flatten() for n in a]))


@pytest.mark.parametrize("way", WAYS)
def test_anil_is_a_plain_loop_over_the_head(way: str):
    problem, names = Small("conv4"), ["head.weight", "head.bias"]
    rate = problem.alpha.clone().requires_grad_()
    expected, rates = unrolled(problem, names, dict.fromkeys(names, rate), 3)
    found = measured(problem, problem.alpha, InnerLoop(3, adapted=inner.adapted_names(problem.theta, "head")), way)
    assert same(found.gradient, expected)
    assert near(found.alpha_gradient, rates[0])


@pytest.mark.parametrize("way", WAYS)
def test_meta_sgd_is_a_plain_loop_with_a_rate_for_each_number(way: str):
    problem, generator = Small("conv4"), torch.Generator().manual_seed(3)
    rate_of = {n: (0.1 + 0.2 * torch.rand(p.shape, generator=generator, dtype=torch.float64)).requires_grad_()
               for n, p in problem.theta.items()}
    expected, rates = unrolled(problem, list(problem.theta), rate_of, 2)
    alpha = torch.cat([r.detach().flatten() for r in rate_of.values()])
    found = measured(problem, alpha, InnerLoop(2, alpha_shape="parameter"), way)
    assert same(found.gradient, expected)
    assert near(found.alpha_gradient, torch.cat([r.flatten() for r in rates]))


@pytest.mark.parametrize("way", WAYS)
def test_lslr_and_clipping_are_a_plain_loop(way: str):
    problem, generator, steps = Small("mlp"), torch.Generator().manual_seed(4), 2
    alpha = 0.05 + 0.1 * torch.rand(steps, len(problem.theta), generator=generator, dtype=torch.float64)
    rate_of = {n: [alpha[k, i].clone().requires_grad_() for k in range(steps)] for i, n in enumerate(problem.theta)}
    expected, rates = unrolled(problem, list(problem.theta), rate_of, steps, clip=1.0)
    found = measured(problem, alpha, InnerLoop(steps, alpha_shape="layer_step", clip=1.0), way)
    assert same(found.gradient, expected)
    assert near(found.alpha_gradient.T.flatten(), torch.stack(rates))
    plain = measured(problem, alpha, InnerLoop(steps, alpha_shape="layer_step"), way)
    assert not same(found.gradient, plain.gradient), "nothing was clipped"


@pytest.mark.parametrize("way", WAYS)
def test_reptile_is_the_displacement(way: str):
    problem = Small("conv4")
    loop = InnerLoop(3, "reptile", inner.adapted_names(problem.theta, "body"))
    found, expected = measured(problem, problem.alpha, loop, way), {n: torch.zeros_like(p) for n, p in problem.theta.items()}
    for b in range(3):
        task = problem.task(b)
        *_, phi = adaptation(problem.apply, problem.loss, problem.theta, problem.alpha, task.support, loop)
        expected = {n: e + (problem.theta[n] - phi[n]) / problem.alpha for n, e in expected.items()}
    assert all(torch.allclose(found.gradient[n], expected[n], rtol=1e-10, atol=1e-13) for n in expected)
    assert not found.gradient["head.weight"].any() and not found.gradient["head.bias"].any()


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("shape", ("layer", "layer_step", "parameter"))
def test_equal_rates_for_all_are_one_rate(shape: str, way: str):
    problem = Small("conv4")
    one, many = InnerLoop(3), InnerLoop(3, alpha_shape=shape)
    expected = measured(problem, problem.alpha, one, way)
    found = measured(problem, problem.alpha.expand(inner.alpha_sizes(many, problem.theta)), many, way)
    assert same(found.gradient, expected.gradient)
    assert near(found.alpha_gradient.sum(), expected.alpha_gradient)


def test_annealed_objectives_end_at_maml():
    annealing, cpu = inner.Annealing(multi_step=100, first_order=30), torch.device("cpu")
    first, middle, last = (inner.annealed(InnerLoop(4), annealing, t, cpu) for t in (0, 50, 100))
    assert first.order == "first" and middle.order == last.order == "second"
    assert torch.allclose(first.weights, torch.full((4,), 0.25, dtype=torch.float64))
    assert torch.allclose(middle.weights, torch.tensor([0.125, 0.125, 0.125, 0.625], dtype=torch.float64))
    assert last.weights is None


NAMES = ("blocks.0.conv.weight", "blocks.0.norm.weight", "blocks.1.conv.weight", "head.weight", "head.bias")


@pytest.mark.parametrize(("adapts", "expected"), (
    ("all", None), ("*", None), ("head", NAMES[3:]), ("body", NAMES[:3]), ("blocks.0.*, head.bias", (*NAMES[:2], NAMES[4]))))
def test_what_adapts_is_chosen_by_name(adapts: str, expected: tuple | None):
    assert inner.adapted_names(NAMES, adapts) == expected


def test_a_pattern_that_matches_nothing_names_what_there_is():
    with pytest.raises(InputError, match=r"inner.adapts: 'haed\.\*' matches none of the model's tensors \(blocks.0.conv"):
        inner.adapted_names(NAMES, "blocks.*,haed.*")


def test_what_is_per_step_does_not_adapt():
    assert inner.per_step_names(NAMES, None) == () and inner.per_step_names(NAMES, "*norm*") == NAMES[1:2]
    assert inner.adapted_names(NAMES, "all", NAMES[1:2]) == (NAMES[0], *NAMES[2:])
    assert inner.adapted_names(NAMES, "body", NAMES[1:2]) == (NAMES[0], NAMES[2])
    with pytest.raises(InputError, match="inner.adapts: head leaves nothing to adapt beside inner.per_step"):
        inner.adapted_names(NAMES, "head", NAMES[3:])
    with pytest.raises(InputError, match="inner.per_step: 'nrm' matches none of the model's tensors"):
        inner.per_step_names(NAMES, "nrm")


def test_more_steps_than_in_training_take_the_last_steps_rates():
    loop, theta = InnerLoop(2, alpha_shape="layer_step"), {"a": torch.zeros(3), "b": torch.zeros(2)}
    alpha = torch.tensor([[1.0, 2.0], [3.0, 4.0]])
    assert inner.rates_of_step(alpha, loop, theta, 7) == inner.rates_of_step(alpha, loop, theta, 1) == {"a": 3.0, "b": 4.0}
    loop, theta = InnerLoop(2, per_step=("b",)), {"a": torch.zeros(3), "b": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}
    assert inner.params_of_step(theta, loop, 7)["b"].tolist() == [3.0, 4.0] and loop.per_step
