"""theta's step against torch.optim, and its trust region."""
from __future__ import annotations

import math

import pytest
import torch

from trainer import outer
from trainer.keys import Config, Outer, Rates

YES, NO = torch.tensor(True), torch.tensor(False)


def start() -> tuple[dict, list[dict]]:
    generator = torch.Generator().manual_seed(0)

    def params() -> dict:
        return {name: torch.randn(shape, generator=generator, dtype=torch.float64) for name, shape in
                (("weight", (4, 3)), ("bias", (4,)))}

    return params(), [params() for _ in range(6)]


@pytest.mark.parametrize(("name", "reference"), (("sgd", torch.optim.SGD), ("adam", torch.optim.Adam)))
def test_equals_the_optimiser_of_torch(name: str, reference: type):
    theta, gradients = start()
    settings = Config(outer=Outer(optimizer=name, trust=0.0, average=False))
    theirs = {n: p.clone().requires_grad_() for n, p in theta.items()}
    optimiser = reference(theirs.values(), lr=0.01)
    memory = outer.initial(theta, settings)
    for gradient in gradients:
        before = theta
        theta, memory = outer.step(theta, gradient, torch.tensor(0.01, dtype=torch.float64), memory, settings, YES)
        for n, p in theirs.items():
            p.grad = gradient[n]
        optimiser.step()
        for n in theta:
            assert torch.allclose(theta[n], theirs[n].detach(), rtol=1e-12)
            assert torch.allclose(before[n] - 0.01 * memory.previous[n], theta[n], rtol=1e-12), "not the direction applied"


def test_the_trust_region_bounds_each_tensor_by_its_own_norm():
    theta, gradients = start()
    theta["bias"] = torch.zeros_like(theta["bias"])  # may still move, by the floor
    beta = torch.tensor(100.0, dtype=torch.float64)
    moved, memory = outer.step(theta, gradients[0], beta, outer.initial(theta, Config()), Config(), YES)
    first = outer.TRUST["sgd"] / outer.WARM_STEPS**3 / (1 + 1 / outer.TRUST_STEPS) ** 0.5
    assert float((moved["weight"] - theta["weight"]).norm() / theta["weight"].norm()) == pytest.approx(first)
    assert float(moved["bias"].norm()) == pytest.approx(first * outer.NORM_FLOOR)
    assert torch.allclose(theta["weight"] - beta * memory.previous["weight"], moved["weight"])
    free = Config(rates=Rates(rule="fixed"))
    moved, _ = outer.step(theta, gradients[0], beta, outer.initial(theta, free), free, YES)
    assert torch.allclose(theta["weight"] - 100 * gradients[0]["weight"], moved["weight"]), "MAML has no trust region"


def test_the_trust_region_opens_and_then_shrinks_as_the_root_of_the_steps():
    steps = torch.tensor([5.0, 20.0, 30.0, 990.0], dtype=torch.float64)
    expected = [0.2 / 64 / 1.25**0.5, 0.2 / 2**0.5, 0.2 / 2.5**0.5, 0.2 / 50.5**0.5]
    assert outer.trust_at(0.2, steps).tolist() == pytest.approx(expected)


def test_theta_lies_halfway_between_what_walks_and_its_average():
    """The walker written out, and the polynomial average in closed form: step t of n has t (t + 1) ... over the sum of all."""
    theta, gradients = start()
    settings, walker = Config(outer=Outer(trust=0.0)), theta["weight"]
    memory, seen = outer.initial(theta, settings), []
    for gradient in gradients:
        theta, memory = outer.step(theta, gradient, torch.tensor(0.1, dtype=torch.float64), memory, settings, YES)
        walker = walker - 0.1 * gradient["weight"]
        seen.append(walker)
        weights = [math.prod(range(t, t + outer.AVERAGED)) for t in range(1, len(seen) + 1)]
        average = sum(w * p for w, p in zip(weights, seen)) / sum(weights)
        assert torch.allclose(memory.average["weight"], average, rtol=1e-12)
        assert torch.allclose(theta["weight"], (walker + average) / 2, rtol=1e-12)


def test_an_unusable_iteration_leaves_no_trace():
    theta, gradients = start()
    settings, beta = Config(outer=Outer(optimizer="adam")), torch.tensor(0.1, dtype=torch.float64)
    theta, memory = outer.step(theta, gradients[0], beta, outer.initial(theta, settings), settings, YES)
    broken = {n: torch.full_like(g, float("nan")) for n, g in gradients[1].items()}
    same, kept = outer.step(theta, broken, beta, memory, settings, NO)
    assert all(torch.equal(same[n], theta[n]) for n in theta)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(kept[:4], memory[:4]) for n in theta)
    assert kept.count == memory.count
