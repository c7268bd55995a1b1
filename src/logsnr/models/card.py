"""Denoisers on disk: a folder with `card.json` and the weights it names.

The card is everything that turns weights back into a denoiser: the network's config, the prediction, the shape, the
pixel codec, sigma_data, the trained range, the classes; and how it was trained.
"""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from logsnr.denoiser import NetworkDenoiser
from logsnr.errors import LogsnrError, shown, unknown
from logsnr.files import CARD, MODEL, Pair, check_finite, check_tensors, read_card, read_pair, write_pairs
from logsnr.models.base import Network, NetworkConfig
from logsnr.models.networks import build_network, network_config
from logsnr.paths import expanded
from logsnr.pixels import Pixels
from logsnr.predictions import LABELS, PREDICTIONS, Prediction
from logsnr.reading import reading
from logsnr.timesteps import TimestepTable

KEPT = ("class_names", "data")
"""Entries of a denoiser's card that are saved with it again."""
MOST_VALUES = 2**28
"""Values of the largest sample: an image of 9,000 x 9,000 in colour."""


def save_denoiser(
    denoiser: NetworkDenoiser,
    folder: str | Path,
    *,
    step: int = 0,
    training: dict[str, Any] | None = None,
    measured: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
) -> Path:
    """Write `denoiser` into `folder`, atomically: a crash or a full disk leaves the one saved before.

    Args:
        denoiser: a denoiser around a network of `build_network`.
        folder: created if needed.
        step: training steps behind the weights.
        training: the recipe, kept in the card for the record; of data by an absolute path, the name alone.
        measured: what was measured on the model, kept in the card for the record.
        dtype: of the weights in the file, e.g. torch.float16 for half its size; they load as float32.

    Returns:
        The path of the card.

    Raises:
        LogsnrError: if the network has no config, the prediction's label is a custom function, a weight is NaN or
            infinite, or the disk refuses.
    """
    pair = denoiser_pair(denoiser, folder, training=training, measured=measured, dtype=dtype)
    write_pairs([pair], step=step)
    return pair.folder / f"{CARD}.json"


def denoiser_pair(
    denoiser: NetworkDenoiser,
    folder: str | Path,
    *,
    training: dict[str, Any] | None = None,
    measured: dict[str, Any] | None = None,
    dtype: torch.dtype | None = None,
    weights: dict[str, Tensor] | None = None,
) -> Pair:
    """What `save_denoiser` writes.

    Args:
        denoiser: as there, and so what follows.
        folder: created if needed.
        training: the recipe.
        measured: what was measured on the model.
        dtype: of the weights in the file.
        weights: the network's, where it holds a part of them alone.

    Raises:
        LogsnrError: as there.
    """
    network = denoiser.network
    if not isinstance(network, Network):
        raise LogsnrError(
            f"a {type(network).__name__} cannot be saved: only networks of build_network(config, shape) carry the "
            "config that rebuilds them; save its state_dict yourself"
        )
    card: dict[str, Any] = {
        "kind": "denoiser",
        "network": network.config.model_dump(mode="json"),
        "prediction": prediction_to_json(denoiser.prediction),
        "shape": list(denoiser.shape),
        "grey_levels": denoiser.pixels.grey_levels if denoiser.pixels else None,
        "sigma_data": denoiser.sigma_data,
        # A range that ends at inf (zero terminal SNR) has no JSON number: inf is written as a string.
        "trained_range": [v if math.isfinite(v) else str(v) for v in denoiser.trained_range],
        "classes": network.classes,
        "null_class": network.null_class,
        "training": _for_others(training),
    }
    if denoiser.pixels is not None and denoiser.pixels.box != Pixels().box:
        card["box"] = list(denoiser.pixels.box)
    # What else is on record of it: names of the classes, what data were read.
    card |= {key: denoiser.card[key] for key in KEPT if denoiser.card.get(key)}
    if measured is not None:
        card["measured"] = measured
    weights = network.state_dict() if weights is None else weights
    if dtype is not None:
        weights = {name: v.to(dtype) if v.is_floating_point() else v for name, v in weights.items()}
    check_finite(weights, "cannot be saved")
    return Pair(folder=expanded(folder), name=CARD, stem=MODEL, card=card, tensors=weights)


def _for_others(value: Any) -> Any:
    """The recipe without places on this machine: of an absolute path (data, init_from) the name is kept alone."""
    if isinstance(value, dict):
        return {key: _for_others(inner) for key, inner in value.items()}
    placed = isinstance(value, str) and (value.startswith("~") or Path(value).is_absolute())
    return Path(value).name if placed else value


