"""What is said to the user: one line, without what is secret."""
from __future__ import annotations

import errno
from pathlib import Path

import pytest

from alpha_maml.errors import InputError, first_line, reading, say


@pytest.mark.parametrize(("text", "line"), (
    ("a\nb\x1b[31m", r"a\nb\x1b[31m"), ("\u202eabc", r"\u202eabc"), ("\udc80", r"\udc80"), ("é 字", "é 字"),
    ("http://me:hush@host/x", "http://***host/x"), ("http://127.0.0.1:5000/a", "http://127.0.0.1:5000/a"),
))
def test_a_line_is_one_line_whatever_it_quotes(text: str, line: str, capsys):
    assert str(InputError(text)) == line
    say(text)
    assert capsys.readouterr().err == f"alpha-maml: {line}\n"


def test_a_line_has_an_end():
    assert len(str(InputError("x" * 10**6))) < 2100


@pytest.mark.parametrize(("text", "line"), (("a\nb", "a"), ("\n a", "a"), ("", "TimeoutError"), ("\n", "TimeoutError")))
def test_an_error_that_says_nothing_is_called_by_its_type(text: str, line: str):
    assert first_line(TimeoutError(text)) == line


def test_what_hinders_reading_is_about_the_key(tmp_path: Path):
    with pytest.raises(InputError, match="data.root: .*none cannot be read .No such file"), reading("data.root"):
        (tmp_path / "none").read_text()


def test_what_the_machine_lacks_is_not_about_the_key():
    with pytest.raises(OSError, match="Too many"), reading("data.root"):
        raise OSError(errno.EMFILE, "Too many open files", "x")
