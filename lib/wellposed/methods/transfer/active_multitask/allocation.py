"""Which source tasks are relevant to a target, and how many samples each gets."""

from __future__ import annotations

import torch
from torch import Tensor

from wellposed.ops.lasso import lasso

__all__ = ["allocate_samples", "design_error", "lasso_relevance", "relevance", "transfer_error"]

SPAN_TOL = 1e-6  # residual above which a target head is no combination of the source heads


def relevance(source_heads: Tensor, target_head: Tensor, p: int = 1) -> Tensor:
    r"""Weights of least norm that combine the source heads into the target's.

    $$\nu^p=\arg\min\|\nu\|_p\quad\text{s.t.}\quad W\nu=w$$

    For `p=1` a linear program, solved on the CPU, whose solution has at most $k$ non-zeros; for
    `p=2` the pseudo-inverse. Not differentiable.

    Args:
        source_heads: $W$, `(..., k, M)`; computed in float64 whatever the dtype.
        target_head: $w$, `(..., k)`.
        p: 1 or 2.

    Returns:
        $\nu^p$, `(..., M)`, in the dtype of `source_heads`.

    Raises:
        ValueError: shapes do not fit, another `p`, values that are not finite, a target that is not
            a combination of the sources, or numbers of which the solver makes nothing.

    Source: the paper's relevance for p = 1, that of Chen et al. 2022 for p = 2.

    Example:
        >>> W, w = torch.tensor([[1.0, 0.0, 1.0], [0.0, 1.0, 1.0]]), torch.tensor([1.0, 1.0])
        >>> relevance(W, w).tolist(), [round(v, 4) for v in relevance(W, w, 2).tolist()]
        ([0.0, 0.0, 1.0], [0.3333, 0.3333, 0.6667])
    """
    W, w = _checked_heads(source_heads, target_head)
    if p not in (1, 2):
        raise ValueError(f"p must be 1 or 2, got {p!r}")
    nu = _times(torch.linalg.pinv(W), w)
    residual = (_times(W, nu) - w).norm(dim=-1)
    if bool((residual > SPAN_TOL * w.norm(dim=-1).clamp(min=1)).any()):
        raise ValueError(
            "target_head must be a combination of source_heads, "
            f"the nearest one is {float(residual.max()):.1e} away"
        )
    if p == 1:
        pairs = zip(W.reshape(-1, *W.shape[-2:]).cpu(), w.reshape(-1, w.shape[-1]).cpu())
        nu = torch.stack([_least_l1(*pair) for pair in pairs]).reshape(nu.shape)
    return nu.to(source_heads)


def _least_l1(W: Tensor, w: Tensor) -> Tensor:
    from scipy.optimize import linprog  # slow to import, and needed here only

    M, units = W.shape[1], []
    for part in (W, w):  # the solver takes entries below 1e-9 for zeros
        size = float(part.abs().max())
        units.append(1.0 if size == 0 or 1e-4 < size < 1e4 else size)
    both = (torch.cat([W, -W], dim=1) / units[0]).numpy()
    found = linprog([1.0] * (2 * M), A_eq=both, b_eq=(w / units[1]).numpy(), method="highs")
    if found.x is None:
        raise ValueError(
            f"source_heads are too badly scaled for the solver, it says: {found.message}"
        )
    halves = torch.from_numpy(found.x)
    rough = halves[:M] - halves[M:]
    # The solver meets the constraint to about 1e-7; on its support it can be met exactly.
    used = (rough.abs() > 1e-9).nonzero().squeeze(-1)
    exact = torch.zeros_like(rough)
    exact[used] = _times(torch.linalg.pinv(W[:, used]), w)
    return exact


def lasso_relevance(source_heads: Tensor, target_head: Tensor, alpha: float | Tensor) -> Tensor:
    r"""Sparse weights that nearly combine estimated source heads into the target's.

    $$\hat\nu=\arg\min_\nu\tfrac12\|W\nu-w\|_2^2+\alpha\|\nu\|_1$$

    Accelerated proximal gradient with restarts, until the duality gap is 1e-6. The squared error is
    not divided by $k$ (scikit-learn's `Lasso` does that: give it $\alpha/k$).

    Args:
        source_heads: $W$, `(..., k, M)`; computed in float64 whatever the dtype.
        target_head: $w$, `(..., k)`.
        alpha: $\alpha>0$, a number or `(...)`; at $\|W^\top w\|_\infty$ all weights are zero.

    Returns:
        $\hat\nu$, `(..., M)`, with exact zeros; a RuntimeWarning if it did not converge.

    Raises:
        ValueError: shapes do not fit, values that are not finite, `alpha` not positive.

    Source: the Lasso program of the algorithm for unknown relevance.

    Example:
        >>> lasso_relevance(torch.eye(2), torch.tensor([1.0, 0.1]), 0.25).tolist()
        [0.75, 0.0]
    """
    return lasso(source_heads, target_head, alpha)


