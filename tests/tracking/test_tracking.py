"""MLflow: everything that was recorded arrives in a real store, whatever the store does meanwhile."""
from __future__ import annotations

import base64
import sqlite3
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from conftest import Server, started
from processes import run, succeed, wrong

from alpha_maml.trainer.runs.metrics import read_metrics
from alpha_maml.trainer.tracking.state import read_state

QUICK = ("train", "--task.batch", 4, "--evaluation.tasks", 8, "--tracking.timeout", 120)  # a busy machine makes a store slowly


def rows(database: Path, query: str) -> list[tuple]:
    connection = sqlite3.connect(database)
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def stored(database: Path) -> set[tuple]:
    """Every point with a step that the store holds, straight from its table."""
    return {(k, s, t, v) for k, s, t, v in rows(database, "select key, step, timestamp, value from metrics")
            if not k.startswith("final/")}


def recorded(folder: Path) -> set[tuple]:
    return {(name, line["step"], line["timestamp"], value) for line in read_metrics(folder)
            for name, value in line.items() if name not in ("step", "timestamp")}


def status(database: Path) -> list[str]:
    return [row[0] for row in rows(database, "select status from runs")]


def test_after_a_run_every_point_is_in_the_store(tmp_path: Path):
    folder = tmp_path / "run"
    result = succeed(*QUICK, "--run_dir", folder, "--iterations", 120, "--evaluation.every", 50, ranks=2)
    database = tmp_path / "mlflow.db"
    assert stored(database) == recorded(folder) and len(recorded(folder)) > 120 * 9
    assert status(database) == ["FINISHED"]
    params = dict(rows(database, "select key, value from params"))
    assert params["rates.alpha"] == "0.01" and params["task.batch"] == "4"
    assert f"Curves: {folder / 'curves.png'}\n" in result.stdout and (folder / "curves.png").is_file()
    assert "<!-- loss_threshold 2.5" in (folder / "curves.svg").read_text()
    assert f"mlflow ui --backend-store-uri sqlite:///{database}" in result.stdout
    assert "runs?workflowType=machine_learning&compareRunsMode=CHART" in result.stdout
    artifacts = {p.name for p in (tmp_path / "mlartifacts").rglob("*") if p.is_file()}
    assert {"config.yaml", "summary.json", "curves.png", "curves.svg", "manifest.json"} <= artifacts


def test_a_resumed_run_goes_on_in_the_same_mlflow_run(tmp_path: Path):
    folder = tmp_path / "run"
    for iterations in (10, 20):
        succeed(*QUICK, "--run_dir", folder, "--iterations", iterations)
    assert stored(tmp_path / "mlflow.db") == recorded(folder) and status(tmp_path / "mlflow.db") == ["FINISHED"]


def test_a_server_killed_mid_run_costs_nothing_and_sync_completes_the_store(tmp_path: Path, server: Server, background):
    folder = tmp_path / "run"
    process = background(*QUICK, "--run_dir", folder, "--iterations", 1500, "--tracking.uri", server.uri,
                         "--tracking.timeout", 2)
    started(process, folder, 200)
    while not read_state(folder).get("offset"):
        time.sleep(0.1)
    server.kill()
    killed_at = len(read_metrics(folder))
    assert process.wait(200) == 0, "training does not depend on the store"
    output = (tmp_path / "output.0").read_text()
    assert "MLflow lacks" in output and f"alpha-maml sync --run_dir {folder}" in output
    assert f"Curves: alpha-maml report --runs {folder}" in output and not (folder / "curves.png").exists()
    lines = read_metrics(folder)
    assert len(lines) == 1500 and killed_at < 1500
    slowest = max(line["perf/step_ms"] for line in lines[killed_at:])
    assert slowest < 5000, "an iteration waited for the store: a request's time limit is 10 s"
    assert stored(tmp_path / "store.db") < recorded(folder)
    assert run("sync", "--run_dir", folder, timeout=120).returncode == 1, "the store is still away"
    server.start()
    shipped = succeed("sync", "--run_dir", folder).stdout
    assert "are in MLflow" in shipped and f"Compare runs: {server.uri}" in shipped and (folder / "curves.png").is_file()
    assert stored(tmp_path / "store.db") == recorded(folder) and status(tmp_path / "store.db") == ["FINISHED"]


def test_a_store_that_is_away_at_the_start_gets_everything_once_it_is_there(tmp_path: Path, background):
    server, folder = Server(tmp_path), tmp_path / "run"
    process = background(*QUICK, "--run_dir", folder, "--iterations", 100_000, "--tracking.uri", server.uri)
    started(process, folder, 100)
    server.start()
    try:
        while not read_state(folder).get("offset"):
            assert process.poll() is None
            time.sleep(0.1)
        process.terminate()
        assert process.wait(120) == 143
        assert stored(tmp_path / "store.db") == recorded(folder) and status(tmp_path / "store.db") == ["KILLED"]
    finally:
        server.kill()


