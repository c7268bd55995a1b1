"""The adaptive schedule: steps to reach what a fixed cosine schedule reaches at the end.

    python benchmarks/adaptive_schedule.py                            # digits: 84 runs, half a minute each on a core
    python benchmarks/adaptive_schedule.py --data fashion_mnist.npz   # 28 x 28 images, pooled to 14 x 14
    python benchmarks/adaptive_schedule.py --only elbo adaptive-gradient 0   # one run
    python benchmarks/adaptive_schedule.py --report                   # the tables of all that is there, and verdicts
    python benchmarks/adaptive_schedule.py --report --write docs/results     # ... as adaptive-schedule.md and .json

Runs of one seed are paired: equal initial weights, images, noise and quantiles u (stratified), the same learning rate
(constant after warm-up, so that length changes nothing) and the same average of weights; no clipping.  Only the density
differs.  The held-out loss is one fixed lattice of images, noise and 46 levels, on averaged weights:

    1/2 sum_j w(lambda_j) mean ||eps_hat - eps||^2 dlambda / D                       nats per dimension

A run has reached a loss when it stays below it from there to the end (linear between evaluations); its ratio is that
step over the length of the cosine run that set the loss.  A ratio "never" says that it did not.

For each final network the table also has, on the same lattice, under the run's own density: the variance of the loss
between and within noise levels (over the mean squared) and the gradient's second moment (all parameters, per-sample)
over the least that a density can reach.  adaptive_table.py makes it, and says under it what was promised and is kept.

Each run writes one JSON into --out and is not run again while it lies there.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import adaptive_table as table
import torch
from adaptive_table import FIXED, HI, LEVELS, LO, SCHEDULES
from torch import Tensor, nn

from logsnr.denoiser import NetworkDenoiser
from logsnr.gradients import OutputLayer, gradient_norms
from logsnr.noise import sigma_from_logsnr
from logsnr.objectives import WeightedELBO
from logsnr.pixels import Pixels
from logsnr.predictions import EDM
from logsnr.schedules import Adaptive, Schedule
from logsnr.training import load_data
from logsnr.training.config import DataConfig
from logsnr.training.ema import EMA
from logsnr.weightings import ELBO, EDMMonotonic, EpsCosine, Sigmoid, Weighting

LENGTH, EVERY, BATCH, WIDTH, BLOCKS = 3000, 150, 64, 192, 3
LR, WARMUP, DECAY = 1e-3, 100, 0.999
IMAGES, PROBES, TRUE_EVERY, TRUE_SAMPLES = 128, 16, 50, 8

WEIGHTINGS: dict[str, Weighting] = {
    "elbo": ELBO(),
    "sech": EpsCosine(),
    "sigmoid": Sigmoid(2),
    "edm-monotonic": EDMMonotonic(),
}


class Block(nn.Module):
    """h + W2 silu(FiLM(W1 norm(h)))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.film = nn.LayerNorm(width), nn.Linear(width, 2 * width)
        self.first, self.second = nn.Linear(width, width), nn.Linear(width, width)
        nn.init.zeros_(self.second.weight)

    def forward(self, h: Tensor, level: Tensor) -> Tensor:
        scale, shift = self.film(level).chunk(2, 1)
        return h + self.second(nn.functional.silu(self.first(self.norm(h)) * (1 + scale) + shift))


class MLP(nn.Module):
    """A residual network on flat images, told the log-SNR; F = 0 at the start."""

    def __init__(self, shape: tuple[int, ...], sigma_data: float, waves: tuple[int, ...]) -> None:
        super().__init__()
        dim = math.prod(shape)
        self.shape, self.sigma_data, self.waves = shape, sigma_data, waves
        self.enter = nn.Linear(dim * (1 + 2 * len(waves)), WIDTH)
        self.level = nn.Sequential(nn.Linear(32, WIDTH), nn.SiLU())
        self.blocks = nn.ModuleList(Block(WIDTH) for _ in range(BLOCKS))
        self.norm, self.leave = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, dim)
        nn.init.zeros_(self.leave.weight)
        nn.init.zeros_(self.leave.bias)

    def forward(self, z: Tensor, logsnr: Tensor) -> Tensor:
        flat = z.flatten(1)
        features = [flat]
        for n in self.waves:
            phase = flat * (self.sigma_data * 2**n * math.pi)
            features += [phase.sin(), phase.cos()]
        phase = logsnr[:, None] * torch.logspace(-1.5, 0.5, 16, device=z.device)
        level = self.level(torch.cat([phase.sin(), phase.cos()], 1))
        h = self.enter(torch.cat(features, 1))
        for block in self.blocks:
            h = block(h, level)
        return self.leave(self.norm(h)).view(-1, *self.shape)


