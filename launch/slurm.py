"""alpha-maml slurm: writes a batch script from slurm.sbatch and submits it.

Everything is checked before anything is queued. The script holds the configuration itself, so that a job that waits, or comes
back days later, does not follow what has since been edited in a file.
"""
from __future__ import annotations

import argparse
import re
import shlex
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import yaml

from alpha_maml.errors import InputError
from alpha_maml.trainer import config as configuration
from alpha_maml.trainer.config import Config

HERE = Path(__file__).resolve().parent
ANSWER = 60.0  # seconds that SLURM has to take the job
SHARE_TO_SAVE = 0.75  # of the seconds before the limit; after these the job is put back with the checkpoint it has


def add_options(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--config", type=Path, nargs="+", default=[None], metavar="FILE",
                     help="YAML files of the keys below; several are an array, one task each")
    sub.add_argument("--grid", action="append", default=[], metavar="KEY=V,V,...",
                     help="values of one key, repeated: the cells of a sweep are an array, as those of alpha-maml sweep")
    sub.add_argument("--seeds", type=int, default=1, metavar="N", help="with --grid: runs of each cell (default: 1)")
    sub.add_argument("--nodes", type=int, default=1, metavar="N", help="nodes of each job (default: 1)")
    sub.add_argument("--gpus-per-node", type=int, default=0, metavar="G", help="0 trains on CPUs (default: 0)")
    sub.add_argument("--processes-per-node", type=int, metavar="P", help="default: one for each GPU, else 1")
    sub.add_argument("--time", metavar="LIMIT", help="of one stay in the queue, as SLURM spells it: MINUTES, H:M:S, D-H, ...; "
                     "the job comes back until the run is finished (default: the partition's)")
    sub.add_argument("--partition", metavar="NAME", help="default: the cluster's")
    sub.add_argument("--job-name", default="alpha-maml", metavar="NAME", help="default: alpha-maml")
    sub.add_argument("--signal-seconds", type=int, default=120, metavar="S",
                     help="before the limit or a preemption, to finish an iteration and save (default: 120)")
    sub.add_argument("--setup", default="", metavar="LINE", help="shell line before the training; it may set PYTHON (default: "
                     "this one) to the python to use, as in 'module load cuda; export PYTHON=/env/bin/python'")
    sub.add_argument("--sbatch", action="append", default=[], metavar="OPTION",
                     help="any further option of sbatch, as in --sbatch=--account=lab; may be given several times")
    sub.add_argument("--dry-run", action="store_true", help="print the script; write and submit nothing")


def submit(known: argparse.Namespace, overrides: dict[str, str]) -> int:
    """Writes and submits the script, or prints it. Raises InputError for wrong input, and where SLURM is absent or refuses."""
    configs = [configuration.build(file, overrides) for file in known.config]
    if known.grid:
        from alpha_maml.trainer.studies import sweep

        if len(configs) > 1 or configs[0].run_dir is None:
            raise InputError("--grid: a sweep needs one --config, and its folder in --run_dir; give both")
        configs = [cell.config for cell in sweep.cells(configs[0], known.grid, known.seeds, Path(configs[0].run_dir))]
        known.config = known.config * len(configs)
    configs = [replace(config, run_dir=str(configuration.run_dir(config).resolve())) for config in configs]
    _check(known, configs)
    place = configuration.run_dir(configs[0]).parent / "slurm"
    text = script(known, configs, place)
    if known.dry_run:
        print(text, end="")
        return 0
    path = place / f"{known.job_name}.sbatch"
    try:
        place.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    except OSError as error:
        raise InputError(f"run_dir: {place} cannot be written ({error.strerror}); choose another run_dir") from None
    job = _sbatch(path)
    log = f"{known.job_name}-{job}{'_*' if len(configs) > 1 else ''}.log"
    print(f"job {job}" + (f", an array of {len(configs)}," if len(configs) > 1 else "")
          + f" is in the queue; its log: {place / log}; its script: {path}")
    for config in configs:
        print(f"run: {config.run_dir}")
    if known.grid:
        print("its table, once the array is done: alpha-maml sweep with the same --config, --grid, --seeds and --run_dir")
    return 0


def processes(known: argparse.Namespace) -> int:
    """Of one node."""
    return known.processes_per_node if known.processes_per_node is not None else max(1, known.gpus_per_node)


def script(known: argparse.Namespace, configs: list[Config], place: Path) -> str:
    """The batch script; `place` is the folder of its log."""
    array = len(configs) > 1
    options = {
        "job-name": known.job_name, "nodes": known.nodes, "partition": known.partition, "time": known.time,
        "gpus-per-node": known.gpus_per_node or None, "cpus-per-task": processes(known),
        "array": f"0-{len(configs) - 1}" if array else None, "signal": f"B:USR1@{known.signal_seconds}",
        "chdir": Path.cwd(),  # relative paths in the configuration, and models of one's own, are found from here
        "output": str(place).replace("%", "%%") + f"/{known.job_name}-%{'A_%a' if array else 'j'}.log",
    }
    lines = [f"#SBATCH --{name}={_quoted(str(value))}" for name, value in options.items() if value is not None]
    runs = []
    for index, (file, config) in enumerate(zip(known.config, configs)):
        comment = f"  # {file}" if file and str(file).isprintable() else ""
        arguments = shlex.join(_arguments(config))
        runs.append(f"{index}){comment}\n    run_dir={shlex.quote(str(config.run_dir))}\n    arguments=({arguments}) ;;")
    filled = {
        "directives": "\n".join(lines + [f"#SBATCH {option}" for option in known.sbatch]), "runs": "\n".join(runs),
        "python": shlex.quote(sys.executable), "processes": processes(known), "setup": known.setup,
        "launcher": shlex.quote(str(HERE / "torchrun.sh")), "patience": max(1, int(SHARE_TO_SAVE * known.signal_seconds)),
    }
    return re.sub(r"@([a-z]+)@", lambda place: str(filled[place[1]]), (HERE / "slurm.sbatch").read_text())


