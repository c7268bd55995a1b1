"""Runs that are cut, interrupted, shared or misled: what was saved stays whole, and what happened is said."""

from __future__ import annotations

import json
import os
import signal
import stat
import threading
from itertools import count
from pathlib import Path

import pytest
import torch
from accelerate.tracking import GeneralTracker
from faults.processes import Forked
from faults.sites import killed_at

from logsnr import load
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.evaluation.compare import measure, ours
from logsnr.evaluation.passport import Passport, examine
from logsnr.evaluation.passport.page import write_passport
from logsnr.exact import Gaussian
from logsnr.interrupts import Interrupted
from logsnr.models import UNet, UNetConfig
from logsnr.paths import expanded
from logsnr.sampling import GaussianStart
from logsnr.training import load_data, loop, recipe_from, trackers, train
from logsnr.training.checkpoint import load_state, repair, save_state
from logsnr.training.config import DataConfig
from logsnr.training.processes import own_accelerator
from logsnr.training.run import Run
from logsnr.writing import check_output, only_writer, replace_file


@pytest.fixture(scope="module")
def digits():
    return load_data(DataConfig())


def recipe(**changes):
    base = {
        "network": {"channels": [8], "layers_per_block": 1, "mid_attention": False, "norm_groups": 4},
        "optimizer": {"warmup": 4},
        "samples": {"every": 0},
        "conditional": True,
        "batch": 8,
        "steps": 6,
        "checkpoint_every": 2,
        "log_every": 2,
        "device": "cpu",
    }
    return recipe_from({**base, **changes})


def weights(folder):
    card = load(folder).card
    return card["step"], card["weights"]["sha256"]


# Kills


@pytest.fixture
def pair(digits):
    """Two runs of a recipe."""
    with own_accelerator():
        yield Run(recipe(), digits), Run(recipe(), digits)


def test_a_kill_at_any_call_of_the_last_commit_leaves_the_old_or_the_new(tmp_path, pair):
    """Each ends a fork for good.  Whatever it leaves loads, and a resume brings state, card and weights together.

    Every third site; `make faults` takes them all."""
    run, fresh = pair
    run.advance()
    save_state(run, tmp_path / "old")
    run.advance()
    save_state(run, tmp_path / "new")
    known = [weights(tmp_path / name) for name in ("old", "new")]
    names = []
    for site in count(step=3):
        out = tmp_path / str(site)
        for path in (p for p in (tmp_path / "old").rglob("*") if p.is_file()):
            target = out / path.relative_to(tmp_path / "old")
            target.parent.mkdir(parents=True, exist_ok=True)
            os.link(path, target)
        name = killed_at(lambda out=out: save_state(run, out), out, site)
        assert weights(out) in known
        load_state(fresh, out)
        repair(fresh, out)
        assert weights(out) == known[fresh.step - 1]
        save_state(fresh, out)
        assert files(out) == files(tmp_path / ("old", "new")[fresh.step - 1])  # and nothing is left behind
        if not name:
            break
        names.append(name)
    assert len(names) >= 13
    assert {name.split()[1] for name in names} >= {"os.replace", "os.fsync", "os.unlink"}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def test_a_resume_writes_the_card_that_a_kill_kept_from_the_last_checkpoint(tmp_path, digits, capsys):
    train(recipe(), tmp_path, data=digits)
    before = weights(tmp_path)
    (tmp_path / "card.json").unlink()
    train(recipe(), tmp_path, resume=True, data=digits)
    assert weights(tmp_path) == before
    assert "card.json is not of step 6, as the state is" in capsys.readouterr().err


# Signals


