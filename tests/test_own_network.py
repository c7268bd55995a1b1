"""A network of one's own: by a recipe that names it, and never by a file that somebody else wrote."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import logsnr as ls
from logsnr.errors import LogsnrError
from logsnr.models import build_network
from logsnr.training import load_recipe, train

EXAMPLES = Path(__file__).parent.parent / "examples"
FEW = ("--set", "steps=2", "--set", "batch=8", "--set", "network.width=8", "--set", "device=cpu")


@pytest.fixture
def beside(tmp_path, monkeypatch):
    """A folder with the example, its module not imported before nor after."""
    for name in ("own_network.py", "own_network.yaml"):
        shutil.copy(EXAMPLES / name, tmp_path)
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("own_network", None)


@pytest.fixture
def trained(beside, run):
    code, _, err = run("train", "own_network.yaml", "--out", "runs/own", "--allow-code", "--json", *FEW)
    assert code == 0, err
    return beside / "runs" / "own"


def test_the_example_is_trained_resumed_loaded_calibrated_and_measured(trained, run):
    code, out, err = run("train", "own_network.yaml", "--out", trained, "--resume", "--allow-code", "--json", *FEW,
                         "--set", "steps=3")  # fmt: skip
    assert (code, json.loads(out)["steps"]) == (0, 3), err
    for command in (
        ("calibrate", trained, "--nfe", 2, "-n", 4, "--effort", "quick"),
        ("evaluate", trained, "--evaluations", 8, "--limit", 4, "--json"),
        ("sample", trained, "--nfe", 2, "-n", 2, "--class", 3, "--out", trained / "x.npy"),
    ):
        code, _, err = run(*command, "--allow-code")
        assert code == 0, err
    Mixer = sys.modules["own_network"].Mixer
    with ls.allow_code():
        named = ls.load(trained)
    given = ls.load(trained, network=Mixer)
    assert given.card["network"] == {"kind": "own_network:Mixer", "classes": 10, "width": 8}
    z, cond = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0)), {"class_labels": torch.arange(2)}
    assert torch.equal(given(z, 1.0, **cond).x0, named(z, 1.0, **cond).x0)
    null = given(z, 1.0, class_labels=torch.tensor([10, 10])).x0
    assert torch.equal(given(z, 1.0).x0, null)
    code, _, err = run("export", trained, "-o", trained / "pipeline", "--allow-code")
    assert code == 2
    assert "'own_network:Mixer' is no UNet2DModel" in err


def test_nothing_is_imported_before_somebody_says_so(trained, run):
    """The module would leave a file: no reader of the run makes it do so."""
    sys.modules.pop("own_network")
    (trained.parent.parent / "own_network.py").write_text("open('ran', 'w').close()")
    said = "network 'own_network:Mixer' is code, and a file that names code runs none until you say so: --allow-code"
    commands = ("sample", "evaluate", "compare", "passport", "calibrate", "probe")
    others = [("train", "own_network.yaml", "--out", "other"), ("train", "digits", "--init-from", trained)]
    for command in [*((name, trained) for name in commands), ("export", trained, "-o", "pipeline"), *others]:
        code, _, err = run(*command)
        assert code == 2, command
        assert said in err
    with pytest.raises(LogsnrError, match=r"logsnr.load.*network=Mixer"):
        ls.load(trained)
    with pytest.raises(LogsnrError, match="until you say so"):
        train(load_recipe("own_network.yaml"), "another")
    run("zoo")
    assert "own_network" not in sys.modules
    assert not Path("ran").exists()
    code, _, err = run("sample", trained, "--allow-code")
    assert code == 2
    assert "module own_network has no Mixer" in err
    assert Path("ran").exists()


@pytest.mark.parametrize(
    ("kind", "options", "said"),
    [
        ("subprocess:Popen", {"args": ["touch", "ran"]}, "is no class of networks: give a subclass of torch.nn.Module"),
        ("os:system", {}, "is no class of networks"),
        ("no_such_module:Net", {}, "No module named 'no_such_module'; run it where no_such_module lies, or install it"),
        ("torch.nn:Linear", {"width": 3}, "'torch.nn:Linear' does not take \\(shape, classes, width\\)"),
    ],
)
def test_only_networks_are_called(kind, options, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.yaml").write_text(json.dumps({"network": {"kind": kind, **options}, "steps": 1}))
    recipe = load_recipe("r.yaml")
    with ls.allow_code(), pytest.raises(LogsnrError, match=said):
        train(recipe, "run", progress=False)
    assert not Path("ran").exists()


def test_what_else_is_refused(trained):
    class Narrow(nn.Module):
        def __init__(self, shape, *, classes, width):
            super().__init__()

        def forward(self, x, label, class_labels):
            return x[:, :, 1:]

    with pytest.raises(LogsnrError, match="is the checkpoint of another network"):
        ls.load(trained, network=Narrow)
    with pytest.raises(LogsnrError, match="is built in; leave it out"):
        ls.load("zoo:digits", network=Narrow)
    config = ls.load(trained, network=sys.modules["own_network"].Mixer).network.config
    narrow = build_network(config, (1, 8, 8), network=Narrow)
    with pytest.raises(LogsnrError, match=r"answers \(2, 1, 7, 8\) to \(2, 1, 8, 8\)"):
        narrow(torch.zeros(2, 1, 8, 8), torch.zeros(2))
    with pytest.raises(LogsnrError, match=r"network.kind = 'a b:c'"):
        load_recipe("own_network.yaml", {"network.kind": "a b:c"})
