"""The passport's measurements against closed forms, its JSON, its page and its command."""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys

import pytest
import torch

import logsnr as ls
from logsnr.cli import main
from logsnr.denoiser import Denoiser, NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.evaluation.passport import Level, Passport, Relabelled, examine
from logsnr.evaluation.passport.card import EndPoint
from logsnr.evaluation.passport.findings import find, undertrained, usable_range
from logsnr.evaluation.passport.levels import Linear, fit_linear, start_from_noise
from logsnr.evaluation.passport.meter import Meter, Samples
from logsnr.evaluation.passport.page import write_passport
from logsnr.evaluation.passport.pictures import take_pictures
from logsnr.evaluation.passport.trajectories import GAMMA_STEPS, NFES, STRIDE, STUDENTS, TEACHER
from logsnr.models import UNetConfig, build_network
from logsnr.models.card import save_denoiser
from logsnr.report import figures
from logsnr.training import load_data
from logsnr.training.config import DataConfig

VARIANCES = torch.tensor([2.0, 1.0, 0.5, 0.25, 0.1, 0.05])
MEAN = torch.tensor([0.5, -0.3, 0.0, 0.2, 0.1, 0.0])


def gaussian(dtype: torch.dtype = torch.float32) -> ls.exact.Gaussian:
    return ls.exact.Gaussian(MEAN.to(dtype), torch.diag(VARIANCES.to(dtype)))


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def passport() -> Passport:
    model = gaussian()
    return examine(
        model, model.sample(4000, generator=generator(1)), name="a Gaussian", images=512, levels=9, chunk=512
    )


# measurements


def test_loss_and_calibration_are_those_of_the_gaussian(passport):
    """E = sum lambda/(lambda + sigma^2), of which the linear denoiser of the true moments is the minimum."""
    for level in passport.levels:
        loss = float((VARIANCES / (VARIANCES + level.sigma**2)).mean())
        assert abs(level.loss - loss) < 4.5 * level.stderr
        assert abs(level.ratio - 1) < 5 * level.ratio_stderr + 0.005
        # sqrt(D) sigma_data times the bias is within the noise of 512 means of posterior variance each
        assert level.bias < 0.1
        assert level.eps_norm == pytest.approx(level.eps_norm_ideal, abs=0.06)


def test_the_linear_denoiser_of_the_true_moments_is_the_gaussians():
    model = gaussian(torch.float64)
    keep, rest = 4, 0.3
    variances = torch.cat([VARIANCES[:keep].double(), torch.full((2,), rest, dtype=torch.float64)])
    other = ls.exact.Gaussian(MEAN.double(), torch.diag(variances))
    z = torch.randn(20, 6, generator=generator(), dtype=torch.float64)
    for sigma in (0.1, 1.0, 7.0):
        y = z * math.hypot(1, sigma)
        whole = Linear(MEAN.double(), torch.eye(6, dtype=torch.float64), VARIANCES.double(), 0.0)
        part = Linear(MEAN.double(), torch.eye(6, dtype=torch.float64)[:, :keep], VARIANCES[:keep].double(), rest)
        torch.testing.assert_close(whole.x0(y, sigma), model(z, sigma).x0, rtol=1e-10, atol=1e-10)
        torch.testing.assert_close(part.x0(y, sigma), other(z, sigma).x0, rtol=1e-10, atol=1e-10)


def test_fitted_moments_are_the_datas():
    x = gaussian().sample(2048, generator=generator(3))
    found = fit_linear(x)
    torch.testing.assert_close(found.variances, VARIANCES, rtol=0.2, atol=0)
    torch.testing.assert_close(found.mean, MEAN, rtol=0, atol=0.12)
    assert found.rest == 0
    few = fit_linear(x[:5])  # fewer samples than dimensions: the rest of the space keeps a variance
    assert few.axes.shape == (6, 3)
    assert few.rest > 0


