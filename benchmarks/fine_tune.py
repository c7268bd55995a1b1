"""Does an adaptive schedule get further in a short fine-tune than logit-normal times?

    python benchmarks/fine_tune.py                         five seeds of 500 and of 2,000 steps, both ways
    python benchmarks/fine_tune.py --table                 what is done, as a table

A small network (three residual layers of 256 units over 8 x 8 pixels), trained on the bundled digits, learns 8 x 8
patches of scikit-learn's two photographs by updates of rank 4 to its linear layers alone, as LoRA does.  The objective
is SD3's, the same in both arms: `LoopObjective("sd3", scheduler)`, whose p is logit-normal in flow time, and
`adaptive=True`, whose p follows w E.  What is compared is that objective's loss on patches held out, at the same noises
and levels for all, of the updates' moving average (decay .98).

Each result goes to fine-tune.json in --out, the table between the marks of fine-tune.md.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import time
from collections.abc import Sequence
from functools import cache
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import torch
from scipy import stats
from sklearn.datasets import load_sample_images
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from logsnr.adapters import LoopObjective
from logsnr.denoiser import NetworkDenoiser, noisy
from logsnr.noise import alpha_s, per_sample, sigma_from_logsnr
from logsnr.pixels import Pixels
from logsnr.predictions import EDM
from logsnr.training import load_data
from logsnr.training.config import DataConfig
from logsnr.writing import replace_file

ARMS = {"logit-normal": False, "adaptive": True}
SCHEDULER = {"_class_name": "EDMEulerScheduler", "sigma_min": 0.002, "sigma_max": 80.0}
RANK, BATCH, LR, DECAY = 4, 16, 1e-3, 0.98
CHECKS = 10
"""Times that the held-out loss is measured in a run."""
MARKS = "<!-- table -->", "<!-- end of table -->"


class LowRank(nn.Module):
    """W + B A of a low rank; nothing at first."""

    def __init__(self, weight: Tensor, generator: torch.Generator) -> None:
        super().__init__()
        rows, columns = weight.shape[0], weight[0].numel()
        self.down = nn.Parameter(torch.randn(RANK, columns, generator=generator) / math.sqrt(columns))
        self.up = nn.Parameter(torch.zeros(rows, RANK))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + (self.up @ self.down).view_as(weight)


class Small(nn.Module):
    """A residual network over flat pixels that is told ln(sigma)/4."""

    def __init__(self, generator: torch.Generator) -> None:
        super().__init__()
        sizes = [(64 + 16, 256), *[(256, 256)] * 4, (256, 64)]
        self.layers = nn.ModuleList(nn.Linear(a, b) for a, b in sizes)
        with torch.no_grad():
            for layer in self.layers:
                layer.weight.normal_(std=layer.in_features**-0.5, generator=generator)
                layer.bias.zero_()

    def forward(self, x: Tensor, label: Tensor) -> Tensor:
        waves = label[:, None] * 2.0 ** torch.arange(8)
        h = self.layers[0](torch.cat([x.flatten(1), waves.sin(), waves.cos()], 1))
        for first, second in ((1, 2), (3, 4)):
            h = h + self.layers[second](F.silu(self.layers[first](F.silu(h)))) / 2
        out: Tensor = self.layers[5](F.silu(h))
        return out.view_as(x)


@cache
def base() -> NetworkDenoiser:
    """The network, trained on digits for 1,500 steps of 64 images."""
    generator = torch.Generator().manual_seed(0)
    digits = Pixels(17).encode(load_data(DataConfig()).train_images)
    model = NetworkDenoiser(Small(generator), EDM(sigma_data=0.7), shape=(1, 8, 8))
    loop = LoopObjective("sd3", {**SCHEDULER, "sigma_data": 0.7})
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    for step in range(1500):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / 1500)
        train_step(model, loop, digits, 64, generator, optimizer)
    return model.requires_grad_(False)


def train_step(
    model: NetworkDenoiser, loop: LoopObjective, data: Tensor, batch: int, generator: torch.Generator, optimizer: Any
) -> None:
    """One step of a script, as docs/training-loops.md has it."""
    x = data[torch.randint(len(data), (batch,), generator=generator)]
    eps = torch.randn(x.shape, generator=generator)
    draw = loop.draw(batch, generator=generator)
    value = loop.loss(draw, *answers(model, x, eps, draw.logsnr))
    optimizer.zero_grad()
    value.backward()
    optimizer.step()


def adapted(generator: torch.Generator) -> NetworkDenoiser:
    """The model with low-rank updates in its network; only those are trained."""
    model = copy.deepcopy(base())
    for module in list(model.modules()):
        if isinstance(module, nn.Linear):
            parametrize.register_parametrization(module, "weight", LowRank(module.weight, generator))
    return model


def patches() -> tuple[Tensor, Tensor]:
    """Training and held-out patches `[N, 1, 8, 8]` in [-1, 1]: of both photographs, grey, at half their size."""
    found = []
    for photograph in load_sample_images().images:
        grey = torch.tensor(photograph).float().mean(2)[None, None] / 127.5 - 1
        half = F.avg_pool2d(grey, 2)
        found.append(F.unfold(half, 8, stride=8)[0].T.reshape(-1, 1, 8, 8))
    whole = torch.cat(found)
    held_out = torch.arange(len(whole)) % 5 == 0
    return whole[~held_out], whole[held_out]


def answers(model: NetworkDenoiser, x: Tensor, eps: Tensor, logsnr: Tensor) -> tuple[Tensor, Tensor]:
    """(prediction, target) of the network at levels `[B]`."""
    sigma = sigma_from_logsnr(logsnr)
    t_x, t_e = (per_sample(v, x).float() for v in model.prediction.target_row(*alpha_s(sigma)))
    return model.raw(noisy(x, eps, sigma.float()), sigma.float()), t_x * x + t_e * eps


def run(seed: int, arm: str, steps: int) -> dict[str, Any]:
    """One fine-tune; the held-out loss at every check, and what it took."""
    train, held_out = patches()
    generator = torch.Generator().manual_seed(seed)
    model = adapted(generator)
    scheduler = {**SCHEDULER, "sigma_data": model.sigma_data}
    loop = LoopObjective("sd3", scheduler, adaptive=ARMS[arm], sigma_data=model.sigma_data)
    judge, source = LoopObjective("sd3", scheduler), torch.Generator().manual_seed(1234)
    exam = held_out.repeat(4, 1, 1, 1)
    exam_noise, exam_draw = torch.randn(exam.shape, generator=source), judge.draw(len(exam), generator=source)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(trained, lr=LR)
    average = [p.detach().clone() for p in trained]

    @torch.no_grad()
    def loss() -> float:
        kept = [p.clone() for p in trained]
        for p, mean in zip(trained, average, strict=True):
            p.copy_(mean)
        with parametrize.cached():
            found = sum(
                float(judge.loss(part, *answers(model, x, eps, part.logsnr))) * len(x)
                for part, x, eps in (
                    (exam_draw[i : i + 100], exam[i : i + 100], exam_noise[i : i + 100])
                    for i in range(0, len(exam), 100)
                )
            )
        for p, own in zip(trained, kept, strict=True):
            p.copy_(own)
        return found / len(exam)

    curve, started = [(0, loss())], time.process_time()
    for step in range(1, steps + 1):
        train_step(model, loop, train, BATCH, generator, optimizer)
        decay = min(DECAY, step / (step + 9))
        for p, mean in zip(trained, average, strict=True):
            mean.lerp_(p.detach(), 1 - decay)
        if step % (steps // CHECKS) == 0:
            curve.append((step, loss()))
    return {"seed": seed, "arm": arm, "curve": curve, "CPU seconds": round(time.process_time() - started, 1)}


def reached(curve: Sequence[tuple[int, float]], level: float) -> float:
    """The step at which a curve first lies at or below a level, between its checks; inf if it never does."""
    for (a, high), (b, low) in pairwise(curve):
        if low <= level:
            return a + (b - a) * (high - level) / (high - low) if high > level else float(a)
    return math.inf


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half of the 95 % t interval."""
    x = torch.tensor(values, dtype=torch.float64)
    return float(x.mean()), float(stats.t.ppf(0.975, len(x) - 1)) * float(x.std()) / math.sqrt(len(x))


