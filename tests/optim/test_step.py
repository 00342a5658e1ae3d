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
from alpha_maml.trainer.optim.muon import orthogonalised
from alpha_maml.trainer.optim.optimizer import Optimizer
from alpha_maml.trainer.optim.sgd import SGD
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
    return settings.move(theta, gradient, squared, size, torch.tensor(usable), memory, Whole())


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
            assert torch.allclose(theta[n], theirs[n].detach(), rtol=1e-12)
            assert torch.allclose(before[n] - 0.01 * memory.parts["previous"][n], theta[n], rtol=1e-12), "not what was applied"


@pytest.mark.parametrize("shape", ((5, 3), (3, 5), (4, 4)))
def test_muon_makes_the_singular_values_nearly_equal(shape: tuple[int, int]):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    u, _, v = torch.linalg.svd(matrix, full_matrices=False)
    found = orthogonalised(matrix).double()
    values = torch.linalg.svdvals(found)
    assert 0.6 < float(values.min()) and float(values.max()) < 1.3
    assert float((u.mT @ found @ v.mT).diagonal().min()) > 0.6, "not along U V^T"


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
        settings = outer(trust=0.0, average=False, clip=clip)
        _, memory = move(settings, theta, gradient, 0.1, settings.init(theta))
        applied = torch.cat([d.flatten() for d in memory.parts["previous"].values()])
        assert float(applied.norm()) == pytest.approx(length)


def test_the_trust_region_bounds_each_tensor_by_its_own_norm():
    theta, gradients = start()
    theta["bias"] = torch.zeros_like(theta["bias"])  # may still move, by the floor
    settings, free = outer(average=False), objective.outer_step(Config(rates=RatesSettings(rule="fixed")))
    moved, memory = move(settings, theta, gradients[0], 100.0, settings.init(theta))
    first = SGD.trust / step.WARM_STEPS**3 / (1 + 1 / step.TRUST_STEPS) ** 0.5
    assert float((moved["weight"] - theta["weight"]).norm() / theta["weight"].norm()) == pytest.approx(first)
    assert float(moved["bias"].norm()) == pytest.approx(first * step.NORM_FLOOR)
    assert torch.allclose(theta["weight"] - 100 * memory.parts["previous"]["weight"], moved["weight"])
    moved, _ = move(free, theta, gradients[0], 100.0, free.init(theta))
    assert torch.allclose(theta["weight"] - 100 * gradients[0]["weight"], moved["weight"]), "MAML has no trust region"


def test_the_trust_region_opens_and_then_shrinks_as_the_root_of_the_steps():
    steps = torch.tensor([5.0, 20.0, 30.0, 990.0], dtype=torch.float64)
    expected = [0.2 / 64 / 1.25**0.5, 0.2 / 2**0.5, 0.2 / 2.5**0.5, 0.2 / 50.5**0.5]
    assert step.trust_at(0.2, steps).tolist() == pytest.approx(expected)


def test_theta_lies_halfway_between_the_iterate_and_its_average():
    """z written out, and the polynomial average in closed form: step t of n has t (t + 1) ... over the sum of all."""
    theta, gradients = start()
    settings, z = outer(trust=0.0), theta["weight"]
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
