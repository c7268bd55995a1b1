"""`logsnr compare`: what it prints, what it writes, and one clear line with exit code 2 for bad input."""

import json
import sys

import numpy as np
import pytest
import torch

from logsnr.cli.compare import _space
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.evaluation import frechet_distance
from logsnr.evaluation.features import feature_space
from logsnr.evaluation.passport import Passport, examine
from logsnr.files import fingerprint
from logsnr.loading import load
from logsnr.models import UNetConfig, build_network, save_denoiser
from logsnr.pixels import Pixels
from logsnr.predictions import EDM
from logsnr.sampling import grids, sample, solvers
from logsnr.training import Dataset, load_data
from logsnr.training.config import DataConfig

pytest.importorskip("diffusers")
QUICK = ["-n", "6", "--chunk", "4", "--teacher-steps", "16"]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An untrained class-conditional model of 4 x 4 images, and data with labels."""
    folder = tmp_path_factory.mktemp("compare")
    config = UNetConfig(channels=(8,), layers_per_block=1, mid_attention=False, norm_groups=4, classes=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(config, (1, 4, 4))
    denoiser = NetworkDenoiser(
        network, EDM(label="flow"), shape=(1, 4, 4), pixels=Pixels(256), trained_range=(0.01, 50.0)
    )
    save_denoiser(denoiser, folder / "run")
    rng = np.random.default_rng(0)
    np.savez(
        folder / "data.npz",
        images=rng.integers(0, 256, (60, 4, 4), dtype=np.uint8),
        labels=np.arange(60) % 3,
        test_images=rng.integers(0, 256, (12, 4, 4), dtype=np.uint8),
        test_labels=np.arange(12) % 3,
    )
    return folder


def test_json_holds_the_samplers_asked_for_with_what_they_spent(run, tiny, tmp_path):
    """Guidance doubles what a step costs: 5 evaluations hold two DDIM steps, a plan of 3 takes 6."""
    solvers.ddim(grids.log_linear(3, 40.0, 0.02)).save(tmp_path / "mine.json")
    code, out, err = run(
        "compare", tiny / "run", "--nfe", "5", "--guidance", "2", "--solvers", "ddim,heun",
        "--grids", "karras,trailing", "--plan", tmp_path / "mine.json",
        "--data", tiny / "data.npz", "--features", "pixels",
        "--out", tmp_path / "o",
        "--json", *QUICK,
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    found = {row["name"]: row["evaluations"] for row in result["rows"]}
    assert found == {
        "DDIM, karras": 4,
        "Heun, karras": 2,
        "DDIM, karras, min": 4,
        "Heun, karras, min": 4,
        "Heun, churned, karras": 2,
        "Heun, churned, karras, min": 4,
        "diffusers DDIM, trailing": 4,
        "diffusers Heun, karras": 2,
        "diffusers Heun, trailing": 2,
        "mine": 6,
    }
    noisy = [row for row in result["rows"] if "churned" in row["name"]]
    assert all(row["rmse"] is None and row["frechet"] for row in noisy)
    assert result["features"] == "pixels"
    assert result["reference"] == 60
    weights = fingerprint(load(tiny / "run").state_dict())[:12]
    assert result["about"] == {"model": "run", "weights": weights, "classes": "all in turn", "guidance": 2.0}
    assert json.loads((tmp_path / "o" / "comparison.json").read_text())["rows"] == result["rows"]
    code, out, err = run(
        "compare", tiny / "run", "--nfe", "5", "--guidance", "2", "--solvers", "ddim,heun",
        "--grids", "karras,trailing", "--plan", tmp_path / "mine.json",
        "--data", tiny / "data.npz", "--features", "pixels", "--out", tmp_path / "o",
        "--json", *QUICK, "--resume",
    )  # fmt: skip
    assert code == 0, err
    assert json.loads(out)["rows"] == result["rows"]  # times included: nothing was measured again
    assert run("compare", tiny / "run", "--resume")[2].count("--resume without --out") == 1


def test_the_terminal_says_the_features_and_the_teacher(run, tiny, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    code, out, err = run(
        "compare", tiny / "run", "--nfe", "2,3", "--solvers", "unipc-2", "--no-peers", "--data", tiny / "data.npz",
        *QUICK,
    )  # fmt: skip
    assert code == 0, err
    assert "\u2026" not in out  # a pipe is as wide as the table
    told = " ".join(out.split())
    assert "teacher: UniPC-3, log-linear, 16 steps; FD and KID (features: classifier of data)" in told
    assert (
        "UniPC-2, log-linear" in out
        or "UniPC-2, karras" in out
        or "UniPC-2, timesteps" in out
        or "UniPC-2, flow" in out
    )


@pytest.fixture(scope="module")
def passports(tiny):
    """Of the tiny model: one on data, one on its own samples."""
    denoiser = load(tiny / "run")
    x = torch.randn(64, 1, 4, 4, generator=torch.Generator().manual_seed(0)).clamp(-1, 1)
    cond = {"class_labels": torch.arange(64) % 3}
    size = {"images": 32, "trajectories": 2, "levels": 5}
    for name, data in (("data", x), ("own", None)):
        examine(denoiser, data, cond=cond, **size).save(tiny / f"{name}.json")
    return tiny


def test_a_passport_brings_the_admissible_grid_of_its_eta(run, passports):
    code, out, err = run(
        "compare", passports / "run", "--nfe", "4,5", "--solvers", "ge(2),heun", "--grids", "karras,adm", "--no-peers",
        "--passport", passports / "data.json", "--features", "none", "--json", *QUICK,
    )  # fmt: skip
    assert code == 0, err
    result = json.loads(out)
    found = {(row["name"], row["budget"]): row for row in result["rows"]}
    spent = {key: row["evaluations"] for key, row in found.items() if "admissible" in key[0]}
    assert spent == {
        ("GE(2), admissible", 4): 4, ("GE(2), admissible", 5): 5, ("Heun, admissible", 4): 3, ("Heun, admissible", 5): 5
    }  # fmt: skip
    curve = Passport.load(passports / "data.json").eta_curve
    low, high = result["sigma_range"]
    plan = solvers.ge(grids.admissible(5, curve, high, low), 2.0)
    assert found["GE(2), admissible", 5]["plan_hash"] == plan.hash
    assert result["about"]["passport"] == "data.json"


def test_a_passport_without_data_has_no_such_grid(run, passports):
    arguments = ("compare", passports / "run", "--nfe", "4", "--solvers", "ge(2)", "--no-peers", "--features", "none")
    code, out, err = run(*arguments, "--passport", passports / "own.json", *QUICK)
    assert code == 0
    assert "GE(2), karras" in out or "GE(2), log-linear" in out or "GE(2), flow" in out or "GE(2), timesteps" in out
    assert err == "own.json, made without data: no admissible grid\n"
    for given in (("--passport", passports / "own.json"), ()):
        code, out, err = run(*arguments, "--grids", "admissible", *given, "--json", *QUICK)
        assert (code, out, err.count("\n")) == (2, "", 1)
        assert "grid 'admissible' needs the model's relative error" in err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--nfe", "0,5"], "--nfe '0,5': give whole numbers in 1 ... 1000"),
        (["--nfe", "five"], "--nfe 'five'"),
        (["--solvers", "unipx"], "did you mean 'UniPC-"),
        (["--grids", "kaaras"], "grid 'kaaras' is not one of "),
        (["--class", "7"], "--class 7: give 0 ... 2"),
        (["--plan", "missing.json"], "plan missing.json cannot be read"),
        (["--nfe", "1", "--guidance", "2"], "--nfe 1 holds no sampler"),
        (["--features", "pixels"], "give --data"),
        (["--data", "digits", "--features", "pixels"], "holds images of (1, 8, 8), the model makes (1, 4, 4)"),
        (["--nfe", "20", "--solvers", "ddim", "--features", "none"], "teacher_steps = 16: must be at least 40"),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tiny, arguments, message):
    code, out, err = run("compare", tiny / "run", *QUICK, *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert len(err.strip().splitlines()) == 1


# Feature spaces


def stripes():
    """Sixty labelled images, twelve held out."""
    g = torch.Generator().manual_seed(0)
    labels = torch.arange(60) % 2
    images = torch.randint(0, 60, (60, 1, 4, 4), generator=g, dtype=torch.uint8)
    images[labels == 1, :, :2] += 150
    return Dataset(
        train_images=images,
        train_labels=labels,
        test_images=images[:12],
        test_labels=labels[:12],
        grey_levels=256,
        classes=2,
    )


def counted_features(images):
    """A feature function of one's own: mean and largest of each image."""
    flat = images.flatten(1).float()
    return torch.stack([flat.mean(1), flat.amax(1)], 1)


