"""The algorithm: explore all sources alike, then sample them by relevance."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.data.linear_tasks import Sampler
from wellposed.methods.transfer.active_multitask.allocation import (
    allocate_samples,
    lasso_relevance,
    relevance,
)
from wellposed.ops.multitask import TaskStatistics, fit_head, fit_statistics, task_statistics
from wellposed.ops.shared_representation import random_basis

__all__ = ["ActiveResult", "Exploration", "collect_from", "exploit", "explore", "l1_a_mtrl"]

EXPONENTS = {"l1": 1.0, "l2": 2.0, "uniform": 1.0}  # of each rule's own relevance
PHASE_TOL = 1e-4  # at which a fit inside the algorithm stops, far below its statistical error

Collector = Callable[[Tensor], TaskStatistics]  # counts (b, M) -> statistics of new samples


@dataclass(frozen=True)
class Exploration:
    """What the first phase knows: its samples, and heads that share one basis."""

    statistics: TaskStatistics
    basis: Tensor  # (..., d, k)
    heads: Tensor  # (..., k, M)
    target_head: Tensor  # (..., k)


@dataclass(frozen=True)
class ActiveResult:
    """What the target gets: it predicts `x @ basis @ head`."""

    basis: Tensor  # (..., d, k)
    head: Tensor  # (..., k)
    nu: Tensor  # (..., M), the relevance that set the counts
    counts: Tensor  # (..., M), int64, exploration included


def collect_from(samplers: Sequence[Sampler]) -> Collector:
    r"""Sample sources for many problems side by side, and keep the sums that fits need.

    Args:
        samplers: one a problem; `sampler(task, n)` gives inputs `(n, d)` and targets `(n,)`.

    Returns:
        A function from counts `(b, M)`, one row a sampler, to their :class:`TaskStatistics`.

    Raises:
        ValueError: no sampler; later, counts with another number of rows.

    Source: ours.

    Example:
        >>> collect = collect_from([lambda task, n: (torch.ones(n, 1), torch.ones(n))])
        >>> collect(torch.tensor([[2, 0]])).gram.flatten().tolist()
        [2.0, 0.0]
    """
    if not samplers:
        raise ValueError("samplers must hold at least one sampler")

    def collect(counts: Tensor) -> TaskStatistics:
        if counts.ndim != 2 or len(counts) != len(samplers):
            raise ValueError(
                f"counts must have shape ({len(samplers)}, M), got {tuple(counts.shape)}"
            )
        parts = []
        for sampler, row in zip(samplers, counts.tolist(), strict=True):
            used = [m for m, n in enumerate(row) if n] or [0]
            drawn = [sampler(m, row[m]) for m in used]
            found = task_statistics([x for x, _ in drawn], [y for _, y in drawn])
            gram = found.gram.new_zeros(len(row), *found.gram.shape[1:])
            moment = found.moment.new_zeros(len(row), found.moment.shape[1])
            gram[used], moment[used] = found.gram, found.moment
            parts.append((gram, moment))
        return TaskStatistics(
            torch.stack([gram for gram, _ in parts]),
            torch.stack([moment for _, moment in parts]),
            counts.to(parts[0][0].device),
        )

    return collect


def explore(
    collect: Collector,
    inputs: Tensor,
    targets: Tensor,
    *,
    num_tasks: int,
    rank: int,
    per_task: int,
    steps: int = 200,
    start: Tensor | None = None,
) -> Exploration:
    r"""Phase 1: sample every source equally, fit, and fit the target's head on the same basis.

    Source and target heads then live in the same coordinates, so that relevance can be computed
    from them; a rotation of the basis would not change it.

    Args:
        collect: gives the statistics of new source samples.
        inputs: of the target, `(b, n, d)`.
        targets: of the target, `(b, n)`.
        num_tasks: M.
        rank: $k$.
        per_task: samples of each source, at least 1.
        steps: largest number of sweeps of the fit.
        start: basis to start the fit from, `(d, k)`; if not given, it starts spectral.

    Returns:
        An :class:`Exploration`.

    Raises:
        ValueError: `per_task` below 1, or shapes that do not fit.

    Source: phase 1 of the algorithm for unknown relevance.

    Example:
        >>> collect = collect_from([lambda task, n: (torch.ones(n, 1), (task + 1) * torch.ones(n))])
        >>> x, y = torch.ones(1, 1, 1), torch.full((1, 1), 3.0)
        >>> found = explore(collect, x, y, num_tasks=2, rank=1, per_task=4)
        >>> [round(v, 4) for v in lasso_relevance(found.heads, found.target_head, 0.5)[0].tolist()]
        [0.0, 1.375]
    """
    if per_task < 1:
        raise ValueError(f"per_task must be at least 1, got {per_task}")
    counts = torch.full((len(inputs), num_tasks), per_task, device=inputs.device)
    statistics = collect(counts)
    fit = fit_statistics(statistics, rank, steps=steps, tol=PHASE_TOL, start=start)
    head = fit_head(inputs, targets, fit.basis)
    return Exploration(statistics, fit.basis, fit.heads, head)


def exploit(
    collect: Collector,
    inputs: Tensor,
    targets: Tensor,
    nu: Tensor,
    *,
    budget: int,
    rank: int,
    exponent: float = 1.0,
    explored: Exploration | None = None,
    steps: int = 200,
) -> ActiveResult:
    r"""Phase 2: sample the sources by relevance, refit on everything, fit the target's head.

    Args:
        collect: gives the statistics of new source samples.
        inputs: of the target, `(b, n, d)`.
        targets: of the target, `(b, n)`.
        nu: relevance, `(b, M)`, true or estimated.
        budget: source samples in all, those of phase 1 included.
        rank: $k$.
        exponent: see :func:`allocate_samples`.
        explored: phase 1; without it the relevance is taken as known.
        steps: largest number of sweeps of the fit.

    Returns:
        An :class:`ActiveResult`.

    Raises:
        ValueError: see :func:`allocate_samples`.

    Source: phase 2 of the algorithm, and the algorithm for known relevance.

    Example:
        >>> collect = collect_from([lambda task, n: (torch.ones(n, 1), (task + 1) * torch.ones(n))])
        >>> x, y, nu = torch.ones(1, 1, 1), torch.full((1, 1), 3.0), torch.tensor([[1.0, 3.0]])
        >>> exploit(collect, x, y, nu, budget=8, rank=1).counts.tolist()
        [[2, 6]]
    """
    if explored is None:
        counts = allocate_samples(nu, budget, exponent)
        statistics, start = collect(counts), None
    else:
        seen = explored.statistics.counts
        counts = allocate_samples(nu, budget, exponent, int(seen.flatten()[0])).to(seen.device)
        statistics, start = explored.statistics + collect(counts - seen), explored.basis
    fit = fit_statistics(statistics, rank, steps=steps, tol=PHASE_TOL, start=start)
    return ActiveResult(fit.basis, fit_head(inputs, targets, fit.basis), nu, counts)


def l1_a_mtrl(
    sample_source: Sampler,
    target_inputs: Tensor,
    target_targets: Tensor,
    *,
    num_tasks: int,
    rank: int,
    budget: int,
    exploration: float = 0.25,
    alpha: float = 0.05,
    rule: str = "l1",
    generator: torch.Generator | None = None,
) -> ActiveResult:
    r"""Active multi-task representation learning with unknown relevance, in two phases.

    Args:
        sample_source: `sample_source(task, n)` gives inputs `(n, d)` and targets `(n,)`.
        target_inputs: `(n, d)`.
        target_targets: `(n,)`.
        num_tasks: M, source tasks.
        rank: $k$.
        budget: $N$, source samples in both phases together.
        exploration: share of the budget for phase 1, in (0, 1); all tasks get the same.
        alpha: strength of the Lasso, positive; for the rule `l1`.
        rule: `l1` samples in proportion to the Lasso's weights, `l2` to the squared weights of
            least L2 norm, `uniform` samples all sources equally in a single phase.
        generator: source of a random start of the first fit; if not given, it is spectral.

    Returns:
        An :class:`ActiveResult` without a leading axis; `nu` is $1/M$ throughout for `uniform`.

    Raises:
        ValueError: an argument out of range, a budget that leaves a source without exploration, or
            a Lasso that finds no relevant source.

    Source: L1-A-MTRL, the algorithm for unknown relevance.

    Example:
        >>> def sample_source(task, n):
        ...     x = torch.linspace(-1, 1, n)[:, None]
        ...     return x, (task + 1) * x[:, 0]
        >>> x = torch.ones(4, 1)
        >>> found = l1_a_mtrl(sample_source, x, 3 * x[:, 0], num_tasks=2, rank=1, budget=40)
        >>> found.counts.tolist(), round((found.basis @ found.head).item(), 4)
        ([5, 35], 3.0)
    """
    if rule not in EXPONENTS:
        raise ValueError(f"rule must be one of {', '.join(EXPONENTS)}, got {rule!r}")
    if not 0 < exploration < 1:
        raise ValueError(f"exploration must lie in (0, 1), got {exploration}")
    if target_inputs.ndim != 2 or target_targets.shape != target_inputs.shape[:1]:
        raise ValueError(
            "target_inputs must be (n, d) and target_targets (n,), got "
            f"{tuple(target_inputs.shape)} and {tuple(target_targets.shape)}"
        )
    collect = collect_from([sample_source])
    x, y = target_inputs.unsqueeze(0), target_targets.unsqueeze(0)
    phase, nu = None, x.new_full((1, num_tasks), 1 / num_tasks)
    if rule != "uniform":
        each = int(exploration * budget / num_tasks)
        start = None if generator is None else random_basis(target_inputs, rank, generator)
        phase = explore(collect, x, y, num_tasks=num_tasks, rank=rank, per_task=each, start=start)
        heads = (phase.heads, phase.target_head)
        nu = lasso_relevance(*heads, alpha) if rule == "l1" else relevance(*heads, 2)
    result = exploit(
        collect, x, y, nu, budget=budget, rank=rank, exponent=EXPONENTS[rule], explored=phase
    )
    return ActiveResult(result.basis[0], result.head[0], result.nu[0], result.counts[0])
