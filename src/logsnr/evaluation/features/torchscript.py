"""Any network saved by TorchScript, and the one of FID.

The published inception-2015-12-05.pt (of StyleGAN2-ADA's metrics; EDM's numbers are in the same network) is told by its
SHA-256: in it, and in nothing else, a Frechet distance is "FID".  It takes uint8 RGB images of any size, resizes them
itself, and is called as net(images, return_features=True), 2,048 numbers, and net(images, no_output_bias=True) for the
class probabilities of the Inception score.  A network without these words is called on the images alone.

A TorchScript file is a program: open those of people you trust.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor

from logsnr.errors import LogsnrError
from logsnr.evaluation.features.space import Space, shown
from logsnr.paths import expanded
from logsnr.pixels import Pixels
from logsnr.reading import reading

INCEPTION = "f58cb9b6ec323ed63459aa4fb441fe750cfe39fafad6da5cb504a16f19e958f4"
"""SHA-256 of inception-2015-12-05.pt, 95,607,719 bytes (as k-diffusion's evaluation.py has it)."""
INCEPTION_NAME = "Inception-v3 of 2015-12-05"
_RESIZED = "RGB in 0 ... 255 at its own size, resized by the network"


def torchscript(file: str, pixels: Pixels) -> Space:
    """The features of a TorchScript network.

    Raises:
        LogsnrError: if the file is none, or answers with anything but a tensor.
    """
    path = expanded(file)
    with reading(path, "give a file of torch.jit.save", "TorchScript"):
        data = path.read_bytes()
        digest = hashlib.sha256(data).hexdigest()
        del data
        load: Any = torch.jit.load
        network: Any = load(str(path), map_location="cpu").eval()
        words = {argument.name for argument in network.forward.schema.arguments}
    name = INCEPTION_NAME if digest == INCEPTION else path.name

    def called(images: Tensor, **options: bool) -> Tensor:
        seen = shown(images, pixels, name)
        try:
            out = network.to(seen.device)(seen, **options)
        except RuntimeError as error:  # of a program that is not ours: its last line says what it was about
            raise LogsnrError(
                f"{name} of uint8 images {tuple(seen.shape)}: {str(error).strip().splitlines()[-1]}"
            ) from error
        if not isinstance(out, Tensor):
            raise LogsnrError(f"{name} answers with a {type(out).__name__}: it must be a tensor [N, F]")
        return out.float()

    features = {"return_features": True} if "return_features" in words else {}
    return Space(
        name=name,
        sees=_RESIZED,
        weights=digest,
        of=lambda images: called(images, **features),
        probabilities=(lambda images: called(images, no_output_bias=True)) if "no_output_bias" in words else None,
        inception=digest == INCEPTION,
    )
