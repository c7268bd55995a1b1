"""Loading by where a model lives."""

from __future__ import annotations

import contextlib
import json

import pytest
import torch

import logsnr
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.models import UNetConfig, build_network, save_denoiser
from logsnr.pixels import Pixels
from logsnr.predictions import V


def save(folder, grey_levels=17):
    config = UNetConfig(channels=(8,), layers_per_block=1, mid_attention=False, norm_groups=4)
    with torch.random.fork_rng(devices=[]):
        network = build_network(config, (1, 4, 4))
    pixels = Pixels(grey_levels) if grey_levels else None
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


def test_a_card_of_version_0_1_calls_grey_levels_levels(tmp_path):
    save(tmp_path)
    path = tmp_path / "card.json"
    card = json.loads(path.read_text())
    card["levels"] = card.pop("grey_levels")
    path.write_text(json.dumps(card))
    denoiser = logsnr.load(tmp_path)
    assert denoiser.pixels == Pixels(17)
    assert denoiser.card["grey_levels"] == 17


def test_a_denoiser_without_a_codec_says_so(tmp_path):
    save(tmp_path, grey_levels=None)
    denoiser = logsnr.load(tmp_path)
    with pytest.raises(ValueError, match=r"no pixel codec: give it one, pixels=Pixels\(grey_levels\)"):
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


def test_a_run_goes_where_it_is_asked(tmp_path):
    save(tmp_path)
    denoiser = logsnr.load(tmp_path, device="cpu", dtype=torch.float64)
    assert all(parameter.dtype == torch.float64 for parameter in denoiser.parameters())


def test_a_run_has_no_prompt(tmp_path):
    save(tmp_path)
    with pytest.raises(LogsnrError, match=r"guidance = 2.0: .* is the folder of a run, .* guidance is logsnr.guidance"):
        logsnr.load(tmp_path, guidance=2.0)


def test_a_model_that_is_not_in_the_zoo_says_so():
    with pytest.raises(LogsnrError, match=r"'zoo:nothing' is not one of zoo:digits, "):
        logsnr.load("zoo:nothing")


def test_a_broken_pipeline_says_so(tmp_path):
    pytest.importorskip("diffusers")
    (tmp_path / "model_index.json").write_text("{}")
    with pytest.raises(LogsnrError, match=r"cannot be loaded as a diffusers pipeline .*save_pretrained wrote") as error:
        logsnr.load(tmp_path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("file", ["config.json", "scheduler_config.json"])
def test_a_component_is_no_pipeline(tmp_path, file):
    (tmp_path / file).write_text("{}")
    with pytest.raises(LogsnrError, match="one component of a diffusers pipeline: give the folder above it"):
        logsnr.load(tmp_path)


@pytest.mark.parametrize(("version", "word"), [("0.41.0", "torch_dtype"), ("0.42.0", "dtype"), ("1.0.0", "dtype")])
def test_a_hub_id_reaches_diffusers_unchanged(monkeypatch, version, word):
    """The loading is diffusers' own; here it is only seen what it is asked for."""
    diffusers = pytest.importorskip("diffusers")
    asked = []

    def from_pretrained(name, **options):
        asked.append((name, options))
        raise OSError("no such repository")

    monkeypatch.setattr(diffusers.DiffusionPipeline, "from_pretrained", from_pretrained)
    monkeypatch.setattr(diffusers, "__version__", version)
    with pytest.raises(
        LogsnrError, match=r"'owner/some-model.v2' cannot be loaded .*\(OSError: no such repository\): give"
    ):
        logsnr.load("owner/some-model.v2", dtype=torch.float16)
    assert asked == [("owner/some-model.v2", {word: torch.float16})]


def test_a_misspelt_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch):
    save(tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LogsnrError, match=r"'runs/digit' is not the folder of a run .*there are .*digits"):
        logsnr.load("runs/digit")


@pytest.mark.parametrize("typed", ["run/digits", "Runs/digits", "rums/digits", "models/digits", "elsewhere/digits"])
def test_what_looks_like_a_folder_here_never_asks_the_hub(tmp_path, monkeypatch, typed):
    """A folder nearly of that name, one that people keep models in, or one that holds such a model."""
    save(tmp_path / "runs" / "digits")
    monkeypatch.chdir(tmp_path)
    asked = []
    monkeypatch.setattr("logsnr.adapters.diffusers.pipelines.load_pipeline", lambda name, **_: asked.append(name))
    with pytest.raises(LogsnrError, match=rf"'{typed}' is not the folder of a run .*, hub:{typed} for the hub's"):
        logsnr.load(typed)
    assert asked == []
    with contextlib.suppress(AttributeError):  # it is no denoiser that comes back
        logsnr.load(f"hub:{typed}")
    assert asked == [typed]
