r"""Directed acyclic graphs with linear mechanisms: draw them, sample them, compare them.

Everywhere `weights[i, j]` is the weight of the edge from node i to node j, so that one sample, a
row, obeys $x=xW+z$: node j reads COLUMN j.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = [
    "centered_samples",
    "edge_rates",
    "random_dag",
    "simulate_linear_sem",
    "structural_hamming_distance",
    "threshold_dag",
]

DISTRIBUTIONS = ("gaussian", "exponential", "laplace")


def _square(name: str, matrix: Tensor) -> int:
    """Number of nodes of a matrix or a batch of them; ValueError for anything else."""
    if matrix.ndim < 2 or matrix.shape[-1] != matrix.shape[-2] or matrix.shape[-1] == 0:
        raise ValueError(f"{name} must have shape (..., d, d), got {tuple(matrix.shape)}")
    if not bool(matrix.isfinite().all()):
        raise ValueError(f"{name} must be finite in every entry")
    return matrix.shape[-1]


def _strong_order(edges: Tensor) -> Tensor | None:
    """Nodes of one graph, parents first; None if it has a cycle. `edges` is bool on the host."""
    parents = edges.sum(0)
    order: list[Tensor] = []
    ready = (parents == 0).nonzero()[:, 0]
    while ready.numel():
        order.append(ready)
        parents = parents - edges[ready].sum(0)
        parents[ready] = -1  # taken
        ready = (parents == 0).nonzero()[:, 0]
    found = torch.cat(order) if order else ready
    return found if len(found) == len(edges) else None


def centered_samples(x: Tensor) -> Tensor:
    """Samples without their means, as a batch in float64.

    Args:
        x: `(n, d)` or `(b, n, d)`, floating; left as it is.

    Returns:
        `(b, n, d)`, with b = 1 for a single problem.

    Raises:
        TypeError: `x` is not floating.
        ValueError: another shape, fewer than 2 samples, entries that are not finite.

    Source: the sample mean.

    Example:
        >>> centered_samples(torch.tensor([[1.0], [3.0]])).flatten().tolist()
        [-1.0, 1.0]
    """
    if not x.is_floating_point():
        raise TypeError(f"x must be floating, got {x.dtype}")
    if x.ndim not in (2, 3) or 0 in x.shape:
        raise ValueError(f"x must have shape (n, d) or (b, n, d), got {tuple(x.shape)}")
    if x.shape[-2] < 2:
        raise ValueError(f"x must hold at least 2 samples, got {x.shape[-2]}")
    if not bool(x.isfinite().all()):
        raise ValueError("x must be finite in every entry")
    samples = x.detach().double().reshape(-1, *x.shape[-2:])
    return samples - samples.mean(-2, keepdim=True)


def random_dag(
    num_nodes: int,
    num_edges: float,
    *,
    batch: int = 1,
    low: float = 0.5,
    high: float = 2.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Weighted Erdos-Renyi graphs, directed along a random order of the nodes.

    Each of the $d(d-1)/2$ pairs is an edge with the probability that makes `num_edges` of them
    expected; its weight is $\pm U[\mathrm{low},\mathrm{high}]$.

    Args:
        num_nodes: d, at least 1.
        num_edges: expected number, between 0 and d (d - 1) / 2.
        batch: number of graphs.
        low: least size of a weight, at least 0.
        high: largest size of a weight, at least `low`.
        generator: of random numbers, on the CPU.

    Returns:
        float64 weights `(batch, d, d)` on the CPU.

    Raises:
        ValueError: a number out of range.

    Source: Zheng et al., "DAGs with NO TEARS", 2018, simulations.

    Example:
        >>> random_dag(3, 3, low=1.0, high=1.0).abs().sum().item()   # all three pairs
        3.0
    """
    if num_nodes < 1 or batch < 1:
        raise ValueError(f"num_nodes and batch must be at least 1, got {num_nodes}, {batch}")
    pairs = num_nodes * (num_nodes - 1) / 2
    if not 0 <= num_edges <= pairs:
        raise ValueError(f"num_edges must be between 0 and {pairs:g}, got {num_edges}")
    if not 0 <= low <= high < math.inf:
        raise ValueError(f"low and high must obey 0 <= low <= high, got {low} and {high}")
    shape = (batch, num_nodes, num_nodes)
    draw = torch.rand(4, *shape, dtype=torch.float64, generator=generator)
    edges = (draw[0] < num_edges / max(pairs, 1.0)).double().triu(1)
    sign = torch.where(draw[1] < 0.5, -1.0, 1.0)
    weights = edges * sign * (low + (high - low) * draw[2])
    order = draw[3, :, 0].argsort(-1)
    rows = weights.gather(1, order[:, :, None].expand(shape))
    return rows.gather(2, order[:, None, :].expand(shape))


