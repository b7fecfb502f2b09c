"""Numbers that leave the range of their dtype: rescale them, or say so."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["unit_of", "warn_of_nan"]


def warn_of_nan(name: str, *values: Tensor) -> None:
    """Warn that a run diverged, for its end: it reads from the device.

    Args:
        name: of the public function that ran.
        values: what it returns; integers count as good.

    Example:
        >>> warn_of_nan("fit", torch.ones(2))  # says nothing
    """
    if bool(torch.stack([v.detach().isnan().any().cpu() for v in values]).any()):
        warnings.warn(
            f"{name} diverged: its result holds NaN. Smaller inputs or a smaller step may help.",
            RuntimeWarning,
            stacklevel=3,
        )


def unit_of(x: Tensor, *, power: int, dim: tuple[int, ...] = ()) -> Tensor:
    """A number to divide by before powers of `x` are taken, so that they stay in range.

    It is 1 for ordinary magnitudes: dividing by it changes no bit of an ordinary result.

    Args:
        x: not empty.
        power: the highest one that will be taken.
        dim: axes that share a unit; all if not given. They are kept, with size 1.

    Returns:
        The largest size in `x`, or 1 where its powers are safe, or where it is 0.

    Raises:
        ValueError: `x` is empty.

    Example:
        >>> unit_of(torch.tensor([3.0, -4.0]), power=4), unit_of(torch.tensor([1e12]), power=4)
        (tensor([1.]), tensor([1.0000e+12]))
    """
    if x.numel() == 0:
        raise ValueError(f"x must not be empty, got shape {tuple(x.shape)}")
    largest = x.detach().abs().amax(dim or tuple(range(x.ndim)), keepdim=True)
    bound = torch.finfo(x.dtype).max ** (1 / (power + 2))  # sums of powers need room, too
    safe = ((largest < bound) & (largest > 1 / bound)) | (largest == 0)
    return torch.where(safe, 1.0, largest)
