"""One representation for many tasks: a fit to raw samples, a random start, and the risk."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from wellposed.ops.multitask import RepresentationFit, fit_statistics, task_statistics

__all__ = ["excess_risk", "fit_representation", "random_basis"]


def fit_representation(
    inputs: Sequence[Tensor],
    targets: Sequence[Tensor],
    rank: int,
    *,
    steps: int = 200,
    ridge: float = 1e-9,
    generator: torch.Generator | None = None,
) -> RepresentationFit:
    r"""Fit a shared basis and heads to the samples of M tasks; see :func:`fit_statistics`.

    Args:
        inputs: `(n_m, d)` for every task; a task may be empty.
        targets: `(n_m,)` for every task.
        rank: $k$, from 1 to $d$.
        steps: largest number of sweeps.
        ridge: relative to the mean diagonal of each system.
        generator: source of a random start; if not given, the start is spectral.

    Returns:
        A :class:`RepresentationFit` without leading axes.

    Raises:
        ValueError: no task, shapes that do not fit, an argument out of range.

    Source: the multi-task objective, as in Wang et al., "Improved Active Multi-Task
    Representation Learning via Lasso", arXiv:2306.02556.

    Example:
        >>> x = torch.eye(2)
        >>> fit = fit_representation([x, x], [x @ torch.tensor([3.0, 4.0])] * 2, rank=1)
        >>> [round(v, 4) for v in (fit.basis @ fit.heads)[:, 0].tolist()]
        [3.0, 4.0]
    """
    if not inputs or len(inputs) != len(targets):
        raise ValueError(
            f"inputs and targets must list the same tasks, got {len(inputs)} and {len(targets)}"
        )
    statistics, start = task_statistics(inputs, targets), None
    if generator is not None:
        start = random_basis(inputs[0], rank, generator)
    return fit_statistics(statistics, rank, steps=steps, ridge=ridge, start=start)


def excess_risk(basis: Tensor, head: Tensor, true_basis: Tensor, true_head: Tensor) -> Tensor:
    r"""Squared error beyond the noise for isotropic inputs, $\|\hat B\hat w-Bw\|^2$.

    Args:
        basis: `(..., d, k)`; it may have another number of columns than `true_basis`.
        head: `(..., k)`.
        true_basis: `(..., d, k)`.
        true_head: `(..., k)`.

    Returns:
        `(...)`.

    Raises:
        ValueError: shapes do not fit.

    Source: the definition of excess risk, as in Wang et al., arXiv:2306.02556.

    Example:
        >>> one = torch.ones(1)
        >>> excess_risk(torch.eye(2)[:, :1], 3 * one, torch.eye(2)[:, 1:], 4 * one).item()
        25.0
    """
    if min(basis.ndim, true_basis.ndim) < 2 or basis.shape[-2] != true_basis.shape[-2]:
        raise ValueError(
            "basis and true_basis must have the same number of rows, got "
            f"{tuple(basis.shape)} and {tuple(true_basis.shape)}"
        )
    if basis.shape[-1:] != head.shape[-1:] or true_basis.shape[-1:] != true_head.shape[-1:]:
        raise ValueError(
            "head and true_head must have an entry for each column of their bases, got "
            f"{tuple(head.shape)} and {tuple(true_head.shape)}"
        )
    apart = basis @ head.unsqueeze(-1) - true_basis @ true_head.unsqueeze(-1)
    return apart.square().sum((-2, -1))


def random_basis(x: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Orthonormal columns in a random direction.

    Drawn where the generator lives: a CPU generator gives the same on every device.

    Args:
        x: inputs `(n, d)`; only their width, dtype and device count.
        rank: $k$, columns; of more than $d$ there are $d$.
        generator: source of the columns.

    Returns:
        Basis `(d, k)`.

    Source: ours, where to start a fit other than from a spectral start.

    Example:
        >>> basis = random_basis(torch.zeros(4, 3), 2, torch.Generator().manual_seed(0))
        >>> (basis.mT @ basis).round().tolist()
        [[1.0, 0.0], [0.0, 1.0]]
    """
    shape = (x.shape[1], rank)
    drawn = torch.randn(shape, generator=generator, dtype=x.dtype, device=generator.device)
    basis: Tensor = torch.linalg.qr(drawn.to(x.device)).Q
    return basis