@pytest.mark.parametrize("sigma", [0.7, 3.0, 50.0])
def test_the_start_is_the_kl_divergence_of_gaussians(sigma):
    from torch.distributions import MultivariateNormal, kl_divergence

    alpha = 1 / math.hypot(1, sigma)
    s2 = 1 - alpha**2
    states = MultivariateNormal(alpha * MEAN.double(), torch.diag(alpha**2 * VARIANCES.double() + s2))
    noise = MultivariateNormal(torch.zeros(6, dtype=torch.float64), torch.eye(6, dtype=torch.float64))
    count = 10**9  # moments without noise
    found = start_from_noise(Linear(MEAN, torch.eye(6), VARIANCES, 0.0), count, sigma, None)
    assert found.kl == pytest.approx(float(kl_divergence(states, noise)), rel=1e-4)
    assert found.mean_leak == pytest.approx(float(MEAN.norm()) / sigma, rel=1e-4)
    assert found.variance_leak == pytest.approx(2.0 / sigma**2)
    shifted = MEAN + 0.5 * MEAN / MEAN.norm() + gaussian().sample(4000, generator=generator()) - MEAN
    measured = start_from_noise(Linear(MEAN, torch.eye(6), VARIANCES, 0.0), count, sigma, shifted)
    along = float((VARIANCES * (MEAN / MEAN.norm()) ** 2).sum().sqrt())
    assert measured.mean_shift == pytest.approx(0.5 / along, abs=4 * measured.mean_shift_stderr)


def test_the_length_of_a_mean_is_not_that_of_its_noise():
    """|m|^2 of 16 samples is too large by the trace over 16, 3.9/16; less that, its mean over draws is |m|^2 = 4.

    mean_leak^2 sigma^2 over 400 draws, within 4 standard errors, of which the correction is more than 10.
    """
    mean = torch.tensor([0.0, 0.0, 0.0, 0.0, 0.0, 2.0])
    x = gaussian().sample(400 * 16, generator=generator(8)).reshape(400, 16, 6) - MEAN + mean
    leaks = [start_from_noise(fit_linear(part), 16, 3.0, None).mean_leak for part in x]
    squared = 9 * torch.tensor(leaks, dtype=torch.float64).square()
    stderr = float(squared.std()) / 400**0.5
    assert float(squared.mean()) == pytest.approx(4, abs=4 * stderr)
    assert float(VARIANCES.sum()) / 16 > 10 * stderr


def test_curvature_is_that_of_the_exact_trajectories(passport):
    """Along y = c sqrt(lambda + sigma^2) the direction is eps = c sigma / sqrt(lambda + sigma^2)."""
    assert len(passport.bends) == TEACHER // STRIDE - 1
    high, low = passport.declared_range[1], passport.declared_range[0]
    step = (high / low) ** (STRIDE / (TEACHER - 1))
    for bend in passport.bends:
        a, b = bend.sigma * math.sqrt(step), bend.sigma / math.sqrt(step)
        change = [sum(s / (v + s * s) ** 0.5 * k for s, k in ((a, 1), (b, -1))) for v in VARIANCES.tolist()]
        expected = math.sqrt(sum(c * c for c in change) / 6) / math.log(a / b)
        # 32 draws of noise decide c: its mean square is 1 to 2/sqrt(2 * 32 * few directions)
        assert bend.curvature == pytest.approx(expected, rel=0.35, abs=2e-4)


