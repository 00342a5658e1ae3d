"""theta's step against torch.optim, its trust region, its average, and clipping."""
from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from alpha_maml.trainer import objective
from alpha_maml.trainer.config import Config
from alpha_maml.trainer.config.keys import OuterSettings, RatesSettings
from alpha_maml.trainer.core.algebra import Params
from alpha_maml.trainer.optim import step
from alpha_maml.trainer.optim.muon import COEFFICIENTS, STEPS, orthogonalised
from alpha_maml.trainer.optim.optimizer import Optimizer
from alpha_maml.trainer.optim.step import Memory, OuterStep, Whole

SHAPES = (("weight", (4, 3)), ("wide", (2, 8)), ("bias", (4,)))


def start() -> tuple[Params, list[Params]]:
    generator = torch.Generator().manual_seed(0)

    def params() -> Params:
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in SHAPES}

    return params(), [params() for _ in range(6)]


def outer(**keys: object) -> OuterStep:
    """As the default rule for the rates has it, but for the keys."""
    return objective.outer_step(Config(outer=OuterSettings(**keys)))


def move(settings: OuterStep, theta: Params, gradient: Params, beta: float, memory: Memory,
         usable: bool = True) -> tuple[Params, Memory]:
    squared = torch.stack([g.square().sum() for g in gradient.values()]).sum()
    size = torch.tensor(beta, dtype=torch.float64)
    return settings.move(theta, gradient, squared, size, torch.tensor(usable), memory, Whole(theta))


def references(theta: Params, name: str, decay: float) -> list[torch.optim.Optimizer]:
    every = list(theta.values())
    matrices, vectors = ([p for p in every if (p.dim() > 1) == many] for many in (True, False))
    return {
        "sgd": lambda: [torch.optim.SGD(every, lr=0.01, weight_decay=decay)],
        "adam": lambda: [torch.optim.Adam(every, lr=0.01)],
        "adamw": lambda: [torch.optim.AdamW(every, lr=0.01, weight_decay=decay)],
        "muon": lambda: [torch.optim.Muon(matrices, lr=0.01, weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
                         torch.optim.AdamW(vectors, lr=0.01, weight_decay=decay)],
    }[name]()


@pytest.mark.parametrize(("name", "decay"), (("sgd", 0.0), ("adam", 0.0), ("adamw", 0.0), ("adamw", 0.3), ("muon", 0.0),
                                             ("muon", 0.3)))
def test_equals_the_optimiser_of_torch(name: str, decay: float):
    theta, gradients = start()
    settings = outer(optimizer=name, trust=0.0, average=False, weight_decay=decay)
    theirs = {n: p.clone().requires_grad_() for n, p in theta.items()}
    optimizers, memory = references(theirs, name, decay), settings.init(theta)
    for gradient in gradients:
        before = theta
        theta, memory = move(settings, theta, gradient, 0.01, memory)
        for n, p in theirs.items():
            p.grad = gradient[n]
        for optimizer in optimizers:
            optimizer.step()
        for n in theta:
            # torch's Muon orthogonalises in bfloat16, which is 2 % of a step off.
            allowed = 0.02 * float((theta[n] - before[n]).norm()) if name == "muon" and theta[n].dim() > 1 else 0.0
            assert torch.allclose(theta[n], theirs[n].detach(), rtol=1e-12, atol=allowed)
            theirs[n].data.copy_(theta[n])
            assert torch.allclose(before[n] - 0.01 * memory.parts["previous"][n], theta[n], rtol=1e-12), "not what was applied"


def test_muon_makes_the_singular_values_nearly_equal():
    """Of matrices of several shapes at once, one of them nearly of rank 1: by the polynomials of their singular values."""
    generator = torch.Generator().manual_seed(1)
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64)
                for shape in ((5, 3), (3, 5), (4, 4), (8, 50), (7, 6), (1, 9))]
    matrices.append(matrices[0][:, :1] @ matrices[1][:1] + 1e-5 * torch.eye(5, dtype=torch.float64))
    for matrix, found in zip(matrices, orthogonalised(matrices)):
        u, values, v = torch.linalg.svd(matrix, full_matrices=False)
        values = values / values.norm()
        for _ in range(STEPS):
            values = sum(c * values ** (2 * i + 1) for i, c in enumerate(COEFFICIENTS))
        assert torch.allclose(found, (u * values) @ v, atol=1e-10)
    assert 0.6 < float(torch.linalg.svdvals(orthogonalised(matrices[:1])[0]).min())


def test_muon_takes_a_kernel_of_four_axes_as_a_matrix():
    theta = {"kernel": torch.randn(4, 3, 3, 2, dtype=torch.float64)}
    settings = outer(optimizer="muon", trust=0.0, average=False)
    moved, _ = move(settings, theta, theta, 0.1, settings.init(theta))
    matrix = {"kernel": theta["kernel"].flatten(1)}
    expected, _ = move(settings, matrix, matrix, 0.1, settings.init(matrix))
    assert torch.equal(moved["kernel"].flatten(1), expected["kernel"])