@dataclass(frozen=True)
class Images:
    """Training and held-out samples in [-1, 1], and the frequencies that resolve their grey levels."""

    train: Tensor
    test: Tensor
    waves: tuple[int, ...]
    name: str


def images_of(source: str) -> Images:
    data = load_data(DataConfig(source=source))
    if source == "digits":
        pixels = Pixels(data.grey_levels)
        return Images(pixels.encode(data.train_images), pixels.encode(data.test_images), (3, 4), "digits")
    pooled = [
        nn.functional.avg_pool2d(part.float(), 2).round().to(torch.uint8) if part.shape[-1] > 16 else part
        for part in (data.train_images, data.test_images)
    ]
    train, test = (Pixels(256).encode(part) for part in pooled)
    return Images(train, test, (), Path(source).stem)


class Lattice:
    """Held-out images, noise and levels, all fixed."""

    def __init__(self, images: Tensor) -> None:
        generator = torch.Generator().manual_seed(1234)
        self.x = images[:IMAGES]
        self.edges = torch.linspace(LO, HI, LEVELS + 1, dtype=torch.float64)
        self.levels, self.width = 0.5 * (self.edges[1:] + self.edges[:-1]), (HI - LO) / LEVELS
        self.eps = torch.randn(LEVELS, *self.x.shape, generator=generator)

    @torch.no_grad()
    def errors(self, denoiser: NetworkDenoiser) -> Tensor:
        """||eps_hat - eps||^2 `[levels, images]`."""
        sigma = sigma_from_logsnr(self.levels).float()
        return torch.stack(
            [denoiser.eps_error(self.x, e, s.expand(len(self.x))) for s, e in zip(sigma, self.eps, strict=True)]
        ).double()

    def loss(self, errors: Tensor, weighting: Weighting) -> float:
        per_level = weighting(self.levels) * errors.mean(1)
        return float(0.5 * self.width * per_level.sum() / self.x[0].numel())

    def judge(self, denoiser: NetworkDenoiser, x: Tensor, weighting: Weighting) -> dict[str, list[float]]:
        """Per level: w m, w^2 E m^2 on held-out images and w^2 E||grad||^2 on training images."""
        errors, w = self.errors(denoiser), weighting(self.levels)
        norms = torch.stack(
            [
                gradient_norms(denoiser, x[:PROBES], e[:PROBES], sigma_from_logsnr(level).float().expand(PROBES)).mean()
                for level, e in zip(self.levels, self.eps, strict=True)
            ]
        )
        return {
            "mean": (w * errors.mean(1)).tolist(),
            "square": (w**2 * errors.square().mean(1)).tolist(),
            "gradient": (w**2 * norms).tolist(),
        }


def schedule_of(name: str, weighting: Weighting, sigma_data: float, dim: int, options: dict[str, float]) -> Schedule:
    if name in FIXED:
        return FIXED[name]
    importance = name.removeprefix("adaptive-").removesuffix("-true")
    return Adaptive((LO, HI), weighting, importance=importance, sigma_data=sigma_data, dim=dim, **options)  # type: ignore[arg-type]


