"""Small diffusion models trained the way others train them: plain PyTorch, diffusers' networks and its schedulers.

    python tools/foreign_models.py --data fashion_mnist.npz --out tests/models/foreign --seconds 300 --device cuda

Nothing of this library takes part, so that the models test how it reads what others made.  Each is a `UNet2DModel` of
about .7M parameters on Fashion-MNIST, 28 x 28, under a convention of its own:

| name            | scheduler                               | network sees      | is told       | answers      |
|-----------------|-----------------------------------------|-------------------|---------------|--------------|
| ddpm-eps        | DDPM, linear table                      | a x + s eps       | t, 0 ... 999  | eps          |
| sd-eps          | DDPM, Stable Diffusion's table          | a x + s eps       | t, 0 ... 999  | eps          |
| zero-snr-v      | DDPM, linear table, zero terminal SNR   | a x + s eps       | t, 0 ... 999  | a eps - s x  |
| flow-uniform    | FlowMatchEuler, t uniform               | (1 - t) x + t eps | 1000 t        | eps - x      |
| flow-logit      | FlowMatchEuler, t logit-normal          | (1 - t) x + t eps | 1000 t        | eps - x      |
| ve-score        | ScoreSdeVe, sigma log-uniform, .01 - 50 | x + sigma eps     | sigma         | -eps / sigma |
| flow-x0-classes | FlowMatchEuler, t uniform               | (1 - t) x + t eps | 1000 t, class | x            |

The models take turns, a step each, so all of them see the same number of images.  The learning rate falls to zero with
the share of `--seconds` that is used up: how many steps that is depends on the machine, and models.json says so.
What is kept are moving averages of the weights, in half precision, and models.json, which describes each model.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

LR, WARMUP, CLIP, EMA_DECAY = 1e-3, 200, 1.0, 0.999
DROPPED = 0.1
"""Share of the labels that a conditional model is not told."""
CLASSES = 10
"""Index of the class that stands for none, after the ten of Fashion-MNIST."""
NETWORK = {
    "sample_size": 28,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": [32, 48, 48],
    "down_block_types": ["DownBlock2D", "DownBlock2D", "AttnDownBlock2D"],
    "up_block_types": ["AttnUpBlock2D", "UpBlock2D", "UpBlock2D"],
    "layers_per_block": 1,
    "attention_head_dim": 16,
    "norm_num_groups": 8,
}


@dataclass(frozen=True)
class Batch:
    """What one step regresses: `scale * network(state, label)` on `target`."""

    state: Tensor
    label: Tensor
    target: Tensor
    scale: Tensor | float = 1.0


Noising = Callable[[Any, Tensor, Tensor, torch.Generator], Batch]
"""(scheduler, x, eps, generator) to a batch."""


def table(scheduler: Any, x: Tensor, eps: Tensor, generator: torch.Generator) -> Batch:
    """DDPM's training: a random entry of the scheduler's table."""
    t = torch.randint(scheduler.config.num_train_timesteps, (len(x),), generator=generator, device=x.device)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(x, eps, t) if velocity else eps
    return Batch(scheduler.add_noise(x, eps, t), t, target)


def flow_uniform(scheduler: Any, x: Tensor, eps: Tensor, generator: torch.Generator) -> Batch:
    """Rectified flow: t uniform in (0, 1)."""
    t = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    return Batch((1 - t) * x + t * eps, 1000 * t.flatten(), eps - x)


def flow_logit(scheduler: Any, x: Tensor, eps: Tensor, generator: torch.Generator) -> Batch:
    """Stable Diffusion 3's training as in diffusers' examples: logit-normal entries of the scheduler's table."""
    u = torch.randn(len(x), generator=generator, device=x.device).sigmoid()
    index = (u * scheduler.config.num_train_timesteps).long()
    t = scheduler.sigmas.to(x.device)[index].view(-1, 1, 1, 1)
    return Batch((1 - t) * x + t * eps, scheduler.timesteps.to(x.device)[index], eps - x)


