"""The Gaussian start: the closed form is the flow of Gaussian data, whatever form its covariance takes."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

import logsnr as ls
from logsnr import gaussian, zoo
from logsnr.cli import starts
from logsnr.errors import LogsnrError
from logsnr.exact import Gaussian, GaussianField, GaussianMixture
from logsnr.gaussian import Residuals
from logsnr.grids import flow_range, log_linear
from logsnr.noise import alpha_s
from logsnr.sampling.plan import Plan
from logsnr.sampling.teacher import teacher_plan
from logsnr.solvers import ge, unipc

F64 = torch.float64
GaussianStart = ls.GaussianStart


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=generator(seed), dtype=F64)


def spectrum(*shape: int, power: float = 2.0) -> Tensor:
    """Variances 1/f^2 of the cosines of images `[C, H, W]`."""
    c, h, w = shape
    f = torch.hypot(torch.arange(h, dtype=F64)[:, None], torch.arange(w, dtype=F64)).clamp(min=0.5)
    return (3 / f**power).expand(c, h, w) * torch.arange(1, c + 1, dtype=F64)[:, None, None]


def field(*shape: int) -> tuple[GaussianStart, GaussianField]:
    mean = 0.3 * randn(*shape, seed=5)
    return GaussianStart.of(mean, spectrum(*shape)), GaussianField(mean, spectrum(*shape))


def narrow(denoiser, lo: float, hi: float):
    denoiser.trained_range = (lo, hi)
    return denoiser


def low_rank(dim: int, rank: int, rest: float) -> tuple[Tensor, gaussian.Covariance]:
    columns = torch.linalg.qr(randn(dim, rank, seed=3))[0]
    values = torch.cat([torch.linspace(9, 1, rank, dtype=F64), torch.tensor([rest], dtype=F64)])
    cov = gaussian.Covariance(kind="low-rank", basis=gaussian.Axes(columns), values=values, dim=dim)
    eye = torch.eye(dim, dtype=F64)
    return columns @ torch.diag(values[:-1] - rest) @ columns.T + rest * eye, cov


def test_the_start_is_the_teachers_state_at_every_level_and_a_run_from_it_the_run_from_the_top() -> None:
    d = 6
    a = randn(d, d, seed=2)
    matrix, mean = a @ a.T / d, randn(d, seed=1)
    denoiser = narrow(Gaussian(mean, matrix), 0.002, 150.0)
    start = GaussianStart.of(mean, gaussian.of_matrix(matrix))
    lo, hi = denoiser.sampling_range
    noise = randn(16, d, seed=4)

    def exact(high: float, low: float, z: Tensor) -> Tensor:
        return ls.solve(denoiser, high, low, z, rtol=1e-8, atol=1e-9).z

    above, state = hi, noise
    for sigma in (0.8 * hi, 5.0, 0.2, lo):
        above, state = sigma, exact(above, sigma, state)
        torch.testing.assert_close(start(noise, sigma, sigma_from=hi), state, rtol=0, atol=1e-6)
    begun = start(noise, 5.0, sigma_from=hi)
    torch.testing.assert_close(exact(5.0, lo, begun), state, rtol=0, atol=1e-6)
    top, below = unipc(log_linear(150, hi, lo), 3), unipc(log_linear(100, 5.0, lo), 3)
    x = ls.sample(denoiser, below, noise=noise, start=start)
    torch.testing.assert_close(x, ls.sample(denoiser, top, noise=noise), rtol=0, atol=1e-4)
    errors = start.held_out_error(denoiser, noise=noise, steps=100)
    assert len(errors) == 100
    assert max(errors.values()) < 1e-4


def test_two_starts_make_one_and_both_ends_are_limits() -> None:
    start, _ = field(3, 6, 5)
    noise = randn(4, 3, 6, 5)
    for top in (80.0, math.inf):
        there = start(noise, 3.0, sigma_from=top)
        halfway = start(noise, 20.0, sigma_from=top)
        torch.testing.assert_close(start(halfway, 3.0, sigma_from=20.0), there, rtol=0, atol=1e-12)
        torch.testing.assert_close(start(noise, top, sigma_from=top), noise, rtol=0, atol=1e-12)
    torch.testing.assert_close(start(noise, 3.0), start(noise, 3.0, sigma_from=1e9), rtol=0, atol=1e-7)
    # from pure noise to clean data: m + C^(1/2) w
    cov, flat = start.covariances[0], noise.flatten(1)
    torch.testing.assert_close(
        start(noise, 0.0).flatten(1), start.means.flatten(1) + cov.mapped(torch.sqrt, flat), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("path", ["flow", "ve"])
def test_a_pipelines_state_is_the_canonical_one_times_its_scale(path) -> None:
    start, _ = field(1, 4, 4)
    noise, (alpha, s) = randn(3, 1, 4, 4), alpha_s(5.0)
    scale = 1 / (alpha + s) if path == "flow" else 1 / alpha
    torch.testing.assert_close(start(noise, 5.0, path=path), scale * start(noise, 5.0), rtol=1e-12, atol=1e-12)


def test_low_rank_and_isotropic_is_the_full_matrix_that_it_stands_for() -> None:
    matrix, cov = low_rank(12, 3, 0.2)
    full = gaussian.of_matrix(matrix)
    x, s = randn(5, 12, seed=8), torch.tensor([[0.3], [1.0], [2.0], [5.0], [80.0]], dtype=F64)
    for gain in (torch.sqrt, lambda c: c / (c + 4.0), lambda c: s / (c + s * s)):
        torch.testing.assert_close(cov.mapped(gain, x), full.mapped(gain, x), rtol=0, atol=1e-12)
    mean, y = randn(12, seed=9), randn(5, 12, seed=10)
    for ours, theirs in zip(cov.products(x, x, y), full.products(x, x, y), strict=True):
        torch.testing.assert_close((ours * cov.values).sum(1), (theirs * full.values).sum(1), rtol=1e-10, atol=1e-10)
    assert float(cov.counts.sum()) == 12
    assert float(cov.values @ cov.counts) == pytest.approx(float(matrix.trace()))
    one, other = GaussianField(mean, cov), Gaussian(mean, matrix)
    for sigma in (0.1, 3.0, math.inf):
        a, b = one(x, sigma), other(x, sigma)
        torch.testing.assert_close(a.x0, b.x0, rtol=0, atol=1e-10)
        torch.testing.assert_close(a.eps, b.eps, rtol=0, atol=1e-10)
    torch.testing.assert_close(one.log_density(x, 0.7), other.log_density(x, 0.7), rtol=1e-10, atol=0)
    assert one.sigma_data == pytest.approx(other.sigma_data)


def test_cosines_are_the_eigenvectors_of_a_mirrored_field() -> None:
    """Their matrix is orthonormal and diagonalises the second difference with mirrored edges."""
    n = 9
    m = gaussian.cosine_matrix(n)
    torch.testing.assert_close(m @ m.T, torch.eye(n, dtype=F64), rtol=0, atol=1e-13)
    second = 2 * torch.eye(n, dtype=F64) - torch.diag(torch.ones(n - 1, dtype=F64), 1)
    second -= torch.diag(torch.ones(n - 1, dtype=F64), -1)
    second[0, 0] = second[-1, -1] = 1
    found = m @ second @ m.T
    expected = 2 - 2 * torch.cos(math.pi * torch.arange(n, dtype=F64) / n)
    torch.testing.assert_close(found, torch.diag(expected), rtol=0, atol=1e-12)
    basis = gaussian.Cosines(torch.linalg.qr(randn(3, 3))[0], (4, n))
    x = randn(2, 3 * 4 * n)
    torch.testing.assert_close(basis.combined(basis.coordinates(x)), x, rtol=0, atol=1e-12)


def test_fits_of_every_kind_agree_where_they_must() -> None:
    _, cov = low_rank(40, 4, 0.0)
    mean = randn(40, seed=1)
    x = GaussianField(mean, cov).sample(300, generator=generator(2))
    full = GaussianStart.fit(x, kind="full")
    ranked = GaussianStart.fit(x, rank=4)
    torch.testing.assert_close(full.means[0], x.mean(0), rtol=0, atol=1e-12)
    noise = randn(8, 40, seed=6)
    torch.testing.assert_close(ranked(noise, 2.0), full(noise, 2.0), rtol=0, atol=1e-8)
    all_but_one = GaussianStart.fit(x + 0.1 * randn(300, 40, seed=7), rank=39)
    whole = GaussianStart.fit(x + 0.1 * randn(300, 40, seed=7), kind="full")
    torch.testing.assert_close(all_but_one(noise, 2.0), whole(noise, 2.0), rtol=0, atol=1e-8)


def test_few_images_are_told_best_by_cosines_and_many_by_their_covariance() -> None:
    _, denoiser = field(2, 8, 8)
    few = denoiser.sample(24, generator=generator(1))
    assert GaussianStart.fit(few).covariances[0].kind == "cosine"
    _, cov = low_rank(64, 3, 0.01)
    many = GaussianField(randn(1, 8, 8, seed=1), cov).sample(2000, generator=generator(2))
    assert GaussianStart.fit(many).covariances[0].kind == "full"
    errors = {
        k: GaussianStart.fit(few, kind=k).held_out_error(
            narrow(denoiser, 0.01, 150.0), n=32, generator=generator(3), steps=32
        )
        for k in ("cosine", "full")
    }
    low = min(errors["full"], key=lambda s: abs(s - 3))
    assert errors["cosine"][low] < 0.8 * errors["full"][low]


def test_noise_becomes_states_of_the_data() -> None:
    """Monte Carlo: at sigma the states have mean m and covariance C + sigma^2 (in y), with D >> samples too."""
    start, _denoiser = field(1, 6, 6)
    n, sigma = 20_000, 2.0
    y = start(randn(n, 1, 6, 6, seed=3), sigma).flatten(1) / alpha_s(sigma)[0]
    cov = start.covariances[0]
    matrix = cov.mapped(lambda c: c + sigma**2, torch.eye(36, dtype=F64))
    assert float((y.mean(0) - start.means[0].flatten()).abs().max()) < 5 * math.sqrt(float(matrix.diagonal().max()) / n)
    spread = (matrix.diagonal()[:, None] * matrix.diagonal() + matrix.square()) / n
    assert float(((torch.cov(y.T) - matrix).abs() / spread.sqrt()).max()) < 5


def test_every_class_has_its_own_gaussian() -> None:
    d = 5
    matrix, means = 0.3 * torch.eye(d, dtype=F64) + 0.5, 3 * randn(2, d, seed=1)
    labels = torch.arange(4000) % 2
    draws = randn(4000, d, seed=2) @ torch.linalg.cholesky(matrix).T
    x = means[labels] + draws
    start = GaussianStart.fit(x, labels=labels + 7, null=3, shared=True)
    assert start.labels == (7, 8, 3)
    assert start.which == (0, 0, 1)
    noise = randn(6, d, seed=4)
    cond = {"class_labels": torch.tensor([7, 8, 8, 3, 7, 3])}
    mixed = start(noise, 1.5, cond, sigma_from=90.0)
    for label in (7, 8):
        own = GaussianStart.of(x[labels + 7 == label].mean(0), start.covariances[0])
        rows = cond["class_labels"] == label
        torch.testing.assert_close(mixed[rows], own(noise[rows], 1.5, sigma_from=90.0), rtol=0, atol=1e-12)
    everyone = GaussianStart.fit(x)
    torch.testing.assert_close(mixed[[3, 5]], everyone(noise[[3, 5]], 1.5, sigma_from=90.0), rtol=0, atol=1e-12)
    apart = GaussianStart.fit(x, labels=labels)  # enough samples for a covariance each
    assert apart.which == (0, 1)
    torch.testing.assert_close(
        apart(noise, 1.5, {"class_labels": torch.zeros(6, dtype=torch.long)}),
        GaussianStart.fit(x[labels == 0])(noise, 1.5),
        rtol=0,
        atol=1e-10,
    )


def test_a_models_own_samples_tell_its_gaussian() -> None:
    _, denoiser = field(1, 4, 4)
    narrow(denoiser, 0.01, 200.0)
    start = GaussianStart.of_model(denoiser, 1000, plan=16, generator=generator(1), kind="cosine")
    assert start.made["samples"] == 1000
    errors = start.held_out_error(denoiser, n=32, generator=generator(2), steps=32)
    top = denoiser.sampling_range[1]
    assert max(e for s, e in errors.items() if s > top / 100) < 0.12
    with pytest.raises(LogsnrError, match="samples of another model"):
        start.held_out_error(GaussianField(torch.ones(1, 4, 4), spectrum(1, 4, 4)), n=2, generator=generator())


@pytest.mark.parametrize("kind", ["full", "low-rank", "cosine"])
def test_a_start_is_kept_whole(tmp_path, kind) -> None:
    _, denoiser = field(2, 4, 4)
    x, labels = denoiser.sample(60, generator=generator(1)).float(), torch.arange(60) % 3
    start = GaussianStart.fit(x, labels=labels, null=9, kind=kind)
    path = start.save(tmp_path / "start.safetensors")
    again = GaussianStart.load(path)
    noise, cond = torch.randn(4, 2, 4, 4, generator=generator(2)), {"class_labels": torch.tensor([0, 1, 2, 9])}
    assert torch.equal(again(noise, 3.0, cond), start(noise, 3.0, cond))
    assert again.fingerprint == start.fingerprint
    assert again.made == start.made
    assert repr(again) == repr(start)
    assert not list(tmp_path.glob(".*"))
    data = bytearray(path.read_bytes())
    data[-3] ^= 64
    path.write_bytes(data)
    with pytest.raises(LogsnrError, match="was altered"):
        GaussianStart.load(path)
    path.write_bytes(data[:90])
    with pytest.raises(LogsnrError, match="cannot be read as a Gaussian start"):
        GaussianStart.load(path)
    with pytest.raises(LogsnrError, match="does not exist"):
        GaussianStart.load(tmp_path / "none.safetensors")


def test_sampling_says_what_does_not_fit() -> None:
    start, denoiser = field(1, 4, 4)
    narrow(denoiser, 0.01, 80.0)
    plan = ge(flow_range(4, 20.0, 0.01, "min"), 1.5)
    options = {"n": 2, "generator": generator()}
    with pytest.raises(LogsnrError, match=r"start is of samples of shape \(1, 4, 4\), the model's have \(2,\)"):
        ls.sample(Gaussian([0.0, 0.0], torch.eye(2)), plan, start=start, **options)
    with (
        pytest.raises(LogsnrError, match="above the model's largest level, 80"),
        pytest.warns(UserWarning, match="outside the range"),
    ):
        ls.sample(denoiser, ge(flow_range(4, 120.0, 0.01, "min"), 1.5), start=start, **options)
    with pytest.raises(LogsnrError, match="one mean for all: fit it with labels="):
        start(randn(2, 1, 4, 4), 3.0, {"class_labels": torch.zeros(2, dtype=torch.long)})
    needing = replace(plan, meta={"start": {"fingerprint": start.fingerprint, "sigma_from": 80.0}})
    with pytest.raises(LogsnrError, match="give start=, the GaussianStart"):
        ls.sample(denoiser, needing, **options)
    other = GaussianStart.of(torch.zeros(1, 4, 4), spectrum(1, 4, 4))
    with pytest.raises(LogsnrError, match="calibrated with another start"):
        ls.sample(denoiser, needing, start=other, **options)
    noise = randn(2, 1, 4, 4)
    torch.testing.assert_close(
        ls.sample(denoiser, needing, noise=noise, start=start),
        ls.sample(denoiser, plan, noise=start(noise, 20.0, sigma_from=80.0)),
    )
    assert ls.sample(denoiser, Plan.from_dict(needing.to_dict()).tail(1), **options).isfinite().all()
    seen = ls.trajectory(denoiser, plan, noise=noise, start=start)
    torch.testing.assert_close(seen.z[0], start(noise, 20.0, sigma_from=80.0))


X = randn(8, 1, 4, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GaussianStart.fit(X, rank=8), r"rank = 8: 8 samples of 16 numbers about 1 means have rank 1 to 7"),
        (lambda: GaussianStart.fit(X, rank=2, kind="full"), "rank = 2 with kind = 'full'"),
        (lambda: GaussianStart.fit(X, kind="dct"), "kind 'dct' is not one of auto, full, low-rank, cosine"),
        (lambda: GaussianStart.fit(X.flatten(1), kind="cosine"), r"give \[C, H, W\]"),
        (lambda: GaussianStart.fit(X, labels=torch.arange(8)), "8 samples about 8 means leave no covariance"),
        (lambda: GaussianStart.fit(X, labels=torch.arange(7)), "one integer per sample"),
        (lambda: GaussianStart.fit(X, labels=torch.arange(8) % 2, null=1), "null = 1 is the label of 4 samples"),
        (lambda: GaussianStart.fit(X, null=1), "null = 1 without labels"),
        (lambda: GaussianStart.fit(X / 0), "finite and in the units of x"),
        (lambda: GaussianStart.of(X[0, 0], torch.ones(1, 3, 3)), "9 dimensions with a mean of shape"),
        (lambda: GaussianStart.fit(X)(X[:, :, :3], 1.0), "noise of shape"),
        (lambda: GaussianStart.fit(X)(X, 5.0, sigma_from=4.0), "give a level in between"),
        (lambda: GaussianStart.fit(X, labels=torch.arange(8) % 2)(X, 1.0), "has a mean per class"),
        (
            lambda: GaussianStart.fit(X, labels=torch.arange(8) % 2)(X, 1.0, {"class_labels": torch.full((8,), 5)}),
            "class '?5'? is not one of 0, 1, of which this start has a mean",
        ),
    ],
)
def test_what_cannot_be_is_refused_in_words(call, message: str) -> None:
    with pytest.raises(LogsnrError, match=message) as caught:
        call()
    assert "\n" not in str(caught.value)


def test_large_images_cost_no_matrix_of_their_size() -> None:
    """786,432 numbers: the start of a stationary field is the flow of its exact denoiser."""
    shape = (3, 512, 512)
    mean, variances = torch.zeros(shape), 2000 * spectrum(*shape)
    start, denoiser = GaussianStart.of(mean, variances), GaussianField(mean, variances)
    noise = torch.linspace(-1, 1, 512).expand(1, *shape)  # low frequencies, which stand out of the noise
    top, below = 40.0, 39.96  # one Euler step so short that it is the flow
    z = start(noise, below, sigma_from=top)
    euler = ls.sample(narrow(denoiser, 0.1, 100.0), Plan((top, below), ((1.0,),)), noise=noise)
    moved = float((z - noise).abs().max())
    assert moved > 3e-4
    assert float((z - euler).abs().max()) < 0.01 * moved


def test_a_covariance_knows_its_residuals_degrees_of_freedom() -> None:
    x, at = randn(30, 4, seed=2), torch.arange(30) % 3
    within = Residuals.of(x, at)
    cov = gaussian.fit(within, "full")
    expected = sum(torch.cov(x[at == k].T) * 9 for k in range(3)) / 27
    torch.testing.assert_close(cov.mapped(lambda c: c, torch.eye(4, dtype=F64)), expected, rtol=0, atol=1e-12)


def test_a_mixture_far_above_its_modes_is_a_gaussian() -> None:
    """The start's error falls with noise as the modes melt together: the claim that it rests on."""
    mixture = narrow(
        GaussianMixture(
            [0.5, 0.5],
            0.8 * torch.tensor([[1.0, 0.0], [-1.0, 0.4]], dtype=F64),
            0.1 * torch.eye(2, dtype=F64).repeat(2, 1, 1),
        ),
        0.01,
        120.0,
    )
    start = GaussianStart.fit(mixture.sample(50_000, generator=generator(1)))
    errors = start.held_out_error(mixture, n=256, generator=generator(2), steps=64)
    levels = [min(errors, key=lambda s: abs(s - at)) for at in (10.0, 3.0, 1.0, 0.3)]
    found = [errors[s] for s in levels]
    assert found == sorted(found)
    assert found[0] < 0.01
    assert found[-1] > 0.05


