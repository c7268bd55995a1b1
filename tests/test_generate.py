"""Generation: image i depends on (seed, i) alone; many processes, kills and more images change no bit of a shard."""

import hashlib
import json
import shutil
import signal
from itertools import count

import numpy as np
import pytest
import torch
from faults.sites import killed_at
from PIL import Image
from pretended import DEVICE, Pretended
from torch import nn

import logsnr as ls
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.generation.settings import default_sizes
from logsnr.interrupts import Interrupted
from logsnr.pixels import Pixels
from logsnr.predictions import EDM
from logsnr.sampling import generators
from logsnr.sampling.streams import _WORDS, drawn_classes
from logsnr.training import load_data
from logsnr.training.config import DataConfig
from logsnr.writing import create_file

SIZES = {"chunk": 4, "shard": 8}


class Toy(nn.Module):
    """A network whose answer for a sample depends, a little, on the others beside it, as kernels' last bits do."""

    def __init__(self):
        super().__init__()
        self.classes = nn.Embedding(4, 1)
        nn.init.normal_(self.classes.weight, generator=torch.Generator().manual_seed(0))
        self.batches = []
        self.before = lambda: None

    def forward(self, x, label, class_labels=None):
        self.before()
        self.batches.append(len(x))
        told = 0 if class_labels is None else self.classes(class_labels)[..., None, None]
        return torch.tanh(2 * x + told) + 0.2 * x.mean()


@pytest.fixture
def toy():
    denoiser = NetworkDenoiser(Toy(), EDM(sigma_data=0.5), shape=(1, 2, 3), pixels=Pixels(17))
    denoiser.card = {"classes": 3, "null_class": 3, "class_names": ["a", "b", "c"]}
    return denoiser.requires_grad_(False)


PLAN = ls.solvers.ddim(ls.grids.karras(2, 20.0, 0.05))
NOISY = ls.solvers.ddpm(ls.grids.karras(3, 20.0, 0.05))


def digests(folder):
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in found}


def everything(folder):
    images, labels = zip(*ls.Shards(folder), strict=True)
    return torch.cat(images), None if labels[0] is None else torch.cat(labels)


# Streams


def test_a_stream_fills_the_whole_state_of_a_generator():
    """Where torch keeps its Mersenne Twister's words, known from NumPy's twister of the same seed; 64 bits of the seed
    and of the index count, of which torch's own seeding reads 32."""
    state = torch.Generator().manual_seed(7).get_state()[_WORDS].view(torch.int64)
    assert state.tolist() == np.random.RandomState(7).get_state()[1].tolist()
    [one] = generators(5, [9])
    words = np.random.Philox(key=[5, 9]).random_raw(313)
    twister = np.random.RandomState()
    twister.set_state(("MT19937", words[:312].view(np.uint32), 624))
    draws = torch.randint(2**24, (700,), generator=one).numpy()
    assert draws.tolist() == [int(twister.randint(2**24, dtype=np.uint32)) for _ in range(700)]
    assert int(drawn_classes(5, [9], 10)) == int(words[312]) % 10
    firsts = [torch.randn(20, generator=g) for seed in (0, 2**32, -1) for g in generators(seed, [0, 1, 2**32])]
    assert len({tuple(first.tolist()) for first in firsts}) == 9


def test_streams_are_independent_standard_normals():
    z = torch.stack([torch.randn(16, generator=g) for g in generators(3, range(4000))]).double()
    assert abs(float(z.mean())) < 4 / 64000**0.5
    assert abs(float(z.var()) - 1) < 4 * (2 / 64000) ** 0.5
    assert abs(float((z[1:] * z[:-1]).mean())) < 4 / 64000**0.5
    drawn = torch.bincount(drawn_classes(3, range(4000), 4)) / 1000 - 1
    assert drawn.abs().max() < 4 * (3 / 4000) ** 0.5


