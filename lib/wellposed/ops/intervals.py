"""Numbers in intervals from unconstrained ones, and back."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

__all__ = ["from_interval", "to_interval"]


def _bounds(raw: Tensor, low: Sequence[float], high: Sequence[float]) -> tuple[Tensor, Tensor]:
    if any(not a < b for a, b in zip(low, high)) or len(low) != len(high):
        raise ValueError(f"low must be below high in each interval, got {low} and {high}")
    if raw.ndim == 0 or raw.shape[-1] != len(low):
        raise ValueError(f"the last axis must hold {len(low)} values, got {tuple(raw.shape)}")
    return raw.new_tensor(low), raw.new_tensor(high)


def to_interval(raw: Tensor, low: Sequence[float], high: Sequence[float]) -> Tensor:
    r"""Map unconstrained numbers into intervals: :math:`lo + (hi - lo)\,\mathrm{sigmoid}(raw)`.

    Args:
        raw: shape ``(..., H)``.
        low, high: ends of the H intervals.

    Returns:
        Shape ``(..., H)``.

    Raises:
        ValueError: an empty interval, or another number of them.

    Source: the code of MacKay et al., "Self-Tuning Networks", arXiv:1903.03088.

    Example:
        >>> import torch
        >>> to_interval(torch.zeros(1), [0.0], [0.9]).item()
        0.44999998807907104
    """
    a, b = _bounds(raw, low, high)
    return a + (b - a) * raw.sigmoid()


def from_interval(value: Tensor, low: Sequence[float], high: Sequence[float]) -> Tensor:
    r"""Inverse of :func:`to_interval`.

    Args:
        value: shape ``(..., H)``, strictly inside the intervals.
        low, high: ends of the H intervals.

    Returns:
        Unconstrained numbers, shape ``(..., H)``.

    Raises:
        ValueError: an empty interval, or a value on or beyond an end.

    Source: the code of MacKay et al., "Self-Tuning Networks", arXiv:1903.03088.

    Example:
        >>> import torch
        >>> from_interval(torch.tensor([0.75]), [0.0], [1.0]).exp().round(decimals=4).item()
        3.0
    """
    a, b = _bounds(value, low, high)
    if not bool(((value > a) & (value < b)).all()):
        raise ValueError("value must lie strictly inside its interval")
    return ((value - a) / (b - a)).logit()
