"""Generation: shard after shard, chunk after chunk, until all are there or somebody says stop.

    process r of w makes the shards r, r + w, r + 2 w, ...      that are not there yet

No process waits for another or speaks to it: launchers (torchrun, accelerate, a cluster's) say r and w by RANK and
WORLD_SIZE.  Memory holds one shard.  Ctrl-C and SIGTERM let the chunk finish; what is lost is an unfinished shard.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from logsnr.denoiser import Denoiser
from logsnr.devices import find_process
from logsnr.errors import LogsnrError
from logsnr.files import fingerprint
from logsnr.generation.settings import Settings, default_sizes
from logsnr.generation.shards import PROMPTS, Shards, claim, find_format
from logsnr.interrupts import Asked, Interrupted, put_off
from logsnr.sampling.batches import take
from logsnr.sampling.default import plan_for
from logsnr.sampling.gaussian import GaussianStart
from logsnr.sampling.loop import evaluations, sample
from logsnr.sampling.plan import Plan
from logsnr.sampling.start import start as first_noise
from logsnr.sampling.streams import generators
from logsnr.terminal import clock, console, progress_bar
from logsnr.writing import check_folder, replace_file

EVERY = 30.0
"""Seconds between lines where no terminal shows a bar."""


@dataclass(frozen=True, kw_only=True)
class Generated:
    """What a call of `generate` did.

    Args:
        out: the folder.
        settings: what decided the images.
        made: images that this call made.
        found: images of this process that were there, whole.
        missing: shards that are not there yet: other processes'.
        evaluations: of the network per image.
        seconds: that it took.
    """

    out: Path
    settings: Settings
    made: int
    found: int
    missing: int
    evaluations: int
    seconds: float

    @property
    def images_per_second(self) -> float:
        """Of this call alone."""
        return self.made / max(self.seconds, 1e-9)

    def __str__(self) -> str:
        n, shards = self.settings.n, self.settings.shards
        made = f"{self.made:,} made now, {self.images_per_second:,.0f} images/s"
        there = [f"{self.found:,} were there"] if self.found else []
        others = [f"{self.missing} shards are other processes' and not there yet"] if self.missing else []
        many = f"{n:,} images in {shards} shard{'s' if shards > 1 else ''} of {self.evaluations} evaluations each"
        return f"{self.out}: {many}; {'; '.join([made if self.made else 'none made now', *there, *others])}"

    def to_dict(self) -> dict[str, Any]:
        """The numbers, for JSON."""
        settings = self.settings
        return {
            "out": str(self.out),
            "images": settings.n,
            "made": self.made,
            "found": self.found,
            "shards": settings.shards,
            "missing": self.missing,
            "evaluations": self.evaluations,
            "seconds": self.seconds,
            "images_per_second": self.images_per_second,
            "seed": settings.seed,
            "classes": settings.deal,
            "chunk": settings.chunk,
            "shard": settings.shard,
            "format": settings.format,
            "plan": settings.plan,
            "weights": settings.weights,
        }


def generate(
    denoiser: Denoiser,
    plan: Plan | int,
    out: str | os.PathLike[str],
    *,
    n: int,
    seed: int = 0,
    classes: str | int | None = "balanced",
    start: GaussianStart | None = None,
    format: str = "npz",
    chunk: int | None = None,
    shard: int | None = None,
    overwrite: bool = False,
    progress: bool = False,
    rank: int | None = None,
    world: int | None = None,
    model: str = "",
    told: Mapping[str, Any] | None = None,
    prompts: Sequence[str] | None = None,
) -> Generated:
    """Make n images, or those of them that are not there yet, in shards in a folder.

        ls.generate(denoiser, 5, "shards", n=50_000)

    Image i depends on the model, the plan and (seed, i) alone: not on n, on the number of processes, or on how often
    the work was cut off.  Bits are those of one kind of machine and number of threads.

    Args:
        denoiser: the model.
        plan: as in `sample`.
        out: the folder; made if needed.
        n: how many images; more than before is more of the same set.
        seed: of every draw.
        classes: of a class-conditional model: "balanced", image i has class i mod classes; "drawn", each from its own
            stream; one for all; or None to leave it to the denoiser.
        start: as in `sample`.
        format: a name of `FORMATS`: npz or png.
        chunk: images per call of the network; every chunk is computed whole, the last one too.  Another chunk gives
            images that differ in the last bits.
        shard: images per shard, a whole number of chunks.
        overwrite: begin anew where the folder holds another set.
        progress: show a bar, on a terminal; elsewhere a line now and then.
        rank: number of this process; None for the environment's RANK, 0 without one.
        world: how many processes take part; None for WORLD_SIZE, 1 without one.
        model: what the model is called, for the record.
        told: conditions of the denoiser that it does not tell of itself (a prompt), for the record: a set of other ones
            is refused.
        prompts: of a pipeline that is told a text: image i has prompt i mod their number.  They are encoded chunk by
            chunk.

    Returns:
        What was done.

    Raises:
        LogsnrError: if the folder holds another set, cannot be written to, or an argument does not fit.
        Interrupted: after Ctrl-C or SIGTERM.
        ValueError, NonFiniteError: as `sample`.
    """
    rank, world = find_process(rank, world)
    folder = check_folder(out)
    plan = plan if isinstance(plan, Plan) else plan_for(denoiser, plan)
    state = first_noise(denoiser, None, 1, generators(seed, [0]))
    shape = tuple(denoiser.decode(state).shape[1:])
    chunk, shard = default_sizes(shape, chunk, shard)
    find_format(format, shape)
    of = int(denoiser.card.get("classes") or 0)
    if not of and classes not in ("balanced", None):
        raise LogsnrError(f"classes = {classes}: this model is unconditional; leave it out")
    encoded = None if prompts is None else _encoder(denoiser, prompts)
    if encoded is not None and prompts is not None:
        told = {**(told or {}), "prompts": prompts_hash(prompts)}
        classes = None
    network = next((p for p in denoiser.parameters() if p.is_floating_point()), state)
    starts = start if start is not None else denoiser.start if plan.meta.get("start") else None
    settings = Settings(
        model=model or str(denoiser.card.get("name", "")),
        sampler=str(plan.meta.get("solver", "custom")),
        told=dict(told or {}),
        prompts=len(prompts or ()),
        seed=seed,
        deal=classes if of and prompts is None else None,
        classes=of,
        class_names=tuple(denoiser.card.get("class_names") or ()),
        plan=plan.hash,
        start=None if starts is None else starts.fingerprint,
        guidance=float(getattr(denoiser, "scale", getattr(denoiser, "guidance", 1.0))),
        dtype=str(network.dtype).removeprefix("torch."),
        denoiser=repr(denoiser),
        weights=fingerprint(denoiser.state_dict()),
        chunk=chunk,
        shard=shard,
        format=format,
        shape=shape,
        grey_levels=denoiser.pixels.grey_levels if denoiser.pixels else 256,
        n=n,
    )
    shards = claim(folder, settings, overwrite=overwrite, rank=rank, world=world)
    if prompts is not None and not (folder / PROMPTS).exists():
        replace_file(folder / PROMPTS, (json.dumps(list(prompts), ensure_ascii=False, indent=1) + "\n").encode())

    def images(index: range) -> Tensor:
        """The images of a chunk: whole, so that none depends on how many are wanted."""
        labels = settings.condition(index)
        cond: Mapping[str, Any] = {} if labels is None else {"class_labels": labels}
        if encoded is not None:
            cond = encoded(index)
        x = sample(denoiser, plan, n=len(index), generator=generators(seed, index), cond=cond, start=start)
        return denoiser.decode(x).cpu()

    began = time.perf_counter()
    own = range(rank, settings.shards, world)
    with put_off() as asked, progress_bar(progress, "generating") as show:
        total = sum(len(settings.images(number)) for number in own)
        tell = _teller(total, show, progress)
        made, found = _fill(shards, own, images, asked, tell)
        missing = shards.missing
        if asked.signum is not None and made + found < total:
            raise Interrupted(
                f"interrupted: {settings.shards - len(missing)} of {settings.shards} shards are whole in {folder}; the "
                "same again goes on",
                signum=asked.signum,
            )
    return Generated(
        out=folder,
        settings=settings,
        made=made,
        found=found,
        missing=len(missing),
        evaluations=evaluations(denoiser, plan),
        seconds=time.perf_counter() - began,
    )


def _encoder(denoiser: Denoiser, prompts: Sequence[str]) -> Callable[[range], Mapping[str, Any]]:
    """Images -> the conditions of their prompts, each encoded once.

    Raises:
        LogsnrError: if there are none, or the model is told no text.
    """
    conditions = getattr(denoiser, "conditions", None)
    if conditions is None or getattr(denoiser, "told", None) != "a text":
        raise LogsnrError("prompts are for a pipeline that is told a text, which this model is not: leave them out")
    if not prompts:
        raise LogsnrError("no prompts: give at least one")

    def encoded(index: range) -> Mapping[str, Any]:
        texts = [prompts[i % len(prompts)] for i in index]
        each = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        return take(conditions(list(each)), torch.tensor([each[text] for text in texts]))

    return encoded


def _fill(
    shards: Shards, own: range, images: Callable[[range], Tensor], asked: Asked, tell: Callable[[int, int], None]
) -> tuple[int, int]:
    """Make the shards that are not there, until asked to stop: images made, and images found."""
    settings, made, found = shards.settings, 0, 0
    for number in own:
        wanted = settings.images(number)
        if shards.whole(number):
            found += len(wanted)
            continue
        parts: list[Tensor] = []
        for first in range(wanted.start, wanted.stop, settings.chunk):
            if asked.signum is not None:
                return made, found
            parts.append(images(range(first, first + settings.chunk))[: wanted.stop - first])
            tell(made + first + len(parts[-1]) - wanted.start, found)
        shards.write(number, torch.cat(parts))
        made += len(wanted)
    return made, found


def _teller(total: int, show: Callable[[float, str], None] | None, wanted: bool) -> Callable[[int, int], None]:
    """Tell how many images are made and found: on a bar, or where there is none in a line now and then."""
    began = said = time.perf_counter()

    def tell(made: int, found: int) -> None:
        nonlocal said
        now = time.perf_counter()
        rate = made / max(now - began, 1e-9)
        text = f"{made + found:,}/{total:,} images  {rate:,.0f} images/s"
        if show is not None:
            show((made + found) / total, text)
        elif wanted and now - said > EVERY:
            said, left = now, (total - made - found) / rate
            line = f"{text}  {clock(now - began)} elapsed, {clock(left)} left"
            console(stderr=True).print(line, soft_wrap=True)

    return tell


def prompts_hash(prompts: Sequence[str]) -> str:
    """sha256 of prompts and their order: which they are, in a set's and in a plan's file."""
    return hashlib.sha256(json.dumps(list(prompts)).encode()).hexdigest()
