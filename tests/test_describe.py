"""What objectives are said to be: other people's flags turned into w, against the table of 2303.00848."""

import json
import math
import sys

import pytest
import torch

from logsnr import objectives, weightings
from logsnr.cli import main
from logsnr.describe import describe, resolve
from logsnr.describe.configs import from_config
from logsnr.errors import LogsnrError
from logsnr.objectives import WeightedELBO
from logsnr.schedules import Adaptive

GRID = torch.linspace(-5, 6.5, 300, dtype=torch.float64)


def same_weighting(one, two, grid=GRID, tolerance=1e-9):
    """Equal up to a constant."""
    ratio = one.log(grid) - two.log(grid)
    return float(ratio.max() - ratio.min()) < tolerance


def flags(text):
    return resolve(text.split())


@pytest.mark.parametrize("name", list(objectives))
def test_every_preset_is_nearest_to_itself(name):
    report = describe(resolve([name]))
    assert report.presets[0][1] < 1e-12
    assert dict(report.presets)[name] < 1e-12
    assert float(torch.trapezoid(report.emphasis, report.logsnr)) == pytest.approx(1, abs=1e-9)
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["name"] == name


@pytest.mark.parametrize(
    ("name", "monotone"),
    [
        ("elbo", True),
        ("eps-cosine", False),
        ("edm", False),
        ("edm-monotonic", True),
        ("v", True),
        ("flow", True),
        ("indi", True),
        ("p2", False),
        ("min-snr", False),
        ("sigmoid", True),
        ("logit-normal-flow", False),
    ],
)
def test_monotone_is_an_elbo_and_nothing_else_is(name, monotone):
    report = describe(resolve([name]))
    assert report.monotone is monotone
    assert report.verdict().startswith("An ELBO" if monotone else "No ELBO")
    assert (report.atom is None) is (report.augmentation is None) is (report.rises is not None) is not monotone
    assert (report.negative > 0) is not monotone


def test_rises_where_the_weighting_rises():
    """EDM's weighting has its one peak at log-SNR -3.30778; sech at 0."""
    assert describe(resolve(["edm"])).rises[1] == pytest.approx(-3.30778, abs=0.02)
    assert describe(resolve(["iddpm"])).rises[1] == pytest.approx(0, abs=0.02)


def test_augmentation_of_a_sigmoid():
    """sigmoid(2 - lambda) is the tail of a logistic law at 2: its quantiles are those of the added noise."""
    low, median, high = describe(resolve(["sigmoid"])).augmentation
    assert median == pytest.approx(2, abs=0.02)
    assert high - 2 == pytest.approx(math.log(9), abs=0.02)
    assert 2 - low == pytest.approx(math.log(9), abs=0.02)


def test_atom_of_a_recipe(tmp_path):
    """Sheet, eq. 3.7: sigmoid(2 - lambda) on [-10, 10] leaves 3.35e-4 of the data clean."""
    recipe = "objective: {weighting: {name: sigmoid, bias: 2}, schedule: cosine, logsnr: [-10, 10]}\nsteps: 1\n"
    (tmp_path / "r.yaml").write_text(recipe)
    report = describe(resolve([str(tmp_path / "r.yaml")]))
    assert report.atom == pytest.approx(3.3535e-4, rel=1e-3)
    assert report.range == (-10, 10)
    assert "sigma_data" in report.notes[0]


def test_min_snr_is_one_weighting_whatever_the_network_predicts():
    eps, v, x = (flags(f"--snr_gamma 5 --prediction_type {kind}") for kind in ("epsilon", "v_prediction", "sample"))
    assert same_weighting(eps.weighting, v.weighting)
    assert same_weighting(eps.weighting, x.weighting)
    kohya = flags("--min_snr_gamma=5 --v_parameterization")
    assert same_weighting(eps.weighting, kohya.weighting)
    assert describe(eps).presets[0][0] == "min-snr-5"


def test_plain_scripts_weight_their_density():
    plain = flags("--prediction_type epsilon --beta_schedule linear")
    assert same_weighting(plain.weighting, resolve(["ddpm"]).weighting)
    v = flags("--prediction_type v_prediction --beta_schedule linear")
    ratio = v.weighting.log(GRID) - plain.weighting.log(GRID)
    assert torch.allclose(ratio, torch.nn.functional.softplus(-GRID), atol=1e-9)


