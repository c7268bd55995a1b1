"""The zoo: small models of real images that come with the library, each a folder beside this file.

NAME/card.json                      how the weights become a denoiser, how they were made, what was measured on them
     model-STEP-HASH.safetensors    the weights, float16
     plans.json                     calibrated plans, keyed by evaluations
     README.md                      the card for people

logsnr.load("zoo:digits")           logsnr sample zoo:digits --nfe 5
"""

from __future__ import annotations

from pathlib import Path

from logsnr.errors import unknown

FOLDER = Path(__file__).parent
PREFIX = "zoo:"
PLANS = "plans.json"
"""File of a model's folder that holds its plans, a set keyed by evaluations."""
START = "start.safetensors"
"""Beside it: the Gaussian start that some of the plans begin from."""


def names() -> list[str]:
    """The models that there are."""
    return sorted(path.parent.name for path in FOLDER.glob("*/card.json"))


def folder(source: str) -> Path:
    """The folder of `"zoo:NAME"`.

    Raises:
        LogsnrError: if there is no model of that name.
    """
    name = source.removeprefix(PREFIX)
    if name not in names():
        raise unknown("model", PREFIX + name, [PREFIX + known for known in names()])
    return FOLDER / name
