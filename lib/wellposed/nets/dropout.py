"""Dropout with one rate for each example."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["dropout"]


def dropout(
    input: Tensor, probability: Tensor, training: bool, generator: torch.Generator | None = None
) -> Tensor:
    """Dropout with one rate for each example; what is kept is divided by its probability.

    Args:
        input: shape ``(..., B, features...)``.
        probability: rates in [0, 1], one for each leading entry; they get no gradient.
        training: whether to drop; if not, the input is returned.
        generator: source of the masks.

    Returns:
        Shape of ``input``.

    Raises:
        ValueError: ``probability`` does not match the leading axes of ``input``.

    Source: the code of MacKay et al., "Self-Tuning Networks", arXiv:1903.03088.

    Example:
        >>> dropout(torch.ones(2, 3), torch.tensor([0.0, 0.0]), True).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if probability.shape != input.shape[: probability.ndim]:
        expected = tuple(input.shape[: probability.ndim])
        raise ValueError(f"probability must have shape {expected}, got {tuple(probability.shape)}")
    if not training:
        return input
    keep = 1 - probability.detach().reshape(
        *probability.shape, *[1] * (input.ndim - probability.ndim)
    )
    noise = torch.rand(input.shape, generator=generator, dtype=input.dtype, device=input.device)
    gain = torch.where(keep > 0, keep.reciprocal(), 0.0)
    return input * noise.lt_(keep).mul_(gain)
