"""Parts: the bound of many images, a part of them at a time, by any number of processes, to go on with after a kill.

    bits = sum_p (n_p/N) bits_p,      stderr^2 = sum_p (n_p/N)^2 stderr_p^2

so that the whole has an error of tol if every part has tol / sqrt(sum_p (n_p/N)^2), about sqrt(parts) tol.

Part p holds the images p m ... p m + m - 1, and its draws come from (seed, p) alone (`sampling.streams`), so whoever
measures it gets the same number.  A part is one file, written whole; a part that is there is left alone.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.errors import LogsnrError
from logsnr.likelihood.bound import Likelihood, bits_per_dim
from logsnr.reading import read_json
from logsnr.sampling.batches import take
from logsnr.sampling.streams import generators
from logsnr.writing import check_folder, replace_file

PART = 1000
"""Images of a part unless told."""
VERSION = 1
TERMS = ("diffusion", "reconstruction", "prior")


def merged(parts: Sequence[Likelihood]) -> Likelihood:
    """The bound of all images of several measurements, whose noise is independent.

    Raises:
        ValueError: if there are none, or their ranges of noise levels differ.
    """
    if not parts or len({part.logsnr_range for part in parts}) > 1:
        raise ValueError(f"{len(parts)} parts on {[part.logsnr_range for part in parts]}: give some, of one range")
    sizes = [len(part.per_image) for part in parts]
    shares = [size / sum(sizes) for size in sizes]

    def mean(name: str) -> float:
        return sum(share * float(getattr(part, name)) for share, part in zip(shares, parts, strict=True))

    per_image = torch.cat([part.per_image for part in parts])
    curves = [share * part.loss_curve[1] for share, part in zip(shares, parts, strict=True)]
    return Likelihood(
        bits_per_dim=float(per_image.mean()),
        stderr=math.sqrt(sum((share * part.stderr) ** 2 for share, part in zip(shares, parts, strict=True))),
        data_stderr=float(per_image.std() / len(per_image) ** 0.5) if len(per_image) > 1 else math.inf,
        diffusion=mean("diffusion"),
        reconstruction=mean("reconstruction"),
        prior=mean("prior"),
        per_image=per_image,
        logsnr_range=parts[0].logsnr_range,
        loss_curve=(parts[0].loss_curve[0], torch.stack(curves).sum(0)),
        evaluations=sum(part.evaluations for part in parts),
        pilot_evaluations=sum(part.pilot_evaluations for part in parts),
    )


def bits_per_dim_in_parts(
    denoiser: Denoiser,
    images: Tensor,
    folder: str | Path,
    *,
    cond: Mapping[str, Tensor] | None = None,
    seed: int = 0,
    part: int = PART,
    rank: int = 0,
    world: int = 1,
    tolerance: float | None = None,
    about: Mapping[str, Any] | None = None,
    progress: Callable[[int, int], None] | None = None,
    **options: Any,
) -> Likelihood | None:
    """`bits_per_dim` of many images, by parts that lie in a folder.

    Args:
        denoiser: the model.
        images: grey levels uint8 `[N, *shape]`.
        folder: of the parts, part-00000.json ...; created if needed.
        cond: conditions with one entry per image.
        seed: of every draw, with the part's number.
        part: images of a part.
        rank: this process; it measures the parts rank, rank + world, ...
        world: number of processes.
        tolerance: of the whole's standard error.
        about: facts that parts share (what model, which data): parts of others are refused.
        progress: called with (parts there, parts in all).
        **options: of `bits_per_dim`.

    Returns:
        The whole, if all parts are there; None while others are at work.

    Raises:
        LogsnrError: if the folder holds parts of another measurement, or one that is damaged.
        ValueError: as `bits_per_dim`.
    """
    folder = check_folder(Path(folder))
    count = -(-len(images) // part)
    given = {k: v for k, v in options.items() if isinstance(v, (int, float, str, tuple))}
    facts = {
        "images": len(images),
        "part": part,
        "seed": seed,
        "tolerance": tolerance,
        **{key: list(value) if isinstance(value, tuple) else value for key, value in given.items()},
        **(about or {}),
    }
    sizes = [min(part, len(images) - first) for first in range(0, len(images), part)]
    each = None if tolerance is None else tolerance * len(images) / math.hypot(*sizes)
    for index in range(rank, count, world):
        file = _file(folder, index)
        if file.is_file():
            _read(file, facts)
            continue
        few = slice(index * part, min((index + 1) * part, len(images)))
        found = bits_per_dim(
            denoiser,
            images[few],
            cond=take(cond, few),
            generator=generators(seed, [index])[0],
            tolerance=each,
            **options,
        )
        values = {"version": VERSION, "about": facts, **_values(found)}
        replace_file(file, (json.dumps(values, allow_nan=False) + "\n").encode())
        if progress is not None:
            progress(sum(_file(folder, i).is_file() for i in range(count)), count)
    files = [_file(folder, index) for index in range(count)]
    if not all(file.is_file() for file in files):
        return None
    return merged([_read(file, facts) for file in files])


def _file(folder: Path, index: int) -> Path:
    return folder / f"part-{index:05d}.json"


def _values(found: Likelihood) -> dict[str, Any]:
    values = {name: getattr(found, name) for name in found.__dataclass_fields__}
    values["per_image"] = found.per_image.tolist()
    values["loss_curve"] = [line.tolist() for line in found.loss_curve]
    values["data_stderr"] = found.data_stderr if math.isfinite(found.data_stderr) else None
    return values


def _read(file: Path, facts: Mapping[str, Any]) -> Likelihood:
    values = read_json(file, "remove it, and it is measured again", "a part of a likelihood")
    about = values.get("about")
    if values.get("version") != VERSION or not isinstance(about, dict):
        raise LogsnrError(f"{file} is no part of a likelihood that this version reads: give another folder")
    for name in sorted({*about, *facts}):
        if about.get(name) != facts.get(name):
            raise LogsnrError(
                f"{file.parent} holds parts with {name} {about.get(name)}, not {facts.get(name)}: ask for the same, or "
                "give another folder"
            )
    try:
        logsnr, error = (torch.tensor(line, dtype=torch.float64) for line in values["loss_curve"])
        low, high = values["logsnr_range"]
        return Likelihood(
            **{
                name: float(values[name]) for name in ("bits_per_dim", "stderr", "diffusion", "reconstruction", "prior")
            },
            data_stderr=math.inf if values["data_stderr"] is None else float(values["data_stderr"]),
            per_image=torch.tensor(values["per_image"], dtype=torch.float64),
            logsnr_range=(float(low), float(high)),
            loss_curve=(logsnr, error),
            evaluations=int(values["evaluations"]),
            pilot_evaluations=int(values["pilot_evaluations"]),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise LogsnrError(f"{file} is damaged ({error}): remove it, and it is measured again") from error
