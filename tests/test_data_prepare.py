"""Prepared sets and large folders: the same images, training and numbers as from where they come."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from logsnr import gaussian, writing
from logsnr.cli import main
from logsnr.cli.data import held_out_images
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.files import read_pair
from logsnr.gaussian import Residuals
from logsnr.interrupts import Interrupted
from logsnr.pixels import Pixels
from logsnr.predictions import X0
from logsnr.training import load_data, recipe_from, train
from logsnr.training.config import DataConfig
from logsnr.training.data import Rows, prepare
from logsnr.training.data.feed import Feed
from logsnr.training.data.index import find_index
from logsnr.training.data.statistics import read_statistics
from logsnr.training.images import read_image


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGSNR_CACHE", str(tmp_path / "cache"))


def section(source, **options):
    return DataConfig(source=str(source), **options)


def load(source, **options):
    return load_data(section(source, **options))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Forty small pictures of two classes and many sizes, one of them grey."""
    root = tmp_path_factory.mktemp("pictures")
    generator = np.random.default_rng(0)
    for i in range(40):
        height, width = generator.integers(9, 40, 2)
        coarse = generator.integers(0, 256, (3, 4, 3), dtype=np.uint8)
        image = Image.fromarray(coarse).resize((int(width), int(height)), Image.Resampling.BICUBIC)
        where = root / ("cat" if i % 3 else "dog")
        where.mkdir(exist_ok=True)
        (image.convert("L") if i == 7 else image).save(where / f"{i:03d}.png")
    (root / "notes.txt").write_text("none")
    for path in (root, *root.iterdir()):
        os.utime(path, (10**9, 10**9))
    return root


def assert_same(here, there):
    assert torch.equal(here.train_images[:], there.train_images[:])
    assert torch.equal(here.test_images[:], there.test_images[:])
    for name in ("train_labels", "test_labels"):
        one, other = getattr(here, name), getattr(there, name)
        assert (one is None) == (other is None)
        assert one is None or torch.equal(one, other)
    assert (here.grey_levels, here.classes, here.class_names) == (there.grey_levels, there.classes, there.class_names)


# What is prepared is what was there


@pytest.mark.parametrize("crop", ["square", "adm"])
def test_a_prepared_folder_is_the_folder(folder, tmp_path, crop):
    options = {"size": 8, "crop": crop, "holdout": 0.2}
    done = prepare(section(folder, **options), tmp_path / "set", shard=5 * 192)
    assert len(list((tmp_path / "set").glob("train-*.npz"))) == 8
    here, there = load(folder, **options), load(tmp_path / "set", holdout=0.2)
    assert isinstance(there.train_images, Rows)
    assert_same(here, there)
    for labels in (False, True):
        assert here.fingerprint(labels=labels) == there.fingerprint(labels=labels)
    assert here.sigma_data == there.sigma_data == done.data.sigma_data
    assert "1 L" in there.describe()
    assert "not read: 1 .txt" in there.describe()
    # What a training must know is kept beside the images: no walk is needed where the folder goes.
    assert not list((tmp_path / "cache").glob("data/survey*"))
    assert prepare(section(folder, **options), tmp_path / "set", shard=5 * 192).made == 0
    one = load(tmp_path / "set" / "train-00003.npz", holdout=0)
    assert one.class_names == ("cat", "dog")


@pytest.mark.parametrize("how", ["digits", "array with a held-out part"])
def test_other_sources_are_prepared_with_levels_and_parts_of_their_own(tmp_path, how):
    source, levels = "digits", 17
    if how != "digits":
        images = np.random.default_rng(0).integers(0, 32, (30, 3, 4, 5), dtype=np.uint8)
        source, levels = tmp_path / "x.npz", 32
        np.savez(source, x_train=images, x_test=images[:4])
    prepare(section(source, grey_levels=256 if source == "digits" else 32), tmp_path / "set")
    here, there = load(source, grey_levels=levels), load(tmp_path / "set")
    assert_same(here, there)
    assert here.fingerprint(labels=True) == there.fingerprint(labels=True)
    assert_same(here, load(tmp_path / "set", in_memory=True))


