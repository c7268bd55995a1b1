"""A trained denoiser as a stock diffusers pipeline: `unet/`, `scheduler/`, `model_index.json`, nothing of ours.

A model fits a stock pipeline exactly when the state that its network wants is the pipeline's, and the timesteps that
the scheduler counts are its labels:

    prediction            scheduler            levels at timestep t
    eps, v, x0 (VP)       DPM-Solver           of the label's table, cut at the trained range
    ... label "flow"      DPM-Solver           sigma = t/(1000 - t), as trained_betas: the label is t
    EDM, sigma_data 1     DPM-Solver           x0 = alpha z + s F: v with the other sign, put into the last layer
    flow, label "flow"    FlowMatchEuler       sigma = t/(1000 - t), from pure noise
    EDM, label "edm"      EDM DPM-Solver       sigma = exp(4 t), of any sigma_data

All but the last are a `DDPMPipeline`, which calls `unet(state, t)`.  EDM's network wants the state over its standard
deviation, and `ConsistencyModelPipeline` is the stock pixel pipeline that asks its scheduler for that
(`scale_model_input`); its loop knows nothing else of consistency models, and it takes classes.

DPM-Solver steps between the timesteps that it visits; DDIMScheduler steps to others unless their number divides the
table's, and serves only tables that end at sigma inf, which DPM-Solver has not.

A condition on a class, or on none, is a constant vector beside the timestep's: it goes into a bias of its embedding.
Whatever does not fit is refused with the recipe that would.
"""

from __future__ import annotations

import copy
import math
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from logsnr.adapters import require_diffusers
from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError, one_line
from logsnr.models import Network
from logsnr.models.stock import EDM_RECIPE, RECIPE, STEPS, is_edm, label_table, obstacles, sign, stock_kind
from logsnr.noise import covers
from logsnr.predictions import EDM, Flow

_BETAS: dict[str, dict[str, Any]] = {
    "ddpm": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02},
    "stable-diffusion": {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
}


def export_diffusers(
    denoiser: NetworkDenoiser, folder: str | Path, *, class_label: int | None = None, keep_classes: bool = False
) -> Path:
    """Write a pipeline that `DiffusionPipeline.from_pretrained(folder)` samples from, all of it or nothing.

        logsnr.adapters.export_diffusers(logsnr.load("runs/digits"), "pipeline")

    Args:
        denoiser: of a run.
        folder: must not exist, or be empty.
        class_label: of a class-conditional model: the class that the pipeline draws; None for the null condition.
        keep_classes: leave the class to the pipeline's caller, `pipe(class_labels=[3, 5])`, who draws classes by
            chance if it is left out; only EDM models' pipeline can.

    Returns:
        The folder.

    Raises:
        LogsnrError: if the model does not fit a stock pipeline exactly (naming every reason and the recipe that would),
            the folder holds something, or the disk refuses.
    """
    diffusers = require_diffusers("exporting to diffusers")
    target = Path(folder)
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise LogsnrError(f"{target} already exists: give a new folder, or remove it first")
    network = denoiser.network
    if not isinstance(network, Network):
        raise LogsnrError(f"a {type(network).__name__} cannot be exported: only networks that logsnr train made can")
    _refuse(denoiser, network, class_label, keep_classes)
    stock: Any = network.stock
    unet = copy.deepcopy(stock).cpu().eval().requires_grad_(False)
    if network.classes and not keep_classes:
        _bind_class(unet, network.classes if class_label is None else class_label)
    if is_edm(denoiser.prediction):
        unet.register_to_config(sample_size=network.shape[1])  # that pipeline reads one side, of a square
    elif sign(denoiser.prediction) < 0:
        with torch.no_grad():
            unet.conv_out.weight.neg_()
            unet.conv_out.bias.neg_()
    pipeline = getattr(diffusers, pipeline_for(denoiser))(unet=unet, scheduler=scheduler_for(denoiser))
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        temporary = target.with_name(f".{target.name}-{os.getpid()}")
        temporary.mkdir()
        try:
            pipeline.save_pretrained(temporary)
            mode = (temporary / "model_index.json").stat().st_mode
            for weights in temporary.rglob("*.safetensors"):  # which are written for their owner alone
                weights.chmod(mode)
            if target.exists():
                target.rmdir()
            temporary.replace(target)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
    except OSError as error:
        raise LogsnrError(
            f"cannot write {target}: {error.strerror or one_line(error)}; nothing was left there"
        ) from error
    return target


