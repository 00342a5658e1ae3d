"""alpha-maml in real processes, many a minute: forked from a server that has imported torch once (four seconds each
otherwise). What a rank sees is what torchrun gives it; the tests that need torchrun itself start it."""
from __future__ import annotations

import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[1]

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch", "torch._dynamo", "deepspeed", "alpha_maml.trainer.loop",
                              "alpha_maml.launch.cli", "alpha_maml.launch.runtime"])


def child(arguments: list[str], environment: dict[str, str], output: str, errors: str) -> None:
    """The whole life of one process: main with its own environment, streams and exit code."""
    for path, number in ((output, 1), (errors, 2)):
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, number)
        os.close(handle)
    os.chdir(ROOT)
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    from alpha_maml.launch.cli import main

    main(arguments)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def places(ranks: int) -> list[dict[str, str]]:
    """What torchrun puts into the environment of each of `ranks` processes of one group; 0 is one process without."""
    group = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(ranks),
             "LOCAL_WORLD_SIZE": str(ranks)}
    return [group | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)] or [{}]


def run(*arguments: object, ranks: int = 0, timeout: float = 240, **environment: str) -> subprocess.CompletedProcess:
    """alpha-maml to its end: one process, or `ranks` of one group. The exit code is the first that is not 0."""
    words, processes = [str(a) for a in arguments], []
    with tempfile.TemporaryDirectory() as folder:
        output, errors = f"{folder}/output", f"{folder}/errors"
        for place in places(ranks):
            processes.append(FORKS.Process(target=child, args=(words, place | environment, output, errors)))
            processes[-1].start()
        codes = []
        for process in processes:
            process.join(timeout)
            if process.is_alive():
                process.kill()
                process.join()
            codes.append(process.exitcode)
        text = [Path(path).read_text() if Path(path).is_file() else "" for path in (output, errors)]
    return subprocess.CompletedProcess(words, next((code for code in codes if code), 0), *text)


def succeed(*arguments: object, ranks: int = 0, **environment: str) -> subprocess.CompletedProcess:
    result = run(*arguments, ranks=ranks, **environment)
    assert result.returncode == 0, result.stdout + result.stderr
    return result


def wrong(*arguments: object, **environment: str) -> str:
    """The one line that a command with wrong input leaves on stderr."""
    result = run(*arguments, **environment)
    assert result.returncode == 2, result.stdout + result.stderr
    (line,) = result.stderr.splitlines()
    assert line.startswith("alpha-maml: ")
    return line


def command(*arguments: object, ranks: int = 0) -> list[str]:
    """The words of a process of its own, under torchrun where `ranks` > 0."""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks else []
    return [sys.executable, *launcher, "-m", "alpha_maml", *map(str, arguments)]
