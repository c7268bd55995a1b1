"""Feature spaces by name: what each shows its network, what it makes of it, and what tells it from the others."""

import hashlib

import pytest
import torch
from torch.nn import functional as F

from logsnr.errors import LogsnrError
from logsnr.evaluation.features import Material, find_space, torchscript
from logsnr.evaluation.features.space import hashed, resized
from logsnr.pixels import Pixels


def images(n, size, channels=3, levels=256, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, levels, (n, channels, size, size), generator=g, dtype=torch.uint8)


def space(name, levels=256, **material):
    return find_space(name, Material(pixels=Pixels(levels), **material))


class Plain(torch.nn.Module):
    """Means of the channels, as a network without options would give."""

    def forward(self, x):
        assert x.dtype == torch.uint8
        return x.float().mean((2, 3))


class Published(torch.nn.Module):
    """Called as the published Inception-v3 is."""

    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(3, 5)

    def forward(self, img: torch.Tensor, return_features: bool = False, no_output_bias: bool = False):
        features = img.float().mean((2, 3)) / 255
        if return_features:
            return features
        logits = features @ self.head.weight.T
        if not no_output_bias:
            logits = logits + self.head.bias
        return logits.softmax(1)


def scripted(module, path):
    torch.jit.script(module).save(str(path))
    return path


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    torch.manual_seed(0)
    return scripted(Published(), tmp_path_factory.mktemp("nets") / "detector.pt")


def test_a_plain_network_is_called_on_the_images_alone(tmp_path):
    file = scripted(Plain(), tmp_path / "plain.pt")
    found = space(f"torchscript:{file}")
    stored = images(4, 8)
    assert torch.equal(found(stored), stored.float().mean((2, 3)))
    assert (found.name, found.probabilities, found.inception) == ("plain.pt", None, False)
    assert found.weights == hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.frechet == "FD (features: plain.pt)"


def test_the_published_way_of_calling_is_known_by_its_words(published):
    """Features, and class probabilities without the last bias; grey images in three channels, of 255 levels."""
    found = space(f"torchscript:{published}", levels=17)
    grey = images(4, 8, channels=1, levels=17)
    seen = Pixels(17).display(grey).expand(-1, 3, -1, -1)
    network = torch.jit.load(str(published))
    assert torch.equal(found(grey), network(seen, return_features=True))
    assert torch.equal(found.probabilities(grey), network(seen, no_output_bias=True))
    assert not torch.allclose(found.probabilities(grey), network(seen))


def test_fid_is_said_of_the_published_file_alone(published, monkeypatch):
    monkeypatch.setattr(torchscript, "INCEPTION", hashlib.sha256(published.read_bytes()).hexdigest())
    found = space(f"torchscript:{published}")
    assert (found.inception, found.frechet, found.name) == (True, "FID", "Inception-v3 of 2015-12-05")


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (None, "missing.pt does not exist: give a file of torch.jit.save"),
        (b"not a network", "x.pt cannot be read as TorchScript"),
    ],
)
def test_files_that_are_no_network(tmp_path, data, said):
    path = tmp_path / ("x.pt" if data else "missing.pt")
    if data:
        path.write_bytes(data)
    with pytest.raises(LogsnrError, match=said) as caught:
        space(f"torchscript:{path}")
    assert "\n" not in str(caught.value)


def test_what_a_network_cannot_take_or_gives_is_one_line(tmp_path):
    class Twice(torch.nn.Module):
        def forward(self, x):
            return x.float().mean(), x

    class Wide(torch.nn.Module):
        def forward(self, x):
            return x.float().flatten(1) @ torch.ones(7, 2)

    class Map(torch.nn.Module):
        def forward(self, x):
            return x.float()

    for module, said in (
        (Twice(), "answers with a tuple"),
        (Wide(), "x.pt of uint8 images .*cannot be multiplied"),
        (Map(), "it must be"),
    ):
        found = space(f"torchscript:{scripted(module, tmp_path / 'x.pt')}")
        with pytest.raises(LogsnrError, match=said) as caught:
            found(images(2, 4))
        assert "\n" not in str(caught.value)
    with pytest.raises(LogsnrError, match="give grey or RGB images"):
        found(images(2, 4, channels=4))


