"""The command line in processes of its own: verbs, exit codes, signals, the run's folder."""
from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import newest_state, same_bits, started
from processes import ROOT, command, run, succeed, wrong

from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.runs.metrics import read_metrics

QUICK = ("train", "--task.batch", 4, "--tracking.uri", "disabled", "--evaluation.tasks", 8)
SUMMARY = {"iterations", "world_size", "device", "engine", "rule", "alpha_first", "alpha_last", "beta_first", "beta_last",
           "loss_first", "loss_last", "val_loss", "val_accuracy", "val_accuracy_ci95", "iterations_to_threshold",
           "tasks_per_s", "seconds", "versions"}


def test_help_names_every_verb_and_imports_nothing_slow():
    code = ("import sys\nfrom launch.cli import main\ntry: main(sys.argv[1:])\n"
            "finally: assert not {'torch', 'mlflow', 'matplotlib'} & sys.modules.keys()")
    for arguments in (["--help"], ["train", "--help"]):
        result = subprocess.run([sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
    assert "--rates.alpha" in result.stdout


def test_a_run_leaves_what_is_promised_and_says_when_it_is_finished(tmp_path: Path):
    folder = tmp_path / "run"
    arguments = (*QUICK, "--run_dir", folder, "--iterations", 25, "--evaluation.every", 10, "--checkpoint.every", 5,
                 "--checkpoint.keep", 2)
    result = succeed(*arguments)
    assert "25/25" in result.stdout and "alpha" in result.stdout and "tasks/s on 1 rank," in result.stdout
    assert f"Curves: alpha-maml report --runs {folder}" in result.stdout, "nobody drew them"
    lines = read_metrics(folder)
    assert [line["step"] for line in lines] == list(range(1, 26))
    assert {"loss/train", "rates/alpha", "rates/beta", "hypergradients/alpha", "hypergradients/beta", "perf/tasks_per_s",
            "perf/step_ms", "timestamp"} <= lines[0].keys()
    assert [line["step"] for line in lines if "loss/val" in line] == [10, 20, 25]
    assert [p.name for p in checkpoint.saved(folder / "checkpoints")] == ["00000020", "00000025"]
    summary = read_json(folder / "summary.json")
    assert SUMMARY <= summary.keys() and summary["iterations"] == 25 and summary["val_accuracy"] is None
    assert summary["alpha_first"] == 0.01 and summary["loss_first"] == pytest.approx(
        sum(line["loss/train"] for line in lines[:20]) / 20)
    before = (folder / "metrics.jsonl").read_bytes()
    assert "is finished: 25 iterations" in succeed(*arguments).stdout
    assert (folder / "metrics.jsonl").read_bytes() == before


def test_training_from_absurd_rates_learns(tmp_path: Path):
    succeed("train", "--tracking.uri", "disabled", "--rates.alpha", 1e-3, "--rates.beta", 1e-4, "--iterations", 500,
            "--run_dir", tmp_path / "run")
    summary = read_json(tmp_path / "run/summary.json")
    assert summary["loss_last"] < summary["loss_first"] / 2 and summary["iterations_to_threshold"] < 300


def test_a_single_task_has_an_accuracy_and_no_interval(tmp_path: Path, omniglot_root: str):
    result = succeed("train", "--data.name", "omniglot", "--data.root", omniglot_root, "--model.name", "conv4",
                     "--model.channels", 4,
                     "--task.ways", 5, "--task.shots", 1, "--task.queries", 1, "--task.batch", 2, "--iterations", 1,
                     "--evaluation.tasks", 1, "--tracking.uri", "disabled", "--run_dir", tmp_path)
    assert re.search(r"validation accuracy \d+\.00 %$", result.stdout, re.MULTILINE), result.stdout


def test_wrong_command_lines_are_one_line(tmp_path: Path):
    assert "rates.alpa: no such key" in wrong("train", "--rates.alpa", 3)
    assert "rates.alpha: '-1' must be greater than 0" in wrong("train", "--rates.alpha=-1")
    assert "invalid choice: 'fly'" in wrong("fly")
    assert "expected one argument" in wrong("train", "--rates.alpha")
    assert "run_dir: is needed" in wrong("evaluate")
    assert "is not a run's folder" in wrong("evaluate", "--run_dir", tmp_path)
    assert "is not a run's folder" in wrong("sync", "--run_dir", tmp_path / "none")
    assert "is not a file" in wrong("train", "--config", tmp_path / "none.yaml")
    assert "cannot be written" in wrong(*QUICK, "--run_dir", "/proc/none")


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU to ask for")
def test_a_gpu_that_is_not_there_is_one_line(tmp_path: Path):
    assert "device: cuda was asked for" in wrong(*QUICK, "--device", "cuda", "--run_dir", tmp_path / "run")
    assert "capture: true needs a GPU" in wrong(*QUICK, "--capture", "true", "--run_dir", tmp_path / "run")


def test_a_folder_of_another_configuration_is_refused_and_untouched(tmp_path: Path):
    folder = tmp_path / "run"
    succeed(*QUICK, "--run_dir", folder, "--iterations", 3)
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()}
    line = wrong(*QUICK, "--run_dir", folder, "--iterations", 5, "--rates.alpha", 0.5)
    assert "belongs to a run with rates.alpha = 0.01, not 0.5" in line
    assert {p: p.read_bytes() for p in folder.rglob("*") if p.is_file()} == before


def test_a_damaged_newest_checkpoint_is_said_and_the_one_before_used(tmp_path: Path):
    folder = tmp_path / "run"
    arguments = (*QUICK, "--run_dir", folder, "--checkpoint.every", 4)
    succeed(*arguments, "--iterations", 8)
    whole = succeed(*QUICK, "--run_dir", tmp_path / "other", "--iterations", 12)
    victim = folder / "checkpoints/00000008/state.safetensors"
    victim.write_bytes(victim.read_bytes()[:-1] + b"?")
    result = succeed(*arguments, "--iterations", 12)
    assert "00000008: state.safetensors is damaged" in result.stderr and whole.returncode == 0
    assert same_bits(folder, tmp_path / "other"), "not as if nothing had happened"


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP))
def test_a_signal_ends_the_run_after_its_iteration_and_saves(number: signal.Signals, tmp_path: Path, background):
    folder = tmp_path / "run"
    arguments = (*QUICK, "--run_dir", folder, "--iterations", 100_000)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # tests under nohup would hand on that it is ignored
    process = background(*arguments)
    started(process, folder, 5)
    process.send_signal(number)
    assert process.wait(60) == 128 + number
    last = read_metrics(folder)[-1]["step"]
    assert checkpoint.facts(checkpoint.saved(folder / "checkpoints")[-1])["iteration"] == last < 100_000
    assert read_json(folder / "status.json")["status"] == "KILLED"
    succeed(*QUICK, "--run_dir", folder, "--iterations", last + 3)
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, last + 4))


