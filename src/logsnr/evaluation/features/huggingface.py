"""Vision networks by their names on the hub, or folders of them, through transformers: DINOv2, CLIP, ViT.

The whole image is shown, resized to the network's square (bicubic, antialiased) and normalised with the mean and the
standard deviation of its image processor.  The features are the image embedding of a network that has one (CLIP), else
the pooled output, else the class token of the last layer; the mean over places where there is none.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from logsnr.errors import LogsnrError, one_line, require
from logsnr.evaluation.features.space import Space, resized, shown
from logsnr.files import fingerprint
from logsnr.paths import expanded
from logsnr.pixels import Pixels

_IMAGENET = {"mean": (0.485, 0.456, 0.406), "std": (0.229, 0.224, 0.225)}
_CLASS_TOKENS = ("cls_token", "class_embedding")
_CHUNK = 64


def huggingface(name: str, pixels: Pixels) -> Space:
    """The features of a vision network.

    Raises:
        LogsnrError: if transformers is not installed, there is no such network, it lacks weights, or it is told
            anything but images.
    """
    transformers = require("transformers", extra="diffusers", purpose=f"features hf:{name}")
    place = str(expanded(name)) if expanded(name).exists() else name
    logging = importlib.import_module("transformers.utils.logging")
    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        network, found = transformers.AutoModel.from_pretrained(place, output_loading_info=True)
    except Exception as error:  # of a name, a network, a file: transformers raises whatever it runs into
        raise LogsnrError(
            f"features hf:{name} cannot be loaded ({one_line(error)}): give a name on the hub or a folder of "
            "save_pretrained"
        ) from error
    finally:
        logging.set_verbosity(before)
    network = network.eval().requires_grad_(False)
    missing = set(found["missing_keys"])
    if others := [key for key in missing if "pooler" not in key]:
        raise LogsnrError(f"features hf:{name}: its files lack {len(others)} weights, {sorted(others)[0]} among them")
    config = getattr(network.config, "vision_config", network.config)
    size, mean, std = _seen(place, config)
    told = expanded(place).name if expanded(place).exists() else name
    shift, scale = (255 * torch.tensor(numbers).view(1, 3, 1, 1) for numbers in (mean, std))

    def of(images: Tensor) -> Tensor:
        where = images.device
        model = network.to(where)
        x = (resized(shown(images, pixels, told), size) - shift.to(where)) / scale.to(where)
        return torch.cat([_embedded(model, part, bool(missing)) for part in torch.split(x, _CHUNK)]).float()

    return Space(
        name=told,
        sees=f"the whole image at {size[0]} x {size[1]} (bicubic, antialiased), mean {_told(mean)}, std {_told(std)}",
        weights=fingerprint({key: value for key, value in network.state_dict().items() if key not in missing}),
        of=of,
    )


def _embedded(model: Any, x: Tensor, unpooled: bool) -> Tensor:
    if hasattr(model, "get_image_features"):
        out = model.get_image_features(pixel_values=x)
        return out if isinstance(out, Tensor) else out.pooler_output
    out = model(pixel_values=x)
    pooled: Tensor | None = getattr(out, "pooler_output", None)
    if pooled is not None and not unpooled:  # a pooler without weights of its own is noise
        return pooled.flatten(1)
    last: Tensor = out.last_hidden_state
    if last.ndim == 4:
        return last.mean((2, 3))
    return last[:, 0] if any(key.endswith(_CLASS_TOKENS) for key in model.state_dict()) else last.mean(1)


def _seen(place: str, config: Any) -> tuple[tuple[int, int], tuple[float, ...], tuple[float, ...]]:
    """Size, mean and standard deviation of what a network sees: its image processor's, else ImageNet's."""
    base = importlib.import_module("transformers.image_processing_base")
    try:
        facts, _ = base.ImageProcessingMixin.get_image_processor_dict(place)
    except OSError:
        facts = {}
    size = facts.get("crop_size") if facts.get("do_center_crop") else None
    size = size or facts.get("size") or getattr(config, "image_size", None) or 224
    if isinstance(size, dict):
        sides = [size[key] for key in ("height", "width") if key in size] or [size.get("shortest_edge", 224)]
    else:
        sides = list(size) if isinstance(size, list | tuple) else [size]
    mean, std = (tuple(facts.get(f"image_{key}") or _IMAGENET[key]) for key in ("mean", "std"))
    return (int(sides[0]), int(sides[-1])), mean, std


def _told(numbers: tuple[float, ...]) -> str:
    return "/".join(f"{number:.4g}" for number in numbers)
