"""kohya-ss/sd-scripts: every option against the draws and the factors that the scripts themselves form."""

import math

import pytest
import torch
from drawn import assert_drawn, flags, shifted

from logsnr import weightings
from logsnr.describe import describe
from logsnr.errors import LogsnrError
from logsnr.predictions import Flow
from logsnr.timesteps import TimestepTable

ALPHAS = TimestepTable.stable_diffusion().alphas_cumprod.double()
LEVELS = torch.linspace(-9, 9, 181, dtype=torch.float64)


def snr(alphas=ALPHAS):
    """As `prepare_scheduler_for_custom_training` stores it."""
    return alphas / (1 - alphas)


def rescaled():
    root = ALPHAS.sqrt()
    return ((root - root[-1]) * root[0] / (root[0] - root[-1])).square()


def per_eps(trained, logsnr):
    """w over p: what a drawn level's squared error of eps is multiplied by."""
    return (trained.weighting.log(logsnr) - trained.log_density(logsnr)).exp()


CLIPPED = snr().clamp(max=1000)
TIMES_V = 1 + 1 / snr()  # ||v_hat - v||^2 over ||eps_hat - eps||^2
ROWS = {
    "--min_timestep 0": torch.ones(1000),
    "--v_parameterization": TIMES_V,
    "--min_snr_gamma 5": snr().clamp(max=5) / snr(),
    "--min_snr_gamma 5 --v_parameterization": snr().clamp(max=5) / (snr() + 1) * TIMES_V,
    "--debiased_estimation_loss": CLIPPED**-0.5,
    "--debiased_estimation_loss --v_parameterization": 1 / (CLIPPED + 1) * TIMES_V,
    "--scale_v_pred_loss_like_noise_pred --v_parameterization": CLIPPED / (CLIPPED + 1) * TIMES_V,
    "--v_pred_like_loss 0.3": 1 + 0.3 * (CLIPPED + 1) / CLIPPED,
    "--min_snr_gamma 5 --v_pred_like_loss 0.3": snr().clamp(max=5) / snr() * (1 + 0.3 * (CLIPPED + 1) / CLIPPED),
    "--noise_offset 0.1 --multires_noise_iterations 6 --ip_noise_gamma 0.1": torch.ones(1000),
    "--loss_type huber": torch.ones(1000),
}


@pytest.mark.parametrize(("text", "factor"), ROWS.items(), ids=list(ROWS))
def test_factor_at_every_timestep_of_stable_diffusion(text, factor):
    inside = slice(1, -1)  # The ends of the range are themselves levels.
    found = per_eps(flags(text), snr()[inside].log())
    torch.testing.assert_close(found, factor[inside].double(), rtol=1e-6, atol=0)


@pytest.mark.parametrize("text", ["--min_snr_gamma 5", "--v_parameterization --zero_terminal_snr"])
def test_each_timestep_is_drawn_once_in_a_thousand(text):
    """Mass of the density between the middles of neighbouring levels."""
    trained = flags(text)
    alphas = rescaled() if "zero" in text else ALPHAS
    x = snr(alphas).log()[:-1]
    edges = 0.5 * (x[1:] + x[:-1])
    t = torch.linspace(0, 1, 201, dtype=torch.float64)
    nodes = edges[1:, None] + t * (edges[:-1] - edges[1:])[:, None]
    mass = torch.trapezoid(trained.log_density(nodes).exp(), nodes, dim=1)
    # At both ends, where levels lie far apart, the smoothed density is a coarser picture of the steps.
    assert mass[5:-4].tolist() == pytest.approx([1 / 999] * len(mass[5:-4]), rel=5e-3)


def test_zero_terminal_snr_weights_by_the_snr_of_the_table_before():
    """The scripts store SNR first and change the betas afterwards, so factors do not see the change."""
    now = snr(rescaled())[:-1].log()
    for text, factor in (
        ("--min_snr_gamma 5", snr().clamp(max=5) / (snr() + 1)),
        ("--debiased_estimation_loss", 1 / (CLIPPED + 1)),
        ("--scale_v_pred_loss_like_noise_pred", CLIPPED / (CLIPPED + 1)),
    ):
        trained = flags(f"{text} --v_parameterization --zero_terminal_snr")
        expected = factor[:-1] * (1 + (-now).exp())
        torch.testing.assert_close(per_eps(trained, now), expected, rtol=1e-6, atol=0)
        assert any("before --zero_terminal_snr changes" in note for note in trained.notes)
    assert not any("before" in note for note in flags("--v_parameterization --zero_terminal_snr").notes)
    assert any("--zero_terminal_snr needs" in note for note in flags("--zero_terminal_snr").notes)


