"""The examples run: the files themselves, on tiny random pipelines."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

EXAMPLES = Path(__file__).parents[1] / "examples"
PICTURES = {
    "sd": ["out.png"],
    "sdxl": ["out.png"],
    "sd3_flux": ["out-sd3.png", "out-flux.png"],
    "img2img": ["out.png"],
}


def test_every_example_is_run_here():
    training = {path.stem for path in EXAMPLES.glob("training_*.py")}  # test_training_examples.py
    own = {"own_network"}  # test_own_network.py
    assert {path.stem for path in EXAMPLES.glob("*.py")} - training - own == {*PICTURES, "tiny"}


@pytest.mark.parametrize("name", PICTURES)
def test_example(name, tmp_path, monkeypatch, capsys):
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny", "--out", str(tmp_path / "out.png")])
    namespace = runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PICTURES[name])
    for picture in PICTURES[name]:
        with Image.open(tmp_path / picture) as image:
            assert image.size == (16, 16)
    pipe = namespace["pipe"]
    assert type(pipe.scheduler).__name__ == "GradientEstimationScheduler"
    steps = {"sd": 10, "sdxl": 10, "sd3_flux": 12, "img2img": 12}[name]
    assert pipe.scheduler.plan.nfe == steps
    assert any(len(row) == 2 for row in pipe.scheduler.plan.rows)  # gradient estimation, not DDIM


@pytest.mark.parametrize("name", PICTURES)
def test_an_example_is_a_few_lines(name):
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert "GradientEstimationScheduler.from_config(pipe.scheduler.config, " in text
    assert len(text.splitlines()) <= 40
