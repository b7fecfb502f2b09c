r"""Scaling a positive matrix to given marginals: the Sinkhorn iteration, batched and stable.

Given $K>0$ and marginals $r, c$ of equal mass, find $u, v>0$ such that the *plan*
$P=\mathrm{diag}(u)\,K\,\mathrm{diag}(v)$ has row sums $r$ and column sums $c$. One sweep sets
$u\leftarrow r/(Kv)$ and then $v\leftarrow c/(K^\top u)$. Everything is passed and returned as
logarithms, so $K=e^{-\eta C}$ may span thousands of orders of magnitude.

Logarithms are needed for safety, not for every sweep. After one sweep in logarithms the plan
itself is a harmless kernel (no entry above the mass, no empty row), and scaling *it* by factors
near one needs two matrix-vector products a sweep instead of two passes of exponentials. The
factors are folded back into $\log u, \log v$ before they grow large enough for an entry that was
flushed to zero to matter. The iterates are those of the textbook iteration.

Source: Cuturi, "Sinkhorn Distances", NeurIPS 2013; folding back ("absorption"): Schmitzer,
"Stabilized Sparse Scaling Algorithms", SIAM J. Sci. Comput. 2019, section 3.1; over-relaxation:
Thibault, Chizat, Dossal and Papadakis, "Overrelaxed Sinkhorn-Knopp Algorithm", Algorithms 2021.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "ScalingResult",
    "check_marginals",
    "log_sweep",
    "marginal_error",
    "scale_kernel",
    "sinkhorn_scaling",
]

CHUNK = 10  # sweeps between two looks at the error: one host synchronization each


@dataclass(frozen=True)
class ScalingResult:
    """Result of :func:`sinkhorn_scaling`; shapes for `log_kernel` of shape `(..., n, m)`."""

    log_u: Tensor  # (..., n)
    log_v: Tensor  # (..., m)
    plan: Tensor  # (..., n, m)
    marginal_error: Tensor  # (...), recomputed from `plan`
    errors: Tensor  # (n_iter, ...), the error after each sweep
    n_iter: int
    converged: bool  # every batch element reached `tol`


def check_marginals(matrix: Tensor, r: Tensor, c: Tensor, *, name: str = "cost") -> None:
    """Raise unless `r` and `c` are positive marginals of equal mass that fit `matrix`.

    Args:
        matrix: `(..., n, m)`, float32 or float64.
        r: row marginal, `(..., n)`, same dtype.
        c: column marginal, `(..., m)`, same dtype.
        name: what the error message calls `matrix`.

    Raises:
        TypeError: `matrix` is neither float32 nor float64, or the dtypes differ.
        ValueError: shapes do not fit, a marginal is not positive and finite, masses differ.

    Example:
        >>> check_marginals(torch.zeros(1, 2), torch.tensor([1.0]), torch.tensor([0.5, 0.25]))
        Traceback (most recent call last):
        ...
        ValueError: r and c must have equal mass, got 1 and 0.75
    """
    if matrix.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} must be float32 or float64, got {matrix.dtype}")
    if not r.dtype == c.dtype == matrix.dtype:
        raise TypeError(
            f"{name}, r and c must share a dtype, got {matrix.dtype}, {r.dtype}, {c.dtype}"
        )
    if matrix.ndim < 2 or 0 in matrix.shape:
        raise ValueError(
            f"{name} must have shape (..., n, m), not empty, got {tuple(matrix.shape)}"
        )
    if r.shape != matrix.shape[:-1]:
        raise ValueError(f"r must have shape {tuple(matrix.shape[:-1])}, got {tuple(r.shape)}")
    if c.shape != matrix.shape[:-2] + matrix.shape[-1:]:
        expected = tuple(matrix.shape[:-2] + matrix.shape[-1:])
        raise ValueError(f"c must have shape {expected}, got {tuple(c.shape)}")
    for label, marginal in (("r", r), ("c", c)):
        if not ((marginal > 0) & (marginal < math.inf)).all():
            raise ValueError(f"{label} must be positive and finite in every entry")
    mass_r, mass_c = r.sum(-1), c.sum(-1)
    gap = ((mass_r - mass_c).abs() / mass_r).flatten()
    worst = int(gap.argmax())
    if float(gap[worst]) > math.sqrt(torch.finfo(r.dtype).eps):
        values = float(mass_r.flatten()[worst]), float(mass_c.flatten()[worst])
        raise ValueError(f"r and c must have equal mass, got {values[0]:g} and {values[1]:g}")


def marginal_error(plan: Tensor, r: Tensor, c: Tensor) -> Tensor:
    r"""How far a plan is from its marginals: $\|P\mathbf 1-r\|_1+\|P^\top\mathbf 1-c\|_1$.

    Args:
        plan: `(..., n, m)`.
        r: row marginal, `(..., n)`.
        c: column marginal, `(..., m)`.

    Returns:
        Shape `(...)`, at least zero. Differentiable.

    Raises:
        RuntimeError: from torch, where shapes do not fit.

    Example:
        >>> plan = torch.tensor([[0.5, 0.0], [0.25, 0.25]])
        >>> marginal_error(plan, torch.tensor([0.5, 0.5]), torch.tensor([0.5, 0.5])).item()
        0.5
    """
    return (plan.sum(-1) - r).abs().sum(-1) + (plan.sum(-2) - c).abs().sum(-1)


def _floor(dtype: torch.dtype) -> float:
    """Exponents below this count as minus infinity: exp is slow near and below the smallest float.

    Subnormal numbers slow down exp fourfold and products twofold on a CPU, and mean nothing here.
    """
    return 0.9 * math.log(torch.finfo(dtype).tiny)


def _logsumexp(exponent: Tensor, dim: int) -> Tensor:
    top = exponent.detach().amax(dim, keepdim=True)
    top = top.clamp(min=torch.finfo(top.dtype).min)  # also where all are minus infinity
    shifted = (exponent - top).clamp(min=_floor(exponent.dtype))
    return shifted.exp().sum(dim).log() + top.squeeze(dim)


def scale_kernel(log_kernel: Tensor, log_u: Tensor, log_v: Tensor) -> Tensor:
    r"""The plan $P_{ij}=e^{\log u_i+\log K_{ij}+\log v_j}$.

    Entries below about 1e-277 (1e-35 in float32) become exact zeros, which is several times
    faster than carrying subnormal numbers along.

    Args:
        log_kernel: $\log K$, `(..., n, m)`.
        log_u: `(..., n)`.
        log_v: `(..., m)`.

    Returns:
        $P$, `(..., n, m)`. Differentiable.

    Raises:
        RuntimeError: from torch, where shapes do not fit.

    Example:
        >>> zero = torch.zeros(1)
        >>> scale_kernel(torch.full((1, 1), -2000.0), zero + 2000, zero).item()
        1.0
    """
    floor = _floor(log_kernel.dtype)
    exponent = (log_kernel + log_u.unsqueeze(-1)).add_(log_v.unsqueeze(-2))
    return torch.threshold(exponent.clamp_(min=floor).exp_(), math.exp(floor) * 1.001, 0.0)


def log_sweep(
    log_kernel: Tensor,
    log_r: Tensor,
    log_c: Tensor,
    log_u: Tensor,
    log_v: Tensor,
    *,
    relaxation: float = 1.0,
) -> tuple[Tensor, Tensor]:
    r"""One Sinkhorn sweep in logarithms, first the rows, then the columns.

    $$\log u\leftarrow(1-\omega)\log u+\omega\,(\log r-\mathrm{LSE}_j(\log K_{ij}+\log v_j))$$

    and the same for $v$ with the new $u$. Differentiable: a loop over it is the unrolled
    Sinkhorn layer. :func:`sinkhorn_scaling` is faster where no gradient is needed.

    Args:
        log_kernel: $\log K$, `(..., n, m)`; `-inf` forbids a pair.
        log_r: `(..., n)`.
        log_c: `(..., m)`.
        log_u: current scaling of the rows, `(..., n)`; without effect at `relaxation=1`.
        log_v: current scaling of the columns, `(..., m)`.
        relaxation: $\omega$; 1 is Sinkhorn, between 1 and 2 over-relaxes.

    Returns:
        New `log_u` and `log_v`.

    Raises:
        RuntimeError: from torch, where shapes do not fit. IndexError: where they are empty.

    Example:
        >>> zero = torch.zeros(2)
        >>> log_u, log_v = log_sweep(torch.zeros(2, 2), zero, zero, zero, zero)
        >>> (log_u[:, None] + log_v).exp().tolist()
        [[0.5, 0.5], [0.5, 0.5]]
    """
    target = log_r - _logsumexp(log_kernel + log_v.unsqueeze(-2), -1)
    log_u = torch.lerp(log_u, target, relaxation) if relaxation != 1.0 else target
    target = log_c - _logsumexp(log_kernel + log_u.unsqueeze(-1), -2)
    log_v = torch.lerp(log_v, target, relaxation) if relaxation != 1.0 else target
    return log_u, log_v


def _log_sweeps(
    log_kernel: Tensor, r: Tensor, c: Tensor, log_u: Tensor, log_v: Tensor, steps: int, omega: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Always safe, slow: returns the potentials and the error after each of `steps` sweeps."""
    errors = []
    for _ in range(steps):
        log_u, log_v = log_sweep(log_kernel, r.log(), c.log(), log_u, log_v, relaxation=omega)
        errors.append(marginal_error(scale_kernel(log_kernel, log_u, log_v), r, c))
    return log_u, log_v, torch.stack(errors)


