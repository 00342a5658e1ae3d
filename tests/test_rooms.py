"""The house: which room may import which, that no two files import each other in a circle, and that no room or file grows too
large. Imports inside functions count like all others."""
from __future__ import annotations

import ast
import subprocess
import sys
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
from processes import ROOT

GROUND = ("errors", "registry")
TRAINER = ("trainer.core", "trainer.core.rules", "trainer.optim", "trainer.engines", "trainer.config", "trainer.runs")
# What a room may import beside itself. A file belongs to the innermost room whose folder holds it.
MAY_IMPORT = {
    "errors": (),
    "registry": ("errors",),
    "models.ops": GROUND,
    "models": (*GROUND, "models.ops"),
    "data.losses": (),
    "data": (*GROUND, "models.ops", "data.losses"),
    "trainer.core.rules": GROUND,
    "trainer.core": (*GROUND, "models.ops", "data", "data.losses", "trainer.core.rules"),
    "trainer.optim": (*GROUND, "trainer.core", "trainer.core.rules"),
    "trainer.engines": (*GROUND, "trainer.core", "trainer.core.rules", "trainer.optim"),
    "trainer.config": (*GROUND, "models", "data", "trainer.core.rules", "trainer.optim", "trainer.engines"),
    "trainer.runs": (*GROUND, "trainer.config", "trainer.core", "trainer.core.rules"),
    "trainer": (*GROUND, "models", "models.ops", "data", "data.losses", *TRAINER),
    "trainer.tracking": (*GROUND, "trainer", "trainer.config", "trainer.runs", ""),
    "trainer.studies": (*GROUND, "trainer", *TRAINER, "trainer.tracking"),
    "launch": (*GROUND, "models", "data", "data.losses", "trainer", *TRAINER, "trainer.tracking", "trainer.studies"),
    "": (*GROUND, "launch", "trainer", "trainer.core.rules", "data"),  # the door
}
REGISTRIES = {"alpha_maml.models", "alpha_maml.data", "alpha_maml.trainer.core.rules", "alpha_maml.trainer.optim",
              "alpha_maml.trainer.engines"}
# Words that stand in one place alone.
ONLY_IN = {
    "import deepspeed": {"trainer.engines"},
    "mlflow": {"trainer.tracking"},
    "torch.distributed": {"trainer.engines", "launch"},
    "os.environ": {"launch", "trainer.tracking", "trainer.engines", "trainer"},
    "triton": {"models.ops"},
}
FILES, LINES = 12, 350


def sources() -> dict[str, Path]:
    """Module name -> file, of the whole package."""
    found = {f"alpha_maml.{path.stem}": path for path in (ROOT / "alpha_maml").glob("*.py")}
    for folder in ("trainer", "launch", "models", "data"):
        for path in (ROOT / folder).rglob("*.py"):
            found["alpha_maml." + ".".join(path.relative_to(ROOT).with_suffix("").parts)] = path
    return {name.removesuffix(".__init__"): path for name, path in found.items()}


SOURCES = sources()


def room(module: str) -> str:
    name = module.removeprefix("alpha_maml").removeprefix(".")
    return max((r for r in MAY_IMPORT if name == r or name.startswith(f"{r}.")), key=len, default="")


def imports(module: str) -> set[str]:
    """The modules of the package that a module imports, but for type checking alone."""
    found: set[str] = set()
    tree = ast.parse(SOURCES[module].read_text())
    unchecked = [node for node in ast.walk(tree) if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test)]
    skipped = {id(inner) for node in unchecked for inner in ast.walk(node)}
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alpha_maml"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                found.add(inner if inner in SOURCES else str(node.module))
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("alpha_maml")}
    return found - {module}


def test_rooms_import_in_one_direction():
    for module in SOURCES:
        for other in imports(module):
            here, there = room(module), room(other)
            assert here == there or there in MAY_IMPORT[here], f"{module} (room {here}) imports {other} (room {there})"
            assert here != "trainer.config" or there in (*GROUND, here) or other in REGISTRIES, f"{module} imports {other}"


def test_no_two_files_import_each_other_in_a_circle():
    order = list(TopologicalSorter({module: imports(module) for module in SOURCES}).static_order())
    assert len(order) == len(SOURCES)


def test_every_room_says_what_belongs_in_it():
    for name in MAY_IMPORT:
        if name in ("", *GROUND):
            continue
        text = ast.get_docstring(ast.parse(SOURCES[f"alpha_maml.{name}"].read_text())) or ""
        said = all(word in text for word in ("Belongs here:", "May import:", "Offers:"))
        assert said or name in ("trainer", "data.losses"), name


def test_rooms_and_files_stay_small():
    rooms: dict[Path, int] = {}
    for path in SOURCES.values():
        rooms[path.parent] = rooms.get(path.parent, 0) + 1
        assert len(path.read_text().splitlines()) <= LINES, f"{path} has more than {LINES} lines"
    assert {folder: count for folder, count in rooms.items() if count > FILES} == {}


@pytest.mark.parametrize("word", ONLY_IN)
def test_what_belongs_to_one_room_is_nowhere_else(word: str):
    found = {room(module) for module, path in SOURCES.items()
             if any(word in line for line in path.read_text().splitlines() if "import " in line or "os.environ" in line)}
    assert found <= ONLY_IN[word], word


def test_importing_the_algorithm_imports_no_tracker_and_no_engine():
    code = ("import sys, alpha_maml.trainer.core.meta_gradient, alpha_maml.trainer.core.rules.adaptive; "
            "import alpha_maml.data.omniglot, alpha_maml.models.conv4; "
            "sys.exit(sum(m in sys.modules for m in ('mlflow', 'deepspeed', 'torch.distributed.checkpoint')))")
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_checking_a_configuration_imports_no_torch():
    code = "import sys; from alpha_maml.trainer.config import build; build(None, {}); sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
