"""The command line: alpha-maml VERB --config FILE [--key.sub value ...]."""
from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import NoReturn

from alpha_maml.errors import Failure, InputError, first_line, say
from alpha_maml.launch import slurm, use
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer.config import table
from alpha_maml.trainer.config.keys import values_of

VERBS = {
    "train": "train theta, alpha and beta; the same command again resumes",
    "slurm": "train as a SLURM job, which comes back until the run is finished",
    "sweep": "train every cell of a grid of values, each as a run of its own; the same command again does what is left",
    "evaluate": "test a trained run on held-out tasks",
    "adapt": "learn a new task from a few examples and predict with a trained run",
    "export": "write a trained run's weights as one file, and serve them as an MLflow model",
    "report": "draw losses and rates of several runs side by side, or the map of a sweep",
    "sync": "ship to MLflow what a run that has ended left unsent",
}


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(f"command line: {message}; see {self.prog} --help")


def parser() -> Parser:
    root = Parser(prog="alpha-maml", allow_abbrev=False, description="Alpha MAML: meta-learning whose two learning rates "
                  "adapt online, on any number of GPUs.")
    verbs = root.add_subparsers(dest="verb", required=True, metavar="VERB")
    for verb, meaning in VERBS.items():
        sub = verbs.add_parser(verb, help=meaning, description=meaning, allow_abbrev=False)
        if verb == "sweep":
            sub.add_argument("--grid", action="append", required=True, metavar="KEY=V,V,...", help="values of one key; repeat")
            sub.add_argument("--seeds", type=int, default=1, metavar="N", help="runs of each cell (default: 1)")
            sub.add_argument("--jobs", type=int, default=1, metavar="N", help="processes side by side (default: 1)")
            sub.add_argument("--vectorised", action="store_true", help="train cells that differ only in numbers of the rates "
                             "as one program: faster where a run's operations are small")
            sub.add_argument("--part", default="1/1", metavar="I/N", help="only the Ith of N parts, as tasks of a job array do")
        if verb in ("train", "sweep"):
            sub.add_argument("--config", type=Path, metavar="FILE", help="YAML file of the keys below")
        if verb == "slurm":
            slurm.add_options(sub)
        if verb in ("evaluate", "adapt", "export"):
            use.add_options(sub, verb)
        if verb == "report":
            which = sub.add_mutually_exclusive_group(required=True)
            which.add_argument("--runs", type=Path, nargs="+", metavar="DIR", help="the runs' folders: losses and rates")
            which.add_argument("--sweep", type=Path, metavar="DIR", help="a sweep's folder: maps of its grid")
            which.add_argument("--column", action="append", nargs="+", metavar=("TITLE", "DIR"), help="a title and runs' "
                               "folders: a column of the paper's first figure, rates and losses in rows; repeat")
            sub.add_argument("--out", type=Path, required=True, metavar="FILE", help="the figure; .png and .svg are written")
            continue
        if verb in ("sync", "adapt", "export"):
            sub.add_argument("--run_dir", type=Path, required=True, metavar="DIR", help="the run's folder")
            continue
        for name, key in table().items():
            text = f"{values_of(key)}; default {'null' if key.default is None else key.default}"
            meaning = f"{key.owner}: {key.meaning}" if key.owner else key.meaning
            sub.add_argument(f"--{name}", default=argparse.SUPPRESS, metavar="VALUE",
                             help=f"{meaning} ({text})".replace("%", "%%"))
    return root


def main(arguments: list[str] | None = None) -> NoReturn:
    """Runs a verb and exits: 0 done, 2 the input is wrong (one line), 1 anything else, a signal's code where one stopped
    the run."""
    try:
        words = sys.argv[1:] if arguments is None else arguments
        known, unknown = parser().parse_known_args(words)
        overrides = {name: value for name, value in vars(known).items() if name in table()}
        if unknown:  # names the nearest key
            name, _, value = unknown[0].removeprefix("--").partition("=")
            option = unknown[0].partition("=")[0]
            configuration.checked(name, value, f"{option} on the command line")
            raise InputError(f"command line: {option} is not for {known.verb}; see alpha-maml {known.verb} --help")
        known.words = words
        code = {"train": train, "sweep": sweep, "evaluate": use.evaluate, "adapt": use.adapt, "export": use.export,
                "report": report, "sync": sync, "slurm": slurm.submit}[known.verb](known, overrides)
    except InputError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":  # once a node is enough
            say(str(error))
        code = 2
    except (Failure, OSError) as error:
        first, cause = error, error.__context__
        while isinstance(cause, (Failure, OSError)):
            first = cause if getattr(cause, "filename", True) else first  # what it led to says less; so does one without a name
            cause = cause.__context__
        what = f"{first.filename}: {first.strerror}" if isinstance(first, OSError) and first.filename else first
        say(f"{what}; mend that and give the same command again, which goes on from the last checkpoint")
        code = 1
    except KeyboardInterrupt:
        code = 130
    sys.stdout.flush()
    sys.exit(code)


