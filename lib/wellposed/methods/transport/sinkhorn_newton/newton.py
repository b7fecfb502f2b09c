"""Newton steps with a sparsified Hessian: direction, conjugate gradients, line search."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.ops.sinkhorn import scale_kernel

ARMIJO = 1e-4  # fraction of the predicted gain that a step must deliver
DAMPING = 50  # in units of rounding: without it, a plan in separate blocks gives no ascent
MAX_HALVINGS = 30
CG_CHECK = 5  # conjugate gradient steps between two looks at the residual

MatVec = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class _Point:
    r"""A pair of scaled potentials $(u,v)=\eta(x,y)$ and all that one pass over its plan gives."""

    u: Tensor
    v: Tensor
    plan: Tensor
    rows: Tensor  # row sums of the plan
    columns: Tensor
    error: float


def _point(r: Tensor, c: Tensor, u: Tensor, v: Tensor, plan: Tensor) -> _Point:
    rows, columns = plan.sum(1), plan.sum(0)
    error = (rows - r).abs().sum() + (columns - c).abs().sum()
    return _Point(u, v, plan, rows, columns, float(error))


def _newton_stage(
    log_kernel: Tensor,
    r: Tensor,
    c: Tensor,
    point: _Point,
    *,
    keep: int,
    max_iter: int,
    tol: float,
) -> tuple[_Point, list[float], int]:
    """Newton steps until the error is `tol`; also the error after each, and all CG steps."""
    spread = max(1.0, float(log_kernel.max() - log_kernel.min()))
    damping = DAMPING * torch.finfo(r.dtype).eps
    errors: list[float] = []
    num_cg = 0
    while point.error > tol and len(errors) < max_iter:
        forcing = min(0.1, math.sqrt(point.error))  # solve loosely while far away
        du, dv, steps = _direction(point, r, c, keep=keep, tol=forcing, damping=damping)
        num_cg += steps
        better = _line_search(log_kernel, r, c, point, du, dv, spread)
        if better is None:  # rounding hides all progress
            break
        point = better
        errors.append(point.error)
    return point, errors, num_cg


def _direction(
    point: _Point, r: Tensor, c: Tensor, *, keep: int, tol: float, damping: float
) -> tuple[Tensor, Tensor, int]:
    r"""Newton's direction for $(u,v)=\eta(x,y)$ and the number of conjugate gradient steps.

    Row sums $a$, column sums $b$ and $Q=\mathrm{diag}(a)^{-1/2}\,\tilde P\,\mathrm{diag}(b)^{-1/2}$
    turn the system into one with ones on the diagonal. Its first row gives $\Delta u$ once
    $\Delta v$ is known; what remains is $(I-Q^\top Q)\,w=b^{-1/2}g_y-Q^\top a^{-1/2}g_x$ with
    $w=b^{1/2}\Delta v$. The $b$ in it is multiplied by one plus `damping`.
    """
    root_a = point.rows.sqrt()
    root_b = (point.columns * (1 + damping)).sqrt()
    g_x, g_y = r - point.rows, c - point.columns
    times, transposed_times = _normalized(point.plan, root_a, root_b, keep)
    target = g_y / root_b - transposed_times(g_x / root_a)
    norm = (g_x @ g_x + g_y @ g_y).sqrt()
    w, steps = _conjugate_gradients(
        lambda p: p - transposed_times(times(p)), target, root_b, tol * norm
    )
    du, dv = (g_x / root_a - times(w)) / root_a, w / root_b
    if keep == point.plan.numel():  # the full Hessian does not see (1, -1): take it out
        shift = (dv.sum() - du.sum()) / (len(du) + len(dv))
        du, dv = du + shift, dv - shift
    return du, dv, steps


def _normalized(plan: Tensor, root_a: Tensor, root_b: Tensor, keep: int) -> tuple[MatVec, MatVec]:
    """Products with the `keep` largest entries of the plan, scaled to Q, and its transpose."""
    n, m = plan.shape
    if keep == plan.numel():
        full = plan / root_a[:, None] / root_b
        return full.mv, full.t().mv
    entries = plan.reshape(-1)
    index = torch.topk(entries, keep, sorted=False).indices.sort().values
    rows, columns = index // m, index % m
    values = entries[index] / (root_a[rows] * root_b[columns])
    order = torch.argsort(columns, stable=True)
    matrix = _csr(rows, columns, values, n, m)
    transposed = _csr(columns[order], rows[order], values[order], m, n)
    return matrix.mv, transposed.mv


def _csr(rows: Tensor, columns: Tensor, values: Tensor, n: int, m: int) -> Tensor:
    starts = torch.searchsorted(rows, torch.arange(n + 1, device=rows.device))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Sparse CSR tensor support is in beta")
        return torch.sparse_csr_tensor(starts, columns, values, (n, m), check_invariants=False)


def _conjugate_gradients(
    times: MatVec, target: Tensor, weight: Tensor, tol: Tensor
) -> tuple[Tensor, int]:
    """Solve for `target` from zero until the residual times `weight` has norm `tol`."""
    solution = torch.zeros_like(target)
    residual, direction = target, target
    rho = residual @ residual
    steps = 0
    while steps < 10 * len(target) and bool((weight * residual).norm() > tol):
        for _ in range(CG_CHECK):
            image = times(direction)
            # Zero once solved exactly: a 0/0 here would spoil the steps before the next look.
            length = (rho / (direction @ image)).nan_to_num_(0.0, 0.0, 0.0)
            solution = torch.addcmul(solution, length, direction)
            residual = torch.addcmul(residual, length, image, value=-1)
            rho, previous = residual @ residual, rho
            ratio = (rho / previous).nan_to_num_(0.0, 0.0, 0.0)
            direction = torch.addcmul(residual, ratio, direction)
        steps += CG_CHECK
    return solution, steps


def _line_search(
    log_kernel: Tensor,
    r: Tensor,
    c: Tensor,
    start: _Point,
    du: Tensor,
    dv: Tensor,
    spread: float,
) -> _Point | None:
    r"""Halve the step until $\eta f$ rises by Armijo's share; None if no step helps.

    No plan is worth a look where a potential moves by more than the spread of $\eta C$, so the
    first trial is the longest one below it: where the Hessian is nearly singular a full step may
    be 1e18 times too long. When the rise drowns in rounding, the marginal error judges instead.
    A trial that overflows has an infinite plan, hence a rise of minus infinity, and is rejected.
    """
    mass = start.rows.sum()
    linear = r @ du + c @ dv  # a full step raises the linear part of eta * f by this much
    predicted = linear - start.rows @ du - start.columns @ dv
    noise = 4 * torch.finfo(r.dtype).eps * (mass + r @ start.u.abs() + c @ start.v.abs())
    reach = float(torch.maximum(du.abs().max(), dv.abs().max()))
    length = 1.0 if reach <= spread else 2.0 ** -math.ceil(math.log2(reach / spread))
    for _ in range(MAX_HALVINGS):
        u, v = start.u + length * du, start.v + length * dv
        trial = _point(r, c, u, v, scale_kernel(log_kernel, u, v))
        gain = length * linear - (trial.rows.sum() - mass)
        rises = (gain >= ARMIJO * length * predicted) & (gain > noise)
        if bool(rises) or (trial.error < start.error and bool(gain.abs() <= noise)):
            return trial
        length /= 2
    return None
