"""Lasso, for many small problems at once."""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

__all__ = ["lasso"]

TOL = 1e-6  # duality gap, relative to the objective at zero where that is below 1
MAX_STEPS = 50_000
CHECK = 20  # proximal steps between two looks at the gap
PATIENCE = 1000  # proximal steps between two looks at whether there is progress
STALL = 1e-9  # a gain in that time that is no progress, in units of the gap
ROUNDING = 64  # times eps: the gap of a large squared error is not known better


def lasso(A: Tensor, b: Tensor, alpha: float | Tensor) -> Tensor:
    r"""Solve the Lasso by accelerated proximal gradient steps with restarts.

    $$\min_x\tfrac12\|Ax-b\|_2^2+\alpha\|x\|_1$$

    Args:
        A: `(..., n, p)`, float32 or float64; computed in float64.
        b: `(..., n)`.
        alpha: positive, a number or `(...)`; from $\|A^\top b\|_\infty$ on the solution is zero.

    Returns:
        $x$, `(..., p)`, with exact zeros, to a duality gap of 1e-6 (or of the rounding of a squared
        error above 1e7); a RuntimeWarning if it did not get there.

    Raises:
        ValueError: shapes do not fit or are empty, values not finite, `alpha` not positive.

    Example:
        >>> lasso(torch.eye(2), torch.tensor([1.0, 0.1]), 0.25).tolist()
        [0.75, 0.0]
    """
    if A.ndim < 2 or b.shape != A.shape[:-1] or 0 in A.shape:
        raise ValueError(
            "A must be (..., n, p), not empty, and b (..., n), got "
            f"{tuple(A.shape)}, {tuple(b.shape)}"
        )
    if not bool(A.isfinite().all() & b.isfinite().all()):
        raise ValueError("A and b must be finite")
    M, w = A.double(), b.double()
    a = torch.as_tensor(alpha, dtype=M.dtype, device=M.device)
    if not bool((a > 0).all()):
        raise ValueError(f"alpha must be positive, got {alpha}")
    step = 1 / torch.linalg.matrix_norm(M, 2).square().clamp(min=1e-300).unsqueeze(-1)
    threshold = a.unsqueeze(-1) * step
    nu: Tensor = torch.zeros_like(M[..., 0, :])
    ahead = nu
    t = torch.ones_like(step)
    primal = torch.full_like(step, torch.inf).squeeze(-1)
    for n in range(1, MAX_STEPS + 1):
        moved = ahead - step * _times(M.mT, _times(M, ahead) - w)
        new = moved.sign() * (moved.abs() - threshold).clamp(min=0)
        overshot = ((ahead - new) * (new - nu)).sum(-1, keepdim=True) > 0
        t_new = torch.where(overshot, 1.0, (1 + (1 + 4 * t * t).sqrt()) / 2)
        ahead = new + torch.where(overshot, 0.0, (t - 1) / t_new) * (new - nu)
        nu, t = new, t_new
        if n % CHECK:
            continue
        value, gap, good = _gap(M, w, a, nu)
        if bool(good.all()):
            return nu.to(A)
        if n % PATIENCE == 0:
            if bool((good | (primal - value < STALL * gap)).all()):
                break
            primal = value
    warnings.warn(
        f"lasso stopped after {n} steps above its tolerance",
        RuntimeWarning,
        stacklevel=2,
    )
    return nu.to(A)


def _gap(M: Tensor, w: Tensor, alpha: Tensor, nu: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Objective and duality gap of every problem, and whether the gap is small."""
    r = w - _times(M, nu)
    at_zero = 0.5 * w.square().sum(-1)
    primal = 0.5 * r.square().sum(-1) + alpha * nu.abs().sum(-1)
    scale = (alpha / _times(M.mT, r).abs().amax(-1)).clamp(max=1)
    dual = at_zero - 0.5 * (w - scale.unsqueeze(-1) * r).square().sum(-1)
    small = torch.maximum(TOL * at_zero.clamp(max=1), ROUNDING * torch.finfo(M.dtype).eps * at_zero)
    return primal, primal - dual, primal - dual <= small


def _times(matrix: Tensor, vector: Tensor) -> Tensor:
    return (matrix @ vector.unsqueeze(-1)).squeeze(-1)
