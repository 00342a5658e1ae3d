"""Throws generated bad input at every place that reads any, and prints a table of what came of it.

usage: python tests/fuzz/fuzz.py [--cases 10000] [--seed 0] [--area NAME]

Each case ends as it must, or the script fails and prints the case: refused in one line (exit code 2, InputError), or a correct
run; never a traceback, a hang, or something under the name of a result that is none. The same seed gives the same cases. All
happens in this process, by the functions that the command line calls.
"""
from __future__ import annotations

import argparse
import contextlib
import io
import os
import resource
import signal
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple
from unittest import mock

import hypothesis
from hypothesis import HealthCheck, Phase, strategies
from hypothesis.strategies import DataObject

from alpha_maml.errors import InputError

sys.path.insert(0, str(Path(__file__).parents[1]))  # for tests/pictures.py
SECONDS = 30  # that a case may take; the slowest takes two
MEMORY = 6 * 2**30  # bytes of addresses above what the process has, so that a bomb fails here and not on the whole machine
PLACE = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # where a sync costs nothing
NOTES = (": decoding ", "; using the one before it", "; it is left out")  # lines that may stand before the one
REFUSED, RAN = "refused in one line", "ran"


class Area(NamedTuple):
    name: str
    injected: str  # in words
    share: int  # of 100 cases
    case: Callable[[DataObject, Path], str]  # (source of choices, an empty folder) -> the outcome; raises where it is a bad one


def fuzz(area: Area, cases: int, seed: int) -> Counter[str]:
    """How often each outcome came; raises the smallest bad case that was found."""
    outcomes: Counter[str] = Counter()

    @hypothesis.seed(seed)
    @hypothesis.settings(max_examples=cases, deadline=None, database=None, phases=[Phase.generate],  # each is small
                         suppress_health_check=list(HealthCheck))
    @hypothesis.given(strategies.data())
    def one(data: DataObject) -> None:
        with tempfile.TemporaryDirectory(dir=PLACE) as folder, _inside(folder), _limited(), warnings.catch_warnings():
            warnings.simplefilter("error")
            outcomes[area.case(data, Path(folder))] += 1

    one()
    return outcomes


@contextlib.contextmanager
def _inside(folder: str) -> Iterator[None]:
    """Relative paths, and the cache, lie in the folder."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        with mock.patch.dict(os.environ, {"XDG_CACHE_HOME": folder}):
            yield
    finally:
        os.chdir(before)


@contextlib.contextmanager
def _limited() -> Iterator[None]:
    """A case that hangs or wants all memory fails instead; signals' handlers are put back."""
    def late(number: int, frame: object) -> None:
        raise AssertionError(f"hangs: not over after {SECONDS} s")

    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    before, limits = signal.signal(signal.SIGALRM, late), resource.getrlimit(resource.RLIMIT_AS)
    held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (held + MEMORY, limits[1]))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        resource.setrlimit(resource.RLIMIT_AS, limits)
        for number, handler in ({signal.SIGALRM: before} | handlers).items():
            signal.signal(number, handler)


def refused(error: InputError) -> str:
    """The outcome of an InputError, which must be one line that a terminal shows as it is."""
    assert str(error).isprintable() and str(error) and len(str(error)) < 2500, repr(str(error))
    return REFUSED


def called(function: Callable[..., object], *arguments: object) -> str:
    """The outcome of a function that raises InputError or succeeds."""
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # what `say` says
            function(*arguments)
    except InputError as error:
        return refused(error)
    return RAN


def commanded(words: list[str], result: Path | None = None) -> str:
    """The outcome of a command line, by its exit code and what it said. `result` must be there if, and only if, it
    succeeded."""
    from alpha_maml.launch.cli import main

    output, errors = io.StringIO(), io.StringIO()
    try:
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(errors):
            main(words)
    except SystemExit as end:
        code, lines = end.code, errors.getvalue().splitlines()
    said = f"{words}\ncode {code}: {lines}"
    if code == 0:
        assert result is None or result.exists(), f"{said}\n{result} is missing"
        return RAN
    assert result is None or not result.exists(), f"{said}\n{result} is there"
    assert lines and all(line.startswith("alpha-maml: ") and line.isprintable() for line in lines), said
    if code == 2:
        assert sum(not any(note in line for note in NOTES) for line in lines) == 1, said
        return REFUSED
    assert code == 1 and ("training diverged" in lines[-1] or "out of memory" in lines[-1]), said
    return "diverged, or out of memory, in one line"


def areas() -> list[Area]:
    import file_areas
    import run_areas
    import setting_areas

    return [*setting_areas.AREAS, *file_areas.AREAS, *run_areas.AREAS]


def table(rows: list[tuple[Area, Counter[str]]], seed: int) -> str:
    head = ["| what was injected | cases | refused in one line | ran as it should |", "|---|---|---|---|"]
    body = [f"| {area.name}: {area.injected} | {found.total():,} | {found[REFUSED]:,} | {found.total() - found[REFUSED]:,} |"
            for area, found in rows]
    total = sum(found.total() for _, found in rows)
    return "\n".join([*head, *body, f"\n{total:,} cases, seed {seed}, {time.strftime('%F')}: every one ended as it must."])


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cases", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--area", help="only this one")
    known = parser.parse_args()
    rows = []
    for area in areas():
        if known.area in (None, area.name):
            begun = time.monotonic()
            try:
                found = fuzz(area, known.cases if known.area else -(-known.cases * area.share // 100), known.seed)
            except BaseException as error:
                error.__notes__ = [note[:2000] for note in getattr(error, "__notes__", [])]  # an image is megabytes
                print(f"again: python tests/fuzz/fuzz.py --area '{area.name}' --cases {known.cases} --seed {known.seed}",
                      file=sys.stderr)
                raise
            print(f"{area.name}: {dict(found)} in {time.monotonic() - begun:.0f} s", file=sys.stderr, flush=True)
            rows.append((area, found))
    print(table(rows, known.seed))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    sys.modules["fuzz"] = sys.modules["__main__"]  # one Area for the modules that import it
    main()
