"""The run's folder: what is on it is whole, a fault says which file it was, damage and another run's lines are named."""
from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import pytest
import torch
from processes import wrong

from alpha_maml.errors import InputError, naming
from alpha_maml.trainer.runs.folder import read_json, write_json
from alpha_maml.trainer.runs.metrics import METRICS, Recorder, read_lines, read_metrics
from alpha_maml.trainer.runs.summary import summarise


def line(number: int, **values: object) -> bytes:
    return json.dumps({"step": number, "timestamp": 1, "loss/train": 0.5} | values).encode() + b"\n"


def test_a_torn_end_is_left_out_and_any_byte_can_be_the_start(tmp_path: Path):
    (tmp_path / METRICS).write_bytes(line(1) + line(2) + line(3)[:-5])
    assert [found["step"] for found in read_metrics(tmp_path)] == [1, 2]
    assert list(read_lines(tmp_path, len(line(1)))) == [(2 * len(line(1)), json.loads(line(2)))]


@pytest.mark.parametrize("second", (
    b"{\n", b"[]\n", b"\xff\n", b"[" * 100_000 + b"\n", b"\n", line(1), line(0), line(2)[:9] + line(2), line(2, step=None),
    line(2, step=1.5), line(2, step=2**63), line(2, timestamp="now"), line(2, name="text"), line(2, name=True),
    line(2, name=[1])),
    ids=lambda content: repr(content[:40]))
def test_a_line_that_is_none_of_the_run_is_named(second: bytes, tmp_path: Path):
    (tmp_path / METRICS).write_bytes(line(1) + second + line(3))
    with pytest.raises(InputError, match=f"run_dir: .*metrics.jsonl is damaged at byte {len(line(1))} "):
        read_metrics(tmp_path)


@pytest.mark.parametrize("content", (b"", b"{", b"[]", b"null", b"\xff", b"[" * 100_000), ids=lambda content: repr(content[:9]))
def test_a_damaged_file_is_named(content: bytes, tmp_path: Path):
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(InputError, match="x.json is damaged; restore it, or remove it"):
        read_json(tmp_path / "x.json")
    assert read_json(tmp_path / "none.json") == {}


def test_a_rate_that_is_not_finite_has_no_figure():
    """A line leaves it out."""
    lines = [{"step": 1, "rates/alpha": 0.1, "rates/beta": 0.1}, {"step": 2, "rates/beta": 0.2}]
    summary = summarise(lines, 1.0)
    assert summary["alpha_first"] == 0.1 and summary["alpha_last"] is None and summary["beta_last"] == 0.2


def test_a_run_with_another_runs_lines_is_left_as_it_is(tmp_path: Path):
    (tmp_path / METRICS).write_bytes(line(1) + line(2) + line(1) + line(2))
    assert "metrics.jsonl is damaged" in wrong("train", "--tracking.uri", "disabled", "--iterations", 3, "--run_dir", tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", "metrics.jsonl"]


def test_a_recorder_goes_on_behind_the_last_whole_line(tmp_path: Path):
    (tmp_path / METRICS).write_bytes(b'{"step": 1, "timestamp": 0}\n{"step": 2, "timest')
    recorder = Recorder(tmp_path, ("loss/train",), 4)
    for step in (1, 2, 3):  # the first is repeated: it stands already
        recorder.add(step, torch.tensor([0.5, 0.0]))
    recorder.flush()
    recorder.close()
    assert [line["step"] for line in read_metrics(tmp_path)] == [1, 2, 3]


def test_a_flush_that_does_not_wait_is_one_block_behind(tmp_path: Path):
    recorder = Recorder(tmp_path, ("loss/train",), 4)

    def iterations(*numbers: int) -> None:
        for number in numbers:
            recorder.add(number, torch.tensor([float(number), 0.0]))

    iterations(1, 2)
    assert recorder.flush(wait=False) == []
    iterations(3)
    assert recorder.flush(wait=False) == [(1, [1.0, 0.0]), (2, [2.0, 0.0])]
    iterations(4)
    assert [number for number, _ in recorder.flush()] == [3, 4] and recorder.flush() == []
    recorder.close()
    assert [line["loss/train"] for line in read_metrics(tmp_path)] == [1, 2, 3, 4]


def test_a_write_that_fails_names_its_file_and_leaves_nothing(tmp_path: Path):
    (tmp_path / "full.json").mkdir()  # nothing replaces a folder
    with pytest.raises(OSError):
        write_json(tmp_path / "full.json", {})
    assert [p.name for p in tmp_path.iterdir()] == ["full.json"]
    with pytest.raises(OSError) as error, naming(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert error.value.filename == str(tmp_path / "x")