def test_a_calibration_begins_where_the_start_pays_and_its_plan_says_so() -> None:
    """A Gaussian's own start is exact: all evaluations go below it.  A wrong one is left alone."""
    mean, matrix = randn(12, seed=3), torch.diag(torch.linspace(0.9, 0.1, 12, dtype=F64).square())
    denoiser = narrow(Gaussian(mean, matrix), 0.002, 150.0)
    start = GaussianStart.of(mean, gaussian.of_matrix(matrix))
    options = {"n": 16, "seed": 2, "teacher": 32, "rollouts": 60}
    plan, plain = ls.calibrate(denoiser, 3, start=start, **options), ls.calibrate(denoiser, 3, **options)
    high = denoiser.sampling_range[1]
    assert plan.sigmas[0] < 0.2 * high
    assert plan.meta["start"] == {"fingerprint": start.fingerprint, "sigma_from": high}
    with pytest.raises(LogsnrError, match="give start=, the GaussianStart"):
        ls.sample(denoiser, plan, n=2, generator=generator())
    # what it reports is what sampling gives, from the noise of a run from the top
    noise = randn(64, 12, seed=9)
    teacher = ls.sample(denoiser, teacher_plan(32, *denoiser.sampling_range), noise=noise)
    ours, theirs = (
        float((ls.sample(denoiser, p, noise=noise, start=start) - teacher).square().mean().sqrt())
        for p in (plan, plain)
    )
    assert ours < 0.5 * theirs
    assert plan.meta["report"]["rmse"] == pytest.approx(ours, rel=0.3)
    fixed = ls.calibrate(denoiser, 3, start=start, first=4.0, **options)
    assert (fixed.sigmas[0], fixed.meta["first"]) == (4.0, 4.0)
    wrong = GaussianStart.of(mean + 40, gaussian.of_matrix(900 * matrix))
    left = ls.calibrate(denoiser, 3, start=wrong, **options)
    assert left.sigmas[0] > 0.8 * high or "start" not in left.meta
    other = GaussianStart.of(torch.zeros(3), gaussian.of_matrix(torch.eye(3)))
    for wanted, message in (
        ({"start": other}, "samples of shape"),
        ({"start": start, "method": "gits"}, "begins at the largest level"),
        ({"first": 1e3}, r"first = 1000: 3 steps begin between"),
    ):
        with pytest.raises(LogsnrError, match=message):
            ls.calibrate(denoiser, 3, **wanted, **options)


