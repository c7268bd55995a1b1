"""Statistics of data and samples measured against them, in files and by command."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

import logsnr as ls
from logsnr.errors import LogsnrError
from logsnr.evaluation import frechet_distance, kernel_distance
from logsnr.evaluation.features import Material, find_space, registry
from logsnr.evaluation.metrics import Moments
from logsnr.evaluation.statistics import Statistics, gather
from logsnr.evaluation.stored import stored
from logsnr.pixels import Pixels


def images(n, size=4, channels=1, levels=256, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (n, channels, size, size), generator=g, dtype=torch.uint8)


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGSNR_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def saved(name, array):
    np.save(name, array.numpy())
    return name


def pixels(x):
    return Pixels().encode(x).flatten(1)


def pictures(folder, x):
    folder.mkdir()
    for i, image in enumerate(x):
        Image.fromarray(image.permute(1, 2, 0).squeeze(2).numpy()).save(folder / f"{i:03d}.png")
    return folder


def test_a_source_is_the_same_images_however_they_are_stored(place):
    """An array, shards and pictures: one digest, one walk, whatever the chunk."""
    x = images(270, 4, 3)
    saved("whole.npy", x)
    (place / "shards").mkdir()
    for i, part in enumerate(torch.split(x, 110)):
        np.savez(place / "shards" / f"shard-{i:05d}.npz", images=part.numpy())
    sources = ["whole.npy", "shards", str(pictures(place / "pictures", x))]
    found = [stored(source) for source in sources]
    for one in found:
        assert (one.n, one.shape, one.pixels) == (270, (3, 4, 4), Pixels(256))
        assert one.digest == found[0].digest
        assert torch.equal(torch.cat(list(one.chunks(37))), x)
    few = [stored(source, limit=120) for source in sources]
    assert len({one.digest for one in few} | {found[0].digest}) == 2
    assert torch.equal(torch.cat(list(few[1].chunks(50))), x[:120])


def test_a_generated_set_is_read_with_its_grey_levels_and_its_classes(place):
    denoiser = ls.load("zoo:digits")
    for kind in ("npz", "png"):
        ls.generate(denoiser, 2, place / kind, n=24, chunk=6, shard=12, format=kind)
    one, other = (stored(str(place / kind)) for kind in ("npz", "png"))
    assert one.pixels == other.pixels == Pixels(17)
    assert one.digest == other.digest
    assert one.strata.tolist() == [i % 10 for i in range(24)]


def test_pictures_of_several_sizes_need_one(place):
    folder = pictures(place / "pictures", images(3))
    Image.new("L", (6, 5)).save(folder / "zzz.png")
    with pytest.raises(LogsnrError, match=r"zzz.png is 6 x 5, others are 4 x 4: give --size"):
        stored(str(folder))
    found = stored(str(folder), size=4, channels=1)
    assert (found.n, found.shape) == (4, (1, 4, 4))
    assert found.prepared == "central square at 4 x 4 (Lanczos)"


def made(source, name="pixels", **options):
    found = stored(source, **options)
    space = find_space(name, Material(pixels=found.pixels))
    return Statistics.of(gather(found, space), space, found, name), space, found


def test_statistics_are_kept_exactly_and_are_edms_too(place):
    x = images(40)
    statistics, space, _ = made(saved("x.npy", x))
    statistics.save("s.npz")
    found = Statistics.load("s.npz")
    for name in ("mean", "covariance", "rows"):
        assert torch.equal(getattr(found, name), getattr(statistics, name))
    assert (found.n, found.features, found.key) == (40, "pixels", (statistics.images["digest"], space.hash))
    assert torch.allclose(found.covariance, torch.cov(pixels(x).double().T))
    with np.load("s.npz", allow_pickle=False) as arrays:  # as fid.py of EDM reads its --ref
        assert np.array_equal(arrays["mu"], statistics.mean.numpy())
        assert arrays["sigma"].shape == (16, 16)
    first = (place / "s.npz").read_bytes()
    made("x.npy")[0].save("s.npz")
    assert (place / "s.npz").read_bytes() == first


@pytest.mark.parametrize(
    "more", [{}, {"mu_s": np.zeros(9), "sigma_s": np.eye(9), "arr_0": np.zeros((9, 4, 4, 3), np.uint8)}]
)
def test_reference_files_of_edm_and_adm(run, more):
    """mu and sigma in single or double precision, no name of a space: it must be said, and have their width."""
    x, y = images(60), images(50, seed=1)
    m = Moments.of(pixels(y))
    np.savez("ref.npz", mu=m.mean.numpy(), sigma=m.covariance.numpy(), **more)
    saved("x.npy", x)
    code, _, err = run("evaluate", "x.npy", "--stats", "ref.npz")
    assert code == 2
    assert "ref.npz names no feature space: give the --features that it was made in" in err
    code, out, err = run("evaluate", "x.npy", "--stats", "ref.npz", "--features", "pixels", "--json")
    assert code == 0, err
    told = json.loads(out)
    assert list(told["metrics"]) == ["fd"]  # 60 samples of 16 features: too few for the limit, and no rows
    assert told["metrics"]["fd"]["value"] == pytest.approx(frechet_distance(pixels(x), pixels(y)), rel=1e-9)
    np.savez("other.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    code, _, err = run("evaluate", "x.npy", "--stats", "other.npz", "--features", "pixels")
    assert (code, err.count("\n")) == (2, 1)
    assert "other.npz is of 2048 features, pixels has 16" in err
    code, _, err = run("evaluate", "x.npy", "--stats", "ref.npz", "--features", "pixels", "--metrics", "kid")
    assert code == 2
    assert "hold moments and no features" in err


def test_what_cannot_be_compared_is_refused_with_both_names(run):
    saved("x.npy", images(20))
    saved("large.npy", images(20, 8))
    run("stats", "x.npy", "--features", "pixels", "-o", "s.npz")
    for words, said in (
        (("large.npy",), "s.npz is of images of [1, 4, 4], the samples are of images of [1, 8, 8]"),
        (("x.npy", "--features", "builtins:abs"), "s.npz is in the space pixels (x in [-1, 1] of 256 grey levels"),
        (("x.npy", "--metrics", "fid"), "metric 'fid' is not one of fd, fd-inf"),
        (("x.npy", "--metrics", "is"), "is: these features come from no classifier"),
        (("x.npy", "--nfe", 5), "--nfe 5 of x.npy, which is no model, does nothing"),
        (("x.npy", "--evaluations", 8), "--evaluations 8 with --stats does nothing"),
        (("nowhere",), "'nowhere' does not exist"),
    ):
        code, out, err = run("evaluate", *words, "--stats", "s.npz")
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said in err
    code, _, err = run("evaluate", "zoo:digits", "--metrics", "fd")
    assert "--metrics fd without --stats does nothing" in err


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"mu": np.zeros((4, 4))}, "no [F] and [F, F]"),
        ({"sigma": np.zeros((16, 15))}, "no [F] and [F, F]"),
        ({"sigma": np.full((16, 16), np.nan)}, "NaN or infinite"),
        ({"features": np.zeros((5, 3), np.float32)}, "do not fit mu"),
        ({"mu": np.array(["a"] * 16)}, "cannot be read as statistics"),
        ({"about": "[]"}, "no mapping"),
        ({"about": '{"format": 9}'}, "has format 9, of a newer logsnr"),
        ({"about": '{"format": 1}'}, "cannot be read as statistics"),
        ({"about": "{"}, "cannot be read as statistics"),
        ({"n": np.zeros(3)}, "cannot be read as statistics"),
        ({"mu": np.array([{}], object)}, "never unpickled"),
        (None, "no mu and sigma"),
    ],
)
def test_damaged_files_are_one_line(change, said):
    made(saved("x.npy", images(20)))[0].save("s.npz")
    with np.load("s.npz") as arrays:
        values = {"images": np.zeros(3)} if change is None else {**arrays, **change}
    np.savez("s.npz", **values)
    with pytest.raises(LogsnrError) as caught:
        Statistics.load("s.npz")
    assert said in str(caught.value)
    assert "s.npz" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_statistics_are_made_once(run, place, monkeypatch):
    """In the cache, and where a file was asked for; other images and other spaces are others."""
    saved("x.npy", images(20))
    first = json.loads(run("stats", "x.npy", "--features", "pixels", "--json")[1])
    assert first["made"]
    assert first["out"].startswith(str(place / "cache"))
    assert not json.loads(run("stats", "x.npy", "--features", "pixels", "--json")[1])["made"]
    own = ("stats", "x.npy", "--features", "pixels", "--out", "s.npz", "--json")
    assert [json.loads(run(*own)[1])["made"] for _ in range(2)] == [True, False]
    assert json.loads(run(*own, "--limit", 10)[1])["images"] == 10
    saved("x.npy", images(20, seed=1))
    assert json.loads(run("stats", "x.npy", "--features", "pixels", "--json")[1])["out"] != first["out"]
    (place / "s.npz").write_bytes(b"damaged")
    assert json.loads(run(*own)[1])["made"]


def test_samples_of_a_model_are_those_that_generate_makes(run, place, monkeypatch):
    """By the classifier that the statistics carry: its class probabilities give the Inception score."""
    monkeypatch.setattr(registry, "_PASSES", 4500)  # three epochs
    code, _, err = run("stats", "digits", "--features", "classifier", "--limit", 400, "-o", "digits.npz")
    assert code == 0, err
    command = ("evaluate", "zoo:digits", "--stats", "digits.npz", "--nfe", 2, "-n", 40, "--chunk", 16, "--json")
    told = json.loads(run(*command, "--class", 3)[1])
    ls.generate(ls.load("zoo:digits"), 2, place / "shards", n=40, classes=3, chunk=20, shard=40)
    other = json.loads(run("evaluate", "shards", "--stats", "digits.npz", "--json")[1])
    assert list(told["metrics"]) == ["fd", "kid", "is", "precision", "recall", "density", "coverage"]
    for name, value in told["metrics"].items():
        assert value["value"] == pytest.approx(other["metrics"][name]["value"], rel=1e-2), name
    assert told["metrics"]["is"]["value"] < 0.7 * json.loads(run(*command)[1])["metrics"]["is"]["value"]
    statistics = Statistics.load("digits.npz")
    space = find_space("classifier", Material(pixels=Pixels(17), carried=statistics.tensors))
    x = torch.cat(list(stored("shards").chunks()))
    assert other["metrics"]["kid"]["value"] == pytest.approx(kernel_distance(space(x), statistics.rows), rel=1e-4)


def test_a_model_that_is_told_a_text_is_generated_first(run, monkeypatch):
    saved("x.npy", images(20))
    run("stats", "x.npy", "--features", "pixels", "-o", "s.npz")
    told = SimpleNamespace(told="a text", card={}, shape=(1, 4, 4))
    monkeypatch.setattr("logsnr.cli.support.sampled_model", lambda *_: (told, told))
    monkeypatch.setattr("logsnr.cli.support.class_of", lambda *_: None)
    monkeypatch.setattr("logsnr.sampling.plan_for", lambda *_: None)
    code, _, err = run("evaluate", "hub:owner/name", "--stats", "s.npz")
    assert code == 2
    assert "hub:owner/name is told a text: make samples with logsnr generate --prompt" in err


def test_the_table_names_the_features(run):
    saved("x.npy", images(200))
    run("stats", "x.npy", "--features", "pixels", "-o", "s.npz")
    code, out, err = run("evaluate", "x.npy", "--stats", "s.npz", "--metrics", "fd,fd-inf")
    assert code == 0, err
    assert "FD (features: pixels) of infinitely many samples" in out
    assert "FID" not in out


def test_several_processes_are_told_that_one_is_enough(run, place, monkeypatch):
    saved("x.npy", images(20))
    monkeypatch.setenv("WORLD_SIZE", "2")
    for line in (("stats", "x.npy", "--features", "pixels"), ("evaluate", "x.npy", "--stats", "s.npz")):
        code, out, err = run(*line)
        assert (code, out) == (2, "")
        assert "2 processes (WORLD_SIZE) would all do the same" in err