@pytest.mark.parametrize("kind", ["plan", "heun"])
def test_a_sample_with_its_own_generator_is_the_same_beside_any_others(kind):
    denoiser = ls.exact.Gaussian(torch.zeros(3), torch.eye(3))
    churn = {"churn": ls.Churn(s_churn=2.0)}

    def drawn(indices):
        g = generators(1, indices)
        if kind == "plan":
            return ls.sample(denoiser, NOISY, n=len(g), generator=g)
        return ls.heun(denoiser, [10.0, 3.0, 1.0, 0.0], n=len(g), generator=g, **churn)

    together, alone = drawn(range(6)), torch.cat([drawn([i]) for i in range(6)])
    assert torch.equal(together, alone)
    assert not torch.equal(together[0], together[1])
    with pytest.raises(ValueError, match="2 generators for 3 samples: give one for all, or one per sample"):
        ls.sample(denoiser, NOISY, n=3, generator=generators(0, [0, 1]))
    with pytest.raises(ValueError, match="2 generators for 3 samples"):
        ls.sample(denoiser, NOISY, noise=torch.zeros(3, 3), generator=generators(0, [0, 1]))


# Images


def test_sizes_that_nobody_gave_fit_those_that_were_given():
    assert [default_sizes((1, 8, 8), None, shard) for shard in (None, 100, 600, 7)] == [
        (250, 1000), (100, 100), (200, 600), (7, 7),
    ]  # fmt: skip
    assert default_sizes((3, 512, 512), None, None) == (2, 84)


@pytest.mark.parametrize("plan", [PLAN, NOISY], ids=["ddim", "ddpm"])
def test_images_do_not_depend_on_how_many_or_who(toy, tmp_path, plan):
    """Chunks are whole and fixed: fewer images, two processes and images added later give the same bytes."""
    whole = ls.generate(toy, plan, tmp_path / "whole", n=21, **SIZES)
    assert (whole.made, whole.found, whole.missing) == (21, 0, 0)
    assert set(toy.network.batches) == {4}
    expected = digests(tmp_path / "whole")
    assert sorted(expected) == ["generated.json", *(f"shard-0000{k}.npz" for k in range(3))]
    for rank in (1, 0):
        done = ls.generate(toy, plan, tmp_path / "two", n=21, rank=rank, world=2, **SIZES)
        assert (done.made, done.missing) == ((8, 2) if rank else (13, 0))
    assert digests(tmp_path / "two") == expected
    few = ls.generate(toy, plan, tmp_path / "more", n=10, **SIZES)
    assert torch.equal(everything(tmp_path / "more")[0], everything(tmp_path / "whole")[0][:10])
    more = ls.generate(toy, plan, tmp_path / "more", n=21, **SIZES)
    assert (few.made, more.made, more.found) == (10, 13, 8)
    assert digests(tmp_path / "more") == expected


def test_an_image_is_the_sample_of_its_own_draws(toy, tmp_path):
    """What the files hold is what `sample` gives for the same chunk."""
    ls.generate(toy, NOISY, tmp_path, n=8, seed=5, **SIZES)
    images, labels = everything(tmp_path)
    cond = {"class_labels": torch.arange(4, 8) % 3}
    x = ls.sample(toy, NOISY, n=4, generator=generators(5, range(4, 8)), cond=cond)
    assert torch.equal(images[4:], toy.decode(x))
    assert labels.tolist() == [i % 3 for i in range(8)]
    ls.generate(toy, NOISY, tmp_path / "other", n=8, seed=6, **SIZES)
    assert not torch.equal(everything(tmp_path / "other")[0], images)


def test_a_devices_images_are_those_of_the_cpu(toy, tmp_path):
    """Noise, also a plan's, is drawn on the CPU; conditions go to the device, images come back (tests/pretended.py)."""
    ls.generate(toy, NOISY, tmp_path / "here", n=13, classes="drawn", **SIZES)
    with Pretended():
        ls.generate(toy.to(DEVICE), NOISY, tmp_path / "there", n=13, classes="drawn", **SIZES)
    assert digests(tmp_path / "there") == digests(tmp_path / "here")


