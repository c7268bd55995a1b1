"""What the commands share: plans, conditions, pictures and held-out images, from the options given."""

from __future__ import annotations

import io
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from torch import Tensor

from logsnr.adapters import require_diffusers
from logsnr.adapters.diffusers.pipelines import PipelineDenoiser
from logsnr.cli.application import note
from logsnr.denoiser import Denoiser, NetworkDenoiser
from logsnr.devices import AUTO, find_device, find_dtype, told
from logsnr.errors import LogsnrError, unknown
from logsnr.generation.run import prompts_hash
from logsnr.guidance import cfg
from logsnr.images import png, tile
from logsnr.loading import Loaded, is_pipeline, load
from logsnr.paths import expanded
from logsnr.pixels import Pixels
from logsnr.reading import gigabytes, memory, read_text, reading
from logsnr.sampling import Plan, probe
from logsnr.sampling.batches import Cond
from logsnr.sampling.names import GRIDS, SOLVERS, compared_grids, compared_solvers, find_grid, named_plan
from logsnr.sampling.table import table_of
from logsnr.terminal import console
from logsnr.training.data import told_sources
from logsnr.writing import replace_file


def place(device: str, dtype: str, compile_: bool, *, measures: bool = True) -> dict[str, Any]:
    """Where a network runs, as `load` takes it; an accelerator that nobody named is said.

    What `measures` does so in float64, which not every accelerator has.
    """
    found = find_device(device, float64=measures)
    if device == AUTO and found.type != "cpu":
        note(f"on {told(found)}; --device cpu for the CPU")
    return {"device": found, "dtype": None if dtype == "fp32" else find_dtype(dtype), "compile": compile_}


def run_denoiser(model: str, where: Mapping[str, Any] = MappingProxyType({})) -> NetworkDenoiser:
    """The denoiser of a run's folder at a `place`; of a pipeline's there is nothing to train, measure or export."""

    denoiser = None if is_pipeline(model) else load(model, **where)
    if not isinstance(denoiser, NetworkDenoiser):
        raise LogsnrError(f"{model} is a diffusers pipeline: this command takes the folder of a run, e.g. runs/digits")
    return denoiser


def model_name(model: str) -> str:
    """What reports call a model: a folder by its name alone."""
    folder = Path(model).expanduser()
    return folder.resolve().name if folder.is_dir() else model


def alone(plan: Path, **options: object) -> None:
    """Refuse options beside a plan's file, which says all that they could.

    Raises:
        LogsnrError: if one is given.
    """
    for name, value in options.items():
        if value is not None:
            raise LogsnrError(
                f"--{name.replace('_', '-')} {value} with --plan {plan}, which says it already: leave one of them out"
            )


def solver_plan(
    denoiser: Loaded,
    nfe: int,
    grid: str,
    sigma_max: float | None,
    sigma_min: float | None,
    solver: str,
    gamma: float | None,
    order: int | None,
) -> Plan:
    """The plan of a solver by name on a grid by name, within the model's sampling range where no end is given.

    Raises:
        LogsnrError: as `named_plan`, or if an end is given of a grid whose levels are fixed.
    """
    low, high = denoiser.sampling_range
    for option, end in (("--sigma-max", sigma_max), ("--sigma-min", sigma_min)):
        if end is not None and GRIDS[find_grid(grid)[0]].needs in ("table", "nothing"):
            raise LogsnrError(f"{option} {end:g} with --grid {grid}, whose levels are fixed: leave one of them out")
    return named_plan(
        "ge" if solver == "auto" else solver,
        nfe,
        low if sigma_min is None else sigma_min,
        high if sigma_max is None else sigma_max,
        grid=grid,
        sigma_data=denoiser.sigma_data,
        table=table_of(denoiser),
        gamma=gamma,
        order=order,
    )


