"""Trains the families of configs/families by fixed pairs of rates and by the default rule, and prints one table.

usage: python tests/benchmarks/families.py [--family F ...] [--starts 7x7] [--seeds 1] [--jobs 2] [--set KEY=VALUE ...]
       python tests/benchmarks/families.py --reference [--family F ...]    measures the fixed pairs anew, and keeps them
       python tests/benchmarks/families.py --variants sensitivity | ablation [--family F ...]    each beside the default

The reference of a family is the best final validation loss of fixed pairs: SGD outside with alpha from 1e-3 to 10 and beta
from 1e-3 to 10, and Adam outside with beta from 1e-4 to 0.1, in decades, then the eight half decades around the best of each.
(--grid full takes alpha and beta from 1e-5 to 10 for both: below 1e-3 alpha changes nothing, and theta hardly moves.) It is
kept in tests/benchmarks/families.json with its date and commit. The rule runs from alpha and beta in 1e-5 ... 10, --starts of
each. A run ends as diverged after 50 iterations in a row without a usable loss.
"""
from __future__ import annotations

import argparse
import importlib
import json
import math
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import reduce
from pathlib import Path
from typing import Any, NamedTuple

import torch

from alpha_maml.trainer import config as configuration
from alpha_maml.trainer import loop
from alpha_maml.trainer.engines.collective import World
from alpha_maml.trainer.setup import set_up
from alpha_maml.trainer.step import METRICS, train_step

ROOT = Path(__file__).parents[2]
FAMILIES = ROOT / "configs/families"
OMNIGLOT = Path(os.environ.get("OMNIGLOT_ROOT", ROOT / "../shared/data/omniglot"))
KEPT = Path(__file__).with_suffix(".json")
DECADES = [10.0**n for n in range(-5, 2)]
GRIDS = {"sgd": (DECADES[2:], DECADES[2:]), "adam": (DECADES[2:], DECADES[1:5])}
HALF = math.sqrt(10)
WINDOW = 20  # iterations of training that a loss is averaged over
LARGEST = 1e6  # what a mean takes for the loss of a run that diverged
WORSE = 10  # times the loss at the start, over WINDOW iterations: a fixed pair does not come back from there


class Job(NamedTuple):
    family: str
    optimizer: str | None  # None: the default
    fixed: bool
    alpha_0: float
    beta_0: float
    seed: int
    settings: tuple[str, ...] = ()  # KEY=VALUE
    constants: tuple[str, ...] = ()  # PLACE=VALUE


@contextmanager
def changed(constants: tuple[str, ...]) -> Iterator[None]:
    """Constants of the trainer have other values for a while, as core.rules.adaptive:REACH=0.3."""
    before = []
    for place, _, value in (word.partition("=") for word in constants):
        module, _, name = place.partition(":")
        *owners, attribute = name.split(".")
        owner = reduce(getattr, owners, importlib.import_module(f"alpha_maml.trainer.{module}"))
        before.append((owner, attribute, getattr(owner, attribute)))
        setattr(owner, attribute, float(value))
    try:
        yield
    finally:
        for owner, attribute, value in before:
            setattr(owner, attribute, value)


def train(job: Job) -> dict[str, Any]:
    """Trains one run without a folder, and says how it ended."""
    with changed(job.constants):
        return _train(job)


