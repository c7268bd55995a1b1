"""Data that stay on disk: the same images, order and training as in memory, and any number of processes sees them."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from logsnr.errors import LogsnrError
from logsnr.files import read_pair
from logsnr.interrupts import Interrupted
from logsnr.schedules import Cosine
from logsnr.training import Dataset, load_data, recipe_from, train
from logsnr.training.config import DataConfig
from logsnr.training.data import Rows
from logsnr.training.data.feed import Feed
from logsnr.training.draws import Draws

NETWORK = {"channels": [8], "layers_per_block": 1, "mid_attention": False, "norm_groups": 4}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGSNR_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def pictures(n=60, shape=(8, 8), high=256, seed=0):
    return np.random.default_rng(seed).integers(0, high, (n, *shape), dtype=np.uint8)


def load(source, **options):
    return load_data(DataConfig(source=str(source), **options))


def both(source, **options):
    """The data in memory, and out of it."""
    here, there = (load(source, in_memory=where, **options) for where in (True, False))
    assert isinstance(here.train_images, torch.Tensor)
    assert isinstance(there.train_images, Rows)
    return here, there


def assert_same(here, there):
    assert torch.equal(here.train_images, there.train_images[:])
    assert torch.equal(here.test_images, there.test_images[:])
    for name in ("train_labels", "test_labels"):
        one, other = getattr(here, name), getattr(there, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    for labels in (False, True):
        assert here.fingerprint(labels=labels) == there.fingerprint(labels=labels)
    assert here.sigma_data == there.sigma_data
    assert (here.grey_levels, here.classes, here.class_names) == (there.grey_levels, there.classes, there.class_names)


def save(path, how, images, labels):
    if how == "npy":
        np.save(path.with_suffix(".npy"), images)
        return path.with_suffix(".npy")
    own = {} if how == "npz" else {"x_test": images[:7], "y_test": labels[:7]}
    np.savez(path.with_suffix(".npz"), x_train=images, y_train=labels, class_names=np.array(list("abc")), **own)
    return path.with_suffix(".npz")


@pytest.mark.parametrize("how", ["npy", "npz", "with a held-out part"])
@pytest.mark.parametrize("shape", [(8, 8), (6, 5, 3), (3, 6, 5)])
def test_mapped_arrays_are_those_in_memory(tmp_path, how, shape):
    images = pictures(shape=shape)
    source = save(tmp_path / "x", how, images, np.arange(60) % 3)
    here, there = both(source, holdout=0.25)
    assert_same(here, there)
    index = torch.tensor([3, 3, 0, 41])
    assert torch.equal(there.train_images[index], here.train_images[index])
    assert torch.equal(there.train_images[5], here.train_images[5])
    assert torch.equal(there.train_images[::7], here.train_images[::7])


def test_a_survey_is_made_once_and_anew_when_the_file_changes(tmp_path, cache):
    np.save(tmp_path / "x.npy", pictures())
    first = load(tmp_path / "x.npy", in_memory=False)
    (kept,) = cache.glob("data/*.json")
    facts = json.loads(kept.read_text())
    facts["survey"]["counts"] = [1] * 256
    kept.write_text(json.dumps(facts))
    assert load(tmp_path / "x.npy", in_memory=False).survey.counts == (1,) * 256
    kept.write_text("{")  # damage is no error: what can be made again is
    assert load(tmp_path / "x.npy", in_memory=False).survey == first.survey
    np.save(tmp_path / "x.npy", pictures(61, seed=1))
    assert_same(*both(tmp_path / "x.npy"))


def test_what_cannot_be_mapped_is_refused_or_loaded(tmp_path):
    images = pictures()
    np.savez_compressed(tmp_path / "x.npz", images=images)
    with pytest.raises(LogsnrError, match=r"holds images compressed, which cannot be mapped: save it with numpy.savez"):
        load(tmp_path / "x.npz", in_memory=False)
    assert isinstance(load(tmp_path / "x.npz").train_images, torch.Tensor)
    np.savez(tmp_path / "y.npz", images=images)
    whole = (tmp_path / "y.npz").read_bytes()
    (tmp_path / "y.npz").write_bytes(whole[:2000])
    with pytest.raises(LogsnrError, match=r"y.npz cannot be read as a NumPy file .*truncated"):
        load(tmp_path / "y.npz", in_memory=False)


# The order of images


def recipe(source, **changes):
    data = {"source": str(source), "holdout": 0.2, **changes.pop("data", {})}
    base = {"data": data, "network": NETWORK, "optimizer": {"warmup": 4}, "samples": {"every": 0}, "batch": 12}
    return recipe_from({**base, "steps": 6, "checkpoint_every": 2, "log_every": 2, "device": "cpu", **changes})


def draws(data, options, rank=0, world=1):
    cpu = torch.device("cpu")
    return Draws(options, data, generator=torch.Generator(), device=cpu, rank=rank, world=world)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_any_number_of_processes_sees_one_stream_from_any_step(tmp_path, world, workers):
    """Shares, in the order of their processes, are the batch of one: images, flips, labels, dropped ones, noise."""
    if workers and world == 3:
        pytest.skip("two processes that read ahead are enough")
    source = save(tmp_path / "x", "npz", pictures(), np.arange(60) % 3)
    options = recipe(source, conditional=True, label_dropout=0.3, data={"flip": True, "workers": workers})
    here, there = both(source, holdout=0.2)
    whole = draws(here, options)
    shares = [draws(there, options, rank, world) for rank in range(world)]
    for step in (4, 5, 6, 2):
        x, cond = whole(step)
        parts = [share(step) for share in shares]
        assert torch.equal(torch.cat([part for part, _ in parts]), x)
        assert torch.equal(torch.cat([c["class_labels"] for _, c in parts]), cond["class_labels"])
        drawn = whole.noise(Cosine(), x)
        parts = [share.noise(Cosine(), part) for share, (part, _) in zip(shares, parts, strict=True)]
        for of_all, of_each in zip(drawn, zip(*parts, strict=True), strict=True):
            assert torch.equal(torch.cat(of_each), of_all)
    for share in shares:
        share.close()


def test_a_mistake_in_the_data_is_one_line_also_from_another_process():
    class Bad:
        shape, identity = (1, 2, 2), ""

        def read(self, rows):
            raise LogsnrError(f"row {int(rows[0])} is damaged")

    rows = Rows(store=Bad(), order=np.arange(4))
    feed = Feed(rows, lambda step: torch.tensor([3]), workers=1, pin=False)
    with pytest.raises(LogsnrError, match=r"^row 3 is damaged$"):
        feed(0)
    feed.close()


def weights(out):
    return read_pair(out, "card")[1], read_pair(out / "state", "state")[1]


def test_a_run_from_disk_is_the_run_from_memory_through_a_kill(tmp_path):
    source = save(tmp_path / "x", "npz", pictures(), np.arange(60) % 3)

    class Killed(Exception):  # noqa: N818
        pass

    def kill(info):
        if info.step == 5:
            raise Killed

    for name, where, callback in (("memory", True, None), ("disk", False, kill)):
        options = recipe(source, data={"in_memory": where, "flip": True, "workers": int(not where)})
        try:
            train(options, tmp_path / name, progress=False, callback=callback)
        except Killed:
            # What reads, and from where, may change: neither touches what is computed.
            train(recipe(source, data={"in_memory": False, "flip": True, "workers": 0}), tmp_path / name, resume=True)
    for one, other in zip(weights(tmp_path / "memory"), weights(tmp_path / "disk"), strict=True):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one if key != "window")


def test_a_signal_to_all_ends_no_reader_while_the_run_is_saved(tmp_path, monkeypatch):
    """Readers that got a SIGTERM die some time later: none is left when the state is written."""
    source = save(tmp_path / "x", "npz", pictures(), np.arange(60) % 3)
    loop, readers, left = sys.modules["logsnr.training.loop"], [], []

    def stop(info):
        if info.step == 2:
            readers.extend(multiprocessing.active_children())
            for process in readers:
                os.kill(process.pid, signal.SIGTERM)
            os.kill(os.getpid(), signal.SIGTERM)

    def saved(*args, real=loop.save_state):
        left.append([process for process in multiprocessing.active_children() if process in readers])
        real(*args)

    monkeypatch.setattr(loop, "save_state", saved)
    options = recipe(source, data={"in_memory": False, "workers": 1}, checkpoint_every=0)
    with pytest.raises(Interrupted, match="interrupted after step 2, which is saved"):
        train(options, tmp_path / "cut", progress=False, callback=stop)
    assert (len(readers), left) == (1, [[]])
    options = recipe(source, data={"in_memory": False, "workers": 0}, steps=3)
    again = train(options, tmp_path / "cut", resume=True, progress=False)
    assert (again.resumed_from, again.steps) == (2, 3)


# Low-bit data


def test_a_larger_value_than_those_that_were_looked_at_is_said(tmp_path, monkeypatch):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for i in range(4):
        Image.fromarray(np.full((8, 8, 3), 200 if i == 2 else 20, np.uint8)).save(folder / f"{i}.png")
    monkeypatch.setattr(sys.modules["logsnr.training.data.index"], "LOOK", 2)  # the first and the last
    options = recipe(folder, data={"size": 8, "in_memory": False, "workers": 0, "grey_levels": 32, "holdout": 0})
    monkeypatch.setattr(
        sys.modules["logsnr.training.data.split"].torch, "randperm", lambda n, generator: torch.arange(n)
    )
    data = load_data(options.data)
    assert data.survey.largest == 20
    with pytest.raises(LogsnrError, match=r"step 0 reads pixel value 200, and the 32 grey levels .*prepare them"):
        draws(data, options)(0)


@pytest.mark.parametrize("in_memory", [True, False])
def test_fewer_grey_levels_are_unions_of_the_cells(tmp_path, in_memory):
    images = pictures(64, (8, 8))
    np.save(tmp_path / "x.npy", images)
    data = load(tmp_path / "x.npy", grey_levels=32, in_memory=in_memory, holdout=0.1)
    full = load(tmp_path / "x.npy")
    for part, of in ((data.train_images, full.train_images), (data.test_images, full.test_images)):
        assert torch.equal(part[:], torch.div(of, 8, rounding_mode="floor"))
    assert data.grey_levels == 32
    assert "256 grey levels made 32" in data.describe()
    assert data.fingerprint(labels=False) == Dataset(
        train_images=full.train_images // 8, train_labels=None, test_images=full.test_images, test_labels=None,
        grey_levels=32, classes=0,
    ).fingerprint(labels=False)  # fmt: skip


def test_values_that_are_low_already_are_left_alone_and_stray_ones_refused(tmp_path):
    images = pictures(40, high=32)
    np.save(tmp_path / "x.npy", images)
    assert torch.equal(load(tmp_path / "x.npy", grey_levels=32).train_images, load(tmp_path / "x.npy").train_images)
    images[3, 0, 0] = 40
    np.save(tmp_path / "x.npy", images)
    for where in (True, False):
        with pytest.raises(LogsnrError, match=r"pixel value 40 with data.grey_levels = 32: values must be in 0"):
            load(tmp_path / "x.npy", grey_levels=32, in_memory=where)
        with pytest.raises(LogsnrError, match=r"= 30: .* of 8-bit images 2, 4, ... 128 are made"):
            load(tmp_path / "x.npy", grey_levels=30, in_memory=where)
