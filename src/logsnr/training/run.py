"""A run: the state of a training, and its step.

    batch -> noise levels, noise -> loss / scale -> gradient, clipped -> weights -> average of the weights

A step never reads a value back from the device.  Loss over scale: clipping then sees no unit of the objective's.
"""

from __future__ import annotations

import copy
import math
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.files import check_finite
from logsnr.models import build_network
from logsnr.noise import sigma_from_logsnr
from logsnr.pixels import Pixels
from logsnr.sampling.batches import take
from logsnr.training.adaptation import Adaptation
from logsnr.training.config import Recipe
from logsnr.training.data import Dataset
from logsnr.training.draws import Draws, derived_seed
from logsnr.training.ema import EMA
from logsnr.training.initial import begin_from, settled
from logsnr.training.metrics import Metrics
from logsnr.training.objectives import build_objective, build_prediction, central_logsnr
from logsnr.training.optimizers import build_optimizer, learning_rate
from logsnr.training.parallel import lay_out, no_exchange, own, shard, shared_failure, whole
from logsnr.training.processes import accelerator_for
from logsnr.training.shards import Shards
from logsnr.training.trackers import options
from logsnr.uncertainty import Uncertainty


class Run:
    """The state of a training, and its step.

    Attributes:
        step: steps taken.
        denoiser: the model in training, around the raw weights.
        average: the model with averaged weights, in eval mode: what is saved and sampled from.
        averages: models of other half-lives, by name.
        shards: what writes the state of a sharded run; None for one that every process holds whole.
        metrics: the clock, and what is summed on the device since the last line of metrics.
        adaptation: what makes an adaptive schedule follow the network; None for a fixed one.
        data_fingerprint: sha256 of the images and, where they matter, the labels.
        data_in_memory: whether the images are.
        uncertainty: EDM2's u of the noise level, in training beside the network; None without.

    Args:
        recipe: what to do.
        data: to train on.
        out: folder for what trackers write; None for where nothing is tracked.
        initial: the model to begin from; None for weights drawn at random.

    Raises:
        LogsnrError: if the recipe does not fit the data, the machine or the model it begins from.
    """

    def __init__(
        self, recipe: Recipe, data: Dataset, out: Path | None = None, initial: NetworkDenoiser | None = None
    ) -> None:
        self.recipe = recipe = settled(recipe, initial)
        self.step = 0
        self.accelerator = accelerator_for(recipe, options(recipe, out))
        self.scaler = self.accelerator.scaler
        self.rank: int = self.accelerator.process_index
        self.world: int = self.accelerator.num_processes
        self.device: torch.device = self.accelerator.device
        if recipe.batch % (parts := self.world * recipe.accumulate):
            into = "" if recipe.accumulate == 1 else f" in {recipe.accumulate} parts each"
            raise LogsnrError(f"batch = {recipe.batch} over {self.world} processes{into}: give a multiple of {parts}")
        self.sharded = recipe.parallel == "fsdp" and self.world > 1
        # Noise levels are drawn in float64, which Apple's GPUs do not have: there the CPU draws.
        self.generator = torch.Generator("cpu" if self.device.type == "mps" else self.device)
        self.draw = Draws(recipe, data, generator=self.generator, device=self.device, rank=self.rank, world=self.world)

        sigma_data = recipe.sigma_data or data.sigma_data
        dim = math.prod(data.shape)
        self.objective = build_objective(recipe.objective, dim=dim, sigma_data=sigma_data)
        self.scale = self.objective.scale(dim, sigma_data)
        lo, hi = central_logsnr(recipe.objective, self.objective)
        prediction = build_prediction(recipe.prediction, sigma_data=sigma_data)

        def around(network: nn.Module) -> NetworkDenoiser:
            return NetworkDenoiser(
                network,
                prediction,
                shape=data.shape,
                pixels=Pixels(data.grey_levels) if data.latent is None else None,
                sigma_data=sigma_data,
                trained_range=(sigma_from_logsnr(hi), sigma_from_logsnr(lo)),
            )

        torch.manual_seed(derived_seed(recipe.seed, "weights"))
        classes = data.classes if recipe.conditional else 0
        network = build_network(recipe.network.model_copy(update={"classes": classes}), data.shape)
        if initial is not None:
            begin_from(initial, network, prediction, recipe.init_from)

        def averaged() -> NetworkDenoiser:
            model = around(copy.deepcopy(network)).eval().requires_grad_(False)
            if self.sharded:
                shard(model.network, self.accelerator)
            model.card = {"data": data.describe(), "class_names": list(data.class_names) if classes else []}
            return model.to(self.device)

        self.average = averaged()
        self.averages = {name: averaged() for name in recipe.ema.others}
        # Sharded weights come to the device block by block; all of them need not fit.
        network = network if self.sharded else network.to(self.device)
        # `bare` shares the network's parts, but neither autocast nor the averaging of gradients around it: gradients of
        # single samples want float32 and one process.
        bare = around(copy.copy(network))
        self.denoiser = around(lay_out(network, recipe, sharded=self.sharded, accelerator=self.accelerator))
        self.parameters = list(network.parameters())
        self.emas = [
            EMA(self.averages.get(name, self.average).network.parameters(), decay=decay, ramp=recipe.ema.ramp)
            for name, decay in recipe.ema.decays(recipe.batch).items()
        ]
        self.parts: dict[str, Any] = {
            "network": network,
            "average": self.average.network,
            **{f"average@{name}": average.network for name, average in self.averages.items()},
            "objective": self.objective,
        }
        groups: list[dict[str, Any]] = [{"params": self.parameters}]
        self.uncertainty: Uncertainty | None = None
        if recipe.objective.uncertainty:
            generator = torch.Generator().manual_seed(derived_seed(recipe.seed, "uncertainty"))
            self.uncertainty = self.parts["uncertainty"] = Uncertainty(generator=generator).to(self.device)
            groups.append({"params": list(self.uncertainty.parameters()), "weight_decay": 0.0})
        optimizer = build_optimizer(recipe.optimizer, groups, fused=self.device.type in ("cpu", "cuda"))
        self.optimizer = self.accelerator.prepare_optimizer(optimizer)
        adaptive = recipe.objective.adaptive
        plain = not (self.sharded or recipe.recompute or recipe.compile)
        self.adaptation = (
            Adaptation(
                self.objective,
                bare if plain else self.denoiser,
                adaptive,
                self.generator,
                rank=self.rank,
                world=self.world,
                parameters=None if plain else self.parameters,
            )
            if adaptive
            else None
        )
        self.shards = Shards(self.rank) if self.sharded else None
        self.data_in_memory = isinstance(data.train_images, Tensor)
        self.data_fingerprint = data.fingerprint(labels=recipe.conditional)
        self.metrics = Metrics(recipe, self.accelerator, self.adaptation.meter if self.adaptation else None)

    def advance(self) -> Tensor:
        """One step of the optimizer; returns the batch's loss in nats per dimension, on the device."""
        recipe, parts = self.recipe, self.recipe.accumulate
        x, cond = self.draw(self.step)
        logsnr, eps = self.draw.noise(self.objective.schedule, x)
        each = len(x) // parts
        losses = []
        for part in range(parts):
            rows = slice(part * each, (part + 1) * each)
            # Dropout layers draw from the global generator, whose state `train` puts back at the end.
            first = self.rank * len(x) + part * each
            torch.manual_seed(derived_seed(recipe.seed, "dropout", self.step, first))
            with no_exchange(self.denoiser.network) if part < parts - 1 else nullcontext():
                losses.append(self._backward(x[rows], eps[rows], logsnr[rows], cond and take(cond, rows)))
        if self.uncertainty:
            # Over several processes the mean, as of the network's; a wrapper that does so would round u under autocast.
            for p in self.uncertainty.parameters():
                p.grad = self.accelerator.reduce(p.grad, "mean")
        clip = recipe.optimizer.clip
        norm = self.accelerator.clip_grad_norm_(self.parameters, float("inf") if clip is None else clip)
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate(self.step)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        for ema in self.emas:
            ema.update(self.parameters, self.step)
        if self.adaptation:
            self.adaptation.learn(self.step, x, cond)
        self.step += 1
        per_dim = (losses[0] if parts == 1 else torch.stack(losses).mean()) / self.denoiser.dim
        self.metrics.add(per_dim, whole(norm.detach()))
        return per_dim

    def _backward(self, x: Tensor, eps: Tensor, logsnr: Tensor, cond: dict[str, Tensor] | None) -> Tensor:
        """Add the gradient of a part of this process's share; its mean loss."""
        with self.adaptation or nullcontext():
            output = self.objective.loss_at(self.denoiser, x, eps, logsnr, cond)
        if self.adaptation:
            self.adaptation.watch(output)
        loss = output.loss.mean()
        if self.uncertainty:
            descended = self.uncertainty.weigh(output.loss / self.scale, output.logsnr).mean()
        else:
            descended = loss / self.scale
        self.accelerator.backward(descended if (n := self.recipe.accumulate) == 1 else descended / n)
        return loss.detach()

    def describe(self) -> str:
        """How the training is laid out, in one line: "2 processes (cuda), sharded, bf16: 2 x 64 images a step"."""
        recipe, many = self.recipe, self.world > 1
        where = f"{self.world} process{'es' if many else ''} ({self.device.type})"
        kept = ", sharded" if self.sharded else ", whole on each" if many else ""
        precision = {"no": "float32"}.get(recipe.precision, recipe.precision)
        parts = [str(self.world)] * many + [str(recipe.accumulate)] * (recipe.accumulate > 1)
        each = recipe.batch // (self.world * recipe.accumulate)
        blocks = [", activations recomputed"] * recipe.recompute + [", compiled"] * recipe.compile
        return f"{where}{kept}, {precision}{''.join(blocks)}: {' x '.join([*parts, str(each)])} images a step"

    def check_finite(self, saved_at: int | None) -> None:
        """Make sure that what a checkpoint would hold are numbers.

        Raises:
            LogsnrError: if a weight or its average is NaN or infinite.
        """
        consequence = f"step {self.step} is not saved; {self.metrics.remedy(saved_at)}"
        error = None
        try:
            for part, it in self.parts.items():
                if part != "objective":
                    check_finite({f"{part}.{name}": own(value) for name, value in it.state_dict().items()}, consequence)
        except LogsnrError as found:
            error = found
        shared_failure(error, f"a weight of another process holds NaN or infinite values: {consequence}")

    def close(self) -> None:
        """Let processes and threads end that read ahead or write behind."""
        self.draw.close()
        if self.shards:
            self.shards.close()

    def learning_rate(self, step: int) -> float:
        """The learning rate of step n (optimizers.py)."""
        return learning_rate(self.recipe.optimizer, step, self.recipe.steps)
