"""The universal plans: fitted over a family of models.

    python tools/universal.py --compile             re-makes src/logsnr/sampling/universal.json
    python tools/universal.py --held-out            and the plans fitted without each network, for benchmarks/foreign.py

The family is of networks that others could have trained (tests/models: eps, v, flow, x0; ve-score, whose own
trajectories go astray, is left out), one of our own, and closed-form Gaussian fields of 3,072 to 786,432 numbers with
the spectrum 1/f^2 of images.  Networks decide the levels and fields hold the rows to what is smooth: a field counts
three times in the rows, a quarter in the levels.  Three spans are fitted: "wide" for models whose levels go on to 40
sigma_data or more, "narrow" for those that end at 14 (Stable Diffusion's tables end at 14.6), and "large" for wide ones
of 60,000 numbers and more, where fields weigh as much as networks.

What is done is kept in the folder --work, and gone on from.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from logsnr.calibration.rollout import Noises
from logsnr.calibration.teacher import Cache
from logsnr.calibration.universal import Member, fit_between, fit_universal, member, nodes, spaced, weighted
from logsnr.denoiser import Around, Denoiser, Estimate
from logsnr.files import replace_file
from logsnr.loading import load
from logsnr.noise import alpha_s
from logsnr.sampling import Plan
from logsnr.sampling.universal import FORMAT

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from foreign import MODELS, ROOT, foreign

PLANS = Path(__file__).parents[1] / "src/logsnr/sampling/universal.json"
NETWORKS = (*(name for name in MODELS if name != "ve-score"), "cifar10", "zoo:fashion-mnist")
JUDGED = (4, 5, 6, 8, 10)
"""Numbers of evaluations at which plans are fitted without each network."""


class Modes(Denoiser):
    """A Gaussian field of 3 channels and the spectrum 1/f^2, one coordinate for each of its variances.

    A sampler that knows no coordinates treats equal variances alike, so `weights` times a sampler's end for noise 1 is
    all of its end; the mean square of that is the expected one over all noises.

    Args:
        dim: of the field, 3 n^2.
        low: smallest level.
        high: largest; inf for where `sampling_range` ends.
    """

    def __init__(self, dim: int, low: float, high: float) -> None:
        super().__init__()
        size = round(math.sqrt(dim / 3))
        f = torch.fft.fftfreq(size, dtype=torch.float64) * size
        squared = f[:, None] ** 2 + f**2
        squared[0, 0] = 1.0  # the mean varies as the lowest frequencies
        values, counts = torch.unique(squared, return_counts=True)
        self.variances = (counts.sum() / (counts / values).sum()) / values
        self.weights = (counts / counts.double().mean()).sqrt()[None]
        self.size, self.shape, self.sigma_data = 3 * size**2, (len(values),), 1.0
        self.trained_range = (low, high)

    @property
    def dim(self) -> int:
        return self.size

    def forward(self, z: Tensor, sigma: float | Tensor, **cond: Any) -> Estimate:
        alpha, s = alpha_s(float(sigma))
        seen = z / (alpha**2 * self.variances + s**2)
        return Estimate(alpha * self.variances * seen, s * seen)

    def end(self) -> Tensor:
        """Where the probability flow of the noise `weights` from the largest level ends."""
        high = self.sampling_range[1]
        return self.weights / alpha_s(high)[0] * (self.variances / (self.variances + high**2)).sqrt()


def narrow(model: Denoiser) -> Around:
    """The model, its levels ended at 14 sigma_data."""
    cut = Around(model)
    low, high = model.sampling_range
    cut.trained_range = low, min(high, 14.0 * model.sigma_data)
    return cut


@dataclass(frozen=True, kw_only=True)
class Span:
    """What models a set of plans is for.

    Attributes:
        high: relative level that stands for each model's largest.
        networks: that take part.
        fields: (dimensions, smallest level, largest) of those that do.
        share: of a field in the rows.
        weight: of a field in the choice of the levels.
        start: relative second level that searches begin at.
    """

    high: float
    networks: tuple[str, ...]
    fields: tuple[tuple[int, float, float], ...]
    share: float
    weight: float
    start: float


SPANS = {
    "wide": Span(
        high=80.0,
        networks=NETWORKS,
        fields=((3072, 0.002, 80.0), (12_288, 0.002, 160.0), (49_152, 0.002, math.inf)),
        share=3.0,
        weight=0.25,
        start=16.0,
    ),
    "narrow": Span(
        high=14.0,
        networks=NETWORKS,
        fields=((3072, 0.03, 14.6), (16_428, 0.03, 14.6), (65_712, 0.03, 14.6)),
        share=3.0,
        weight=0.25,
        start=7.0,
    ),
    "large": Span(
        high=80.0,
        networks=("flow-uniform", "zero-snr-v", "cifar10"),
        fields=tuple((dim, 0.002, high) for dim in (65_712, 196_608, 786_432) for high in (80.0, 160.0, math.inf)),
        share=1.0,
        weight=1.0,
        start=45.0,
    ),
}


class Work:
    """Results by name, and trajectories, on disk."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.path = folder, folder / "results.json"
        folder.mkdir(parents=True, exist_ok=True)
        self.known: dict[str, Any] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def recall(self, name: str, make: Callable[[], Any]) -> Any:
        if name not in self.known:
            began = time.perf_counter()
            self.known[name] = make()
            replace_file(self.path, (json.dumps(self.known) + "\n").encode())
            print(f"{name}: {time.perf_counter() - began:.0f} s", flush=True)
        return self.known[name]

    def member(self, name: str, denoiser: Denoiser, noise: Tensor, lattice: tuple[float, ...], **about: Any) -> Member:
        """A member, its trajectories as they are on disk if they are."""
        file = self.folder / f"{name}.safetensors"
        if not file.exists():
            began = time.perf_counter()
            made = member(denoiser, noise, lattice, chunk=len(noise), **about)
            kept = {
                "states": made.cache.states,
                "end": made.noises.end,
                "sigmas": torch.tensor(made.cache.sigmas, dtype=torch.float64),
            }
            save_file({key: value.contiguous() for key, value in kept.items()}, file)
            print(f"{name}: trajectories, {time.perf_counter() - began:.0f} s", flush=True)
        found, cond = load_file(file), about.pop("cond", None) or {}
        noises = Noises(noise=noise, cond=cond, end=found["end"])
        cache = Cache(
            sigmas=tuple(found["sigmas"].tolist()), states=found["states"], eps=found["states"][:0], noises=noises
        )
        return Member(denoiser=denoiser, noises=noises, cache=cache, **about)


