"""Which neurons compute the rule: scores, and the network without some neurons."""

from __future__ import annotations

import copy

import torch
from torch import Tensor

from wellposed.nets.quadratic import (
    QuadraticMLP,
)
from wellposed.ops.spectrum import inverse_participation_ratio

__all__ = ["neuron_ipr", "neuron_magnitude", "prune_neurons"]


def neuron_ipr(model: QuadraticMLP, r: int = 2) -> Tensor:
    r"""A neuron's score: the mean ratio of its rows of U and V and its column of W.

    Args:
        model: a `QuadraticMLP`.
        r: exponent, at least 1.

    Returns:
        Shape (width,), in [0, 1], detached.

    Raises:
        ValueError: `r` below 1.

    Source: Doshi et al. (2024).

    Example:
        >>> from wellposed.nets.quadratic import analytic_mlp
        >>> net = analytic_mlp(7, 3, torch.Generator().manual_seed(0))
        >>> [round(v, 3) for v in neuron_ipr(net).tolist()]
        [1.0, 1.0, 1.0]
    """
    weights = torch.stack([model.U, model.V, model.W.T]).detach()  # (3, width, p)
    scores: Tensor = inverse_participation_ratio(weights, r).mean(0)
    return scores


def neuron_magnitude(model: QuadraticMLP) -> Tensor:
    r"""The competing score: $\|U_{k\cdot}\|\,\|V_{k\cdot}\|\,\|W_{\cdot k}\|$.

    Args:
        model: a `QuadraticMLP`.

    Returns:
        Shape (width,), at least 0, detached.

    Source: ours; magnitude is the usual score in pruning.

    Example:
        >>> net = QuadraticMLP(4, 2)
        >>> for weight in net.parameters():
        ...     _ = weight.data.fill_(1.0)
        >>> neuron_magnitude(net).tolist()  # 2 * 2 * 2
        [8.0, 8.0]
    """
    rows = torch.stack([model.U, model.V, model.W.T]).detach()  # (3, width, p)
    size: Tensor = torch.linalg.vector_norm(rows, dim=2).prod(0)
    return size


def prune_neurons(
    model: QuadraticMLP,
    fraction: float,
    order: str = "low",
    generator: torch.Generator | None = None,
    *,
    score: Tensor | None = None,
) -> QuadraticMLP:
    r"""A copy of the network with some neurons set to zero.

    Args:
        model: a `QuadraticMLP`; left as it is.
        fraction: share of the neurons, in [0, 1]; `int(fraction * width)` of them are pruned.
        order: which neurons go first: those of the "low" or "high" scores, or "random" ones.
        generator: CPU generator of the random order.
        score: one number a neuron, shape (width,); None takes `neuron_ipr`.

    Returns:
        The copy; rows of U and V and columns of W of pruned neurons are zero.

    Raises:
        ValueError: `fraction` outside [0, 1], an unknown order, or a score of another shape.

    Source: Doshi et al. (2024).

    Example:
        >>> net = QuadraticMLP(5, 4)
        >>> pruned = prune_neurons(net, 0.5, score=torch.tensor([3.0, 0.0, 2.0, 1.0]))
        >>> pruned.U.abs().sum(1).gt(0).tolist()
        [True, False, True, False]
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    if order not in ("low", "high", "random"):
        raise ValueError(f"order must be 'low', 'high' or 'random', got {order!r}")
    if score is not None and score.shape != (model.width,):
        raise ValueError(f"score must have shape ({model.width},), got {tuple(score.shape)}")
    if order == "random":
        ranked = torch.randperm(model.width, generator=generator)
    else:
        chosen = neuron_ipr(model) if score is None else score
        ranked = chosen.argsort(descending=order == "high", stable=True)
    gone = ranked[: int(fraction * model.width)].to(model.U.device)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.U[gone], pruned.V[gone], pruned.W[:, gone] = 0.0, 0.0, 0.0
    return pruned