def _train(job: Job) -> dict[str, Any]:
    values = dict(word.split("=", 1) for word in job.settings)
    values |= {"rates.alpha": repr(job.alpha_0), "rates.beta": repr(job.beta_0), "seed": str(job.seed), "device": "cpu",
               "rates.rule": "fixed" if job.fixed else values.get("rates.rule", "adaptive")}
    if job.optimizer:
        values["outer.optimizer"] = job.optimizer
    if OMNIGLOT.is_dir():  # else it is downloaded
        values["data.root"] = str(OMNIGLOT)
    config = configuration.build(FAMILIES / f"{job.family}.yaml", values)
    begun = time.monotonic()
    problem, state = set_up(config, World())
    rows: list[list[float]] = []
    skipped, lost = 0, False
    while state.iteration < config.iterations and not lost:
        state, row = train_step(problem, state, False)
        rows.append(row.tolist())
        skipped = skipped + 1 if rows[-1][loop.SKIPPED] else 0
        recent = statistics.fmean(r[0] for r in rows[-WINDOW:])
        lost = loop.hopeless(config, rows[-1], skipped) or (
            job.fixed and len(rows) > 40 and not recent < WORSE * statistics.fmean(r[0] for r in rows[:WINDOW]))
    found = {} if lost else loop.validate(problem, state)
    value = found.get("loss/val", math.inf)
    beta = METRICS.index("rates/beta")
    return job._asdict() | {
        "loss": value if math.isfinite(value) else math.inf, "accuracy": found.get("accuracy/val"),
        "diverged": lost or not math.isfinite(value), "losses": [r[0] for r in rows], "alpha": state.rates.alpha.mean().item(),
        "betas": [rows[i][beta] for i in (19, 49, 99, 199) if i < len(rows)] + [rows[-1][beta]],
        "skipped": sum(r[loop.SKIPPED] for r in rows), "seconds": time.monotonic() - begun}


def all_of(jobs: list[Job], processes: int) -> list[dict[str, Any]]:
    """The runs, side by side, with a line of progress for each."""
    found = []
    with multiprocessing.get_context("spawn").Pool(processes, torch.set_num_threads, (1,)) as pool:
        for result in pool.imap_unordered(train, jobs):
            found.append(result)
            start = f"({result['alpha_0']:.2g}, {result['beta_0']:.2g}), seed {result['seed']}"
            print(f"{len(found)}/{len(jobs)} {result['family']}, {result['optimizer'] or 'the rule'} from {start}: "
                  f"{result['loss']:.4f} in {result['seconds']:.0f} s", flush=True)
    return found


def pairs(optimizer: str, full: bool) -> list[tuple[float, float]]:
    alphas, betas = (DECADES, DECADES) if full else GRIDS[optimizer]
    return [(alpha, beta) for alpha in alphas for beta in betas]


def label(family: str, settings: tuple[str, ...]) -> str:
    """Under which the reference of a family is kept, where keys differ from its file."""
    return ", ".join((family, *settings))


def measure_reference(families: list[str], processes: int, full: bool, settings: tuple[str, ...]) -> None:
    """Fills in families.json."""
    commit = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    for family in families:
        best = {}
        for optimizer in GRIDS:
            tried = all_of([Job(family, optimizer, True, a, b, 0, settings) for a, b in pairs(optimizer, full)], processes)
            top = min(tried, key=lambda r: r["loss"])
            factors = [(a, b) for a in (1 / HALF, 1, HALF) for b in (1 / HALF, 1, HALF) if (a, b) != (1, 1)]
            around = [(a * top["alpha_0"], b * top["beta_0"]) for a, b in factors]
            tried += all_of([Job(family, optimizer, True, a, b, 0, settings) for a, b in around], processes)
            tried.sort(key=lambda r: (r["alpha_0"], r["beta_0"]))
            top = min(tried, key=lambda r: r["loss"])
            best[optimizer] = {
                "alpha": top["alpha_0"], "beta": top["beta_0"], "loss": top["loss"], "accuracy": top["accuracy"],
                "runs": len(tried), "diverged": sum(r["diverged"] for r in tried),
                "final": statistics.fmean(top["losses"][-WINDOW:]),
                "all": [[r["alpha_0"], r["beta_0"], round(r["loss"], 5)] for r in tried]}
        kept = json.loads(KEPT.read_text()) if KEPT.is_file() else {}
        kept[label(family, settings)] = {"date": str(date.today()), "commit": commit, **best}
        KEPT.write_text("{\n" + ",\n".join(f'"{name}": {json.dumps(row)}' for name, row in sorted(kept.items())) + "\n}\n")
        print(family, {name: (b["alpha"], b["beta"], b["loss"]) for name, b in best.items()}, flush=True)