def network(name: str, *, compiled: bool) -> Denoiser:
    """A network by name, without plans of its own."""
    model = foreign(name) if name in MODELS else load(str(ROOT.parent / name) if name == "cifar10" else name)
    if compiled:
        model.network = torch.compile(model.network, dynamic=False)
    return model.eval().requires_grad_(False)


def family(span: str, work: Work, options: argparse.Namespace) -> dict[str, Member]:
    """The members of a span by name."""
    about, found = SPANS[span], {}
    lattice = nodes(about.high)
    for name in about.networks:
        model = network(name, compiled=options.compile)
        denoiser = narrow(model) if span == "narrow" else model
        n = options.number
        noise = torch.randn(n, *denoiser.shape, generator=torch.Generator().manual_seed(options.seed))
        cond = {"class_labels": torch.arange(n) % 10} if "classes" in name else None
        file = f"{span} {name.replace(':', ' ')} {n} {options.seed}"
        found[name] = work.member(file, denoiser, noise, lattice, cond=cond)
    for dim, low, high in about.fields:
        field = Modes(dim, low, high)
        one = work.member(
            f"{span} field {dim} {high:g}", field, field.weights, lattice, share=about.share, weight=about.weight
        )
        found[f"field {dim} {high:g}"] = replace(one, noises=replace(one.noises, end=field.end()))
    return found


def fitted(work: Work, members: dict[str, Member], span: str, n: int) -> dict[str, Any]:
    """The plan of n evaluations over all, and every member's error at all levels that were tried."""

    def make() -> dict[str, Any]:
        about = SPANS[span]
        start = (about.start, max(8 / n**1.75, 0.06))
        found = fit_universal(list(members.values()), n, high=about.high, start=start)
        noises = max(len(one.noises) for one in members.values())
        plan = replace(found.plan, meta={"range": span, "models": list(members), "n": noises})
        tried = [[*between, errors] for between, errors in found.tried.items()]
        return {"plan": plan.to_dict(), "error": found.error, "errors": found.errors, "tried": tried}

    result: dict[str, Any] = work.recall(f"{span} {n}", make)
    return result


def without(work: Work, members: dict[str, Member], span: str, n: int, name: str) -> Plan:
    """The plan fitted without a network: of the levels that were tried those best for the others, rows fitted anew."""

    def make() -> dict[str, Any]:
        rest, at = {other: one for other, one in members.items() if other != name}, list(members).index(name)
        others = list(rest.values())
        tried = [(a, b, errors[:at] + errors[at + 1 :]) for a, b, errors in fitted(work, members, span, n)["tried"]]
        first, last, _ = min(tried, key=lambda one: weighted(others, one[2]))
        lattice = nodes(SPANS[span].high)
        levels = spaced(lattice.index(first), lattice.index(last), n - 1, lattice)
        assert levels is not None
        plan, _ = fit_between(others, (SPANS[span].high, *levels, 0.0), [])
        return replace(plan, meta={"range": span, "models": list(rest)}).to_dict()

    return Plan.from_dict(work.recall(f"{span} {n} without {name}", make))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--nfe", default="4,5,6,8,10,3,7,9,11,12")
    parser.add_argument("--spans", default=",".join(SPANS))
    parser.add_argument("-n", "--number", type=int, default=32, help="noises of each network")
    parser.add_argument("--seed", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--compile", action="store_true", help="compile the networks (twice as fast on a CPU)")
    parser.add_argument("--held-out", action="store_true", help="plans without each network, for wide ranges")
    parser.add_argument("--work", type=Path, default=Path("runs/universal"))
    parser.add_argument("--out", type=Path, default=PLANS)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    work, plans = Work(options.work), {}
    sizes = sorted(map(int, options.nfe.split(",")))
    for span in options.spans.split(","):
        members = family(span, work, options)
        for n in map(int, options.nfe.split(",")):
            fitted(work, members, span, n)
        plans[span] = {str(n): fitted(work, members, span, n)["plan"] for n in sizes}
        if options.held_out and span == "wide":
            for name in SPANS[span].networks:
                held = {str(n): without(work, members, span, n, name).to_dict() for n in JUDGED if n in sizes}
                replace_file(
                    options.work / f"without {name.replace(':', ' ')}.json", (json.dumps(held) + "\n").encode()
                )
    replace_file(options.out, (json.dumps({"format": FORMAT, "plans": plans}, indent=1) + "\n").encode())


if __name__ == "__main__":
    main()