def test_spaces_compare_decoded_samples_with_the_data():
    data, codec = stripes(), Pixels(256)
    x = codec.encode(data.train_images[:20])
    space = feature_space("pixels", codec.decode, data, source="stripes", seed=0)
    expected = frechet_distance(x.flatten(1), codec.encode(data.train_images).flatten(1))
    assert space.distances(x)[0].value == pytest.approx(expected, rel=1e-6)


def test_a_pipeline_takes_the_grey_levels_of_the_data():
    """Its images are floats in [-1, 1]: compared with 17 grey levels, they are rounded to 17."""

    class Pipeline:
        card, shape = {}, (1, 8, 8)
        decode, decode_float = Pixels(256).decode, lambda self, x: x

    images, codec = load_data(DataConfig()).train_images, Pixels(17)
    x = codec.encode(images[:200])
    space = _space(Pipeline(), load_data(DataConfig()), "pixels", None, 0)
    expected = frechet_distance(x.flatten(1), codec.encode(images).flatten(1))
    assert space.distances(x + 0.4 * codec.spacing)[0].value == pytest.approx(expected, rel=1e-6)


def test_a_class_is_compared_with_its_own_images():
    data, codec = stripes(), Pixels(256)
    space = feature_space("pixels", codec.decode, data, source="stripes", seed=0, label=1)
    own = codec.encode(data.train_images[data.train_labels == 1]).flatten(1).double()
    assert torch.equal(space.data.rows.double().sort(0).values, own.sort(0).values)
    with pytest.raises(LogsnrError, match="no images of class 5"):
        feature_space("pixels", codec.decode, data, source="stripes", seed=0, label=5)


