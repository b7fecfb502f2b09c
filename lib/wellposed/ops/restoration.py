r"""Linear inverse problems on images, and the two classical ways to solve them.

Images are rows of pixels, ``(b, d)``, and an operator is a matrix ``(m, d)``, so that measurements
are ``x @ operator.mT``. The classical regularizers are the squared norm (Tikhonov) and the total
variation, which prefers flat regions with few and sharp borders.

Source: total variation: Rudin, Osher and Fatemi, "Nonlinear total variation based noise removal
algorithms", Physica D 1992; ADMM: Boyd et al., "Distributed optimization and statistical learning
via the alternating direction method of multipliers", 2011, section 6.4.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "TVResult",
    "best_setting",
    "gaussian_blur",
    "psnr",
    "tikhonov",
    "total_variation",
    "tv_restore",
]


@dataclass(frozen=True)
class TVResult:
    """Images of least value, and whether the solver came to its end.

    Attributes:
        x: shape ``(b, d)``.
        num_iters: iterations done, for all images together.
        converged: shape ``(b,)``, whether primal and dual residual are below the tolerance.
    """

    x: Tensor
    num_iters: int
    converged: Tensor


def gaussian_blur(
    height: int,
    width: int,
    sigma: float,
    *,
    kernel_size: int = 5,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> Tensor:
    """Matrix of a Gaussian blur, with black around the image.

    Args:
        height: rows of the image.
        width: columns of the image.
        sigma: deviation of the kernel in pixels, positive.
        kernel_size: side of the square kernel, odd; its weights sum to one.
        dtype: of the matrix.
        device: of the matrix.

    Returns:
        Shape ``(d, d)`` with ``d = height * width``; symmetric, norm at most 1.

    Raises:
        ValueError: a number out of range.

    Example:
        >>> gaussian_blur(1, 3, 1.0, kernel_size=1).diagonal().tolist()
        [1.0, 1.0, 1.0]
    """
    if min(height, width) < 1 or kernel_size < 1 or kernel_size % 2 == 0 or not sigma > 0:
        raise ValueError(
            "height and width must be at least 1, kernel_size odd, sigma positive, got "
            f"{height}, {width}, {kernel_size} and {sigma}"
        )
    offsets = torch.arange(kernel_size, dtype=torch.float64) - kernel_size // 2
    kernel = torch.exp(-offsets.square() / (2 * sigma**2))
    kernel /= kernel.sum()

    def line(size: int) -> Tensor:
        steps = torch.arange(size)[:, None] - torch.arange(size) + kernel_size // 2
        inside = (steps >= 0) & (steps < kernel_size)
        return torch.where(inside, kernel[steps.clamp(0, kernel_size - 1)], 0.0)

    return torch.kron(line(height), line(width)).to(device=device, dtype=dtype)


def _check(operator: Tensor, measurement: Tensor, weight: float) -> None:
    if operator.ndim != 2 or 0 in operator.shape:
        raise ValueError(f"operator must have shape (m, d), got {tuple(operator.shape)}")
    if measurement.ndim != 2 or measurement.shape[1] != len(operator):
        raise ValueError(
            f"measurement must have shape (b, {len(operator)}), got {tuple(measurement.shape)}"
        )
    if not 0.0 < weight < math.inf:
        raise ValueError(f"weight must be positive and finite, got {weight}")


def _factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a matrix that is positive definite but for rounding."""
    try:
        factor: Tensor = torch.linalg.cholesky(matrix)
    except RuntimeError:  # torch raises a subclass of it
        raise ValueError("weight is lost in rounding beside so large an operator") from None
    return factor


def tikhonov(operator: Tensor, measurement: Tensor, *, weight: float) -> Tensor:
    r"""Images of least :math:`\frac12\|Ax-b\|^2+\frac w2\|x\|^2`.

    Args:
        operator: :math:`A`, shape ``(m, d)``.
        measurement: :math:`b`, one a row, shape ``(b, m)``.
        weight: :math:`w>0`.

    Returns:
        Shape ``(b, d)``.

    Raises:
        ValueError: shapes that do not fit, ``weight`` not positive or far too small.

    Example:
        >>> round(tikhonov(torch.eye(1), torch.tensor([[3.0]]), weight=2.0).item(), 4)
        1.0
    """
    _check(operator, measurement, weight)
    eye = torch.eye(operator.shape[1], dtype=operator.dtype, device=operator.device)
    factor = _factor(operator.mT @ operator + weight * eye)
    x: Tensor = torch.cholesky_solve((measurement @ operator).mT, factor)
    return x.mT


def _differences(height: int, width: int, like: Tensor) -> Tensor:
    """Forward differences down and right, zero at the border, ``(2 d, d)``."""

    def line(size: int) -> Tensor:
        eye = torch.eye(size, dtype=like.dtype, device=like.device)
        return torch.cat([eye[1:], eye[-1:]]) - eye

    def eye(size: int) -> Tensor:
        return torch.eye(size, dtype=like.dtype, device=like.device)

    down = torch.kron(line(height), eye(width))
    right = torch.kron(eye(height), line(width))
    return torch.cat([down, right])


