r"""Sinkhorn-Newton-Sparse: a few Sinkhorn sweeps, then Newton with a sparsified Hessian.

Xun Tang, Michael Shavlovsky, Holakou Rahmanian, Elisa Tardini, Kiran Koshy Thekumparampil, Tesi
Xiao and Lexing Ying, "Accelerating Sinkhorn Algorithm with Sparse Newton Iterations", ICLR 2024,
arXiv 2401.12253.

Claim: after a short warm-up the Hessian of the dual is nearly sparse, so that Newton's method
needs only the largest entries of the plan and ends in a handful of steps what takes Sinkhorn
thousands of sweeps.

The problem has a weight $1/\eta$ on the entropy, so a *large* $\eta$ means little regularization:

$$\min_{P\mathbf 1=r,\;P^\top\mathbf 1=c}\ \langle C,P\rangle
+\tfrac1\eta\sum_{ij}P_{ij}\log P_{ij}.$$

Its dual is the Lyapunov potential, which both stages maximize over $x\in\mathbb R^n,
y\in\mathbb R^m$:

$$f(x,y)=-\tfrac1\eta\sum_{ij}P_{ij}+r^\top x+c^\top y,\qquad P_{ij}=e^{\eta(x_i+y_j-C_{ij})-1},$$

$$\nabla f=\binom{r-P\mathbf 1}{c-P^\top\mathbf 1},\qquad
-\nabla^2f=\eta\begin{pmatrix}\mathrm{diag}(P\mathbf 1)&P\\P^\top&\mathrm{diag}(P^\top\mathbf 1)
\end{pmatrix}.$$

Departures from the paper: a sparsity $\lambda$ is the kept fraction of the $nm$ entries of $P$
(the paper appears to count entries of the $2n\times2n$ Hessian, so its $2/n$ is about our $4/n$);
conjugate gradients run on the Hessian after its diagonal has been scaled to one (the Jacobi
preconditioner) and its row block eliminated, which is exact and halves their number; their
tolerance tightens as the error falls (Nocedal and Wright, "Numerical Optimization", section 7.1);
what remains of the diagonal is raised by 50 units of rounding, and the line search skips steps
that are longer than the spread of the costs.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.ops.sinkhorn import check_marginals, marginal_error, scale_kernel, sinkhorn_scaling

__all__ = [
    "SinkhornResult",
    "image_transport",
    "lyapunov_potential",
    "mass_outside",
    "random_assignment",
    "sinkhorn",
    "sinkhorn_newton_sparse",
    "sparse_newton_direction",
    "transport_plan",
]

ARMIJO = 1e-4  # fraction of the predicted gain that a step must deliver
DAMPING = 50  # in units of rounding: without it, a plan in separate blocks gives no ascent
MAX_HALVINGS = 30
CG_CHECK = 5  # conjugate gradient steps between two looks at the residual
FLOAT32_TOL = 1e-6  # below it, rounding in float32 hides the marginal error

MatVec = Callable[[Tensor], Tensor]


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


def random_assignment(
    n: int, *, generator: torch.Generator, dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The paper's first problem: costs drawn uniformly from $[0,1]$, uniform marginals.

    Args:
        n: number of rows and of columns.
        generator: source of the costs; its device is the device of the result.
        dtype: of the result.

    Returns:
        `cost` `(n, n)`, `r` `(n,)` and `c` `(n,)`.

    Source: section 6.

    Example:
        >>> cost, r, c = random_assignment(4, generator=torch.Generator().manual_seed(0))
        >>> tuple(cost.shape), r.tolist() == c.tolist() == [0.25] * 4
        ((4, 4), True)
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, got {n}")
    cost = torch.rand(n, n, generator=generator, dtype=dtype, device=generator.device)
    r = cost.new_full((n,), 1 / n)
    return cost, r, r.clone()


def image_transport(
    source: Tensor, target: Tensor, *, power: int, constant: float = 0.01
) -> tuple[Tensor, Tensor, Tensor]:
    r"""The paper's second problem: move the mass of one image to another on the pixel grid.

    The cost of two pixels is $\|p-q\|_1$ (`power=1`) or $\|p-q\|_2^2$ (`power=2`), scaled to a
    largest value of 1.

    Args:
        source: gray values, `(h, w)`, at least 0.
        target: gray values of the same shape.
        power: 1 or 2.
        constant: positive mass added to each pixel before scaling to a total of 1.

    Returns:
        `cost` `(h w, h w)`, `r` and `c`, both `(h w,)` with sum 1, in the dtype of `source`.

    Raises:
        ValueError: shapes differ, negative gray values, other powers, `constant` not positive.

    Source: section 6; the scale of the cost and the constant are ours.

    Example:
        >>> cost, r, c = image_transport(torch.eye(2), torch.ones(2, 2), power=1)
        >>> cost[0].tolist(), c.tolist()
        ([0.0, 0.5, 0.5, 1.0], [0.25, 0.25, 0.25, 0.25])
    """
    if source.ndim != 2 or source.shape != target.shape or source.numel() < 2:
        shapes = f"{tuple(source.shape)} and {tuple(target.shape)}"
        raise ValueError(f"source and target must share a shape (h, w), got {shapes}")
    if (source < 0).any() or (target < 0).any():
        raise ValueError("source and target must not be negative")
    if power not in (1, 2):
        raise ValueError(f"power must be 1 or 2, got {power}")
    if not constant > 0:
        raise ValueError(f"constant must be positive, got {constant}")
    axes = [torch.arange(size, device=source.device, dtype=source.dtype) for size in source.shape]
    pixels = torch.cartesian_prod(*axes)
    cost = (pixels[:, None] - pixels).abs().pow(power).sum(-1)
    r, c = source.flatten() + constant, target.flatten() + constant
    return cost / cost.max(), r / r.sum(), c / c.sum()


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
