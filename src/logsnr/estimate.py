"""Estimates: what a denoiser says of a noisy state z = alpha x + s eps, in any of three forms, made when asked for."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

Lazy = Tensor | Callable[[], Tensor]
"""A tensor, or a function that forms it."""


class Estimate:
    """What a denoiser says of a noisy state: `x0`, `eps` and `velocity`, each `[B, *shape]`, formed when asked for.

    Args:
        x0: the estimate of E[x | z], or a function that forms it.
        eps: the estimate of E[eps | z], or a function that forms it.
        velocity: eps - x0, where it has a shorter form than the difference.
        state: None where `z = alpha x0 + s eps` holds, as for every plain denoiser; else the state
            `alpha x0 + s eps` that a sampler continues from in place of z (CFG++ renoises with another eps).
    """

    __slots__ = ("_eps", "_state", "_velocity", "_x0")

    def __init__(self, x0: Lazy, eps: Lazy, velocity: Lazy | None = None, state: Lazy | None = None) -> None:
        self._x0 = x0
        self._eps = eps
        self._velocity = velocity
        self._state = state

    @property
    def x0(self) -> Tensor:
        """The denoised sample, an estimate of E[x | z]."""
        if not isinstance(self._x0, Tensor):
            self._x0 = self._x0()
        return self._x0

    @property
    def eps(self) -> Tensor:
        """The noise, an estimate of E[eps | z]."""
        if not isinstance(self._eps, Tensor):
            self._eps = self._eps()
        return self._eps

    @property
    def velocity(self) -> Tensor:
        """The velocity eps - x0 of the flow path."""
        if self._velocity is None:
            self._velocity = self.eps - self.x0
        elif not isinstance(self._velocity, Tensor):
            self._velocity = self._velocity()
        return self._velocity

    @property
    def state(self) -> Tensor | None:
        """None, or the state to continue from in place of z."""
        if self._state is not None and not isinstance(self._state, Tensor):
            self._state = self._state()
        return self._state
