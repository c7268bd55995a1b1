"""Comparisons over seeds, in parts, to statistics in files, from a Gaussian start."""

import dataclasses
import json
import os
import statistics

import numpy as np
import pytest
import torch

import logsnr as ls
from logsnr import exact
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.evaluation import FeatureSpace, frechet_distance, kernel_distance
from logsnr.evaluation.compare import (
    Comparison,
    markdown,
    measure,
    merged,
    ours,
    own,
    plans,
    render,
    started,
    uncalibrated,
)
from logsnr.evaluation.compare.entries import OWN
from logsnr.evaluation.compare.render import read, write_rows
from logsnr.evaluation.features import feature_space
from logsnr.evaluation.metrics import Estimated, student
from logsnr.evaluation.metrics.measures import KEPT
from logsnr.models import UNetConfig, build_network, save_denoiser
from logsnr.pixels import Pixels
from logsnr.predictions import EDM
from logsnr.sampling import GaussianStart, sample, solvers
from logsnr.sampling.default import default_plan
from logsnr.training import load_data
from logsnr.training.config import DataConfig


def mixture(seed=0):
    g = torch.Generator().manual_seed(seed)
    factors = torch.randn(4, 3, 3, generator=g) * 0.3
    return exact.GaussianMixture(
        torch.full((4,), 0.25), torch.randn(4, 3, generator=g), factors @ factors.mT + 0.05 * torch.eye(3)
    )


MODEL = mixture()
DATA = MODEL.sample(200, generator=torch.Generator().manual_seed(2))
SPACE = FeatureSpace(name="x", of=lambda v: v, reference=DATA)
ENTRIES = ours(MODEL, [4], solvers=["ge", "ddpm"], grids=["karras", "flow"], noisy=True)
OPTIONS = {"n": 16, "teacher_steps": 16, "features": SPACE, "about": {"model": "mixture"}}


def timeless(comparison):
    """All of it but the clock, as JSON."""
    found = json.loads(json.dumps(comparison.to_dict()))
    for row in (*found["rows"], found["teacher"]):
        row["seconds_per_image"] = 0
        for cell in row["cells"]:
            cell["seconds_per_image"] = 0
    return found


@pytest.fixture(scope="module")
def whole():
    return measure(MODEL, ENTRIES, seed=(3, 4, 9), **OPTIONS)


def test_a_row_of_several_seeds_is_the_mean_of_its_comparisons(whole):
    alone = [measure(MODEL, ENTRIES, seed=seed, **OPTIONS) for seed in whole.seeds]
    for i, row in enumerate(whole.rows):
        rows = [one.rows[i] for one in alone]
        assert [cell.seed for cell in row.cells] == [3, 4, 9]
        for name in ("rmse", "frechet", "excess", "kernel"):
            if name == "rmse" and "DDPM" in row.name:
                assert row.rmse is None
                continue
            values = [getattr(one, name).value for one in rows]
            assert getattr(row, name).value == pytest.approx(statistics.mean(values), rel=1e-12)
            assert getattr(row, name).stderr == pytest.approx(statistics.stdev(values) / 3**0.5, rel=1e-9)
    assert whole.teacher.uncertainty == pytest.approx(statistics.mean(one.teacher.uncertainty for one in alone))
    row = whole.at(4)[0]
    page, half = markdown(whole), student(2) * row.rmse.stderr
    assert f"| {row.name} | 4 | {row.rmse.value:.4f} ± {half:.4f} |" in page
    assert "half of the 95 % interval of the mean over seeds (Student's t)" in page
    assert "- Seeds 3, 4, 9; times" in page


def test_fd_beyond_the_teachers_is_paired(whole):
    """Of one seed: the difference of the two, with less error than either."""
    one = measure(MODEL, ENTRIES, **OPTIONS)
    for row in one.rows:
        assert row.excess.value == pytest.approx(row.frechet.value - one.teacher.frechet.value, abs=1e-12)
    best = one.at(4)[0]
    assert best.excess.stderr < 0.7 * best.frechet.stderr
    assert one.teacher.excess is None


@pytest.mark.parametrize("k", [2, 5])
def test_parts_by_any_processes_are_the_whole(whole, tmp_path, k):
    """Every run is in one part; their files merge to the comparison of one process, bit for bit but for the clock."""
    spent = []
    for i in range(1, k + 1):
        part = measure(MODEL, ENTRIES, seed=(3, 4, 9), cells=(i, k), **OPTIONS)
        spent += part.known
        write_rows(part, tmp_path, (i, k))
    assert sorted(map(str, spent)) == sorted(map(str, whole.known))
    asked = []
    found = measure(MODEL, ENTRIES, seed=(3, 4, 9), before=read(tmp_path), keep=lambda *_: asked.append(1), **OPTIONS)
    assert asked == []
    assert timeless(found) == timeless(whole)


