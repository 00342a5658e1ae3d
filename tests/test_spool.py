"""The run's folder: what is on it is whole, and a fault says which file it was."""
from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch

from data.errors import naming
from trainer import spool


@pytest.mark.parametrize("torn", (b"", b'{"step": 9'))
@pytest.mark.parametrize(("count", "width"), ((0, 0), (1, 10), (3, 10), (300, 1000), (3, 3 * spool.TAIL)))
def test_the_last_line_is_found_from_the_end(count: int, width: int, torn: bytes, tmp_path: Path):
    path = tmp_path / spool.METRICS
    whole = b"".join(json.dumps({"step": i + 1, "x": "y" * width}).encode() + b"\n" for i in range(count))
    path.write_bytes(whole + torn)
    assert spool.last_line(path) == (count, len(whole))


def test_a_recorder_goes_on_behind_the_last_whole_line(tmp_path: Path):
    (tmp_path / spool.METRICS).write_bytes(b'{"step": 1, "timestamp": 0}\n{"step": 2, "timest')
    recorder = spool.Recorder(tmp_path, ("loss/train",), 4)
    for step in (1, 2, 3):  # the first is repeated: it stands already
        recorder.add(step, torch.tensor([0.5, 0.0]))
    recorder.flush()
    recorder.close()
    assert [line["step"] for line in spool.read_metrics(tmp_path)] == [1, 2, 3]


def test_a_write_that_fails_names_its_file_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "full.json").mkdir()  # nothing replaces a folder
    with pytest.raises(OSError):
        spool.write_json(tmp_path / "full.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["full.json"]
    with pytest.raises(OSError) as error, naming(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error.value.filename == str(tmp_path / "x")