def test_the_classifiers_features_tell_classes_apart_and_repeat():
    data, codec = stripes(), Pixels(256)
    one, two = (feature_space("classifier", codec.decode, data, source="stripes", seed=3) for _ in range(2))
    assert one.name == "classifier of stripes"
    assert torch.equal(one.data.rows, two.data.rows)
    first, second = (codec.encode(data.train_images[data.train_labels == k]) for k in (0, 1))
    half = one.distances(torch.cat([first[:15], second[:15]]))[0].value
    assert half < 0.2 * one.distances(first)[0].value


def test_anybodys_function(monkeypatch):
    data, codec = stripes(), Pixels(256)
    monkeypatch.setattr(sys.modules["json"], "counted_features", counted_features, raising=False)
    space = feature_space("json:counted_features", codec.decode, data, source="stripes", seed=0)
    x = codec.encode(data.train_images[:20])
    expected = frechet_distance(counted_features(data.train_images[:20]), counted_features(data.train_images))
    assert space.distances(x)[0].value == pytest.approx(expected, rel=1e-9)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("inception", "'inception' is not one of classifier, efficientnet, .*hf:NAME.*, or module:function"),
        ("nowhere:f", "cannot be imported"),
        ("torchscrip:x.pt", "did you mean 'torchscript:x.pt'"),
        ("torchscript", "'torchscript': give torchscript:FILE"),
        ("torchscript:", "'torchscript:': give torchscript:FILE"),
        ("pixels:3", "'pixels:3': give pixels"),
        ("json:dumps", "N, F|JSON"),
    ],
)
def test_features_refused(name, message):
    with pytest.raises((LogsnrError, TypeError), match=message):
        feature_space(name, Pixels(256).decode, stripes(), source="stripes", seed=0)


def test_the_command_samples_what_the_library_does(run, tiny):
    """RMSE of a row, from the folder's model by hand."""
    code, out, _ = run(
        "compare", tiny / "run", "--nfe", "3", "--solvers", "ge(2)", "--grids", "log", "--no-peers", "--class", "1",
        "--features", "none", "--seed", "5", "--json", *QUICK,
    )  # fmt: skip
    assert code == 0
    row = next(row for row in json.loads(out)["rows"] if row["name"] == "GE(2), log-linear")
    import logsnr as ls

    denoiser = ls.load(tiny / "run")
    low, high = denoiser.sampling_range
    noise = torch.randn(6, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    cond = {"class_labels": torch.full((6,), 1)}
    plans = solvers.ge(grids.log_linear(3, high, low), 2.0), solvers.unipc(grids.log_linear(16, high, low), 3)
    x, end = (sample(denoiser, plan, noise=noise, cond=cond) for plan in plans)
    assert row["rmse"]["value"] == pytest.approx(float((x - end).square().mean().sqrt()), rel=1e-4)
