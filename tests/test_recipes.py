"""Recipes that come with the library: sizes against published ones, rows of papers, costs, smoke tests, reference."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

import logsnr as ls
from logsnr.errors import LogsnrError
from logsnr.models import DiTConfig, build_network
from logsnr.models.networks import NETWORKS, OWN
from logsnr.models.stock import obstacles, told_stock
from logsnr.paths import recipe_names
from logsnr.training import load_data, load_recipe
from logsnr.training.config import Recipe, recipe_from, recipe_text
from logsnr.training.costs import cost_of, samples_of
from logsnr.training.objectives import build_objective, build_prediction
from logsnr.training.reference import UNITS, documented, reference

DOCS = Path(__file__).parents[1] / "docs"
EVERY = recipe_names()
LIGHT = ("digits", "fashion_mnist", "imagenet256_latent")


def parameters(name):
    """Of a recipe's network, built without numbers."""
    recipe = load_recipe(name)
    shape, classes = samples_of(recipe)
    with torch.device("meta"):
        network = build_network(recipe.network.model_copy(update={"classes": classes}), shape)
    return sum(p.numel() for p in network.parameters())


ATTENTION = 4 * (256 * 256 + 256) + 2 * 256
DDPMPP = {
    "attention behind each block on the way up at 16 x 16": 4 * ATTENTION,
    "the first convolution": 28 * 128,
    "the first block, entered by 256": 2 * 128 + 9 * 128 * 256 - (128 * 256 + 256),
    "the last block, with a skip of 256": 2 * 128 + 9 * 128 * 256 + 128 * 256,
    "sinusoids of the label": 128 * 512,
    "short cuts where blocks halve and double": -4 * (256 * 256 + 256),
    "what tells EDM's network its augmentation": -9 * 128,
}
PUBLISHED = {  # the paper's count; what ours has more, by name
    "cifar10": (55_733_891, DDPMPP),
    "imagenet64": (295_900_000, {}),
    "celeba64": (78_700_000, {}),
    "imagenet256_latent": (675_129_632, {"no learned variance": -(1152 * 16 + 16), "positions": -256 * 1152}),
    "imagenet128": (2_000_000_000, {"modulations by the condition": 36 * (1024 * 6 * 2048 + 6 * 2048)}),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_networks_have_the_published_size(name):
    published, more = PUBLISHED[name]
    within = {"imagenet64": 1e-4, "celeba64": 1e-4, "imagenet128": 0.08}.get(name, 0)  # "295.9 M", "78.7 M", "2B"
    assert parameters(name) - sum(more.values()) == pytest.approx(published, rel=within, abs=0)


def test_the_flops_of_a_dit_are_its_products():
    """Two of a multiplication and a sum, in closed form; and so are the bytes of its state."""
    w, n, c, depth, classes = 32, 16, 4, 3, 10
    network = {"kind": "dit", "width": w, "depth": depth, "heads": 2, "patch": 2}
    recipe = recipe_from(
        {"data": {"source": "x.npz", "shape": [c, 8, 8], "classes": classes}, "network": network, "conditional": True,
         "steps": 10, "batch": 7, "ema": {"others": {"long": 1e6}}}
    )  # fmt: skip
    cost = cost_of(recipe)
    block = 6 * w * w + n * (4 * w * w + 8 * w * w) + 2 * n * n * w
    expected = 2 * (2 * n * 4 * c * w + 256 * w + w * w + depth * block + 2 * w * w)
    assert (cost.flops, cost.training_flops) == (expected, 3 * expected * 7 * 10)
    built = build_network(DiTConfig(**network, classes=classes), (c, 8, 8))
    assert cost.parameters == sum(p.numel() for p in built.parameters())
    assert cost.state_bytes == 4 * cost.parameters * 6  # weights, gradients, two moments, two averages
    assert cost.image_bytes > 4 * n * w * depth


def rows(name):
    """Options of a recipe in the tables of docs/recipes.md."""
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    section = next(part for part in text.split("\n## ") if f"`logsnr train {name}` ..." in part)
    lines = [line for line in section.splitlines() if line.startswith("|")][2:]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    options = [[word for word in shlex.split(row[-1].strip("`")) if word != "--set"] for row in cells]
    return [(row, option) for row, option in zip(cells, options, strict=True)]


def test_every_row_of_table_2_is_a_recipe():
    """Output, density and weighting are those of the row, the weighting by its formula."""
    found = rows("imagenet64")
    assert len(found) == 15
    level = torch.tensor([-6.0, -1.0, 0.5, 4.0], dtype=torch.float64)
    formulas = {
        "sech(l/2)": 1 / torch.cosh(level / 2), "exp(-l/2)": torch.exp(-level / 2),
        "EDM": torch.exp(-((level - 2.4) ** 2) / (2 * 2.4**2)) * (torch.exp(-level) + 0.25),
    }  # fmt: skip
    peak = torch.tensor(-3.3077775, dtype=torch.float64)
    held = level.clamp(min=peak)
    formulas["EDM-monotonic"] = torch.exp(-((held - 2.4) ** 2) / (2 * 2.4**2)) * (torch.exp(-held) + 0.25)
    formulas |= {f"sigmoid(-l + {k})": torch.sigmoid(k - level) for k in range(1, 6)}
    for (output, density, weighting, *_), options in found:
        recipe = load_recipe("imagenet64", options)
        objective = build_objective(recipe.objective, dim=12, sigma_data=0.5)
        w = objective.weighting(level)
        torch.testing.assert_close(w / w[0], formulas[weighting] / formulas[weighting][0], rtol=1e-6, atol=0)
        assert {"eps": "eps", "F": "edm", "v": "v"}[output] == build_prediction(recipe.prediction, sigma_data=0.5).name
        kinds = {"adaptive": "Adaptive", "cosine": "Cosine", "EDM": "EDMTraining"}
        assert type(objective.schedule).__name__.startswith(kinds[density]) or kinds[density] in repr(
            objective.schedule
        )


@pytest.mark.parametrize("side", [128, 256, 512])
def test_weightings_of_larger_images_are_shifted(side):
    recipe = load_recipe(f"imagenet{side}")
    plain = load_recipe("imagenet64").objective
    level = torch.tensor([-6.0, -1.0, 4.0], dtype=torch.float64)
    shift = 2 * torch.tensor(64 / side).log().item()
    mine, base = (build_objective(each, dim=12, sigma_data=0.5).weighting for each in (recipe.objective, plain))
    torch.testing.assert_close(mine(level + shift), base(level), rtol=2e-3, atol=0)
    for _, options in rows("imagenet128"):
        build_objective(load_recipe("imagenet128", options).objective, dim=12, sigma_data=0.5)


@pytest.mark.parametrize("name", EVERY)
def test_a_printed_recipe_is_the_recipe(name, tmp_path):
    recipe = load_recipe(name)
    (tmp_path / "all.yaml").write_text(recipe_text(recipe))
    assert load_recipe(tmp_path / "all.yaml") == recipe
    assert yaml.safe_load(recipe_text(recipe)).keys() == Recipe.model_fields.keys()


def test_recipes_are_listed_with_their_facts():
    """In docs/recipes.md each has its line in both tables; in the file literature and hardware."""
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    for name in EVERY:
        assert len(re.findall(rf"^\| `{name}` \|", text, re.MULTILINE)) == 2, name


def denoiser_of(name):
    recipe = load_recipe(name)
    shape, classes = samples_of(recipe)
    with torch.device("meta"):
        network = build_network(recipe.network.shrunk().model_copy(update={"classes": classes}), shape)
    return ls.NetworkDenoiser(network, build_prediction(recipe.prediction, sigma_data=0.5), shape=shape,
                              trained_range=(0.002, 150.0))  # fmt: skip


@pytest.mark.parametrize("name", EVERY)
def test_whether_stock_diffusers_can_sample_it(name):
    fits = name in ("digits", "images", "cifar10", "celeba64")
    assert (obstacles(denoiser_of(name)) == []) == fits
    assert told_stock(denoiser_of(name)).startswith("stock diffusers can sample" if fits else "stock diffusers cannot")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if name in LIGHT else [pytest.mark.heavy]) for name in EVERY]
)
def test_smoke(name, run):
    code, out, err = run("train", name, "--smoke")
    assert code == 0, err
    assert re.match(r"smoke: 20 steps in .*; saved and loaded\n$", out)
    assert "drawn for a smoke test" in err
    assert "stock diffusers can" in err


