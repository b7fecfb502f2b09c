r"""Sending tokens to the experts of a sparse mixture: who takes whom, with a hard capacity.

Experts run on batches of a fixed size, so each has `capacity` places. The functions here differ in
who chooses: the tokens (Fedus, Zoph and Shazeer, "Switch Transformers", JMLR 2022), the experts
(Zhou et al., "Mixture-of-Experts with Expert Choice Routing", NeurIPS 2022), or a transport plan
that sees both sides (Liu, Puigcerver and Blondel, ICLR 2023; Clark et al., ICML 2022).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Dispatch", "expert_choice", "plan_choice", "token_choice"]


@dataclass(frozen=True)
class Dispatch:
    """Which tokens each expert gets: `capacity` places an expert, not all of them taken."""

    tokens: Tensor  # (..., n, capacity), int64
    used: Tensor  # (..., n, capacity), bool

    def copies(self, num_tokens: int) -> Tensor:
        """Number of experts that got each token, `(..., num_tokens)`."""
        zeros = self.used.new_zeros((*self.used.shape[:-2], num_tokens), dtype=torch.int64)
        return zeros.scatter_add(-1, self.tokens.flatten(-2), self.used.flatten(-2).long())


def plan_choice(plan: Tensor, capacity: int) -> Dispatch:
    r"""Each expert takes the `capacity` tokens with the largest entries in its column of a plan.

    Args:
        plan: $T\ge0$, `(..., m, n)`: tokens are rows, experts are columns.
        capacity: places an expert, 1 to `m`; a sparse plan with `k = capacity` loses nothing.

    Returns:
        A :class:`Dispatch`; places whose entry is zero stay empty.

    Raises:
        ValueError: `capacity` out of range, a plan without two axes.

    Source: Liu et al. 2023.

    Example:
        >>> plan_choice(torch.tensor([[0.5, 0.0], [0.25, 0.0], [0.0, 0.25]]), 2).used.tolist()
        [[True, True], [True, False]]
    """
    _check_capacity(plan, capacity)
    mass, tokens = plan.mT.topk(capacity, dim=-1)
    return Dispatch(tokens, mass > 0)


def expert_choice(scores: Tensor, capacity: int) -> Dispatch:
    r"""Each expert takes the `capacity` tokens that score best with it, whoever else takes them.

    Args:
        scores: affinities, `(..., m, n)`: tokens are rows, experts are columns.
        capacity: places an expert, 1 to `m`.

    Returns:
        A :class:`Dispatch` with all places taken.

    Raises:
        ValueError: `capacity` out of range, scores without two axes.

    Source: Zhou et al. 2022.

    Example:
        >>> expert_choice(torch.tensor([[0.9, 0.8], [0.1, 0.2]]), 1).tokens.flatten().tolist()
        [0, 0]
    """
    _check_capacity(scores, capacity)
    tokens = scores.mT.topk(capacity, dim=-1).indices
    return Dispatch(tokens, torch.ones_like(tokens, dtype=torch.bool))


def token_choice(scores: Tensor, capacity: int) -> Dispatch:
    r"""Each token goes to its best expert; the first `capacity` find room.

    Tokens are served in order; those that come too late reach no expert.

    Args:
        scores: affinities, `(..., m, n)`: tokens are rows, experts are columns.
        capacity: places an expert, 1 to `m`.

    Returns:
        A :class:`Dispatch`.

    Raises:
        ValueError: `capacity` out of range, scores without two axes.

    Source: Fedus et al. 2022.

    Example:
        >>> scores = torch.tensor([[0.9, 0.1], [0.8, 0.2], [0.3, 0.7]])
        >>> token_choice(scores, 1).tokens.flatten().tolist()     # token 1 came second
        [0, 2]
    """
    _check_capacity(scores, capacity)
    m = scores.shape[-2]
    chosen = torch.zeros_like(scores).scatter(-1, scores.argmax(-1, keepdim=True), 1.0)
    early = chosen.mT * torch.arange(m, 0, -1, device=scores.device, dtype=scores.dtype)
    order, tokens = early.topk(capacity, dim=-1)
    return Dispatch(tokens, order > 0)


def _check_capacity(table: Tensor, capacity: int) -> None:
    if table.ndim < 2:
        raise ValueError(f"tokens and experts must be two axes, got shape {tuple(table.shape)}")
    if not 1 <= capacity <= table.shape[-2]:
        raise ValueError(f"capacity must be between 1 and {table.shape[-2]}, got {capacity}")
