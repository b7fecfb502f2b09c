"""The plan of a pair of potentials, and the dual that both stages maximize."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from wellposed.ops.sinkhorn import check_marginals, scale_kernel

__all__ = ["lyapunov_potential", "mass_outside", "transport_plan"]

FLOAT32_TOL = 1e-6  # below it, rounding in float32 hides the marginal error


def transport_plan(x: Tensor, y: Tensor, cost: Tensor, eta: float) -> Tensor:
    r"""The plan of a pair of potentials: $P_{ij}=e^{\eta(x_i+y_j-C_{ij})-1}$.

    Args:
        x: potential of the rows, `(n,)`.
        y: potential of the columns, `(m,)`.
        cost: $C$, `(n, m)`.
        eta: inverse weight of the entropy, positive.

    Returns:
        $P$, `(n, m)`; its marginals are right only at the optimum. Differentiable.

    Raises:
        ValueError: shapes do not fit, `eta` out of range.

    Source: section 3.

    Example:
        >>> zero = torch.zeros(1)
        >>> round(transport_plan(zero, zero, torch.zeros(1, 1), eta=2.0).item(), 4)   # 1/e
        0.3679
    """
    _check_shapes(x, y, cost, eta)
    return scale_kernel(-eta * cost - 1, eta * x, eta * y)


def lyapunov_potential(
    x: Tensor, y: Tensor, cost: Tensor, r: Tensor, c: Tensor, eta: float
) -> Tensor:
    r"""The concave dual $f(x,y)=-\frac1\eta\sum_{ij}P_{ij}+r^\top x+c^\top y$.

    Its maximum is the value of the transport problem, entropy included.

    Args:
        x: potential of the rows, `(n,)`.
        y: potential of the columns, `(m,)`.
        cost: $C$, `(n, m)`.
        r: row marginal, `(n,)`.
        c: column marginal, `(m,)`.
        eta: inverse weight of the entropy, positive.

    Returns:
        0-d. Differentiable; the gradient in `x` is $r-P\mathbf 1$.

    Raises:
        ValueError: shapes do not fit, `eta` out of range.

    Source: section 3, equation of the Lyapunov potential.

    Example:
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> x = torch.tensor([0.75])     # then P = e^0 = 1 with eta = 4, C = 1/2
        >>> lyapunov_potential(x, zero, torch.full((1, 1), 0.5), one, one, eta=4.0).item()
        0.5
    """
    plan = transport_plan(x, y, cost, eta)
    if r.shape != x.shape or c.shape != y.shape:
        raise ValueError(f"r and c must fit x and y, got {tuple(r.shape)} and {tuple(c.shape)}")
    return -plan.sum() / eta + r @ x + c @ y


def mass_outside(plan: Tensor, *, sparsity: float) -> Tensor:
    r"""Share of the plan's mass outside its $\lceil\lambda nm\rceil$ largest entries.

    Args:
        plan: $P$, `(n, m)`.
        sparsity: $\lambda\in(0,1]$, the kept fraction of the entries.

    Returns:
        0-d, in $[0, 1]$: what the sparsified Hessian leaves out.

    Raises:
        ValueError: a plan without mass, `sparsity` out of range.

    Source: Definition of $(\lambda,\epsilon)$-sparsity, section 5.

    Example:
        >>> mass_outside(torch.tensor([[0.5, 0.0], [0.125, 0.375]]), sparsity=0.5).item()
        0.125
    """
    kept = torch.topk(plan.flatten(), _num_kept(plan, sparsity), sorted=False).values
    total = plan.sum()
    if not bool(total > 0):
        raise ValueError("plan must have positive mass")
    return 1 - kept.sum() / total


def _num_kept(matrix: Tensor, sparsity: float) -> int:
    if not 0 < sparsity <= 1:
        raise ValueError(f"sparsity must lie in (0, 1], got {sparsity}")
    # The rounding of 2 / n * n * n must not add an entry.
    return min(matrix.numel(), math.ceil(sparsity * matrix.numel() * (1 - 1e-12)))


def _check_shapes(x: Tensor, y: Tensor, cost: Tensor, eta: float) -> None:
    if cost.ndim != 2:
        raise ValueError(f"cost must have shape (n, m), got {tuple(cost.shape)}")
    if x.shape != cost.shape[:1]:
        raise ValueError(f"x must have shape {tuple(cost.shape[:1])}, got {tuple(x.shape)}")
    if y.shape != cost.shape[1:]:
        raise ValueError(f"y must have shape {tuple(cost.shape[1:])}, got {tuple(y.shape)}")
    if not 0 < eta < math.inf:
        raise ValueError(f"eta must be positive and finite, got {eta}")


def _check_problem(cost: Tensor, r: Tensor, c: Tensor, eta: float, tol: float) -> None:
    if cost.ndim != 2:
        raise ValueError(f"cost must have shape (n, m), got {tuple(cost.shape)}")
    check_marginals(cost, r, c)
    if not cost.isfinite().all():
        raise ValueError("cost must be finite in every entry")
    if not 0 < eta < math.inf:
        raise ValueError(f"eta must be positive and finite, got {eta}")
    if not tol >= 0:
        raise ValueError(f"tol must be at least 0, got {tol}")
    if cost.dtype == torch.float32 and 0 < tol < FLOAT32_TOL:
        raise ValueError(f"tol must be at least {FLOAT32_TOL:g} in float32, got {tol:g}")
