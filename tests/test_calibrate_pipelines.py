"""`logsnr calibrate` of pipelines and of several plans at once, its efforts, and what fits into a time."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path

import pytest
import torch

import logsnr as ls
from logsnr import exact
from logsnr.adapters import GradientEstimationScheduler
from logsnr.calibration import calibrate
from logsnr.calibration.budget import fitting
from logsnr.calibration.effort import EFFORTS
from logsnr.calibration.ledger import fingerprint
from logsnr.errors import LogsnrError

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPTS = "a red fox\n\na blue bird\n  a green car \n"


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(Path(__file__).parents[1] / "examples"))
        import tiny

        tiny.stable_diffusion().save_pretrained(folder)
    return folder


def mixture():
    g = torch.Generator().manual_seed(0)
    means, factors = torch.randn(5, 6, generator=g), torch.randn(5, 6, 6, generator=g) * 0.35 / math.sqrt(6)
    return exact.GaussianMixture(torch.ones(5) / 5, means, factors @ factors.mT + 0.02 * torch.eye(6))


def test_a_pipelines_plans_by_the_command_line(run, sd, tmp_path, monkeypatch):
    """Two plans that share a teacher, for any guidance from 3 to 9; the file says of what; diffusers runs it."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(PROMPTS)
    line = ("calibrate", sd, "--prompts", "prompts.txt", "--guidance", "3:9", "--nfe", "1,2", "--effort", "quick")
    code, text, err = run(*line, "-n", 4, "--out", "plans.json", "--json")
    assert code == 0, err
    assert [plan["nfe"] for plan in json.loads(text)["plans"]] == [1, 2]
    plans = ls.load_plans("plans.json")
    first, second = plans[1].meta["evaluations"], plans[2].meta["evaluations"]
    guided = 2
    assert first["teacher_samples_times_network"] == guided * 64 * 4 * 4
    assert second["teacher_samples_times_network"] == guided * 64 * 4  # through the plan's own levels
    about = plans[2].meta["about"]
    assert about["guidance"] == [3.0, 9.0]
    assert about["prompts"]["number"] == 3
    assert about["scheduler"]["beta_schedule"] == "scaled_linear"
    denoiser = ls.load(sd, guidance=5.0)
    assert plans[1].meta["model"] == fingerprint(denoiser) == fingerprint(denoiser.plain)
    pipe = denoiser.pipeline
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pipe.scheduler = GradientEstimationScheduler.from_config(pipe.scheduler.config, plan="plans.json")
    pipe.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    latents = pipe("a red fox", num_inference_steps=2, guidance_scale=5.0, generator=generator, output_type="latent")
    noise = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    own = ls.sample(denoiser, plans[2], noise=noise, cond=denoiser.conditions("a red fox"))
    assert float((latents.images - own).abs().max()) < 1e-4 * float(own.std())
    config = {**pipe.scheduler.config, "prediction_type": "v_prediction"}
    with pytest.warns(UserWarning, match=r"on a pipeline with prediction_type 'epsilon' \(here 'v_prediction'"):
        GradientEstimationScheduler.from_config(config)


