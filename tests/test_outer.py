"""theta's step against torch.optim, and its trust region."""
from __future__ import annotations

import pytest
import torch

from trainer import outer
from trainer.config import Config, Outer, Rates

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
    settings = Config(outer=Outer(optimizer=name, trust=0.0))
    theirs = {n: p.clone().requires_grad_() for n, p in theta.items()}
    optimiser = reference(theirs.values(), lr=0.01)
    memory = outer.initial(theta, name)
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
    moved, memory = outer.step(theta, gradients[0], beta, outer.initial(theta, "sgd"), Config(), YES)
    assert float((moved["weight"] - theta["weight"]).norm() / theta["weight"].norm()) == pytest.approx(0.02)
    assert float(moved["bias"].norm()) == pytest.approx(0.02 * outer.NORM_FLOOR)
    assert torch.allclose(theta["weight"] - beta * memory.previous["weight"], moved["weight"])
    free = Config(rates=Rates(rule="fixed"))
    moved, _ = outer.step(theta, gradients[0], beta, outer.initial(theta, "sgd"), free, YES)
    assert torch.allclose(theta["weight"] - 100 * gradients[0]["weight"], moved["weight"]), "MAML has no trust region"


def test_an_unusable_iteration_leaves_no_trace():
    theta, gradients = start()
    settings, beta = Config(outer=Outer(optimizer="adam")), torch.tensor(0.1, dtype=torch.float64)
    theta, memory = outer.step(theta, gradients[0], beta, outer.initial(theta, "adam"), settings, YES)
    broken = {n: torch.full_like(g, float("nan")) for n, g in gradients[1].items()}
    same, kept = outer.step(theta, broken, beta, memory, settings, NO)
    assert all(torch.equal(same[n], theta[n]) for n in theta)
    assert all(torch.equal(a[n], b[n]) for a, b in zip(kept[:3], memory[:3]) for n in theta)
    assert kept.count == memory.count
