"""Figures of runs, readable in print and without colour vision."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")  # Okabe and Ito 2008
STYLES = ("-", "--", "-.", ":")
PANELS = (("loss/train", "training loss (dots: validation)", "linear"), ("rates/alpha", "inner rate alpha", "log"),
          ("rates/beta", "meta rate beta", "log"))
ROWS = (("rates/alpha", "inner rate alpha"), ("rates/beta", "meta rate beta"), ("loss/train", "training loss"),
        ("loss/val", "validation loss"))
NEEDED = tuple(name for name, *_ in PANELS)  # metrics without which there is nothing to draw


def _smooth(values: Sequence[float], width: int) -> list[float]:
    """Trailing means over up to `width` values."""
    sums, total = [], 0.0
    for i, value in enumerate(values):
        total += value - (values[i - width] if i >= width else 0.0)
        sums.append(total / min(i + 1, width))
    return sums


def _pyplot() -> ModuleType:
    """Imported where something is drawn, since it takes a second; needs no display."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _look(number: int) -> dict[str, str]:
    """Of the line of a figure's run."""
    return {"color": COLOURS[number % len(COLOURS)], "linestyle": STYLES[number % len(STYLES)]}


def _save(figure: Figure, target: Path) -> list[Path]:
    paths = [target.with_suffix(suffix) for suffix in (".png", ".svg")]
    for path in paths:
        figure.savefig(path, dpi=130)
    _pyplot().close(figure)
    return paths


