"""Chunks, conditions, counters and the teacher: what every measurement shares."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from logsnr.denoiser import Denoiser, Estimate, NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.exact import Gaussian
from logsnr.guidance import cfg
from logsnr.predictions import V
from logsnr.sampling import Step, grids, sample, solve, solvers
from logsnr.sampling.batches import chunks, in_turn, lengths, take
from logsnr.sampling.counted import Counted, rmse
from logsnr.sampling.teacher import teacher_ends, teacher_plan

GRID = grids.log_linear(6, 30.0, 0.02)


class Shifted(nn.Module):
    """A network told a shift per sample, some numbers by name, and one scale for all."""

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[int] = []

    def forward(self, x: Tensor, label: Tensor, shift: Tensor, more: dict[str, Tensor], scale: float) -> Tensor:
        self.batches.append(len(x))
        return scale * torch.tanh(x + shift[:, None] + more["twist"])


def cond(n: int) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(1)
    twist = torch.randn(n, 3, generator=generator)
    return {"shift": torch.linspace(-1, 1, n), "more": {"twist": twist}, "scale": 0.7}


def network() -> NetworkDenoiser:
    return NetworkDenoiser(Shifted(), V(), shape=(3,))


def test_chunks_cover_every_sample_once_with_its_conditions() -> None:
    given = cond(7)
    parts = list(chunks(7, 3, given))
    assert [part for part, _ in parts] == [slice(0, 3), slice(3, 6), slice(6, 7)]
    assert torch.equal(torch.cat([c["shift"] for _, c in parts]), given["shift"])
    assert torch.equal(torch.cat([c["more"]["twist"] for _, c in parts]), given["more"]["twist"])
    assert {c["scale"] for _, c in parts} == {0.7}
    assert [c for _, c in chunks(2, 5)] == [{}]


def test_conditions_by_mask_index_and_in_turn() -> None:
    given = {"label": torch.tensor([5, 6, 7]), "more": {"text": torch.eye(3)}, "size": 8, "scalar": torch.tensor(2.0)}
    mask = torch.tensor([True, False, True])
    assert take(given, mask)["label"].tolist() == [5, 7]
    assert take(given, torch.tensor([2, 2]))["more"]["text"].tolist() == [[0, 0, 1], [0, 0, 1]]
    turns = in_turn(given, torch.arange(4, 8))
    assert turns["label"].tolist() == [6, 7, 5, 6]
    assert turns["size"] == 8
    assert turns["scalar"] == 2
    assert lengths(given) == {"label": 3, "more.text": 3}
    with pytest.raises(LogsnrError, match="different numbers of rows"):
        in_turn({"a": torch.zeros(2), "b": torch.zeros(3)}, torch.arange(4))


@pytest.mark.parametrize("plan", [solvers.ge(GRID), solvers.unipc(GRID, 3), solvers.ddpm(GRID)])
@pytest.mark.parametrize("chunk", [1, 3, 7, 50])
def test_chunks_change_nothing_but_the_calls(plan, chunk: int) -> None:
    """Same states and same draws of noise as one call for all; the callback sees all samples at once."""
    denoiser, seen = network(), []
    noise = torch.randn(7, 3, generator=torch.Generator().manual_seed(0))

    def run(**options: Any) -> Tensor:
        return sample(denoiser, plan, noise=noise, generator=torch.Generator().manual_seed(2), cond=cond(7), **options)

    whole = run()
    denoiser.network.batches.clear()
    assert torch.allclose(run(chunk=chunk, callback=seen.append), whole, atol=1e-6)
    assert denoiser.network.batches == [min(chunk, 7 - i) for i in range(0, 7, chunk)] * plan.nfe
    assert len(seen) == plan.nfe + 1
    assert all(len(step.z) == 7 for step in seen)


def test_chunks_of_a_denoiser_that_moves_the_state() -> None:
    exact = Gaussian(torch.zeros(2), torch.tensor([[0.5, 0.2], [0.2, 0.3]]))

    class Moves(Denoiser):
        shape, sigma_data, trained_range = (2,), 0.5, (0.002, 157.0)

        def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
            found = exact(z, sigma)
            return Estimate(found.x0, found.eps, state=0.9 * z)

    noise = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    plan = solvers.ge(GRID)
    assert torch.allclose(sample(Moves(), plan, noise=noise, chunk=2), sample(Moves(), plan, noise=noise), atol=1e-6)


def test_a_chunk_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="chunk = 0"):
        sample(network(), solvers.ge(GRID), noise=torch.zeros(2, 3), cond=cond(2), chunk=0)


def test_counts_by_call_by_sample_and_by_cost() -> None:
    exact = Gaussian(torch.zeros(2), torch.eye(2))
    counted = Counted(cfg(exact, 2.0, {}))
    z = torch.randn(5, 2, generator=torch.Generator().manual_seed(0))
    sample(counted, solvers.ddim(GRID), noise=z)
    assert (counted.evaluations, counted.answers, counted.passes) == (12, 30, 60)
    counted = Counted(exact)
    sample(counted, solvers.ddim(GRID), noise=z, chunk=2)
    assert (counted.evaluations, counted.answers, counted.passes) == (18, 30, 30)


def test_the_teacher_ends_on_the_exact_trajectory() -> None:
    exact = Gaussian(torch.zeros(2, dtype=torch.float64), torch.tensor([[0.5, 0.2], [0.2, 0.3]]).double())
    noise = torch.randn(16, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    counted = Counted(exact)
    seen: list[Step] = []
    plan = teacher_plan(64, 0.002, 80.0)
    ends = teacher_ends(counted, plan, noise, chunk=16, callback=seen.append)
    truth = solve(exact, 80.0, 0.0, noise, rtol=1e-8, atol=1e-8).z
    assert counted.evaluations == plan.nfe == 64
    assert len(seen) == 65
    assert rmse(ends, truth) < 2e-4
    assert rmse(teacher_ends(exact, teacher_plan(32, 0.002, 80.0), noise), truth) > 2 * rmse(ends, truth)


def test_a_teacher_that_is_not_finite_is_refused() -> None:
    denoiser = network()
    with pytest.raises(LogsnrError, match=r"not finite.*sigma 80 \.\.\. 0\.01"):
        teacher_ends(denoiser, teacher_plan(8, 0.01, 80.0), torch.full((2, 3), float("nan")), cond(2))
