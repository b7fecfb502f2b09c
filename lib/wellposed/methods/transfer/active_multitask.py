r"""L1-A-MTRL: sample the source tasks in proportion to a sparse relevance.

Yiping Wang, Yifang Chen, Kevin Jamieson and Simon S. Du, "Improved Active Multi-Task
Representation Learning via Lasso", ICML 2023, arXiv 2306.02556.

Claim: source tasks should be sampled in proportion to the weights of *least L1 norm* that combine
their heads into the target's head. Squared weights of least L2 norm, the earlier rule, can need a
number of samples larger by a factor of the order of the number of tasks.

Tasks share a basis $B\in\mathbb R^{d\times k}$: $y=x^\top Bw_m+\xi$ with noise variance $\sigma^2$.
With heads $W=(w_1,\dots,w_M)$, a target head $w$, and $n_m$ samples from task $m$, the error that
the learned basis carries to the target is at most of the order of

$$\sigma^2dk\sum_m\frac{\nu_m^2}{n_m},\qquad W\nu=w,\qquad
\min_{\nu,\,n:\,\sum n_m=N}\ \sum_m\frac{\nu_m^2}{n_m}=\frac{\|\nu^1\|_1^2}N .$$

Departures from the paper: set-up and bounds are known to us from the abstract and from memory, and
the allocation identities were derived again. The fit sums over all samples, each with the same
weight. What a budget leaves after exploration is split in proportion to the relevance, instead of
by a target accuracy. `design_error` and the instance in `copied_tasks` are ours; the paper's own
construction for its lower bound was not seen.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.data.linear_tasks import Sampler
from wellposed.ops.lasso import lasso
from wellposed.ops.multitask import (
    RepresentationFit,
    TaskStatistics,
    fit_head,
    fit_statistics,
    task_statistics,
)

__all__ = [
    "ActiveResult",
    "Exploration",
    "allocate_samples",
    "collect_from",
    "design_error",
    "excess_risk",
    "exploit",
    "explore",
    "fit_representation",
    "l1_a_mtrl",
    "lasso_relevance",
    "relevance",
    "transfer_error",
]

EXPONENTS = {"l1": 1.0, "l2": 2.0, "uniform": 1.0}  # of each rule's own relevance
SPAN_TOL = 1e-6  # residual above which a target head is no combination of the source heads
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


# --- relevance and allocation --------------------------------------------------------------------


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


# --- fitting -------------------------------------------------------------------------------------


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

    Source: the multi-task objective.

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
        start = _random_basis(inputs[0], rank, generator)
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

    Source: the definition of excess risk.

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
    return (_times(basis, head) - _times(true_basis, true_head)).square().sum(-1)


# --- the algorithm -------------------------------------------------------------------------------


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
        start = None if generator is None else _random_basis(target_inputs, rank, generator)
        phase = explore(collect, x, y, num_tasks=num_tasks, rank=rank, per_task=each, start=start)
        heads = (phase.heads, phase.target_head)
        nu = lasso_relevance(*heads, alpha) if rule == "l1" else relevance(*heads, 2)
    result = exploit(
        collect, x, y, nu, budget=budget, rank=rank, exponent=EXPONENTS[rule], explored=phase
    )
    return ActiveResult(result.basis[0], result.head[0], result.nu[0], result.counts[0])


# --- small pieces --------------------------------------------------------------------------------


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)


def _random_basis(x: Tensor, rank: int, generator: torch.Generator) -> Tensor:
    """Drawn where the generator lives: a CPU generator gives the same on every device."""
    shape = (x.shape[1], rank)
    drawn = torch.randn(shape, generator=generator, dtype=x.dtype, device=generator.device)
    basis: Tensor = torch.linalg.qr(drawn.to(x.device)).Q
    return basis


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