def measure_rule(families: list[str], starts: list[tuple[float, float]], seeds: int, processes: int,
                 settings: tuple[str, ...], constants: tuple[str, ...]) -> list[dict[str, Any]]:
    """A row for each family: the rule from every start, beside the reference."""
    kept, rows = json.loads(KEPT.read_text()), []
    for family in families:
        jobs = [Job(family, None, False, a, b, seed, settings, constants) for a, b in starts for seed in range(seeds)]
        runs = sorted(all_of(jobs, processes), key=lambda r: r["loss"])
        losses = [r["loss"] for r in runs]
        reference = kept[label(family, settings)]
        name, best = min(((name, reference[name]) for name in GRIDS), key=lambda pair: pair[1]["loss"])
        rows.append({
            "family": label(family, settings), "runs": len(runs), "fixed": best["loss"],
            "by": f"{name} {best['alpha']:.2g}, {best['beta']:.2g}",
            "best": losses[0], "median": statistics.median(losses), "worst": losses[-1],
            "diverged": sum(r["diverged"] for r in runs), "reached": reached(runs, best["final"]),
            "accuracy": [best["accuracy"], statistics.median(r["accuracy"] for r in runs)] if best["accuracy"] else None,
            "alpha": statistics.median(r["alpha"] for r in runs), "betas": [r["betas"] for r in runs]})
        print(line_of(rows[-1]), flush=True)
    return rows


def reached(runs: list[dict[str, Any]], loss: float) -> float | None:
    """The median iteration after which the mean training loss of WINDOW iterations is as low as a fixed pair's at its end."""
    found = []
    for run in runs:
        means = (statistics.fmean(run["losses"][i - WINDOW : i]) for i in range(WINDOW, len(run["losses"]) + 1))
        found.append(next((i + WINDOW for i, mean in enumerate(means) if mean <= loss), math.inf))
    middle = statistics.median(found)
    return middle if math.isfinite(middle) else None


RULE, STEP, RADIUS = "core.rules.adaptive:", "optim.step:", "optim.optimizer:Optimizer.radius="
CONSTANTS = {  # name: place, a third or so, three times or so
    "radius 0.01": (RADIUS, 0.0033, 0.03), "SLOWER 0.1": (f"{RULE}SLOWER=", 0.033, 0.3),
    "HORIZON 20": (f"{RULE}HORIZON=", 7, 60), "kappa 0.5": ("rates.kappa=", 0.17, 1.5),
    "FLOOR 0.03": (f"{RULE}FLOOR=", 0.01, 0.09), "START 0.01": (f"{RULE}START=", 0.0033, 0.03),
    "REACH 0.1": (f"{RULE}REACH=", 0.033, 0.3), "WORSE 10": (f"{RULE}WORSE=", 3, 30),
    "SHRINK_STEPS 20": (f"{STEP}SHRINK_STEPS=", 7, 60), "FLOOR of lengths 0.3": (f"{STEP}FLOOR=", 0.1, 0.9),
    "AVERAGED 4": (f"{STEP}AVERAGED=", 1, 12), "PULL 0.5": (f"{STEP}PULL=", 0.17, 0.83)}
VARIANTS = {
    "sensitivity": {f"{name}: {value:g}": (f"{place}{value}",)
                    for name, (place, *values) in CONSTANTS.items() for value in values},
    "ablation": {
        "alpha stays where it is placed": ("rates.kappa=1e-9", f"{RULE}SLOWER=5e7"),
        "beta stays at its start": (f"{RULE}SLOWER=0",),
        "one alpha for all": ("rates.alpha_shape=scalar",),
        "alpha is not lifted": (f"{RULE}REACH=0",),
        "no iteration is undone": (f"{RULE}WORSE=1e9",),
        "steps do not shrink": (f"{STEP}SHRINK_STEPS=1e9",),
        "no average": ("outer.average=false",),
        "no floor under lengths": (f"{STEP}FLOOR=0",),
        "SGD outside": ("outer.optimizer=sgd",), "AdamW outside": ("outer.optimizer=adamw",),
        "first order": ("inner.order=first",)}}


