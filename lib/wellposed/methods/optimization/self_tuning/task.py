"""Splits of a data set, and what is tuned on it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.train import generator as make_generator

__all__ = ["HIGH", "LOW", "NAMES", "TuningTask", "make_task"]

NAMES = ("input dropout", "hidden dropout", "log10 weight decay", "shift")
"""What the networks tune; the shift is a share of the image's side."""
LOW = (0.0, 0.0, -5.0, 0.0)
HIGH = (0.9, 0.9, -1.0, 0.3)


@dataclass(frozen=True)
class TuningTask:
    """Images and one split for each seed; the index tensors have shape ``(seeds, n)``."""

    x: Tensor
    y: Tensor
    train: Tensor
    valid: Tensor
    test: Tensor


def make_task(
    x: Tensor, y: Tensor, *, num_train: int, num_valid: int, num_test: int, seeds: Sequence[int]
) -> TuningTask:
    """Draw disjoint training, validation and test examples for each seed.

    Args:
        x: images, shape ``(N, h, w)``.
        y: int64 labels, shape ``(N,)``.
        num_train, num_valid, num_test: sizes, at least 1 each and at most N together.
        seeds: one split for each.

    Returns:
        A :class:`TuningTask`.

    Raises:
        ValueError: sizes that do not fit, or images of another shape.

    Source: our splits; validation data steer the hyperparameters, so test data are a third part.

    Example:
        >>> x, y = torch.zeros(6, 2, 2), torch.zeros(6).long()
        >>> make_task(x, y, num_train=2, num_valid=2, num_test=1, seeds=[0, 1]).train.shape
        torch.Size([2, 2])
    """
    sizes = (num_train, num_valid, num_test)
    if min(sizes) < 1 or sum(sizes) > len(x):
        raise ValueError(f"num_train, num_valid, num_test must fit {len(x)} rows, got {sizes}")
    if x.ndim != 3 or y.shape != x.shape[:1]:
        raise ValueError(f"x must have shape (N, h, w), y (N,), got {tuple(x.shape)}")
    order = torch.stack([torch.randperm(len(x), generator=make_generator(s)) for s in seeds])
    parts = order[:, : sum(sizes)].to(x.device).split(sizes, dim=1)
    return TuningTask(x, y, *parts)


def _pick_shifted(
    padded: Tensor, rows: Tensor, reach: Tensor, margin: int, generator: torch.Generator
) -> Tensor:
    """Images moved by whole pixels: uniform in [-reach, reach], rounded at random, zero-filled.

    ``padded`` (N, side, side) has ``margin`` zero pixels around each image; ``rows`` and ``reach``
    (in pixels) have shape (R, B), the result (R, B, h, h).
    """
    side = padded.shape[-1]
    shape = (2, 2, *reach.shape)
    noise = torch.rand(shape, generator=generator, dtype=reach.dtype, device=reach.device)
    direction, rounding = noise.unbind(1)
    offset = ((2 * direction - 1) * reach + rounding).nan_to_num().floor().clamp(-margin, margin)
    dy, dx = (offset + margin).to(torch.int64)
    inner = torch.arange(side - 2 * margin, device=padded.device)
    window = (inner.unsqueeze(1) * side + inner).flatten()
    corner = rows * side * side + dy * side + dx
    index = corner.unsqueeze(-1) + window
    pixels = padded.flatten().index_select(0, index.flatten())  # faster than [index]
    return pixels.view(*reach.shape, len(inner), len(inner))
