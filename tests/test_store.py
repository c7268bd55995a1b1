"""Denoisers on disk: exact round trips, and every way a file can be wrong."""

from __future__ import annotations

import errno
import json
import math
import os

import pytest
import torch

from logsnr import files, load, writing
from logsnr.adapters.diffusers.export import export_diffusers
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.models import UNetConfig, build_network, load_denoiser, save_denoiser
from logsnr.models.card import prediction_from_json, prediction_to_json
from logsnr.pixels import Pixels
from logsnr.predictions import EDM, X0, Eps, Flow, V
from logsnr.timesteps import TimestepTable


def make(seed=0, width=8, prediction=None, trained_range=(0.01, 50.0), **options):
    config = UNetConfig(
        channels=(width,), layers_per_block=1, mid_attention=False, norm_groups=4, fourier=(1,), classes=3
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_network(config, (1, 4, 4))
        torch.nn.init.normal_(network.unet.conv_out.weight)
    return NetworkDenoiser(
        network,
        prediction or EDM(sigma_data=0.7, label="flow"),
        shape=(1, 4, 4),
        pixels=Pixels(17),
        trained_range=trained_range,
        **options,
    ).eval()


def answer(denoiser):
    z = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        return denoiser(z, 0.6, class_labels=torch.tensor([0, 3])).x0


def weight_file(folder):
    (path,) = folder.glob("*.safetensors")
    return path


def edit_card(folder, **changes):
    path = folder / "card.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_round_trip_is_exact(tmp_path):
    saved = make(sigma_data=0.3)
    save_denoiser(saved, tmp_path / "new" / "folder", step=12, training={"batch": 3})
    loaded = load_denoiser(tmp_path / "new" / "folder")
    assert torch.equal(answer(saved), answer(loaded))
    assert loaded.prediction == saved.prediction
    assert (loaded.shape, loaded.pixels, loaded.sigma_data) == ((1, 4, 4), Pixels(17), 0.3)
    assert loaded.trained_range == (0.01, 50.0)
    assert not loaded.training
    assert not any(p.requires_grad for p in loaded.parameters())
    assert loaded.card["step"] == 12
    assert loaded.card["training"] == {"batch": 3}
    assert (loaded.card["classes"], loaded.card["null_class"]) == (3, 3)


def test_loading_leaves_the_global_generator_alone(tmp_path):
    save_denoiser(make(), tmp_path)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        expected = torch.rand(4)
        torch.manual_seed(3)
        load_denoiser(tmp_path)
        assert torch.equal(torch.rand(4), expected)


def test_an_infinite_trained_range_survives(tmp_path):
    save_denoiser(make(trained_range=(0.0, math.inf)), tmp_path)
    assert load_denoiser(tmp_path).trained_range == (0.0, math.inf)


@pytest.mark.parametrize(
    "prediction",
    [Eps(label="ddpm"), X0(path="ve"), V(path="flow", label="edm"), Flow(reverse=True), EDM(sigma_data=0.31)],
)
def test_predictions_round_trip_through_json(prediction):
    assert prediction_from_json(json.loads(json.dumps(prediction_to_json(prediction)))) == prediction


def test_a_table_label_is_stored_as_its_numbers():
    table = TimestepTable(torch.linspace(0.9, 0.1, 7, dtype=torch.float64).sqrt(), name="mine")
    restored = prediction_from_json(json.loads(json.dumps(prediction_to_json(V(label=table))))).label
    assert torch.equal(restored.alphas_cumprod, table.alphas_cumprod)
    assert restored.name == "mine"


def test_a_custom_label_cannot_be_stored(tmp_path):
    with pytest.raises(LogsnrError, match=r"is a function, which a file cannot hold: use a name .*or a TimestepTable"):
        save_denoiser(make(prediction=V(label=lambda sigma: sigma)), tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_foreign_network_cannot_be_stored(tmp_path):
    denoiser = NetworkDenoiser(torch.nn.Linear(2, 2), V(), shape=(2,))
    with pytest.raises(LogsnrError, match=r"a Linear cannot be saved: only networks of build_network"):
        save_denoiser(denoiser, tmp_path)


def test_a_newer_save_replaces_the_older_and_leaves_one_weight_file(tmp_path):
    save_denoiser(make(seed=0), tmp_path, step=1)
    newer = make(seed=1)
    save_denoiser(newer, tmp_path, step=2)
    assert weight_file(tmp_path).name.startswith("model-00000002-")
    assert torch.equal(answer(load_denoiser(tmp_path)), answer(newer))


def test_a_flipped_bit_is_found(tmp_path):
    save_denoiser(make(), tmp_path)
    path = weight_file(tmp_path)
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    with pytest.raises(LogsnrError, match=r"SHA-256 .* its card says .*flipped bit.*copy it again"):
        load_denoiser(tmp_path)


def test_a_truncated_file_is_found(tmp_path):
    save_denoiser(make(), tmp_path)
    path = weight_file(tmp_path)
    size = path.stat().st_size
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(LogsnrError, match=f"has {size - 100} bytes, its card says {size}: the file is truncated"):
        load_denoiser(tmp_path)


def test_a_missing_weight_file_is_named(tmp_path):
    save_denoiser(make(), tmp_path)
    path = weight_file(tmp_path)
    path.unlink()
    with pytest.raises(LogsnrError, match=f"card.json names {path.name}, which cannot be read"):
        load_denoiser(tmp_path)


def test_the_checkpoint_of_another_network_is_refused_by_name(tmp_path):
    save_denoiser(make(width=8), tmp_path)
    edit_card(tmp_path, network={**json.loads((tmp_path / "card.json").read_text())["network"], "channels": [16]})
    with pytest.raises(
        LogsnrError, match=r"another network .*conv_in.weight has shape \(8, 3, 3, 3\) instead of \(16, 3, 3, 3\)"
    ):
        load_denoiser(tmp_path)
    edit_card(
        tmp_path,
        network={"channels": [8], "classes": 3, "layers_per_block": 2, "mid_attention": False, "norm_groups": 4},
    )
    with pytest.raises(LogsnrError, match=r"is missing;.* and \d+ more; restore the matching pair"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"format": 99}, r"has format 99, of a newer logsnr \(this one reads 1\): pip install"),
        ({"format": 0}, "has format 0, this version reads format 1: restore it"),
        ({"kind": "state"}, "is not the card of a denoiser"),
        ({"weights": {"file": "x"}}, "names no weight file"),
        ({"weights": {"file": "../x", "sha256": "", "bytes": 0}}, "must lie in the card's own folder"),
        ({"network": {"chanels": [8]}}, "card.json cannot be read as the description of a denoiser .*chanels"),
        ({"prediction": {"name": "epsilon"}}, "prediction 'epsilon' is not one of eps, x0"),
        (
            {"prediction": {"name": "v", "sigma_dat": 1}},
            "field of prediction v 'sigma_dat' is not one of label, path",
        ),
        ({"shape": None}, "cannot be read as the description of a denoiser"),
        ({"prediction": {"name": "v", "label": ["flow"]}}, r"label of prediction v = \['flow'\]: give a name"),
        ({"classes": "3"}, "classes = '3', the network's is 3"),
        ({"training": "digits"}, "training = 'digits' is no mapping"),
        ({"sigma_data": -1}, "sigma_data -1.0 is none"),
    ],
)
def test_cards_that_are_wrong(tmp_path, changes, message):
    save_denoiser(make(), tmp_path)
    edit_card(tmp_path, **changes)
    with pytest.raises(LogsnrError, match=message):
        load_denoiser(tmp_path)


