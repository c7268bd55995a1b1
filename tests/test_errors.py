"""Errors: one rule (a LogsnrError for what a user typed), one sentence for a name that is none, everywhere."""

import pickle
from pathlib import Path
from typing import get_args

import pytest
import torch

import logsnr as ls
from logsnr import grids, objectives, predictions, zoo
from logsnr.adapters import kdiffusion
from logsnr.adapters.diffusers.config import BETA_SCHEDULES, noising
from logsnr.adapters.diffusers.config import PREDICTIONS as PREDICTION_TYPES
from logsnr.adapters.diffusers.loops.timesteps import DEFAULTS, _Config
from logsnr.calibration.run import METHODS
from logsnr.describe import resolve
from logsnr.describe.configs import from_config
from logsnr.describe.scripts import flags
from logsnr.errors import LogsnrError, nearest, unknown
from logsnr.evaluation.features import FEATURES, feature_space
from logsnr.models.card import prediction_from_json
from logsnr.sampling import interpolate, universal_plan
from logsnr.sampling.literature import AYSModel
from logsnr.sampling.universal import universal_sizes
from logsnr.schedules import SCHEDULES, Adaptive, Cosine
from logsnr.schedules.adaptive import IMPORTANCES
from logsnr.training.config import DataConfig, recipe_from
from logsnr.training.data import load_data
from logsnr.training.objectives import build_objective
from logsnr.weightings import WEIGHTINGS