def asked_range(denoiser: Denoiser, text: str | None, cond: dict[str, Any], seed: int) -> tuple[float, float] | None:
    """(smallest, largest) noise level of `--range`: "probe", which finds them, or LOW,HIGH; None where it is not given.

    Raises:
        LogsnrError: if it is neither, or the levels leave what the model was trained on.
    """
    if text is None:
        return None
    if text == "probe":
        found = probe(denoiser, cond=cond, seed=seed)
        note(str(found))
        return found.sigma_range
    try:
        low, high = (float(part) for part in text.split(","))
    except ValueError:
        raise LogsnrError(f"--range {text!r}: give probe, or two levels of sigma, e.g. --range 0.01,40") from None
    least, most = denoiser.trained_range
    if not (0 < low < high < math.inf and denoiser.covers(low, high)):
        raise LogsnrError(f"--range {text}: needs 0 < smallest < largest within the model's {least:.4g} ... {most:.4g}")
    return low, high


def known_names() -> dict[str, str]:
    """What help texts name: members of the registries."""
    from logsnr.evaluation.features import told_spaces
    from logsnr.evaluation.metrics.measures import METRICS

    return {
        "metrics": ", ".join(METRICS),
        "spaces": told_spaces(),
        "solvers": ", ".join(name for name, entry in SOLVERS.items() if entry.makes != "samples"),
        "grids": ", ".join(name for name, entry in GRIDS.items() if entry.needs != "eta"),
        "compared": ", ".join(compared_solvers()),
        "compared_grids": ", ".join(compared_grids()),
        "data": told_sources(),
    }


def class_of(denoiser: Loaded, text: str | None) -> int | None:
    """The number of a class that is named, as its folder was, or numbered; a name wins.

    Raises:
        LogsnrError: if it is neither.
    """
    names = denoiser.card.get("class_names") or []
    if text is None or text in names:
        return None if text is None else names.index(text)
    try:
        return int(text)
    except ValueError:
        if not names:
            raise LogsnrError(f"--class {text}: this model has no names of classes; give a number") from None
        raise unknown("--class", text, names, ", or a number") from None


def check_number(n: int, shape: Sequence[int]) -> None:
    """Refuse more images than this machine holds: noise, state and what moves it.

    Raises:
        LogsnrError: naming the bytes.
    """
    if (need := 12 * n * math.prod(shape)) > memory():
        raise LogsnrError(
            f"-n {n}: {n:.3g} images of {tuple(shape)} take {gigabytes(need)}, this machine has {gigabytes(memory())}: "
            "draw fewer, and others with another --seed"
        )


def condition(denoiser: Loaded, label: int | None, n: int) -> dict[str, Any]:
    """The class of every image; without one, a conditional model draws its classes in turn."""
    check_number(n, denoiser.shape)
    classes = denoiser.card.get("classes", 0)
    if not classes:
        if label is not None:
            raise LogsnrError(f"--class {label}: this model is unconditional; leave --class out")
        return {}
    if label is None:
        return {"class_labels": torch.arange(n) % classes}
    null = denoiser.card.get("null_class")
    if not 0 <= label < classes and label != null:
        none = "" if null is None else f", or {null} for the null condition"
        raise LogsnrError(f"--class {label}: give 0 ... {classes - 1}{none}")
    return {"class_labels": torch.full((n,), label)}


def sampled_model(
    model: str,
    prompt: str | None,
    negative_prompt: str | None,
    guidance: float,
    null_class: int | None,
    where: Mapping[str, Any] = MappingProxyType({}),
) -> tuple[Loaded, Denoiser]:
    """The model, and the denoiser that samples it: guided, if guidance is not 1.

    Raises:
        LogsnrError: if an option does not fit the model.
    """
    options = {"prompt": prompt, "negative_prompt": negative_prompt, "null_class": null_class}
    given = {name: value for name, value in options.items() if value is not None}
    if negative_prompt is not None and guidance == 1:
        raise LogsnrError(f"--negative-prompt {negative_prompt!r} without guidance does nothing: give --guidance too")
    if is_pipeline(model):
        require_diffusers("a diffusers pipeline")
        for library in ("diffusers", "transformers"):
            if find_spec(library) is not None:
                log = import_module(f"{library}.utils.logging")
                log.set_verbosity_error()  # what is wrong, our error says in one line
                if not console(stderr=True).is_terminal:
                    log.disable_progress_bar()  # "Loading ...", on stderr
        scale = None if guidance == 1 else guidance  # not asked for: a network that is told it has a default
        denoiser = load(
            model, prompt=prompt, negative_prompt=negative_prompt, guidance=scale, null_class=null_class, **where
        )
        return denoiser, denoiser
    for name, value in given.items():
        raise LogsnrError(
            f"--{name.replace('_', '-')} {value!r}: {model} is no diffusers pipeline; a class-conditional model takes "
            "--class, and knows its null condition"
        )
    denoiser = load(model, **where)
    if guidance == 1:
        return denoiser, denoiser
    null, trained = denoiser.card.get("null_class"), denoiser.card.get("training") or {}
    if null is None:
        raise LogsnrError(f"--guidance {guidance:g}: this model is unconditional; leave --guidance out")
    if trained.get("label_dropout") == 0:
        raise LogsnrError(
            f"--guidance {guidance:g}: this model was trained without the null condition (label_dropout 0): leave "
            "--guidance out, or train with label_dropout: 0.1"
        )
    return denoiser, cfg(denoiser, guidance, {"class_labels": torch.tensor([null])})