def allocate_samples(nu: Tensor, budget: int, exponent: float = 1.0, minimum: int = 0) -> Tensor:
    r"""Split a budget: `minimum` to every task, the rest in proportion to $|\nu_m|^q$.

    Args:
        nu: relevance, `(..., M)`.
        budget: $N$, samples in all.
        exponent: $q\ge0$; 1 with $\nu^1$ is the paper's rule, 2 with $\nu^2$ the earlier one.
            A weight of zero gets nothing but the minimum, at $q=0$ too.
        minimum: samples of every task, at least 0.

    Returns:
        int64 `(..., M)`, summing to `budget` exactly, rounded by largest remainder.

    Raises:
        ValueError: a relevance that is zero throughout or not finite, a budget below `minimum`
            times M, a negative `minimum` or `exponent`.

    Source: step 2 of the algorithm.

    Example:
        >>> allocate_samples(torch.tensor([3.0, 0.0, -1.0]), 11, minimum=1).tolist()
        [7, 1, 3]
    """
    num_tasks = nu.shape[-1]
    if minimum < 0 or exponent < 0:
        raise ValueError(f"minimum and exponent must be at least 0, got {minimum} and {exponent}")
    free = budget - minimum * num_tasks
    if free < 0:
        raise ValueError(
            f"budget must be at least minimum * M = {minimum * num_tasks}, got {budget}"
        )
    size = nu.abs().double()
    largest = size.amax(-1, keepdim=True)
    if not bool(((largest > 0) & largest.isfinite()).all()):
        raise ValueError("nu must be finite and have a weight that is not zero")
    weight = torch.where(size > 0, (size / largest).pow(exponent), 0.0)
    share = weight / weight.sum(-1, keepdim=True) * free
    whole = (share + 1e-9).floor()  # 2.9999999 is three
    order = (whole - share).argsort(dim=-1, stable=True).argsort(dim=-1)
    extra = order < free - whole.sum(-1, keepdim=True)
    return (whole + extra + minimum).long()


def transfer_error(nu: Tensor, counts: Tensor) -> Tensor:
    r"""The part of the risk bound that counts control: $\sum_m\nu_m^2/n_m$.

    Args:
        nu: weights, `(..., M)`.
        counts: $n_m\ge0$, `(..., M)`.

    Returns:
        `(...)`; a task of weight 0 adds 0, one with weight and without samples makes it infinite.

    Raises:
        ValueError: shapes differ, a negative count.

    Source: the risk bound, without its factor $\sigma^2dk$.

    Example:
        >>> transfer_error(torch.tensor([2.0, 1.0, 0.0]), torch.tensor([8, 2, 0])).item()
        1.0
    """
    _check_counts(nu, counts)
    return torch.where(nu == 0, 0.0, nu.square() / counts).sum(-1)


def design_error(source_heads: Tensor, target_head: Tensor, counts: Tensor) -> Tensor:
    r"""Least transfer error over all weights, for given counts.

    $$E(n)=\min_{W\nu=w}\sum_m\frac{\nu_m^2}{n_m}=w^\top(W\,\mathrm{diag}(n)\,W^\top)^{-1}w$$

    To first order the learned basis adds $\sigma^2(d-k)\,E(n)$ to the target's risk.

    Args:
        source_heads: $W$, `(..., k, M)`; computed in float64 whatever the dtype.
        target_head: $w$, `(..., k)`.
        counts: $n_m\ge0$, `(..., M)`.

    Returns:
        `(...)`; infinite if the sampled tasks do not span the target.

    Raises:
        ValueError: shapes do not fit, values that are not finite, a negative count.

    Source: ours; the least value over counts of sum $N$ is Elfving's theorem of optimal design.

    Example:
        >>> design_error(torch.eye(2), torch.tensor([1.0, 2.0]), torch.tensor([1, 4])).item()
        2.0
    """
    W, w = _checked_heads(source_heads, target_head)
    _check_counts(W[..., 0, :], counts)
    scaled = W * counts.to(W).sqrt().unsqueeze(-2)
    v = _times(torch.linalg.pinv(scaled), w)
    missed = (_times(scaled, v) - w).norm(dim=-1) > SPAN_TOL
    return torch.where(missed, torch.inf, v.square().sum(-1)).to(source_heads)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _checked_heads(source_heads: Tensor, target_head: Tensor) -> tuple[Tensor, Tensor]:
    fits = source_heads.ndim >= 2 and target_head.shape == source_heads.shape[:-1]
    if not fits or 0 in source_heads.shape:
        raise ValueError(
            "source_heads must be (..., k, M), not empty, and target_head (..., k), got "
            f"{tuple(source_heads.shape)} and {tuple(target_head.shape)}"
        )
    if not bool(source_heads.isfinite().all() & target_head.isfinite().all()):
        raise ValueError("source_heads and target_head must be finite")
    return source_heads.double(), target_head.double()


def _check_counts(like: Tensor, counts: Tensor) -> None:
    if counts.shape[-1:] != like.shape[-1:]:
        raise ValueError(f"counts must end in {like.shape[-1]} tasks, got {tuple(counts.shape)}")
    if bool((counts < 0).any()):
        raise ValueError("counts must not be negative")
