"""What a person sees of a run: a progress bar on a terminal, plain lines elsewhere, a table and a link at the end."""
from __future__ import annotations

import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from alpha_maml.errors import say
from alpha_maml.trainer.config import Config
from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.runs.summary import SUMMARY, own_metrics, shown

LINE_SECONDS = 10.0  # between plain lines


class Unbreakable:
    """A stream whose reader may leave: a terminal that is closed, `head` at the other end of a pipe."""

    def __init__(self, stream: TextIO):
        self.stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with suppress(OSError):
            self.stream.write(text)
        return len(text)

    def flush(self) -> None:
        with suppress(OSError):
            self.stream.flush()


class Progress:
    """Called on rank 0 alone; on other ranks nothing is ever shown."""

    def __init__(self, config: Config):
        self.config, self.folder, self.sender, self.bar = config, None, None, None
        self.finished_before, self.shown = False, 0.0

    def started(self, folder: Path, finished: bool) -> None:
        self.folder, self.finished_before = folder, finished
        if finished:
            done = read_json(folder / SUMMARY).get("iterations", self.config.iterations)
            print(f"{folder} is finished: {done} iterations. Raise iterations to go on, or choose another run_dir.")
            return
        print(f"run: {folder}", flush=True)
        if self.config.tracking.uri != "disabled":
            from alpha_maml.trainer.tracking.sender import Sender

            self.sender = Sender(folder)

    def watch(self, step: int, metrics: dict[str, float]) -> None:
        text = {"loss": f"{metrics.get('loss/train', float('nan')):.3f}", "alpha": f"{metrics['rates/alpha']:.2e}",
                "beta": f"{metrics['rates/beta']:.2e}", "tasks/s": f"{metrics['perf/tasks_per_s']:.0f}"}
        if sys.stderr.isatty():
            if self.bar is None:
                from tqdm import tqdm

                self.bar = tqdm(total=self.config.iterations, initial=step - 1, unit="it", dynamic_ncols=True)
            self.bar.update(step - self.bar.n)
            self.bar.set_postfix(text, refresh=False)
        elif time.monotonic() - self.shown > LINE_SECONDS or step == self.config.iterations:
            self.shown = time.monotonic()
            left = (self.config.iterations - step) * metrics["perf/step_ms"] / 1000
            words = "  ".join(f"{name} {value}" for name, value in text.items())
            print(f"{step:>7}/{self.config.iterations}  {words}  left {left:.0f} s", flush=True)

    def finish(self) -> None:
        if self.bar is not None:
            self.bar.close()
        if self.folder is None or self.finished_before:
            return
        unsent = self.sender.close(self.config.tracking.timeout) if self.sender else None
        summary = read_json(self.folder / SUMMARY)
        if summary:  # a full disk may have kept it from being written
            self._table(summary)
        if unsent:
            say(unsent)
        curves = self.folder / "curves.png"  # the sender draws it, when all is in the store
        if self.sender and not unsent:
            from alpha_maml.trainer.tracking.state import link

            print(f"\nCurves: {curves}\n{link(self.config, self.folder)}")
        else:
            print(f"\nCurves: alpha-maml report --runs {self.folder} --out {curves}")

    def _table(self, summary: dict) -> None:
        rows = [("", "first", "last")] + [
            (label, shown(summary.get(f"{name}_first")), shown(summary.get(f"{name}_last")))
            for label, name in (("training loss", "loss"), ("alpha", "alpha"), ("beta", "beta"))]
        print()
        for row in rows:
            print("  {:<14}{:>12}{:>12}".format(*row))
        accuracy = summary.get("val_accuracy")
        if accuracy is not None:
            interval = summary.get("val_accuracy_ci95")  # none of a single task
            spread = "" if interval is None else f" +- {100 * interval:.2f}"
            print(f"  validation accuracy {100 * accuracy:.2f} %{spread}")
        elif summary.get("val_loss") is not None:
            print(f"  validation loss {summary['val_loss']:.4f}")
        for name, value in own_metrics(summary).items():
            print(f"  validation {name} {value:.4f}")
        reached = summary.get("iterations_to_threshold")
        print(f"  loss under {self.config.loss_threshold:g}: " + (f"iteration {reached}" if reached else "not reached"))
        ranks = summary.get("world_size")
        print(f"  {shown(summary.get('tasks_per_s'))} tasks/s on {ranks} rank{'s' * (ranks != 1)}, "
              f"{summary.get('seconds', 0):.1f} s; everything is in {self.folder}")