BETAS = {"_class_name": "DDPMScheduler", "num_train_timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
GRID = grids.log_linear(4, 10.0, 0.1)
GAUSS = ls.exact.Gaussian(torch.zeros(2), torch.eye(2))


def part(**section: object) -> object:
    values = {"objective": {"weighting": "elbo", "schedule": "cosine", "logsnr": [-5, 5], **section}, "steps": 1}
    return build_objective(recipe_from(values).objective, dim=1, sigma_data=1.0)


def recipe(section: str, key: str):
    return lambda name: recipe_from({section: {key: name}, "steps": 1})


def features(name: str) -> object:
    return feature_space(name, lambda x: x, load_data(DataConfig()), source="digits", seed=0)


def loop(**options: object) -> object:
    return ls.LoopObjective("edm", {**BETAS, "beta_schedule": "linear", "prediction_type": "epsilon"}, **options)


def scheduler(**config: object) -> object:
    return noising(_Config({**DEFAULTS, **BETAS, "prediction_type": "epsilon", "beta_schedule": "linear", **config}))


def configuration(**model: object) -> object:
    return from_config({"model": {"sigma_sample_density": {"type": "lognormal"}, **model}}, "k.json")


REGISTRIES = {
    "predictions in recipes": (predictions.PREDICTIONS, recipe("prediction", "name")),
    "predictions of cards": (predictions.PREDICTIONS, lambda name: prediction_from_json({"name": name})),
    "predictions of diffusers": (PREDICTION_TYPES, lambda name: scheduler(prediction_type=name)),
    "targets": (PREDICTION_TYPES, lambda name: loop(target=name)),
    "labels": (predictions.LABELS, lambda name: predictions.V(label=name)),
    "labels in recipes": (predictions.LABELS, recipe("prediction", "label")),
    "paths": (predictions.PATHS, lambda name: predictions.V(path=name)),
    "paths in recipes": (predictions.PATHS, recipe("prediction", "path")),
    "paths of k-diffusion": (("ve", "flow"), lambda name: kdiffusion.as_kdiffusion(GAUSS, path=name)),
    "tables of betas": (BETA_SCHEDULES, lambda name: scheduler(beta_schedule=name)),
    "schedules": (SCHEDULES, lambda name: part(schedule=name)),
    "weightings": (WEIGHTINGS, lambda name: part(weighting=name)),
    "objectives": (objectives, lambda name: ls.objectives[name]),
    "objectives in recipes": (objectives, lambda name: part(preset=name, weighting=None, schedule=None)),
    "objectives described": ([*objectives, *WEIGHTINGS], lambda name: resolve([name])),
    "flags": ([f"--{flag}" for flag in flags()], lambda flag: resolve([flag, "1"])),
    "values of flags": (flags()["prediction_type"], lambda name: resolve(["--prediction_type", name])),
    "classes of EDM's": (
        ("EDMLoss", "EDM2Loss", "VPLoss", "VELoss"),
        lambda name: from_config({"loss_kwargs": {"class_name": name}}, "edm.json"),
    ),
    "densities of k-diffusion": (
        ("lognormal", "loglogistic", "cosine"),
        lambda name: configuration(sigma_sample_density={"type": name}),
    ),
    "weightings of k-diffusion": (("karras", "soft-min-snr"), lambda name: configuration(loss_weighting=name)),
    "importances": (IMPORTANCES, lambda name: Adaptive((-1, 1), ls.weightings.ELBO(), importance=name)),
    "importances of loops": (IMPORTANCES, lambda name: loop(adaptive=True, importance=name)),
    "importances in recipes": (IMPORTANCES, lambda name: part(adaptive={"importance": name})),
    "ways to draw": (
        ("stratified", "lattice", "iid"),
        lambda name: Cosine().sample(2, generator=torch.Generator(), method=name),
    ),
    "zoo": ([f"zoo:{name}" for name in zoo.names()], ls.load),
    "feature spaces": (FEATURES, features),
    "bases": (("auto", "eps", "velocity"), lambda name: ls.calibrate(GAUSS, 4, basis=name)),
    "methods": (METHODS, lambda name: ls.calibrate(GAUSS, 4, method=name)),
    "ends of a grid": (("zero", "min"), lambda name: grids.log_linear(3, 2.0, 1.0, last=name)),
    "spacings": (("trailing", "leading", "linspace"), lambda name: grids.timesteps(3, ls.TimestepTable.ddpm(), name)),
    "styles": (
        ("log-linear", "ddim", "edm"),
        lambda name: grids.ge_paper(3, ls.TimestepTable.ddpm(), style=name),
    ),
    "bases of solvers": (("eps", "x0", "velocity"), lambda name: ls.solvers.ipndm(GRID, 2, name)),
    "bases of plans": (("eps", "x0", "velocity"), lambda name: ls.Plan(sigmas=(1.0, 0.0), rows=((1.0,),), basis=name)),
    "last steps": (("denoise", "ramp", "full"), lambda name: ls.solvers.adams_bashforth(GRID, 2, final=name)),
    "last steps of ge": (("denoise", "ge"), lambda name: ls.solvers.ge(GRID, final=name)),
    "times of deis": (("vp", "log"), lambda name: ls.solvers.deis(GRID, 2, name)),
    "forms of dpmpp": (("published", "exact"), lambda name: ls.solvers.dpmpp(GRID, 2, name)),
    "variants of unipc": (("bh1", "bh2"), lambda name: ls.solvers.unipc(GRID, 2, name)),
    "models of ays": (get_args(AYSModel), lambda name: grids.ays(10, name)),
    "ways between noises": (
        ("slerp", "linear"),
        lambda name: interpolate(torch.zeros(1, 2), torch.zeros(1, 2), 0.5, name),
    ),
}


@pytest.mark.parametrize("registry", REGISTRIES)
def test_a_misspelt_name_gives_the_nearest_valid_one(registry: str) -> None:
    known, look_up = REGISTRIES[registry]
    for name in known:
        misspelt = f"{name}q" if len(name) > 1 else f"{name}{name}"
        with pytest.raises(LogsnrError) as caught:
            look_up(misspelt)
        message = str(caught.value)
        assert repr(misspelt) in message
        assert f"did you mean {name!r}?" in message, message
        assert "\n" not in message


def test_of_sizes_the_nearest_number() -> None:
    most = max(universal_sizes())
    with pytest.raises(LogsnrError, match=f"nfe {most + 7} is not one of 3, .*: did you mean '{most}'"):
        universal_plan(most + 7, 0.1, 10.0)


def test_an_unknown_name_is_a_failed_look_up_and_a_user_s_error() -> None:
    error = unknown("colour", "rde", ["red", "blue"], ", or a number")
    assert isinstance(error, (LogsnrError, KeyError, ValueError))
    assert str(error) == "colour 'rde' is not one of red, blue, or a number: did you mean 'red'?"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert ls.objectives.get("no such", None) is None
    assert "no such" not in ls.objectives


def test_nothing_is_meant_by_what_resembles_nothing() -> None:
    assert nearest("zzz", ["red", "blue"]) == ""
    assert str(unknown("colour", "zzz", ["red", "blue"])) == "colour 'zzz' is not one of red, blue"


def test_a_long_list_is_left_out_where_a_name_is_meant() -> None:
    names = [f"name-{i:03d}" for i in range(100)]
    assert len(str(unknown("name", "name-0077", names))) < 80
    assert all(name in str(unknown("name", "?", names)) for name in names)


def test_did_you_mean_is_said_in_one_place() -> None:
    """The sentence is `errors.unknown`'s; nobody compares strings on his own."""
    root = Path(ls.__file__).parent
    assert {path.name for path in root.rglob("*.py") if "difflib" in path.read_text(encoding="utf-8")} == {"errors.py"}