def test_timesteps_cut_the_range():
    trained = flags("--min_timestep 100 --max_timestep 900")
    assert trained.range == pytest.approx((float(snr()[899].log()), float(snr()[100].log())), rel=1e-9)


# Flux: log-SNR of flow time t(n) or t(v), written as `get_noisy_model_input_and_timesteps` does.


def flux_shift(t, height, width):
    h, w = height // 8, width // 8
    m = (1.15 - 0.5) / (4096 - 256)
    mu = m * ((h // 2) * (w // 2)) + 0.5 - m * 256
    return math.exp(mu) / (math.exp(mu) + (1 / t - 1) ** 1.0)


def mode(u, scale=1.29):
    return 1 - u - scale * (torch.cos(math.pi * u / 2) ** 2 - 1 + u)


NORMAL = {
    "--timestep_sampling sigmoid": lambda n: n.sigmoid(),
    "--timestep_sampling sigmoid --sigmoid_scale 1.7": lambda n: (1.7 * n).sigmoid(),
    "--timestep_sampling shift": lambda n: shifted(n.sigmoid(), 3.0),
    "--timestep_sampling shift --discrete_flow_shift 1.15 --sigmoid_scale 0.8": lambda n: shifted(
        (0.8 * n).sigmoid(), 1.15
    ),
    "--timestep_sampling flux_shift": lambda n: flux_shift(n.sigmoid(), 1024, 1024),
    "--timestep_sampling flux_shift --resolution 512": lambda n: flux_shift(n.sigmoid(), 512, 512),
    "--timestep_sampling flux_shift --resolution 768,512": lambda n: flux_shift(n.sigmoid(), 512, 768),
    "--timestep_sampling sigma --weighting_scheme logit_normal --logit_mean 0.4 --logit_std 0.7": lambda n: shifted(
        1 - (0.4 + 0.7 * n).sigmoid(), 3.0
    ),
    "--training_shift 2 --weighting_scheme logit_normal --logit_mean 0.4 --logit_std 0.7": lambda n: shifted(
        (0.4 + 0.7 * n).sigmoid(), 2.0
    ),
}
UNIFORM = {
    "--timestep_sampling uniform": lambda v: v,
    "--timestep_sampling sigma": lambda v: shifted(1 - v, 3.0),
    "--discrete_flow_shift 1.5": lambda v: shifted(1 - v, 1.5),
    "--timestep_sampling sigma --weighting_scheme mode --discrete_flow_shift 1": lambda v: 1 - mode(v),
    "--timestep_sampling sigma --weighting_scheme mode --mode_scale 0.5": lambda v: shifted(1 - mode(v, 0.5), 3.0),
    "--model_prediction_type raw --weighting_scheme cosmap": lambda v: shifted(1 - v, 3.0),
    "--weighting_scheme uniform": lambda v: v,
    "--training_shift 3": lambda v: shifted(v, 3.0),
}


@pytest.mark.parametrize("text", [*NORMAL, *UNIFORM])
def test_density_is_that_of_the_drawn_flow_times(text):
    assert_drawn(text, NORMAL, UNIFORM)


T = torch.sigmoid(-LEVELS / 2)
VELOCITY = 1 / (1 - T) ** 2  # ||u_hat - u||^2 over ||eps_hat - eps||^2, as eps = z + (1 - t) u
LOSS = {
    # raw and additive compare the velocity; sigma_scaled multiplies by the scheme's factor.
    "--timestep_sampling shift --model_prediction_type raw": torch.ones_like(T),
    "--timestep_sampling shift --model_prediction_type additive": torch.ones_like(T),
    "--timestep_sampling shift --model_prediction_type raw --weighting_scheme sigma_sqrt": torch.ones_like(T),
    "--timestep_sampling flux_shift": torch.ones_like(T),
    "--timestep_sampling sigmoid --weighting_scheme logit_normal": torch.ones_like(T),
    "--timestep_sampling shift --weighting_scheme sigma_sqrt": T**-2,
    "--timestep_sampling sigma --weighting_scheme sigma_sqrt": T**-2,
    "--timestep_sampling uniform --weighting_scheme cosmap": 2 / (math.pi * (1 - 2 * T + 2 * T**2)) * math.pi / 2,
    # SD3 compares x = z - t u.
    "--training_shift 3": T**2,
    "--training_shift 3 --weighting_scheme sigma_sqrt": torch.ones_like(T),
    "--training_shift 3 --weighting_scheme cosmap": T**2 / (1 - 2 * T + 2 * T**2),
}


@pytest.mark.parametrize(("text", "factor"), LOSS.items(), ids=list(LOSS))
def test_factor_on_the_error_of_eps(text, factor):
    torch.testing.assert_close(per_eps(flags(text), LEVELS), factor * VELOCITY, rtol=1e-9, atol=0)


def test_the_velocitys_error_is_that_of_the_table():
    """||u_hat - u||^2 = E/(1 - t)^2: the row of `Flow`, in flow time."""
    alpha, s = torch.sigmoid(LEVELS).sqrt(), torch.sigmoid(-LEVELS).sqrt()
    b = torch.as_tensor(Flow().eps_row(alpha, s)[1])
    torch.testing.assert_close(b**-2, VELOCITY, rtol=1e-12, atol=0)


def test_what_flux_scripts_resemble():
    """Recommended settings are logit-normal flow matching; the defaults are plain flow matching at shift 3."""
    raw = flags("--timestep_sampling flux_shift --model_prediction_type raw --guidance_scale 1")
    same = weightings.LogitNormalFlow(1.15, 1.0).log(LEVELS) - raw.weighting.log(LEVELS)
    assert float(same.max() - same.min()) < 1e-9
    assert describe(flags("--timestep_sampling sigmoid --model_prediction_type raw")).presets[0] == (
        "sd3",
        pytest.approx(0, abs=1e-9),
    )
    assert describe(flags("--timestep_sampling uniform --model_prediction_type raw")).presets[0][1] < 1e-9


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("--timestep_sampling shift --min_snr_gamma 5", "--min_snr_gamma does nothing in Flux's scripts"),
        ("--timestep_sampling shift --noise_offset 0.1", "--noise_offset does nothing in Flux's scripts"),
        ("--timestep_sampling shift --v_parameterization", "--v_parameterization does nothing"),
        ("--training_shift 3 --zero_terminal_snr", "--zero_terminal_snr does nothing in SD3's scripts"),
        ("--timestep_sampling uniform --sigmoid_scale 2", "--sigmoid_scale does nothing in --timestep_sampling uni"),
        ("--timestep_sampling sigmoid --discrete_flow_shift 2", "--discrete_flow_shift does nothing"),
        ("--timestep_sampling shift --weighting_scheme logit_normal", "--weighting_scheme does nothing"),
        ("--timestep_sampling shift --logit_mean 1", "--logit_mean does nothing"),
        ("--model_prediction_type raw --weighting_scheme cosmap", "--weighting_scheme does nothing in --model_pred"),
        ("--timestep_sampling sigma --mode_scale 1", "--mode_scale does nothing in --weighting_scheme none"),
        ("--timestep_sampling shift", "is not what a Flux network gives; raw is"),
        ("--timestep_sampling shift --ip_noise_gamma 0.1", "perturbs the network's input"),
        ("--timestep_sampling shift --guidance_scale 0", "a condition, not another weighting"),
        ("--discrete_flow_shift 3 --weighting_scheme logit_normal --logit_mean 1", "a positive mean means less noise"),
        ("--timestep_sampling flux_shift", "give --resolution"),
        ("--training_shift 3 --weighting_scheme logit_normal", "unlike in diffusers' scripts"),
        ("--training_shift 3 --guidance_scale 2", "--guidance_scale does nothing in SD3's scripts"),
        ("--training_shift 3 --weighting_scheme sigma_sqrt", "despite its name"),
        ("--timestep_sampling shift --loss_type l1", "is not what it trains"),
    ],
)
def test_what_does_nothing_is_said(text, said):
    trained = flags(text)
    assert any(said in note for note in trained.notes), trained.notes
    assert len(set(trained.notes)) == len(trained.notes)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("--timestep_sampling shft", "one of sigma, uniform"),
        ("--timestep_sampling shift --snr_gamma 5", "give one family"),
        ("--timestep_sampling shift --precondition_outputs 1", "give one family"),
        ("--training_shift 3 --prediction_type epsilon", "give one family"),
        ("--training_shift 3 --min_timestep 100", "leave it out"),
        ("--timestep_sampling flux_shift --resolution 1k", "1024 or 1024,768"),
        ("--timestep_sampling flux_shift --resolution 8", "1024 or 1024,768"),
        ("--sigmoid_scale 0", "above 0"),
        ("--discrete_flow_shift -1", "above 0"),
        ("--discrete_flow_shift 3 --weighting_scheme mode --mode_scale 3", "-1 ... 1.75"),
        ("--min_snr_gamma 5 --weighting_scheme logit_normal", "give one family"),
        ("--v_pred_like_loss 1 --v_parameterization", "leave out --v_parameterization"),
        ("--sigmoid_scal 2", "did you mean '--sigmoid_scale'"),
    ],
)
def test_bad_input_is_one_clear_line(text, message):
    with pytest.raises(LogsnrError) as error:
        flags(text)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