def test_the_spectrum_is_that_of_the_images_in_memory(folder, tmp_path):
    prepare(section(folder, size=8, holdout=0.2), tmp_path / "set", shard=5 * 192)
    data = load(folder, size=8, holdout=0.2)
    residuals = Residuals.of(Pixels(256).encode(data.train_images))
    mean, covariance = read_statistics(tmp_path / "set")
    torch.testing.assert_close(mean.flatten(), residuals.means[0], rtol=0, atol=1e-12)
    expected = gaussian.fit(residuals, "cosine")
    x = torch.randn(3, 192, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.testing.assert_close(covariance.mapped(torch.sqrt, x), expected.mapped(torch.sqrt, x), rtol=1e-9, atol=1e-9)


def test_a_run_from_a_prepared_set_is_the_run_from_the_images(folder, tmp_path):
    prepare(section(folder, size=8), tmp_path / "set")
    network = {"channels": [8], "layers_per_block": 1, "mid_attention": False, "norm_groups": 4}
    weights = []
    for data in ({"source": str(folder), "size": 8}, {"source": str(tmp_path / "set"), "workers": 0}):
        base = {"network": network, "samples": {"every": 0}, "batch": 8, "steps": 3, "device": "cpu"}
        train(recipe_from({**base, "data": {**data, "flip": True}, "conditional": True}), tmp_path / "run",
              progress=False, overwrite=True)  # fmt: skip
        weights.append(read_pair(tmp_path / "run" / "state", "state")[1])
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.parametrize("size", [(40, 17), (16, 16), (9, 31), (64, 35), (5, 7)])
def test_adms_crop_is_what_its_definition_says(tmp_path, size):
    """Written out as in guided-diffusion's loader: halve by averages of 2 x 2, bicubic to the shorter side, crop."""
    pixels = np.random.default_rng(1).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    found = read_image(tmp_path / "x.png", size=8, crop="adm").pixels
    halves = pixels
    while min(halves.shape[:2]) >= 16:
        h, w = halves.shape[0] // 2, halves.shape[1] // 2
        if halves.shape[0] % 2 or halves.shape[1] % 2:  # a box of an odd side covers shares of pixels
            halves = np.asarray(Image.fromarray(halves).resize((w, h), Image.Resampling.BOX))
        else:
            # Across and then along, each rounded to 8 bits.
            across = np.floor(halves.reshape(2 * h, w, 2, 3).mean(2) + 0.5)
            halves = np.floor(across.reshape(h, 2, w, 3).mean(1) + 0.5).astype(np.uint8)
    scale = 8 / min(halves.shape[:2])
    wide = (round(halves.shape[1] * scale), round(halves.shape[0] * scale))
    resized = np.asarray(Image.fromarray(halves).resize(wide, Image.Resampling.BICUBIC))
    y, x = (resized.shape[0] - 8) // 2, (resized.shape[1] - 8) // 2
    expected = resized[y : y + 8, x : x + 8].transpose(2, 0, 1)
    assert np.abs(found.astype(int) - expected).max() <= 1  # Pillow rounds in fixed point
    assert np.mean(found != expected) < 0.02


# What goes wrong loses nothing


def test_a_full_disk_and_ctrl_c_leave_whole_shards_and_the_same_call_goes_on(folder, tmp_path, monkeypatch, request):
    config = section(folder, size=8, holdout=0.2)
    prepare(config, tmp_path / "whole", shard=5 * 192)

    def full(path, data, real=writing.replace_file):
        if path.name == "train-00002.npz":
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        real(path, data)

    monkeypatch.setattr(preparing_module(), "replace_file", full)
    with pytest.raises(LogsnrError, match=r"No space left on device; what is there is whole: free some space"):
        prepare(config, tmp_path / "cut", shard=5 * 192)
    monkeypatch.undo()
    monkeypatch.setenv("LOGSNR_CACHE", str(tmp_path / "cache"))
    with pytest.raises(LogsnrError, match="is not complete: run logsnr data prepare again as before"):
        load(tmp_path / "cut")
    kept = (tmp_path / "cut" / "train-00001.npz").stat().st_mtime_ns
    written = []

    def stop(path, data, real=writing.replace_file):
        real(path, data)
        written.append(path.name)
        if len(written) == 2:
            os.kill(os.getpid(), 2)

    # a job of the background ignores it, and so do its children
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))
    monkeypatch.setattr(preparing_module(), "replace_file", stop)
    with pytest.raises(Interrupted, match=r"interrupted after 20 of 40 images, .* the same command goes on"):
        prepare(config, tmp_path / "cut", shard=5 * 192)
    monkeypatch.undo()
    monkeypatch.setenv("LOGSNR_CACHE", str(tmp_path / "cache"))
    assert prepare(config, tmp_path / "cut", shard=5 * 192).made == 20
    assert (tmp_path / "cut" / "train-00001.npz").stat().st_mtime_ns == kept
    for path in (tmp_path / "whole").iterdir():
        assert path.read_bytes() == (tmp_path / "cut" / path.name).read_bytes(), path.name


