"""Where the bits are: I-MMSE on exact denoisers."""

import json
import math

import pytest
import torch
from test_likelihood import gaussian_diffusion_nats

from logsnr import exact
from logsnr.likelihood import bits_per_dim, information
from logsnr.pixels import Pixels


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_what_is_known_of_points_ends_at_the_entropy_of_which_point_it_is():
    """E L(lambda) = I(x; z_lambda) of an exact denoiser: log2 16 bits once the noise hides no point from another."""
    pixels, dim = Pixels(17), 12
    images = torch.randint(0, 17, (16, dim), generator=generator(1), dtype=torch.uint8)
    model = exact.PointCloud(pixels.encode(images).double())
    found = information(
        bits_per_dim(
            model, images, pixels=pixels, logsnr_range=(-12.0, 7.9), generator=generator(2), evaluations_per_image=256
        )
    )
    assert abs(float(found.known[-1]) - 4 / dim) < 4 * found.stderr
    assert found.stderr < 0.01
    assert float(found.known[0]) < 1e-3
    assert found.density.min() > -found.stderr  # no noise level takes information away
    half = found.level(0.5)
    assert -3 < half < 3  # noise as large as the distance between points
    assert found.level(0.1) < half < found.level(0.9)
    assert found.density[found.edges[:-1] > 6].max() < 1e-3  # nothing is left to be known


def test_what_is_known_at_each_level_is_the_closed_form_of_a_gaussian():
    pixels, variance, lo, hi = Pixels(17), 0.3, -6.0, 8.0
    images = torch.randint(0, 17, (40, 6), generator=generator(1), dtype=torch.uint8)
    model = exact.Gaussian(torch.zeros(6), variance * torch.eye(6))
    bound = bits_per_dim(
        model, images, pixels=pixels, logsnr_range=(lo, hi), generator=generator(2), evaluations_per_image=512
    )
    found, x = information(bound), pixels.encode(images).double()
    for edge, known in zip(found.edges.tolist()[4::4], found.known.tolist()[4::4], strict=True):
        expected = bound.prior + float(gaussian_diffusion_nats(x, variance, lo, edge).mean()) / (6 * math.log(2))
        assert known == pytest.approx(expected, abs=0.02)
    assert float(found.known[-1]) + found.reconstruction == pytest.approx(bound.bits_per_dim, abs=1e-9)
    assert math.isnan(found.level(1.0)) == (found.reconstruction > 0)
    with pytest.raises(ValueError, match=r"share = 1\.5"):
        found.level(1.5)


@pytest.mark.heavy
def test_the_command_says_what_python_does(run):
    code, out, err = run("information", "zoo:digits", "--evaluations", 8, "--limit", 2, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert len(said["bits_known"]) == len(said["logsnr"]) == len(said["bits_per_logsnr"]) + 1
    assert said["bits_known"][0] == pytest.approx(said["prior"])
    assert said["bits_known"][-1] + said["reconstruction"] == pytest.approx(said["bits_per_dim"])
