"""Bounds by parts: the whole is the mean of its parts, whoever measured them, and a part that is there stays."""

import json

import pytest
import torch

from logsnr.errors import LogsnrError
from logsnr.exact import Gaussian
from logsnr.likelihood import bits_per_dim, bits_per_dim_in_parts, merged
from logsnr.pixels import Pixels
from logsnr.sampling import generators

IMAGES = torch.randint(17, (23, 6), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
OPTIONS = {"pixels": Pixels(17), "logsnr_range": (-5.0, 7.0), "evaluations_per_image": 8}
PARTS = {"part": 5, "seed": 3, "about": {"model": "gaussian"}}


@pytest.fixture(scope="module")
def model():
    return Gaussian(torch.zeros(6), 0.09 * torch.eye(6))


def test_the_whole_is_the_mean_of_its_parts_whoever_measures_them(model, tmp_path):
    by_hand = [
        bits_per_dim(model, IMAGES[i : i + 5], generator=generators(3, [i // 5])[0], **OPTIONS) for i in range(0, 23, 5)
    ]
    whole = bits_per_dim_in_parts(model, IMAGES, tmp_path / "one", **OPTIONS, **PARTS)
    assert torch.equal(whole.per_image, torch.cat([part.per_image for part in by_hand]))
    assert whole.bits_per_dim == pytest.approx(sum(len(p.per_image) * p.bits_per_dim for p in by_hand) / 23, rel=1e-12)
    terms = whole.diffusion + whole.reconstruction + whole.prior
    assert terms == pytest.approx(whole.bits_per_dim, rel=1e-12)
    assert whole.stderr**2 == pytest.approx(sum((len(p.per_image) / 23 * p.stderr) ** 2 for p in by_hand), rel=1e-12)
    assert whole.evaluations == 23 * 8
    # two processes, in either order; the second to end has the whole
    two = tmp_path / "two"
    assert bits_per_dim_in_parts(model, IMAGES, two, rank=1, world=2, **OPTIONS, **PARTS) is None
    again = bits_per_dim_in_parts(model, IMAGES, two, rank=0, world=2, **OPTIONS, **PARTS)
    for file in sorted(two.iterdir()):
        assert file.read_bytes() == (tmp_path / "one" / file.name).read_bytes()
    assert torch.equal(again.per_image, whole.per_image)


def test_a_part_that_is_there_stays_and_others_are_refused(model, tmp_path):
    first = bits_per_dim_in_parts(model, IMAGES, tmp_path, **OPTIONS, **PARTS)
    (tmp_path / "part-00002.json").unlink()
    before = (tmp_path / "part-00001.json").stat().st_mtime_ns
    told = []
    second = bits_per_dim_in_parts(
        model, IMAGES, tmp_path, progress=lambda done, total: told.append((done, total)), **OPTIONS, **PARTS
    )
    assert torch.equal(first.per_image, second.per_image)
    assert (tmp_path / "part-00001.json").stat().st_mtime_ns == before
    assert told == [(5, 5)]
    for changes, words in (
        ({"seed": 4}, "seed 3, not 4"),
        ({"about": {"model": "b"}}, "model gaussian, not b"),
        ({"evaluations_per_image": 16}, "evaluations_per_image 8, not 16"),
    ):
        with pytest.raises(LogsnrError, match=words):
            bits_per_dim_in_parts(model, IMAGES, tmp_path, **{**OPTIONS, **PARTS, **changes})
    (tmp_path / "part-00000.json").write_text(json.dumps({"version": 2}))
    with pytest.raises(LogsnrError, match="no part of a likelihood"):
        bits_per_dim_in_parts(model, IMAGES, tmp_path, **OPTIONS, **PARTS)


@pytest.mark.parametrize("part", [5, 20])
def test_a_tolerance_is_of_the_whole(model, tmp_path, monkeypatch, part):
    """Parts of other sizes count as they weigh: with 20 and 3 images, the large one has to be nearly as good."""
    asked = []

    def noted(*args, tolerance, **options):
        asked.append(tolerance)
        return bits_per_dim(*args, tolerance=tolerance, **options)

    monkeypatch.setattr("logsnr.likelihood.parts.bits_per_dim", noted)
    found = bits_per_dim_in_parts(
        model, IMAGES, tmp_path, tolerance=0.05, max_evaluations_per_image=512, **OPTIONS, **{**PARTS, "part": part}
    )
    shares = [len(IMAGES[i : i + part]) / 23 for i in range(0, 23, part)]
    assert sum((share * one) ** 2 for share, one in zip(shares, asked, strict=True)) == pytest.approx(0.05**2)
    assert found.stderr <= 0.05
    assert found.evaluations > 23 * 8


def test_parts_of_other_ranges_make_no_whole(model):
    parts = [
        bits_per_dim(model, IMAGES[:5], generator=torch.Generator().manual_seed(0), **{**OPTIONS, "logsnr_range": span})
        for span in ((-5.0, 7.0), (-4.0, 7.0))
    ]
    for wrong in ([], parts):
        with pytest.raises(ValueError, match="of one range"):
            merged(wrong)
