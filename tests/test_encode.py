"""Latents of images, encoded before a training, against diffusers' own and against closed forms."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import logsnr as ls
from logsnr.cli import app
from logsnr.errors import LogsnrError
from logsnr.pixels import Pixels
from logsnr.training import load_data, load_recipe, train
from logsnr.training.config import DataConfig
from logsnr.training.data import VAE, Encoder, prepare
from logsnr.training.data.statistics import read_statistics
from logsnr.training.draws import Draws
from logsnr.training.pictures import save_picture

diffusers = pytest.importorskip("diffusers")
SCALE, SHIFT = 0.5, 0.25


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A VAE of grey images, half their size, two channels; 40 images of 8 x 8 pixels."""
    made = tmp_path_factory.mktemp("encode")
    torch.manual_seed(0)
    diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, latent_channels=2, block_out_channels=(4, 8), norm_num_groups=2,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, sample_size=8,
        scaling_factor=SCALE, shift_factor=SHIFT,
    ).save_pretrained(made / "vae")  # fmt: skip
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(made / "images.npz", images=images, labels=np.arange(40) % 4)
    return made


@pytest.fixture(scope="module")
def encoded(folder):
    prepare(config(folder), folder / "latents", encoder=encoder(folder), shard=16 * 4 * 64)
    return folder / "latents"


def config(folder, source="images.npz", **options):
    return DataConfig(source=str(folder / source), **options)


def encoder(folder, **options):
    return Encoder(vae=VAE(folder / "vae"), chunk=7, **options)


def read(folder, **options):
    return load_data(DataConfig(source=str(folder), **options), latents=True)


def of_diffusers(folder, images):
    """Mean and standard deviation of x, by hand."""
    posterior = VAE(folder / "vae").network.encode(Pixels().encode(images)).latent_dist
    return (posterior.mean - SHIFT) * SCALE, posterior.std * SCALE


@pytest.mark.parametrize("in_memory", [False, True])
def test_moments_are_the_vaes(folder, encoded, in_memory) -> None:
    images = load_data(config(folder))
    data = read(encoded, in_memory=in_memory)
    mean, deviation = of_diffusers(folder, images.train_images[:])
    assert data.shape == (2, 4, 4)
    torch.testing.assert_close(data.train_images[:], torch.cat([mean, deviation], 1))
    assert torch.equal(data.train_labels, images.train_labels)
    spread = (mean.double().square().mean() + deviation.double().square().mean() - mean.double().mean() ** 2).sqrt()
    assert data.sigma_data == pytest.approx(float(spread), rel=1e-6)
    assert data.fingerprint(labels=True) == read(encoded, in_memory=not in_memory).fingerprint(labels=True)
    assert "with 2 channels, latents of " in data.describe()


def test_they_are_the_pipelines_latents(folder, encoded) -> None:
    from logsnr.adapters.diffusers.pipelines.latents import Latents

    images = load_data(config(folder)).train_images[:]
    ours = read(encoded).train_images[:][:, :2]
    vae = VAE(folder / "vae")
    codec = Latents(vae.network, channels=1)
    torch.testing.assert_close(ours, codec.encode(images))
    assert torch.equal(vae.decode(ours), Pixels().decode(codec.decode(ours)))


def test_a_set_that_was_cut_off_goes_on_as_it_was(folder, encoded, tmp_path) -> None:
    """Byte for byte, draws too: their noise is the image's own."""
    for options in ({}, {"draws": True, "seed": 3}):
        out = tmp_path / f"set-{len(options)}"
        first = prepare(config(folder), out, encoder=encoder(folder, **options), shard=16 * 4 * 64)
        assert first.made == 40
        shards = sorted(out.glob("train-*.npz"))
        assert len(shards) > 1
        before = [shard.read_bytes() for shard in shards]
        shards[1].unlink()
        again = prepare(config(folder), out, encoder=encoder(folder, **options), shard=16 * 4 * 64)
        assert 0 < again.made < 40
        assert [shard.read_bytes() for shard in shards] == before
        with pytest.raises(LogsnrError, match=r"holds a set with other shape \(.* begin anew"):
            prepare(config(folder), out, encoder=encoder(folder, draws=not options), shard=16 * 4 * 64)


def test_draws_have_the_posteriors_moments(folder, tmp_path) -> None:
    """Each is mean + deviation eps, eps normal: 40 x 32 of them have mean 0 and variance 1 to four errors."""
    prepare(config(folder, holdout=0.0), tmp_path, encoder=encoder(folder, draws=True))
    data = read(tmp_path, holdout=0.0)
    images = load_data(config(folder, holdout=0.0)).train_images[:]
    mean, deviation = of_diffusers(folder, images)
    eps = ((data.train_images[:] - mean) / deviation).double()
    n = eps.numel()
    assert abs(float(eps.mean())) < 4 / n**0.5
    assert abs(float(eps.square().mean()) - 1) < 4 * (2 / n) ** 0.5
    assert float(eps.flatten(1).corrcoef().fill_diagonal_(0).abs().max()) < 0.8  # no two alike


