"""An equation with a residual loss: each task is a decay u' = -k u with a rate k of its own, and no solution is ever given."""
import torch
from torch import nn
from torch.func import jvp

import alpha_maml


def decay(split: str, number: int):
    """Points where the equation must hold, and its rate; the queries are other points."""
    generator = torch.Generator().manual_seed(3 * number + ("train", "val", "test").index(split))
    k = 0.5 + 2 * torch.rand(1, generator=generator)
    x = torch.rand(24, 1, generator=generator)
    part = {"x": x, "k": k.expand(24, 1)}
    return {name: t[:12] for name, t in part.items()}, {name: t[12:] for name, t in part.items()}


class Solution(nn.Module):
    """u(x) with u(0) = 1, and its slope, by forward differentiation."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(1, 24), nn.Tanh(), nn.Linear(24, 24), nn.Tanh(), nn.Linear(24, 1))

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        u, slope = jvp(lambda x: 1 + x * self.body(x), (x,), (torch.ones_like(x),))
        return {"u": u, "slope": slope}


def residual(outputs, batch):
    """The squared residual, and for the record how far the answer is from the solution."""
    wrong = (outputs["u"] - torch.exp(-batch["k"] * batch["x"])).abs().max()
    return (outputs["slope"] + batch["k"] * outputs["u"]).square().mean(), {"error": wrong}


torch.manual_seed(0)
run = alpha_maml.train(Solution(), decay, loss=residual, run_dir="runs/equation",
                       config={"iterations": 200, "task.batch": 8, "inner.steps": 3, "evaluation.tasks": 30})
curve = run.evaluate(tasks=30)["curve"]
print("largest error after 0 to 3 inner steps:", *(f"{x:.4f}" for x in curve["error"]))
assert curve["error"][-1] < curve["error"][0]
