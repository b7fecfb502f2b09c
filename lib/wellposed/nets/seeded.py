"""Networks side by side, each with the initial weights of its own seed."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wellposed.nets.mlp import MLP
from wellposed.nets.stacked import Stacked

__all__ = ["seeded_mlps"]


def seeded_mlps(x: Tensor, widths: Sequence[int], seeds: Sequence[int]) -> Stacked:
    """Fully connected networks for slices of data, one with each seed.

    A network starts as it would alone: as ``MLP((p, *widths))`` after
    ``torch.manual_seed(seed)``. Torch's global random state is left as it was.

    Args:
        x: inputs ``(m, n, p)``, one slice a network; it sets the device and dtype too.
        widths: width of each layer after the input, at least one.
        seeds: ``m`` seeds, at least 0.

    Returns:
        The ``m`` networks side by side.

    Raises:
        ValueError: ``x`` of another shape or empty, or not one seed a slice.

    Source: ours.

    Example:
        >>> nets = seeded_mlps(torch.zeros(2, 5, 3), (4, 1), seeds=[0, 1])
        >>> nets(torch.zeros(2, 5, 3)).shape
        torch.Size([2, 5, 1])
    """
    if x.ndim != 3 or len(seeds) != len(x) or x.numel() == 0:
        raise ValueError(
            f"x must have shape (m, n, p) with one of seeds for each m, got {tuple(x.shape)} and "
            f"{len(seeds)} seeds"
        )
    made = []
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        for seed in seeds:
            torch.manual_seed(seed)
            made.append(MLP((x.shape[2], *widths)))
    return Stacked(made).to(x.device, x.dtype)
