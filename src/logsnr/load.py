"""Load a denoiser by where it lives: the folder of a run, and later a published model or a diffusers repository."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError
from logsnr.models.store import CARD, load_denoiser


def load(source: str | Path) -> NetworkDenoiser:
    """A trained denoiser in eval mode, on the CPU, with `.encode`, `.decode` and its `.card`.

        denoiser = logsnr.load("runs/digits")

    Args:
        source: the folder of a run (it holds card.json and a safetensors file).

    Raises:
        LogsnrError: if there is no such model; the message lists the runs that lie nearby.
    """
    text = str(source)
    for recognised, loader in SOURCES.values():
        if recognised(text):
            return loader(text)
    raise LogsnrError(
        f"{text!r} is not the folder of a run (no {CARD}.json){_nearby(Path(text))}; give one of: {', '.join(SOURCES)}"
    )


def _is_run(source: str) -> bool:
    return (Path(source).expanduser() / f"{CARD}.json").is_file()


def _load_run(source: str) -> NetworkDenoiser:
    return load_denoiser(Path(source).expanduser())


def _is_zoo(source: str) -> bool:
    return source.startswith("zoo:")


def _load_zoo(source: str) -> NetworkDenoiser:
    raise LogsnrError(f"{source!r}: published models are not available yet; train one with `logsnr train`")


def _is_diffusers(source: str) -> bool:
    folder = Path(source).expanduser()
    return (folder / "model_index.json").is_file() or (folder / "scheduler_config.json").is_file()


def _load_diffusers(source: str) -> NetworkDenoiser:
    raise LogsnrError(
        f"{source!r} is a diffusers pipeline, which load does not read yet: wrap its network in NetworkDenoiser "
        "with the prediction and timestep table of its scheduler"
    )


SOURCES: dict[str, tuple[Callable[[str], bool], Callable[[str], NetworkDenoiser]]] = {
    "the folder of a run": (_is_run, _load_run),
    "zoo:NAME": (_is_zoo, _load_zoo),
    "a diffusers folder": (_is_diffusers, _load_diffusers),
}
"""Kinds of source: how each is recognised, and how it is read."""


def _nearby(path: Path) -> str:
    """The runs in the folder asked for, beside it, or in runs/."""
    for folder in (path, path.parent, Path("runs")):
        found = sorted(str(card.parent) for card in folder.glob(f"*/{CARD}.json")) if folder.is_dir() else []
        if found:
            return f"; there are {', '.join(found[:8])}"
    return ""