def _arguments(config: Config) -> list[str]:
    """The command line of a configuration: the keys that differ from the defaults."""
    defaults = configuration.flat_values(Config())
    found = []
    for name, value in configuration.flat_values(config).items():
        if value != defaults[name]:
            if isinstance(value, dict):
                value = yaml.safe_dump(value, default_flow_style=True, width=float("inf")).strip()
            found.append(f"--{name}={'null' if value is None else value}")
    return found


def _quoted(value: str) -> str:
    return value if re.fullmatch(r"[\w./:@%+,-]+", value) else f'"{value}"'


def _check(known: argparse.Namespace, configs: list[Config]) -> None:
    """What SLURM or the job would find out too late; raises InputError."""
    least = {"nodes": 1, "gpus_per_node": 0, "processes_per_node": 1, "signal_seconds": 10}
    for name, bound in least.items():
        value = getattr(known, name)
        if value is not None and value < bound:
            raise InputError(f"--{name.replace('_', '-')}: {value} must be {bound} or more; change it")
    if not re.fullmatch(r"[\w.+-]+", known.job_name):
        raise InputError(f"--job-name: {known.job_name!r} must be letters, digits and . _ + -; change it")
    texts = {"--partition": [known.partition or "-"], "--time": [known.time or "-"], "--setup": [known.setup or "-"],
             "--sbatch": known.sbatch, "run_dir": [c.run_dir for c in configs], "working directory": [str(Path.cwd())]}
    for name, values in texts.items():
        for value in values:
            if not value.isprintable() or not value:
                raise InputError(f"{name}: {value!r} must be one printable line; change it")
            if name not in ("--setup", "--sbatch") and re.search(r'["\\]', value):
                raise InputError(f"{name}: {value!r} must hold no quotes and no backslashes, which SLURM reads; change it")
    for option in known.sbatch:
        if not option.startswith("-"):
            raise InputError(f"--sbatch: {option!r} must be an option of sbatch, such as --sbatch=--account=lab; change it")
    if known.time is not None:
        limit = _seconds(known.time)
        if 0 < limit <= known.signal_seconds:
            raise InputError(f"--signal-seconds: {known.signal_seconds} leaves nothing of --time {known.time} ({limit} s) to "
                             "train in; lower it, or raise --time")
    folders: dict[str | None, object] = {}
    ranks = known.nodes * processes(known)
    for file, config in zip(known.config, configs):
        if config.run_dir in folders:
            raise InputError(f"run_dir: {config.run_dir} is the folder of both {folders[config.run_dir]} and {file}; give each "
                             "a run_dir of its own, or keys that differ")
        folders[config.run_dir] = file
        if ranks > config.task.batch:
            raise InputError(f"task.batch: {config.task.batch} tasks cannot be shared by {ranks} ranks; raise it, or lower "
                             "--nodes or --processes-per-node")
        if config.device == "cuda" and known.gpus_per_node == 0:
            raise InputError("device: cuda needs GPUs; give --gpus-per-node, or use device auto")
        configuration.check_ownership(configuration.run_dir(config), config)


def _seconds(limit: str) -> int:
    """A time limit as SLURM spells it, in seconds, rounded up to minutes as SLURM does; 0 for none. Raises InputError."""
    if limit.upper() in ("UNLIMITED", "INFINITE"):
        return 0
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", limit)
    if match is None:
        raise InputError(f"--time: {limit!r} must be MINUTES, M:S, H:M:S, D-H, D-H:M or D-H:M:S; change it")
    days, *rest = (int(x) if x else None for x in match.groups())
    parts = [x for x in rest if x is not None]
    if days is None and len(parts) < 3:  # MINUTES or M:S
        parts.insert(0, 0)
    hours, minutes, seconds = parts + [0] * (3 - len(parts))
    return -(-(((days or 0) * 24 + hours) * 3600 + minutes * 60 + seconds) // 60) * 60


def _sbatch(path: Path) -> str:
    """The job's id; raises InputError with SLURM's own reason."""
    try:
        result = subprocess.run(["sbatch", "--parsable", str(path)], capture_output=True, text=True, timeout=ANSWER)
    except FileNotFoundError:
        raise InputError("slurm: there is no sbatch on this machine; submit from one with SLURM, or print the script with "
                         "--dry-run") from None
    except subprocess.TimeoutExpired:
        raise InputError(f"slurm: sbatch did not answer within {ANSWER:.0f} s; see `sinfo`, and `squeue --me` before you try "
                         "again") from None
    if result.returncode != 0:
        reason = [line.split("error: ")[-1] for line in result.stderr.splitlines() if line.strip()] or ["no reason given"]
        raise InputError(f"slurm: sbatch refused the job ({reason[-1].removeprefix('Batch job submission failed: ')}); change "
                         "--partition, --nodes, --gpus-per-node, --time or --sbatch (`sinfo` lists what there is)")
    return result.stdout.strip().split(";")[0]
