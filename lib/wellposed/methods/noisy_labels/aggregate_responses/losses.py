"""Losses when only bag means are known, and the linear predictors that minimize them."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = [
    "bag_loss",
    "bag_means",
    "fit_interpolating",
    "instance_loss",
    "interpolating_loss",
    "leave_one_bag_out",
]


def _check_bag_size(n: int, bag_size: int) -> None:
    if bag_size < 1:
        raise ValueError(f"bag_size must be at least 1, got {bag_size}")
    if n < 1 or n % bag_size:
        raise ValueError(f"the number of rows must be a positive multiple of {bag_size}, got {n}")


def _check_rho(rho: float) -> None:
    if not 0.0 <= rho <= 1.0:
        raise ValueError(f"rho must lie in [0, 1], got {rho}")


def _in_bags(pred: Tensor, bag_y: Tensor, bag_size: int) -> Tensor:
    """Predictions as ``(..., m, k)``, after a check of both shapes."""
    _check_bag_size(pred.shape[-1] if pred.ndim else 0, bag_size)
    bags = pred.shape[-1] // bag_size
    if bag_y.ndim == 0 or bag_y.shape[-1] != bags:
        raise ValueError(f"bag_y must hold {bags} bag means, got shape {tuple(bag_y.shape)}")
    inside: Tensor = pred.unflatten(-1, (bags, bag_size))
    return inside


def bag_means(y: Tensor, bag_size: int) -> Tensor:
    r"""Mean of each bag: :math:`\bar y_a = \frac1k \sum_{i \in B_a} y_i`.

    Args:
        y: responses ``(n,)`` or features ``(..., n, d)``, whose rows are averaged.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.

    Returns:
        Shape ``(m,)`` or ``(..., m, d)`` with ``m = n / k``.

    Raises:
        ValueError: ``bag_size`` below 1 or no divisor of ``n``.

    Source: Section 2.

    Example:
        >>> bag_means(torch.tensor([1.0, 3.0, 5.0, 9.0]), 2).tolist()
        [2.0, 7.0]
    """
    axis = -1 if y.ndim < 2 else -2
    _check_bag_size(y.shape[axis] if y.ndim else 0, bag_size)
    means: Tensor = y.unflatten(axis, (-1, bag_size)).mean(axis)
    return means


def bag_loss(pred: Tensor, bag_y: Tensor, bag_size: int) -> Tensor:
    r"""Squared error of mean predictions, :math:`\frac1m \sum_a (\bar y_a - \bar f_a)^2`.

    Args:
        pred: predictions :math:`f`, shape ``(..., n)``.
        bag_y: bag means of the responses, shape ``(..., m)``.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.

    Returns:
        Scalar, or shape ``(...)`` for predictions with leading axes.

    Raises:
        ValueError: ``bag_size`` or shapes that do not fit.

    Source: Section 2, equation (1).

    Example:
        >>> bag_loss(torch.tensor([0.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 3.0]), 2).item()
        2.0
    """
    return (_in_bags(pred, bag_y, bag_size).mean(-1) - bag_y).square().mean(-1)


def instance_loss(pred: Tensor, bag_y: Tensor, bag_size: int) -> Tensor:
    r"""Squared error of each prediction against its bag's mean.

    .. math:: L_{ins} = \frac1n \sum_a \sum_{i \in B_a} (\bar y_a - f_i)^2

    Args:
        pred: predictions :math:`f`, shape ``(..., n)``.
        bag_y: bag means of the responses, shape ``(..., m)``.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.

    Returns:
        Scalar, or shape ``(...)``; never below :func:`bag_loss`.

    Raises:
        ValueError: ``bag_size`` or shapes that do not fit.

    Source: Section 2, equation (2).

    Example:
        >>> instance_loss(torch.tensor([0.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 3.0]), 2).item()
        2.5
    """
    return (_in_bags(pred, bag_y, bag_size) - bag_y.unsqueeze(-1)).square().mean((-2, -1))


def interpolating_loss(pred: Tensor, bag_y: Tensor, bag_size: int, rho: float) -> Tensor:
    r"""Mixture of both losses, :math:`L_\rho = (1-\rho) L_{bag} + \rho L_{ins}`.

    It is computed as bag loss plus :math:`\rho` times the spread inside the bags.

    Args:
        pred: predictions :math:`f`, shape ``(..., n)``.
        bag_y: bag means of the responses, shape ``(..., m)``.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.
        rho: 0 is the bag loss, 1 the instance loss.

    Returns:
        Scalar, or shape ``(...)``.

    Raises:
        ValueError: ``rho`` outside [0, 1], ``bag_size`` or shapes that do not fit.

    Source: Section 2 (the interpolating estimator).

    Example:
        >>> pred, bag_y = torch.tensor([0.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 3.0])
        >>> interpolating_loss(pred, bag_y, 2, 0.5).item()
        2.25
    """
    _check_rho(rho)
    bags = _in_bags(pred, bag_y, bag_size)
    means = bags.mean(-1)
    spread = (bags - means.unsqueeze(-1)).square().mean((-2, -1))
    return (means - bag_y).square().mean(-1) + rho * spread


def _system(
    X: Tensor, bag_size: int, rhos: Sequence[float], ridge: float
) -> tuple[Tensor, list[Tensor]]:
    """Bag means U and, for each rho, the matrix of the normal equations.

    The rows V minus their bag mean obey ``V'V/n = X'X/n - U'U/m``, so that the matrix
    ``U'U/m + rho V'V/n + ridge I`` is a mixture of two that no rho changes.
    """
    if X.ndim < 2:
        raise ValueError(f"X must have shape (..., n, d), got {tuple(X.shape)}")
    for rho in rhos:
        _check_rho(rho)
    if not 0.0 <= ridge < math.inf:
        raise ValueError(f"ridge must be finite and at least 0, got {ridge}")
    U = bag_means(X, bag_size)
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    by_bag = U.mT @ U / U.shape[-2]
    by_row = X.mT @ X / X.shape[-2] if any(rhos) else by_bag
    return U, [torch.lerp(by_bag, by_row, rho) + ridge * eye for rho in rhos]


def _solve(matrix: Tensor, right: Tensor) -> Tensor:
    """The matrix's pseudo-inverse times ``right``; Cholesky where it is safely definite."""
    factor, info = torch.linalg.cholesky_ex(matrix)
    pivots = factor.diagonal(dim1=-2, dim2=-1)
    least = torch.finfo(matrix.dtype).eps ** 0.25 * pivots.amax(-1)
    if bool(((info == 0) & (pivots.amin(-1) > least)).all()):
        return torch.cholesky_solve(right, factor)
    solution: Tensor = torch.linalg.pinv(matrix, hermitian=True) @ right
    return solution


