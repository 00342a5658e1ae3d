"""The comparison page of a sweep: a real MLflow server, in a real browser, by the link that the sweep prints."""
from __future__ import annotations

import json
import os
import re
from pathlib import Path

import page
import pytest
from conftest import Server
from processes import succeed

from alpha_maml.trainer.tracking import comparison

QUICK = ("sweep", "--task.batch", 4, "--iterations", 30, "--loss_threshold", 1000, "--evaluation.tasks", 8, "--vectorised",
         "--grid", "rates.alpha=1e-3,1e-2,1e-1", "--grid", "rates.beta=1e-3,1e-2,1e-1")


def test_the_printed_link_opens_the_sweep_with_its_map(tmp_path: Path, server: Server):
    if page.absent():
        pytest.fail(page.absent()) if os.environ.get("CI") else pytest.skip(page.absent())
    printed = succeed(*QUICK, "--tracking.uri", server.uri, "--run_dir", tmp_path / "starts").stdout
    succeed("train", "--task.batch", 4, "--iterations", 5, "--evaluation.tasks", 8, "--tracking.uri", server.uri,
            "--run_dir", tmp_path / "another")  # must not be in the picture
    address = re.search(r"Compare runs: (http\S+)", printed)[1]
    titles, text = page.opened(address, 6, tmp_path / "page.png")
    assert titles[0] == "log10_alpha vs. log10_beta vs. final/iterations_to_threshold"
    assert titles[2:6] == ["loss/train", "loss/val", "rates/alpha", "rates/beta"]
    assert "9 matching runs" in text


def test_a_view_names_its_sweep_and_shows_all_of_its_runs():
    view = json.loads(comparison.view("mine", 49))
    assert view["searchFilter"] == 'tags.sweep = "mine"' and view["runsHiddenMode"] == "SHOW_ALL"
    assert {chart["runsCountToCompare"] for chart in view["compareRunCharts"]} == {49}
    sections = {section["uuid"] for section in view["compareRunSections"]}
    assert {chart["metricSectionId"] for chart in view["compareRunCharts"]} == sections
    assert comparison.key("mine") != comparison.key("other") and re.fullmatch(r"[a-z0-9-]+", comparison.key("a/b c"))
