"""Layers whose weights are a function of the hyperparameters: the best response."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BestResponseConv2d", "BestResponseLinear"]

GATE_STD = 0.01  # initial standard deviation of V and C in the authors' code


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Layers of R runs side by side: ``weight`` (R, out, in) or (R, out, in, k, k)."""
    if weight.ndim == 3:
        return x @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    runs = len(x)
    out = F.conv2d(  # one group of channels a run
        x.transpose(0, 1).flatten(1, 2), weight.flatten(0, 1),
        None if bias is None else bias.flatten(), stride, padding, groups=runs,
    )  # fmt: skip
    apart: Tensor = out.unflatten(1, (runs, -1)).transpose(0, 1)
    return apart


Weights = Sequence[Tensor | None]


def _layer(x: Tensor, hyper: Tensor, w: Weights, stride: int = 2, padding: int = 1) -> Tensor:
    """A layer of R runs: (weight, bias), or these with (response, response, gate, gate)."""
    weight, bias = w[0], w[1]
    assert weight is not None
    out = _affine(x, weight, bias, stride, padding)
    if len(w) == 2:
        return out
    response, bias_response, gate, bias_gate = w[2:]
    assert response is not None
    assert gate is not None
    axes = (1,) * (weight.ndim - 3)
    gates = (hyper @ gate.mT).unflatten(-1, (-1, *axes))
    out = torch.addcmul(out, gates, _affine(x, response, None, stride, padding))
    if bias_response is not None and bias_gate is not None:
        shift = (hyper @ bias_gate.mT) * bias_response.unsqueeze(1)
        out = out + shift.unflatten(-1, (-1, *axes))
    return out


def _squared_norm(hyper: Tensor, w: Weights) -> Tensor:
    r""":math:`\|\hat W(\lambda)\|^2` for each example without forming it, shape ``(R, B)``."""
    assert w[0] is not None
    weight = w[0].flatten(2)
    norm = weight.square().sum((1, 2)).unsqueeze(1)
    if len(w) == 2:
        return norm
    assert w[2] is not None
    assert w[4] is not None
    response, gates = w[2].flatten(2), hyper @ w[4].mT
    cross, square = (weight * response).sum(2), response.square().sum(2)
    return norm + (gates * (2 * cross.unsqueeze(1) + gates * square.unsqueeze(1))).sum(2)


class _BestResponse(nn.Module):
    """Parameters and initial values that both layers share."""

    def __init__(self, shape: tuple[int, ...], num_hyper: int, bias: bool) -> None:
        super().__init__()
        if min(*shape, num_hyper) < 1:
            raise ValueError(f"sizes and num_hyper must be at least 1, got {shape}, {num_hyper}")
        bound = math.prod(shape[1:]) ** -0.5
        out = shape[0]

        def uniform(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size).uniform_(-bound, bound))

        def gate() -> nn.Parameter:
            return nn.Parameter(GATE_STD * torch.randn(out, num_hyper))

        self.weight = uniform(*shape)
        self.bias = uniform(out) if bias else None
        self.weight_response = uniform(*shape)
        self.bias_response = uniform(out) if bias else None
        self.weight_gate = gate()
        self.bias_gate = gate() if bias else None

    def _one_run(self, input: Tensor, hyper: Tensor) -> tuple[Tensor, Tensor, Weights]:
        """Input, hyperparameters and parameters with a leading axis of one run."""
        width = self.weight_gate.shape[1]
        if hyper.ndim == 1:
            hyper = hyper.expand(len(input), -1)
        if hyper.ndim != 2 or hyper.shape[1] != width or len(hyper) != len(input):
            expected = f"({width},) or ({len(input)}, {width})"
            raise ValueError(f"hyper must have shape {expected}, got {tuple(hyper.shape)}")
        every = (self.weight, self.bias, self.weight_response, self.bias_response)
        weights = [p if p is None else p[None] for p in (*every, self.weight_gate, self.bias_gate)]
        return input[None], hyper[None], weights

    def squared_norm(self, hyper: Tensor) -> Tensor:
        r""":math:`\|\hat W(\lambda)\|^2` for hyperparameters ``(B, H)``, shape ``(B,)``."""
        _, hyper, weights = self._one_run(hyper, hyper)
        return _squared_norm(hyper, weights)[0]


class BestResponseLinear(_BestResponse):
    r"""Linear layer whose weights are a function of the hyperparameters.

    .. math:: y = W_e x + b_e + (V\lambda) \odot (W_h x) + (C\lambda) \odot b_h

    so each example of a batch can have its own :math:`\lambda`. Parameters: ``weight``,
    ``weight_response`` (out, in), ``bias``, ``bias_response`` (out,), ``weight_gate``,
    ``bias_gate`` (out, H).

    Args:
        in_features, out_features, num_hyper: sizes, at least 1.
        bias: whether there is a bias.

    Raises:
        ValueError: a size below 1; in ``forward(input (B, in), hyper (B, H) or (H,))``,
            hyperparameters of another shape.

    Source: the paper's best-response layer; initial values from the authors' code.

    Example:
        >>> layer = BestResponseLinear(3, 2, num_hyper=1)
        >>> x = torch.ones(1, 3)
        >>> at = [layer(x, torch.tensor([v])) for v in (0.0, 1.0, 2.0)]  # affine in hyper
        >>> torch.allclose(at[2] - at[1], at[1] - at[0], atol=1e-6)
        True
    """

    def __init__(self, in_features: int, out_features: int, num_hyper: int, bias: bool = True):
        super().__init__((out_features, in_features), num_hyper, bias)

    def forward(self, input: Tensor, hyper: Tensor) -> Tensor:
        """Map input ``(B, in)`` and hyperparameters ``(B, H)`` or ``(H,)`` to ``(B, out)``."""
        return _layer(*self._one_run(input, hyper))[0]


class BestResponseConv2d(_BestResponse):
    r"""Convolution whose output channels are gated by the hyperparameters.

    .. math:: y = W_e * x + b_e + (V\lambda) \odot (W_h * x) + (C\lambda) \odot b_h

    Args:
        in_channels, out_channels, kernel_size, num_hyper: sizes, at least 1.
        stride, padding: as in ``torch.nn.Conv2d``.
        bias: whether there is a bias.

    Raises:
        ValueError: a size below 1; in ``forward``, hyperparameters of another shape.

    Source: the paper's convolutional best response; initial values from the authors' code.

    Example:
        >>> layer = BestResponseConv2d(1, 4, 3, num_hyper=2, padding=1)
        >>> layer(torch.zeros(5, 1, 8, 8), torch.zeros(2)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, num_hyper: int,
        stride: int = 1, padding: int = 0, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), num_hyper, bias)
        self.stride, self.padding = stride, padding

    def forward(self, input: Tensor, hyper: Tensor) -> Tensor:
        """Map input ``(B, in, h, w)`` and ``hyper`` ``(B, H)`` or ``(H,)`` to ``(B, out, ...)``."""
        return _layer(*self._one_run(input, hyper), self.stride, self.padding)[0]