def _check_bag_y(U: Tensor, bag_y: Tensor) -> None:
    if bag_y.ndim == 0 or bag_y.shape[-1] != U.shape[-2]:
        raise ValueError(f"bag_y must hold {U.shape[-2]} bag means, got {tuple(bag_y.shape)}")


def fit_interpolating(
    X: Tensor, bag_y: Tensor, bag_size: int, rho: float, *, ridge: float = 0.0
) -> Tensor:
    r"""Linear predictor of least :math:`L_\rho`, of least norm if there are several.

    .. math:: \hat\theta = \Bigl(\tfrac1m U^\top U + \tfrac\rho n V^\top V + \lambda I\Bigr)^{+}
              \tfrac1m U^\top \bar y

    with the bag means :math:`U` of the features and the rows :math:`V` minus their bag mean.
    There is no intercept: center features and responses first.

    Args:
        X: features, shape ``(..., n, d)``; float64 recommended.
        bag_y: bag means of the responses, shape ``(..., m)``; leading axes broadcast.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.
        rho: 0 is the bag loss, 1 the instance loss.
        ridge: strength :math:`\lambda \ge 0` of a ridge penalty; 0 in the paper.

    Returns:
        Coefficients, shape ``(..., d)``.

    Raises:
        ValueError: ``rho`` or ``ridge`` out of range, ``bag_size`` or shapes that do not fit.

    Source: Section 2.1.

    Example:
        >>> X = torch.tensor([[1.0], [1.0], [2.0], [0.0]], dtype=torch.float64)
        >>> bag_y = torch.tensor([2.0, 4.0], dtype=torch.float64)
        >>> [round(fit_interpolating(X, bag_y, 2, rho).item(), 6) for rho in (0.0, 1.0)]
        [3.0, 2.0]
    """
    return _fit_each(X, bag_y, bag_size, [rho], ridge=ridge)[0]


def _fit_each(
    X: Tensor, bag_y: Tensor, bag_size: int, rhos: Sequence[float], *, ridge: float = 0.0
) -> list[Tensor]:
    """:func:`fit_interpolating` for each rho; what does not depend on rho is computed once."""
    U, matrices = _system(X, bag_size, rhos, ridge)
    _check_bag_y(U, bag_y)
    ahead = bag_y.shape[: max(0, bag_y.ndim + 1 - U.ndim)]  # axes that X lacks: its columns
    many = bag_y.reshape(-1, *bag_y.shape[len(ahead) :])
    moment = U.mT @ many.movedim(0, -1) / U.shape[-2]
    fits = [_solve(matrix, moment).movedim(-1, 0) for matrix in matrices]
    return [fit.reshape(*ahead, *fit.shape[1:]) for fit in fits]


def leave_one_bag_out(
    X: Tensor, bag_y: Tensor, bag_size: int, rho: float, *, ridge: float = 0.0
) -> Tensor:
    r"""Mean squared error on bags left out one by one, without refitting.

    With the diagonal :math:`h_a` of the hat matrix, the error on bag :math:`a` of the fit that
    does not see :math:`\bar y_a` is :math:`(\bar y_a - \bar f_a) / (1 - h_a)`. The features of the
    left-out bag stay in the penalty: they are known. It needs no single response, so a learner who
    sees bags alone can choose ``rho`` or ``ridge`` with it.

    Args:
        X: features, shape ``(..., n, d)``.
        bag_y: bag means of the responses, shape ``(..., m)``; leading axes broadcast.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.
        rho: 0 is the bag loss, 1 the instance loss.
        ridge: strength :math:`\lambda \ge 0` of a ridge penalty.

    Returns:
        Shape ``(...)``; infinite where the fit passes through a bag whatever its response.

    Raises:
        ValueError: ``rho`` or ``ridge`` out of range, ``bag_size`` or shapes that do not fit.

    Source: not in the paper; the classical PRESS statistic, applied to bags.

    Example:
        >>> X, bag_y = torch.ones(4, 1), torch.tensor([0.0, 2.0])
        >>> leave_one_bag_out(X, bag_y, 2, 0.0).item()
        4.0
    """
    U, (matrix,) = _system(X, bag_size, [rho], ridge)
    _check_bag_y(U, bag_y)
    projected = _solve(matrix, U.mT).mT
    leverage = (projected * U).sum(-1) / U.shape[-2]
    fitted = (projected @ (U.mT @ bag_y.unsqueeze(-1))).squeeze(-1) / U.shape[-2]
    error = ((bag_y - fitted) / (1 - leverage)).square()
    exact = 1 - leverage < torch.finfo(X.dtype).eps ** 0.5
    return error.masked_fill(exact, torch.inf).mean(-1)
