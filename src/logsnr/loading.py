"""Load a denoiser by where it lives: the zoo, the folder of a run, or a diffusers pipeline."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from torch import nn

from logsnr import zoo
from logsnr.denoiser import NetworkDenoiser
from logsnr.devices import find_device, find_dtype
from logsnr.errors import LogsnrError, nearest, shown
from logsnr.files import CARD
from logsnr.paths import expanded
from logsnr.sampling import GaussianStart, Plan
from logsnr.sampling.plan import plans_from

if TYPE_CHECKING:
    from logsnr.adapters.diffusers.pipelines import PipelineDenoiser, Prompt, Size

Loaded: TypeAlias = "NetworkDenoiser | PipelineDenoiser"


def load(
    source: str | Path,
    *,
    prompt: Prompt | None = None,
    negative_prompt: Prompt | None = None,
    guidance: float | None = None,
    size: Size | None = None,
    null_class: int | None = None,
    device: str | torch.device | None = None,
    dtype: str | torch.dtype | None = None,
    compile: bool = False,
    network: type[nn.Module] | None = None,
) -> Loaded:
    """A trained denoiser in eval mode, with `.encode`, `.decode`, its `.card`, its `.plans` and the `.start` they need.

        denoiser = logsnr.load("runs/digits")
        denoiser = logsnr.load("owner/name", prompt="a cat", guidance=7.5)

    Args:
        source: "zoo:NAME", a model of `logsnr.zoo.names()`; the folder of a run (it holds card.json and a safetensors
            file); the folder of a diffusers pipeline (model_index.json), or its hub id, owner/name; hub:owner/name
            where that could be a folder here.
        prompt: of a pipeline, a text or several; of a class-conditional one, a class.
        negative_prompt: what guidance leads away from; None for the pipeline's own "no condition".
        guidance: diffusers' guidance_scale: 1 or less for none; None for none too, or for the pipeline's own default
            where the network is told the scale (Flux dev).
        size: height and width in pixels; None for the pipeline's own.
        null_class: of a class-conditional UNet2DModel, the class that stands for none.
        device: where it runs: "auto" for this machine's accelerator, "cpu", "cuda:0", "mps"; None for the CPU.
        dtype: of the weights, a dtype or "fp32", "bf16", "fp16"; states stay in at least float32.
        compile: let torch.compile make the network faster, at the price of a minute at its first call of each shape.
        network: of a run whose network is code of one's own ("module:Class"), the class: nothing is then imported.

    Returns:
        A `NetworkDenoiser` for a run, a `PipelineDenoiser` for a pipeline.

    Raises:
        LogsnrError: if there is no such model (the message lists the runs that lie nearby), or an option does not fit.
    """
    given = {
        "prompt": prompt,
        "negative_prompt": negative_prompt,
        "guidance": guidance,
        "size": size,
        "null_class": null_class,
        "device": None if device is None else find_device(device),
        "dtype": find_dtype(dtype),
        "network": network,
    }
    options = {name: value for name, value in given.items() if value is not None}
    text = str(source)
    try:
        loader = next((loader for recognised, loader in SOURCES.values() if recognised(text)), None)
    except OSError as error:  # a name that is too long, a folder that may not be looked into
        raise LogsnrError(f"{shown(text)} cannot be read ({error.strerror}): check the path") from error
    if loader is not None:
        denoiser = loader(text, options)
        if compile:
            network_of(denoiser).compile()  # in place: its name and weights stay
        file = plans_file(text)
        denoiser.plans = plans_from(file) if file.is_file() else {}
        beside = file.with_name(zoo.START)
        denoiser.start = GaussianStart.load(beside) if beside.is_file() else None
        return denoiser
    if _is_component(text):
        raise LogsnrError(
            f"{text!r} holds one component of a diffusers pipeline: give the folder above it, with model_index.json, "
            "or wrap the network with logsnr.adapters.from_callable"
        )
    hub = f", {HUB}{text} for the hub's" if _is_hub_id(HUB + text) else ""
    raise LogsnrError(
        f"{text!r} is not the folder of a run (no {CARD}.json){_nearby(Path(text))}; give one of: {', '.join(SOURCES)}"
        f"{hub}"
    )


def network_of(denoiser: Loaded) -> nn.Module:
    """The network inside."""
    return denoiser.network if isinstance(denoiser, NetworkDenoiser) else denoiser.plain.network


def _is_run(source: str) -> bool:
    return (expanded(source) / f"{CARD}.json").is_file()


def _load_run(source: str, options: dict[str, Any]) -> NetworkDenoiser:
    device, dtype, network = (options.pop(name, None) for name in ("device", "dtype", "network"))
    for name, value in options.items():
        raise LogsnrError(
            f"{name} = {value!r}: {source!r} is the folder of a run, which takes device and dtype only; conditions go "
            "to sample(..., cond=), guidance is logsnr.guidance.cfg(denoiser, scale, {'class_labels': null})"
        )
    # With pydantic: imported where a run is read.
    from logsnr.models.card import load_denoiser

    folder = expanded(source)
    denoiser = load_denoiser(folder, network=network)
    run = folder.parent.parent if folder.parent.name == "averages" else folder
    if (run / "state").is_dir():
        from logsnr.training.checkpoint import data_source

        data, place = (denoiser.card.get("training") or {}).get("data"), data_source(run)
        if data and place and Path(place).name == data.get("source"):
            data["source"] = place
    return denoiser if device is None and dtype is None else denoiser.to(device=device, dtype=dtype)


def _is_zoo(source: str) -> bool:
    return source.startswith(zoo.PREFIX)


def _load_zoo(source: str, options: dict[str, Any]) -> NetworkDenoiser:
    return _load_run(str(zoo.folder(source)), options)


def load_plans(source: str | Path) -> dict[int, Plan]:
    """The plans of a model or a file, keyed by evaluations: what `logsnr calibrate` found for it.

        plan = logsnr.load_plans("zoo:digits")[5]

    Args:
        source: "zoo:NAME", the folder of a run that holds plans.json, or a file of one plan or several.

    Raises:
        LogsnrError: if there are none.
    """
    file = plans_file(source)
    if not file.is_file():
        raise LogsnrError(f"{str(source)!r} has no plans ({file} is missing): make one with logsnr calibrate {source}")
    return plans_from(file)


def plans_file(source: str | Path) -> Path:
    """Where the plans of a model lie, if it has any: plans.json in its folder; another file is itself."""
    text = str(source)
    path = zoo.folder(text) if _is_zoo(text) else expanded(text)
    return path / zoo.PLANS if path.is_dir() else path


def _is_pipeline(source: str) -> bool:
    return (expanded(source) / "model_index.json").is_file()


HUB = "hub:"
"""Says that owner/name is the hub's, whatever it looks like."""
USUAL = {"checkpoint", "checkpoints", "ckpt", "ckpts", "experiments", "log", "logs", "model", "models", "out", "output"}
USUAL |= {"outputs", "pipeline", "pipelines", "recipes", "results", "run", "runs", "tmp"}
"""Folders that people keep models in, which own nothing on the hub."""