def test_more_seeds_go_on_where_fewer_ended(whole, tmp_path):
    write_rows(measure(MODEL, ENTRIES[:2], seed=3, **OPTIONS), tmp_path)
    asked = []
    found = measure(
        MODEL, ENTRIES, seed=(3, 4, 9), before=read(tmp_path),
        keep=lambda entry, x: asked.append(entry), **OPTIONS,
    )  # fmt: skip
    assert timeless(found) == timeless(whole)
    assert len(asked) == 3 * (len(ENTRIES) + 1) - 2
    for seed, said in (
        ((4, 3), "seeds 4, that to go on with 3"),
        ((3, 3), "one is there twice"),
        ((), "number of seeds"),
    ):
        with pytest.raises(LogsnrError, match=said):
            measure(MODEL, ENTRIES, seed=seed, before=read(tmp_path), **OPTIONS)
    with pytest.raises(LogsnrError, match="cells 4/3: the parts of 3 are 1 to 3"):
        measure(MODEL, ENTRIES, cells=(4, 3), **OPTIONS)
    with pytest.raises(LogsnrError, match="holds none of the 2 runs"):
        measure(MODEL, ENTRIES[:2], cells=(1, 3), **OPTIONS)


def test_what_was_measured_last_is_taken(whole, tmp_path):
    """Parts measured anew into a folder of an older comparison; no row is said to be of seeds that it lacks."""
    row = whole.rows[0]
    cell = dataclasses.replace(row.cells[0], rmse=Estimated(value=99.0, stderr=1.0))
    write_rows(dataclasses.replace(whole, rows=(dataclasses.replace(row, cells=(cell,)),)), tmp_path)
    os.utime(tmp_path / "comparison.json", (1, 1))
    write_rows(measure(MODEL, ENTRIES, seed=(3, 4, 9), cells=(1, 2), **OPTIONS), tmp_path, (1, 2))
    found = read(tmp_path)
    assert max(cell.rmse.value for row in found.rows for cell in row.cells if cell.rmse) < 10
    for row in found.rows:
        assert len(row.cells) < 3
        assert f"| {row.name} ({len(row.cells)} of 3 seeds) |" in markdown(found)
    assert "of 3 seeds)" not in markdown(whole)


def test_other_data_do_not_merge(whole):
    cells = tuple(
        dataclasses.replace(cell, frechet=Estimated(value=5 * cell.frechet.value, stderr=1.0))
        for cell in whole.teacher.cells
    )
    with pytest.raises(LogsnrError, match=r"the teacher has another FD .* the data are another"):
        merged([whole, dataclasses.replace(whole, teacher=dataclasses.replace(whole.teacher, cells=cells))])


def test_parts_of_another_model_do_not_merge(whole):
    another = mixture(1)
    another.sigma_data = MODEL.sigma_data  # hence the levels
    other = measure(another, ENTRIES, seed=(3, 4, 9), cells=(1, 3), **OPTIONS)
    with pytest.raises(LogsnrError, match="the model is another"):
        merged([whole, other])
    with pytest.raises(LogsnrError, match="features"):
        merged([whole, measure(MODEL, ENTRIES[:1], seed=3, **{**OPTIONS, "features": None})])


def test_comparisons_of_version_1_are_read():
    now = measure(MODEL, ENTRIES, **OPTIONS)
    old = json.loads(json.dumps(now.to_dict()))
    seeds = old.pop("seeds")
    for row in (*old["rows"], old["teacher"]):
        del row["cells"], row["excess"]
    old["teacher"]["uncertainty"] = old["teacher"].pop("rmse")["value"]
    found = Comparison.from_dict({**old, "version": 1, "seed": seeds[0]})
    assert found.seeds == now.seeds
    assert [(r.key, r.rmse, r.frechet, r.evaluations) for r in found.rows] == [
        (r.key, r.rmse, r.frechet, r.evaluations) for r in now.rows
    ]
    assert found.teacher.uncertainty == now.teacher.uncertainty


# A Gaussian start


GAUSSIAN = exact.Gaussian(torch.tensor([0.5, -1.0, 0.0]), torch.diag(torch.tensor([1.0, 0.25, 0.04])))


def gaussian_start():
    x = GAUSSIAN.sample(4000, generator=torch.Generator().manual_seed(0))
    return GaussianStart.fit(x, kind="full")


