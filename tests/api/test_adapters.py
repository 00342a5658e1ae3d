"""Tasks from a torch Dataset, a DataLoader, and a Hugging Face dataset."""
from __future__ import annotations

from pathlib import Path

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import alpha_maml
from alpha_maml import ClassTasks, InputError

X = torch.randn(200, 3, generator=torch.Generator().manual_seed(0)) + 4 * (torch.arange(200) % 20)[:, None].sin()
Y = torch.arange(200) % 20
WORDS = datasets.Dataset.from_dict({"input_ids": (Y[:, None] * torch.ones(1, 4, dtype=torch.int64)).tolist(),
                                    "label": [f"class {y}" for y in Y.tolist()]})


class Words(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(20, 8), nn.Linear(8, 2)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(input_ids).mean(1))


@pytest.mark.parametrize(("data", "model"), (
    (TensorDataset(X, Y), lambda: nn.Linear(3, 2)), (DataLoader(TensorDataset(X, Y), 16), lambda: nn.Linear(3, 2)),
    (WORDS, Words)), ids=("Dataset", "DataLoader", "Hugging Face"))
def test_trains(data: object, model: type, tmp_path: Path):
    tasks = ClassTasks(data, ways=2, shots=2, queries=3)
    config = {"iterations": 3, "task.batch": 3, "evaluation.tasks": 3}
    run = alpha_maml.train(model(), tasks, config=config, run_dir=tmp_path / "r")
    assert "accuracy/val" in run.history[-1] and run.evaluate(tasks=4)["tasks"] == 4


def test_splits_share_no_class_and_support_no_example_with_query():
    tasks = ClassTasks(TensorDataset(torch.arange(200.0)[:, None], Y), ways=3, shots=2, queries=3)
    seen = {split: {int(x) % 20 for n in range(30) for part in tasks.task(split, n) for x in part[0].flatten()}
            for split in ("train", "val", "test")}
    assert not seen["train"] & seen["val"] and not seen["train"] & seen["test"] and not seen["val"] & seen["test"]
    support, query = tasks.task("train", 5)
    assert not set(support[0].flatten().tolist()) & set(query[0].flatten().tolist())
    assert query[1].tolist() == [0, 0, 0, 1, 1, 1, 2, 2, 2] and len({int(x) % 20 for x in query[0].flatten()[:3]}) == 1


@pytest.mark.parametrize(("data", "how", "words"), (
    (iter([1]), {}, "has no length or no items by number"), (TensorDataset(X, Y), {"ways": 9}, "ways: 9 is more than the"),
    (WORDS, {"label": "kind"}, "label: 'kind' is no key of the examples")))
def test_what_is_wrong_is_one_line(data: object, how: dict, words: str):
    with pytest.raises(InputError) as caught:
        ClassTasks(data, **{"ways": 2, "shots": 2, "queries": 3} | how)
    assert words in str(caught.value)