def test_nohup_keeps_a_run_alive_when_its_terminal_closes(tmp_path: Path):
    folder = tmp_path / "run"
    process = subprocess.Popen(["nohup", *command(*QUICK, "--run_dir", folder, "--iterations", 300)], cwd=ROOT,
                               stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, stdin=subprocess.DEVNULL)
    started(process, folder, 5)
    process.send_signal(signal.SIGHUP)
    assert process.wait(60) == 0


def test_a_reader_that_leaves_does_not_end_the_run(tmp_path: Path):
    folder = tmp_path / "run"
    process = subprocess.Popen(command(*QUICK, "--run_dir", folder, "--iterations", 30), cwd=ROOT, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)
    process.stdout.close()
    assert process.wait(60) == 0 and read_json(folder / "summary.json")["iterations"] == 30


def test_a_killed_run_resumes_from_its_last_checkpoint_with_the_same_bits(tmp_path: Path, background):
    folder = tmp_path / "run"
    arguments = (*QUICK, "--run_dir", folder, "--checkpoint.every", 10)
    process = background(*arguments, "--iterations", 100_000)
    started(process, folder, 25)
    process.kill()
    process.wait()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b'{"step": 99')  # as a kill in the middle of a write leaves it
    resumed_at = checkpoint.facts(checkpoint.newest(folder / "checkpoints")[0])["iteration"]
    total = read_metrics(folder)[-1]["step"] + 10
    succeed(*arguments, "--iterations", total)
    succeed(*QUICK, "--run_dir", tmp_path / "other", "--iterations", total)
    assert resumed_at >= 20 and same_bits(folder, tmp_path / "other")
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, total + 1))


def test_a_second_job_on_the_folder_is_refused_and_the_first_goes_on(tmp_path: Path, background):
    folder = tmp_path / "run"
    arguments = (*QUICK, "--run_dir", folder, "--iterations", 100_000)
    process = background(*arguments)
    started(process, folder, 5)
    assert "is in use by a running job" in wrong(*arguments)
    count = len(read_metrics(folder))
    started(process, folder, count + 5)
    process.terminate()
    assert process.wait(60) == 143


def test_a_run_that_diverges_ends_with_1_and_says_what_to_try(tmp_path: Path):
    folder = tmp_path / "run"
    result = run(*QUICK, "--run_dir", folder, "--rates.rule", "fixed", "--rates.beta", 1e30, "--iterations", 1000)
    assert result.returncode == 1 and "Traceback" not in result.stderr
    assert "training diverged" in result.stderr and "lower rates.alpha" in result.stderr
    assert read_json(folder / "summary.json")["status"] == "FAILED"


class Hungry(torch.nn.Module):
    """Wants a petabyte."""

    def __init__(self, input_shape: tuple[int, ...], outputs: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.weight + torch.empty(10**15).sum()


def test_running_out_of_memory_names_the_settings_that_help(tmp_path: Path):
    result = run(*QUICK, "--run_dir", tmp_path / "run", "--model.name", "test_cli:Hungry", PYTHONPATH=str(ROOT / "tests"))
    (line,) = [text for text in result.stderr.splitlines() if text.startswith("alpha-maml")]
    assert result.returncode == 1 and "out of memory" in line and "task.chunk" in line and "inner.recompute" in line


def test_evaluate_prints_one_json_object(tmp_path: Path):
    succeed(*QUICK, "--run_dir", tmp_path / "run", "--iterations", 5)
    found = json.loads(succeed("evaluate", "--run_dir", tmp_path / "run", "--split", "val", "--evaluation.tasks", 8).stdout)
    assert found["loss"] == pytest.approx(read_json(tmp_path / "run/summary.json")["val_loss"])
    assert found["accuracy"] is None and found["tasks"] == 8 and found["iteration"] == 5


def test_a_model_of_ones_own_trains_with_two_processes(tmp_path: Path):
    succeed(*QUICK, "--model.name", "test_models:Own", "--model.args", "{width: 6}", "--iterations", 5,
            "--run_dir", tmp_path / "run", ranks=2, PYTHONPATH=str(ROOT / "tests"))
    assert newest_state(tmp_path / "run")["theta.layers.1.weight"].shape == (6, 1)