def test_the_default_from_a_start_is_the_default_of_what_the_start_says():
    """Levels within the range, named; of a Gaussian the start is exact, so that fewer steps remain to be wrong."""
    gaussian, low = gaussian_start(), GAUSSIAN.sampling_range[0]
    entries = started(GAUSSIAN, [4, 6], gaussian)
    levels = [times * GAUSSIAN.sigma_data for times in (40, 20, 10, 5)]
    assert [e.name for e in entries if e.budget == 4] == [
        f"default, Gaussian start, from sigma {level:.3g}" for level in levels
    ]
    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    plan = default_plan(6, low, levels[-1], sigma_data=GAUSSIAN.sigma_data)
    by_hand = sample(GAUSSIAN, plan, noise=noise, start=gaussian)
    assert torch.equal(entries[-1].run(GAUSSIAN, noise, {}, torch.Generator()), by_hand)
    found = measure(GAUSSIAN, [*entries, *uncalibrated(GAUSSIAN, [4])], n=32, teacher_steps=100)
    ends = {row.solver: row.error for row in found.at(4)[::-1]}  # of each solver its best level
    assert ends["default, Gaussian start"] < 0.7 * ends["default"]
    own_samples = GaussianStart.of_model(GAUSSIAN, 40, generator=torch.Generator().manual_seed(0))
    assert measure(GAUSSIAN, started(GAUSSIAN, [4], own_samples)[:1], n=4, teacher_steps=16).rows[0].rmse is not None
    narrow = GaussianStart.fit(torch.randn(30, 4, generator=torch.Generator().manual_seed(0)))
    with pytest.raises(LogsnrError, match="samples of shape"):
        started(GAUSSIAN, [4], narrow)


def test_plans_that_need_a_start_take_part_with_it():
    gaussian = gaussian_start()
    low, high = GAUSSIAN.sampling_range
    meta = {"start": {"fingerprint": gaussian.fingerprint, "sigma_from": high}}
    plan = dataclasses.replace(solvers.ge(ls.grids.flow_range(4, 5.0, low, "min"), 1.5), meta=meta)
    with pytest.raises(
        LogsnrError, match=r"plan mine begins where a Gaussian start leads, which is not there.*--start"
    ):
        plans(GAUSSIAN, {"mine": plan})
    (entry,) = plans(GAUSSIAN, {"mine": plan}, [gaussian])
    assert entry.name == "mine, Gaussian start"
    noise = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))
    expected = sample(GAUSSIAN, plan, noise=noise, start=gaussian)
    assert torch.equal(entry.run(GAUSSIAN, noise, {}, torch.Generator()), expected)
    model = exact.Gaussian(torch.zeros(3), torch.eye(3))
    model.plans = {4: plan}
    assert own(model, [4]) == []
    model.start = gaussian
    (mine,) = own(model, [4])
    assert mine.name == f"{OWN}, Gaussian start"


# The command


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """An untrained model of 4 x 4 images, and images."""
    folder = tmp_path_factory.mktemp("cells")
    config = UNetConfig(channels=(8,), layers_per_block=1, mid_attention=False, norm_groups=4)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(config, (1, 4, 4))
    save_denoiser(
        NetworkDenoiser(network, EDM(label="flow"), shape=(1, 4, 4), pixels=Pixels(256), trained_range=(0.01, 50.0)),
        folder / "run",
    )
    rng = np.random.default_rng(0)
    np.save(folder / "data.npy", rng.integers(0, 256, (12000, 1, 4, 4), dtype=np.uint8))
    np.save(folder / "other.npy", rng.integers(0, 256, (40, 1, 5, 5), dtype=np.uint8))
    return folder


LINE = ("--nfe", "3", "--solvers", "ge(2)", "--grids", "karras,flow", "--no-peers", "-n", "12", "--teacher-steps", "16")


