"""Gradient norms: how hard each sample pulls at the parameters.

The last layer o = W * h + b is where a norm per sample costs next to nothing: with delta = d loss/d o,

    linear        d loss/dW = delta h^T                 norm^2 = ||delta||^2 (||h||^2 + 1)
    convolution   d loss/dW[:, :, k] = sum_p delta_p h_{p+k}^T,  d loss/db = sum_p delta_p       (p runs over pixels)

delta needs a backward pass from the loss to o alone, h lies at hand: the norm over (W, b) is exact, for any head behind
o.  It is a proxy for the norm over all parameters, whose other layers see delta through W.  That norm, per sample, is a
backward pass each (`gradient_norms`): a few samples now and then tell how far the proxy is off at each level.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from logsnr.denoiser import Denoiser

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def output_layer(network: nn.Module) -> nn.Module | None:
    """The linear layer or convolution that is registered last; None without any."""
    found = [module for module in network.modules() if isinstance(module, _LAYERS)]
    return found[-1] if found else None


class OutputLayer:
    """Per-sample gradient norms of a network's last layer, watched while the network runs.

        layer = OutputLayer(network)
        with layer:
            output = objective(denoiser, x, generator=generator)
        norms = layer.squared_norms(output.loss)        # before backward()

    The layer runs once while watched; the last run counts.

    Args:
        network: the network, bare or inside a wrapper that calls it.
        layer: its last linear layer or convolution (stride 1, one group); by default the one registered last.

    Raises:
        ValueError: if there is no such layer, or it is of another kind.
    """

    def __init__(self, network: nn.Module, layer: nn.Module | None = None) -> None:
        if layer is None:
            layer = output_layer(network)
            if layer is None:
                raise ValueError("the network has no linear layer or convolution: name its output layer with layer=")
        if not isinstance(layer, _LAYERS) or not _plain(layer):
            raise ValueError(f"output layer {layer}: give a linear layer, or a convolution of stride 1 and one group")
        self.layer = layer
        self._seen: tuple[Tensor, Tensor] | None = None
        self._handle: Any = None

    def __enter__(self) -> OutputLayer:
        self.watch()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def watch(self) -> None:
        """Watch from now on, and forget what was seen: `with layer:` where a block cannot be drawn around the run."""
        self.release()

        def keep(_: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            self._seen = inputs[0].detach(), output

        self._handle = self.layer.register_forward_hook(keep)

    def release(self) -> None:
        """Watch no longer, and let go of what was seen."""
        self._stop()
        self._seen = None

    def _stop(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def squared_norms(self, loss: Tensor) -> Tensor:
        """||d loss_i / d(W, b)||^2 of each sample, `[B]`, float32 or better; leaves the graph as it is.

        Args:
            loss: `[B]`, one loss per sample, each of its own sample only; not yet backpropagated.

        Raises:
            RuntimeError: if the layer has not run since this was entered, or `loss` does not depend on it.
        """
        if self._seen is None:
            raise RuntimeError("the output layer has not run: form the loss inside `with layer:`")
        features, output = self._seen
        self._seen = None
        (delta,) = torch.autograd.grad(loss.sum(), output, retain_graph=True)
        wide = torch.promote_types(delta.dtype, torch.float32)
        return _squared_norms(self.layer, features.to(wide), delta.to(wide))


def gradient_norms(
    denoiser: Denoiser, x: Tensor, eps: Tensor, sigma: Tensor, cond: dict[str, Tensor] | None = None
) -> Tensor:
    """||d(m_i/2)/dtheta||^2 of each sample over all trainable parameters, `[B]`, m = ||eps_hat - eps||^2.

    One backward pass per sample, run together by `torch.func.vmap`.  The network must be a pure function (no batch
    norm in training, no distributed wrapper).

    Args:
        denoiser: the model.
        x: data `[B, *shape]`.
        eps: noise `[B, *shape]`.
        sigma: noise levels `[B]`.
        cond: conditions, each with one entry per sample.
    """
    half = _HalfError(denoiser)
    parameters = {name: p.detach() for name, p in half.named_parameters() if p.requires_grad}

    def loss(theta: dict[str, Tensor], *one: Any) -> Tensor:
        x_, eps_, sigma_, cond_ = one
        batch = {key: value[None] for key, value in cond_.items()}
        out: Tensor = functional_call(half, theta, (x_[None], eps_[None], sigma_[None], batch))
        return out[0]

    per_sample = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0), randomness="different")
    # Fused attention kernels have no rule for vmap; the plain one is made of operations that have.
    with sdpa_kernel(SDPBackend.MATH):
        grads = per_sample(parameters, x, eps, sigma, cond or {})
    total: Tensor = torch.stack([g.flatten(1).square().sum(1) for g in grads.values()]).sum(0)
    return total


class _HalfError(nn.Module):
    """m/2 as a module's forward, for `functional_call`."""

    def __init__(self, denoiser: Denoiser) -> None:
        super().__init__()
        self.denoiser = denoiser

    def forward(self, x: Tensor, eps: Tensor, sigma: Tensor, cond: dict[str, Tensor]) -> Tensor:
        return 0.5 * self.denoiser.eps_error(x, eps, sigma, **cond)


def _plain(layer: nn.Module) -> bool:
    if isinstance(layer, nn.Linear):
        return True
    conv: Any = layer
    return set(conv.stride) == {1} and conv.groups == 1 and conv.padding_mode == "zeros"


def _squared_norms(layer: nn.Module, features: Tensor, delta: Tensor) -> Tensor:
    """||d/dW||^2 + ||d/db||^2 from the layer's input and the gradient at its output."""
    if isinstance(layer, nn.Linear):
        # Tokens between batch and channels, if any, share the weights.
        h, d = (part.reshape(len(part), -1, part.shape[-1]) for part in (features, delta))
        weight = torch.bmm(d.mT, h).square().sum((1, 2))
        return weight + d.sum(1).square().sum(1) if layer.bias is not None else weight
    conv: Any = layer
    if isinstance(conv.padding, str):
        total = [dil * (k - 1) for dil, k in zip(conv.dilation, conv.kernel_size, strict=True)]
        pads = [(t // 2, t - t // 2) if conv.padding == "same" else (0, 0) for t in total]
    else:
        pads = [(p, p) for p in conv.padding]
    h = functional.pad(features, [side for pair in reversed(pads) for side in pair])
    size, d = delta.shape[2:], delta.flatten(2)
    norms = d.sum(2).square().sum(1) if conv.bias is not None else d.new_zeros(len(d))
    # One tap of the kernel at a time: an unfolded copy of h would be as many times larger as the kernel has taps.
    for tap in product(*(range(k) for k in conv.kernel_size)):
        window = h
        for axis, (k, dilation, n) in enumerate(zip(tap, conv.dilation, size, strict=True)):
            window = window.narrow(2 + axis, k * dilation, n)
        norms = norms + torch.bmm(d, window.flatten(2).mT).square().sum((1, 2))
    return norms
