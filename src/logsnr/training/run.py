"""One training run: everything that changes from step to step, and the step itself.

Every draw of step n on rank r comes from a generator seeded with (seed, n, r), so a run resumed at n continues bit for
bit with no random state to store.  The step never reads a value back from the device.
"""

from __future__ import annotations

import copy
import hashlib
import math
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError, one_line, require
from logsnr.models import Network, build_network
from logsnr.noise import sigma_from_logsnr
from logsnr.objectives import WeightedELBO
from logsnr.pixels import Pixels
from logsnr.predictions import EDM, PREDICTIONS
from logsnr.training.adaptation import Adaptation
from logsnr.training.config import PredictionConfig, Recipe
from logsnr.training.data import Dataset
from logsnr.training.ema import EMA
from logsnr.training.objectives import build_objective, central_logsnr
from logsnr.uncertainty import Uncertainty


class Run:
    """The state of a training, and its step.

    Attributes:
        step: steps taken.
        denoiser: the model in training, around the raw weights.
        average: the model with averaged weights, in eval mode: what is saved and sampled from.
        window: (loss in nats per dimension, gradient norm), summed on the device since the last line of metrics.
        window_steps: the number of steps in that sum.
        adaptation: what makes an adaptive schedule follow the network; None for a fixed one.
        uncertainty: EDM2's u of the noise level, in training beside the network; None without.

    Raises:
        LogsnrError: if the recipe does not fit the data or the machine.
    """

    def __init__(self, recipe: Recipe, data: Dataset) -> None:
        self.recipe = recipe
        self.step = 0
        self.accelerator = _accelerator(recipe)
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if recipe.batch % self.world:
            raise LogsnrError(f"batch = {recipe.batch} over {self.world} processes: give a multiple of {self.world}")
        self.batch = recipe.batch // self.world

        pixels = Pixels(data.grey_levels)
        # A stored image becomes a sample by table lookup: the codec itself reads the largest pixel back, every call.
        self._cells = pixels.centres.to(self.device)
        self._images = data.train_images.to(self.device)
        self._labels = self._conditions(data)
        sigma_data = recipe.sigma_data or _spread(data.train_images, pixels)

        dim = math.prod(data.shape)
        self.objective: WeightedELBO = build_objective(recipe.objective, dim=dim, sigma_data=sigma_data)
        self.scale = self.objective.scale(dim, sigma_data)
        lo, hi = central_logsnr(recipe.objective, self.objective)
        classes = data.classes if recipe.conditional else 0
        torch.manual_seed(derived_seed(recipe.seed, "weights"))
        self.network = build_network(recipe.network.model_copy(update={"classes": classes}), data.shape)
        self.denoiser = NetworkDenoiser(
            self.network,
            _prediction(recipe.prediction, sigma_data),
            shape=data.shape,
            pixels=pixels,
            sigma_data=sigma_data,
            trained_range=(sigma_from_logsnr(hi), sigma_from_logsnr(lo)),
        )
        self.average = copy.deepcopy(self.denoiser).to(self.device).eval().requires_grad_(False)
        self.uncertainty = self._uncertainty()
        options = recipe.optimizer
        groups: list[dict[str, Any]] = [{"params": list(self.network.to(self.device).parameters())}]
        if self.uncertainty:
            groups.append({"params": list(self.uncertainty.parameters()), "weight_decay": 0.0})
        optimizer = torch.optim.AdamW(
            groups,
            lr=options.lr,
            betas=options.betas,
            weight_decay=options.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        # The prepared network is the raw one behind autocast and, over several processes, gradient averaging.
        # `bare` shares its parts but not that wrapping: gradients of single samples want float32 and one process.
        bare = copy.copy(self.network)
        self.denoiser.network, self.optimizer = self.accelerator.prepare(self.network, optimizer)
        self.denoiser.train()
        self.parameters = list(self.network.parameters())
        self.ema = EMA(self.average.network.parameters(), decay=recipe.ema.decay, ramp=recipe.ema.ramp)

        # Noise levels are drawn in float64, which Apple's GPUs do not have: there the CPU draws.
        self.generator = torch.Generator("cpu" if self.device.type == "mps" else self.device)
        self.window = torch.zeros(2, device=self.device)
        self.window_steps = 0
        self.adaptation = self._adaptation(bare)

    def advance(self) -> Tensor:
        """One step of the optimizer; returns the batch's loss in nats per dimension, on the device."""
        recipe = self.recipe
        self.generator.manual_seed(derived_seed(recipe.seed, "step", self.step, self.rank))
        # Dropout layers draw from the global generator, whose state `train` puts back at the end.
        torch.manual_seed(derived_seed(recipe.seed, "dropout", self.step, self.rank))
        x, cond = self.draw()
        adaptation = self.adaptation
        with adaptation or nullcontext():
            output = self.objective(
                self.denoiser, x, cond=cond, generator=self.generator, rank=self.rank, world=self.world
            )
        if adaptation:
            adaptation.watch(output)
        loss = output.loss.mean()
        if self.uncertainty:
            self._backward_over(self.uncertainty, output.loss / self.scale, output.logsnr)
        else:
            self.accelerator.backward(loss / self.scale)
        clip = recipe.optimizer.clip
        norm = self.accelerator.clip_grad_norm_(self.parameters, float("inf") if clip is None else clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.ema.update(self.parameters, self.step)
        if adaptation:
            adaptation.learn(self.step, x, cond)
        self.step += 1
        per_dim = loss.detach() / self.denoiser.dim
        self.window += torch.stack([per_dim, norm.detach().to(per_dim.dtype)])
        self.window_steps += 1
        return per_dim

    def _backward_over(self, uncertainty: Uncertainty, loss: Tensor, logsnr: Tensor) -> None:
        self.accelerator.backward(uncertainty.weigh(loss, logsnr).mean())
        # Over several processes the mean, as of the network's; a wrapper that does so would round u under autocast.
        for p in uncertainty.parameters():
            p.grad = self.accelerator.reduce(p.grad, "mean")

    def draw(self) -> tuple[Tensor, dict[str, Tensor] | None]:
        """Samples x `[batch, C, H, W]` and conditions of this step, with flips and label dropout."""
        index = self._randint(len(self._images))
        x = self._cells[self._images[index].long()]
        if self.recipe.data.flip:
            x = torch.where(self._chance(0.5)[:, None, None, None], x.flip(3), x)
        if self._labels is None:
            return x, None
        dropped = self._chance(self.recipe.label_dropout)
        labels = self._labels[index].masked_fill(dropped, self.network.classes)
        return x, {"class_labels": labels}

    def _randint(self, high: int) -> Tensor:
        drawn = torch.randint(high, (self.batch,), generator=self.generator, device=self.generator.device)
        return drawn.to(self.device)

    def _chance(self, probability: float) -> Tensor:
        drawn = torch.rand(self.batch, generator=self.generator, device=self.generator.device)
        return (drawn < probability).to(self.device)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step n: lr min(1, (n + 1) / warmup), times 1 - n / steps under linear decay."""
        options, steps = self.recipe.optimizer, self.recipe.steps
        rate = options.lr * min(1.0, (step + 1) / max(options.warmup, 1))
        return rate * (1 - step / steps) if options.decay == "linear" and steps else rate

    def state(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        """Everything a resumed run needs, as JSON values and tensors."""
        tensors = {f"network.{name}": value for name, value in self.network.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.network.state_dict().items()}
        tensors |= {f"objective.{name}": value for name, value in self.objective.state_dict().items()}
        for i, moments in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in moments.items()}
        tensors["window"] = self.window
        if self.adaptation:
            tensors["spread"] = self.adaptation.meter.sums
        if self.uncertainty:
            tensors |= {f"uncertainty.{name}": value for name, value in self.uncertainty.state_dict().items()}
        scaler = self.accelerator.scaler
        return {"window_steps": self.window_steps, "scaler": scaler.state_dict() if scaler else None}, tensors

    def restore(self, step: int, values: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        """Put a `state` back; the tensors must already fit (`checkpoint.load_state` sees to that)."""
        names = ("network", "average", "objective", "optimizer", "uncertainty")
        parts: dict[str, dict[str, Tensor]] = {name: {} for name in names}
        for key, value in tensors.items():
            part, _, name = key.partition(".")
            if part in parts:
                parts[part][name] = value
        self.network.load_state_dict(parts["network"])
        self.average.network.load_state_dict(parts["average"])
        self.objective.load_state_dict(parts["objective"])
        if self.uncertainty:
            self.uncertainty.load_state_dict(parts["uncertainty"])
        moments: dict[int, dict[str, Tensor]] = {}
        for key, value in parts["optimizer"].items():
            i, _, name = key.partition(".")
            moments.setdefault(int(i), {})[name] = value
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": moments, "param_groups": groups})
        self.window.copy_(tensors["window"])
        if self.adaptation and "spread" in tensors:
            self.adaptation.meter.sums.copy_(tensors["spread"])
        self.window_steps = int(values["window_steps"])
        if self.accelerator.scaler and values["scaler"]:
            self.accelerator.scaler.load_state_dict(values["scaler"])
        self.step = step

    def _uncertainty(self) -> Uncertainty | None:
        if not self.recipe.objective.uncertainty:
            return None
        generator = torch.Generator().manual_seed(derived_seed(self.recipe.seed, "uncertainty"))
        return Uncertainty(generator=generator).to(self.device)

    def _adaptation(self, network: Network) -> Adaptation | None:
        config, wrapped = self.recipe.objective.adaptive, self.denoiser
        if config is None:
            return None
        bare = NetworkDenoiser(
            network,
            wrapped.prediction,
            shape=wrapped.shape,
            sigma_data=wrapped.sigma_data,
            trained_range=wrapped.trained_range,
        )
        return Adaptation(self.objective, bare, config, self.generator)

    def _conditions(self, data: Dataset) -> Tensor | None:
        if not self.recipe.conditional:
            return None
        if data.train_labels is None:
            raise LogsnrError(
                f"conditional: true, but {self.recipe.data.source!r} has no labels: add labels (a key 'labels', or "
                "one sub-folder per class) or set conditional: false"
            )
        return data.train_labels.to(self.device)


def derived_seed(seed: int, *names: str | int) -> int:
    """A 63-bit seed for one purpose, from the master seed: distinct names give independent streams."""
    text = "/".join(map(str, (seed, *names)))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1


def _accelerator(recipe: Recipe) -> Any:
    accelerate = require("accelerate", extra="train", purpose="training")
    try:
        accelerator = accelerate.Accelerator(cpu=recipe.device == "cpu", mixed_precision=recipe.precision)
    except ValueError as error:
        raise LogsnrError(
            f"precision = {recipe.precision!r} does not run here ({one_line(error)}): use 'no'"
        ) from error
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        # accelerate would quietly train in float32.
        raise LogsnrError("precision = 'fp16' needs a GPU: use 'bf16' or 'no' on a CPU")
    return accelerator


def _spread(images: Tensor, pixels: Pixels) -> float:
    """Standard deviation of all values about their common mean, in the units of x; from a histogram, exactly."""
    counts = torch.bincount(images.flatten().long(), minlength=pixels.grey_levels).to(torch.float64)
    cells = pixels.centres.to(torch.float64)
    mean = (counts * cells).sum() / counts.sum()
    spread = float(((counts * (cells - mean) ** 2).sum() / counts.sum()).sqrt())
    if spread == 0:
        raise LogsnrError("all training images have one and the same grey value: there is nothing to learn")
    return spread


def _prediction(config: PredictionConfig, sigma_data: float) -> Any:
    fields: dict[str, Any] = {"label": config.label}
    if config.path is not None:
        fields["path"] = config.path
    if PREDICTIONS[config.name] is EDM:
        fields["sigma_data"] = sigma_data
    return PREDICTIONS[config.name](**fields)