def test_clipping_shortens_the_gradient_to_its_largest_norm_and_no_further():
    theta, (gradient, *_) = start()
    norm = float(torch.cat([g.flatten() for g in gradient.values()]).norm())
    for clip, length in ((norm / 4, norm / 4), (2 * norm, norm)):
        settings = outer(trust=0.0, average=False, clip=clip, optimizer="sgd")
        _, memory = move(settings, theta, gradient, 0.1, settings.init(theta))
        applied = torch.cat([d.flatten() for d in memory.parts["previous"].values()])
        assert float(applied.norm()) == pytest.approx(length)


@pytest.mark.parametrize("name", ("sgd", "adam", "adamw", "muon"))
def test_under_the_default_rule_beta_is_the_step_of_every_tensor_in_units_of_its_own_length(name: str):
    theta, gradients = start()
    theta["bias"] = torch.zeros_like(theta["bias"])  # may still move, by the floor
    theta["idle"], gradients[0]["idle"] = torch.ones(3, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)
    settings = outer(average=False, optimizer=name)
    moved, memory = move(settings, theta, gradients[0], 0.05, settings.init(theta))
    step_1 = 0.05 / (1 + 1 / step.SHRINK_STEPS) ** 0.5
    for n in ("weight", "wide"):
        assert float((moved[n] - theta[n]).norm() / theta[n].norm()) == pytest.approx(step_1)
        assert torch.allclose(theta[n] - 0.05 * memory.parts["previous"][n], moved[n]), "not what was applied"
    assert float(moved["bias"].norm()) == pytest.approx(step_1 * step.FLOOR / 3**0.5)
    assert torch.equal(moved["idle"], theta["idle"]), "a tensor without a gradient moved"
    bounded = outer(average=False, optimizer=name, trust=0.01)
    within, _ = move(bounded, theta, gradients[0], 0.05, bounded.init(theta))
    assert torch.allclose((within["weight"] - theta["weight"]) * 5, moved["weight"] - theta["weight"])


def test_plain_maml_steps_by_beta_and_a_trust_region_bounds_it():
    theta, gradients = start()
    free, bounded = (objective.outer_step(Config(rates=RatesSettings(rule="fixed"), outer=OuterSettings(trust=trust)))
                     for trust in (None, 0.2))
    moved, _ = move(free, theta, gradients[0], 100.0, free.init(theta))
    assert torch.allclose(theta["weight"] - 100 * gradients[0]["weight"], moved["weight"])
    moved, _ = move(bounded, theta, gradients[0], 100.0, bounded.init(theta))
    first = 0.2 / (1 + 1 / step.SHRINK_STEPS) ** 0.5
    assert float((moved["weight"] - theta["weight"]).norm() / theta["weight"].norm()) == pytest.approx(first)
    moved, _ = move(bounded, theta, gradients[0], 1e-9, bounded.init(theta))
    assert torch.allclose(theta["weight"] - 1e-9 * gradients[0]["weight"], moved["weight"], rtol=1e-14)


def test_relative_steps_shrink_as_the_root_of_the_steps():
    steps = torch.tensor([0.0, 20.0, 30.0, 990.0], dtype=torch.float64)
    assert step.shrunk(steps).tolist() == pytest.approx([1.0, 1 / 2**0.5, 1 / 2.5**0.5, 1 / 50.5**0.5])


def test_theta_lies_halfway_between_the_iterate_and_its_average():
    """z written out, and the polynomial average in closed form: step t of n has t (t + 1) ... over the sum of all."""
    theta, gradients = start()
    settings, z = outer(trust=0.0, optimizer="sgd"), theta["weight"]
    memory, seen = settings.init(theta), []
    for gradient in gradients:
        theta, memory = move(settings, theta, gradient, 0.1, memory)
        z = z - 0.1 * gradient["weight"]
        seen.append(z)
        weights = [math.prod(range(t, t + step.AVERAGED)) for t in range(1, len(seen) + 1)]
        average = sum(w * p for w, p in zip(weights, seen)) / sum(weights)
        assert torch.allclose(memory.parts["average"]["weight"], average, rtol=1e-12)
        assert torch.allclose(theta["weight"], (z + average) / 2, rtol=1e-12)


@pytest.mark.parametrize("name", ("sgd", "adam", "adamw", "muon"))
def test_an_unusable_iteration_leaves_no_trace(name: str):
    theta, gradients = start()
    settings = outer(optimizer=name)
    theta, memory = move(settings, theta, gradients[0], 0.1, settings.init(theta))
    broken = {n: torch.full_like(g, float("nan")) for n, g in gradients[1].items()}
    same, kept = move(settings, theta, broken, 0.1, memory, usable=False)
    assert all(torch.equal(same[n], theta[n]) for n in theta)
    assert kept.parts.keys() == memory.parts.keys() == set(settings.parts)
    assert all(torch.equal(t, memory.parts[part][n]) for part, tensors in kept.parts.items() for n, t in tensors.items())
    assert kept.steps == memory.steps


def test_an_optimiser_needs_update_alone():
    class Sign(Optimizer):
        def update(self, gradients: Params, state: dict, params: Params, count: Tensor) -> tuple[Params, dict]:
            return {name: g.sign() for name, g in gradients.items()}, state

    theta, (gradient, *_) = start()
    settings = OuterStep(Sign())
    moved, _ = move(settings, theta, gradient, 0.5, settings.init(theta))
    assert all(torch.equal(moved[n], theta[n] - 0.5 * gradient[n].sign()) for n in theta)
