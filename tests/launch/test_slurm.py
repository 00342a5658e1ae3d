"""alpha-maml slurm on a real SLURM of two nodes: both nodes, time limit, preemption, a lost node, arrays, scancel."""
from __future__ import annotations

import os
import shlex
import sqlite3
import subprocess
from pathlib import Path

import pytest
from conftest import same_bits
from processes import succeed, wrong
from slurm_cluster import Cluster, absent, until

from alpha_maml.launch import cli, slurm
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer.config import table
from alpha_maml.trainer.runs import checkpoint
from alpha_maml.trainer.runs.folder import read_json
from alpha_maml.trainer.runs.metrics import read_metrics

ITERATIONS = 100
RUN = ("--nodes", 2, "--model.name", "slurm_cluster:Paced", "--task.batch", 4, "--task.shots", 5, "--iterations", ITERATIONS,
       "--evaluation.tasks", 8, "--checkpoint.every", 10)


def paced(folder: Path, pause: float, *more: object) -> tuple:
    """Arguments of a run that takes at least two pauses an iteration."""
    return (*RUN, "--model.args", f"{{pause: {pause}}}", "--tracking.uri", "disabled", "--run_dir", folder, *more)


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory):
    reason = absent()
    if reason:
        pytest.fail(reason) if os.environ.get("CI") else pytest.skip(reason)
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.stop()