def test_classes_are_dealt_in_turn_drawn_or_one(toy, tmp_path):
    def labels(name, **options):
        ls.generate(toy, PLAN, tmp_path / name, n=20, **SIZES, **options)
        return everything(tmp_path / name)

    assert labels("balanced")[1].tolist() == [i % 3 for i in range(20)]
    drawn, told = labels("drawn", classes="drawn")
    assert told.tolist() == drawn_classes(0, range(20), 3).tolist()
    one, ones = labels("one", classes=2)
    assert ones.tolist() == [2] * 20
    same = told == 2  # the noise is that of the image, whatever its class
    ends = [ls.sample(toy, PLAN, n=4, generator=generators(0, range(4)), cond={"class_labels": c}) for c in
            (told[:4], torch.full((4,), 2))]  # fmt: skip
    assert torch.equal(toy.decode(ends[0]), drawn[:4])
    assert torch.equal(toy.decode(ends[1]), one[:4])
    assert 0 < int(same.sum()) < 20
    assert labels("null", classes=3)[1] is None
    toy.card = {}
    assert labels("none")[1] is None
    with pytest.raises(LogsnrError, match="classes = drawn: this model is unconditional; leave it out"):
        labels("wrong", classes="drawn")


@pytest.mark.parametrize("format", ["npz", "png"])
def test_shards_are_data(toy, tmp_path, format):
    """A shard, and the folder of all, are read as a data source; pictures have EDM's dataset.json."""
    ls.generate(toy, PLAN, tmp_path, n=13, format=format, **SIZES)
    ls.generate(toy, PLAN, tmp_path / "npz", n=13, **SIZES)
    images, labels = everything(tmp_path)
    plain = everything(tmp_path / "npz")[0]
    assert torch.equal(images, plain if format == "npz" else Pixels(17).display(plain))
    data = load_data(DataConfig(source=str(tmp_path), holdout=0))
    assert torch.equal(
        data.train_images[torch.randperm(13, generator=torch.Generator().manual_seed(0)).argsort()], images
    )
    assert (data.grey_levels, data.classes, data.class_names) == (17 if format == "npz" else 256, 3, ("a", "b", "c"))
    if format == "npz":
        shard = load_data(DataConfig(source=str(tmp_path / "shard-00001.npz"), grey_levels=17))
        assert (len(shard.train_images) + len(shard.test_images), shard.class_names) == (5, ("a", "b", "c"))
        return
    told = json.loads((tmp_path / "dataset.json").read_text())["labels"]
    assert told == [[f"0000{i // 8}/{i:06d}.png", i % 3] for i in range(13)]
    for (name, label), image in zip(told, images, strict=True):
        with Image.open(tmp_path / name) as picture:
            assert np.array_equal(np.array(picture), image[0])
        assert label == labels[int(name[-6:-4])]


# Kills and resumes


@pytest.mark.parametrize("format", ["npz", "png"])
def test_a_kill_at_any_call_leaves_whole_shards_and_the_same_end(toy, tmp_path, format):
    """Every seventh site (of pictures every 31st); `make faults` kills at random moments."""
    options = {"n": 21, "format": format, **SIZES}
    ls.generate(toy, PLAN, tmp_path / "whole", **options)
    expected, names = digests(tmp_path / "whole"), []
    for site in count(step=7 if format == "npz" else 31):
        out = tmp_path / str(site)
        name = killed_at(lambda out=out: ls.generate(toy, PLAN, out, **options), out, site)
        there = {k: v for k, v in digests(out).items() if not any(part.startswith(".") for part in k.split("/"))}
        assert there.items() <= expected.items()
        ls.generate(toy, PLAN, out, **options)
        assert digests(out) == expected  # and nothing is left behind
        if not name:
            break
        names.append(name)
    assert len(names) >= 5


