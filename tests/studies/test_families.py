"""The default rule beside the best fixed pairs: tests/benchmarks/families.py in short, three families and four starts each."""
from __future__ import annotations

import json

import pytest
from benchmarks import families

STARTS = [(alpha, beta) for alpha in (1e-5, 10.0) for beta in (1e-5, 10.0)]


@pytest.mark.parametrize("family", ("coldstart", "siren", "omniglot-5w"))
def test_from_every_start_the_rule_ends_no_worse_than_the_best_fixed_pair(family: str, omniglot_root: str):
    runs = [families.train(families.Job(family, None, False, alpha, beta, 0)) for alpha, beta in STARTS]
    reference = json.loads(families.KEPT.read_text())[family]
    best = min(reference[name]["loss"] for name in families.GRIDS)
    assert not any(run["diverged"] for run in runs)
    assert max(run["loss"] for run in runs) <= 1.05 * best
    for alpha in (1e-5, 10.0):  # the first iteration overwrites beta
        low, high = (run for run in runs if run["alpha_0"] == alpha)
        assert low["losses"] == high["losses"] and low["betas"] == high["betas"]


def test_every_family_has_a_reference():
    assert set(json.loads(families.KEPT.read_text())) >= {path.stem for path in families.FAMILIES.glob("*.yaml")}
