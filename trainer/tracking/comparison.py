"""The view of MLflow's comparison page in which a sweep opens: which runs, and which charts, without hand work.

MLflow keeps a view that somebody shares as a tag of the experiment and names it in the page's address. This builds such a view:
losses side by side, rates, the figures at the end, and the map over both starting rates.
"""
from __future__ import annotations

import hashlib
import json
from typing import Any

TAG = "mlflow.sharedViewState."
REACHED = "final/iterations_to_threshold"
SECTIONS = {  # title -> charts: metrics over iterations, or a figure of each run
    "Losses and rates": ("loss/train", "loss/val", "rates/alpha", "rates/beta"),
    "At the end": (REACHED, "final/loss_val", "final/accuracy_val"),
}
# What MLflow's page gives a new line chart, but for the axis: starts differ by decades, and a bad one's first losses by more.
LINE = {"scaleType": "log", "xAxisScaleType": "linear", "xAxisKey": "step", "yAxisKey": "metric", "yAxisExpressions": [],
        "selectedXAxisMetricKey": "", "range": {}, "lineSmoothness": 0, "ignoreOutliers": False, "useGlobalXaxisKey": True,
        "useGlobalLineSmoothing": True}


def key(sweep: str) -> str:
    """A sweep's name as a part of a tag and of an address."""
    return f"sweep-{hashlib.sha256(sweep.encode()).hexdigest()[:12]}"


def view(sweep: str, runs: int) -> str:
    """The state of the page, as MLflow stores it, for the `runs` runs under the tag `sweep`."""
    sections, charts = [], []
    for title in ("The map", *SECTIONS):
        sections.append({"uuid": title, "name": title, "display": True, "isReordered": False, "deleted": False,
                         "isGenerated": False})
    axes = {"xaxis": {"key": "log10_alpha", "type": "PARAM"}, "yaxis": {"key": "log10_beta", "type": "PARAM"}}
    charts.append(_chart("CONTOUR", "The map", "iterations to the threshold", runs,
                         **axes, zaxis={"key": REACHED, "type": "METRIC"}))
    charts.append(_chart("PARALLEL", "The map", "from the start to the end", runs, showAllRuns=False,
                         selectedParams=["log10_alpha", "log10_beta"], selectedMetrics=[REACHED, "final/loss_val"]))
    for title, metrics in SECTIONS.items():
        for metric in metrics:
            kind, settings = ("BAR", {}) if metric.startswith("final/") else ("LINE", LINE | {"selectedMetricKeys": [metric]})
            charts.append(_chart(kind, title, metric, runs, metricKey=metric, **settings))
    state = {"searchFilter": f'tags.sweep = "{sweep}"', "runsHiddenMode": "SHOW_ALL", "autoRefreshEnabled": True,
             "hideEmptyCharts": True, "compareRunSections": sections, "compareRunCharts": charts, "isAccordionReordered": True}
    return json.dumps(state)


def _chart(kind: str, section: str, title: str, runs: int, **settings: Any) -> dict[str, Any]:
    return {"type": kind, "uuid": f"{section} {title}", "metricSectionId": section, "displayName": title,
            "runsCountToCompare": max(runs, 10), "deleted": False, "isGenerated": False} | settings