def _load_pipeline(source: str, options: dict[str, Any]) -> PipelineDenoiser:
    from logsnr.adapters.diffusers.pipelines import load_pipeline

    if "network" in options:
        raise LogsnrError(f"network = {options['network']!r}: {source!r} is a pipeline with its own; leave it out")
    folder = expanded(source)
    return load_pipeline(folder if folder.is_dir() else source.removeprefix(HUB), **options)


def is_pipeline(source: str | Path) -> bool:
    """Whether `load` would ask diffusers for it."""
    text = str(source)
    return not _is_run(text) and (_is_pipeline(text) or _is_hub_id(text))


def _is_component(source: str) -> bool:
    folder = expanded(source)
    return (folder / "config.json").is_file() or (folder / "scheduler_config.json").is_file()


def _is_hub_id(source: str) -> bool:
    """hub:owner/name; or owner/name, unless that is a misspelt path."""
    name = source.removeprefix(HUB)
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", name) is None:
        return False
    return source != name or not _seems_local(Path(name))


def _seems_local(path: Path) -> bool:
    """Whether owner/name means a folder here: of that name or nearly so, usual for runs, or with such a model."""
    owner = path.parent.name.lower()
    here = [entry.name.lower() for entry in Path().iterdir() if entry.is_dir()] if Path().is_dir() else []
    beside = (*Path().glob(f"*/{path.name}/{CARD}.json"), *Path().glob(f"*/{path.name}/model_index.json"))
    return owner in USUAL or bool(nearest(owner, here, cutoff=0.7)) or bool(beside)


SOURCES: dict[str, tuple[Callable[[str], bool], Callable[[str, dict[str, Any]], Loaded]]] = {
    "the folder of a run": (_is_run, _load_run),
    "zoo:NAME": (_is_zoo, _load_zoo),
    "a diffusers folder": (_is_pipeline, _load_pipeline),
    "a diffusers hub id (owner/name)": (_is_hub_id, _load_pipeline),
}
"""Kinds of source: how each is recognised, and how it is read."""


def _nearby(path: Path) -> str:
    """The runs in the folder asked for, beside it, or in runs/."""
    for folder in (path, path.parent, Path("runs")):
        found = sorted(str(card.parent) for card in folder.glob(f"*/{CARD}.json")) if folder.is_dir() else []
        if found:
            return f"; there are {', '.join(found[:8])}"
    return ""
