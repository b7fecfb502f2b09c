"""How peaked and how long-tailed the weights of a network are."""

from __future__ import annotations

from torch import Tensor

from wellposed.ops.numerics import unit_of

__all__ = ["weight_statistics"]

NEAR_ZERO = 0.1  # a weight is near zero below this many standard deviations


def weight_statistics(w: Tensor) -> dict[str, Tensor]:
    r"""How peaked and how long-tailed a weight distribution is.

    Args:
        w: effective weights (not the free parameters), any shape.

    Returns:
        Scalars: ``kurtosis``, the fourth central moment over the squared second (1.8 for a uniform,
        3 for a normal distribution); ``near_zero``, the share of weights with size below a tenth of
        the standard deviation; ``max_over_std``, the largest size in standard deviations.

    Raises:
        ValueError: fewer than two weights, or no two that differ.

    Source: ours; it stands in for the histograms of Cakaj et al., "Weight Compander: A Simple
    Weight Reparameterization for Regularization", arXiv:2306.16993.

    Example:
        >>> import torch
        >>> stats = weight_statistics(torch.tensor([-1.0, 0.0, 0.0, 1.0]))
        >>> [round(v.item(), 4) for v in stats.values()]  # variance 1/2, fourth moment 1/2
        [2.0, 0.5, 1.4142]
    """
    if w.numel() < 2:
        raise ValueError(f"w must hold at least two weights, got shape {tuple(w.shape)}")
    w = w / unit_of(w, power=4)
    squares = (w - w.mean()).square()
    variance = squares.mean()
    if not bool(variance > 0):
        raise ValueError("w must hold at least two different weights")
    std = variance.sqrt()
    return {
        "kurtosis": squares.square().mean() / variance.square(),
        "near_zero": (w.abs() < NEAR_ZERO * std).to(w.dtype).mean(),
        "max_over_std": w.abs().max() / std,
    }
