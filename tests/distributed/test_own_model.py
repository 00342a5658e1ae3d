"""A model of the user's own, in a file outside the package, under torchrun."""
from __future__ import annotations

import os
import subprocess
from pathlib import Path

from processes import ROOT, command, succeed

from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.runs.metrics import read_metrics

OWN = """
from torch import nn

class Tokens(nn.Module):
    def __init__(self, input_shape, outputs, width=16):
        super().__init__()
        self.embed, self.head = nn.Linear(input_shape[-1], width), nn.Linear(width, outputs)
        self.layer = nn.TransformerEncoderLayer(width, 2, 32, batch_first=True)
    def forward(self, x):
        return self.head(self.layer(self.embed(x.flatten(1, -2))).mean(1))
"""


def test_trains_with_two_processes_and_is_evaluated(tmp_path: Path, omniglot_root: str):
    (tmp_path / "mine.py").write_text(OWN)
    folder, path = tmp_path / "run", str(tmp_path)
    arguments = ("--data.name", "omniglot", "--data.root", omniglot_root, "--model.name", "mine:Tokens", "--model.args",
                 "{width: 8}", "--model.randomness", "different", "--task.ways", 5, "--task.shots", 1, "--task.queries", 2,
                 "--task.batch", 4, "--iterations", 12, "--evaluation.tasks", 10, "--tracking.uri", "disabled",
                 "--run_dir", folder)
    result = subprocess.run(command("train", *arguments, ranks=2), cwd=ROOT, capture_output=True, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path})
    assert result.returncode == 0, result.stderr
    assert "UserWarning" not in result.stderr, result.stderr
    assert read_json(folder / "summary.json")["world_size"] == 2 and len(read_metrics(folder)) == 12
    assert '"tasks": 20' in succeed("evaluate", "--run_dir", folder, "--evaluation.tasks", 20, PYTHONPATH=path).stdout
