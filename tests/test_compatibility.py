"""What 0.1.0 wrote is read for ever: it loads, gives the numbers it gave then, and a training goes on from it.

tests/fixtures/v0.1/README.md says how each file was made.
"""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import logsnr as ls
import logsnr.adapters.scheduler
from logsnr.evaluation.passport import Passport
from logsnr.sampling.counted import Counted
from logsnr.training import load_recipe, train

OLD = Path(__file__).parent / "fixtures" / "v0.1"


@pytest.fixture(scope="module")
def expected():
    return load_file(OLD / "expected.safetensors")


@pytest.fixture(scope="module")
def denoiser():
    return ls.load(OLD / "run")


def same(value, expected):
    torch.testing.assert_close(value, expected, rtol=0, atol=1e-6)


def test_a_run_answers_as_it_did(denoiser, expected):
    estimate = denoiser(expected["noise"], 1.0, class_labels=expected["class_labels"])
    same(estimate.x0, expected["x0"])
    same(estimate.eps, expected["eps"])
    assert denoiser.pixels.grey_levels == 17
    assert denoiser.trained_range == pytest.approx((0.018315638888734, 54.598150033144), rel=1e-12)


def test_plans_draw_what_they_drew(denoiser, expected):
    plans = ls.load_plans(OLD / "run")
    assert list(plans) == [2, 3]
    cond = {"class_labels": expected["class_labels"]}
    for nfe, plan in plans.items():
        assert plan.hash == plan.meta["plan_hash"]
        same(ls.sample(denoiser, plan, noise=expected["noise"], cond=cond), expected[f"plan-{nfe}"])
    noisy = ls.Plan.load(OLD / "plan.json")
    generator = torch.Generator().manual_seed(2)
    same(
        ls.sample(denoiser, noisy, noise=expected["noise"], cond=cond, generator=generator),
        expected["ddpm"],
    )


def test_a_card_with_a_table_and_an_open_range(expected):
    denoiser = ls.load(OLD / "denoiser")
    assert denoiser.trained_range == (0.02, float("inf"))
    plan = ls.solvers.ge(ls.grids.log_linear(4, 8.0, 0.05))
    same(ls.sample(denoiser, plan, noise=expected["noise"]), expected["table"])


def test_a_training_goes_on_as_it_would_have(tmp_path, expected):
    """Two steps more, by the recipe that the card holds, are the two steps that 0.1.0 took."""
    run = shutil.copytree(OLD / "run", tmp_path / "run")
    recipe = run / "recipe.yaml"
    recipe.write_text(json.dumps(json.loads((run / "card.json").read_text())["training"]))
    train(load_recipe(recipe, ["steps=5"]), run, resume=True, progress=False)
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    metrics = torch.tensor([[line["loss"], line["grad_norm"]] for line in lines], dtype=torch.float64)
    torch.testing.assert_close(metrics, expected["metrics"], rtol=1e-5, atol=0)
    cond = {"class_labels": expected["class_labels"]}
    same(ls.sample(ls.load(run), ls.load_plans(run)[2], noise=expected["noise"], cond=cond), expected["resumed"])


def test_a_calibration_is_read_from_its_resume_file(denoiser, tmp_path):
    """A finished one costs nothing again, and ends on its plan."""
    ledger = shutil.copy(OLD / "ledger.json", tmp_path / "ledger.json")
    counted = Counted(denoiser)
    plan = ls.calibrate(denoiser, 2, n=4, teacher=16, rollouts=40, resume=ledger)
    assert plan == ls.load_plans(OLD / "run")[2]
    assert counted.evaluations == 0


def test_a_pipeline_and_a_scheduler_draw_what_they_drew(expected, monkeypatch):
    """The folder names `logsnr.adapters.scheduler`, which the usual import must bring in."""
    diffusers = pytest.importorskip("diffusers")
    monkeypatch.setattr(logsnr.adapters, "scheduler", logsnr.adapters.scheduler)  # comes back after the test
    monkeypatch.delitem(sys.modules, "logsnr.adapters.scheduler")
    from logsnr.adapters import GradientEstimationScheduler

    pipe = diffusers.DDPMPipeline.from_pretrained(OLD / "pipeline")
    assert isinstance(pipe.scheduler, GradientEstimationScheduler)
    pipe.set_progress_bar_config(disable=True)

    def images(steps):
        generator = torch.Generator().manual_seed(3)
        return torch.from_numpy(
            pipe(batch_size=2, generator=generator, num_inference_steps=steps, output_type="np").images
        )

    same(images(4), expected["pipeline"])
    pipe.scheduler = GradientEstimationScheduler.from_pretrained(OLD / "scheduler")
    same(images(3), expected["pipeline-plan"])


def test_a_passport_reads_as_it_was_written():
    path = OLD / "passport.json"
    later = {"corrected": [], "probe": None}  # what the passports of that time did not have
    assert json.loads(json.dumps(Passport.load(path).to_dict())) == {**json.loads(path.read_text()), **later}