def test_kohya_rows():
    eps, v = flags("--min_timestep 0"), flags("--v_parameterization")
    undone = flags("--v_parameterization --scale_v_pred_loss_like_noise_pred")
    grid = GRID[GRID < math.log(1000)]
    assert same_weighting(undone.weighting, eps.weighting, grid)
    one, two = flags("--debiased_estimation_loss"), flags("--debiased_estimation_loss --v_parameterization")
    ratio = one.weighting.log(grid) - two.weighting.log(grid)
    assert torch.allclose(ratio - ratio[0], 0.5 * (grid - grid[0]), atol=1e-9)  # e^(-l/2) against e^-l
    assert any("Inconsistent" in note for note in two.notes)
    added = flags("--v_pred_like_loss 2")
    expected = (1 + 2 * (1 + (-grid).exp())).log()
    assert torch.allclose(added.weighting.log(grid) - eps.weighting.log(grid), expected, atol=1e-9)
    cut = flags("--min_timestep 100 --max_timestep 900")
    assert eps.range[0] < cut.range[0] < cut.range[1] < eps.range[1]
    assert v.range == eps.range
    assert flags("--v_parameterization --zero_terminal_snr").range[0] == -math.inf
    assert "not another weighting" in flags("--noise_offset 0.1").notes[0]
    assert "no square" in flags("--loss_type huber").notes[0]


def test_sd3_schemes_of_the_table():
    plain = "--precondition_outputs 0"
    assert same_weighting(flags(f"--weighting_scheme logit_normal {plain}").weighting, weightings.LogitNormalFlow(0, 1))
    assert same_weighting(
        # The scripts' timestep is 1 - u: the mean of flow time changes sign.
        flags(f"--weighting_scheme logit_normal --logit_mean 0.5 --logit_std 0.6 {plain}").weighting,
        weightings.LogitNormalFlow(-0.5, 0.6),
    )
    assert same_weighting(flags(f"--weighting_scheme none {plain}").weighting, weightings.Flow())
    assert same_weighting(flags("--weighting_scheme sigma_sqrt").weighting, weightings.Flow())
    assert same_weighting(flags("--weighting_scheme none").weighting, weightings.InDI())
    cosmap = weightings.Custom(
        lambda l: weightings.EpsCosine().log(l) + 2 * torch.nn.functional.softplus(-0.5 * l), in_log=True
    )
    assert same_weighting(flags(f"--weighting_scheme cosmap {plain}").weighting, cosmap)
    assert same_weighting(
        flags(f"--weighting_scheme mode --mode_scale 0 {plain}").weighting, weightings.Flow(), tolerance=1e-6
    )


def test_flux_scripts_train_the_velocity():
    """No preconditioning, times not shifted, the guidance a condition: plain flow matching unless a scheme is given."""
    flux = flags("--guidance_scale 3.5")
    assert same_weighting(flux.weighting, weightings.Flow())
    assert any("a condition, not another weighting" in note for note in flux.notes)
    logit = flags("--guidance_scale 1 --weighting_scheme logit_normal")
    assert same_weighting(logit.weighting, weightings.LogitNormalFlow())
    assert same_weighting(logit.weighting, flags("--weighting_scheme logit_normal --precondition_outputs 0").weighting)
    assert describe(logit).presets[0][0] == "sd3"


def test_edm_style_training_is_eps_mse_whatever_the_network_predicts():
    """sigma^-2 ||x_hat - x||^2 is ||eps_hat - eps||^2."""
    plain = flags("--prediction_type epsilon")
    for kind in ("epsilon", "v_prediction"):
        trained = flags(f"--do_edm_style_training --prediction_type {kind}")
        assert same_weighting(trained.weighting, plain.weighting)
    assert any("not plain v-MSE" in note for note in trained.notes)
    for flag in ("--noise_offset 0.1", "--input_perturbation 0.1", "--dream_training"):
        trained = flags(f"{flag} --snr_gamma 5")
        assert same_weighting(trained.weighting, flags("--snr_gamma 5").weighting)
        assert "not another weighting" in trained.notes[0]


