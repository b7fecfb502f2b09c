"""Attacks: small changes of an input that make a classifier fail."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["pgd_l2"]


def pgd_l2(
    model: Callable[[Tensor], Tensor],
    x: Tensor,
    target: Tensor,
    *,
    radius: float,
    steps: int = 20,
    step_size: float = 0.2,
) -> Tensor:
    r"""Projected gradient ascent of the cross-entropy in an L2 ball around each input.

    :math:`\delta\leftarrow\Pi_{\|\delta\|\le\epsilon}\bigl(\delta+\eta\epsilon\,
    \nabla/\|\nabla\|\bigr)`, from :math:`\delta=0`.

    Each input has its own ball, so networks side by side are attacked in one call. The range of
    pixels is not enforced: that gives the attacker a little more than an image.

    Args:
        model: maps inputs ``(..., n, c, h, w)`` to logits ``(..., n, classes)``.
        x: inputs ``(..., n, c, h, w)``.
        target: int64 labels of shape ``(..., n)``.
        radius: :math:`\epsilon \ge 0`.
        steps: gradient steps, at least 0.
        step_size: :math:`\eta > 0`, as a part of the radius.

    Returns:
        The attacked inputs, at most ``radius`` away from ``x``.

    Raises:
        ValueError: a number out of range, or labels that do not match the inputs.

    Source: Madry et al. 2018, "Towards Deep Learning Models Resistant to Adversarial Attacks".

    Example:
        >>> x = torch.zeros(1, 1, 1, 2)
        >>> linear = lambda x: x.flatten(-3) @ torch.tensor([[1.0, -1.0], [0.0, 0.0]])
        >>> pgd_l2(linear, x, torch.tensor([0]), radius=0.5).flatten().tolist()
        [-0.5, 0.0]
    """
    if not 0 <= radius < float("inf"):
        raise ValueError(f"radius must be finite and at least 0, got {radius}")
    if steps < 0:
        raise ValueError(f"steps must be at least 0, got {steps}")
    if not 0 < step_size < float("inf"):
        raise ValueError(f"step_size must be finite and positive, got {step_size}")
    if x.ndim < 4 or target.shape != x.shape[:-3]:
        raise ValueError(
            f"target must have one label an input {tuple(x.shape[:-3])}, got {tuple(target.shape)}"
        )
    delta, axes = torch.zeros_like(x), (-3, -2, -1)
    tiny = torch.finfo(x.dtype).tiny
    for _ in range(steps):
        with torch.enable_grad():
            moved = (x + delta).detach().requires_grad_()
            loss = F.cross_entropy(model(moved).flatten(0, -2), target.flatten(), reduction="sum")
            (slope,) = torch.autograd.grad(loss, moved)
        # Dividing by the largest entry first keeps tiny gradients from vanishing when squared.
        slope = slope / slope.abs().amax(axes, keepdim=True).clamp_min(tiny)
        slope = slope / slope.square().sum(axes, keepdim=True).sqrt().clamp_min(tiny)
        delta = delta + step_size * radius * slope
        length = delta.square().sum(axes, keepdim=True).sqrt()
        delta = delta * (radius / length.clamp_min(tiny)).clamp_max(1.0)
    return (x + delta).detach()