def flow_x0(scheduler: Any, x: Tensor, eps: Tensor, generator: torch.Generator) -> Batch:
    """The flow path, t uniform, and a network that answers with the data."""
    batch = flow_uniform(scheduler, x, eps, generator)
    return Batch(batch.state, batch.label, x)


def variance_exploding(scheduler: Any, x: Tensor, eps: Tensor, generator: torch.Generator) -> Batch:
    """NCSN++: a score network, its error weighted by sigma^2."""
    low, high = scheduler.config.sigma_min, scheduler.config.sigma_max
    u = torch.rand(len(x), 1, 1, 1, generator=generator, device=x.device)
    sigma = low * (high / low) ** u
    return Batch(x + sigma * eps, sigma.flatten(), -eps, scale=sigma)


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """A convention.

    Args:
        scheduler: class in diffusers.
        config: its arguments.
        noising: how a batch is made.
        network: arguments of `UNet2DModel` beside `NETWORK`.
        range: what the grey levels 0 ... 255 become.
        classes: whether the network is told the class.
        state, label, target, levels, loss: the convention in words, for models.json.
    """

    scheduler: str
    noising: Noising
    state: str
    label: str
    target: str
    levels: str
    config: dict[str, Any] = field(default_factory=dict)
    network: dict[str, Any] = field(default_factory=dict)
    range: tuple[float, float] = (-1.0, 1.0)
    classes: bool = False
    loss: str = "mean squared error of the target"


VP = "sqrt(alphas_cumprod[t]) x + sqrt(1 - alphas_cumprod[t]) eps"
LINE = "(1 - t) x + t eps"
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False}
ZERO_SNR = {
    "prediction_type": "v_prediction",
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "clip_sample": False,
}

RECIPES = {
    "ddpm-eps": Recipe(
        scheduler="DDPMScheduler",
        noising=table,
        state=VP,
        label="t",
        target="eps",
        levels="t uniform in 0 ... 999",
    ),
    "sd-eps": Recipe(
        scheduler="DDPMScheduler",
        config=STABLE_DIFFUSION,
        noising=table,
        range=(-0.5, 0.5),
        state=VP,
        label="t",
        target="eps",
        levels="t uniform in 0 ... 999",
    ),
    "zero-snr-v": Recipe(
        scheduler="DDPMScheduler",
        config=ZERO_SNR,
        noising=table,
        state=VP,
        label="t",
        target="sqrt(alphas_cumprod[t]) eps - sqrt(1 - alphas_cumprod[t]) x",
        levels="t uniform in 0 ... 999; at 999 the state is eps alone",
    ),
    "flow-uniform": Recipe(
        scheduler="FlowMatchEulerDiscreteScheduler",
        noising=flow_uniform,
        state=LINE,
        label="1000 t",
        target="eps - x",
        levels="t uniform in (0, 1)",
    ),
    "flow-logit": Recipe(
        scheduler="FlowMatchEulerDiscreteScheduler",
        noising=flow_logit,
        state=LINE,
        label="1000 t",
        target="eps - x",
        levels="t logit-normal(0, 1), rounded up to a multiple of 1/1000",
    ),
    "ve-score": Recipe(
        scheduler="ScoreSdeVeScheduler",
        config={"sigma_min": 0.01, "sigma_max": 50.0},
        noising=variance_exploding,
        network={"time_embedding_type": "fourier"},
        range=(0.0, 1.0),
        state="x + sigma eps",
        label="sigma; the network embeds its logarithm",
        target="-eps / sigma, the score; the network divides its last layer's answer by sigma",
        levels="ln sigma uniform in ln .01 ... ln 50",
        loss="mean squared error of sigma times the score",
    ),
    "flow-x0-classes": Recipe(
        scheduler="FlowMatchEulerDiscreteScheduler",
        noising=flow_x0,
        network={"num_class_embeds": CLASSES + 1},
        classes=True,
        state=LINE,
        label="1000 t",
        target="x",
        levels="t uniform in (0, 1)",
    ),
}