def test_a_record_that_is_missing_is_said_in_one_line(tmp_path: Path):
    folder = tmp_path / "run"
    succeed(*QUICK, "--run_dir", folder, "--iterations", 2)
    (folder / "metrics.jsonl").unlink()
    assert str(folder / "metrics.jsonl") in wrong("sync", "--run_dir", folder)


def test_a_trainer_killed_outright_still_gets_its_points_and_status(tmp_path: Path, background):
    folder = tmp_path / "run"
    process = background(*QUICK, "--run_dir", folder, "--iterations", 100_000)
    started(process, folder, 150)
    process.kill()
    end = time.monotonic() + 120
    while not read_state(folder).get("complete") and time.monotonic() < end:
        time.sleep(0.2)
    assert stored(tmp_path / "mlflow.db") == recorded(folder) and status(tmp_path / "mlflow.db") == ["KILLED"]


def test_eight_runs_that_start_at_once_share_a_fresh_store(tmp_path: Path):
    with ThreadPoolExecutor(8) as pool:
        results = list(pool.map(lambda i: run(*QUICK, "--run_dir", tmp_path / f"run{i}", "--seed", i, "--iterations", 30),
                                range(8)))
    assert [result.returncode for result in results] == [0] * 8
    assert all("MLflow lacks" not in result.stderr for result in results)
    assert stored(tmp_path / "mlflow.db") == set().union(*(recorded(tmp_path / f"run{i}") for i in range(8)))
    assert status(tmp_path / "mlflow.db") == ["FINISHED"] * 8
    assert len(rows(tmp_path / "mlflow.db", "select * from experiments where name = 'alpha-maml'")) == 1


def test_an_untracked_run_and_a_damaged_state_are_one_line(tmp_path: Path):
    folder = tmp_path / "run"
    succeed(*QUICK, "--run_dir", folder, "--iterations", 2, "--tracking.uri", "disabled")
    assert "tracking.uri: disabled" in wrong("sync", "--run_dir", folder)
    config = (folder / "config.yaml").read_text().replace("disabled", f"sqlite:///{tmp_path}/mlflow.db")
    (folder / "config.yaml").write_text(config)
    for state in ("{", "[]", '{"offset": -1}', '{"offset": 1000000}', '{"offset": true}', '{"run_id": 3}'):
        (folder / "tracking.json").write_text(state)
        assert "tracking.json is damaged" in wrong("sync", "--run_dir", folder)
    (folder / "tracking.json").unlink()
    with (folder / "metrics.jsonl").open("ab") as file:
        file.write(b"{}\n")
    result = run("sync", "--run_dir", folder)
    assert result.returncode == 2 and "metrics.jsonl is damaged" in result.stderr.splitlines()[-1], "no patience mends that"


class Locked(BaseHTTPRequestHandler):
    """A server that lets nobody in, and keeps what it was shown."""

    shown: set[str] = set()

    def do_GET(self) -> None:
        self.shown.add(self.headers.get("Authorization", ""))
        self.send_error(401)

    do_POST = do_GET

    def log_message(self, *_: object) -> None:
        pass


def test_a_password_comes_from_the_environment_and_stays_there(tmp_path: Path, background):
    """It reaches the server, and no file of the run, no output."""
    secret, folder = "hush4711", tmp_path / "run"
    server = ThreadingHTTPServer(("127.0.0.1", 0), Locked)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    uri = f"127.0.0.1:{server.server_port}"
    line = wrong(*QUICK, "--run_dir", folder, "--tracking.uri", f"http://user:{secret}@{uri}")
    assert "MLFLOW_TRACKING_PASSWORD" in line and secret not in line and not folder.exists()
    process = background(*QUICK, "--run_dir", folder, "--iterations", 100_000, "--tracking.uri", f"http://{uri}",
                         "--tracking.timeout", 0, MLFLOW_TRACKING_USERNAME="user", MLFLOW_TRACKING_PASSWORD=secret)
    expected, end = base64.b64encode(f"user:{secret}".encode()).decode(), time.monotonic() + 120
    while f"Basic {expected}" not in Locked.shown and time.monotonic() < end:
        time.sleep(0.1)
    process.terminate()
    assert process.wait(60) == 143 and f"Basic {expected}" in Locked.shown
    server.shutdown()
    server.server_close()
    said = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert {"config.yaml", "tracking.log", "output.0"} <= {path.name for path in said}
    for path in said:
        for hidden in (secret, expected):
            assert hidden.encode() not in path.read_bytes(), path