def _factor_sweeps(
    kernel: Tensor, r: Tensor, c: Tensor, a: Tensor, b: Tensor, steps: int, omega: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Fast: two products a sweep. The error is free, as the next sweep needs the same row sums."""
    errors = []
    rows = (kernel @ b.unsqueeze(-1)).squeeze(-1)
    for _ in range(steps):
        a = r / rows if omega == 1.0 else a * (r / (a * rows)) ** omega
        columns = (a.unsqueeze(-2) @ kernel).squeeze(-2)
        b = c / columns if omega == 1.0 else b * (c / (b * columns)) ** omega
        rows = (kernel @ b.unsqueeze(-1)).squeeze(-1)
        error = (a * rows - r).abs().sum(-1)
        if omega != 1.0:  # a plain sweep ends with exact column sums
            error = error + (b * columns - c).abs().sum(-1)
        errors.append(error)
    return a, b, torch.stack(errors)


def _largest_log(a: Tensor, b: Tensor) -> float:
    return float(torch.maximum(a.log().abs().max(), b.log().abs().max()))


def _first_at_most(errors: Tensor, tol: float) -> int | None:
    """Index of the first sweep after which the whole batch is within `tol`."""
    worst = errors.flatten(1).amax(1).tolist() if errors.ndim > 1 else errors.tolist()
    return next((t for t, error in enumerate(worst) if error <= tol), None)


@torch.no_grad()
def sinkhorn_scaling(
    log_kernel: Tensor,
    r: Tensor,
    c: Tensor,
    *,
    max_iter: int = 1000,
    tol: float = 0.0,
    relaxation: float = 1.0,
    log_u: Tensor | None = None,
    log_v: Tensor | None = None,
) -> ScalingResult:
    r"""Scale $e^{\log K}$ to the marginals `r` and `c` by Sinkhorn sweeps.

    $$P_{ij}=e^{\log u_i+\log K_{ij}+\log v_j},\qquad P\mathbf 1=r,\quad P^\top\mathbf 1=c$$

    It stops after the first sweep whose error (see :func:`marginal_error`) is at most `tol` in
    the whole batch. It records no gradient (see :func:`log_sweep`), and whether it converged is
    a field of the result, not a warning: callers decide whether running out of sweeps matters.

    Args:
        log_kernel: $\log K$, `(..., n, m)`, float32 or float64; `-inf` forbids a pair.
        r: row marginal, `(..., n)`, positive.
        c: column marginal, `(..., m)`, positive, of the same mass as `r`.
        max_iter: largest number of sweeps, at least 0.
        tol: error to stop at; 0 never stops early.
        relaxation: exponent $\omega\in(0,2)$ of each update; 1 is Sinkhorn.
        log_u: where to start, `(..., n)`; zeros if not given.
        log_v: where to start, `(..., m)`; zeros if not given.

    Returns:
        A :class:`ScalingResult`.

    Raises:
        TypeError, ValueError: bad marginals, see :func:`check_marginals`; NaN in `log_kernel`;
            `max_iter`, `tol` or `relaxation` out of range.

    Example:
        >>> half = torch.tensor([0.5, 0.5])
        >>> result = sinkhorn_scaling(torch.tensor([[0.0, 1.0], [1.0, 0.0]]), half, half, tol=1e-6)
        >>> result.n_iter, f"{result.plan[0, 1]:.4f}"     # 1/2 * e / (1 + e)
        (1, '0.3655')
    """
    check_marginals(log_kernel, r, c, name="log_kernel")
    if log_kernel.isnan().any():
        raise ValueError("log_kernel must not contain NaN")
    if max_iter < 0:
        raise ValueError(f"max_iter must be at least 0, got {max_iter}")
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}")
    if not 0 < relaxation < 2:
        raise ValueError(f"relaxation must lie in (0, 2), got {relaxation}")
    warm = log_u is not None or log_v is not None
    log_u = torch.zeros_like(r) if log_u is None else log_u
    log_v = torch.zeros_like(c) if log_v is None else log_v
    plan = scale_kernel(log_kernel, log_u, log_v) if warm or max_iter == 0 else log_kernel
    history: list[Tensor] = []
    n_iter = 0
    done = warm and tol > 0 and bool((marginal_error(plan, r, c) <= tol).all())
    limit = -math.log(torch.finfo(r.dtype).tiny) / 8  # flushed entries stay below tiny ** 0.5
    one_u, one_v = torch.ones_like(r), torch.ones_like(c)
    a, b = one_u, one_v  # the plan so far is diag(a) plan diag(b)
    while n_iter < max_iter and not done:
        if n_iter == 0:  # only logarithms can tame the raw kernel
            steps, hit, growth = 1, None, math.inf
        else:
            steps = min(CHUNK, max_iter - n_iter)
            new_a, new_b, errors = _factor_sweeps(plan, r, c, a, b, steps, relaxation)
            hit = _first_at_most(errors, tol) if tol > 0 else None
            if hit is not None and hit + 1 < steps:  # repeat the chunk up to the very sweep
                steps = hit + 1
                new_a, new_b, errors = _factor_sweeps(plan, r, c, a, b, steps, relaxation)
            growth = _largest_log(new_a, new_b)
        if growth <= 2 * limit:
            a, b = new_a, new_b
        else:  # the first sweep, huge factors or NaN: sweep in logarithms instead
            log_u, log_v = log_u + a.log(), log_v + b.log()
            log_u, log_v, errors = _log_sweeps(log_kernel, r, c, log_u, log_v, steps, relaxation)
            a, b = one_u, one_v
        n_iter += steps
        history.append(errors)
        if hit is not None or not growth <= limit or n_iter == max_iter:  # fold the factors back
            log_u, log_v = log_u + a.log(), log_v + b.log()
            a, b = one_u, one_v
            plan = scale_kernel(log_kernel, log_u, log_v)
            done = tol > 0 and bool((marginal_error(plan, r, c) <= tol).all())
    error = marginal_error(plan, r, c)
    trace = torch.cat(history) if history else error.new_zeros((0, *error.shape))
    return ScalingResult(log_u, log_v, plan, error, trace, n_iter, done)