@pytest.fixture(scope="module")
def limited(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """(job, folder) of a run that a time limit interrupts; the tests before its own pass meanwhile. SLURM looks every 30 s,
    counted from the cluster's start, and signals where less than 30 s more than what was asked is left: 20 to 50 s after the
    job's start. Its iterations alone last longer than that."""
    folder = tmp_path_factory.mktemp("limited") / "run"
    return cluster.submit(*paced(folder, 0.26, "--time", 1, "--signal-seconds", 10, "--job-name", "limited")), folder


@pytest.fixture(scope="module")
def uninterrupted(cluster: Cluster, limited: tuple, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, Path]:
    """(what SLURM says, folder) of the run with which all others are compared."""
    folder = tmp_path_factory.mktemp("uninterrupted") / "run"
    return cluster.done(cluster.submit(*paced(folder, 0, "--gpus-per-node", 2, "--processes-per-node", 1)))[0], folder


def check_same(folder: Path, uninterrupted: tuple[dict, Path]) -> None:
    assert same_bits(folder, uninterrupted[1]), "not the bits of an uninterrupted run"
    assert [line["step"] for line in read_metrics(folder)] == list(range(1, ITERATIONS + 1))


def recorded(folder: Path, lines: int) -> None:
    until(lambda: len(read_metrics(folder)) >= lines, 60, f"{lines} iterations of {folder}")


def test_a_job_trains_on_both_nodes(uninterrupted: tuple[dict, Path]):
    facts, folder = uninterrupted
    assert facts["NodeList"] == "node[1-2]" and facts["Restarts"] == "0"
    summary = read_json(folder / "summary.json")
    assert summary["world_size"] == 2 and summary["iterations"] == ITERATIONS and summary["status"] == "FINISHED"


def test_an_array_is_four_runs_in_one_experiment(cluster: Cluster, tmp_path: Path):
    files = []
    for index in range(4):
        files.append(tmp_path / f"{index}.yaml")
        files[-1].write_text(f"run_dir: {tmp_path}/runs/{index}\nrates: {{alpha: {0.01 * (index + 1)}}}\niterations: 10\n")
    job = cluster.submit("--config", *files, "--task.batch", 4, "--evaluation.tasks", 8, "--tracking.timeout", 90)
    assert len(cluster.done(job, 180)) == 4
    with sqlite3.connect(tmp_path / "runs/mlflow.db") as store:
        rows = store.execute("select r.experiment_id, r.status, p.value from runs r join params p on r.run_uuid = p.run_uuid "
                             "where p.key = 'rates.alpha'").fetchall()
    assert sorted(rows) == [(rows[0][0], "FINISHED", f"{alpha}") for alpha in (0.01, 0.02, 0.03, 0.04)]


def test_scancel_leaves_no_process(cluster: Cluster, tmp_path: Path):
    def alive() -> list[str]:
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            try:
                words = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
            except OSError:  # ended meanwhile
                continue
            trains = str(tmp_path) in words and "alpha_maml" in words
            found += [words] if trains or "alpha_maml.trainer.tracking.sender" in words else []
        return found

    folder = tmp_path / "run"
    job = cluster.submit(*RUN, "--model.args", "{pause: 0.05}", "--run_dir", folder)
    recorded(folder, 3)
    assert alive()
    cluster.call("scancel", job)
    until(lambda: not alive(), 30, "the end of every process")
    until(lambda: cluster.show(job)[0]["JobState"] == "CANCELLED", 30, "the job's end, without a return to the queue")
    assert read_json(folder / "status.json")["status"] == "KILLED", "it was not let save"


def test_a_time_limit_in_the_middle_changes_nothing(cluster: Cluster, limited: tuple[str, Path], uninterrupted: tuple):
    job, folder = limited
    (facts,) = cluster.done(job, 300)
    assert int(facts["Restarts"]) >= 1
    check_same(folder, uninterrupted)
    log = Path(facts["StdOut"]).read_text()
    assert f"job {job}, start 1 " in log and f"job {job}, start 2 " in log, "the log was not appended to"
    saves = {int(path.name) for path in checkpoint.saved(folder / "checkpoints")}
    assert saves, "nothing was saved"


def test_a_preemption_changes_nothing(cluster: Cluster, uninterrupted: tuple, tmp_path: Path):
    folder = tmp_path / "run"
    job = cluster.submit(*paced(folder, 0.04))
    recorded(folder, 15)
    urgent = cluster.call("sbatch", "--parsable", "--partition=urgent", "--nodes=2", "--exclusive", "--time=1",
                          f"--output={tmp_path}/urgent.log", "--wrap=hostname").strip()
    cluster.done(urgent)
    (facts,) = cluster.done(job)
    assert facts["Restarts"] == "1"
    assert "asked to stop" in Path(facts["StdOut"]).read_text()
    check_same(folder, uninterrupted)


def test_a_node_set_down_changes_nothing(cluster: Cluster, uninterrupted: tuple, tmp_path: Path):
    folder = tmp_path / "run"
    job = cluster.submit(*paced(folder, 0.04))
    recorded(folder, 15)
    cluster.call("scontrol", "update", "nodename=node2", "state=down", "reason=test")
    until(lambda: cluster.show(job)[0]["JobState"] == "PENDING", 60, "the job's return to the queue")
    left = checkpoint.facts(checkpoint.saved(folder / "checkpoints")[-1])["iteration"]
    # A node of this cluster comes back by itself when its slurmd reports next; until then it is called back.
    until(lambda: "DOWN" not in cluster.call("scontrol", "show", "node", "node2")
          or cluster.call("scontrol", "update", "nodename=node2", "state=resume", check=False), 30, "node2's return")
    (facts,) = cluster.done(job)
    assert facts["Restarts"] == "1" and 10 <= left < ITERATIONS
    check_same(folder, uninterrupted)


def test_what_slurm_refuses_is_one_line_and_queues_nothing(cluster: Cluster, tmp_path: Path):
    before = cluster.call("squeue", "--noheader", "--format=%i")
    arguments = ("--run_dir", tmp_path / "run")
    assert "sbatch refused the job (Invalid partition name specified)" in cluster.wrong(*arguments, "--partition", "none")
    assert "Requested node configuration is not available" in cluster.wrong(*arguments, "--gpus-per-node", 9)
    assert "nodes" in cluster.wrong(*arguments, "--nodes", 9).lower()
    assert cluster.call("squeue", "--noheader", "--format=%i") == before


@pytest.mark.parametrize(("arguments", "words"), (
    (("--rates.alpa", 1), "rates.alpa: no such key"),
    (("--rates.alpha=-1",), "must be greater than 0"),
    (("--config", "none.yaml"), "none.yaml is not a file"),
    (("--nodes", 0), "--nodes: 0 must be 1 or more"),
    (("--nodes", "two"), "invalid int value: 'two'"),
    (("--gpus-per-node=-1",), "--gpus-per-node: -1 must be 0 or more"),
    (("--nodes", 5, "--gpus-per-node", 8), "25 tasks cannot be shared by 40 ranks"),
    (("--device", "cuda"), "device: cuda needs GPUs"),
    (("--job-name", "a/b"), "--job-name: 'a/b' must be"),
    (("--partition", "a\n#SBATCH --x"), "must be one printable line"),
    (("--partition", 'a" --x'), "must hold no quotes"),
    (("--sbatch", "account"), "must be an option of sbatch"),
    (("--time", "soon"), "--time: 'soon' must be"),
    (("--time", "2:00"), "leaves nothing of --time 2:00 (120 s)"),
    (("--config", "configs/quickstart.yaml", "configs/quickstart.yaml"), "is the folder of both"),
    (("--split", "val"), "--split"),
))
def test_wrong_input_is_one_line_before_slurm_is_asked(arguments: tuple, words: str):
    assert words in wrong("slurm", *arguments, PATH="/none")


def test_without_slurm_it_says_so_in_one_line(tmp_path: Path):
    line = wrong("slurm", "--run_dir", tmp_path / "run", PATH="/none")
    assert line.startswith("alpha-maml: slurm: there is no sbatch on this machine")


def test_dry_run_prints_the_script_and_leaves_nothing(tmp_path: Path):
    folder = tmp_path / "100% of \'it"
    result = succeed("slurm", "--config", "configs/quickstart.yaml", "--nodes", 4, "--gpus-per-node", 8, "--time", "1-0",
                     "--partition", "long", "--task.batch", 64, "--sbatch=--account=lab", "--setup", "module load cuda",
                     "--run_dir", folder, "--dry-run", PATH="/none")
    text = result.stdout
    for line in ("--nodes=4", "--gpus-per-node=8", "--time=1-0", "--partition=long", "--signal=B:USR1@120", "--requeue",
                 "--open-mode=append", "--account=lab", "--cpus-per-task=8", "--ntasks-per-node=1"):
        assert f"\n#SBATCH {line}\n" in text, line
    assert f'--output="{tmp_path}/slurm/alpha-maml-%j.log"' in text or f"--output={tmp_path}/slurm/alpha-maml-%j.log" in text
    assert "\nmodule load cuda\n" in text and f"run_dir={shlex.quote(str(folder))}" in text and "--rates.alpha=0.001" in text
    assert subprocess.run(["bash", "-n"], input=text, text=True, capture_output=True).stderr == ""
    assert list(tmp_path.iterdir()) == []


def test_a_grid_is_an_array_of_a_sweeps_cells(tmp_path: Path):
    grid = ("--grid", "rates.alpha=1e-3,1e-1", "--grid", "rates.beta=1e-2,1", "--seeds", 2, "--run_dir", tmp_path / "grid")
    text = succeed("slurm", "--config", "configs/quickstart.yaml", *grid, "--dry-run", PATH="/none").stdout
    assert "\n#SBATCH --array=0-7\n" in text and text.count("\n    run_dir=") == 8
    assert "rates.alpha=0.1,rates.beta=0.01,seed=1" in text and "--tracking.sweep=grid" in text
    for words in (grid[:-2], ("--config", "configs/quickstart.yaml", "configs/omniglot_5w1s.yaml", *grid)):
        assert "--grid: a sweep needs one --config" in wrong("slurm", *words)


def test_the_script_holds_the_whole_configuration():
    config = configuration.build(None, {
        "model.args": "{width: 6, name: 'a b: ''c'''}", "rates.alpha": "0.1", "task.batch": "7", "outer.trust": "0",
        "tracking.experiment": "it's $HOME", "data.root": "/a b"})
    known, _ = cli.parser().parse_known_args(["train", *slurm._arguments(config)])
    overrides = {name: value for name, value in vars(known).items() if name in table()}
    assert configuration.build(None, overrides) == config


@pytest.mark.parametrize(("limit", "seconds"), (
    ("30", 1800), ("1:30", 120), ("1:00:00", 3600), ("2-3", 183600), ("1-0:30", 88200), ("1-0:0:1", 86460), ("INFINITE", 0)))
def test_time_limits_are_read_as_slurm_does(limit: str, seconds: int):
    assert slurm._seconds(limit) == seconds