def test_a_batch_is_drawn_for_all_processes(encoded) -> None:
    """x = mean + deviation eps with the step's noise: two processes share one stream; other steps draw other noise."""
    recipe = load_recipe("digits", {"data.source": str(encoded), "batch": 8, "data.workers": 0})
    data = read(encoded)

    def batches(world, step):
        made = [
            Draws(recipe, data, generator=torch.Generator(), device=torch.device("cpu"), rank=rank, world=world)
            for rank in range(world)
        ]
        return torch.cat([draw(step)[0] for draw in made])

    assert torch.equal(batches(1, 5), batches(2, 5))
    assert not torch.equal(batches(1, 5), batches(1, 6))
    assert batches(1, 5).shape == (8, 2, 4, 4)


def test_the_statistics_are_of_x(folder, encoded) -> None:
    """The mean is that of the means; the variance has the posteriors' own."""
    images = load_data(config(folder)).train_images[:]
    mean, deviation = of_diffusers(folder, images)
    centre, covariance = read_statistics(encoded)
    error = (deviation.square().sum(0).sqrt() / len(images)).max()
    assert float((centre - mean.mean(0)).abs().max()) < 5 * float(error)
    total = mean.var(0).sum() + deviation.square().mean(0).sum()
    assert float((covariance.values * covariance.counts).sum()) == pytest.approx(float(total), rel=0.2)


def test_a_training_on_latents(folder, encoded, tmp_path) -> None:
    changes = {
        "data.source": str(encoded), "data.vae": str(folder / "vae"), "data.workers": 0, "steps": 2, "batch": 4,
        "samples.every": 2, "samples.count": 4, "samples.steps": 2, "max_seconds": None,
    }  # fmt: skip
    train(load_recipe("digits", changes), tmp_path / "run", progress=False)
    model = ls.load(tmp_path / "run")
    assert model.pixels is None
    assert model.shape == (2, 4, 4)
    assert model.sigma_data == read(encoded).sigma_data
    (picture,) = (tmp_path / "run" / "samples").glob("*.png")
    assert picture.stat().st_size
    save_picture(model, load_recipe("digits", {**changes, "data.vae": None}), tmp_path / "none.png")
    assert not (tmp_path / "none.png").exists()


def test_taesd_has_no_deviation(folder, tmp_path) -> None:
    tiny = diffusers.AutoencoderTiny(
        in_channels=1, out_channels=1, latent_channels=2, encoder_block_out_channels=(4, 4),
        decoder_block_out_channels=(4, 4), num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    )  # fmt: skip
    tiny.save_pretrained(tmp_path / "tiny")
    vae = VAE(tmp_path / "tiny")
    prepare(config(folder), tmp_path / "set", encoder=Encoder(vae=vae))
    data = read(tmp_path / "set")
    assert not data.latent.moments
    images = load_data(config(folder)).train_images[:]
    with torch.no_grad():
        torch.testing.assert_close(data.train_images[:], vae.network.encode(Pixels().encode(images)).latents)


def test_what_does_not_fit_is_refused(folder, encoded, tmp_path) -> None:
    with pytest.raises(LogsnrError, match="holds no VAE"):
        VAE(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel"}))
    with pytest.raises(LogsnrError, match="holds UNet2DModel: VAEs that are read are AutoencoderKL"):
        VAE(tmp_path)
    np.save(tmp_path / "colour.npy", np.zeros((4, 8, 8, 3), np.uint8))
    with pytest.raises(LogsnrError, match="images have 3 channels, the VAE takes 1"):
        prepare(config(tmp_path, "colour.npy"), tmp_path / "a", encoder=encoder(folder))
    np.save(tmp_path / "odd.npy", np.zeros((4, 9, 9), np.uint8))
    with pytest.raises(LogsnrError, match="9 x 9 are no multiple of 2"):
        prepare(config(tmp_path, "odd.npy"), tmp_path / "b", encoder=encoder(folder))
    with pytest.raises(LogsnrError, match="is encoded already"):
        prepare(config(encoded, ""), tmp_path / "c", encoder=encoder(folder))
    with pytest.raises(LogsnrError, match="holds latents, which only a training reads"):
        load_data(config(encoded, ""))
    with pytest.raises(LogsnrError, match=r"data.flip mirrors images.* set data.flip: false"):
        read(encoded, flip=True)
    with pytest.raises(LogsnrError, match=r"data.vae .* leave it out"):
        load_data(config(folder, vae="x"))


def test_the_command(folder, tmp_path) -> None:
    call = ["encode", str(folder / "images.npz"), "--vae", str(folder), "--out", str(tmp_path / "f"), "--device", "cpu"]
    done = CliRunner().invoke(app, [*call, "--json"])
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["images"], told["made"], told["shape"]) == (40, 40, [2, 4, 4])
    again = CliRunner().invoke(app, call)
    assert again.exit_code == 0
    assert "nothing to do" in again.stdout
