"""Sinkhorn's algorithm, one sparse Newton direction, and both stages together."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.methods.transport.sinkhorn_newton.newton import _direction, _newton_stage, _point
from wellposed.methods.transport.sinkhorn_newton.potential import (
    _check_problem,
    _check_shapes,
    _num_kept,
    transport_plan,
)
from wellposed.ops.sinkhorn import marginal_error, sinkhorn_scaling

__all__ = ["SinkhornResult", "sinkhorn", "sinkhorn_newton_sparse", "sparse_newton_direction"]


@dataclass(frozen=True)
class SinkhornResult:
    """What both solvers return; the plan is `(n, m)`."""

    x: Tensor  # (n,)
    y: Tensor  # (m,)
    plan: Tensor  # (n, m)
    marginal_error: Tensor  # 0-d, the sum of both L1 errors of `plan`
    num_sinkhorn: int
    num_newton: int  # accepted Newton steps
    num_cg: int  # conjugate gradient steps in all Newton steps
    errors: Tensor  # (num_sinkhorn + num_newton,), the error after each iteration
    converged: bool


def sinkhorn(
    cost: Tensor,
    r: Tensor,
    c: Tensor,
    eta: float,
    *,
    num_iters: int,
    tol: float = 0.0,
    x: Tensor | None = None,
    y: Tensor | None = None,
    relaxation: float = 1.0,
) -> SinkhornResult:
    r"""Sinkhorn's algorithm, read as alternating maximization of the potential $f$.

    $$x\leftarrow x+\tfrac1\eta(\log r-\log P\mathbf 1),\qquad
    y\leftarrow y+\tfrac1\eta(\log c-\log P^\top\mathbf 1)$$

    Args:
        cost: $C$, `(n, m)`, float32 or float64.
        r: row marginal, `(n,)`, positive.
        c: column marginal, `(m,)`, positive, of the same mass as `r`.
        eta: inverse weight of the entropy, positive.
        num_iters: largest number of iterations; one updates `x`, then `y`.
        tol: stop once the sum of both L1 errors is at most this; 0 never stops early.
        x: where to start, `(n,)`; zeros if not given.
        y: where to start, `(m,)`; zeros if not given.
        relaxation: factor in $(0,2)$ on each update; 1 is Sinkhorn, more over-relaxes.

    Returns:
        A :class:`SinkhornResult` without Newton steps.

    Raises:
        TypeError, ValueError: see :func:`sinkhorn_newton_sparse`.

    Source: Algorithm 1, stage 1; over-relaxation is not in the paper.

    Example:
        >>> half = torch.tensor([0.5, 0.5])
        >>> result = sinkhorn(torch.eye(2), half, half, eta=1.0, num_iters=1)
        >>> f"{result.plan[0, 1]:.4f}"     # 1/2 * e / (1 + e)
        '0.3655'
    """
    _check_problem(cost, r, c, eta, tol)
    found = sinkhorn_scaling(
        -eta * cost - 1,
        r,
        c,
        max_iter=num_iters,
        tol=tol,
        relaxation=relaxation,
        log_u=None if x is None else eta * x,
        log_v=None if y is None else eta * y,
    )
    return SinkhornResult(
        x=found.log_u / eta,
        y=found.log_v / eta,
        plan=found.plan,
        marginal_error=found.marginal_error,
        num_sinkhorn=found.n_iter,
        num_newton=0,
        num_cg=0,
        errors=found.errors,
        converged=found.converged,
    )


@torch.no_grad()
def sparse_newton_direction(
    x: Tensor,
    y: Tensor,
    cost: Tensor,
    r: Tensor,
    c: Tensor,
    eta: float,
    *,
    sparsity: float,
) -> tuple[Tensor, Tensor]:
    r"""Newton's direction with only the largest entries of $P$ in the Hessian.

    $$\eta\begin{pmatrix}\mathrm{diag}(P\mathbf 1)&\tilde P\\
    \tilde P^\top&\mathrm{diag}(P^\top\mathbf 1)\end{pmatrix}
    \binom{\Delta x}{\Delta y}=\binom{r-P\mathbf 1}{c-P^\top\mathbf 1}$$

    $\tilde P$ keeps the $\lceil\lambda nm\rceil$ largest entries of $P$; the diagonals keep the
    sums of the *full* $P$, which makes the matrix positive definite. At $\lambda=1$ it is singular
    along $(\mathbf 1,-\mathbf 1)$ and the solution of least norm is returned.

    Args:
        x: potential of the rows, `(n,)`.
        y: potential of the columns, `(m,)`.
        cost: $C$, `(n, m)`.
        r: row marginal, `(n,)`.
        c: column marginal, `(m,)`.
        eta: inverse weight of the entropy, positive.
        sparsity: $\lambda\in(0,1]$, kept fraction of the entries of $P$.

    Returns:
        $\Delta x$ `(n,)` and $\Delta y$ `(m,)`, solved to a relative residual of 1e-10 in float64
        and 1e-5 in float32.

    Raises:
        TypeError, ValueError: see :func:`sinkhorn_newton_sparse`; also potentials whose plan has a
            row or column without mass, or overflows.

    Source: Algorithm 1, stage 2.

    Example:
        >>> zero, half = torch.zeros(1), torch.full((1,), 0.5)
        >>> cost = -torch.ones(1, 1)     # so P = e^0 = 1, twice the marginals
        >>> dx, dy = sparse_newton_direction(zero, zero, cost, half, half, 1.0, sparsity=1.0)
        >>> dx.item(), dy.item()     # together -1/2, of least norm
        (-0.25, -0.25)
    """
    _check_shapes(x, y, cost, eta)
    _check_problem(cost, r, c, eta, 0.0)
    point = _point(r, c, eta * x, eta * y, transport_plan(x, y, cost, eta))
    sums = torch.cat([point.rows, point.columns])
    if not bool(((sums > 0) & (sums < math.inf)).all()):
        raise ValueError("x and y must give a plan with finite mass in each row and column")
    tol = 1e-10 if cost.dtype == torch.float64 else 1e-5
    keep = _num_kept(cost, sparsity)
    du, dv, _ = _direction(point, r, c, keep=keep, tol=tol, damping=0.0)
    return du / eta, dv / eta


@torch.no_grad()
def sinkhorn_newton_sparse(
    cost: Tensor,
    r: Tensor,
    c: Tensor,
    eta: float,
    *,
    sinkhorn_iters: int = 20,
    newton_iters: int = 50,
    sparsity: float | None = None,
    tol: float = 1e-12,
) -> SinkhornResult:
    r"""Sinkhorn-Newton-Sparse (SNS): warm up with Sinkhorn, finish with sparse Newton steps.

    Each Newton step takes :func:`sparse_newton_direction` and halves its length until the
    potential $f$ rises enough. It stops once the marginal error is at most `tol`, or rounding
    hides all progress.

    Args:
        cost: $C$, `(n, m)`, float32 or float64 (recommended).
        r: row marginal, `(n,)`, positive.
        c: column marginal, `(m,)`, positive, of the same mass as `r`.
        eta: inverse weight of the entropy, positive.
        sinkhorn_iters: $N_1$, sweeps of the warm-up.
        newton_iters: $N_2$, largest number of Newton steps.
        sparsity: $\lambda\in(0,1]$, kept fraction of the entries of $P$ (1 is Newton's method);
            $2/\max(n,m)$ if not given.
        tol: sum of both L1 errors to stop at.

    Returns:
        A :class:`SinkhornResult`; a RuntimeWarning if it did not converge.

    Raises:
        TypeError: `cost` is neither float32 nor float64, or the dtypes differ.
        ValueError: shapes do not fit, marginals that are not positive or differ in mass, entries
            of `cost` that are not finite, `eta`, `sparsity`, `tol` or a number of iterations out
            of range, `tol` below 1e-6 in float32.

    Source: Algorithm 1.

    Example:
        >>> half = torch.tensor([0.5, 0.5], dtype=torch.float64)
        >>> cost = torch.eye(2, dtype=torch.float64)
        >>> result = sinkhorn_newton_sparse(cost, half, half, eta=1.0)
        >>> f"{result.plan[0, 1]:.4f}"     # 1/2 * e / (1 + e)
        '0.3655'
    """
    _check_problem(cost, r, c, eta, tol)
    if newton_iters < 0:
        raise ValueError(f"newton_iters must be at least 0, got {newton_iters}")
    keep = _num_kept(cost, min(1.0, 2 / max(cost.shape)) if sparsity is None else sparsity)
    warm = sinkhorn(cost, r, c, eta, num_iters=sinkhorn_iters, tol=tol)
    start = _point(r, c, eta * warm.x, eta * warm.y, warm.plan)
    point, errors, num_cg = _newton_stage(
        -eta * cost - 1, r, c, start, keep=keep, max_iter=newton_iters, tol=tol
    )
    if point.error > tol:
        warnings.warn(
            f"sinkhorn_newton_sparse stopped at error {point.error:.1e} > tol={tol:.1e} after "
            f"{len(errors)} Newton steps; a larger sparsity or newton_iters may help",
            RuntimeWarning,
            stacklevel=2,
        )
    return SinkhornResult(
        x=point.u / eta,
        y=point.v / eta,
        plan=point.plan,
        marginal_error=marginal_error(point.plan, r, c),
        num_sinkhorn=warm.num_sinkhorn,
        num_newton=len(errors),
        num_cg=num_cg,
        errors=torch.cat([warm.errors, warm.errors.new_tensor(errors)]),
        converged=point.error <= tol,
    )