@pytest.mark.heavy
@pytest.mark.parametrize("name", EVERY)
def test_dry_run(name, run):
    """What is printed is what docs/recipes.md says."""
    code, out, err = run("train", name, "--dry-run", "--json")
    assert code == 0, err
    cost = yaml.safe_load(out)
    text = (DOCS / "recipes.md").read_text(encoding="utf-8")
    row = re.search(rf"^\| `{name}` \|(.*)\|$", text, re.MULTILINE)[1].split("|")
    million, gflops, images = (float(re.sub(r"[ ,M]", "", cell)) for cell in row[2:5])
    assert cost["parameters"] / 1e6 == pytest.approx(million, rel=0.01)
    assert cost["flops"] / 1e9 == pytest.approx(gflops, rel=0.03)
    assert cost["batch"] * cost["steps"] / 1e6 == pytest.approx(images, rel=0.03)


def test_the_command_prints_config_and_cost(run):
    code, out, _ = run("train", "digits", "--print-config", "--set", "optimizer.lr=0.25")
    assert (code, yaml.safe_load(out)["optimizer"]["lr"]) == (0, 0.25)
    code, out, _ = run("train", "digits", "--dry-run")
    assert code == 0
    assert "parameters       705,985\n" in out
    code, _, err = run("train", "cifar10", "--dry-run", "--set", "data.shape=null")
    assert code == 2
    assert "or say what they are: data.shape: [3, 32, 32], data.classes: 10" in err


def test_data_that_are_not_what_a_recipe_expects():
    for change, said in (
        ({"shape": (3, 8, 8)}, r"has images of \[1, 8, 8\]"),
        ({"classes": 9}, "labels of 10 classes"),
    ):
        with pytest.raises(LogsnrError, match=said):
            load_data(load_recipe("digits").data.model_copy(update=change))


def test_the_reference_is_what_the_command_prints(run):
    """Run `logsnr recipes --reference > docs/recipe-reference.md` after changing a section of recipes."""
    code, out, _ = run("recipes", "--reference")
    assert (code, out) == (0, reference())
    assert (DOCS / "recipe-reference.md").read_text(encoding="utf-8") == out
    for row in re.findall(r"^\| `.*", out, re.MULTILINE):
        _, key, meaning, _, default, allowed, _ = re.split(r"(?<!\\)\|", row)
        assert all(cell.strip() for cell in (key, meaning, default, allowed)), row
    for config in [*(entry.config for entry in NETWORKS.values()), OWN.config]:
        assert documented(config)[1].keys() >= config.model_fields.keys()
    known = {f"network.{key}" for entry in NETWORKS.values() for key in entry.config.model_fields}
    assert {key for key in UNITS if key.startswith("network.")} <= known
    assert shlex.split("logsnr recipes --reference")[1] in out