def test_cards_that_are_not_cards(tmp_path):
    with pytest.raises(LogsnrError, match=r"card.json does not exist: give the folder of a run"):
        load_denoiser(tmp_path)
    (tmp_path / "card.json").write_text('{"format": 1, ')
    with pytest.raises(LogsnrError, match="cannot be read as a JSON card"):
        load_denoiser(tmp_path)
    (tmp_path / "card.json").write_text("[1]")
    with pytest.raises(LogsnrError, match=r"card.json holds a list, no mapping"):
        load_denoiser(tmp_path)
    (tmp_path / "card.json").write_text("{}")
    with pytest.raises(LogsnrError, match="not a card of this library"):
        load_denoiser(tmp_path)


@pytest.mark.parametrize("failing", ["weights", "weights rename", "card", "card rename"])
def test_a_full_disk_leaves_the_previous_checkpoint(tmp_path, monkeypatch, failing):
    old = make(seed=0)
    save_denoiser(old, tmp_path, step=1)
    before = sorted(path.name for path in tmp_path.iterdir())
    suffix = ".safetensors" if failing.startswith("weights") else ".json"
    full = OSError(errno.ENOSPC, "No space left on device")
    real_replace, real_fsync = os.replace, os.fsync
    opened = []

    def replace(source, target):
        if failing.endswith("rename") and str(target).endswith(suffix):
            raise full
        real_replace(source, target)

    def fsync(handle):
        opened.append(handle)
        # Weights are flushed first (call 1, their folder is call 2), the card third.
        if not failing.endswith("rename") and len(opened) == (1 if suffix == ".safetensors" else 3):
            raise full
        real_fsync(handle)

    monkeypatch.setattr(writing.os, "replace", replace)
    monkeypatch.setattr(writing.os, "fsync", fsync)
    with pytest.raises(
        LogsnrError, match=r"cannot write .*No space left on device; the checkpoint before it is intact"
    ):
        save_denoiser(make(seed=1), tmp_path, step=2)
    monkeypatch.undo()
    assert torch.equal(answer(load_denoiser(tmp_path)), answer(old))
    assert set(before) <= {path.name for path in tmp_path.iterdir()}
    assert not list(tmp_path.glob(".*.tmp"))

    # The next save succeeds and clears what the failed one left.
    newer = make(seed=2)
    save_denoiser(newer, tmp_path, step=3)
    assert len(list(tmp_path.iterdir())) == 2
    assert torch.equal(answer(load_denoiser(tmp_path)), answer(newer))