def train(
    images: Images, weighting: Weighting, name: str, seed: int, args: argparse.Namespace, show: bool
) -> dict[str, object]:
    """One run: its curve, and what its last density leaves of the variance."""
    x, shape = images.train, tuple(images.train.shape[1:])
    dim, sigma_data = math.prod(shape), float(x.std())
    torch.manual_seed(seed)
    network = MLP(shape, sigma_data, images.waves)
    denoiser = NetworkDenoiser(network, EDM(sigma_data=sigma_data, label="logsnr"), shape=shape)
    average = copy.deepcopy(denoiser).requires_grad_(False)
    optimizer = torch.optim.AdamW(network.parameters(), lr=LR, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    ema = EMA(average.parameters(), decay=DECAY)
    schedule = schedule_of(name, weighting, sigma_data, dim, args.options)
    objective = WeightedELBO(weighting, schedule)
    scale, layer, lattice = objective.scale(dim, sigma_data), OutputLayer(network), Lattice(images.test)
    generator, curve, began = torch.Generator(), [], time.perf_counter()
    for step in range(args.steps):
        generator.manual_seed(1_000_003 * seed + step)
        batch = x[torch.randint(len(x), (BATCH,), generator=generator)]
        with layer:
            output = objective(denoiser, batch, generator=generator)
        wanted = isinstance(schedule, Adaptive) and schedule.importance == "gradient"
        norms = layer.squared_norms(output.loss) if wanted else None
        (output.loss.mean() / scale).backward()
        if args.clip:
            nn.utils.clip_grad_norm_(network.parameters(), args.clip)
        optimizer.param_groups[0]["lr"] = LR * min(1.0, (step + 1) / WARMUP)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        ema.update(network.parameters(), step)
        if isinstance(schedule, Adaptive):
            objective.update(output, norms)
            if name.endswith("-true") and step % TRUE_EVERY == 0:
                mend(schedule, objective, denoiser, layer, batch[:TRUE_SAMPLES], generator)
        if (step + 1) % EVERY == 0:
            curve.append((step + 1, lattice.loss(lattice.errors(average), weighting)))
            if show:
                print(f"  {name} seed {seed} step {step + 1} loss {curve[-1][1]:.5f}", flush=True)
    return {
        "curve": curve,
        "mass": schedule.mass(lattice.edges).tolist(),
        "seconds": round(time.perf_counter() - began, 1),
        **lattice.judge(average.requires_grad_(True), x, weighting),
    }


def mend(
    schedule: Adaptive,
    objective: WeightedELBO,
    denoiser: NetworkDenoiser,
    layer: OutputLayer,
    x: Tensor,
    generator: torch.Generator,
) -> None:
    """True gradient norms of a few fresh draws, beside their proxies."""
    logsnr = schedule.sample(len(x), generator=generator)
    eps = torch.randn(x.shape, generator=generator)
    with layer:
        output = objective.loss_at(denoiser, x, eps, logsnr)
    proxy = layer.squared_norms(output.loss) / output.ratio**2
    schedule.correct(logsnr, gradient_norms(denoiser, x, eps, sigma_from_logsnr(logsnr).float()), proxy)


def report(folders: Sequence[Path], write_to: Path | None) -> None:
    found = {}
    for folder in folders:
        runs = table.runs_in(folder)
        if runs:
            found[folder.name] = table.summary(runs)
            print(table.markdown(folder.name, found[folder.name]), flush=True)
    if write_to:
        table.write(write_to, found, "python benchmarks/adaptive_schedule.py")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", default="digits", help="digits, or an .npz of uint8 images")
    parser.add_argument("--out", type=Path, default=Path("runs/adaptive-schedule"), help="folder of the runs' JSON")
    parser.add_argument("--weightings", nargs="+", default=list(WEIGHTINGS), choices=WEIGHTINGS)
    parser.add_argument("--schedules", nargs="+", default=list(SCHEDULES), choices=SCHEDULES)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--only", nargs=3, metavar=("WEIGHTING", "SCHEDULE", "SEED"), help="one run")
    parser.add_argument("--steps", type=int, default=LENGTH, help="steps of a run")
    parser.add_argument("--clip", type=float, help="largest gradient norm of the loss over its scale")
    parser.add_argument("--options", type=json.loads, default={}, help="of Adaptive, e.g. '{\"decay\": 0.99}'")
    parser.add_argument("--name", default="", help="suffix of the folder, to keep changed settings apart")
    parser.add_argument("--report", action="store_true", help="print the tables of all folders in --out, run nothing")
    parser.add_argument("--write", type=Path, help="with --report: where adaptive-schedule.md and .json go")
    parser.add_argument("--verbose", action="store_true")
    args = parser.parse_args()

    if args.report:
        report(sorted(path for path in args.out.glob("*") if path.is_dir()), args.write)
        return
    if args.write:
        parser.error("--write goes with --report: give both")
    images = images_of(args.data)
    folder = args.out / (Path(args.data).stem + args.name)
    wanted = [(w, s, seed) for seed in range(args.seeds) for w in args.weightings for s in args.schedules]
    if args.only:
        wanted = [(args.only[0], args.only[1], int(args.only[2]))]
    for weighting, name, seed in wanted:
        path = folder / f"{weighting}-{name}-{seed}.json"
        if path.exists():
            continue
        run = train(images, WEIGHTINGS[weighting], name, seed, args, args.verbose)
        folder.mkdir(parents=True, exist_ok=True)
        card = {"weighting": weighting, "schedule": name, "seed": seed, "clip": args.clip, "options": args.options}
        path.with_suffix(".tmp").write_text(json.dumps({**card, **run}))
        path.with_suffix(".tmp").rename(path)
        print(f"{path.name}: {run['seconds']} s", flush=True)
    report([folder], None)


if __name__ == "__main__":
    main()