def load_denoiser(folder: str | Path, *, network: type[nn.Module] | None = None) -> NetworkDenoiser:
    """The denoiser of `save_denoiser`, in eval mode on the CPU, with its card as `.card`.

    Args:
        folder: where it lies.
        network: the class of the network, where the card names code: nothing is then imported.

    Raises:
        LogsnrError: if the folder is not such a one, its files are damaged or of another format, or the weights
            belong to another network than the card describes.
    """
    path = expanded(folder)
    if read_card(path, CARD).get("kind") != "denoiser":
        raise LogsnrError(f"{path / CARD}.json is not the card of a denoiser: give the folder of a run")
    card, tensors = read_pair(path, CARD)
    if "levels" in card:  # what version 0.1 called them
        card["grey_levels"] = card.pop("levels")
    with reading(path / f"{CARD}.json", "restore the card or train again", "the description of a denoiser"):
        config = network_config(card["network"])
        prediction = prediction_from_json(card["prediction"])
        shape = tuple(int(n) for n in card["shape"])
        lo, hi = (float(v) for v in card["trained_range"])
        low, high = card.get("box", Pixels().box)
        pixels = None if card["grey_levels"] is None else Pixels(int(card["grey_levels"]), (float(low), float(high)))
        sigma_data = float(card["sigma_data"])
        _check(card, config, shape, (lo, hi), sigma_data)
        # Before it is built: a card may describe what no memory holds.
        if (least := config.least_weights(shape)) > 10 * (found := sum(v.numel() for v in tensors.values())) + 10**6:
            raise ValueError(f"a network of at least {least:,} weights, the file has {found:,}")
        # The weights come from the file; those drawn while building must not move the caller's random state.
        with torch.random.fork_rng(devices=[]):
            built = build_network(config, shape, network=network)
    check_tensors(
        tensors,
        built.state_dict(),
        lambda problems: (
            f"{path / card['weights']['file']} is the checkpoint of another network than its card "
            f"describes: {problems}; restore the matching pair"
        ),
    )
    built.load_state_dict(tensors)
    denoiser = NetworkDenoiser(
        built, prediction, shape=shape, pixels=pixels, sigma_data=sigma_data, trained_range=(lo, hi)
    )
    denoiser.card = card
    denoiser.requires_grad_(False)
    return denoiser.eval()


def _check(
    card: dict[str, Any], config: NetworkConfig, shape: tuple[int, ...], levels: tuple[float, float], sigma_data: float
) -> None:
    """What commands read of a card as it stands.

    Raises:
        ValueError: if it does not fit the network, or is none.
    """
    for key, wanted in (("classes", config.classes), ("null_class", config.null_class)):
        if card.get(key, wanted) != wanted:
            raise ValueError(f"{key} = {shown(card[key])}, the network's is {wanted}")
    for key in ("training", "measured"):
        if not isinstance(card.get(key) or {}, dict):
            raise ValueError(f"{key} = {shown(card[key])} is no mapping")
    if not all(n >= 1 for n in shape) or math.prod(shape) > MOST_VALUES:
        raise ValueError(f"shape {shown(shape)} is none")
    if not 0 <= levels[0] < levels[1] or not 0 < sigma_data < math.inf:
        raise ValueError(f"trained_range {levels} or sigma_data {sigma_data} is none")


def prediction_to_json(prediction: Prediction) -> dict[str, Any]:
    """Name and fields of a prediction; a `TimestepTable` label becomes its alphas_cumprod.

    Raises:
        LogsnrError: if the label is a custom function or the prediction a class of one's own.
    """
    if PREDICTIONS.get(prediction.name) is not type(prediction):
        raise LogsnrError(
            f"a prediction of class {type(prediction).__name__} cannot be stored: use one of {', '.join(PREDICTIONS)}"
        )
    fields = {field.name: getattr(prediction, field.name) for field in dataclasses.fields(prediction)}
    label = fields["label"]
    if isinstance(label, TimestepTable):
        fields["label"] = {"table": label.name, "alphas_cumprod": label.alphas_cumprod.tolist()}
    elif not isinstance(label, str):
        named = next((name for name, known in LABELS.items() if known is label), None)
        if named is None:
            raise LogsnrError(
                f"the label {getattr(label, '__name__', label)!r} is a function, which a file cannot hold: "
                f"use a name ({', '.join(LABELS)}) or a TimestepTable"
            )
        fields["label"] = named
    return {"name": prediction.name, **fields}


def prediction_from_json(data: dict[str, Any]) -> Prediction:
    """The inverse of `prediction_to_json`.

    Raises:
        LogsnrError: if the name or a field is unknown.
    """
    fields = dict(data)
    name = fields.pop("name", None)
    if name not in PREDICTIONS:
        raise unknown("prediction", name, PREDICTIONS)
    known = [field.name for field in dataclasses.fields(PREDICTIONS[name])]
    for field in fields:
        if field not in known:
            raise unknown(f"field of prediction {name}", field, known)
    label = fields.get("label")
    if isinstance(label, dict):
        abar = torch.tensor(label["alphas_cumprod"], dtype=torch.float64)
        fields["label"] = TimestepTable(abar, name=label["table"])
    elif "label" in fields and not isinstance(label, str):
        raise LogsnrError(f"label of prediction {name} = {shown(label)}: give a name ({', '.join(LABELS)}) or a table")
    return PREDICTIONS[name](**fields)