def test_statistics_are_the_data_of_compare(run, tiny, tmp_path):
    """FD to all 12,000 images, which moments say; KID to the rows of a file; others are refused."""
    images = torch.from_numpy(np.load(tiny / "data.npy"))
    codes = Pixels(256).encode(images).flatten(1).double()
    config = DataConfig(source=str(tiny / "data.npy"))
    train = load_data(config).train_images
    np.savez(tmp_path / "edm.npz", mu=codes.mean(0).numpy(), sigma=torch.cov(codes.T).numpy())
    assert run("stats", tiny / "data.npy", "--features", "pixels", "--limit", 60, "--out", tmp_path / "s.npz")[0] == 0
    denoiser = ls.load(tiny / "run")
    low, high = denoiser.sampling_range
    noise = torch.randn(12, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    x = sample(denoiser, solvers.ge(ls.grids.karras(3, high, low), 2.0), noise=noise)
    mine = denoiser.encode(denoiser.decode(x)).flatten(1)
    for options, data, reference, kid in (
        (("--stats", tmp_path / "edm.npz", "--features", "pixels"), codes, 0, False),
        (("--stats", tmp_path / "s.npz"), codes[:60], 60, True),
    ):
        code, out, err = run("compare", tiny / "run", *LINE, *options, "--json")
        assert code == 0, err
        result = json.loads(out)
        row = next(row for row in result["rows"] if row["name"] == "GE(2), karras")
        assert row["frechet"]["value"] == pytest.approx(frechet_distance(mine, data), rel=1e-6)
        assert (result["features"], result["reference"]) == ("pixels", reference)
        assert (row["kernel"] is not None) == kid
        if reference == 60:
            assert row["kernel"]["value"] == pytest.approx(kernel_distance(mine, data), rel=1e-4)
            assert result["about"]["statistics"].startswith("s.npz (")
    assert len(train) > KEPT
    whole = feature_space("pixels", denoiser.decode, load_data(config), source="data", seed=0)
    assert whole.data.n == len(train)
    found = whole.measure(x).frechet.value
    assert found == pytest.approx(frechet_distance(mine, Pixels(256).encode(train).flatten(1)), rel=1e-6)
    assert run("stats", tiny / "other.npy", "--features", "pixels", "--out", tmp_path / "o.npz")[0] == 0
    np.savez(tmp_path / "wide.npz", mu=np.zeros(5), sigma=np.eye(5))
    for options, said in (
        (("--stats", tmp_path / "o.npz"), "o.npz is of images of [1, 5, 5], the samples are of images of [1, 4, 4]"),
        (("--stats", tmp_path / "edm.npz"), "edm.npz names no feature space: give the --features"),
        (("--stats", tmp_path / "wide.npz", "--features", "pixels"), "wide.npz is of 5 features, pixels has 16"),
        (("--stats", tmp_path / "s.npz", "--data", "digits"), "--data digits with --stats"),
        (("--stats", tmp_path / "s.npz", "--features", "none"), "which --features none leaves out"),
        (("--stats", tmp_path / "missing.npz"), "missing.npz"),
    ):
        code, out, err = run("compare", tiny / "run", *LINE, *options)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said in err


def test_seeds_in_parts_of_the_command_are_those_of_one(run, tiny, tmp_path, monkeypatch):
    """Two processes of torchrun, one part of them told by hand, and then the whole."""
    monkeypatch.setattr(render, "plot", lambda comparison, form: b"<svg></svg>")
    line = ("compare", tiny / "run", *LINE, "--features", "none", "--seeds", "2", "--seed", "5")
    code, _, err = run(*line, "--out", tmp_path / "one")
    assert code == 0, err
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    code, out, err = run(*line, "--out", tmp_path / "two")
    assert code == 0, err
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.delenv("RANK")
    assert out == f"{tmp_path / 'two'}: cells-2-of-2.json\n"
    code, out, err = run(*line, "--out", tmp_path / "two", "--cells", "1/2")
    assert "--resume and without --cells" in out
    code, out, err = run(*line, "--out", tmp_path / "two", "--resume")
    assert code == 0, err
    assert "seeds 5, 6, ± half the 95 % interval" in " ".join(out.split())
    one, two = (timeless(read(tmp_path / name)) for name in ("one", "two"))
    assert one == two
    assert one["seeds"] == [5, 6]
    for options, said in (
        (("--cells", "1/2"), "--cells without --out"),
        (("--cells", "3/2"), "--cells '3/2': give a part"),
        (("--seeds", "0"), "--seeds 0: give a number in 1 ... 1000"),
        (("--seeds", "a"), "--seeds 'a': give how many"),
        (("--seeds", "0,1"), "--seeds 0,1 with --seed 5"),
    ):
        code, out, err = run(*line, *options)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said in err


def test_a_start_of_the_command_takes_part(run, tiny, tmp_path):
    """Read from its file, or fitted to data or to samples of the model: the same rows, named."""
    line = ("compare", tiny / "run", *LINE, "--features", "none", "--json")
    denoiser = ls.load(tiny / "run")
    images = torch.from_numpy(np.load(tiny / "data.npy"))
    file = GaussianStart.fit(denoiser.encode(images[::2])).save(tmp_path / "start.safetensors")
    code, out, err = run(*line, "--start", file)
    assert code == 0, err
    result = json.loads(out)
    names = [row["name"] for row in result["rows"] if "start" in row["name"]]
    assert names == [f"default, Gaussian start, from sigma {s}" for s in ("20", "10", "5", "2.5")]
    assert result["about"]["start"] == f"start.safetensors ({GaussianStart.load(file).fingerprint[:12]})"
    for kind, more in (("data", ("--data", tiny / "data.npy")), ("model", ())):
        code, out, err = run(*line, "--start", kind, *more)
        assert code == 0, err
        result = json.loads(out)
        assert [row["name"] for row in result["rows"] if "start" in row["name"]] == names
        assert result["about"]["start"].startswith(f"{kind} (")
    code, out, err = run(*line, "--start", "dta")
    assert (code, out) == (2, "")
    assert "--start 'dta' is not one of data, model, none, or a file" in err