def table(results: list[dict[str, Any]]) -> str:
    """Both arms, by number of steps."""
    lines = [
        "| steps | seeds | loss before | logit-normal | adaptive | difference | steps to its end |",
        "|---|---|---|---|---|---|---|",
    ]
    for steps in sorted({r["curve"][-1][0] for r in results}):
        own = [r for r in results if r["curve"][-1][0] == steps]
        by = {(r["seed"], r["arm"]): [(int(s), float(v)) for s, v in r["curve"]] for r in own}
        seeds = sorted({s for s, _ in by if all((s, arm) in by for arm in ARMS)})
        if len(seeds) < 2:
            continue
        ends = {arm: [by[s, arm][-1][1] for s in seeds] for arm in ARMS}
        apart = [a - b for a, b in zip(ends["adaptive"], ends["logit-normal"], strict=True)]
        need = [reached(by[s, "adaptive"], by[s, "logit-normal"][-1][1]) for s in seeds]
        never = sum(map(math.isinf, need))
        some = "{:.0f} ± {:.0f}".format(*interval(need)) if not never else f"never in {never} of {len(seeds)}"
        cells = [f"{m:.5f} ± {h:.5f}" for m, h in (interval(ends[arm]) for arm in ARMS)]
        lines.append(
            f"| {steps} | {len(seeds)} | {by[seeds[0], 'adaptive'][0][1]:.5f} | {' | '.join(cells)} | "
            f"{'{:+.5f} ± {:.5f}'.format(*interval(apart))} | {some} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, nargs="*", default=[500, 2000])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path("docs/results"))
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--table", action="store_true")
    options = parser.parse_args()
    if any(steps < 1 or steps % CHECKS for steps in options.steps):
        parser.error(f"--steps {' '.join(map(str, options.steps))}: give positive multiples of {CHECKS}")
    torch.set_num_threads(options.threads)
    options.out.mkdir(parents=True, exist_ok=True)
    file, page = options.out / "fine-tune.json", options.out / "fine-tune.md"
    results: list[dict[str, Any]] = json.loads(file.read_text()) if file.exists() else []
    done = {(r["seed"], r["arm"], r["curve"][-1][0]) for r in results}
    for steps in [] if options.table else options.steps:
        for seed, arm in product(range(options.seeds), ARMS):
            if (seed, arm, steps) not in done:
                results.append(run(seed, arm, steps))
                replace_file(file, (json.dumps(results, allow_nan=False) + "\n").encode())
                print(f"{steps} steps, seed {seed}, {arm}: {results[-1]['curve'][-1][1]:.5f}", flush=True)
    text = page.read_text(encoding="utf-8") if page.exists() else "\n".join(MARKS)
    head, rest = text.split(MARKS[0])
    body = "\n\n".join([MARKS[0], table(results), MARKS[1]])
    replace_file(page, (head + body + rest.split(MARKS[1])[1].rstrip("\n") + "\n").encode())
    print(table(results))


if __name__ == "__main__":
    main()