def pipeline_for(denoiser: NetworkDenoiser) -> str:
    """The name of the stock pipeline whose loop fits the model."""
    return "ConsistencyModelPipeline" if is_edm(denoiser.prediction) else "DDPMPipeline"


def scheduler_for(denoiser: NetworkDenoiser) -> Any:
    """The stock scheduler whose timesteps are the model's labels, over its trained range.

    Raises:
        LogsnrError: if there is none.
    """
    diffusers = require_diffusers("exporting to diffusers")
    prediction = denoiser.prediction
    if isinstance(prediction, Flow):
        return diffusers.FlowMatchEulerDiscreteScheduler(num_train_timesteps=STEPS, shift=1.0)
    if isinstance(prediction, EDM) and is_edm(prediction):
        low, high = denoiser.sampling_range
        return diffusers.EDMDPMSolverMultistepScheduler(sigma_min=low, sigma_max=high, sigma_data=prediction.sigma_data)
    kind, table = stock_kind(prediction), label_table(prediction)
    if kind is None or table is None:
        raise LogsnrError(
            f"no stock scheduler counts the labels of {prediction.name!r} prediction: train with {RECIPE}"
        )
    # Levels beyond the trained range are left off.
    (low, high), last = denoiser.trained_range, float(table.sigmas[-1])
    whole = math.isinf(last) and denoiser.covers(low, last)
    count = len(table) if whole else sum(covers((0.0, high), 0.0, sigma) for sigma in table.sigmas.tolist())
    if count < 2:
        raise LogsnrError(f"trained_range ends at sigma {high:.4g}: below the second level of the label's table")
    named = _BETAS.get(prediction.label) if isinstance(prediction.label, str) else None
    if count == len(table) and named is not None:
        betas: dict[str, Any] = named
    else:
        betas = {"trained_betas": _betas(table.alphas_cumprod[:count])}
    common = {"num_train_timesteps": count, "prediction_type": kind, "timestep_spacing": "trailing", **betas}
    if math.isinf(float(table.sigmas[count - 1])):
        return diffusers.DDIMScheduler(clip_sample=False, set_alpha_to_one=True, **common)
    return diffusers.DPMSolverMultistepScheduler(**common)


def _refuse(denoiser: NetworkDenoiser, network: Network, class_label: int | None, keep_classes: bool) -> None:
    """Every reason why a model fits no stock pipeline, in one line."""
    classes = network.classes
    if class_label is not None and not classes:
        raise LogsnrError(f"class {class_label}: this model is unconditional; leave the class out")
    if class_label is not None and not 0 <= class_label <= classes:
        raise LogsnrError(f"class {class_label}: give 0 ... {classes - 1}, or leave it out for the null condition")
    if keep_classes and not classes:
        raise LogsnrError("keep_classes: this model is unconditional; leave it out")
    if keep_classes and class_label is not None:
        raise LogsnrError(f"class {class_label} with keep_classes: bind one class, or keep them all")
    found = obstacles(denoiser)
    if keep_classes and not is_edm(denoiser.prediction):
        found.append(("its stock pipeline takes no classes", f"{EDM_RECIPE}, or bind one class (--class 0)"))
    trained = denoiser.card.get("training") or {}
    if classes and class_label is None and not keep_classes and trained.get("label_dropout") == 0:
        change = "label_dropout: 0.1, or name a class (--class 0)"
        found.append(("it was trained without the null condition (label_dropout 0)", change))
    if found:
        raise LogsnrError(
            f"this model cannot be a stock diffusers pipeline: {'; '.join(why for why, _ in found)}. Train with "
            f"{', '.join(change for _, change in found)} in the recipe, or sample it with logsnr"
        )


def _betas(alphas_cumprod: torch.Tensor) -> list[float]:
    """Float32 betas whose products are the table's, rounding fed back: no error builds up over a thousand steps."""
    betas, product = [], 1.0
    for wanted in alphas_cumprod.tolist():
        beta = float(torch.tensor(1 - wanted / product, dtype=torch.float32))
        product *= float(1 - torch.tensor(beta, dtype=torch.float32))
        betas.append(beta)
    return betas


def _bind_class(unet: Any, chosen: int) -> None:
    """Let a diffusers model need no class: the embedding of the chosen one goes into the time embedding's bias."""
    with torch.no_grad():
        unet.time_embedding.linear_2.bias.add_(unet.class_embedding.weight[chosen])
    unet.class_embedding = None
    unet.register_to_config(num_class_embeds=None)
