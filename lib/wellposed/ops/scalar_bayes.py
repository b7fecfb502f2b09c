r"""Denoising a scalar with a known prior: the Bayes estimators, and what a proximal operator sees.

Source: Bayes' rule; proximal operators of nonconvex functions: Gribonval and Nikolova, "A
characterization of proximity operators", Journal of Mathematical Imaging and Vision 2020.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Estimators", "bayes_estimators", "visible_prior"]


@dataclass(frozen=True)
class Estimators:
    """Mean, median and mode of the posterior of a scalar, each of the shape of the data."""

    mean: Tensor
    median: Tensor
    mode: Tensor


def bayes_estimators(y: Tensor, x: Tensor, log_prior: Tensor, *, sigma: float = 1.0) -> Estimators:
    r"""Mean, median and mode of :math:`p(x|y)\propto p(x)\,e^{-(x-y)^2/2\sigma^2}` on a grid.

    Args:
        y: data, shape ``(n,)``.
        x: equidistant grid, increasing, shape ``(m,)``; wide enough to hold the posterior.
        log_prior: :math:`\log p` on the grid, up to a constant, shape ``(m,)``.
        sigma: noise :math:`\sigma>0`.

    Returns:
        :class:`Estimators`, accurate to about the spacing of the grid.

    Raises:
        ValueError: shapes that do not fit, a grid that does not increase, ``sigma`` not positive.

    Example:
        >>> x = torch.linspace(-6, 6, 1201, dtype=torch.float64)
        >>> e = bayes_estimators(torch.tensor([3.0]), x, -x.abs())
        >>> round(e.mode.item(), 6)  # soft thresholding by 1
        2.0
    """
    _check_grid(x, log_prior, "log_prior")
    if y.ndim != 1 or not 0.0 < sigma < math.inf:
        raise ValueError(
            f"y must have shape (n,), sigma be positive, got {tuple(y.shape)}, {sigma}"
        )
    log = log_prior - (y.to(x).unsqueeze(1) - x).square() / (2 * sigma**2)
    weights = log.softmax(1)
    middle = (weights.cumsum(1) < 0.5).sum(1).clamp(max=len(x) - 1)
    return Estimators(weights @ x, x[middle], x[log.argmax(1)])


def visible_prior(x: Tensor, penalty: Tensor) -> Tensor:
    r"""The part of a penalty that its proximal operator can see.

    .. math:: \bigl(\tfrac12x^2+R\bigr)^{**}-\tfrac12x^2,

    with the convex envelope :math:`{}^{**}`. It is the least function with the proximal operator of
    :math:`R`, and equals :math:`R` where :math:`\frac12x^2+R` is its own convex envelope.

    Args:
        x: grid, increasing, shape ``(m,)`` with :math:`m\ge2`.
        penalty: :math:`R` on the grid, shape ``(m,)``.

    Returns:
        Shape ``(m,)``, nowhere above ``penalty`` beyond rounding.

    Raises:
        ValueError: shapes that do not fit, a grid that does not increase.

    Example:
        >>> x = torch.tensor([-1.0, 0.0, 1.0])
        >>> visible_prior(x, torch.tensor([0.0, 9.0, 0.0])).tolist()  # a barrier of one half
        [0.0, 0.5, 0.0]
    """
    _check_grid(x, penalty, "penalty")
    height = penalty + x.square() / 2
    points = list(zip(x.tolist(), height.tolist(), range(len(x)), strict=True))
    hull: list[tuple[float, float, int]] = []
    for a, b, i in points:  # lower hull, from left to right
        while len(hull) > 1:
            (a0, b0, _), (a1, b1, _) = hull[-2:]
            if (b1 - b0) * (a - a0) < (b - b0) * (a1 - a0):
                break
            hull.pop()
        hull.append((a, b, i))
    knots = torch.tensor([i for *_, i in hull], device=x.device)
    right = torch.searchsorted(x[knots], x).clamp(min=1)
    left, right = knots[right - 1], knots[right]
    share = (x - x[left]) / (x[right] - x[left])
    return torch.lerp(height[left], height[right], share) - x.square() / 2


def _check_grid(x: Tensor, values: Tensor, name: str) -> None:
    if x.ndim != 1 or len(x) < 2 or not (x.diff() > 0).all():
        raise ValueError(f"x must be an increasing grid of at least 2, got {tuple(x.shape)}")
    if values.shape != x.shape:
        raise ValueError(f"{name} must have shape {tuple(x.shape)}, got {tuple(values.shape)}")