def test_every_evaluation_is_counted():
    class Counting(Denoiser):
        seen = 0

        def __init__(self) -> None:
            super().__init__()
            self.inner = gaussian()
            self.shape, self.sigma_data, self.trained_range = (6,), self.inner.sigma_data, (0.01, 50.0)

        def forward(self, z, sigma, **cond):
            self.seen += len(z)
            return self.inner(z, sigma)

    model, told = Counting(), []
    found = examine(
        model, gaussian().sample(200, generator=generator()), images=40, trajectories=3, levels=6,
        progress=lambda part, share: told.append((part, share)),
    )  # fmt: skip
    assert found.cost == model.seen
    assert found.evaluations["loss"] == 40 * (6 + 2)  # one level beyond each end of the trained range
    assert [level.trained for level in found.levels] == [False, *[True] * 6, False]
    assert found.evaluations["teacher"] == 3 * (TEACHER + TEACHER // 2)
    assert found.evaluations["few steps"] == 3 * len(STUDENTS) * sum(NFES)
    assert found.evaluations["gamma"] == 3 * GAMMA_STEPS
    assert found.evaluations["labels"] == 40 * 6 * 5
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert 0.85 < shares[-1] <= 1


def test_relabelling_undoes_a_mistake():
    class Network(torch.nn.Module):
        def forward(self, z, label):
            return gaussian()(z, 1.3 * math.exp(-0.5 * float(label[0]))).eps

    wrong = NetworkDenoiser(Network(), ls.predictions.Eps(), shape=(6,))
    right = Relabelled(wrong, 1 / 1.3, "label")
    z = torch.randn(5, 6, generator=generator())
    for sigma in (0.3, 2.0):
        torch.testing.assert_close(right(z, sigma).eps, gaussian()(z, sigma).eps, rtol=1e-4, atol=1e-5)
        same = Relabelled(gaussian(), 1.0, "model")(z, sigma)
        torch.testing.assert_close(same.x0, gaussian()(z, sigma).x0)
        told = Relabelled(gaussian(), 1.5, "model")(z, sigma)
        y = z * math.hypot(1, sigma)
        # the Gaussian told 1.5 sigma: gain lambda/(lambda + (1.5 sigma)^2) at the same y
        gain = VARIANCES / (VARIANCES + (1.5 * sigma) ** 2)
        torch.testing.assert_close(told.x0, MEAN + gain * (y - MEAN), rtol=1e-4, atol=1e-5)


# judgements


def level(sigma: float, ratio: float = 0.8, **changes) -> Level:
    values = {
        "sigma": sigma, "trained": True, "loss": 0.5, "stderr": 0.01, "linear": 0.5 / ratio, "ratio": ratio,
        "ratio_stderr": 0.01, "eps_norm": 0.5, "eps_norm_ideal": 0.5, "bias": 0.0, "non_finite": 0,
    }  # fmt: skip
    return Level(**{**values, **changes})


def test_a_level_is_undertrained_beyond_chance_only():
    assert not undertrained(level(1.0, ratio=1.07))  # two standard errors
    assert undertrained(level(1.0, ratio=1.09))
    assert not undertrained(level(1.0, ratio=math.nan))


def test_the_usable_range_is_the_longest_good_run():
    sigmas = [10.0, 5.0, 2.0, 1.0, 0.5, 0.1]
    good = [level(s) for s in sigmas]
    assert usable_range(good, (0.09, 11.0)) == (0.09, 11.0)
    assert usable_range([level(10.0, ratio=2.0), *good[1:]], (0.09, 11.0)) == (0.09, 5.0)
    assert usable_range([*good[:2], level(2.0, non_finite=1), *good[3:]], (0.09, 11.0)) == (0.09, 1.0)
    assert usable_range([*good[:4], level(0.5, ratio=3.0), good[5]], (0.09, 11.0)) == (1.0, 11.0)
    assert usable_range([level(s, ratio=2.0) for s in sigmas], (0.09, 11.0)) is None
    outside = level(20.0, ratio=9.0, trained=False)
    assert usable_range([outside, *good], (0.09, 11.0)) == (0.09, 11.0)


def test_the_nfe_to_choose_is_the_first_within_the_target():
    rows = (("A", 4, 0.3), ("B", 4, 0.2), ("A", 8, 0.049), ("B", 8, 0.06), ("A", 20, 0.01), ("B", 20, 0.02))
    points = [EndPoint(solver=s, nfe=n, rmse=e) for s, n, e in rows]

    def found(end_points):
        out = find(
            levels=[level(1.0)], judged=[level(1.0)], scan=None, start=None, end_points=end_points, teacher_error=0.0,
            lost=0, trajectories=8, half=(), declared=(0.1, 10.0), trained=(0.1, 10.0), own=True, usable=(0.1, 10.0),
            sigma_data=10.0, source="data",
        )  # fmt: skip
        return next(f for f in out if f.kind == "nfe")

    assert found(points).value == 8
    assert "Choose 8 with A" in found(points).text
    assert "0.200 at 4, 0.049 at 8, 0.010 at 20" in found(points).text
    assert found(points[:2]).value == math.inf
    lucky = [EndPoint(solver="A", nfe=6, rmse=0.04), EndPoint(solver="A", nfe=7, rmse=0.06)]
    assert found([*points, *lucky]).value == 8


# the file, the page, the command


def test_it_comes_back_from_its_file(passport, tmp_path):
    passport.save(tmp_path / "new" / "p.json")
    again = Passport.load(tmp_path / "new" / "p.json")
    assert again == passport
    assert again.trained_range == (0.0, math.inf)
    assert again.sampling_range == passport.sampling_range
    assert again.pictures is None
    text = (tmp_path / "new" / "p.json").read_text()
    assert json.loads(text)["version"] == 1
    for broken, message in (
        (text[:100], "cannot be read as a passport"),
        ("[]", "holds a list, no mapping of names"),
        (text.replace('"version": 1', '"version": 2'), "of a newer logsnr"),
        (text.replace('"seed": 0', '"sead": 0'), "cannot be read as a passport"),
        (text.replace('"levels": [', '"levels": [3, ', 1), "cannot be read as a passport"),
    ):
        (tmp_path / "broken.json").write_text(broken)
        with pytest.raises(LogsnrError, match=message) as caught:
            Passport.load(tmp_path / "broken.json")
        assert "\n" not in str(caught.value)
    with pytest.raises(LogsnrError, match=r"does not exist: give the \.json file"):
        Passport.load(tmp_path / "missing.json")


def test_its_eta_curve_is_that_of_the_projection_and_empty_without_data(passport, tmp_path):
    own = examine(gaussian(), images=32, trajectories=2, levels=5)
    assert (own.source, own.eta_curve) == ("model", ())
    passport.save(tmp_path / "p.json")
    curve = Passport.load(tmp_path / "p.json").eta_curve
    assert curve == tuple((e.sigma, e.eta_high) for e in passport.projection)
    assert (curve[-1][0], curve[0][0]) == pytest.approx(passport.declared_range)
    # At low noise y's nearest sample is x itself: eta^2 = ||x0 - x||^2 / (D sigma^2), eps's squared error, close to 1.
    assert curve[-1][1] == pytest.approx(1, abs=0.2)
    lost = dataclasses.replace(passport.projection[0], eta_high=math.nan)
    assert dataclasses.replace(passport, projection=(lost, *passport.projection[1:])).eta_curve == curve[1:]


def test_the_page_stands_alone_and_quotes_every_finding(passport, tmp_path):
    page = write_passport(passport, tmp_path / "p.html").read_text(encoding="utf-8")
    for finding in passport.findings:
        assert finding.text.replace("'", "&#x27;") in page
    for point in passport.end_points:
        assert f"<td>{point.rmse:.4f}</td>" in page
    assert f"{passport.cost:,} network evaluations" in page
    assert all(a.startswith(("data:", "#")) for a in re.findall(r'(?:src|href)="([^"]*)"', page))
    assert "Bars are three standard errors" in page
    assert f"{passport.probe.evaluations} evaluations" in page


@pytest.mark.parametrize(("shape", "pictures"), [((1, 2, 2), True), ((3, 4, 4), True), ((2, 3), False)])
def test_small_and_colour_images_have_pictures(shape, pictures):
    x = torch.rand(64, *shape, generator=generator()) * 2 - 1
    meter = Meter(ls.exact.PointCloud(x))
    found = take_pictures(meter, Samples(x[:8], x[8:16], {}), x[:8], {})
    assert (found is not None) == pictures
    assert found is None or found.denoised.shape == (2 * 8 * 8, *shape)


def test_a_logarithmic_axis_begins_above_nothing():
    """A curve over four decades, and the line at 1.05, within the chart: its ticks are powers of ten alone."""
    sigmas = [10.0, 1.0, 0.1, 0.01]
    text = figures.against_logsnr({"": (sigmas, [0.9, 10.0, 400.0, 9000.0])}, ylabel="", log=True, level=("", 1.05))
    ticks = {t for t in re.findall(r">(\d[\d.]*)</text>", text) if float(t) in (0.3, 1, 3, 10, 30, 100, 300, 1000)}
    assert ticks == {"1", "10", "100", "1000"}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run whose network has not been trained."""
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    torch.manual_seed(0)
    config = UNetConfig(channels=[8], layers_per_block=1, mid_attention=False, norm_groups=4)
    denoiser = NetworkDenoiser(
        build_network(config, (1, 8, 8)), ls.predictions.EDM(sigma_data=0.7), shape=(1, 8, 8), pixels=ls.Pixels(17),
        sigma_data=0.7, trained_range=(0.02, 50.0),
    )  # fmt: skip
    save_denoiser(denoiser, folder, step=0, training={"data": {"source": "digits"}})
    return folder


def call(monkeypatch, capsys, *args):
    monkeypatch.setattr(sys, "argv", ["logsnr", *map(str, args)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = stop.code or 0
    return code, *capsys.readouterr()


SIZE = ("--images", 32, "--trajectories", 2)


@pytest.mark.usefixtures("short_passports")
def test_the_command_writes_page_and_file_and_others_take_its_range(run, tmp_path, monkeypatch, capsys):
    out = tmp_path / "new" / "page.html"
    code, text, _ = call(monkeypatch, capsys, "passport", run, *SIZE, "--out", out, "--json")
    assert code == 0
    facts = json.loads(text)
    found = Passport.load(out.with_suffix(".json"))
    assert {k: v for k, v in facts.items() if k != "out"} == found.to_dict()
    assert found.source == "data"
    assert found.samples + found.references == 297
    assert {f.kind for f in found.troubles} == {"undertrained"}
    assert found.half
    page = out.read_text(encoding="utf-8")
    assert page.count("<img") == 8 + 9
    # its range reaches the search
    low, high = found.declared_range
    narrow = json.loads(out.with_suffix(".json").read_text()) | {"sampling_range": [2 * low, high / 2]}
    (tmp_path / "narrow.json").write_text(json.dumps(narrow))
    plan = tmp_path / "plan.json"
    arguments = ("calibrate", run, "--nfe", 1, "-n", 4, "--rollouts", 40, "--out", plan)
    assert call(monkeypatch, capsys, *arguments, "--passport", tmp_path / "narrow.json", "--json")[0] == 0
    assert 2 * low <= ls.Plan.load(plan).sigmas[0] <= high / 2
    arguments = ("compare", run, "--nfe", 2, "-n", 2, "--teacher-steps", 16, "--features", "none", "--no-peers")
    narrowed = ("--solvers", "ddim", "--passport", tmp_path / "narrow.json", "--json")
    code, text, _ = call(monkeypatch, capsys, *arguments, *narrowed)
    assert code == 0
    assert json.loads(text)["sigma_range"] == [2 * low, high / 2]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["--out", "page.png"], ["page.png", ".html"]),
        (["--data", "missing.npz"], ["missing.npz", "does not exist"]),
        (["--sigma-max", "90"], ["90.0", "[0.02, 50]"]),
        (["--images", "9"], ["images = 9"]),
    ],
)
def test_bad_input_is_one_line_and_exit_code_2(run, tmp_path, monkeypatch, capsys, args, words):
    monkeypatch.chdir(tmp_path)
    code, out, err = call(monkeypatch, capsys, "passport", run, *args)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert all(word in err for word in words)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.usefixtures("short_passports")
def test_the_command_examines_a_pipeline_on_the_data_given(tmp_path, monkeypatch, capsys):
    """Its images reach the model as `Pixels` of their own grey levels, 17, not of 256."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        norm_num_groups=4, down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), add_attention=False,
    )  # fmt: skip
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "tiny")
    arguments = ("passport", tmp_path / "tiny", *SIZE, "--out", tmp_path / "p.html", "--json")
    code, _, err = call(monkeypatch, capsys, *arguments, "--data", "digits")
    assert code == 0, err
    data = load_data(DataConfig())
    x = ls.Pixels(17).encode(torch.cat([data.test_images, data.train_images])[:2048])
    found = Passport.load(tmp_path / "p.json")
    assert found.network.startswith("UNet2DModel")
    by_hand = examine(ls.load(tmp_path / "tiny"), x, images=32, trajectories=2, name="tiny")
    assert found.to_dict() == by_hand.to_dict()
    assert {f.kind for f in found.troubles} == {"undertrained"}


def test_help_shows_an_example(monkeypatch, capsys):
    code, out, _ = call(monkeypatch, capsys, "passport", "--help")
    assert code == 0
    assert "Example: logsnr passport" in out
