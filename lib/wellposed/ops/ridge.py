"""Ridge regression with its strength chosen by leave-one-out, which has a closed form."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["ridge_leave_one_out"]


def ridge_leave_one_out(x: Tensor, y: Tensor, ridges: Sequence[float]) -> Tensor:
    r"""Ridge coefficients whose strength has the least leave-one-out error, for each problem.

    $$\hat\beta_\lambda=\arg\min_\beta\tfrac1n\|X\beta-y\|^2+\lambda\|\beta\|^2,\qquad
    \text{error}_i=\frac{y_i-x_i^\top\hat\beta_\lambda}{1-h_{ii}(\lambda)}$$

    with the leverages $h_{ii}=x_i^\top(X^\top X+n\lambda I)^{-1}x_i$. There is no intercept.

    Args:
        x: $X$, `(..., n, d)`, float32 or float64.
        y: `(..., n)`.
        ridges: strengths $\lambda>0$ to choose from.

    Returns:
        $\hat\beta$, `(..., d)`.

    Raises:
        ValueError: shapes do not fit, no strength, one that is not positive.

    Example:
        >>> x, y = torch.ones(4, 1), torch.full((4,), 3.0)
        >>> ridge_leave_one_out(x, y, [0.5, 2.0])     # the weaker one, 3 / (1 + 0.5)
        tensor([2.0000])
    """
    if x.ndim < 2 or y.shape != x.shape[:-1]:
        raise ValueError(
            f"x must be (..., n, d) and y (..., n), got {tuple(x.shape)}, {tuple(y.shape)}"
        )
    if not ridges or min(ridges) <= 0:
        raise ValueError(f"ridges must be positive numbers, got {list(ridges)}")
    u, s, vh = torch.linalg.svd(x, full_matrices=False)
    strength = x.shape[-2] * x.new_tensor(ridges).reshape(-1, *[1] * s.ndim)
    shrink = s.square() / (s.square() + strength)
    uy = (u.mT @ y.unsqueeze(-1)).squeeze(-1)
    fitted = (u @ (shrink * uy).unsqueeze(-1)).squeeze(-1)
    leverage = (u.square() * shrink.unsqueeze(-2)).sum(-1)
    error = ((y - fitted) / (1 - leverage)).square().mean(-1)
    best = error.argmin(0)[None, ..., None]
    beta: Tensor = (vh.mT @ (s / (s.square() + strength) * uy).unsqueeze(-1)).squeeze(-1)
    return beta.take_along_dim(best, dim=0).squeeze(0)
