"""Pictures show the numbers that they are given, in one style."""

import sys
from itertools import chain
from pathlib import Path

import pytest
import torch

import logsnr as ls
from logsnr.errors import LogsnrError
from logsnr.pixels import Pixels
from logsnr.report.style import encoded

pytest.importorskip("matplotlib")


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shown(figure) -> list[torch.Tensor]:
    """Arrays of the images in a figure, in order of its axes."""
    return [torch.as_tensor(image.get_array().filled()) for axes in figure.axes for image in axes.images]


def recorded(shape, batch: int = 3) -> ls.Trajectory:
    z = torch.randn(6, batch, *shape, generator=rng())
    return ls.Trajectory(plan=ls.solvers.ddim((8.0, 4.0, 2.0, 1.0, 0.5, 0.0)), z=z, x0=torch.tanh(z[:-1]))


@pytest.mark.parametrize("channels", [1, 3])
def test_a_sheet_holds_every_image(channels: int) -> None:
    x = 1.5 * torch.rand(5, channels, 4, 6, generator=rng()) - 0.75
    figure = ls.plot.images(x, columns=3)
    assert len(figure.axes) == 6
    for image, one in zip(shown(figure), x, strict=True):
        torch.testing.assert_close(image, (0.5 * (one + 1)).permute(1, 2, 0).squeeze(-1))
    assert len(shown(ls.plot.images(x[0]))) == 1


def test_stored_images_span_their_grey_levels() -> None:
    x = torch.arange(17, dtype=torch.uint8).reshape(1, 1, 1, 17)
    (image,) = shown(ls.plot.images(x, pixels=Pixels(17)))
    torch.testing.assert_close(image, torch.linspace(0, 1, 17).reshape(1, 17))
    (image,) = shown(ls.plot.images(x))
    assert float(image.max()) == pytest.approx(16 / 255)


def test_samples_beyond_the_box_are_clamped() -> None:
    (image,) = shown(ls.plot.images(torch.tensor([-3.0, 3.0]).reshape(1, 1, 1, 2)))
    assert image.tolist() == [[0.0, 1.0]]


def test_a_run_of_images_is_its_estimates_level_by_level() -> None:
    run = recorded((1, 4, 4))
    figure = ls.plot.trajectory(run, samples=2, columns=3)
    expected = [0.5 * (run.x0[i, sample, 0] + 1) for sample in range(2) for i in (0, 2, 4)]
    for image, wanted in zip(shown(figure), expected, strict=True):
        torch.testing.assert_close(image, wanted)
    assert [axes.get_title() for axes in figure.axes[:3]] == ["σ = 8", "σ = 2", "σ = 0.5"]
    bare = ls.plot.trajectory(list(run.x0), samples=2, columns=3)
    assert all(map(torch.equal, shown(bare), shown(figure)))
    assert [axes.get_title() for axes in bare.axes[:3]] == ["step 1", "step 3", "step 5"]


def test_a_run_in_the_plane_is_its_paths() -> None:
    run = recorded((2,))
    (axes,) = ls.plot.trajectory(run).axes
    for line, path in zip(axes.lines, run.z.unbind(1), strict=False):
        torch.testing.assert_close(torch.as_tensor(line.get_xydata()), path.double())
    estimates, noise, end = (torch.as_tensor(line.get_xydata()) for line in axes.lines[-3:])
    assert torch.equal(estimates, run.x0.flatten(0, 1).double())
    assert torch.equal(noise, run.z[0].double())
    assert torch.equal(end, run.z[-1].double())


@pytest.mark.parametrize(
    "plan",
    [
        ls.solvers.ge(ls.grids.log_linear(6, 20.0, 0.1)),
        ls.solvers.unipc(ls.grids.flow(5, 3.0)),
        ls.solvers.ddpm(ls.grids.karras(4, 20.0, 0.1)),
        ls.solvers.ddim((float("inf"), 0.0)),
    ],
    ids=["ge", "unipc from inf", "ddpm", "one step"],
)
def test_a_plan_is_its_levels_and_rows(plan: ls.Plan) -> None:
    upper, lower = ls.plot.plan(plan).axes
    inner = [(i, s) for i, s in enumerate(plan.sigmas) if 0 < s < float("inf")]
    assert [tuple(point) for point in upper.lines[0].get_xydata()] == inner
    ends = [f"{s:g}" for s in plan.sigmas if s in (0, float("inf"))]
    assert [text.get_text() for text in upper.texts] == ends
    assert [text.get_text() for text in lower.texts] == [f"{c:.3g}" for c in chain(*plan.rows)]
    assert bool(upper.get_legend()) == plan.noisy
    assert f"{plan.nfe} evaluation" in upper.get_title()


@pytest.mark.parametrize("name", ["sd3", "vdm", "ddpm"])
def test_an_objective_is_its_curves(name: str) -> None:
    found = ls.objectives[name]
    for figure in (ls.plot.objective(name, sigma_data=0.7), ls.plot.objective(found, sigma_data=0.7)):
        upper, lower = figure.axes
        x, w = torch.as_tensor(upper.lines[0].get_xydata()).unbind(1)
        torch.testing.assert_close(w, (found.weighting(x) / found.weighting(0.0)).clamp(min=1e-12))
        emphasis, p = (torch.as_tensor(line.get_ydata()) for line in lower.lines)
        torch.testing.assert_close(p, found.schedule.log_density(x).exp())
        assert float(torch.trapezoid(emphasis, x)) == pytest.approx(1, abs=1e-9)
        torch.testing.assert_close(emphasis, found.weighting.emphasis(x, 0.7))
        assert upper.get_title() == name


def test_files_are_the_same_each_time() -> None:
    for form in ("png", "svg"):
        one, two = (encoded(ls.plot.objective("edm"), form) for _ in range(2))
        assert one == two
    assert ls.plot.objective("edm")._repr_png_().startswith(b"\x89PNG")


def test_pictures_have_one_style() -> None:
    root = Path(ls.__file__).parent
    assert [str(p.relative_to(root)) for p in root.rglob("*.py") if "axes.spines" in p.read_text()] == [
        "report/style.py"
    ]


@pytest.mark.parametrize(
    ("draw", "message"),
    [
        (lambda: ls.plot.images(torch.zeros(2, 4, 8, 8)), r"shape \(2, 4, 8, 8\).*latents by denoiser.decode"),
        (lambda: ls.plot.images(torch.zeros(0, 1, 8, 8)), "at least one"),
        (lambda: ls.plot.trajectory([torch.zeros(2, 7)]), r"shape \(2, 7\)"),
        (lambda: ls.plot.trajectory([]), "no steps"),
        (lambda: ls.plot.objective("edn"), "did you mean 'edm'"),
    ],
)
def test_what_cannot_be_drawn_is_refused(draw, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw()


def test_without_matplotlib_the_remedy_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(LogsnrError, match=r"ls.plot needs matplotlib, which is not installed: pip install 'logsnr\["):
        ls.plot.images(torch.zeros(1, 1, 2, 2))