def train(known: argparse.Namespace, overrides: dict[str, str]) -> int:
    config = configuration.build(known.config, overrides)
    from alpha_maml.launch import runtime
    from alpha_maml.launch.progress import Progress, Unbreakable
    from alpha_maml.models.checks import out_of_memory
    from alpha_maml.trainer import loop

    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)  # nobody may watch, and it trains
    stop = runtime.StopRequest()
    with runtime.world(config.device, config.engine.timeout) as world:
        progress = Progress(config)
        try:
            status = loop.train(config, world, stop, progress.started, progress.watch)
        except loop.Diverged as error:
            if world.local_rank == 0:  # all ranks come to the same end
                say(str(error))
            status = "FAILED"
        except (RuntimeError, MemoryError) as error:
            if not out_of_memory(error):
                raise
            say(f"out of memory with inner.steps {config.inner.steps} and task.chunk {config.task.chunk}; set task.chunk to "
                "fewer tasks at once, or inner.recompute to true; the last checkpoint is from before")
            status = "FAILED"
        finally:
            progress.finish()
    if status == "KILLED":
        return stop.code
    return 0 if status == "FINISHED" else 1


def sweep(known: argparse.Namespace, overrides: dict[str, str]) -> int:
    base = configuration.build(known.config, overrides)
    if base.run_dir is None:
        raise InputError("run_dir: is needed here; give the sweep's folder with --run_dir")
    if known.jobs < 1:
        raise InputError(f"--jobs: {known.jobs} must be 1 or more; correct it")
    part, _, parts = known.part.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise InputError(f"--part: {known.part!r} must be I/N with I from 1 to N; correct it")
    from alpha_maml.launch import runtime
    from alpha_maml.launch.progress import Unbreakable
    from alpha_maml.trainer.engines import ENGINES
    from alpha_maml.trainer.runs.folder import lock
    from alpha_maml.trainer.studies import sweep as sweeping

    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    folder = Path(base.run_dir)
    cells = sweeping.cells(base, known.grid, known.seeds, folder)
    folder.mkdir(parents=True, exist_ok=True)
    if known.vectorised and not ENGINES.has(base.engine.name, "replicated"):
        raise InputError(f"--vectorised: engine.name {base.engine.name} shards one run; use engine.name torch")
    if known.jobs > 1 and parts != "1":
        raise InputError("--jobs: --part divides the cells already; drop one of the two")
    alone = parts == "1" and runtime.environment("RANK", 0) == 0  # parts of a job array share the folder
    with lock(folder) if alone else nullcontext():
        if known.jobs > 1:
            whole = [sys.executable, "-m", "alpha_maml", *known.words, "--jobs", "1"]
            environment = {"OMP_NUM_THREADS": "1"} | os.environ
            jobs = [subprocess.Popen([*whole, "--part", f"{i + 1}/{known.jobs}"], env=environment) for i in range(known.jobs)]
            for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP):
                signal.signal(number, lambda received, frame: [job.send_signal(received) for job in jobs])
            codes = [job.wait() for job in jobs]
        else:
            stop = runtime.StopRequest()
            with runtime.world(base.device, base.engine.timeout) as world:
                mine = cells[int(part) - 1::int(parts)]
                codes = [0 if sweeping.work(mine, world, stop, known.vectorised) else stop.code]
        if parts == "1":
            rows = sweeping.table(cells, folder)
            print(*sweeping.lines(rows), f"\n{folder / sweeping.TABLE}", sep="\n")
            if base.tracking.uri != "disabled":
                print(sweeping.publish(cells))
    return max(codes)


def report(known: argparse.Namespace, overrides: dict[str, str]) -> int:
    from alpha_maml.trainer.studies import report as reporting

    try:
        known.out.parent.mkdir(parents=True, exist_ok=True)
        if known.sweep:
            paths, runs = reporting.maps(known.sweep, known.out), sorted(known.sweep.glob("*/tracking.json"))
            first = runs[0].parent if runs else known.sweep
        elif known.column:
            paths, first = reporting.columns(known.column, known.out), Path(known.column[0][1])
        else:
            paths, first = reporting.curves(known.runs, known.out), known.runs[0]
    except OSError as error:
        raise InputError(f"--out: {known.out} cannot be written ({error.strerror}); choose another file") from None
    print(*paths, sep="\n")
    complaint = reporting.log(paths, first)
    if complaint:
        say(f"{known.out}: {complaint}")
    return 0


def sync(known: argparse.Namespace, overrides: dict[str, str]) -> int:
    from alpha_maml.trainer.tracking import sender, state

    folder, config = known.run_dir, configuration.of_run(known.run_dir, {})
    if config.tracking.uri == "disabled":
        raise InputError(f"tracking.uri: disabled in {folder / 'config.yaml'}: there is no store to ship it to; name one there")
    try:
        reached = sender.sync(folder, config.tracking.timeout)
    except InputError:
        raise
    except Exception as error:
        say(f"the store cannot be reached ({type(error).__name__}: {first_line(error)}); nothing is lost, run the same command "
            "again")
        return 1
    print(f"{folder}: all {reached['offset']} bytes of metrics are in MLflow, run {reached['run_id']}")
    print(state.link(config, folder))
    return 0