def test_a_pipeline_is_compared_on_prompts(run, sd, tmp_path, monkeypatch):
    """Each sample under its own prompt, guided: the numbers are those of the Python calls."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(PROMPTS)
    line = ("compare", sd, "--prompts", "prompts.txt", "--guidance", 4, "--nfe", 4, "-n", 4, "--no-peers")
    more = ("--solvers", "ddim", "--grids", "log-linear", "--features", "none", "--teacher-steps", 16, "--json")
    code, text, err = run(*line, *more)
    assert code == 0, err
    found = json.loads(text)
    assert (found["about"]["prompts"]["number"], found["about"]["guidance"]) == (3, 4)
    denoiser = ls.load(sd, guidance=4.0)
    cond = denoiser.conditions(["a red fox", "a blue bird", "a green car", "a red fox"])
    low, high = denoiser.sampling_range
    noise = torch.randn(4, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    ends = [
        ls.sample(denoiser, plan, noise=noise, cond=cond)
        for plan in (
            ls.solvers.ddim(ls.grids.log_linear(2, high, low)),
            ls.solvers.unipc(ls.grids.log_linear(16, high, low), 3),
        )
    ]
    row = next(row for row in found["rows"] if row["name"] == "DDIM, log-linear")
    rmse = float((ends[0] - ends[1]).double().square().mean().sqrt())
    cell = row["cells"][0] if "cells" in row else row
    assert cell["rmse"]["value"] == pytest.approx(rmse, rel=1e-3)


def test_a_pipeline_is_examined_on_prompts(run, sd, tmp_path, monkeypatch):
    """The model draws its own samples under the prompts in turn, and is asked under the same ones."""
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(PROMPTS)
    seen = {}

    def examine(denoiser, x, *, cond, **options):
        seen.update(x=x, cond=cond, own=denoiser.conditions(["a red fox", "a blue bird", "a green car"]))
        raise LogsnrError("enough")

    monkeypatch.setattr("logsnr.evaluation.passport.examine", examine)
    code, _, err = run("passport", sd, "--prompts", "prompts.txt", "--out", "p.html")
    assert (code, "enough" in err) == (2, True)
    assert seen["x"] is None
    assert seen["cond"].keys() == seen["own"].keys()
    for name, rows in seen["own"].items():
        torch.testing.assert_close(seen["cond"][name], rows)
    for option, words in (
        (("--prompt", "a dog"), "give one of them"),
        (("--data", "digits"), "nothing says which image each prompt is of"),
    ):
        code, _, err = run("passport", sd, "--prompts", "prompts.txt", *option, "--out", "p.html")
        assert (code, words in err) == (2, True), err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ([], "this pipeline is told a text: give --prompts"),
        (["--prompts", "none.txt"], "none.txt"),
        (["--prompts", "empty.txt"], "empty.txt holds no prompt"),
        (["--prompts", "prompts.txt", "--guidance", "9:3"], "--guidance '9:3': give a scale"),
        (["--prompts", "prompts.txt", "--start", "model"], "--start model: of a pipeline"),
        (["--prompts", "prompts.txt", "--negative-prompt", "x"], "without guidance does nothing"),
        (["--nfe", "4,many"], "--nfe '4,many': give a number"),
        (["--nfe", "2,30"], "--nfe '2,30': give a number, 1 to 20"),
        (["--prompts", "prompts.txt", "--guidance", "a:b"], "--guidance 'a:b': give a scale"),
        (["--effort", "some"], "effort"),
        (["--budget", "1", "--effort", "quick"], "--budget 1 chooses --effort"),
    ],
)
def test_bad_input_is_one_line(run, sd, tmp_path, monkeypatch, options, words):
    monkeypatch.chdir(tmp_path)
    Path("prompts.txt").write_text(PROMPTS)
    Path("empty.txt").write_text("\n \n")
    if options[:1] == ["--effort"]:
        options = [*options, "--prompts", "prompts.txt"]
    code, out, err = run("calibrate", sd, *options)
    assert (code, out, err.count("\n")) == (2, "", 1), err
    assert words in err
    assert not Path("plan.json").exists()


def test_a_quick_search_costs_a_fifth_and_beats_what_is_built_in():
    model = mixture()
    memo: dict = {}
    for nfe in (4, 6):
        plan = calibrate(model, nfe, effort="quick", memo=memo)
        spent, report = plan.meta["evaluations"], plan.meta["report"]
        assert spent["rollouts"] < EFFORTS["full"].rollouts(nfe) / 4
        assert len(report["alternatives"]) == EFFORTS["quick"].leaders
        assert report["rmse"] < 0.9 * min(report["alternatives"].values())
        assert plan.meta["effort"] == "quick"
    # shared or not, the same plan
    assert calibrate(model, 6, effort="quick").hash == plan.hash


@pytest.mark.parametrize(
    ("minutes", "effort", "n", "whole"),
    [(0.5, "quick", 32, True), (1.5, "quick", 96, True), (4, "full", 96, False), (6, "full", 96, True)],
)
def test_what_fits_into_a_time(minutes, effort, n, whole):
    """The most that takes no longer than asked; ten times slower in ten times the time is the same."""
    nfes, per_answer = (4, 6, 8), 1e-3
    sizes = fitting(nfes, minutes, per_answer)
    assert (sizes.effort, sizes.n, sizes.rollouts is None) == (effort, n, whole)
    assert sizes.seconds <= 60 * minutes
    slower = fitting(nfes, 10 * minutes, 10 * per_answer)
    assert (slower.effort, slower.n, slower.rollouts) == (sizes.effort, sizes.n, sizes.rollouts)
    assert slower.seconds == pytest.approx(10 * sizes.seconds)


def test_too_short_a_time_says_how_long_it_takes():
    with pytest.raises(LogsnrError, match=r"of 4, 6, 8 evaluations takes about 0\.458 at 1 ms"):
        fitting((4, 6, 8), 0.1, 1e-3)


@pytest.fixture
def one_alternative(monkeypatch):
    """One built-in solver instead of a hundred."""

    def only(denoiser, n, low, high):
        return {"DDIM, log-linear": ls.solvers.ddim(ls.grids.log_linear(n, high, low))}

    monkeypatch.setattr("logsnr.calibration.run.alternatives", only)


@pytest.mark.heavy
@pytest.mark.usefixtures("one_alternative")
def test_several_plans_are_resumed_from_what_was_measured(run, tmp_path, monkeypatch):
    """Ctrl-C while the second of two is sought: the first is not sought again, and both end as without it."""
    from logsnr.cli import calibrate as command

    monkeypatch.chdir(tmp_path)
    line = ("calibrate", "zoo:digits", "--nfe", "1,2", "-n", 4, "--effort", "quick", "--out")
    assert run(*line, "whole.json")[0] == 0
    assert [path.name for path in tmp_path.iterdir()] == ["whole.json"]
    searched, asked = command.searched, []

    def stops(what, nfe, **options):
        if nfe == 2 and not asked:
            asked.append(nfe)
            raise KeyboardInterrupt
        return searched(what, nfe, **options)

    monkeypatch.setattr(command, "searched", stops)
    code, _, err = run(*line, "cut.json")
    assert code == 130
    assert "of 1 of 2 plans; what was measured is kept" in err
    assert list(ls.load_plans("cut.json")) == [1]
    measured = (tmp_path / "cut.measured-1.json").read_bytes()
    assert run(*line, "cut.json", "--resume", "cut.measured.json")[0] == 0
    assert (tmp_path / "cut.measured-1.json").read_bytes() == measured
    assert {n: p.hash for n, p in ls.load_plans("cut.json").items()} == {
        n: p.hash for n, p in ls.load_plans("whole.json").items()
    }


@pytest.mark.usefixtures("one_alternative")
def test_a_memo_and_a_file_know_guidance_apart(tmp_path):
    """Weights do not say how a denoiser is guided: another scale has another teacher, and is another calibration."""
    model, null = ls.load("zoo:digits"), {"class_labels": 10}
    cond, small = {"class_labels": torch.arange(4)}, {"n": 4, "rollouts": 40, "teacher": 16, "contrast": False}
    memo: dict = {}
    plain = [
        calibrate(ls.guidance.cfg(model, scale, null), 1, cond=cond, memo=shared, **small).hash
        for shared in (None, memo)
        for scale in (1.5, 4.0)
    ]
    assert plain[:2] == plain[2:]
    assert plain[0] != plain[1]
    path = tmp_path / "ledger.json"
    calibrate(model, 1, cond=cond, about={"guidance": 3}, resume=path, **small)
    with pytest.raises(LogsnrError, match="different: told"):
        calibrate(model, 1, cond=cond, about={"guidance": 7.5}, resume=path, **small)
