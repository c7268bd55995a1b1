"""Recipes: what is read, and how mistakes are told."""

from __future__ import annotations

import math
import re
from pathlib import Path

import pytest
import torch

from logsnr.errors import LogsnrError
from logsnr.objectives import objectives
from logsnr.schedules import Adaptive
from logsnr.training import load_recipe, recipe_from
from logsnr.training.config import ObjectiveConfig
from logsnr.training.objectives import build_objective, central_logsnr
from logsnr.weightings import EDM, MinSNR, Sigmoid

RECIPES = Path(__file__).parent.parent / "recipes"


def objective(**section):
    return build_objective(ObjectiveConfig(**section), dim=4, sigma_data=0.3)


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_recipes_we_ship_are_valid(path):
    recipe = load_recipe(path)
    assert recipe.steps or recipe.max_seconds
    built = build_objective(recipe.objective, dim=64, sigma_data=0.5)
    preset = None if recipe.objective.preset is None else objectives[recipe.objective.preset].schedule.range
    assert built.schedule.range == tuple(recipe.objective.logsnr or preset)


def test_overrides_win_by_dotted_path(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(
        "optimizer: {lr: 1.0e-3, warmup: 7}\nsteps: 10\nobjective: {weighting: sigmoid, schedule: cosine}\n"
    )
    texts = [
        "optimizer.lr=2e-4",
        "network.channels=[8, 16]",
        "network.norm_groups=8",
        "network.mid_attention=false",
        "objective.weighting.bias=1.5",
        "max_seconds=5",
    ]
    recipe = load_recipe(path, texts)
    assert (recipe.optimizer.lr, recipe.optimizer.warmup) == (2e-4, 7)
    assert recipe.network.channels == (8, 16)
    assert recipe.objective.weighting == {"name": "sigmoid", "bias": 1.5}
    assert (recipe.steps, recipe.max_seconds) == (10, 5.0)
    assert load_recipe(path, {"optimizer.lr": 2e-4}).optimizer.lr == 2e-4


def test_yamls_no_is_a_precision(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text("steps: 10\nprecision: no\n")
    assert load_recipe(path).precision == load_recipe(path, ["precision=no"]).precision == "no"
    assert load_recipe(path, ["precision=bf16"]).precision == "bf16"


def test_recipes_of_version_0_1_call_grey_levels_levels():
    old = recipe_from({"data": {"levels": 17}, "steps": 1})
    assert old == recipe_from({"data": {"grey_levels": 17}, "steps": 1})
    assert old.model_dump()["data"]["grey_levels"] == 17
    with pytest.raises(LogsnrError, match=r"data: key 'levels' is not one of .*: did you mean 'grey_levels'"):
        recipe_from({"data": {"levels": 17, "grey_levels": 16}, "steps": 1})


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"optimizer": {"learning_rate": 1}}, "optimizer: key 'learning_rate' is not one of after, betas, "),
        (
            {"optimizer": {"warm_up": 1}},
            "optimizer: key 'warm_up' is not one of after, betas, clip, decay, lr, name, settings, warmup, weight",
        ),
        ({"network": {"chanels": [8]}}, "network: key 'chanels' is not one of "),
        ({"stepz": 3}, "did you mean 'steps'?"),
        ({"zzzz": 3}, "key 'zzzz' is not one of accumulate, batch, "),
        ({"optimizer": {"lr": -1}}, "optimizer.lr = -1: input should be greater than 0"),
        ({"optimizer": {"lr": "fast"}}, "optimizer.lr = 'fast': input should be a valid number"),
        ({"ema": {"decay": 1.0}}, "ema.decay = 1.0: input should be less than 1"),
        ({"label_dropout": -0.1}, "label_dropout = -0.1: input should be greater than or equal to 0"),
        ({"batch": 0}, "batch = 0: input should be greater than or equal to 1"),
        ({"precision": "fp8"}, "precision 'fp8' is not one of no, bf16, fp16: did you mean 'fp16'?"),
        ({"data": {"grey_levels": 300}}, "data.grey_levels = 300: input should be less than or equal to 256"),
        (
            {"prediction": {"name": "epsilon"}},
            "prediction: name 'epsilon' is not one of eps, x0, v, flow, edm, score: did you mean 'eps'?",
        ),
        ({"prediction": {"label": "logSNR"}}, "prediction: label 'logSNR' is not one of logsnr, "),
        ({"prediction": {"name": "edm", "path": "ve"}}, "EDM prediction scales its own input; leave path out"),
        ({"objective": {}}, "objective: give a preset, or both a weighting and a schedule"),
        ({"objective": {"weighting": "elbo"}}, "objective: give a preset, or both a weighting and a schedule"),
        ({"objective": {"preset": "edm", "weighting": "elbo"}}, "give a preset or a weighting"),
        ({"objective": {"preset": "edm", "logsnr": [5, -5]}}, "logsnr = [5.0, -5.0]: give [lo, hi] with lo < hi"),
        ({"samples": {"solver": "ddim", "gamma": 1.7}}, "samples: gamma = 1.7 is of gradient estimation: leave it out"),
        ({"steps": None}, "training has no end: give steps or max_seconds"),
        ({"network": {"classes": 10}}, "network.classes = 10 comes from the data: use conditional: true"),
        ({"network": {"channels": [10]}}, "network: channels 10 with norm_groups 16"),
        ({"data": "digits"}, "data = 'digits': input should be a valid dictionary"),
    ],
)
def test_mistakes_are_one_clear_line(values, message):
    with pytest.raises(LogsnrError, match=re.escape(message)) as caught:
        recipe_from({"steps": 10, **values})
    assert "\n" not in str(caught.value)