@pytest.mark.parametrize("format", ["npz", "png"])
def test_whole_shards_are_left_alone_and_broken_ones_made_again(toy, tmp_path, format):
    ls.generate(toy, PLAN, tmp_path, n=29, format=format, **SIZES)
    expected = digests(tmp_path)
    paths = [ls.Shards(tmp_path).path(k) for k in range(4)]
    file = [path if format == "npz" else sorted(path.iterdir())[1] for path in paths]
    data = bytearray(file[0].read_bytes())
    data[data.index(b"IDAT") + 8 if format == "png" else 150] ^= 4
    file[0].write_bytes(data)
    file[1].write_bytes(file[1].read_bytes()[:60])
    file[2].unlink()
    kept = file[3].stat().st_mtime_ns
    done = ls.generate(toy, PLAN, tmp_path, n=29, format=format, **SIZES)
    assert (done.made, done.found) == (24, 5)
    assert digests(tmp_path) == expected
    assert file[3].stat().st_mtime_ns == kept
    paths[1].unlink() if format == "npz" else shutil.rmtree(paths[1])
    with pytest.raises(LogsnrError, match="1 of 4 shards are missing: run logsnr generate again as before"):
        everything(tmp_path)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"seed": 1}, "made with seed 0, not 1"),
        ({"classes": 1}, "made with classes balanced, not 1"),
        ({"chunk": 8}, "made with chunk 4, not 8"),
        ({"shard": 4}, "made with shard 8, not 4"),
        ({"format": "png"}, "made with format npz, not png"),
        ({"plan": NOISY}, "made with plan .{12}..., not .{12}...: ask for the same"),
        ({"told": {"prompt": "a fox"}}, "made with prompt None, not a fox"),
        ({"n": 7}, "holds, or is to hold, 21 images, more than 7"),
        ({"shard": 9}, "a shard of 9 images is no whole number of chunks of 4: give a shard of 12"),
        ({"rank": 2, "world": 2}, "process 2 of 2"),
        ({"format": "jpg"}, "format 'jpg' is not one of npz, png"),
        ({"classes": "balancd"}, "did you mean 'balanced'?"),
        ({"n": 0}, "n = 0: must be at least 1"),
    ],
    ids=str,
)
def test_other_settings_are_refused_and_nothing_is_touched(toy, tmp_path, change, match):
    ls.generate(toy, PLAN, tmp_path, n=21, **SIZES)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    with pytest.raises(LogsnrError, match=match):
        ls.generate(toy, **{"plan": PLAN, "out": tmp_path, "n": 21, **SIZES, **change})
    assert {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()} == before


def test_other_weights_and_guidance_are_refused(toy, tmp_path):
    ls.generate(toy, PLAN, tmp_path, n=5, **SIZES)
    with pytest.raises(LogsnrError, match=r"guidance 1.0, not 2.0"):
        ls.generate(ls.guidance.cfg(toy, 2.0, {"class_labels": torch.tensor([3])}), PLAN, tmp_path, n=5, **SIZES)
    toy.network.classes.weight[0] += 1
    with pytest.raises(LogsnrError, match=r"weights .{12}\.\.\., not .{12}\.\.\."):
        ls.generate(toy, PLAN, tmp_path, n=5, **SIZES)


def test_overwrite_removes_what_generate_made_and_nothing_else(toy, tmp_path):
    ls.generate(toy, PLAN, tmp_path, n=21, format="png", **SIZES)
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "00009").mkdir()
    (tmp_path / "00009" / "holiday.png").write_text("mine")
    for rank in range(2):
        ls.generate(toy, NOISY, tmp_path, n=9, overwrite=True, rank=rank, world=2, **SIZES)
    ls.generate(toy, NOISY, tmp_path / "fresh", n=9, **SIZES)
    fresh = digests(tmp_path / "fresh")
    shutil.rmtree(tmp_path / "fresh")
    assert digests(tmp_path).keys() == {*fresh, "notes.txt", "00009/holiday.png"}
    assert digests(tmp_path).items() >= fresh.items()
    (tmp_path / "generated.json").unlink()
    with pytest.raises(LogsnrError, match=r"holds shard-00000.npz but no generated.json"):
        ls.generate(toy, NOISY, tmp_path, n=9, overwrite=True, **SIZES)


