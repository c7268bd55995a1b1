"""The demo end to end, on a network small enough for a test: the numbers in its report are the ones it measured."""

import json
import re
from functools import partial

import pytest
import torch

import logsnr as ls
from logsnr.demo import run as demo_run
from logsnr.demo import run_demo
from logsnr.demo.run import _balanced
from logsnr.evaluation.features import train_classifier
from logsnr.training import load_data
from logsnr.training.config import DataConfig

TINY = {
    "steps": 4,
    "log_every": 1,
    "network.channels": [8],
    "network.layers_per_block": 1,
    "network.mid_attention": False,
    "network.norm_groups": 4,
    "device": "cpu",
}


EVALUATIONS = 8
"""Per image, of the bound."""


@pytest.fixture(scope="module")
def demos(tmp_path_factory):
    """Three small demos in one folder: one that the clock ended, another, and that one once more."""
    out = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(demo_run, "SAMPLES", 30)
        patch.setattr(demo_run, "TEACHER_STEPS", 40)
        patch.setattr(demo_run, "train_classifier", partial(train_classifier, epochs=1))
        patch.setattr(demo_run, "bits_per_dim", partial(ls.bits_per_dim, evaluations_per_image=EVALUATIONS))
        ended = run_demo(out, quiet=True, max_seconds=0.01, overrides={**TINY, "steps": 1000})
        page = (out / "report.html").read_text(encoding="utf-8")
        summary, again = (run_demo(out, seed=3, quiet=True, overrides=TINY) for _ in range(2))
    return out, summary, again, ended, page


@pytest.fixture(scope="module")
def demo(demos):
    return demos[0], demos[2]


def test_the_report_stands_alone_and_quotes_the_summary(demo):
    out, summary = demo
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "The clock ended" not in page
    bound = summary["likelihood"]
    assert f"{bound['bits_per_dim']:.4f} ± {bound['stderr']:.4f} bits per dimension" in page
    assert f"{bound['bits_per_dim_given_label']:.4f} ± {bound['stderr_given_label']:.4f}" in page
    for row in summary["samplers"]:
        assert f"<td>{row['fd']:.2f}</td><td>{row['confident']:.1%}</td>" in page
    assert all(a.startswith(("data:", "#")) for a in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert json.loads((out / "report.json").read_text()) == json.loads(json.dumps(summary))


def test_the_summary_counts_what_was_asked(demo):
    _, summary = demo
    rows = [(row["sampler"], row["nfe"]) for row in summary["samplers"]]
    assert rows == [
        *(("zoo:digits' plan", n) for n in (5, 10)),
        *((name, n) for name in ("DDIM", "GE (gamma 2)", "DDPM") for n in (5, 10, 20)),
        ("teacher (UniPC-3)", 40),
    ]
    assert summary["samples_per_row"] == 30
    assert summary["likelihood"]["held_out_images"] == 297
    assert summary["likelihood"]["grey_levels"] == 17
    assert summary["training"]["steps"] == 4
    assert [row["rmse"] is None for row in summary["samplers"]] == [False] * 8 + [True] * 3 + [False]


def test_a_training_that_the_clock_ended_is_told(demos):
    *_, ended, page = demos
    training = ended["training"]
    assert training["of_steps"] == 1000
    assert training["steps"] < 900
    assert f"after {training['steps']} of 1000 steps" in page


def test_the_bound_can_be_measured_again_from_the_saved_model(demo):
    """`logsnr evaluate` on the demo's run, same seed: the number of the report."""
    out, summary = demo
    denoiser = ls.load(out)
    data = load_data(DataConfig())
    again = ls.bits_per_dim(
        denoiser,
        data.test_images,
        cond={"class_labels": data.test_labels},
        generator=torch.Generator().manual_seed(3 + 1),
        evaluations_per_image=EVALUATIONS,
        train=data.train_images,
    )
    assert again.bits_per_dim == pytest.approx(summary["likelihood"]["bits_per_dim_given_label"], abs=1e-6)


def test_the_same_seed_gives_the_same_numbers(demos):
    _, *both, _, _ = demos
    for summary in (summaries := [json.loads(json.dumps(summary)) for summary in both]):
        for clock in ("seconds", "images_per_second"):
            del summary["training"][clock]
    assert summaries[0] == summaries[1]


def test_a_second_demo_replaces_the_first(demos):
    """Nothing is left of the demo before, whose seed and whose length were others."""
    out, _, summary, _, first = demos
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "of 1000 steps" in first
    assert "of 1000 steps" not in page
    assert len((out / "metrics.jsonl").read_text().splitlines()) == summary["training"]["steps"] == 4
    card = json.loads((out / "card.json").read_text())
    assert (card["step"], card["training"]["seed"], card["training"]["steps"]) == (4, 3, 4)
    assert sorted(out.glob("*.safetensors")) == [out / card["weights"]["file"]]


def test_balanced_takes_the_first_of_each_class():
    labels = torch.tensor([0, 1, 1, 0, 2, 1, 0, 2, 2])
    assert _balanced(labels, 2).tolist() == [True, True, True, True, True, False, False, True, False]