def test_a_kill_between_weights_and_card_leaves_the_previous_checkpoint(tmp_path, monkeypatch):
    old = make(seed=0)
    save_denoiser(old, tmp_path, step=1)
    real = files.replace_file

    def killed(path, data):
        if path.name == "card.json":
            raise KeyboardInterrupt
        real(path, data)

    monkeypatch.setattr(files, "replace_file", killed)
    with pytest.raises(KeyboardInterrupt):
        save_denoiser(make(seed=1), tmp_path, step=2)
    assert torch.equal(answer(load_denoiser(tmp_path)), answer(old))


@pytest.mark.skipif(os.name != "posix", reason="permissions of other systems")
@pytest.mark.parametrize("umask", [0o022, 0o077])
def test_files_have_the_permissions_that_the_user_gives(tmp_path, umask):
    before = os.umask(umask)
    try:
        save_denoiser(make(), tmp_path / "run")
        export_diffusers(load("zoo:digits"), tmp_path / "pipeline", class_label=3)
    finally:
        os.umask(before)
    for path in (p for folder in ("run", "pipeline") for p in (tmp_path / folder, *(tmp_path / folder).rglob("*"))):
        assert path.stat().st_mode & 0o777 == (0o777 if path.is_dir() else 0o666) & ~umask, path


@pytest.mark.parametrize("source", ["/home/someone/data/x.npz", "~/data/x.npz", "data/x.npz", "digits"])
def test_a_card_keeps_of_a_place_the_name_alone(tmp_path, source):
    recipe = {"data": {"source": source, "flip": True}, "steps": 1, "init_from": f"/home/someone/{source}"}
    save_denoiser(make(), tmp_path, training=recipe)
    kept = load_denoiser(tmp_path).card["training"]
    assert kept["data"]["source"] == ("x.npz" if source[0] in "/~" else source)
    assert recipe["data"]["source"] == source
    assert kept["init_from"] == source.rpartition("/")[2]
    assert {**kept, "data": None, "init_from": None} == {**recipe, "data": None, "init_from": None}
