"""`logsnr sample` on diffusers pipelines, and guidance of class-conditional runs: the Python calls they stand for."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import logsnr as ls
from logsnr.adapters.diffusers.export import export_diffusers
from logsnr.denoiser import NetworkDenoiser
from logsnr.models import UNetConfig, build_network, save_denoiser
from logsnr.pixels import Pixels
from logsnr.predictions import EDM
from logsnr.sampling import generators

pytest.importorskip("diffusers")
pytest.importorskip("transformers")

PROMPT, NEGATIVE = "a red fox", "blurry"


@pytest.fixture(scope="module")
def sd(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pipelines") / "sd"
    sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
    try:
        import tiny
    finally:
        sys.path.pop(0)
    tiny.stable_diffusion().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def conditional(tmp_path_factory):
    """A class-conditional run of an EDM network that does something."""
    folder = tmp_path_factory.mktemp("runs") / "three"
    config = UNetConfig(channels=(8,), layers_per_block=1, mid_attention=False, norm_groups=4, classes=3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = build_network(config, (1, 4, 4))
        torch.nn.init.normal_(network.unet.conv_out.weight, std=0.3)
        torch.nn.init.normal_(network.unet.class_embedding.weight, std=3.0)
    denoiser = NetworkDenoiser(network, EDM(sigma_data=0.7), shape=(1, 4, 4), pixels=Pixels(17))
    save_denoiser(denoiser.eval(), folder, step=1)
    return folder


def noise(denoiser, n: int, seed: int) -> torch.Tensor:
    return torch.randn(n, *denoiser.shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("options", "loading", "evaluations"),
    [
        ([], {}, 3),
        (["--guidance", 4], {"guidance": 4.0}, 6),
        (["--guidance", 4, "--negative-prompt", NEGATIVE], {"guidance": 4.0, "negative_prompt": NEGATIVE}, 6),
    ],
)
def test_a_prompt_is_the_python_api(run, sd, tmp_path, options, loading, evaluations):
    out = tmp_path / "x.npy"
    arguments = ("--nfe", 3, "-n", 2, "--seed", 5, "--out", out, "--json")
    code, text, err = run("sample", sd, "--prompt", PROMPT, *options, *arguments)
    assert code == 0, err
    facts = json.loads(text)
    assert (facts["nfe"], facts["evaluations"]) == (3, evaluations)
    denoiser = ls.load(sd, prompt=PROMPT, **loading)
    x = ls.sample(denoiser, 3, noise=noise(denoiser, 2, 5))
    expected = denoiser.decode(x).numpy().astype(int)
    found = np.load(out).astype(int)
    assert found.std() > 1
    assert np.abs(found - expected).max() <= 1
    other = ls.load(sd, prompt="a blue bird", **loading)
    y = ls.sample(other, 3, noise=noise(other, 2, 5))
    assert float((x - y).abs().max()) > 1e-3  # the prompt counts


def test_guidance_of_a_run(run, conditional, tmp_path):
    """guidance 3: uncond + 3 (cond - uncond), two evaluations a step; 1 is the plain model."""
    images = {}
    for guidance in (1, 3):
        out = tmp_path / f"{guidance}.npy"
        arguments = ("--class", 2, "--nfe", 4, "-n", 5, "--chunk", 3, "--seed", 1, "--out", out, "--json")
        code, text, err = run("sample", conditional, "--guidance", guidance, *arguments)
        assert code == 0, err
        assert json.loads(text)["evaluations"] == (4 if guidance == 1 else 8)
        images[guidance] = np.load(out).astype(int)
    denoiser = ls.load(conditional)
    for guidance in (1, 3):
        guided = ls.guidance.cfg(denoiser, guidance, {"class_labels": 3})
        x = ls.sample(
            guided,
            4,
            noise=noise(denoiser, 5, 1),
            cond={"class_labels": torch.full((5,), 2)},
        )
        assert np.abs(images[guidance] - denoiser.decode(x).numpy().astype(int)).max() <= 1
    assert np.abs(images[1] - images[3]).max() > 1


def test_classes_of_an_exported_pipeline(run, conditional, tmp_path):
    """The pipeline of a run draws what the run draws, guided too: its last class is the null condition."""
    pipe = export_diffusers(ls.load(conditional), tmp_path / "pipe", keep_classes=True)
    images = []
    for model, options in ((conditional, []), (pipe, ["--null-class", 3])):
        out = tmp_path / "x.npy"
        arguments = ("--class", 1, "--guidance", 2, "--nfe", 4, "-n", 4, "--out", out)
        code, text, err = run("sample", model, *options, *arguments)
        assert code == 0, err
        assert "4 images, 8 evaluations each" in text
        levels = 17 if model == conditional else 256
        images.append((np.load(out).astype(float) + 0.5) / levels)
    assert images[0].std() > 0.1
    # 17 and 256 grey levels of one number: x = 2 (v + .5)/levels - 1, so v/levels are up to half a level of each apart
    assert np.abs(images[0] - images[1]).max() <= 0.5 / 17 + 0.5 / 256 + 1e-6


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["{sd}"], ["is told a text", "--prompt"]),
        (["{sd}", "--class", "1"], ["--class 1", "told a text"]),
        (["{sd}", "--class", "1", "--prompt", PROMPT], ["--class 1 with --prompt", "one of them"]),
        (["{sd}", "--prompt", PROMPT, "--guidance", "nan"], ["guidance = nan", "finite"]),
        (["{sd}", "--prompt", PROMPT, "--negative-prompt", "x"], ["--negative-prompt 'x'", "--guidance"]),
        (["{sd}", "--prompt", PROMPT, "--null-class", "1"], ["null_class = 1", "leave it out"]),
        (["{run}", "--prompt", PROMPT], ["--prompt 'a red fox'", "no diffusers pipeline", "--class"]),
        (["{run}", "--null-class", "1"], ["--null-class 1", "no diffusers pipeline"]),
        (["{run}", "--guidance", "inf"], ["scale = inf", "finite"]),
        (["{plain}", "--guidance", "2"], ["--guidance 2", "unconditional"]),
        (["{pipe}", "--class", "1", "--guidance", "2"], ["null_class"]),
        (["{pipe}", "--class", "4"], ["--class 4", "0 ... 3"]),
        (["{pipe}", "--prompt", "cat"], ["'cat'", "a class", "0 ... 3"]),
        (["{one}", "--prompt", "cat"], ["'cat'", "unconditional"]),
        (["{one}", "--class", "0"], ["--class 0", "unconditional"]),
        (["{one}", "--guidance", "2"], ["guidance", "nothing to guide"]),
    ],
)
def test_options_that_do_not_fit_are_one_line(run, sd, conditional, tmp_path, args, words):
    folders = {"sd": sd, "run": conditional}
    first = args[0].strip("{}")
    if first in ("pipe", "one"):
        options = {"keep_classes": True} if first == "pipe" else {"class_label": 1}
        folders[first] = export_diffusers(ls.load(conditional), tmp_path / first, **options)
    if first == "plain":
        config = UNetConfig(channels=(8,), layers_per_block=1, mid_attention=False, norm_groups=4)
        network = build_network(config, (1, 4, 4))
        save_denoiser(NetworkDenoiser(network, EDM(), shape=(1, 4, 4), pixels=Pixels(17)), tmp_path / "plain", step=1)
        folders["plain"] = tmp_path / "plain"
    out = tmp_path / "x.npy"
    code, text, err = run("sample", *[a.format(**folders) for a in args], "--nfe", 2, "-n", 1, "--out", out)
    assert (code, text) == (2, ""), err
    assert err.count("\n") == 1, err
    for word in words:
        assert word in err
    assert not out.exists()


def test_generate_draws_a_prompt_and_refuses_another(run, sd, tmp_path):
    """Images are those of the Python call on their own streams, 8-bit, without labels; a prompt belongs to the set."""
    options = ["--nfe", 2, "-n", 3, "--chunk", 2, "--guidance", 3, "--out", tmp_path, "--device", "cpu"]
    code, _, err = run("generate", sd, *options, "--prompt", PROMPT, "--quiet")
    assert (code, err) == (0, "")
    [(images, labels)] = ls.Shards(tmp_path)
    denoiser = ls.load(sd, prompt=PROMPT, guidance=3.0)
    x = ls.sample(denoiser, 2, n=2, generator=generators(0, range(2)))
    assert torch.equal(images[:2], denoiser.decode(x))
    assert (len(images), labels) == (3, None)
    code, _, err = run("generate", sd, *options, "--prompt", "a blue fox")
    assert (code, err.count("\n")) == (2, 1)
    assert f"made with prompt {PROMPT}, not a blue fox" in err
    assert "give --prompt" in run("generate", sd, *options)[2]


def test_prompts_of_a_file_are_taken_in_turn(run, sd, tmp_path):
    """Image i is the one of prompt i mod 3, whatever the number of images; each chunk encodes its own prompts once."""
    prompts = ["a red fox", "a blue bird", "two ships"]
    (tmp_path / "prompts.txt").write_text("a red fox\n\n  a blue bird  \ntwo ships\n", encoding="utf-8")
    line = ("generate", sd, "--prompts", tmp_path / "prompts.txt", "--nfe", 2, "--chunk", 2, "--shard", 4)
    line = (*line, "--guidance", 4, "--seed", 5, "--json", "--out", tmp_path / "set")
    code, out, err = run(*line, "-n", 5)
    assert code == 0, err
    assert json.loads(out)["made"] == 5
    shards = ls.Shards(tmp_path / "set")
    assert shards.prompts == tuple(prompts)
    found = torch.cat([images for images, _ in shards])
    assert np.load(tmp_path / "set" / "shard-00001.npz")["prompts"].tolist() == [1]
    denoiser = ls.load(sd, guidance=4.0)
    for first in (0, 2, 4):
        rows = range(first, first + 2)
        cond = denoiser.conditions([prompts[i % 3] for i in rows])
        x = ls.sample(denoiser, 2, n=2, generator=generators(5, rows), cond=cond)
        expected = denoiser.decode(x)[: 5 - first]
        assert int((found[first : first + 2].int() - expected.int()).abs().max()) <= 1
    alone = ls.sample(denoiser, 2, n=2, generator=generators(5, [0, 1]), cond=denoiser.conditions(["a red fox"] * 2))
    assert int((denoiser.decode(alone)[1].int() - found[1].int()).abs().max()) > 1  # a prompt matters
    code, out, err = run(*line, "-n", 7)
    assert json.loads(out)["found"] == 4, err
    assert torch.equal(torch.cat([images for images, _ in ls.Shards(tmp_path / "set")])[:5], found)
    (tmp_path / "prompts.txt").write_text("a red fox\na blue bird\n", encoding="utf-8")
    asked, conditions = [], denoiser.conditions
    denoiser.conditions = lambda texts: asked.append(texts) or conditions(texts)
    ls.generate(denoiser, 2, tmp_path / "many", n=6, prompts=prompts[:2], chunk=3, shard=3)
    assert asked == [prompts[:2], prompts[1::-1]]
    for options, said in (
        (line, "made with prompts"),
        ((*line, "--prompt", "x"), "--prompt x with --prompts"),
        ((*line[:3], tmp_path / "none.txt", *line[4:]), "none.txt does not exist"),
        (("generate", "zoo:digits", *line[2:]), "prompts are for a pipeline that is told a text"),
    ):
        code, out, err = run(*options)
        assert (code, out, err.count("\n")) == (2, "", 1), err
        assert said in err