@pytest.fixture(autouse=True)
def heard():
    """A shell starts what runs in its background deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_step_finish_and_be_saved(tmp_path, digits, sig):
    train(recipe(), tmp_path / "whole", data=digits)

    def callback(info):
        if info.step == 3:
            os.kill(os.getpid(), sig)

    before = signal.getsignal(sig)
    with pytest.raises(Interrupted, match=r"interrupted after step 3, which is saved in .*resume") as stop:
        train(recipe(), tmp_path / "cut", data=digits, callback=callback)
    assert stop.value.signum == sig
    assert signal.getsignal(sig) == before
    assert weights(tmp_path / "cut")[0] == 3
    train(recipe(), tmp_path / "cut", resume=True, data=digits)
    assert weights(tmp_path / "cut") == weights(tmp_path / "whole")


@pytest.mark.parametrize(("sig", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_command_says_how_to_go_on(run, tmp_path, monkeypatch, sig, code):
    advance = Run.advance
    monkeypatch.setattr(Run, "advance", lambda self: (os.kill(os.getpid(), sig), advance(self))[1])
    tiny = ["network.channels=[8]", "network.mid_attention=false", "network.norm_groups=4", "max_seconds=null"]
    options = [f"--set={text}" for text in (*tiny, "batch=4", "device=cpu", "steps=3", "optimizer.decay=constant")]
    found, _, err = run("train", "digits", "--out", tmp_path / "a b", *options)
    assert found == code
    last = err.splitlines()[-1]
    assert last.startswith("logsnr: interrupted after step 1, which is saved in ")
    assert last.endswith("steps=3 --set=optimizer.decay=constant --resume")
    assert f"--out '{tmp_path}/a b'" in last
    assert "Traceback" not in err


def test_an_interrupted_comparison_keeps_its_rows():
    model = Gaussian(torch.zeros(4), torch.eye(4))
    entries = ours(model, [4], solvers=["ge"], grids=[])
    assert len(entries) >= 3
    seen = []

    def keep(entry, x):
        seen.append(entry)
        if len(seen) == 3:
            raise KeyboardInterrupt

    found = measure(model, entries, n=8, keep=keep)
    assert [row.name for row in found.rows] == [entries[0].name]
    assert found.about["interrupted"] == f"after 1 of {len(entries)} runs"


def test_an_interrupted_passport_keeps_what_was_measured(tmp_path):
    model = Gaussian(torch.zeros(16), torch.eye(16))

    def stop(part, share):
        if part == "few steps":
            raise KeyboardInterrupt

    data = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    found = examine(model, data, images=32, trajectories=2, levels=5, progress=stop)
    assert found.interrupted
    assert len(found.levels) == 5
    assert len(found.projection) == 11
    assert (found.half, found.end_points, found.pictures) == ((), (), None)
    found.save(tmp_path / "p.json")
    assert Passport.load(tmp_path / "p.json").levels == found.levels
    write_passport(found, tmp_path / "p.html")


# Folders


def test_a_second_writer_is_refused_and_told_of_the_first(tmp_path, digits):
    with only_writer(tmp_path, "this run"), pytest.raises(LogsnrError, match=f"is in use by process {os.getpid()} on "):
        train(recipe(), tmp_path, data=digits)
    assert list(tmp_path.iterdir()) == []

    def hold():
        with only_writer(tmp_path, "this run"):
            os.kill(os.getpid(), signal.SIGKILL)

    Forked(hold).wait()
    with only_writer(tmp_path, "this run"):  # the lock of a killed process is nobody's
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_its_training_is_never_replaced(run, tmp_path, digits):
    train(recipe(steps=2), tmp_path, data=digits)
    for path in (tmp_path / "state").iterdir():
        path.unlink()
    before = weights(tmp_path)
    with pytest.raises(LogsnrError, match=r"holds a trained model \(card.json\) without the state of its training"):
        train(recipe(), tmp_path, data=digits)
    code, _, err = run("demo", "--out", tmp_path)
    assert (code, "holds a model that the demo did not make" in err) == (2, True)
    assert weights(tmp_path) == before


def test_other_data_are_refused_and_other_processes_said(tmp_path, digits, capsys):
    train(recipe(steps=2), tmp_path, data=digits)
    changed = load_data(DataConfig())
    changed.train_images[5, 0, 3, 3] += 1
    with pytest.raises(LogsnrError, match="was trained on other images or labels than 'digits' holds now"):
        train(recipe(steps=3), tmp_path, resume=True, data=changed)
    path = tmp_path / "state" / "state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "processes": 4}))
    train(recipe(steps=3), tmp_path, resume=True, data=digits)
    said = capsys.readouterr().err
    assert "was trained by 4 processes, now by 1: images, levels and noise go on as they would have" in said


# What goes wrong on the way


def test_weights_that_are_no_numbers_are_not_saved(tmp_path, digits):
    def spoil(info):
        if info.step == 3:
            next(info.denoiser.network.parameters()).data[0] = torch.inf

    with pytest.raises(
        LogsnrError, match=r"average\.unet.* infinite values .*step 4 is not saved; the checkpoint of step"
    ):
        train(recipe(), tmp_path, data=digits, callback=spoil)
    assert weights(tmp_path)[0] == 2


@pytest.mark.parametrize(
    "changes", [{"sigma_data": 1e300}, {"sigma_data": 1e-30}, {"optimizer": {"lr": 1e30}}], ids=["large", "small", "lr"]
)
def test_numbers_that_overflow_are_refused(changes):
    with pytest.raises(LogsnrError, match=r"(sigma_data|lr) = 1e"):
        recipe(**changes)


def test_a_picture_that_fails_is_said_and_the_training_goes_on(tmp_path, digits, monkeypatch, capsys):
    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(loop, "save_picture", full)
    train(recipe(samples={"every": 3}), tmp_path, data=digits)
    err = capsys.readouterr().err
    assert "no picture step-00000003.png: [Errno 28] No space left on device; the training goes on" in err
    # No terminal looks on: a line every `log_every` steps.
    assert [line.split("  ")[0] for line in err.splitlines() if line.startswith("step")] == [
        "step 2/6",
        "step 4/6",
        "step 6/6",
    ]
    assert " elapsed, 0:00:0" in err


class Kept(GeneralTracker):
    """A tracker that remembers."""

    name, requires_logging_directory = "kept", False

    def __init__(self):
        super().__init__()
        self.config, self.lines, self.finished = None, [], False

    @property
    def tracker(self):
        return self

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **options):
        if step == 6:
            raise RuntimeError("the service is away")
        self.lines.append((step, values))

    def finish(self):
        self.finished = True


def test_a_tracker_is_sent_the_lines_and_may_fail(tmp_path, digits, monkeypatch, capsys):
    kept = Kept()
    monkeypatch.setattr("logsnr.training.run.options", lambda recipe, out: {"log_with": kept})
    train(recipe(log_with="wandb"), tmp_path, data=digits)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(step, values["loss"]) for step, values in kept.lines] == [(n["step"], n["loss"]) for n in lines[:2]]
    assert (kept.config["optimizer.warmup"], kept.config["network.channels"]) == (4, "[8]")
    assert "wandb failed (the service is away): the training goes on without it" in capsys.readouterr().err
    assert weights(tmp_path)[0] == 6
    monkeypatch.undo()
    monkeypatch.setitem(trackers.MODULES, "trackio", "no_such_package")
    with pytest.raises(LogsnrError, match="log_with: trackio needs the package trackio: pip install trackio"):
        train(recipe(log_with="trackio"), tmp_path / "other", data=digits)


# Fine-tuning


@pytest.mark.parametrize(("classes", "others"), [(3, 5), (3, 0), (0, 4), (2, 2)])
def test_a_network_begins_as_another_ones_null_condition(classes, others):
    def network(n):
        config = UNetConfig(channels=(8,), layers_per_block=1, mid_attention=False, norm_groups=4, classes=n)
        made = UNet(config, (1, 4, 4))
        torch.nn.init.normal_(made.unet.conv_out.weight)
        return made.eval()

    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        source, tuned = network(classes), network(others)
        tuned.begin_as(source)
        x, label = torch.randn(4, 1, 4, 4), torch.linspace(10, 900, 4)
        labels = torch.arange(4) % others if others else None
        if classes == others:
            torch.testing.assert_close(tuned(x, label, labels), source(x, label, labels), rtol=0, atol=0)
        else:
            torch.testing.assert_close(tuned(x, label, labels), source(x, label), rtol=1e-5, atol=1e-6)


def test_a_fine_tuned_run_begins_as_its_source(tmp_path, digits):
    train(recipe(sigma_data=0.4), tmp_path / "source", data=digits)
    source = load(tmp_path / "source")
    tuned = recipe(init_from=str(tmp_path / "source"), conditional=False, steps=1, optimizer={"lr": 1e-12})
    train(tuned, tmp_path / "tuned", data=digits)
    found = load(tmp_path / "tuned")
    assert isinstance(found, NetworkDenoiser)
    z = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(found(z, 0.7).x0, source(z, 0.7).x0, rtol=1e-4, atol=1e-5)
    assert (found.sigma_data, found.card["classes"], found.card["training"]["init_from"]) == (0.4, 0, "source")
    # A resume needs neither the name nor the source.
    train(tuned.model_copy(update={"init_from": None, "steps": 2}), tmp_path / "tuned", resume=True, data=digits)
    with pytest.raises(LogsnrError, match=r"another network than the recipe's: set network.channels: \[8\]"):
        train(
            recipe(init_from=str(tmp_path / "source"), network={"channels": [4], "norm_groups": 4, "head_dim": 4}),
            tmp_path / "x",
            data=digits,
        )


# Files


def test_links_are_followed_modes_kept_and_pipes_written_to(tmp_path):
    (tmp_path / "there").mkdir()
    target, link, pipe = tmp_path / "there" / "file", tmp_path / "link", tmp_path / "pipe"
    target.write_bytes(b"old")
    target.chmod(0o600)
    link.symlink_to(target)
    replace_file(link, b"new")
    assert (link.is_symlink(), target.read_bytes(), stat.S_IMODE(target.stat().st_mode)) == (True, b"new", 0o600)
    os.mkfifo(pipe)
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_bytes()))
    reader.start()
    replace_file(pipe, b"through")
    reader.join()
    assert (read, pipe.is_fifo()) == ([b"through"], True)
    with pytest.raises(OSError, match=r"\[Errno 21\] Is a directory: '.*/there'"):
        replace_file(tmp_path / "there", b"")
    replace_file("/dev/null", b"gone")
    assert Path("/dev/null").is_char_device()
    dead = Forked(lambda: None)
    dead.wait()
    (tmp_path / "there" / f".file.{dead.pid}-0.tmp").write_bytes(b"of a killed writer")
    (tmp_path / "there" / f".file.{os.getppid()}-0.tmp").write_bytes(b"of a living one")
    replace_file(target, b"newer")
    assert sorted(path.name for path in target.parent.iterdir()) == [f".file.{os.getppid()}-0.tmp", "file"]


def test_outputs_are_checked_before_the_work(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    with pytest.raises(LogsnrError, match=r"--out .* is a folder: give the name of a file in it"):
        check_output(tmp_path)
    with pytest.raises(LogsnrError, match=r"--out: .*file cannot be written to \(it is a file\): give a place"):
        check_output(tmp_path / "file" / "plan.json")
    assert check_output(tmp_path / "new" / "plan.json").parent.is_dir()
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_output("~/here/plan.json") == tmp_path / "here" / "plan.json"
    assert expanded("~/x") == tmp_path / "x"
    with pytest.raises(ValueError, match="'~nobody-at-all/x' names the home of an unknown user"):
        expanded("~nobody-at-all/x")


def test_another_start_beside_the_plan_is_refused_before_the_search(run, tmp_path, monkeypatch):
    monkeypatch.setattr("logsnr.cli.calibrate.searched", lambda *a, **k: pytest.fail("searched"))
    GaussianStart.fit(torch.randn(40, 1, 8, 8, generator=torch.Generator().manual_seed(0))).save(
        tmp_path / "start.safetensors"
    )
    code, _, err = run("calibrate", "zoo:digits", "--start", "data", "--out", tmp_path / "plan.json")
    assert (code, "start.safetensors is another start, which other plans may need" in err) == (2, True)
