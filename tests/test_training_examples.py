"""The training examples run: the files themselves, on tiny networks, and what they change is two lines of the loop."""

from __future__ import annotations

import re
import runpy
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("diffusers")
pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from logsnr.adapters import LoopObjective
from logsnr.gradients import OutputLayer

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples"
STEPS = {"training_diffusers": 48, "training_sd3": 30, "training_lightning": 48, "training_plain": 400}


def run(name: str, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--tiny", "--steps", str(STEPS[name])])
    torch.manual_seed(0)
    return runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def test_every_training_example_is_run_here() -> None:
    assert {path.stem for path in EXAMPLES.glob("training_*.py")} == set(STEPS)


@pytest.mark.parametrize("name", STEPS)
def test_training_example(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The network learns, and so do the noise levels; a checkpoint of them continues with the same draws."""
    namespace = run(name, monkeypatch)
    losses, loop = namespace["losses"], getattr(namespace.get("module"), "loop", namespace.get("loop"))
    few = min(20, STEPS[name] // 3)
    assert sum(losses[-few:]) < 0.9 * sum(losses[:few])
    x = torch.linspace(-3, 3, 20, dtype=torch.float64)
    schedule = loop.objective.schedule
    start = LoopObjective(
        loop.objective.name,
        (namespace["module"].scheduler if "module" in namespace else namespace.get("noise_scheduler"))
        or namespace.get("scheduler")
        or {"prediction_type": "flow_prediction"},
        target=loop.model.target,
        continuous=loop.continuous,
        adaptive=True,
    )
    assert float((start.objective.schedule.log_density(x) - schedule.log_density(x)).abs().max()) > 0.05
    start.load_state_dict(loop.state_dict())
    one, two = (each.draw(16, generator=torch.Generator().manual_seed(1)) for each in (loop, start))
    assert torch.equal(one.timesteps, two.timesteps)


@pytest.mark.parametrize("name", STEPS)
def test_a_loop_changes_in_two_lines(name: str) -> None:
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("LoopObjective(") == 1
    assert text.count("loop.draw(") == 1
    assert text.count("loop.loss(draw, ") + text.count("loop.update(draw, ") == 1
    assert len(text.splitlines()) <= 80


def test_the_page_runs_and_leads_somewhere(capsys: pytest.CaptureFixture[str]) -> None:
    page = (ROOT / "docs" / "training-loops.md").read_text(encoding="utf-8")
    for block in re.findall(r"```python\n(.*?)```", page, flags=re.S):
        exec(compile(block, "training-loops.md", "exec"), {})
    assert "tensor" in capsys.readouterr().out
    for link in re.findall(r"\]\(([^)]+)\)", page):
        assert (ROOT / "docs" / link).exists(), link
    assert page.count("```diff") == 6


@pytest.mark.parametrize(
    ("name", "network", "last"),
    [("training_diffusers", "model", "conv_out"), ("training_sd3", "transformer", "proj_out")],
)
def test_by_the_gradient_one_line_changes(
    name: str, network: str, last: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """The same scripts with importance="gradient": norms of the real network's last layer, from every batch."""
    text = (EXAMPLES / f"{name}.py").read_text(encoding="utf-8")
    assert text.count("adaptive=True") == 1
    script = tmp_path / "script.py"
    script.write_text(text.replace("adaptive=True", f'adaptive=True, importance="gradient", network={network}'))
    monkeypatch.syspath_prepend(EXAMPLES)
    monkeypatch.setattr(sys, "argv", ["script.py", "--tiny", "--steps", "10"])
    torch.manual_seed(0)
    namespace = runpy.run_path(str(script), run_name="__main__")
    loop, layer = namespace["loop"], getattr(namespace[network], last)
    assert OutputLayer(namespace[network]).layer is layer
    assert not layer._forward_hooks
    state, start = loop.state_dict(), loop.objective.schedule.bins
    assert float(state["gradient_visits"].sum()) == float(state["visits"].sum()) > start
    assert float((state["gradient"] / state["gradient"].mean()).std()) > 0.1