def read_prompts(path: Path) -> list[str]:
    """The prompts of a file, one a line; empty lines are none.

    Raises:
        LogsnrError: if it cannot be read, or holds none.
    """
    path, fix = expanded(path), "give a text file in UTF-8 with a prompt a line"
    with reading(path, fix, "a file of prompts"):
        found = [line.strip() for line in read_text(path).splitlines() if line.strip()]
    if not found:
        raise LogsnrError(f"{path} holds no prompt: {fix}")
    return found


def prompted(denoiser: Loaded, model: str, prompts: Path | None, label: int | None, n: int) -> tuple[Cond, list[str]]:
    """The conditions of n samples, used in turn, and the prompts of a file that they are of, if any.

    Raises:
        LogsnrError: if the model takes no prompts, or needs them.
    """
    told = denoiser.told if isinstance(denoiser, PipelineDenoiser) else None
    if prompts is None:
        if told == "a text":
            raise LogsnrError("this pipeline is told a text: give --prompts, a file with a prompt a line")
        return condition(denoiser, label, n), []
    if not isinstance(denoiser, PipelineDenoiser) or told is None:
        raise LogsnrError(f"--prompts {prompts}: {model} is told none; leave it out")
    if label is not None:
        raise LogsnrError(f"--class {label} with --prompts {prompts}: give one of them")
    texts = read_prompts(prompts)
    return denoiser.conditions(texts), texts


def about_prompts(prompts: Sequence[str]) -> dict[str, Any]:
    """Which prompts: how many, and their hash."""
    return {"number": len(prompts), "sha256": prompts_hash(prompts)}


def sampled_condition(denoiser: Loaded, label: int | None, prompt: str | None, n: int) -> dict[str, Any]:
    """The conditions of n images, beyond those of a prompt.

    Raises:
        LogsnrError: if the model takes none, or needs one.
    """
    check_number(n, denoiser.shape)
    if not isinstance(denoiser, PipelineDenoiser):
        return condition(denoiser, label, n)
    told = denoiser.told
    if label is not None and (prompt is not None or told == "a text"):
        raise LogsnrError(
            f"--class {label} with --prompt: give one of them"
            if prompt is not None
            else f"--class {label}: this pipeline is told a text; give --prompt"
        )
    if told == "a text" and prompt is None:
        raise LogsnrError("this pipeline is told a text: give --prompt, e.g. --prompt 'a red fox'")
    return {} if prompt is not None else condition(denoiser, label, n)


def write_images(x: Tensor, denoiser: Loaded, out: Path) -> None:
    """Decode samples and write them as one picture (.png) or as grey levels (.npy)."""
    images, pixels = denoiser.decode(x), denoiser.pixels or Pixels()
    if out.suffix == ".npy":
        buffer = io.BytesIO()
        np.save(buffer, images.numpy())
        replace_file(out, buffer.getvalue())
        return
    columns = max(1, round(len(images) ** 0.5))
    scale = max(1, 64 // images.shape[-1])
    replace_file(out, png(tile(pixels.display(images), columns=columns, scale=scale)))


def this_command(*more: str, without: str = "") -> str:
    """The command line that was typed, with more options at its end where it has them not, and without one."""
    typed = [word for word in sys.argv[1:] if not without or word != without]
    return shlex.join(["logsnr", *typed, *(more if more and more[0] not in typed else ())])


def print_json(facts: dict[str, Any]) -> None:
    """One JSON object on stdout."""
    print(json.dumps(facts, indent=2))
