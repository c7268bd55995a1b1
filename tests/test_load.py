"""Loading by where a model lives."""

from __future__ import annotations

import pytest
import torch

import logsnr
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.models import NetworkConfig, build_network, save_denoiser
from logsnr.pixels import Pixels
from logsnr.prediction import V


def save(folder, levels=17):
    config = NetworkConfig(channels=(8,), layers_per_block=1, mid_attention=False, norm_groups=4)
    with torch.random.fork_rng(devices=[]):
        network = build_network(config, (1, 4, 4))
    pixels = Pixels(levels) if levels else None
    save_denoiser(NetworkDenoiser(network, V(label="flow"), shape=(1, 4, 4), pixels=pixels), folder, step=7)


def test_a_run_comes_back_with_its_codec_and_card(tmp_path):
    save(tmp_path / "digits")
    denoiser = logsnr.load(tmp_path / "digits")
    images = torch.arange(17, dtype=torch.uint8).reshape(17, 1, 1, 1).expand(17, 1, 4, 4)
    assert torch.equal(denoiser.decode(denoiser.encode(images)), images)
    assert denoiser.encode(images)[0, 0, 0, 0] == pytest.approx(1 / 17 - 1)
    assert denoiser.card["step"] == 7
    assert not denoiser.training
    assert logsnr.load(str(tmp_path / "digits")).card == denoiser.card


def test_a_denoiser_without_a_codec_says_so(tmp_path):
    save(tmp_path, levels=None)
    denoiser = logsnr.load(tmp_path)
    with pytest.raises(ValueError, match=r"no pixel codec: build it with pixels=Pixels\(levels\)"):
        denoiser.encode(torch.zeros(1, 1, 4, 4, dtype=torch.uint8))
    with pytest.raises(ValueError, match="no pixel codec"):
        denoiser.decode(torch.zeros(1, 1, 4, 4))


def test_a_missing_folder_lists_what_is_there(tmp_path):
    for name in ("digits", "fashion"):
        save(tmp_path / name)
    for asked in (tmp_path / "digit", tmp_path):
        with pytest.raises(
            LogsnrError, match=r"is not the folder of a run .*there are .*digits, .*fashion; give one of"
        ):
            logsnr.load(asked)


def test_nothing_nearby(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LogsnrError, match=r"'nowhere/at/all' is not the folder of a run \(no card.json\); give one of"):
        logsnr.load("nowhere/at/all")


def test_sources_to_come_say_so(tmp_path):
    with pytest.raises(LogsnrError, match="'zoo:digits': published models are not available yet; train one"):
        logsnr.load("zoo:digits")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(LogsnrError, match="is a diffusers pipeline, which load does not read yet: wrap its network"):
        logsnr.load(tmp_path)
