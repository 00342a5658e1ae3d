"""Figures of runs, readable in print and without colour vision."""
from __future__ import annotations

from pathlib import Path

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito 2008
STYLES = ("-", "--", "-.", ":")
PANELS = (("loss/train", "training loss (dots: validation)", "linear"), ("rates/alpha", "inner rate alpha", "log"),
          ("rates/beta", "meta rate beta", "log"))


def _smooth(values: list[float], width: int) -> list[float]:
    """Trailing means over up to `width` values."""
    sums, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        sums.append(total / min(i + 1, width))
    return sums


def draw_curves(runs: list[tuple[str, list[dict]]], target: Path, threshold: float | None = None) -> list[Path]:
    """Loss, alpha and beta over iterations, one line a run, as `target`.png and .svg. `runs` holds (label, the lines of
    metrics.jsonl)."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(12, 4), layout="constrained")
    for number, (label, lines) in enumerate(runs):
        look = {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number % len(STYLES)]}
        steps = [line["step"] for line in lines]
        for axis, (name, title, scale) in zip(axes, PANELS):
            values = [line.get(name, float("nan")) for line in lines]
            positive = scale == "log" and all(value > 0 for value in values)
            if name == "loss/train":
                axis.plot(steps, values, color=look["color"], alpha=0.2, linewidth=0.7)
                values = _smooth(values, max(5, len(values) // 50))
                axis.plot(steps, values, label=label, linewidth=1.8, **look)
                checks = [(line["step"], line["loss/val"]) for line in lines if "loss/val" in line]
                if checks:
                    axis.plot(*zip(*checks), "o", color=look["color"], markersize=4)
            else:
                axis.plot(steps, values, linewidth=1.8, **look)
            axis.set(title=title, xlabel="meta-iteration", yscale="log" if positive or axis.get_yscale() == "log" else "linear")
            axis.grid(alpha=0.25)
    if threshold is not None:
        axes[0].axhline(threshold, color="black", linewidth=0.8, linestyle=(0, (1, 2)))
    figure.legend(loc="outside lower center", ncols=min(len(runs), 3), frameon=False)
    paths = [target.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=130)
    pyplot.close(figure)
    return paths