def test_the_first_of_two_settings_stays(tmp_path):
    assert create_file(tmp_path / "x", b"first")
    assert not create_file(tmp_path / "x", b"second")
    assert (tmp_path / "x").read_bytes() == b"first"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


# Signals and the command


@pytest.fixture
def heard():
    """A shell starts what runs in its background deaf to Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("sig", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_lets_the_chunk_finish_and_keeps_whole_shards(toy, tmp_path, heard, sig):
    ls.generate(toy, PLAN, tmp_path / "whole", n=29, **SIZES)
    toy.network.batches.clear()
    toy.network.before = lambda: signal.raise_signal(sig) if len(toy.network.batches) == 5 else None
    with pytest.raises(Interrupted, match=r"1 of 4 shards are whole in .*; the same again goes on") as stop:
        ls.generate(toy, PLAN, tmp_path / "cut", n=29, **SIZES)
    assert stop.value.signum == sig
    assert len(toy.network.batches) == 6  # the third chunk's second evaluation
    assert sorted(digests(tmp_path / "cut")) == ["generated.json", "shard-00000.npz"]
    toy.network.before = lambda: None
    ls.generate(toy, PLAN, tmp_path / "cut", n=29, **SIZES)
    assert digests(tmp_path / "cut") == digests(tmp_path / "whole")


def test_the_command_is_the_function(run, tmp_path, monkeypatch):
    options = ["--nfe", 2, "-n", 12, "--chunk", 4, "--shard", 8]
    code, out, err = run("generate", "zoo:digits", *options, "--out", tmp_path / "a", "--json")
    facts = json.loads(out)
    assert (code, err) == (0, "")
    assert (facts["images"], facts["made"], facts["shards"], facts["evaluations"]) == (12, 12, 2, 2)
    denoiser = ls.load("zoo:digits")
    ls.generate(denoiser, 2, tmp_path / "b", n=12, model="zoo:digits", **SIZES)
    assert digests(tmp_path / "a") == digests(tmp_path / "b")
    code, out, _ = run("generate", "zoo:digits", *options, "--out", tmp_path / "a")
    assert (code, out) == (0, f"{tmp_path / 'a'}: 12 images in 2 shards of 2 evaluations each; none made now; 12 were "
                           "there\n")  # fmt: skip
    code, _, err = run("generate", "zoo:digits", *options, "--out", tmp_path / "a", "--seed", 1)
    assert (code, err.count("\n")) == (2, 1)
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("LOCAL_RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        code, out, _ = run("generate", "zoo:digits", *options, "--out", tmp_path / "c")
        assert (code, out.count("\n")) == (0, 1 - rank)
    assert digests(tmp_path / "c") == digests(tmp_path / "a")
    monkeypatch.setenv("RANK", "x")
    assert run("generate", "zoo:digits", *options, "--out", tmp_path / "c")[2].startswith("logsnr: error: RANK='x'")


def test_an_interrupted_command_says_how_to_go_on(run, tmp_path, monkeypatch, heard):
    def interrupted(*args, **options):
        signal.raise_signal(signal.SIGTERM)
        return torch.zeros(len(options["generator"]), 1, 8, 8)

    monkeypatch.setattr("logsnr.generation.run.sample", interrupted)
    out = tmp_path / "x"
    code, _, err = run("generate", "zoo:digits", "-n", 12, "--chunk", 4, "--shard", 4, "--out", out, "--overwrite")
    assert code == 143
    assert err == (
        f"logsnr: interrupted: 1 of 3 shards are whole in {out}; the same again goes on: logsnr generate zoo:digits "
        f"-n 12 --chunk 4 --shard 4 --out {out}\n"
    )
    assert run("generate", "zoo:digits", "--class", 1, "--classes", "drawn", "--out", out)[0] == 2
    assert "wrong" in run("generate", "zoo:digits", "--class", "wrong", "--out", out)[2]
