"""Faults of the outside at the length that CI affords; those of MLflow are with a real server in tests/test_tracking.py."""
from __future__ import annotations

import os

import outside
import pytest

KINDS = tuple(kind for kind in outside.FAULTS if kind not in ("mlflow_is_away", "mlflow_answers_403", "rank_dies"))


def test_each_ends_as_stated(record_property):
    if os.geteuid() != 0:
        reason = "disks of their own need root"
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    lines: list[str] = []
    good = outside.campaign(len(KINDS), 0, lines.append, KINDS, lock_seconds=3)
    record_property("report", "\n".join(lines))
    assert good == len(KINDS), "\n".join(lines)
