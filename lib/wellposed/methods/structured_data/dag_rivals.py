r"""Rivals of CoLiDE: the augmented Lagrangian of NOTEARS, and sorting nodes by their variance.

Zheng, Aragam, Ravikumar and Xing. DAGs with NO TEARS. NeurIPS 2018. arXiv 1803.01422.
Reisach, Seiler and Weichwald. Beware of the Simulated DAG! NeurIPS 2021. arXiv 2102.13647.

NOTEARS was the first to make acyclicity a smooth equation: $\operatorname{tr}e^{W\circ W}=d$.
Sorting by variance shows how much of the order simulated data give away: where every edge adds
variance, the variances alone sort the nodes.

Departures from the papers: NOTEARS works on the covariance instead of the samples, which is the
same loss and much faster; the regressions after sorting are least squares, cut at a threshold,
instead of a lasso chosen by BIC.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from wellposed.ops.dag import centered_samples

__all__ = ["NotearsResult", "notears", "sort_n_regress", "trace_exp_acyclicity"]

Matrix = NDArray[np.float64]


@dataclass(frozen=True)
class NotearsResult:
    """Estimates for one problem, or for a batch of them."""

    weights: Tensor  # (..., d, d), not thresholded
    acyclicity: Tensor  # (...,), h at the end
    num_evals: Tensor  # (...,) int64, calls of objective and gradient
    converged: Tensor  # (...,) bool, h reached `h_tol`


def trace_exp_acyclicity(weights: Tensor) -> Tensor:
    r"""NOTEARS's measure of cycles, $h(W)=\operatorname{tr}e^{W\circ W}-d$.

    Args:
        weights: $W$, `(..., d, d)`, floating.

    Returns:
        `(...,)`, zero if and only if $W$ is a DAG. Differentiable.

    Raises:
        ValueError: weights that are not square or not floating.

    Source: Zheng et al. 2018, Theorem 1.

    Example:
        >>> cycle = torch.tensor([[0.0, 1.0], [1.0, 0.0]], dtype=torch.float64)
        >>> f"{trace_exp_acyclicity(cycle):.4f}"    # 2 cosh(1) - 2
        '1.0862'
    """
    if weights.ndim < 2 or weights.shape[-1] != weights.shape[-2]:
        raise ValueError(f"weights must have shape (..., d, d), got {tuple(weights.shape)}")
    if not weights.is_floating_point():
        raise ValueError(f"weights must be floating, got {weights.dtype}")
    power: Tensor = torch.linalg.matrix_exp(weights * weights)
    return power.diagonal(dim1=-2, dim2=-1).sum(-1) - weights.shape[-1]


def _value_and_gradient(
    halves: Matrix, cov: Matrix, lambda1: float, rho: float, alpha: float
) -> tuple[float, Matrix]:
    """Augmented Lagrangian in the positive and negative parts of W, stacked to one vector."""
    from scipy.linalg import expm

    d = len(cov)
    parts = halves.reshape(2, d, d)
    w = parts[0] - parts[1]
    rest = np.eye(d) - w
    pull = cov @ rest
    power = expm(w * w)
    h = float(np.trace(power)) - d
    value = 0.5 * float((rest * pull).sum()) + 0.5 * rho * h * h + alpha * h
    smooth = -pull + (rho * h + alpha) * 2.0 * w * power.T
    grad = np.concatenate([smooth.ravel() + lambda1, lambda1 - smooth.ravel()])
    return value + lambda1 * float(halves.sum()), grad


def _solve(
    cov: Matrix, lambda1: float, max_iters: int, h_tol: float, rho_max: float
) -> tuple[Matrix, float, int]:
    """Augmented Lagrangian for one problem: weights, h, evaluations."""
    from scipy.linalg import expm
    from scipy.optimize import minimize

    d = len(cov)
    bounds = [(0.0, 0.0 if i == j else None) for _ in "+-" for i in range(d) for j in range(d)]
    halves, rho, alpha, h, evals = np.zeros(2 * d * d), 1.0, 0.0, math.inf, 0
    weights = np.zeros((d, d))
    for _ in range(max_iters):
        while rho < rho_max:
            found = minimize(
                _value_and_gradient,
                halves,
                args=(cov, lambda1, rho, alpha),
                jac=True,
                bounds=bounds,
                method="L-BFGS-B",
            )
            evals += found.nfev
            parts = found.x.reshape(2, d, d)
            weights = parts[0] - parts[1]
            now = float(np.trace(expm(weights * weights))) - d
            if now <= 0.25 * h:
                break
            rho *= 10.0
        halves, h = found.x, now
        alpha += rho * h
        if h <= h_tol or rho >= rho_max:
            break
    return weights, h, evals


def notears(
    x: Tensor,
    *,
    lambda1: float = 0.05,
    max_iters: int = 100,
    h_tol: float = 1e-8,
    rho_max: float = 1e16,
) -> NotearsResult:
    r"""NOTEARS: least squares with a lasso, subject to $\operatorname{tr}e^{W\circ W}=d$.

    Each round minimizes
    $\frac1{2n}\lVert X-XW\rVert^2+\lambda\lVert W\rVert_1+\alpha h+\frac\rho2h^2$
    by L-BFGS-B, multiplying $\rho$ by 10 until $h$ falls to a quarter, then $\alpha$ grows by
    $\rho h$. Problems are solved one after another, by scipy, on the CPU.

    Args:
        x: samples, `(n, d)` or `(b, n, d)`.
        lambda1: sparsity weight, at least 0.
        max_iters: most rounds.
        h_tol: h at which to stop, positive.
        rho_max: penalty at which to give up, above 1.

    Returns:
        A :class:`NotearsResult` in the dtype and on the device of `x`.

    Raises:
        TypeError: `x` is not floating.
        ValueError: fewer than 2 samples, entries that are not finite, a number out of range.

    Source: Zheng et al. 2018, Algorithm 1.

    Example:
        >>> x = torch.tensor([[1.0, 3.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -3.0]])
        >>> notears(x).weights.round().abs().tolist()
        [[0.0, 2.0], [0.0, 0.0]]
    """
    samples = centered_samples(x)
    if not 0 <= lambda1 < math.inf:
        raise ValueError(f"lambda1 must be finite and at least 0, got {lambda1}")
    if max_iters < 1 or not h_tol > 0 or not rho_max > 1:
        raise ValueError("max_iters must be at least 1, h_tol positive and rho_max above 1")
    cov = (samples.mT @ samples / samples.shape[-2]).cpu().numpy()
    found = [_solve(c, float(lambda1), max_iters, h_tol, rho_max) for c in cov]
    result = (
        torch.as_tensor(np.stack([f[0] for f in found]), device=x.device).to(x.dtype),
        torch.tensor([f[1] for f in found], dtype=x.dtype, device=x.device),
        torch.tensor([f[2] for f in found], device=x.device),
        torch.tensor([f[1] <= h_tol for f in found], device=x.device),
    )
    return NotearsResult(*(result if x.ndim == 3 else (t[0] for t in result)))


def sort_n_regress(x: Tensor) -> Tensor:
    r"""Sort the nodes by variance, then regress each on those before it.

    Args:
        x: samples, `(n, d)` or `(b, n, d)`, n larger than d.

    Returns:
        Least-squares weights, `(d, d)` or `(b, d, d)`: a full DAG along the order; cut it with
        :func:`wellposed.ops.dag.threshold_dag`.

    Raises:
        TypeError: `x` is not floating.
        ValueError: too few samples, entries that are not finite, dependent columns.

    Source: Reisach et al. 2021, SortnRegress.

    Example:
        >>> x = torch.tensor([[1.0, 3.0], [-1.0, -1.0], [1.0, 1.0], [-1.0, -3.0]])
        >>> sort_n_regress(x).tolist()
        [[0.0, 2.0], [0.0, 0.0]]
    """
    samples = centered_samples(x)
    b, n, d = samples.shape
    if n <= d:
        raise ValueError(f"x must hold more than {d} samples, got {n}")
    cov = samples.mT @ samples / n
    order = cov.diagonal(dim1=-2, dim2=-1).sort(dim=-1, stable=True).indices
    sort = torch.nn.functional.one_hot(order, d).to(cov.dtype)  # row k picks the k-th node
    chol, info = torch.linalg.cholesky_ex(sort @ cov @ sort.mT)
    if bool((info > 0).any()):
        raise ValueError("x must not have linearly dependent columns")
    # C = L L', so x = L z: node k = its predecessors through I - diag(L) L^-1, plus noise.
    unit = chol / chol.diagonal(dim1=-2, dim2=-1)[:, None, :]
    eye = torch.eye(d, dtype=cov.dtype, device=cov.device)
    inverse = torch.linalg.solve_triangular(unit, eye.expand(b, d, d), upper=False)
    sorted_weights = (eye - inverse).tril(-1).mT
    weights: Tensor = (sort.mT @ sorted_weights @ sort).to(x.dtype)
    return weights if x.ndim == 3 else weights[0]
