"""The command line as people meet it: errors in one line, names that are no markup, lists, quiet, completion."""

import errno
import io
import json
import sys
import warnings

import pytest
import torch
from faults.calls import call
from rich.table import Table

from logsnr import zoo
from logsnr.cli import app, application
from logsnr.cli.guard import told
from logsnr.errors import LogsnrError, one_line, printable, shown
from logsnr.report.style import drawn, encoded
from logsnr.sampling.loop import NonFiniteError
from logsnr.terminal import WIDE, console, description


def full() -> OSError:
    return OSError(errno.ENOSPC, "No space left on device", "runs/x/plan.json")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (LogsnrError("--nfe 0: give 1 ... 20"), "--nfe 0: give 1 ... 20"),
        (ValueError("of a\nlibrary"), "of a library"),
        (NonFiniteError(3, 0.5), "step 3 (sigma = 0.5) left a state that is not finite"),
        (MemoryError("Unable to allocate 7.28 TiB for an array"), "out of memory (asked for 7.28 TiB at once)"),
        (RuntimeError("can't allocate memory: you tried to allocate 800 bytes."), "asked for 800 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."), "asked for 2.00 GiB at once"),
        (full(), "no space left on the device for runs/x/plan.json: free some"),
        (PermissionError(errno.EACCES, "Permission denied", "runs/x"), "runs/x: Permission denied"),
        (OverflowError("int too large"), "OverflowError: int too large; this was not foreseen: --debug shows where"),
        (KeyError("x"), "KeyError: 'x'; this was not foreseen"),
    ],
)  # fmt: skip
def test_an_exception_becomes_one_line(run, monkeypatch, error, words):
    assert words in told(error)

    def fail(*options: object) -> None:
        raise error

    monkeypatch.setattr("logsnr.training.load_recipe", fail)
    code, out, err = run("train", "digits")
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert err.startswith("logsnr: error: ")
    assert words in err
    for line in (("--debug", "train", "digits"), ("train", "digits", "--debug")):
        code, _, err = run(*line)
        assert code == 2
        assert err.startswith("Traceback (most recent call last)")
        assert err.splitlines()[-1].startswith("logsnr: error: ")


def test_a_full_stdout_is_an_error(run, monkeypatch):
    class Full(io.StringIO):
        def flush(self) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(sys, "stdout", Full())
    code, _, err = run("--version")
    assert code == 2
    assert "no space left on the device, or stdout is full" in err


def test_wrong_words_are_one_line_too(run):
    for line, words in {
        ("sampel", "x"): "No such command 'sampel'",
        ("sample",): "Missing argument",
        ("sample", "x", "--nfee", "3"): "No such option: --nfee",
        ("sample", "x", "--nfe", "0"): "--nfe",
        ("sample", "x", "--nfe", "100000"): "--nfe",
    }.items():
        code, out, err = run(*line)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert words in err
        assert "; see logsnr" in err


@pytest.mark.parametrize("value", ["", "[bold]x[/]", "[/]", "$x^{", "\x1b[31m", "\udcff", "é", "a" * 5000])
def test_nothing_in_a_name_reaches_the_terminal_as_an_order(value):
    for words in (("sample", value), ("train", value), ("objective", value), ("export", "zoo:digits", "--to", value)):
        ended = call(*words, *(("--out", "x") if words[0] == "export" else ()))
        assert (ended.code, ended.trouble) == (2, ""), ended


def test_long_and_strange_texts_are_cut_and_written_out():
    assert printable("a\x1b[31m\ud800\n") == "a\\x1b[31m\\ud800\\n"
    said = one_line(ValueError("begin " + "x" * 10_000 + " end"))
    assert len(said) < 2100
    assert said.startswith("begin")
    assert said.endswith("end")
    assert len(shown("x" * 1000)) <= 80
    assert shown([1, 2]) == "[1, 2]"


def test_names_are_no_markup_and_tables_are_wide_where_nobody_looks(monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    name = "[bold]x[/] [/] :smile: " + "long " * 60
    table = Table(title=name)
    for column in range(12):
        table.add_column(f"[red]{column}")
    table.add_row(*[f"[/]{i:>20}" for i in range(12)])
    out = console()
    assert out.width == WIDE
    out.print(table)
    out.print(description().render(type("Task", (), {"description": name})()))
    text = sys.stdout.getvalue()
    assert "[bold]x[/] [/] :smile:" in text
    assert all(f"[red]{i}" in text and f"[/]{i:>20}" in text for i in range(12))
    assert "…" not in text
    monkeypatch.setenv("COLUMNS", "60")
    assert console().width == 60


def test_names_are_no_formulas():
    for name in ("$x^{", "$\\frac{", "a_b $c$"):
        figure = drawn(lambda figure, name=name: figure.suptitle(name), width=2, height=1)
        assert name in encoded(figure, "svg").decode()


def test_version_and_lists(run, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)  # which pytest-xdist sets
    code, out, _ = run("--version")
    assert (code, out) == (0, f"logsnr {application.logsnr.__version__}\n")
    code, out, _ = run("recipes")
    assert code == 0
    for name in ("digits", "fashion_mnist", "cifar10_small"):
        assert f" {name} " in out
    assert json.loads(run("recipes", "--json")[1])["digits"]["steps"] == 500
    code, out, _ = run("zoo")
    assert code == 0
    found = json.loads(run("zoo", "--json")[1])
    assert list(found) == [f"zoo:{name}" for name in zoo.names()]
    assert all(name in out for name in found)
    assert found["zoo:digits"]["shape"] == [1, 8, 8]
    assert 5 in found["zoo:digits"]["plans"]


def test_quiet_leaves_out_bars_and_notes(run, capsys):
    for line, quiet in ((["zoo", "--quiet"], True), (["zoo"], False), (["--quiet", "zoo"], True), (["zoo"], False)):
        code, out, _ = run(*line)
        assert (code, "zoo:digits" in out) == (0, True)
        assert application.hushed(False) == quiet
        assert application.hushed(True)
        application.note("a [note]")
        assert capsys.readouterr().err == ("" if quiet else "a [note]\n")


def test_the_shell_completes_commands_options_and_models(monkeypatch, capsys):
    def complete(words: str) -> list[str]:
        monkeypatch.setenv("_LOGSNR_COMPLETE", "complete_bash")
        monkeypatch.setenv("COMP_WORDS", words)
        monkeypatch.setenv("COMP_CWORD", str(len(words.split()) - 1))
        with pytest.raises(SystemExit):
            app([], prog_name="logsnr")
        return capsys.readouterr().out.split()

    assert complete("logsnr sam") == ["sample"]
    assert complete("logsnr sample zoo:") == [f"zoo:{name}" for name in zoo.names()]
    assert complete("logsnr train cif") == ["cifar10", "cifar10_small"]
    assert "--guidance" in complete("logsnr sample --gui")


def test_warnings_are_notes_of_one_line(run, monkeypatch):
    def warn(*options: object) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("always")
            warnings.warn("the first\nof two", UserWarning, stacklevel=1)
        raise LogsnrError("enough")

    monkeypatch.setattr("logsnr.training.load_recipe", warn)
    assert run("train", "digits")[2] == "logsnr: note: the first of two\nlogsnr: error: enough\n"
    assert run("--quiet", "train", "digits")[2] == "logsnr: error: enough\n"


def test_more_images_than_memory_holds_are_refused_before_they_are_drawn(run):
    code, _, err = run("sample", "zoo:digits", "-n", 10**12, "--nfe", 1)
    assert code == 2
    assert "-n 1000000000000: 1e+12 images of (1, 8, 8) take 7.68e+05 GB" in err