def draw_curves(runs: list[tuple[str, list[dict]]], target: Path, threshold: float | None = None) -> list[Path]:
    """Loss, alpha and beta over iterations, one line a run, as `target`.png and .svg. `runs` holds (label, the lines of
    metrics.jsonl)."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(1, len(PANELS), figsize=(12, 4), layout="constrained")
    for number, (label, lines) in enumerate(runs):
        look = _look(number)
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
        axes[0].axhline(threshold, color="black", linewidth=0.8, linestyle=(0, (1, 2)), label=f"loss_threshold {threshold:g}")
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return _save(figure, target)


def draw_columns(columns: list[tuple[str, list[tuple[str, list[dict]]]]], target: Path) -> list[Path]:
    """The rates and the losses in four rows, as `target`.png and .svg; a column for each (title, runs), whose runs are as in
    `draw_curves`. A row has one scale over all columns: logarithmic for rates that stay positive, the values of most of the
    iterations for losses."""
    pyplot = _pyplot()
    size = 1 + 3.6 * len(columns), 10.5
    figure, axes = pyplot.subplots(len(ROWS), len(columns), figsize=size, layout="constrained", squeeze=False, sharey="row",
                                   sharex="col")
    for (name, title), row in zip(ROWS, axes):
        drawn = []
        for axis, (_, runs) in zip(row, columns):
            for number, (label, lines) in enumerate(runs):
                look = _look(number)
                points = [(line["step"], line[name]) for line in lines if name in line]
                if not points:
                    continue
                steps, values = zip(*points)
                if name == "loss/train":
                    values = _smooth(values, 5)
                axis.plot(steps, values, label=label, linewidth=1.6, marker="o" if len(values) < 30 else None, markersize=3.5,
                          **look)
                drawn.extend(values)
            axis.grid(alpha=0.25)
        row[0].set_ylabel(title)
        if name.startswith("rates/") and drawn and min(drawn) > 0:
            row[0].set_yscale("log")
        elif drawn:
            ordered = sorted(drawn)
            low, high = ordered[0], ordered[-1 - len(ordered) // 50]
            row[0].set_ylim(low - 0.05 * (high - low), high + 0.1 * (high - low) or None)
    for column, (title, _) in enumerate(columns):
        axes[0][column].set_title(title)
        axes[-1][column].set_xlabel("meta-iteration")
        handles, names = axes[0][column].get_legend_handles_labels()
        axes[-1][column].legend(handles, names, loc="upper center", bbox_to_anchor=(0.5, -0.28), frameon=False, fontsize=8)
    return _save(figure, target)


def draw_maps(rows: list[dict[str, str]], keys: list[str], target: Path) -> list[Path]:
    """Iterations to the threshold over alpha and beta, or the last two of a sweep's `keys`, as `target`.png and .svg: medians
    over the seeds that reached it, a blank cell where none did, "n/m" below where only some did; one panel for each value of
    the other keys."""
    from matplotlib.colors import LogNorm

    pyplot = _pyplot()

    def number(text: str) -> float | str:
        try:
            return float(text)
        except ValueError:
            return text

    down, across = ("rates.alpha", "rates.beta") if {"rates.alpha", "rates.beta"} <= set(keys) else keys[-2:]
    others = [key for key in keys if key not in (down, across)]
    panels = list(dict.fromkeys(tuple(row[key] for key in others) for row in rows))
    downs, acrosses = (sorted({number(row[key]) for row in rows}, key=lambda v: (str(type(v)), v)) for key in (down, across))
    reached = {}
    for row in rows:
        place = tuple(row[key] for key in others), number(row[down]), number(row[across])
        reached.setdefault(place, []).append(number(row["iterations_to_threshold"] or "nan"))
    counts = [count for group in reached.values() for count in group if count == count]
    scale = LogNorm(min(counts, default=1), max([*counts, 2]))
    size = 1.5 + (0.75 * len(acrosses) + 0.8) * len(panels), 1.4 + 0.55 * len(downs)
    figure, axes = pyplot.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axis, panel in zip(axes[0], panels):
        for y, first in enumerate(downs):
            for x, second in enumerate(acrosses):
                group = reached.get((panel, first, second), [])
                good = [count for count in group if count == count]
                if not good:
                    continue
                middle = median(good)
                colour = pyplot.get_cmap("viridis_r")(float(scale(middle)))
                axis.add_patch(pyplot.Rectangle((x - 0.5, y - 0.5), 1, 1, color=colour))
                text = f"{middle:g}" + (f"\n{len(good)}/{len(group)}" if len(good) < len(group) else "")
                dark = 0.299 * colour[0] + 0.587 * colour[1] + 0.114 * colour[2] < 0.5
                axis.text(x, y, text, ha="center", va="center", fontsize=9, color="white" if dark else "black")
        axis.set(xlim=(-0.5, len(acrosses) - 0.5), ylim=(-0.5, len(downs) - 0.5), xlabel=across,
                 title=", ".join(f"{key} {value}" for key, value in zip(others, panel)))
        axis.set_xticks(range(len(acrosses)), [f"{v:g}" if isinstance(v, float) else v for v in acrosses])
        axis.set_yticks(range(len(downs)), [f"{v:g}" if isinstance(v, float) else v for v in downs])
        axis.set_xticks([i + 0.5 for i in range(len(acrosses) - 1)], minor=True)
        axis.set_yticks([i + 0.5 for i in range(len(downs) - 1)], minor=True)
        axis.grid(which="minor", color="0.85", linewidth=0.8)
        axis.tick_params(which="minor", length=0)
    axes[0][0].set_ylabel(down)
    figure.suptitle("iterations to the threshold; blank: not reached", fontsize=11)
    return _save(figure, target)


def draw_evaluation(steps: Sequence[int], curve: dict[str, list[float]], reliability: list[list[float]] | None, ece: float,
                    target: Path) -> list[Path]:
    """Means over tasks after each count of inner steps with their 95 % intervals, as `target`.png and .svg; for a
    classification with a reliability diagram (Guo et al. 2017, figure 1) of (queries, their confidences' sum, those answered
    right) in each bin of confidence."""
    from matplotlib.ticker import MaxNLocator

    pyplot = _pyplot()
    names = [name for name in curve if not name.endswith("_ci95")][::-1]
    count = len(names) + bool(reliability)
    figure, axes = pyplot.subplots(1, count, figsize=(4 * count, 4), layout="constrained", squeeze=False)
    for axis, name, colour in zip(axes[0], names, COLOURS):
        means, spreads = curve[name], curve[f"{name}_ci95"]
        axis.errorbar(steps, means, spreads, fmt="o-", color=colour, linewidth=1.8, markersize=5, capsize=4)
        axis.set(title=f"query {name} {means[-1]:.3f} ± {spreads[-1]:.3f}", xlabel="inner steps (bars: 95 % interval)")
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        axis.grid(alpha=0.25)
    if reliability:
        _draw_reliability(axes[0][-1], reliability, ece)
        handles, labels = axes[0][-1].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower right", ncols=3, frameon=False, fontsize=8)
    return _save(figure, target)


def _draw_reliability(axis: Axes, bins: list[list[float]], ece: float) -> None:
    held = [(number, *values) for number, values in enumerate(bins) if values[0]]
    total, width = sum(count for count, *_ in bins), 1 / len(bins)
    centres = [(number + 0.5) * width for number, *_ in held]
    axis.bar(centres, [right / count for _, count, _, right in held], 0.92 * width, color=COLOURS[5], label="accuracy in a bin")
    axis.hlines([confidence / count for _, count, confidence, _ in held], [c - width / 2 for c in centres],
                [c + width / 2 for c in centres], color=COLOURS[1], linewidth=2, label="mean confidence in a bin")
    axis.bar(centres, [count / total for _, count, *_ in held], 0.35 * width, color="black", label="share of the queries")
    axis.plot([0, 1], [0, 1], color="0.4", linewidth=0.9, linestyle="--")
    axis.set_axisbelow(True)
    axis.set(title=f"expected calibration error {ece:.3f}", xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
    axis.grid(alpha=0.25)
