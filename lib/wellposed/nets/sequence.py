"""Recurrent networks of one architecture, side by side: the first axis counts networks."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

__all__ = ["StackedGRU", "StackedLinear"]


class StackedLinear(nn.Module):
    r"""Linear layers side by side, :math:`y_s = x_s W_s + b_s`.

    Args:
        copies: number of networks, at least 1.
        inputs, outputs: features in and out, at least 1.

    Raises:
        ValueError: a size below 1, or inputs of another shape.

    Example:
        >>> layer = StackedLinear(2, 3, 1)
        >>> layer(torch.zeros(2, 5, 4, 3)).shape
        torch.Size([2, 5, 4, 1])
    """

    def __init__(self, copies: int, inputs: int, outputs: int) -> None:
        super().__init__()
        if min(copies, inputs, outputs) < 1:
            raise ValueError(f"sizes must be at least 1, got {(copies, inputs, outputs)}")
        bound = 1.0 / math.sqrt(inputs)
        self.weight = nn.Parameter(torch.empty(copies, inputs, outputs).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(copies, 1, outputs).uniform_(-bound, bound))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(copies, ..., inputs)`` to ``(copies, ..., outputs)``."""
        copies, inputs, outputs = self.weight.shape
        if x.shape[0] != copies or x.shape[-1] != inputs:
            raise ValueError(f"x must be ({copies}, ..., {inputs}), got {tuple(x.shape)}")
        flat = torch.baddbmm(self.bias, x.reshape(copies, -1, inputs), self.weight)
        return flat.view(*x.shape[:-1], outputs)


class _GRULoop(torch.autograd.Function):
    """The recurrence alone, with its gradient by hand: autograd would record each small step."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, gates: Tensor, weight: Tensor, bias: Tensor
    ) -> Tensor:
        steps, copies, rows, width = gates.shape
        size = width // 3
        states = gates.new_zeros(steps + 1, copies, rows, size)
        kept: list[Tensor] = []
        for t in range(steps):
            hidden = torch.baddbmm(bias, states[t], weight)
            ru = hidden[..., : 2 * size].add(gates[t, ..., : 2 * size]).sigmoid_()
            inner = hidden[..., 2 * size :]
            new = torch.addcmul(gates[t, ..., 2 * size :], ru[..., :size], inner).tanh_()
            torch.lerp(new, states[t], ru[..., size:], out=states[t + 1])
            kept += (ru, inner, new)
        ctx.save_for_backward(states, weight, *kept)
        return states[1:]

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(  # type: ignore[override]
        ctx: Any, grad: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        states, weight, *kept = ctx.saved_tensors
        steps, copies, rows, size = grad.shape
        d_gates = grad.new_empty(steps, copies, rows, 3 * size)
        d_hidden = grad.new_empty(copies, steps, rows, 3 * size)
        carry = torch.zeros_like(grad[0])
        turned = weight.mT
        for t in range(steps - 1, -1, -1):
            ru, inner, new = kept[3 * t : 3 * t + 3]
            r, u = ru[..., :size], ru[..., size:]
            total = carry.add_(grad[t])
            slope = ru * (1 - ru)
            own = d_gates[t]
            d_new = torch.mul(total * (1 - u), 1 - new * new)
            torch.mul(d_new * inner, slope[..., :size], out=own[..., :size])
            torch.mul(total * (states[t] - new), slope[..., size:], out=own[..., size : 2 * size])
            own[..., 2 * size :] = d_new
            back = d_hidden[:, t]
            back[..., : 2 * size] = own[..., : 2 * size]
            torch.mul(d_new, r, out=back[..., 2 * size :])
            carry = torch.baddbmm(total * u, back, turned)
        before = states[:-1].transpose(0, 1).reshape(copies, -1, size)
        flat = d_hidden.view(copies, -1, 3 * size)
        return d_gates, before.mT @ flat, flat.sum(1, keepdim=True)


class StackedGRU(nn.Module):
    r"""Gated recurrent units side by side, with the gates of :class:`torch.nn.GRU`.

    Args:
        copies: number of networks, at least 1.
        inputs: features at each step.
        hidden: units.

    Raises:
        ValueError: a size below 1, or inputs of another shape.

    Example:
        >>> gru = StackedGRU(2, 3, 4)
        >>> gru(torch.zeros(2, 5, 7, 3)).shape  # two networks, five series, seven steps
        torch.Size([2, 5, 7, 4])
    """

    def __init__(self, copies: int, inputs: int, hidden: int) -> None:
        super().__init__()
        self.inputs = StackedLinear(copies, inputs, 3 * hidden)
        self.recurrent = StackedLinear(copies, hidden, 3 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Map series ``(copies, n, steps, inputs)`` to states ``(copies, n, steps, hidden)``."""
        gates = self.inputs(x.movedim(2, 1)).transpose(0, 1)
        states: Tensor = _GRULoop.apply(gates, self.recurrent.weight, self.recurrent.bias)
        return states.permute(1, 2, 0, 3)