def measure_variants(families: list[str], variants: dict[str, tuple[str, ...]], seeds: int, processes: int) -> None:
    """A table of the final validation loss of each variant in units of the default's: geometric means over seeds."""
    def jobs(words: tuple[str, ...]) -> list[Job]:
        constants = tuple(word for word in words if ":" in word)
        settings = tuple(word for word in words if ":" not in word)
        return [Job(f, None, False, 1e-3, 1e-4, seed, settings, constants) for f in families for seed in range(seeds)]

    def means(found: list[dict[str, Any]]) -> dict[str, float]:
        return {f: statistics.geometric_mean(min(r["loss"], LARGEST) for r in found if r["family"] == f) for f in families}

    default = means(all_of(jobs(()), processes))
    lines = [f"| | {' | '.join(families)} | mean |", f"|{'---|' * (len(families) + 2)}",
             f"| default, loss | {' | '.join(f'{x:.4g}' for x in default.values())} | |"]
    for name, words in variants.items():
        ratios = [loss / default[f] for f, loss in means(all_of(jobs(words), processes)).items()]
        lines.append(f"| {name} | {' | '.join(f'{r:.2f}' for r in ratios)} | {statistics.geometric_mean(ratios):.2f} |")
        print(lines[-1], flush=True)
    print(*lines, sep="\n")


HEADER = ("| family | best fixed pair | its loss | the rule: best | median | worst | median / fixed | worst / fixed | diverged "
          "| iterations to its training loss | beta at 100, at the end |\n|" + 11 * "---|")


def line_of(row: dict[str, Any]) -> str:
    ends = [statistics.median(b[i] for b in row["betas"]) for i in (min(2, len(row["betas"][0]) - 1), -1)]
    losses = " | ".join(f"{row[name]:.4g}" for name in ("best", "median", "worst"))
    ratios = " | ".join(f"{row[name] / row['fixed']:.2f}" for name in ("median", "worst"))
    return (f"| {row['family']} | {row['by']} | {row['fixed']:.4g} | {losses} | {ratios} | {row['diverged']} of {row['runs']} "
            f"| {row['reached'] or '-'} | {ends[0]:.2g}, {ends[1]:.2g} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = sorted(path.stem for path in FAMILIES.glob("*.yaml"))
    parser.add_argument("--family", action="append", choices=names)
    parser.add_argument("--reference", action="store_true")
    parser.add_argument("--grid", choices=("short", "full"), default="short")
    parser.add_argument("--variants", choices=sorted(VARIANTS))
    parser.add_argument("--starts", default="7x7", help="AxB: so many alphas and betas, evenly over 1e-5 ... 10")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--set", action="append", default=[], dest="settings", metavar="KEY=VALUE")
    parser.add_argument("--constant", action="append", default=[], dest="constants", metavar="PLACE=VALUE",
                        help="another value of a constant of the trainer, as core.rules.adaptive:REACH=0.3")
    parser.add_argument("--out", type=Path, help="a file for the rows, as JSON")
    options = parser.parse_args()
    families = options.family or names
    if options.variants:
        measure_variants(families, VARIANTS[options.variants], options.seeds, options.jobs)
        return
    if options.reference:
        measure_reference(families, options.jobs, options.grid == "full", tuple(options.settings))
        return
    alphas, betas = ([DECADES[round(i * 6 / max(1, n - 1))] for i in range(n)] for n in map(int, options.starts.split("x")))
    starts = [(a, b) for a in alphas for b in betas]
    rows = measure_rule(families, starts, options.seeds, options.jobs, tuple(options.settings),
                        tuple(options.constants))
    print(HEADER, *map(line_of, rows), sep="\n")
    if options.out:
        options.out.write_text(json.dumps(rows))


if __name__ == "__main__":
    main()
