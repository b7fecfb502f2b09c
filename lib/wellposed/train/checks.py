"""Checks of what every training loop is given."""

from __future__ import annotations

__all__ = ["check_epochs"]


def check_epochs(num_epochs: int, batch_size: int) -> None:
    """Refuse a training on minibatches that would do nothing.

    Args:
        num_epochs: passes over the data, at least 1.
        batch_size: examples a batch, at least 2: the losses concerned compare examples.

    Raises:
        ValueError: one of them is too small.

    Source: ours.

    Example:
        >>> check_epochs(1, 2)
    """
    if num_epochs < 1:
        raise ValueError(f"num_epochs must be at least 1, got {num_epochs}")
    if batch_size < 2:
        raise ValueError(f"batch_size must be at least 2, got {batch_size}")
