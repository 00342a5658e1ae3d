"""The soak's short form: memory still warms up and MLflow is still being imported, so neither has a bound here."""
from __future__ import annotations

import statistics
from pathlib import Path

from soak import BACKLOG, RANKS, watch

from alpha_maml.trainer.tracking.state import read_state


def test_two_ranks_gather_neither_descriptors_nor_threads_nor_unsent_lines(tmp_path: Path):
    samples, backlog = watch(2000, tmp_path / "run")
    assert samples.keys() == {*RANKS, "sender"}
    for name in RANKS:
        half = len(samples[name]) // 2
        for what in ("descriptors", "threads"):
            values = [getattr(sample, what) for sample in samples[name]]
            assert statistics.median(values[half:]) <= statistics.median(values[:half]), (name, what, values)
    assert max(unsent for _, unsent in backlog) < BACKLOG and read_state(tmp_path / "run")["complete"]
