"""The wheel in an environment of its own, used from folders that hold somebody else's data/, models/, trainer/ and launch/, or
data.py. The environment sees the dependencies of the one that runs the tests, but not its editable installation of us."""
from __future__ import annotations

import csv
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import numpy as np
import pytest
from processes import ROOT
from serving import serving

NET = """
from torch import nn

class Net(nn.Sequential):
    def __init__(self, input_shape, outputs, width=8):
        super().__init__(nn.Linear(input_shape[0], width), nn.Tanh(), nn.Linear(width, outputs))
"""
STRANGERS = {
    "folders": {"data/__init__.py": "raise RuntimeError('theirs')", "data/notes.txt": "", "trainer/__init__.py": "",
                "trainer/loop.py": "raise RuntimeError('theirs')", "launch/__init__.py": "", "models/mynet.py": NET},
    "a file": {"data.py": "raise RuntimeError('theirs')", "trainer.py": "raise RuntimeError('theirs')", "models/mynet.py": NET},
}
SMALL = ("--config", str(ROOT / "configs/quickstart.yaml"), "--iterations", "4", "--evaluation.tasks", "8")


def run(*command: object, cwd: Path, **environment: str) -> str:
    clean = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    result = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True, timeout=300,
                            env=clean | {"OMP_NUM_THREADS": "1"} | environment)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from a copy of the checkout: a build leaves files beside what it builds."""
    folder = tmp_path_factory.mktemp("wheel")
    copy = folder / "checkout"
    for name in run("git", "ls-files", "-co", "--exclude-standard", cwd=ROOT).splitlines():
        if (ROOT / name).exists():
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, copy / name, follow_symlinks=False)
    run(sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--wheel-dir", folder, copy, cwd=folder)
    return next(folder.glob("*.whl"))


@pytest.fixture(scope="module")
def programs(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """bin/ of an environment into which the wheel is installed."""
    folder = tmp_path_factory.mktemp("environment")
    venv.create(folder, symlinks=True)
    packages = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (packages / "dependencies.pth").write_text(sysconfig.get_path("purelib") + "\n")  # without the .pth files in there
    run(sys.executable, "-m", "pip", "--python", folder / "bin/python", "install", "-q", "--no-deps", wheel, cwd=folder)
    uvicorn = folder / "bin/uvicorn"  # mlflow starts it by its name
    uvicorn.write_text(f"#!{folder}/bin/python\nfrom uvicorn.main import main\nmain()\n")
    uvicorn.chmod(0o755)
    return folder / "bin"


def test_it_holds_nothing_outside_alpha_maml(wheel: Path):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"alpha_maml", "alpha_maml-0.1.0.dist-info"}
    assert {"alpha_maml/py.typed", "alpha_maml/models/ops/native.cpp", "alpha_maml/launch/slurm.sbatch",
            "alpha_maml/launch/torchrun.sh", "alpha_maml/trainer/core/rules/adaptive.py"} <= set(names)


def test_no_generic_name_can_be_imported(programs: Path, tmp_path: Path):
    for name in ("trainer", "launch", "models", "data"):
        found = run(programs / "python", "-c", f"import importlib.util as u; print(u.find_spec({name!r}))", cwd=tmp_path)
        assert found.strip() == "None", name
    assert str(programs.parent) in run(programs / "python", "-c", "import alpha_maml; print(alpha_maml.__file__)", cwd=tmp_path)


@pytest.mark.parametrize("kind", STRANGERS)
def test_every_verb_beside_somebody_elses_files(kind: str, programs: Path, tmp_path: Path):
    for name, text in STRANGERS[kind].items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    maml = programs / "alpha-maml"
    own = ("--model.name", "models.mynet:Net", "--model.args", "{width: 6}")
    run(maml, "train", *SMALL, *own, "--run_dir", "runs/one", cwd=tmp_path)
    state = json.loads((tmp_path / "runs/one/tracking.json").read_text())
    assert state["complete"], (tmp_path / "runs/one/tracking.log").read_text()
    torchrun = (programs / "python", "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, "-m", "alpha_maml")
    run(*torchrun, "train", *SMALL, *own, "--run_dir", "runs/two", "--tracking.uri", "disabled", cwd=tmp_path)
    assert json.loads((tmp_path / "runs/two/summary.json").read_text())["world_size"] == 2
    run(maml, "sweep", *SMALL, *own, "--grid", "rates.alpha=1e-3,1e-1", "--jobs", 2, "--tracking.uri", "disabled", "--run_dir",
        "runs/sweep", cwd=tmp_path)
    with (tmp_path / "runs/sweep/sweep.csv").open() as file:
        assert [row["status"] for row in csv.DictReader(file)] == ["FINISHED", "FINISHED"]
    assert '"tasks": 8' in run(maml, "evaluate", "--run_dir", "runs/one", "--evaluation.tasks", 8, cwd=tmp_path)
    x = np.linspace(-2, 2, 5)[:, None]
    np.savez(tmp_path / "support.npz", x=x, y=np.sin(x))
    np.savez(tmp_path / "query.npz", x=x)
    rows = run(maml, "adapt", "--run_dir", "runs/one", "--support", "support.npz", "--query", "query.npz", cwd=tmp_path)
    assert len(rows.splitlines()) == 6
    line = run(maml, "export", "--run_dir", "runs/one", cwd=tmp_path).splitlines()[-1]
    with serving(line, programs / "python", tmp_path) as post:
        code, answer = post({"inputs": {"support_x": x.tolist(), "support_y": np.sin(x).tolist(), "query_x": x.tolist()}})
        assert code == 200 and np.shape(answer["predictions"]) == (5, 1), answer


def test_from_the_checkout_the_old_module_name_goes_on(tmp_path: Path):
    run(sys.executable, "-m", "launch", "train", *SMALL, "--tracking.uri", "disabled", "--run_dir", tmp_path / "run", cwd=ROOT)