def simulate_linear_sem(
    weights: Tensor,
    num_samples: int,
    *,
    noise_std: float | Tensor,
    distribution: str = "gaussian",
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Samples of a linear structural equation model, $X=Z(I-W)^{-1}$.

    Args:
        weights: $W$, `(d, d)` or `(b, d, d)`, acyclic, floating.
        num_samples: n, at least 1.
        noise_std: standard deviation of the noise, at least 0: one number, or a tensor that
            broadcasts to `(..., d)`.
        distribution: "gaussian", "exponential" (not centered, as in the literature) or "laplace".
        generator: of random numbers, on the device of `weights`.

    Returns:
        X, `(n, d)` or `(b, n, d)`.

    Raises:
        ValueError: weights with a cycle or not square, an unknown distribution, a bad number,
            samples that overflow.

    Source: Saboksayr et al. 2024, section on experiments.

    Example:
        >>> x = simulate_linear_sem(torch.tensor([[0.0, 2.0], [0.0, 0.0]]), 5, noise_std=0.0)
        >>> x.abs().sum().item()
        0.0
    """
    d = _square("weights", weights)
    if num_samples < 1:
        raise ValueError(f"num_samples must be at least 1, got {num_samples}")
    if distribution not in DISTRIBUTIONS:
        raise ValueError(f"distribution must be one of {DISTRIBUTIONS}, got {distribution!r}")
    std = torch.as_tensor(noise_std, dtype=weights.dtype, device=weights.device)
    if not bool(((std >= 0) & (std < math.inf)).all()):
        raise ValueError("noise_std must be finite and at least 0")
    edges = (weights != 0).reshape(-1, d, d).cpu()
    if any(_strong_order(e) is None for e in edges):
        raise ValueError("weights must be acyclic")
    shape = (*weights.shape[:-2], num_samples, d)
    dtype, device = weights.dtype, weights.device
    if distribution == "gaussian":
        noise = torch.randn(shape, generator=generator, dtype=dtype, device=device)
    else:
        # 1 - U lies in (0, 1]: its logarithm is finite.
        uniform = torch.rand(shape, generator=generator, dtype=dtype, device=device)
        noise = -torch.log1p(-uniform)
        if distribution == "laplace":
            coin = torch.rand(shape, generator=generator, dtype=dtype, device=device)
            noise = torch.where(coin < 0.5, -noise, noise) / math.sqrt(2.0)
    noise = noise * std.expand(*weights.shape[:-2], d).unsqueeze(-2)
    eye = torch.eye(d, dtype=dtype, device=device)
    samples: Tensor = torch.linalg.solve(eye - weights, noise, left=False)
    if not bool(samples.isfinite().all()):
        raise ValueError("weights or noise_std are so large that samples overflow")
    return samples


def threshold_dag(weights: Tensor, threshold: float = 0.3) -> Tensor:
    r"""Drop weak edges, then the weakest of the rest until no cycle is left.

    Args:
        weights: `(..., d, d)`; left as they are.
        threshold: edges with $|w|\le$ this go first; at least 0.

    Returns:
        A copy, acyclic, with zeros for the dropped edges.

    Raises:
        ValueError: weights that are not square or not finite, a negative threshold.

    Source: the authors' code, post-processing.

    Example:
        >>> threshold_dag(torch.tensor([[0.0, 0.9], [0.5, 0.2]])).tolist()[1]   # 0.5 closed a cycle
        [0.0, 0.0]
    """
    d = _square("weights", weights)
    if not threshold >= 0:
        raise ValueError(f"threshold must be at least 0, got {threshold}")
    kept = weights.detach().clone().cpu().reshape(-1, d, d)
    kept[kept.abs() <= threshold] = 0.0
    for w in kept:
        if _strong_order(w != 0) is not None:
            continue
        size = w.abs().flatten()
        found = size.nonzero()[:, 0]
        ranked = found[size[found].argsort(stable=True)]
        # Dropping more edges never makes a cycle, so bisection finds how many must go.
        low, high = 0, len(ranked)
        while high - low > 1:
            middle = (low + high) // 2
            trial = w.flatten().clone()
            trial[ranked[:middle]] = 0.0
            fine = _strong_order(trial.view(d, d) != 0) is not None
            low, high = (low, middle) if fine else (middle, high)
        w.view(-1)[ranked[:high]] = 0.0
    return kept.reshape(weights.shape).to(weights.device)


def structural_hamming_distance(true: Tensor, estimate: Tensor) -> int:
    """Edges to add, to remove and to turn around; a reversed edge counts once.

    An edge that the estimate leaves undirected, nonzero both ways, counts as right where the true
    graph has it in either direction.

    Args:
        true: `(d, d)`, nonzero where there is an edge.
        estimate: `(d, d)`.

    Returns:
        The number, summed over a batch if there is one.

    Raises:
        ValueError: shapes that differ or are not square.

    Source: the authors' code, counts of errors.

    Example:
        >>> edge = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> structural_hamming_distance(edge, edge.T)
        1
    """
    a, b = _edges(true, estimate)
    wrong_pair = (a | a.mT) != (b | b.mT)
    reversed_edge = b & ~b.mT & a.mT & ~a
    return int(wrong_pair.triu(1).sum() + reversed_edge.sum())


def edge_rates(true: Tensor, estimate: Tensor) -> tuple[float, float]:
    """True positive rate and false discovery rate of directed edges, over a whole batch.

    Args:
        true: `(..., d, d)`, nonzero where there is an edge.
        estimate: `(..., d, d)`.

    Returns:
        Share of the true edges that were found, and share of the found edges that are wrong or
        reversed; both 0 where there are none.

    Raises:
        ValueError: shapes that differ or are not square.

    Source: the authors' code, counts of errors.

    Example:
        >>> edge = torch.tensor([[0.0, 1.0], [0.0, 0.0]])
        >>> edge_rates(edge, edge.T)
        (0.0, 1.0)
    """
    a, b = _edges(true, estimate)
    right, found, wanted = int((a & b).sum()), int(b.sum()), int(a.sum())
    return right / max(wanted, 1), (found - right) / max(found, 1)


def _edges(true: Tensor, estimate: Tensor) -> tuple[Tensor, Tensor]:
    _square("true", true)
    _square("estimate", estimate)
    if true.shape != estimate.shape:
        raise ValueError(
            f"true and estimate must have one shape, got {tuple(true.shape)} and "
            f"{tuple(estimate.shape)}"
        )
    return true != 0, estimate != 0