def preparing_module():
    return sys.modules["logsnr.training.data.preparing"]


def test_another_set_is_not_written_over_and_damage_is_said(folder, tmp_path):
    out = tmp_path / "set"
    prepare(section(folder, size=8), out)
    with pytest.raises(LogsnrError, match=r"holds a set with other options .*begin anew"):
        prepare(section(folder, size=9), out)
    prepare(section(folder, size=9), out, overwrite=True)
    assert load(out).shape == (3, 9, 9)
    (out / "train-00000.npz").write_bytes(b"short")
    with pytest.raises(LogsnrError, match=r"train-00000.npz has 5 bytes, not \d+: copy it again"):
        load(out)
    assert prepare(section(folder, size=9), out).made == 40
    whole = (out / "prepared.json").read_bytes()
    (out / "statistics.safetensors").unlink()
    assert prepare(section(folder, size=9), out).made == 0
    assert load(out).shape == (3, 9, 9)
    assert read_statistics(out)[0].shape == (3, 9, 9)
    assert prepare(section(folder, size=9), out, overwrite=True).made == 40
    assert (out / "prepared.json").read_bytes() == whole
    (out / "prepared.json").write_text("{")
    assert prepare(section(folder, size=9), out, overwrite=True).made == 40
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "mine.txt").write_text("mine")
    with pytest.raises(LogsnrError, match=r"holds mine.txt, and is no prepared set: give another folder"):
        prepare(section(folder, size=8), tmp_path / "other")