def test_known_inconsistencies_are_stated():
    """Every one of the fact sheet's, where it applies."""
    for words, text in (
        ("vdm++/sigmoid", "omit 1/p"),
        ("vdm++/sigmoid", "right for x alone"),
        ("vdm++/edm-monotonic", "order of the batch"),
        ("vdm++/edm-monotonic", "does not define"),
        ("v-cosine", "shifted cosine"),
        ("v-shifted-cosine", "(resolution/64)^2"),
        ("edm", "wrong sign"),
        ("edm2", "learned exp(u)"),
        ("soft-min-snr", "its own density"),
        ("debiased", "v branch"),
        ("--debiased_estimation_loss", "two objectives"),
        ("--v_parameterization --scale_v_pred_loss_like_noise_pred", "undone"),
        ("--weighting_scheme sigma_sqrt", "despite its name"),
        ("--weighting_scheme cosmap", "a factor on uniform times"),
        ("--weighting_scheme logit_normal --logit_mean 1", "opposite"),
    ):
        assert any(text in note for note in flags(words).notes), words


@pytest.mark.parametrize(
    "text",
    [
        "--weighting_scheme mode --mode_scale 1.29",
        "--weighting_scheme logit_normal --shift 3",
        "--snr_gamma 5",
        "--weighting_scheme none",
        "--v_parameterization --zero_terminal_snr",
    ],
)
def test_densities_integrate_to_one(text):
    trained = flags(text)
    lo, hi = max(trained.range[0], -60.0), min(trained.range[1], 60.0)
    x = torch.linspace(lo, hi, 200001, dtype=torch.float64)
    assert float(torch.trapezoid(trained.log_density(x).exp(), x)) == pytest.approx(1, abs=2e-3)


def test_edm_and_k_diffusion_configurations():
    edm = from_config({"loss_kwargs": {"class_name": "training.loss.EDMLoss"}}, "training_options.json")
    assert same_weighting(edm.weighting, weightings.EDM())
    edm2 = from_config({"loss_kwargs": {"class_name": "training.training_loop.EDM2Loss"}}, "o")
    assert same_weighting(edm2.weighting, weightings.EDM(-0.4, 1.0))
    ve = from_config({"loss_kwargs": {"class_name": "VELoss"}}, "o")
    assert same_weighting(ve.weighting, weightings.ELBO(), GRID[GRID > -5])

    def k(density, **model):
        return from_config({"model": {"sigma_data": 0.5, "sigma_sample_density": density, **model}}, "k.json")

    normal = {"type": "lognormal", "mean": -1.2, "std": 1.2}
    assert same_weighting(k(normal).weighting, weightings.EDM())
    soft, simple = k(normal, loss_weighting="soft-min-snr"), k(normal, loss_config="simple")
    ratio = weightings.Custom(lambda l: soft.weighting.log(l) - simple.weighting.log(l), in_log=True)
    assert same_weighting(ratio, weightings.Sigmoid(math.log(4)))  # sheet, section 8: k = ln(1/sd^2)
    assert same_weighting(k(normal, loss_weighting="snr").weighting, simple.weighting)
    for density in (
        {"type": "loglogistic"},
        {"type": "split-lognormal", "mean": -0.5, "std_1": 1.0, "std_2": 0.5},
        {"type": "v-diffusion"},
        {"type": "cosine-interpolated", "image_d": 256, "noise_d_low": 32, "noise_d_high": 256},
        {"type": "loguniform", "min_value": 0.01, "max_value": 80},
    ):
        trained = k(density)
        x = torch.linspace(max(trained.range[0], -60), min(trained.range[1], 60), 100001, dtype=torch.float64)
        assert float(torch.trapezoid(trained.log_density(x).exp(), x)) == pytest.approx(1, abs=1e-4), density