def test_every_mistake_is_told_at_once():
    with pytest.raises(LogsnrError, match=r"optimizer.lr = -1.*; batch = 0"):
        recipe_from({"steps": 10, "optimizer": {"lr": -1}, "batch": 0})


def test_recipes_that_come_with_the_library_have_bare_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert load_recipe("digits") == load_recipe(RECIPES / "digits.yaml")
    bundled = ", ".join(sorted(path.stem for path in RECIPES.glob("*.yaml")))
    with pytest.raises(LogsnrError, match=rf"recipe digit cannot be read .*there are {bundled}"):
        load_recipe("digit")


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"preset": "edm"}, "edm"),
        ({"preset": "edm", "schedule": "flow", "logsnr": (-9, 9)}, "edm on [-9, 9], drawn by flow"),
        (
            {
                "weighting": {"name": "sigmoid", "bias": 2.0},
                "schedule": "cosine",
                "logsnr": (-10, 10),
                "adaptive": True,
            },
            "sigmoid(bias=2) on [-10, 10], adaptive from cosine",
        ),
        ({"preset": "vdm", "adaptive": True}, "vdm, adaptive"),
        (
            {"weighting": {"name": "min-snr", "base": {"name": "edm", "p_mean": -0.4}}, "schedule": "cosine"},
            "min-snr(base=edm(p_mean=-0.4)), drawn by cosine",
        ),
        (
            {"weighting": "elbo", "logsnr": (-9, 9), "adaptive": {"importance": "error"}},
            "elbo on [-9, 9], adaptive by error",
        ),
    ],
)
def test_an_objective_in_words(section, words):
    assert ObjectiveConfig(**section).describe() == words


