"""musubi-tuner and SimpleTuner: every option against the flow times that the trainers themselves draw."""

import math

import pytest
import torch
from drawn import assert_drawn, flags, shifted

from logsnr.describe import describe
from logsnr.errors import LogsnrError

LEVELS = torch.linspace(-9, 9, 181, dtype=torch.float64)


def by_size(t, height, width, x2, y2, x1=256, y1=0.5):
    mu = y1 + (y2 - y1) / (x2 - x1) * ((height // 16) * (width // 16) - x1)
    return shifted(t, math.exp(mu))


QWEN, FLUX, KREA = (8192, 0.9), (4096, 1.15), (6400, 1.15)
NORMAL = {
    "--timestep_sampling qwen_shift": lambda n: by_size(n.sigmoid(), 1024, 1024, *QWEN),
    "--timestep_sampling qwen_shift --resolution 1328,800 --sigmoid_scale 0.8": lambda n: by_size(
        (0.8 * n).sigmoid(), 800, 1328, *QWEN
    ),
    "--timestep_sampling flux2_shift --resolution 512": lambda n: by_size(n.sigmoid(), 512, 512, *FLUX),
    "--timestep_sampling krea2_shift": lambda n: by_size(n.sigmoid(), 1024, 1024, *KREA),
    "--timestep_sampling logsnr": lambda n: torch.sigmoid(-n / 2),
    "--timestep_sampling logsnr --logit_mean -6 --logit_std 2": lambda n: torch.sigmoid(-(-6 + 2 * n) / 2),
    "--timestep_sampling ideogram4_shift --resolution 1024": lambda n: (
        0.5 * math.log(1024**2 / 512**2) + 1.5 * n
    ).sigmoid(),
    "--timestep_sampling shift --discrete_flow_shift 3 --min_timestep 875 --max_timestep 1000": lambda n: (
        0.875 + 0.125 * shifted(n.sigmoid(), 3.0)
    ),
    "--timestep_sampling shift --discrete_flow_shift 5 --max_timestep 875": lambda n: 0.875 * shifted(n.sigmoid(), 5.0),
    "--timestep_sampling sigmoid --min_timestep 200 --max_timestep 800": lambda n: 0.2 + 0.6 * n.sigmoid(),
    "--flow_sigmoid_scale 1": lambda n: shifted(n.sigmoid(), 3.0),
    "--flow_schedule_shift 1.73 --flow_sigmoid_scale 0.7": lambda n: shifted((0.7 * n).sigmoid(), 1.73),
    "--flow_schedule_shift 0": lambda n: n.sigmoid(),
    "--flow_schedule_shift 0 --flow_schedule_auto_shift": lambda n: by_size(n.sigmoid(), 1024, 1024, *FLUX),
}
UNIFORM = {
    "--timestep_sampling uniform --min_timestep 875": lambda v: 0.875 + 0.125 * v,
    "--timestep_sampling uniform --min_timestep 100 --max_timestep 900": lambda v: 0.1 + 0.8 * v,
    "--flow_use_uniform_schedule --flow_schedule_shift 2": lambda v: shifted(v, 2.0),
}


@pytest.mark.parametrize("text", [*NORMAL, *UNIFORM])
def test_density_is_that_of_the_drawn_flow_times(text):
    assert_drawn(text, NORMAL, UNIFORM)


@pytest.mark.parametrize(
    "text",
    [
        *NORMAL,
        "--timestep_sampling qinglong_flux --logit_mean -4",
        "--timestep_sampling qinglong_qwen",
        "--flow_use_beta_schedule --flow_beta_schedule_alpha 3",
        "--timestep_sampling qwen_shift --min_timestep 875 --preserve_distribution_shape",
    ],
)
def test_every_density_has_mass_one(text):
    trained = flags(text)
    lo, hi = trained.range
    x = torch.linspace(max(lo, -50), min(hi, 50), 200_001, dtype=torch.float64)
    assert float(torch.trapezoid(trained.log_density(x).exp(), x)) == pytest.approx(1, abs=1e-4)


def test_qinglong_is_three_draws():
    """79 % Flux's shift, 11 % log-SNR of its own mean, 10 % nearly clean; for Qwen 95 and 5 % without the middle."""

    def normal(x, mean, std):
        return torch.distributions.Normal(mean, std).log_prob(x).exp()

    flux = flags("--timestep_sampling qinglong_flux --logit_mean -4 --logit_std 1.5")
    mixed = 0.79 * normal(LEVELS, -2 * 1.15, 2.0) + 0.11 * normal(LEVELS, -4.0, 1.5) + 0.1 * normal(LEVELS, 5.36, 1.0)
    torch.testing.assert_close(flux.log_density(LEVELS).exp(), mixed)
    mu = 0.5 + (4096 - 256) * 0.4 / (8192 - 256)
    qwen = flags("--timestep_sampling qinglong_qwen")
    mixed = 0.95 * normal(LEVELS, -2 * mu, 2.0) + 0.05 * normal(LEVELS, 5.36, 1.0)
    torch.testing.assert_close(qwen.log_density(LEVELS).exp(), mixed)


def test_wans_high_noise_expert_sees_its_range_alone():
    """Squeezed, or drawn again: the second keeps the shape of the density, p(lambda)/p(range) within it."""
    base = "--timestep_sampling shift --discrete_flow_shift 3"
    whole = flags(f"{base} --preserve_distribution_shape")
    cut = flags(f"{base} --min_timestep 875 --max_timestep 1000 --preserve_distribution_shape")
    squeezed = flags(f"{base} --min_timestep 875 --max_timestep 1000")
    edge = 2 * math.log(0.125 / 0.875)
    assert cut.range == squeezed.range == (-math.inf, edge)
    inside = torch.linspace(-12, edge - 1e-6, 100, dtype=torch.float64)
    ratio = cut.log_density(inside) - whole.log_density(inside)
    mass = torch.distributions.Normal(-2 * math.log(3), 2.0).cdf(torch.tensor(edge, dtype=torch.float64))
    torch.testing.assert_close(ratio.exp(), torch.full_like(ratio, float(1 / mass)), rtol=1e-4, atol=0)
    assert float(cut.log_density(torch.tensor(edge + 0.1))) == -math.inf
    assert float(squeezed.log_density(torch.tensor(edge + 0.1))) == -math.inf
    assert describe(squeezed).range[1] == pytest.approx(edge)
    assert any("squeeze" in note for note in squeezed.notes)
    assert not any("squeeze" in note for note in cut.notes)


@pytest.mark.parametrize("text", ["--timestep_sampling logsnr", "--flow_schedule_shift 3"])
def test_the_loss_is_that_of_the_velocity(text):
    trained = flags(text)
    t = torch.sigmoid(-LEVELS / 2)
    found = (trained.weighting.log(LEVELS) - trained.log_density(LEVELS)).exp()
    torch.testing.assert_close(found, (1 - t) ** -2, rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--timestep_sampling qwen_shift", "give --resolution for another"),
        ("--timestep_sampling qwen_shift --logit_mean 1", "do nothing in --timestep_sampling qwen_shift"),
        ("--timestep_sampling logsnr --logit_mean 1", "of log-SNR itself"),
        ("--timestep_sampling logsnr --sigmoid_scale 2", "--sigmoid_scale does nothing in --timestep_sampling logsnr"),
        ("--timestep_sampling logsnr --num_timestep_buckets 8", "each alone follows the same density"),
        (
            "--timestep_sampling shift --preserve_distribution_shape",
            "--preserve_distribution_shape does nothing without --min_timestep or --max_timestep",
        ),
        ("--flow_schedule_auto_shift", "acts where --flow_schedule_shift is 0"),
        ("--flow_use_beta_schedule --flow_sigmoid_scale 2", "does nothing with --flow_use_beta_schedule"),
        ("--flow_beta_schedule_beta 2", "does nothing without --flow_use_beta_schedule"),
    ],
)
def test_what_does_nothing_is_said(text, said):
    notes = flags(text).notes
    assert any(said in note for note in notes), notes


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--timestep_sampling sigma --min_timestep 875", "rows of the table from pure noise on"),
        ("--timestep_sampling shift --min_timestep 900 --max_timestep 100", "0 <= min_timestep < max_timestep"),
        (
            "--timestep_sampling logsnr --logit_mean 6 --logit_std .1 --min_timestep 875 --preserve_distribution_shape",
            "no time within log-SNR [-inf, -3.892], the range of --min_timestep and --max_timestep, is ever drawn",
        ),
        ("--flow_schedule_shift 3 --timestep_sampling shift", "give one family"),
        ("--flow_use_uniform_schedule --flow_use_beta_schedule", "two ways to draw"),
        ("--timestep_sampling qwen_shft", "one of sigma, uniform"),
        ("--flow_schedule_shif 3", "did you mean '--flow_schedule_shift'"),
    ],
)
def test_bad_input_is_one_clear_line(text, message):
    with pytest.raises(LogsnrError) as error:
        flags(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
