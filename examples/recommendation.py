"""Cold-start recommendation: each task is a new user, of whom six ratings are known."""
import torch
from torch import nn

import alpha_maml

ITEMS, FACTORS = 60, 4
TASTES = torch.randn(ITEMS, FACTORS, generator=torch.Generator().manual_seed(0))  # what items are like: unknown to the model


def user(split: str, number: int):
    """Six rated items, and eight others to be put in order."""
    generator = torch.Generator().manual_seed(3 * number + ("train", "val", "test").index(split))
    wish = torch.randn(FACTORS, generator=generator)
    items = torch.randperm(ITEMS, generator=generator)[:14]
    ratings = torch.sigmoid(TASTES[items] @ wish)
    return {"items": items[:6], "labels": ratings[:6]}, {"items": items[6:], "labels": ratings[6:]}


class Scores(nn.Module):
    """An embedding of items, and the user's own direction: the part that adapts."""

    def __init__(self):
        super().__init__()
        self.embed, self.wish = nn.Embedding(ITEMS, 8), nn.Linear(8, 1)

    def forward(self, items: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"logits": self.wish(self.embed(items))[..., 0]}


torch.manual_seed(0)
run = alpha_maml.train(Scores(), user, loss="pairwise_ranking", run_dir="runs/recommendation",
                       config={"iterations": 400, "task.batch": 16, "inner.steps": 2, "inner.adapts": "wish.*",
                               "evaluation.tasks": 100})
curve = run.evaluate(tasks=100)["curve"]["order"]
print("pairs in the right order after 0, 1, 2 inner steps:", *(f"{100 * x:.1f} %" for x in curve))
assert curve[-1] > curve[0] + 0.03
