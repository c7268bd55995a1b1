"""A small classifier, trained in seconds, where no published feature network fits (8x8 digits).

Distances in its last hidden layer are "FD (features: digit classifier)".  Its confidence is calibrated by temperature
scaling on held-out images (1706.04599), so that "the share of samples with confidence >= .9" can be read beside the
same share of real images.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logsnr.pixels import Pixels


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
