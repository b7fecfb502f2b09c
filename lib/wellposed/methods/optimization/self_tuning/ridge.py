"""Ridge regression, where the best response is known."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["ridge_best_response", "ridge_gates", "ridge_response_jacobian"]


def _spectrum(inputs: Tensor, log_reg: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise ValueError(f"inputs must have shape (n, d), not empty, got {tuple(inputs.shape)}")
    U, d, Q = torch.linalg.svd(inputs, full_matrices=False)
    return U, d, Q, torch.sigmoid(2 * d.log() - log_reg)


def _divided(gates: Tensor, d: Tensor) -> Tensor:
    """Gates over singular values; both vanish together, the gates faster."""
    return gates / torch.where(d > 0, d, 1.0)


def ridge_gates(inputs: Tensor, log_reg: float | Tensor) -> Tensor:
    r"""Gates that turn least squares into ridge, :math:`\mathrm{sigmoid}(\log d_i^2 - \lambda)`.

    Args:
        inputs: shape ``(n, d)``.
        log_reg: :math:`\lambda`, the logarithm of the penalty on :math:`\|w\|^2` beside a *sum*
            of squared errors.

    Returns:
        One gate for each singular value :math:`d_i`, in descending order, ``(min(n, d),)``.

    Raises:
        ValueError: ``inputs`` is not a matrix.

    Source: the paper's two-layer linear network with Jacobian norm penalty.

    Example:
        >>> ridge_gates(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 0.0).tolist()
        [0.800000011920929, 0.5]
    """
    return _spectrum(inputs, log_reg)[3]


def _checked_targets(inputs: Tensor, targets: Tensor) -> Tensor:
    if targets.shape != inputs.shape[:1]:
        raise ValueError(f"targets must have shape ({len(inputs)},), got {tuple(targets.shape)}")
    return targets


def ridge_best_response(inputs: Tensor, targets: Tensor, log_reg: float | Tensor) -> Tensor:
    r"""Ridge weights in gated form, :math:`w^* = Q^\top[\mathrm{gates}\odot Q w_{OLS}]`.

    Here :math:`X = U \mathrm{diag}(d) Q`; they minimize
    :math:`\|Xw - t\|^2 + e^\lambda \|w\|^2`.

    Args:
        inputs: :math:`X`, shape ``(n, d)``.
        targets: :math:`t`, shape ``(n,)``.
        log_reg: :math:`\lambda`.

    Returns:
        Weights, shape ``(d,)``.

    Raises:
        ValueError: shapes that do not fit.

    Source: the paper's theorem on linear networks; the gates in :func:`ridge_gates`.

    Example:
        >>> ridge_best_response(torch.eye(2), torch.tensor([2.0, 4.0]), 0.0).tolist()
        [1.0, 2.0]
    """
    U, d, Q, gates = _spectrum(inputs, log_reg)
    return Q.mT @ (_divided(gates, d) * (U.mT @ _checked_targets(inputs, targets)))


def ridge_response_jacobian(inputs: Tensor, targets: Tensor, log_reg: float | Tensor) -> Tensor:
    r"""Slope of ridge weights, :math:`dw^*/d\lambda = -e^\lambda A^{-1}A^{-1}X^\top t`.

    With :math:`A = X^\top X + e^\lambda I`; here by the slope of the gates.

    Args:
        inputs: :math:`X`, shape ``(n, d)``.
        targets: :math:`t`, shape ``(n,)``.
        log_reg: :math:`\lambda`.

    Returns:
        Shape ``(d,)``.

    Raises:
        ValueError: shapes that do not fit.

    Source: derivative of the best response, derived here.

    Example:
        >>> ridge_response_jacobian(torch.eye(2), torch.tensor([2.0, 4.0]), 0.0).tolist()
        [-0.5, -1.0]
    """
    U, d, Q, gates = _spectrum(inputs, log_reg)
    slope = -gates * (1 - gates)
    return Q.mT @ (_divided(slope, d) * (U.mT @ _checked_targets(inputs, targets)))
