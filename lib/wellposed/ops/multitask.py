"""Low-rank regression of many tasks at once, from sums that never grow with the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.ops.numerics import unit_of

__all__ = [
    "RepresentationFit",
    "TaskStatistics",
    "fit_head",
    "fit_statistics",
    "task_statistics",
]

CHECK = 5  # sweeps between two looks at that movement


@dataclass(frozen=True)
class TaskStatistics:
    """All that a least-squares fit needs to know of M tasks; leading axes are a batch."""

    gram: Tensor  # (..., M, d, d), X^T X of every task
    moment: Tensor  # (..., M, d), X^T y
    counts: Tensor  # (..., M), int64

    def __add__(self, other: TaskStatistics) -> TaskStatistics:
        """Pool two samples."""
        return TaskStatistics(
            self.gram + other.gram, self.moment + other.moment, self.counts + other.counts
        )


@dataclass(frozen=True)
class RepresentationFit:
    """A shared basis and the heads of the source tasks."""

    basis: Tensor  # (..., d, k), orthonormal columns
    heads: Tensor  # (..., k, M)
    converged: Tensor  # (...), bool
    n_iter: int  # sweeps of the slowest problem


def task_statistics(inputs: Sequence[Tensor], targets: Sequence[Tensor]) -> TaskStatistics:
    r"""Sums over the samples of M tasks.

    Args:
        inputs: `(n_m, d)` for every task; a task may be empty.
        targets: `(n_m,)` for every task.

    Returns:
        :class:`TaskStatistics` without leading axes.

    Raises:
        ValueError: no task, or shapes that do not fit.

    Example:
        >>> found = task_statistics([torch.ones(3, 1)], [torch.full((3,), 2.0)])
        >>> found.gram.item(), found.moment.item(), found.counts.item()
        (3.0, 6.0, 3)
    """
    if not inputs or len(inputs) != len(targets):
        raise ValueError(
            f"inputs and targets must list the same tasks, got {len(inputs)} and {len(targets)}"
        )
    for x, y in zip(inputs, targets, strict=True):
        if x.ndim != 2 or y.shape != x.shape[:1] or x.shape[1] != inputs[0].shape[1]:
            raise ValueError(
                f"inputs must be (n, d) and targets (n,), got {tuple(x.shape)}, {tuple(y.shape)}"
            )
    gram = torch.stack([x.mT @ x for x in inputs])
    moment = torch.stack([x.mT @ y for x, y in zip(inputs, targets, strict=True)])
    return TaskStatistics(gram, moment, torch.tensor([len(x) for x in inputs], device=gram.device))


def fit_statistics(
    statistics: TaskStatistics,
    rank: int,
    *,
    steps: int = 200,
    ridge: float = 1e-9,
    tol: float = 1e-6,
    start: Tensor | None = None,
) -> RepresentationFit:
    r"""Fit a basis that all tasks share, and their heads, by alternating least squares.

    $$\min_{B,W}\sum_m\|X_mBw_m-y_m\|^2$$

    It needs the sums $X_m^\top X_m$ and $X_m^\top y_m$ only, so a sweep costs the same for any
    number of samples. Problems that have converged leave the batch.

    Args:
        statistics: of M tasks, with any leading axes; float32 or float64.
        rank: $k$, from 1 to $d$.
        steps: largest number of sweeps.
        ridge: relative to the mean diagonal of each system. For heads it shrinks to zero; for the
            basis it pulls to the one before, so that directions no head uses stay in place.
        tol: movement of the basis in one sweep, as a Frobenius norm, at which a fit has converged.
        start: basis to start from, `(d, k)` or `(..., d, k)`; else the leading eigenvectors of
            $\sum_mX_m^\top y_my_m^\top X_m/n_m$.

    Returns:
        A :class:`RepresentationFit`; the head of a task without samples is zero.

    Raises:
        ValueError: `rank`, `steps`, `ridge` or `tol` out of range.

    Example:
        >>> gram, moment = torch.eye(2).expand(3, 2, 2), torch.tensor([1.0, 0.0]).expand(3, 2)
        >>> fit = fit_statistics(TaskStatistics(gram, moment, torch.full((3,), 2)), rank=1)
        >>> [round(v, 4) for v in (fit.basis @ fit.heads)[0].tolist()]
        [1.0, 1.0, 1.0]
    """
    *batch, num_tasks, dim = statistics.moment.shape
    if not 1 <= rank <= dim or steps < 1 or min(ridge, tol) < 0:
        raise ValueError(
            f"rank must lie in 1..{dim}, steps be at least 1, ridge and tol at least 0, "
            f"got {rank}, {steps}, {ridge} and {tol}"
        )
    whole = TaskStatistics(
        statistics.gram.reshape(-1, num_tasks, dim, dim),
        statistics.moment.reshape(-1, num_tasks, dim),
        statistics.counts.reshape(-1, num_tasks),
    )
    basis = (
        _spectral_start(whole, rank)
        if start is None
        else start.expand(*batch, dim, rank).reshape(-1, dim, rank).clone()
    )
    left, rows, n_iter = whole, torch.arange(len(basis), device=basis.device), 0
    while n_iter < steps and len(rows):
        old = now = basis[rows]
        for _ in range(min(CHECK, steps - n_iter)):
            old, n_iter = now, n_iter + 1
            now = _fit_basis(left, _fit_heads(left, old, ridge), old, ridge)
        basis[rows] = now
        moving = (now - old @ (old.mT @ now)).norm(dim=(-2, -1)) > tol
        rows = rows[moving]
        left = TaskStatistics(left.gram[moving], left.moment[moving], left.counts[moving])
    converged = torch.ones(len(basis), dtype=torch.bool, device=basis.device)
    converged[rows] = False
    heads = _fit_heads(whole, basis, ridge).mT
    return RepresentationFit(
        basis.reshape(*batch, dim, rank),
        heads.reshape(*batch, rank, num_tasks),
        converged.reshape(batch),
        n_iter,
    )


def _spectral_start(statistics: TaskStatistics, rank: int) -> Tensor:
    scaled = statistics.moment / statistics.counts.clamp(min=1).sqrt().unsqueeze(-1)
    scaled = scaled / unit_of(scaled, power=2, dim=(-2, -1))
    vectors: Tensor = torch.linalg.eigh(scaled.mT @ scaled).eigenvectors
    return vectors[..., -rank:].contiguous()


def _fit_heads(statistics: TaskStatistics, basis: Tensor, ridge: float) -> Tensor:
    """Least squares of every task on a fixed basis, `(b, M, k)`."""
    b = basis.unsqueeze(-3)
    small = b.mT @ (statistics.gram @ b)
    magnitude = statistics.gram.diagonal(dim1=-2, dim2=-1).sum(-1)
    return _solve(small, _times(b.mT, statistics.moment), ridge, magnitude)


def _fit_basis(statistics: TaskStatistics, heads: Tensor, old: Tensor, ridge: float) -> Tensor:
    """The basis of least squared error for fixed heads, its columns made orthonormal."""
    size, dim, rank = old.shape
    pairs = (heads.unsqueeze(-1) * heads.unsqueeze(-2)).flatten(-2)  # (b, M, k k)
    blocks = (pairs.mT @ statistics.gram.flatten(-2)).reshape(size, rank, rank, dim, dim)
    system = blocks.transpose(2, 3).reshape(size, rank * dim, rank * dim)
    before = old.mT.flatten(-2)
    missing = (heads.mT @ statistics.moment).flatten(-2) - _times(system, before)
    new = before + _solve(system, missing, ridge)
    basis: Tensor = torch.linalg.qr(new.reshape(size, rank, dim).mT).Q
    return basis


def fit_head(inputs: Tensor, targets: Tensor, basis: Tensor, *, ridge: float = 1e-9) -> Tensor:
    r"""Least squares of the target's sample on a learned basis.

    Args:
        inputs: `(..., n, d)`.
        targets: `(..., n)`.
        basis: `(..., d, k)`.
        ridge: relative to the mean diagonal of the system.

    Returns:
        $\hat w$, `(..., k)`.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> x, y = torch.eye(2), torch.tensor([5.0, 7.0])
        >>> round(fit_head(x, y, torch.tensor([[1.0], [0.0]])).item(), 4)
        5.0
    """
    if targets.shape != inputs.shape[:-1] or inputs.shape[-1] != basis.shape[-2]:
        raise ValueError(
            "inputs (..., n, d), targets (..., n) and basis (..., d, k) must fit, got "
            f"{tuple(inputs.shape)}, {tuple(targets.shape)} and {tuple(basis.shape)}"
        )
    features = inputs @ basis
    return _solve(features.mT @ features, _times(features.mT, targets), ridge)


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _solve(matrix: Tensor, target: Tensor, ridge: float, magnitude: Tensor | None = None) -> Tensor:
    """Solve positive semi-definite systems with a relative ridge; a zero matrix gives zero.

    `magnitude` is the size of what the matrix was computed from, if that is not its own trace:
    rounding is relative to it, and the ridge has to cover the rounding.
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    size = diagonal.sum(-1) if magnitude is None else magnitude
    shift = ridge * diagonal.mean(-1) + 10 * torch.finfo(matrix.dtype).eps * size
    shift = torch.where(shift > 0, shift, 1.0)[..., None, None]
    eye = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    factor = torch.linalg.cholesky_ex(matrix + shift * eye).L
    return torch.cholesky_solve(target.unsqueeze(-1), factor).squeeze(-1)
