"""A network of one's own, trained by a recipe that names it (own_network.yaml); run in this folder:

logsnr train own_network.yaml --out runs/own --allow-code
logsnr calibrate runs/own --nfe 5 --allow-code        # and sample, evaluate, compare, passport; in Python
denoiser = logsnr.load("runs/own", network=Mixer)     # imports nothing that the run names
"""

import torch
from torch import nn


class Mixer(nn.Module):
    """An MLP over all pixels, told the noise level and the class.

    Args:
        shape: of one sample; logsnr gives it, and the next.
        classes: 0 for none; index `classes` is the null condition.
        width: whatever else stands in the recipe.
    """

    def __init__(self, shape, *, classes, width=256):
        super().__init__()
        dim = shape[0] * shape[1] * shape[2]
        self.level = nn.Sequential(nn.Linear(1, width), nn.SiLU(), nn.Linear(width, width))
        self.classes = nn.Embedding(classes + 1, width)
        self.enter = nn.Linear(dim, width)
        self.middle = nn.Sequential(nn.SiLU(), nn.Linear(width, width), nn.SiLU())
        self.out = nn.Linear(width, dim)
        nn.init.zeros_(self.out.weight)

    def forward(self, x, label, class_labels=None):
        told = self.level(label[:, None].to(x.dtype))
        if class_labels is not None:
            told = told + self.classes(class_labels)
        return torch.unflatten(self.out(self.middle(self.enter(x.flatten(1)) + told)), 1, x.shape[1:])
