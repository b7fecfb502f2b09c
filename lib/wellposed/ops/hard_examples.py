"""How much of a total the hardest examples carry."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["hard_share"]


def hard_share(mass: Tensor, hardness: Tensor, *, fraction: float = 0.25) -> Tensor:
    r"""Share of a total that falls on the hardest examples.

    Hard-example mining would give the hardest quarter of the examples a larger share of the
    gradient than cross-entropy does.

    Args:
        mass: non-negative numbers to add up, such as gradient norms, shape ``(..., n)``.
        hardness: larger is harder, of the same shape.
        fraction: part of the examples that counts as hardest, in (0, 1); at least one example.

    Returns:
        Shares in [0, 1], shape ``(...)``; 0 where the total is 0.

    Raises:
        ValueError: shapes that differ, no example, or ``fraction`` out of range.

    Source: ours, a measure of what Kim et al., "Self-Knowledge Distillation with Progressive
    Refinement of Targets", arXiv:2006.12000, call hard example mining.

    Example:
        >>> hard_share(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.9]), fraction=0.5).item()
        0.75
    """
    if mass.shape != hardness.shape or mass.ndim == 0 or mass.shape[-1] == 0:
        raise ValueError(
            "mass and hardness must have the same shape (..., n) with n >= 1, got "
            f"{tuple(mass.shape)} and {tuple(hardness.shape)}"
        )
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
    count = max(1, round(fraction * mass.shape[-1]))
    hardest = hardness.topk(count, dim=-1).indices
    total = mass.sum(dim=-1)
    return mass.gather(-1, hardest).sum(dim=-1) / torch.where(total == 0, 1.0, total)