def test_files_that_are_not_recipes(tmp_path):
    (tmp_path / "digits.yaml").write_text("steps: 1")
    with pytest.raises(LogsnrError, match=r"missing.yaml cannot be read \(No such file.*there are .*digits.yaml"):
        load_recipe(tmp_path / "missing.yaml")
    (tmp_path / "bad.yaml").write_text("steps: [1, ")
    with pytest.raises(LogsnrError, match="not valid YAML"):
        load_recipe(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- 1")
    with pytest.raises(LogsnrError, match="holds a list: a recipe is a mapping"):
        load_recipe(tmp_path / "list.yaml")
    with pytest.raises(LogsnrError, match=r"override 'steps' has no value: write it as optimizer.lr=1e-3"):
        load_recipe(tmp_path / "digits.yaml", ["steps"])


def test_yaml_runs_no_code(tmp_path):
    (tmp_path / "evil.yaml").write_text("steps: !!python/object/apply:os.getcwd []")
    with pytest.raises(LogsnrError, match="not valid YAML"):
        load_recipe(tmp_path / "evil.yaml")


def test_objectives_are_built_from_names_and_parameters():
    built = objective(
        weighting={"name": "sigmoid", "bias": 1.0}, schedule={"name": "cosine", "shift": 0.5}, logsnr=(-8, 9)
    )
    assert built.weighting == Sigmoid(1.0)
    assert built.schedule.range == (-8, 9)
    assert built.schedule.base.shift == 0.5
    preset = objective(preset="vdm++/sigmoid", logsnr=(-10, 10))
    assert preset.weighting == Sigmoid(2)
    assert preset.schedule.range == (-10, 10)


def test_a_weighting_takes_the_datas_sigma_unless_told():
    assert objective(weighting="edm", schedule="edm-training", logsnr=(-9, 9)).weighting == EDM(sigma_data=0.3)
    told = objective(weighting={"name": "edm", "sigma_data": 0.5}, schedule="edm-training", logsnr=(-9, 9))
    assert told.weighting == EDM(sigma_data=0.5)
    assert objective(preset="edm").weighting == EDM(sigma_data=0.5)


def test_adaptive_starts_from_the_schedule():
    built = objective(preset="vdm++/sigmoid", schedule="cosine", logsnr=(-10, 10), adaptive=True)
    assert isinstance(built.schedule, Adaptive)
    assert built.schedule.range == (-10, 10)
    fixed = objective(preset="vdm++/sigmoid", logsnr=(-10, 10))
    for logsnr in (-5.0, 0.1, 5.0):
        # A hundred bins over twenty units of log-SNR and a floor of 1 %.
        assert float(built.schedule.log_density(logsnr)) == pytest.approx(
            float(fixed.schedule.log_density(logsnr)), abs=0.2
        )


def test_adaptive_without_a_schedule_starts_from_the_closed_form():
    """p ~ w q, q = sigmoid(lambda + 2 ln sd), squared inside and rooted outside for the gradient: the same start."""
    for section in ({"preset": "vdm++/sigmoid"}, {"weighting": {"name": "sigmoid", "bias": 2.0}}):
        for importance in ("error", "gradient"):
            options = {"importance": importance, "floor": 1e-9, "bins": 50}
            p = objective(**section, logsnr=(-6, 6), adaptive=options).schedule
            x = torch.linspace(-5.88, 5.88, 50, dtype=torch.float64)
            expected = torch.sigmoid(2 - x) * torch.sigmoid(x + 2 * math.log(0.3))
            torch.testing.assert_close(p.probabilities(), expected / expected.sum(), rtol=1e-6, atol=0)


def test_the_gradient_decides_for_the_elbo_unless_told():
    def importance(**section):
        return objective(schedule="linear", logsnr=(-9, 9), **section).schedule.importance

    assert importance(weighting="elbo", adaptive=True) == "gradient"
    assert importance(weighting={"name": "sigmoid", "bias": 1.0}, adaptive=True) == "error"
    assert importance(weighting="elbo", adaptive={"importance": "error"}) == "error"
    assert ObjectiveConfig(preset="edm", adaptive=False) == ObjectiveConfig(preset="edm")


def test_the_central_range_is_the_schedules_quantiles():
    config = ObjectiveConfig(preset="edm", schedule="edm-training")
    lo, hi = central_logsnr(config, build_objective(config, dim=4, sigma_data=0.5))
    # N(2.4, 2.4^2): the .1 % quantile of a normal law is 3.0902 deviations out.
    assert (lo, hi) == pytest.approx((2.4 - 2.4 * 3.0902, 2.4 + 2.4 * 3.0902), abs=1e-3)


@pytest.mark.parametrize(
    ("section", "sigmas"),
    [
        ({"preset": "edm"}, (0.002, 80)),
        ({"preset": "edm2"}, (0.002, 80)),
        ({"preset": "edm", "logsnr": (-6, 20)}, (0.002, math.exp(3))),
        ({"preset": "edm", "logsnr": (-20, 10)}, (math.exp(-5), 80)),
    ],
)
def test_edm_is_sampled_between_its_papers_levels_not_between_its_draws(section, sigmas):
    config = ObjectiveConfig(**section)
    lo, hi = central_logsnr(config, build_objective(config, dim=4, sigma_data=0.5))
    assert (math.exp(-hi / 2), math.exp(-lo / 2)) == pytest.approx(sigmas, rel=1e-12)


def test_a_schedule_keeps_the_end_points_of_its_preset():
    assert objective(preset="edm", schedule="flow").schedule.range == (-20, 20)
    assert objective(preset="vdm", schedule="cosine").schedule.range == (-5, 13.3)
    assert objective(preset="vdm", schedule="cosine", logsnr=(-3, 3)).schedule.range == (-3, 3)
    narrow = {"name": "linear", "logsnr_min": -9, "logsnr_max": 9}
    with pytest.raises(LogsnrError, match=r"schedule on log-SNR \[-9, 9\] does not reach .*'edm', \[-20, 20\]: give"):
        objective(preset="edm", schedule=narrow)
    assert objective(preset="edm", schedule=narrow, logsnr=(-9, 9)).schedule.range == (-9, 9)


def test_weightings_are_moved_held_and_multiplied(tmp_path):
    """The weightings of 2303.00848 for larger images, as YAML says them."""
    file = tmp_path / "r.yaml"

    def said(weighting):
        file.write_text(f"steps: 1\nobjective: {{weighting: {weighting}, schedule: cosine, logsnr: [-10, 10]}}\n")
        return build_objective(load_recipe(file).objective, dim=4, sigma_data=0.3).weighting

    x = torch.linspace(-10, 10, 41, dtype=torch.float64)
    for text, expected in (
        ("{name: edm-monotonic, shift: -1.386}", EDM(sigma_data=0.3).envelope().shift(-1.386)),
        ("{name: edm, envelope: true, shift: -1.386}", EDM(sigma_data=0.3).envelope().shift(-1.386)),
        ("{name: edm, sigma_data: 0.5, envelope: false}", EDM()),
        ("{name: min-snr, gamma: 4, base: edm}", MinSNR(4, base=EDM(sigma_data=0.3))),
        ("{name: min-snr, base: {name: sigmoid, bias: 1, shift: 2}}", MinSNR(base=Sigmoid(1).shift(2))),
    ):
        torch.testing.assert_close(said(text).log(x), expected.log(x))


@pytest.mark.parametrize("by", ["texts", "mapping"])
def test_an_override_replaces_what_it_excludes(tmp_path, by):
    file = tmp_path / "r.yaml"
    file.write_text("steps: 1\nobjective: {weighting: sigmoid, schedule: cosine, logsnr: [-8, 8]}\n")

    def loaded(**overrides):
        given = {f"objective.{key}": value for key, value in overrides.items()}
        return load_recipe(file, given if by == "mapping" else [f"{k}={v}" for k, v in given.items()]).objective

    assert loaded(preset="edm") == ObjectiveConfig(preset="edm", logsnr=(-8, 8))
    assert loaded(preset="edm", schedule="flow") == ObjectiveConfig(preset="edm", schedule="flow", logsnr=(-8, 8))
    file.write_text("steps: 1\nobjective: {preset: edm, schedule: flow}\n")
    assert loaded(weighting="elbo", logsnr=[-5, 5]) == ObjectiveConfig(
        weighting="elbo", schedule="flow", logsnr=(-5, 5)
    )


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"weighting": {"name": "edm", "envelope": 1}}, "objective.weighting.envelope = 1: give true or false"),
        ({"weighting": {"name": "edm", "shift": "x"}}, "objective.weighting.shift = 'x': give a finite number"),
        ({"weighting": {"name": "edm", "base": "v"}}, "parameter of objective.weighting edm 'base' is not one of"),
        ({"weighting": {"name": "min-snr", "base": "vv"}}, "objective.weighting 'vv' is not one of"),
        ({"weighting": {"name": "min-snr", "base": 3}}, "base = 3 must be a weighting"),
    ],
)
def test_weightings_that_cannot_be_made(section, message):
    with pytest.raises(LogsnrError, match=re.escape(message)):
        objective(**section, schedule="cosine", logsnr=(-10, 10))


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"preset": "vdm"}, None),
        ({"preset": "vdm++"}, "objective.preset 'vdm++' is not one of ddpm, "),
        (
            {"weighting": "sigmoidal", "schedule": "cosine"},
            "debiased: did you mean 'sigmoid'?",
        ),
        ({"weighting": "elbo", "schedule": "cosin"}, ": did you mean 'cosine'?"),
        (
            {"weighting": {"name": "sigmoid", "bais": 1}, "schedule": "cosine"},
            "parameter of objective.weighting sigmoid 'bais' is not one of bias: did you mean 'bias'?",
        ),
        (
            {"weighting": {"name": "elbo", "bias": 1}, "schedule": "cosine"},
            "parameter of objective.weighting elbo 'bias' is not one of none",
        ),
        (
            {"weighting": {"name": "sigmoid", "bias": "x"}, "schedule": "cosine"},
            "objective.weighting.bias = 'x': give a number",
        ),
        ({"weighting": "elbo", "schedule": {"name": "flow", "shift": -1}}, "shift = -1"),
        ({"preset": "vdm", "logsnr": (-20, 5)}, "objective.logsnr = [-20.0, 5.0]:"),
        ({"weighting": "elbo", "schedule": "cosine"}, "set objective.logsnr: [lo, hi]"),
        ({"weighting": "elbo", "schedule": "cosine", "adaptive": True}, "set objective.logsnr: [lo, hi]"),
    ],
)
def test_objectives_that_do_not_exist(section, message):
    if message is None:
        assert objective(**section).name == section["preset"]
        return
    with pytest.raises(LogsnrError, match=re.escape(message)):
        objective(**section)


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"weighting": "elbo", "adaptive": True}, "needs its range: set logsnr: [lo, hi]"),
        ({"preset": "vdm", "adaptive": "yes"}, "'yes': give true, false or a mapping, e.g. {importance: gradient}"),
        (
            {"preset": "vdm", "adaptive": {"importanse": "error"}},
            "objective.adaptive: key 'importanse' is not one of bins, ",
        ),
        (
            {"preset": "vdm", "adaptive": {"importance": "loss"}},
            "objective.adaptive.importance 'loss' is not one of auto, error",
        ),
        ({"preset": "vdm", "adaptive": {"importance": "rms"}}, "is no more: give error or gradient"),
        ({"preset": "vdm", "adaptive": {"floor": 0}}, "objective.adaptive.floor = 0"),
    ],
)
def test_adaptive_sections_that_say_nothing_sensible(section, message):
    with pytest.raises(LogsnrError, match=re.escape(message)):
        recipe_from({"objective": section, "steps": 1})