def total_variation(x: Tensor, height: int, width: int) -> Tensor:
    r"""Isotropic total variation: the sum of the lengths of the forward differences.

    .. math:: \sum_i\sqrt{(x_{i\downarrow}-x_i)^2+(x_{i\rightarrow}-x_i)^2}

    Args:
        x: images, shape ``(b, height * width)``.
        height: rows of an image.
        width: columns of an image.

    Returns:
        Shape ``(b,)``.

    Raises:
        ValueError: ``x`` of another shape.

    Example:
        >>> total_variation(torch.tensor([[0.0, 0.0, 0.0, 1.0]]), 2, 2).item()
        2.0
    """
    if x.ndim != 2 or x.shape[1] != height * width:
        raise ValueError(f"x must have shape (b, {height * width}), got {tuple(x.shape)}")
    image = x.unflatten(1, (height, width))
    down = torch.nn.functional.pad(image.diff(dim=1), (0, 0, 0, 1))
    right = torch.nn.functional.pad(image.diff(dim=2), (0, 1))
    lengths: Tensor = torch.linalg.vector_norm(torch.stack([down, right]), dim=0)
    return lengths.sum((1, 2))


@torch.no_grad()
def tv_restore(
    operator: Tensor,
    measurement: Tensor,
    *,
    height: int,
    width: int,
    weight: float,
    low: float = -math.inf,
    high: float = math.inf,
    jump: float = 0.1,
    tol: float = 1e-3,
    max_iter: int = 500,
) -> TVResult:
    r"""Images between `low` and `high` of least :math:`\frac12\|Ax-b\|^2+w\,\mathrm{TV}(x)`.

    ADMM with one factorization; it splits off the differences and the image itself.

    Args:
        operator: :math:`A`, shape ``(m, d)``.
        measurement: :math:`b`, one a row, shape ``(b, m)``.
        height: rows of an image.
        width: columns of an image.
        weight: :math:`w>0`.
        low: least gray value.
        high: largest gray value, above ``low``.
        jump: size of a typical step between pixels, which scales ADMM's penalty; positive. It
            changes the speed, not the solution.
        tol: largest change and largest disagreement of the two copies of a pixel (root mean
            square), relative to ``jump``; positive.
        max_iter: at least 1.

    Returns:
        A :class:`TVResult`.

    Raises:
        ValueError: shapes that do not fit, a number out of range.

    Example:
        >>> flat = tv_restore(
        ...     torch.eye(2), torch.tensor([[0.0, 1.0]]), height=1, width=2, weight=9.0, tol=1e-5
        ... )
        >>> [round(v, 2) for v in flat.x[0].tolist()]
        [0.5, 0.5]
    """
    _check(operator, measurement, weight)
    if min(height, width) < 1 or height * width != operator.shape[1]:
        raise ValueError(f"height * width must be {operator.shape[1]}, got {height} * {width}")
    if not low < high or not jump > 0 or not tol > 0 or max_iter < 1:
        raise ValueError(
            "low must be below high, jump and tol positive, max_iter at least 1, got "
            f"{low}, {high}, {jump}, {tol} and {max_iter}"
        )
    d, penalty = operator.shape[1], weight / jump
    copies = torch.cat([_differences(height, width, operator), operator.new_ones(d).diag()])
    inverse = torch.cholesky_inverse(
        _factor(operator.mT @ operator + penalty * (copies.mT @ copies))
    )
    back = measurement @ operator

    def project(raw: Tensor) -> Tensor:
        slopes = raw[:, : 2 * d].unflatten(1, (2, d))
        norm = torch.linalg.vector_norm(slopes, dim=1, keepdim=True)
        shrunk = slopes * (1 - jump / norm.clamp(min=jump))
        return torch.cat([shrunk.flatten(1), raw[:, 2 * d :].clamp(low, high)], dim=1)

    split = project(back @ inverse @ copies.mT)
    dual = torch.zeros_like(split)
    limit = tol * jump * math.sqrt(d)
    for step in range(1, max_iter + 1):
        x = (back + penalty * (split - dual) @ copies) @ inverse
        seen = x @ copies.mT
        new = project(seen + dual)
        dual = dual + seen - new
        gap, moved = (seen - new).norm(dim=1), (new - split).norm(dim=1)
        split = new
        if step % 10 == 0 or step == max_iter:
            converged = (gap <= limit) & (moved <= limit)
            if converged.all():
                break
    return TVResult(split[:, 2 * d :], step, converged)


def psnr(x: Tensor, target: Tensor) -> Tensor:
    r"""Peak signal-to-noise ratio, :math:`-10\log_{10}` of the mean squared error, in decibels.

    Args:
        x: images, shape ``(b, d)``, for gray values in [0, 1].
        target: the true images, of the same shape.

    Returns:
        Shape ``(b,)``; infinite for equal images.

    Raises:
        ValueError: shapes that differ.

    Example:
        >>> round(psnr(torch.full((1, 4), 0.1), torch.zeros(1, 4)).item(), 4)
        20.0
    """
    if x.shape != target.shape or x.ndim != 2:
        raise ValueError(
            f"x and target must have one shape (b, d), got {tuple(x.shape)}, {tuple(target.shape)}"
        )
    return -10 * torch.log10((x - target).square().mean(1))


def best_setting(
    solve: Callable[[float], Tensor], settings: Sequence[float], target: Tensor
) -> float:
    """The setting whose images, cut to gray values in [0, 1], have the highest mean PSNR.

    Args:
        solve: restores images ``(b, d)`` with a setting.
        settings: at least one.
        target: the true images, shape ``(b, d)``.

    Returns:
        One of ``settings``, the first of equals; images with nan are worse than any other.

    Raises:
        ValueError: no setting.

    Example:
        >>> best_setting(lambda gray: torch.full((1, 4), gray), [0.0, 0.4], torch.ones(1, 4))
        0.4
    """
    if not settings:
        raise ValueError("settings must hold at least one number")
    scores = torch.stack([psnr(solve(s).clamp(0, 1), target).mean() for s in settings])
    return settings[int(scores.nan_to_num(nan=-torch.inf, posinf=torch.inf).argmax())]