class Training:
    """One model in training: its network, its average, and the step."""

    def __init__(self, name: str, *, seed: int, batch: int, device: torch.device) -> None:
        self.name, self.recipe, self.seed, self.batch, self.device = name, RECIPES[name], seed, batch, device
        torch.manual_seed(seed)
        self.config = {**NETWORK, **self.recipe.network}
        network = diffusers.UNet2DModel(**self.config)
        if self.config.get("time_embedding_type") == "fourier":
            # Frequencies do not train; those that the file can hold, so that half precision does not detune them.
            network.time_proj.weight.data = network.time_proj.weight.data.half().float()
        self.network = network.to(device).train()
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.scheduler = getattr(diffusers, self.recipe.scheduler)(**self.recipe.config)
        self.parameters = [p for p in self.network.parameters() if p.requires_grad]
        self.averages = [a for a, p in zip(self.average.parameters(), self.network.parameters(), strict=True)
                         if p.requires_grad]  # fmt: skip
        self.optimizer = torch.optim.AdamW(self.parameters, lr=LR, weight_decay=0.0, fused=True)
        self.generator = torch.Generator(device).manual_seed(seed)
        self.steps = 0
        self.window = torch.zeros((), device=device)
        self.window_steps = 0
        self.loss = math.nan

    def step(self, images: Tensor, labels: Tensor, share: float) -> None:
        """One step at `share` of the training, on a random batch of uint8 `images [N, 1, H, W]`."""
        index = torch.randint(len(images), (self.batch,), generator=self.generator, device=self.device)
        classes = None
        if self.recipe.classes:
            drop = torch.rand(self.batch, generator=self.generator, device=self.device) < DROPPED
            classes = labels[index].masked_fill(drop, CLASSES)
        loss = self.errors(self.network, images[index], classes, self.generator).mean()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.parameters, CLIP)
        rate = LR * min(1.0, (self.steps + 1) / WARMUP) * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        beta = min(EMA_DECAY, (1 + self.steps) / (10 + self.steps))
        with torch.no_grad():
            torch._foreach_lerp_(self.averages, [p.detach() for p in self.parameters], 1 - beta)
        self.steps += 1
        self.window += loss.detach()
        self.window_steps += 1

    def errors(self, network: nn.Module, images: Tensor, classes: Tensor | None, generator: torch.Generator) -> Tensor:
        """Squared error of each sample, a mean over its pixels."""
        low, high = self.recipe.range
        x = low + (high - low) / 255 * images.float()
        eps = torch.randn(x.shape, generator=generator, device=x.device)
        batch = self.recipe.noising(self.scheduler, x, eps, generator)
        answer = network(batch.state, batch.label, classes, return_dict=False)[0]
        return (batch.scale * answer - batch.target).square().flatten(1).mean(1)

    def report(self) -> float:
        """Mean loss since the last report."""
        if self.window_steps:
            self.loss = float(self.window) / self.window_steps
            self.window.zero_()
            self.window_steps = 0
        return self.loss

    @torch.no_grad()
    def held_out(self, network: nn.Module, images: Tensor, labels: Tensor) -> float:
        """Mean loss on held-out images, with the same noise for every model."""
        generator = torch.Generator(self.device).manual_seed(0)
        total = 0.0
        for some, their in zip(images.split(500), labels.split(500), strict=True):
            total += float(self.errors(network, some, their if self.recipe.classes else None, generator).sum())
        return total / len(images)

    def save(self, out: Path, images: Tensor, labels: Tensor) -> dict[str, Any]:
        """Write the averaged weights and return the model's description, the held-out loss of what was written."""
        weights = {name: value.half().cpu().contiguous() for name, value in self.average.state_dict().items()}
        file = out / f"{self.name}.safetensors"
        save_file(weights, file, metadata={"format": "pt"})
        file.chmod(0o644)
        rounded = copy.deepcopy(self.average)
        rounded.load_state_dict({name: value.float() for name, value in weights.items()})
        recipe = self.recipe
        return {
            "file": file.name,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
            "bytes": file.stat().st_size,
            "parameters": sum(p.numel() for p in self.average.parameters()),
            "network": {"class": "UNet2DModel", "config": self.config},
            "scheduler": {"class": recipe.scheduler, "config": recipe.config},
            "range": list(recipe.range),
            "state": recipe.state,
            "label": recipe.label,
            "target": recipe.target,
            "classes": CLASSES if recipe.classes else 0,
            "null_class": CLASSES if recipe.classes else None,
            "training": {
                "levels": recipe.levels,
                "loss": recipe.loss,
                "label_dropout": DROPPED if recipe.classes else 0.0,
                "steps": self.steps,
                "batch": self.batch,
                "images": self.steps * self.batch,
                "train_loss": self.report(),
                "held_out_loss": self.held_out(rounded, images, labels),
                "seed": self.seed,
            },
        }