def test_the_command_keeps_the_start_beside_the_plan_that_needs_it(run, tmp_path, monkeypatch) -> None:
    def searched(what, nfe, *, start, first, **_):
        needs = {"fingerprint": start.fingerprint, "sigma_from": what.denoiser.sampling_range[1]}
        meta = {"start": needs, "report": None, "interrupted": False}
        return replace(ge(flow_range(nfe, first, 0.02, "min"), 1.5), meta=meta)

    monkeypatch.setattr("logsnr.cli.calibrate.searched", searched)
    plan, words = tmp_path / "plan.json", ("calibrate", "zoo:digits", "--nfe", 2, "--first", 3, "--json", "--start")
    code, out, err = run(*words, "data", "--out", plan)
    assert code == 0, err
    kept = GaussianStart.load(json.loads(out)["start"])
    assert (kept.shape, Plan.load(plan).meta["start"]["fingerprint"]) == ((1, 8, 8), kept.fingerprint)
    sample = ("sample", "zoo:digits", "--plan", plan, "-n", 2, "--out", tmp_path / "x.npy")
    code, _, err = run(*sample)
    assert code == 0, err
    denoiser, noise = ls.load("zoo:digits"), torch.randn(2, 1, 8, 8, generator=generator(0))
    cond = {"class_labels": torch.arange(2)} if denoiser.card.get("classes") else None
    x = ls.sample(denoiser, Plan.load(plan), noise=noise, start=kept, cond=cond)
    assert np.array_equal(denoiser.decode(x).numpy(), np.load(tmp_path / "x.npy"))
    labels = torch.arange(40) % 10 if cond else None
    other = GaussianStart.fit(torch.randn(40, 1, 8, 8, generator=generator(1)), labels=labels)
    other.save(tmp_path / "other.safetensors")
    code, _, err = run(*sample, "--start", tmp_path / "other.safetensors")
    assert (code, "calibrated with another start" in err) == (2, True)
    monkeypatch.setattr(starts, "OWN_SAMPLES", 40)
    code, _, err = run(*words, "model", "--out", plan)  # and so another one
    assert (code, "another start, which other plans may need" in err) == (2, True)
    code, _, err = run(*words, "dat", "--out", plan)
    assert (code, "did you mean 'data'" in err) == (2, True)


def test_a_models_folder_brings_the_start_that_its_plans_need(tmp_path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(zoo.folder("zoo:digits"), folder)
    denoiser = ls.load(folder)
    assert denoiser.start is None
    cond = {"class_labels": torch.arange(60) % 10} if denoiser.card.get("classes") else {}
    start = GaussianStart.of_model(denoiser, 60, plan=4, generator=generator(1), cond=cond)
    start.save(folder / zoo.START)
    needs = {"fingerprint": start.fingerprint, "sigma_from": denoiser.sampling_range[1]}
    plan = replace(ge(flow_range(3, 10.0, 0.02, "min"), 1.5), meta={"start": needs})
    (folder / zoo.PLANS).write_text(json.dumps({"3": plan.to_dict()}))
    again, noise = ls.load(folder), torch.randn(2, 1, 8, 8, generator=generator(2))
    two = {name: value[:2] for name, value in cond.items()}
    expected = ls.sample(denoiser, plan, noise=noise, start=start, cond=two)
    assert torch.equal(ls.sample(again, 3, noise=noise, cond=two), expected)
