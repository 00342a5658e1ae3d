"""500 generated bad inputs, the short form of `make fuzz`."""
from __future__ import annotations

import fuzz
import pytest

CASES = 500


@pytest.mark.parametrize("area", fuzz.areas(), ids=lambda area: area.name)
def test_bad_input_is_refused_in_one_line_or_runs(area: fuzz.Area, record_property):
    found = fuzz.fuzz(area, CASES * area.share // 100, seed=0)
    record_property("report", f"fuzz, {area.name}: {dict(found)}")
    assert found.total() >= CASES * area.share // 100