def describe(models: dict[str, Any], *, train: int, test: int, device: torch.device, seconds: float) -> dict[str, Any]:
    """What models.json holds: what is common to all models, and each of them."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    return {
        "data": {"set": "Fashion-MNIST", "train": train, "held_out": test},
        "training": {
            "optimizer": "AdamW, betas (.9, .999), no weight decay",
            "lr": f"{LR:g}, warm-up of {WARMUP} steps, cosine to zero",
            "clip": CLIP,
            "ema_decay": EMA_DECAY,
            "precision": "float32 (products in TF32 on a GPU)",
            "seconds": round(seconds),
            "device": name,
            "torch": torch.__version__.partition("+")[0],
            "diffusers": diffusers.__version__,
        },
        "models": models,
    }


def main() -> None:
    """The command of the module's text."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="npz with train_images, train_labels, test_...")
    parser.add_argument("--out", type=Path, required=True, help="folder of the weights and models.json")
    parser.add_argument("--seconds", type=float, default=300, help="of training, for all models together")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--models", nargs="+", choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--held-out", type=int, default=2000, help="test images of the held-out loss")
    parser.add_argument("--save-every", type=float, default=60, metavar="SECONDS")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    device = torch.device(args.device)
    args.out.mkdir(parents=True, exist_ok=True)
    with np.load(args.data) as stored:
        images, labels, test, test_labels = (
            torch.from_numpy(stored[key]).to(device) for key in ("train_images", "train_labels", "test_images",
                                                                 "test_labels")
        )  # fmt: skip
    images, test, labels, test_labels = images[:, None], test[:, None], labels.long(), test_labels.long()
    test, test_labels = test[: args.held_out], test_labels[: args.held_out]
    trainings = [
        Training(name, seed=args.seed + i, batch=args.batch, device=device) for i, name in enumerate(args.models)
    ]

    def save(seconds: float) -> None:
        models = {training.name: training.save(args.out, test, test_labels) for training in trainings}
        facts = describe(models, train=len(images), test=len(test), device=device, seconds=seconds)
        partial = args.out / "models.json.partial"
        partial.write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
        partial.replace(args.out / "models.json")
        losses = "  ".join(f"{name} {entry['training']['held_out_loss']:.4f}" for name, entry in models.items())
        print(f"{seconds:.0f} s, {trainings[0].steps} steps, held-out loss: {losses}", flush=True)

    for training in trainings:  # the first step warms up: the clock starts after it
        training.step(images, labels, 0.0)
    began, saved = time.perf_counter(), 0.0
    while (seconds := time.perf_counter() - began) < args.seconds:
        for training in trainings:
            training.step(images, labels, seconds / args.seconds)
        if seconds - saved > args.save_every:
            save(seconds)
            saved = seconds
    save(seconds)


if __name__ == "__main__":
    main()