def test_a_set_is_not_its_own_source(folder, tmp_path):
    out = tmp_path / "set"
    prepare(section(folder, size=8), out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    (tmp_path / "link").symlink_to(out)
    for source in (out, out / "train-00000.npz", tmp_path / "link"):
        with pytest.raises(LogsnrError, match=r"lies in .*/set, which is written: give another folder"):
            prepare(section(source), out, overwrite=True)
    assert {path.name: path.read_bytes() for path in out.iterdir() if path.name[0] != "."} == before


def test_a_kill_while_a_set_is_removed_leaves_one_that_can_be_written_over(folder, tmp_path, monkeypatch):
    out = tmp_path / "set"
    prepare(section(folder, size=8), out, shard=5 * 192)
    gone = []

    def unlink(path, missing_ok=False):
        if path.suffix in (".npz", ".json"):
            if len(gone) == 3:
                raise KeyboardInterrupt
            gone.append(path.name)
        os.unlink(path)

    with monkeypatch.context() as patch:
        patch.setattr(type(out), "unlink", unlink)
        with pytest.raises(KeyboardInterrupt):
            prepare(section(folder, size=9), out, overwrite=True)
    assert len(gone) == 3
    prepare(section(folder, size=9), out, overwrite=True)
    assert_same(load(folder, size=9), load(out))


def test_files_written_over_in_their_place_are_another_set(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "some")
    config = section(tmp_path / "some", size=8)
    prepare(config, tmp_path / "set")
    Image.new("RGB", (20, 20)).save(tmp_path / "some" / "cat" / "001.png")
    for path in (tmp_path / "some", *(tmp_path / "some").iterdir()):
        os.utime(path, (10**9, 10**9))
    with pytest.raises(LogsnrError, match=r"holds a set with other identity"):
        prepare(config, tmp_path / "set")
    prepare(config, tmp_path / "set", overwrite=True)
    assert_same(load(tmp_path / "some", size=8), load(tmp_path / "set"))


def test_a_compressed_file_is_prepared(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (30, 3, 4, 4), dtype=np.uint8)
    np.savez_compressed(tmp_path / "x.npz", images=images, labels=np.arange(30) % 3)
    assert prepare(section(tmp_path / "x.npz"), tmp_path / "set").made == 30
    assert prepare(section(tmp_path / "x.npz"), tmp_path / "set").made == 0
    assert_same(load(tmp_path / "x.npz"), load(tmp_path / "set"))


@pytest.mark.parametrize("size", [8, None])
def test_a_shard_of_broken_files_is_empty_and_keeps_its_classes_number(tmp_path, size):
    root = tmp_path / "some"
    for name in "abc":
        (root / name).mkdir(parents=True)
        for i in range(5):
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(root / name / f"{i}.png")
    for i in range(5):
        (root / "a" / f"{i}.png").write_bytes(b"no picture")
    options = {"size": size, "broken": "skip"}
    done = prepare(section(root, **options), tmp_path / "set", shard=5 * 192)
    assert (done.made, done.data.class_names) == (10, ("a", "b", "c"))
    here, there = load(root, **options), load(tmp_path / "set")
    assert torch.equal(here.train_images, there.train_images[:])
    assert torch.equal(here.train_labels + 1, there.train_labels)
    assert prepare(section(root, **options), tmp_path / "set", shard=5 * 192).made == 0
    for path in root.glob("*/*.png"):
        path.write_bytes(b"no picture")
    with pytest.raises(LogsnrError, match=r"none of the 15 images of|has no image that can be read"):
        prepare(section(root, **options), tmp_path / "none")


def test_broken_files_are_left_out_of_a_prepared_set(folder, tmp_path):
    import shutil

    shutil.copytree(folder, tmp_path / "some")
    (tmp_path / "some" / "cat" / "001.png").write_bytes(b"no picture")
    with pytest.raises(LogsnrError, match="leave such files out"):
        prepare(section(tmp_path / "some", size=8), tmp_path / "set")
    options = {"size": 8, "broken": "skip"}
    prepare(section(tmp_path / "some", **options), tmp_path / "kept")
    here, there = load(tmp_path / "some", **options), load(tmp_path / "kept")
    assert_same(here, there)
    assert "left out as broken: 1 (cat/001.png)" in there.describe()


def test_the_command(folder, tmp_path, monkeypatch, capsys):
    out = tmp_path / "set"
    monkeypatch.setattr(
        sys, "argv", ["logsnr", "data", "prepare", str(folder), "--size", "8", "-o", str(out), "--json"]
    )
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["images"], facts["made"], facts["shape"], facts["classes"]) == (40, 40, [3, 8, 8], 2)
    assert facts["sigma_data"] == load(folder, size=8).sigma_data


# Large folders


def test_a_folder_that_is_decoded_as_needed_holds_the_same_images(folder, tmp_path):
    here, there = (load(folder, size=8, in_memory=where) for where in (None, False))
    assert isinstance(here.train_images, torch.Tensor)
    assert isinstance(there.train_images, Rows)
    assert_same(here, there)
    assert here.sigma_data == there.sigma_data  # of fewer than are looked at
    with pytest.raises(LogsnrError, match=r"data.broken: skip leaves out .* prepare them"):
        load(folder, size=8, in_memory=False, broken="skip")
    with pytest.raises(LogsnrError, match=r"set data.size to crop and resize"):
        load(folder, in_memory=False)