def test_resizing_is_antialiased_and_stays_within_the_levels():
    noise = images(1, 128)
    small = resized(noise, (16, 16))
    assert float(small.var() / noise.float().var()) < 1 / 16
    edge = torch.zeros(1, 3, 8, 8, dtype=torch.uint8)
    edge[..., 4:] = 255
    large = resized(edge, (64, 64))
    assert (float(large.min()), float(large.max())) == (0, 255)
    assert resized(noise, (128, 128)).equal(noise.float())


@pytest.fixture(scope="module")
def vision(tmp_path_factory):
    """Tiny random networks of the hub's kinds, in folders."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    size = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 16, "patch_size": 8}
    made = {
        "vit": transformers.ViTModel(transformers.ViTConfig(**size, intermediate_size=8)),
        "unpooled": transformers.ViTModel(transformers.ViTConfig(**size, intermediate_size=8), add_pooling_layer=False),
        "dinov2": transformers.Dinov2Model(transformers.Dinov2Config(**size, mlp_ratio=1)),
        "clip-vision": transformers.CLIPVisionModel(transformers.CLIPVisionConfig(**size, intermediate_size=8)),
        "clip": transformers.CLIPModel(
            transformers.CLIPConfig(
                vision_config={**size, "intermediate_size": 8},
                text_config={
                    "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2,
                    "vocab_size": 10,
                },
                projection_dim=6,
            )
        ),
    }  # fmt: skip
    folder = tmp_path_factory.mktemp("vision")
    for name, model in made.items():
        model.eval().save_pretrained(folder / name)
    processor = '{"size": {"shortest_edge": 20}, "crop_size": {"height": 16, "width": 16}, "do_center_crop": true, '
    for name in ("dinov2", "clip"):
        (folder / name / "preprocessor_config.json").write_text(
            processor + '"image_mean": [0.1, 0.2, 0.3], "image_std": [0.4, 0.5, 0.6]}'
        )
    return folder, made


@pytest.mark.parametrize("name", ["vit", "unpooled", "dinov2", "clip-vision", "clip"])
def test_networks_of_the_hub_are_asked_as_transformers_asks_them(vision, name):
    folder, made = vision
    own = name in ("dinov2", "clip")
    mean, std = ((0.1, 0.2, 0.3), (0.4, 0.5, 0.6)) if own else ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    stored = images(3, 24)
    x = F.interpolate(stored.float(), (16, 16), mode="bicubic", antialias=True).clamp(0, 255) / 255
    x = (x - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    with torch.no_grad():
        if name == "clip":
            expected = made[name].visual_projection(made[name].vision_model(pixel_values=x).pooler_output)
        else:
            out = made[name](pixel_values=x)
            expected = out.last_hidden_state[:, 0] if name == "unpooled" else out.pooler_output
    found = space(f"hf:{folder / name}")
    assert torch.allclose(found(stored), expected, atol=1e-5)
    assert found.name == name
    assert "the whole image at 16 x 16 (bicubic, antialiased)" in found.sees
    assert found(stored[:1]).shape == (1, 6 if name == "clip" else 8)


def test_a_network_that_is_not_there(tmp_path):
    pytest.importorskip("transformers")
    with pytest.raises(LogsnrError, match=r"features hf:.* cannot be loaded .*: give a name on the hub or a folder"):
        space(f"hf:{tmp_path}")


def test_a_space_is_told_by_its_weights_and_what_it_sees(published, tmp_path):
    """Whatever a file is called; without weights, by the name."""
    again = tmp_path / "other.pt"
    again.write_bytes(published.read_bytes())
    one, other = (space(f"torchscript:{file}") for file in (published, again))
    assert one.hash == other.hash
    plain = space(f"torchscript:{scripted(Plain(), tmp_path / 'plain.pt')}")
    hashes = {one.hash, plain.hash, space("pixels").hash, space("pixels", 17).hash}
    assert len(hashes) == 4
    assert hashed({"name": "a", "sees": "x", "weights": ""}) != hashed({"name": "b", "sees": "x", "weights": ""})