def test_k_diffusions_log_logistic_is_that_of_its_draws():
    """ln sigma = loc + scale logit(u), u uniform, so p(lambda) = |du/dlambda| at lambda = -2 ln sigma."""
    u = torch.linspace(0.01, 0.99, 99, dtype=torch.float64, requires_grad=True)
    logsnr = -2 * (0.7 + 0.4 * u.logit())
    (slope,) = torch.autograd.grad(logsnr.sum(), u)
    density = {"type": "loglogistic", "loc": 0.7, "scale": 0.4}
    trained = from_config({"model": {"sigma_data": 0.5, "sigma_sample_density": density}}, "k.json")
    torch.testing.assert_close(trained.log_density(logsnr.detach()), -slope.abs().log(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", list(objectives))
def test_an_objective_is_what_its_name_is(name):
    """The presets as instances; an adaptive one is shown at its start."""
    by_name, itself = describe(resolve([name])), describe(objectives[name])
    for curve in ("w", "p", "emphasis"):
        assert torch.equal(getattr(by_name, curve), getattr(itself, curve))
    assert (by_name.name, by_name.presets, by_name.drawn) == (itself.name, itself.presets, itself.drawn)


def test_an_objective_of_ones_own():
    sigmoid = weightings.Sigmoid(2.0)
    report = describe(WeightedELBO(sigmoid, Adaptive((-10, 10), sigmoid)), sigma_data=0.3)
    assert report.monotone
    assert report.range == (-10, 10)
    assert report.sigma_data == 0.3
    assert "adapts" in report.notes[0]
    assert report.atom == pytest.approx(3.3535e-4, rel=1e-3)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["flw"], "did you mean 'flow'"),
        ([], "which objective"),
        (["edm", "v"], "give one objective"),
        (["--snr_gama", "5"], "did you mean '--snr_gamma'"),
        (["--snr_gamma", "-1"], "above 0"),
        (["--snr_gamma"], "no value"),
        (["--snr_gamma", "x"], "a number"),
        (["--prediction_type", "velocity"], "one of epsilon"),
        (["--snr_gamma", "5", "--v_parameterization"], "give one family"),
        (["--logit_mean", "1"], "--weighting_scheme"),
        (["--weighting_scheme", "mode", "--mode_scale", "3"], "-1 ... 1.75"),
        (["--guidance_scale", "1", "--precondition_outputs", "1"], "Flux"),
        (["--guidance_scale", "1", "--snr_gamma", "5"], "--guidance_scale"),
        (["--do_edm_style_training", "--snr_gamma", "5"], "not offered"),
        (["--do_edm_style_training", "--prediction_type", "sample"], "epsilon or v_prediction"),
        (["--scale_v_pred_loss_like_noise_pred"], "needs --v_parameterization"),
        (["--min_timestep", "900", "--max_timestep", "100"], "min_timestep < max_timestep"),
        (["missing.json"], "does not exist"),
    ],
)
def test_bad_input_is_one_clear_line(words, message):
    with pytest.raises(LogsnrError) as error:
        resolve(words)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("fn", "message"),
    [
        (lambda l: torch.zeros_like(l), "zero everywhere"),
        (lambda l: -torch.ones_like(l), "negative or not finite"),
        (lambda l: torch.full_like(l, math.nan), "negative or not finite"),
    ],
)
def test_weightings_that_are_none(fn, message):
    trained = resolve(["edm"])
    broken = type(trained)(**{**vars(trained), "weighting": weightings.Custom(fn)})
    with pytest.raises(ValueError, match=message):
        describe(broken)


def run(monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", ["logsnr", "objective", *map(str, words)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


def test_command_line(monkeypatch, capsys, tmp_path):
    code, out, _ = run(
        monkeypatch, capsys, "--snr_gamma", 5, "--prediction_type", "v_prediction", "--plot", tmp_path / "w.png"
    )
    assert code == 0
    assert "No ELBO: w rises" in out
    assert "min-snr-5" in out
    assert (tmp_path / "w.png").read_bytes().startswith(b"\x89PNG")
    code, out, _ = run(monkeypatch, capsys, "vdm++/sigmoid", "--json")
    assert code == 0
    assert json.loads(out)["monotone"] is True
    assert len(json.loads(out)["curves"]["w"]) == 41
    code, _, err = run(monkeypatch, capsys, "--snr_gama", 5)
    assert code == 2
    assert "did you mean '--snr_gamma'" in err
    code, _, err = run(monkeypatch, capsys, "edm", "--plot", tmp_path / "w.pdf")
    assert code == 2
    assert ".png" in err
    code, _, err = run(monkeypatch, capsys, "edm", "--sigma-data", 0)
    assert code == 2
    assert "sigma_data = 0.0" in err