def test_many_files_are_decoded_once_for_all_processes(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules["logsnr.training.data.sources"], "DECODED", 10)
    here, there = (load(folder, size=8, in_memory=where) for where in (True, None))
    assert isinstance(there.train_images, Rows)
    order = torch.arange(36).reshape(6, 6)
    feed = Feed(there.train_images, lambda step: order[step % 6], workers=1, pin=False)
    for step in range(6):
        assert torch.equal(feed(step), here.train_images[order[step]])
    feed.close()
    read = []
    monkeypatch.setattr(sys.modules["logsnr.training.data.index"], "pictures", lambda *a: read.append(a))
    assert torch.equal(there.train_images[:], here.train_images)  # what another process decoded is there
    assert read == []


def test_a_run_of_before_is_resumed_with_its_data_in_memory(folder, tmp_path, monkeypatch):
    """Its state does not say where images are: at that time, in memory."""
    network = {"channels": [8], "layers_per_block": 1, "mid_attention": False, "norm_groups": 4}
    base = {"network": network, "samples": {"every": 0}, "batch": 8, "device": "cpu"}
    data = {"source": str(folder), "size": 8, "workers": 0}
    train(recipe_from({**base, "data": data, "steps": 1}), tmp_path / "run", progress=False)
    state = tmp_path / "run" / "state" / "state.json"
    facts = json.loads(state.read_text())
    del facts["recipe"]["data"]["in_memory"], facts["recipe"]["data"]["workers"]
    state.write_text(json.dumps(facts))
    monkeypatch.setattr(sys.modules["logsnr.training.data.sources"], "DECODED", 10)
    again = train(recipe_from({**base, "data": data, "steps": 2}), tmp_path / "run", resume=True, progress=False)
    assert (again.resumed_from, again.steps) == (1, 2)


def test_a_run_from_memory_resumes_with_the_folder_in_memory_as_then(folder, tmp_path):
    network = {"channels": [8], "layers_per_block": 1, "mid_attention": False, "norm_groups": 4}

    def recipe(steps, in_memory):
        data = {"source": str(folder), "size": 8, "in_memory": in_memory, "workers": 0}
        base = {"network": network, "samples": {"every": 0}, "batch": 8, "device": "cpu"}
        return recipe_from({**base, "data": data, "steps": steps})

    train(recipe(1, True), tmp_path / "run", progress=False)
    with pytest.raises(
        LogsnrError, match=r"trained on other images .*with data.in_memory: true if they were in memory"
    ):
        train(recipe(2, False), tmp_path / "run", resume=True, progress=False)
    assert train(recipe(2, True), tmp_path / "run", resume=True, progress=False).resumed_from == 1


def test_commands_take_a_prepared_set_and_its_shape(folder, tmp_path):
    prepare(section(folder, size=8), tmp_path / "set")
    network = NetworkDenoiser(torch.nn.Identity(), X0(), shape=(3, 8, 8), pixels=Pixels(256))
    images, pixels, cond, train_images = held_out_images(network, str(tmp_path / "set"), 3)
    assert torch.equal(images, load(folder, size=8).test_images[:3])
    assert (pixels, cond, len(train_images)) == (Pixels(256), None, 36)


def test_a_folder_is_listed_once_until_it_changes(folder, tmp_path, monkeypatch):
    import shutil

    import logsnr.training.data.index as module

    root = tmp_path / "some"
    shutil.copytree(folder, root)
    listed = []
    real = module.image_files
    monkeypatch.setattr(module, "image_files", lambda *args: (listed.append(1), real(*args))[1])
    first = find_index(root)
    again = find_index(root)
    assert len(listed) == 1
    assert [again.path(i) for i in range(len(again))] == real(root)[0] == [first.path(i) for i in range(len(first))]
    assert torch.equal(first.labels, again.labels)
    assert (first.classes, first.skipped, first.identity) == (again.classes, again.skipped, again.identity)
    shutil.copy(root / "cat" / "001.png", root / "cat" / "zzz.png")
    assert len(find_index(root)) == len(first) + 1
    assert len(listed) == 2
