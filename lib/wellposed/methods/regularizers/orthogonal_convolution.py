r"""Orthogonal convolutions: when they exist, how far a kernel is from one, and how to get there.

El Mehdi Achour, François Malgouyres, Franck Mamalet. Existence, Stability and Scalability of
Orthogonal Convolutional Neural Networks. JMLR 23(347), 2022.

The claim: a sum of squares over the kernel's entries alone measures how far the layer's huge matrix
:math:`\mathcal K` is from orthogonal, whatever the size of the image:

.. math:: L_{orth}(K) = \|\mathrm{conv}(K,K)-I_{r0}\|_F^2-\max(0,M-CS^2) = \mathrm{err}_F^2/N^2.

A kernel has shape (M, C, k, k), out and in channels first as in torch, with k odd. The layer has
stride S and circular padding and maps C x SN x SN to M x N x N. It is *row orthogonal* (RO,
:math:`M\le CS^2`) if :math:`\mathcal K\mathcal K^\top=I`, *column orthogonal* (CO,
:math:`M\ge CS^2`) if :math:`\mathcal K^\top\mathcal K=I`.

Departures from the paper: :func:`optimal_kernel` and :func:`lorth_minimum` are ours.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.ops import convolution as ops
from wellposed.ops.convolution import conv_matrix, singular_values
from wellposed.train import StackedAdam

__all__ = [
    "LOrthRegularizer",
    "Minimized",
    "conv_matrix",
    "lorth",
    "lorth_each",
    "lorth_minimum",
    "minimize_lorth",
    "minimize_residual",
    "optimal_kernel",
    "orthogonal_exists",
    "orthogonality_residual",
    "singular_values",
    "spectral_bound_factor",
]


@dataclass(frozen=True)
class Minimized:
    """Kernels after a minimization.

    Attributes:
        kernels: shape (r, M, C, k, k), as they first met the target, else as they were at the end.
        values: shape (r,), the minimized function there.
        history: shape (t + 1, r), its values before each step and at the end; it ends early where
            all have met the target.
        reached: shape (r,), whether the target was reached.
    """

    kernels: Tensor
    values: Tensor
    history: Tensor
    reached: Tensor


def _self_convolution(kernels: Tensor, stride: int) -> Tensor:
    """conv(K, K) of each kernel, side by side as groups of one convolution.

    Shape (M, r * M, q, q). The padding is the largest multiple of the stride at which taps still
    overlap; then the shift zero stands in the middle.
    """
    r, m, c, k, _ = kernels.shape
    pad = (k - 1) // stride * stride
    image = kernels.transpose(0, 1).reshape(m, r * c, k, k)
    return F.conv2d(image, kernels.flatten(0, 1), stride=stride, padding=pad, groups=r)


def _identity(like: Tensor) -> Tensor:
    """I_r0: what conv(K, K) is for orthonormal filters, the identity in the middle."""
    m, size = len(like), like.shape[-1]
    identity = torch.zeros_like(like)
    eye = torch.eye(m, dtype=like.dtype, device=like.device)
    identity[:, :, size // 2, size // 2] = eye.repeat(1, like.shape[1] // m)
    return identity


def lorth_each(kernels: Tensor, stride: int = 1) -> Tensor:
    r"""The regularizer of several kernels side by side; see :func:`lorth`.

    Args:
        kernels: shape (r, M, C, k, k), k odd.
        stride: at least 1.

    Returns:
        Shape (r,), differentiable.

    Raises:
        ValueError: kernels of another shape, an even k, or a stride below 1.

    Source: Wang et al. 2020; Achour et al. 2022, definition of L_orth.

    Example:
        >>> lorth_each(torch.ones(2, 1, 1, 1, 1) * torch.tensor([1.0, 2.0]).view(2, 1, 1, 1, 1))
        tensor([0., 9.])
    """
    m, c, _ = ops.check_kernel(kernels, stride, 5)
    product = _self_convolution(kernels, stride)
    residual = product - _identity(product)
    squares = residual.square().view(m, len(kernels), m, -1).sum((0, 2, 3))
    return squares - max(0, m - c * stride**2)


def lorth(kernel: Tensor, stride: int = 1) -> Tensor:
    r"""How far a convolution is from orthogonal, from its kernel alone.

    :math:`L_{orth}(K)=\|\mathrm{conv}(K,K)-I_{r0}\|_F^2-\max(0,M-CS^2)`, where entry (m, l, p) of
    conv(K, K) is the inner product of filter m with filter l shifted by p strides.

    Args:
        kernel: shape (M, C, k, k), k odd.
        stride: S, at least 1.

    Returns:
        A scalar, at least 0 up to rounding; 0 exactly for orthogonal layers. Differentiable.

    Raises:
        ValueError: a kernel of another shape, an even k, or a stride below 1.

    Source: Wang et al. 2020; Achour et al. 2022, definition of L_orth.

    Example:
        >>> lorth(torch.tensor([[[[0.0, 0.0, 0.0], [1.0, 0.0, 1.0], [0.0, 0.0, 0.0]]]]))
        tensor(3.)
    """
    ops.check_kernel(kernel, stride)
    return lorth_each(kernel[None], stride)[0]


class LOrthRegularizer:
    r"""The penalty :math:`\lambda\sum_{layers}L_{orth}` of a network.

    It counts each ``nn.Conv2d`` with one group, no dilation and a square odd kernel with equal
    strides; other layers are skipped. The theory holds for ``padding_mode="circular"``.

    Args:
        module: the network, with at least one such layer.
        weight: :math:`\lambda`, at least 0.

    Raises:
        ValueError: a negative weight, or no layer to regularize.

    Source: Achour et al. 2022, experiments; Wang et al. 2020.

    Example:
        >>> layer = nn.Conv2d(1, 1, 1, bias=False)
        >>> _ = nn.init.constant_(layer.weight, 2.0)
        >>> LOrthRegularizer(layer, weight=0.5)().item()
        4.5
    """

    def __init__(self, module: nn.Module, weight: float = 1.0) -> None:
        if not 0.0 <= weight < float("inf"):
            raise ValueError(f"weight must be finite and at least 0, got {weight}")
        found = [layer for layer in module.modules() if isinstance(layer, nn.Conv2d)]
        self.layers = [layer for layer in found if self._counts(layer)]
        if not self.layers:
            raise ValueError("module must hold a Conv2d with one group and a square odd kernel")
        self.weight = weight

    @staticmethod
    def _counts(layer: nn.Conv2d) -> bool:
        (a, b), (s, t) = layer.kernel_size, layer.stride
        return layer.groups == 1 and a == b and a % 2 == 1 and s == t and set(layer.dilation) == {1}

    def __call__(self) -> Tensor:
        """The penalty now: a scalar."""
        terms = [lorth(layer.weight, layer.stride[0]) for layer in self.layers]
        return self.weight * torch.stack(terms).sum()


def lorth_minimum(out_channels: int, in_channels: int, kernel_size: int, stride: int = 1) -> int:
    r"""The smallest value of :math:`L_{orth}` over all kernels of a shape.

    :math:`\max(0,\ \min(M,CS^2)-Ck^2)`: a layer of rank at most :math:`Ck^2` a position cannot have
    :math:`\min(M,CS^2)` orthonormal rows or columns there.

    Args:
        out_channels, in_channels, kernel_size, stride: M, C, k (odd) and S, at least 1.

    Returns:
        A whole number, 0 if an orthogonal layer exists.

    Raises:
        ValueError: a number out of range.

    Source: ours, from the existence theorem of Achour et al. 2022.

    Example:
        >>> lorth_minimum(10, 1, 3, 4), lorth_minimum(20, 1, 3, 4), lorth_minimum(64, 64, 3)
        (1, 7, 0)
    """
    ops.check_layer(out_channels, in_channels, kernel_size, stride)
    return max(0, min(out_channels, in_channels * stride**2) - in_channels * kernel_size**2)


def orthogonal_exists(
    out_channels: int, in_channels: int, kernel_size: int, stride: int = 1
) -> bool:
    r"""Whether some kernel makes the circular convolution orthogonal.

    RO (:math:`M\le CS^2`): iff :math:`M\le Ck^2`. CO (:math:`M\ge CS^2`): iff :math:`S\le k`.

    Args:
        out_channels, in_channels, kernel_size, stride: M, C, k (odd) and S, at least 1.

    Returns:
        True if there is one.

    Raises:
        ValueError: a number out of range.

    Source: Achour et al. 2022, existence theorem.

    Example:
        >>> orthogonal_exists(64, 3, 7, 2), orthogonal_exists(10, 1, 3, 4)
        (True, False)
    """
    ops.check_layer(out_channels, in_channels, kernel_size, stride)
    if out_channels <= in_channels * stride**2:
        return out_channels <= in_channels * kernel_size**2
    return stride <= kernel_size


def optimal_kernel(
    out_channels: int,
    in_channels: int,
    kernel_size: int,
    stride: int = 1,
    *,
    generator: torch.Generator,
) -> Tensor:
    r"""A kernel with the least :math:`L_{orth}`: an orthogonal layer wherever there is one.

    Filters with a single 1, no two of which ever meet: their taps differ in channel, or in row or
    column modulo the stride. Such a layer copies pixels. A random rotation of the output channels
    then spreads each filter over the taps, and changes no singular value.

    Args:
        out_channels, in_channels, kernel_size, stride: M, C, k (odd) and S, at least 1.
        generator: of taps and rotation, on the CPU.

    Returns:
        A float64 kernel (M, C, k, k) on the CPU.

    Raises:
        ValueError: a number out of range.

    Source: ours, for the existence theorem of Achour et al. 2022.

    Example:
        >>> kernel = optimal_kernel(9, 2, 3, 2, generator=torch.Generator().manual_seed(0))
        >>> abs(round(lorth(kernel, 2).item(), 6))
        0.0
    """
    ops.check_layer(out_channels, in_channels, kernel_size, stride)
    reach = min(kernel_size, stride)
    places = torch.cartesian_prod(*map(torch.arange, (in_channels, reach, reach))).view(-1, 3)
    places = places[torch.randperm(len(places), generator=generator)[:out_channels]]
    # Any tap of the same residue modulo the stride will do.
    choices = (kernel_size - 1 - places[:, 1:]) // stride + 1
    steps = (torch.rand(choices.shape, generator=generator) * choices).long()
    rows, columns = (places[:, 1:] + stride * steps).unbind(1)
    single = torch.zeros(out_channels, in_channels, kernel_size, kernel_size, dtype=torch.float64)
    single[torch.arange(len(places)), places[:, 0], rows, columns] = 1.0
    noise = torch.randn(out_channels, out_channels, generator=generator, dtype=torch.float64)
    rotation: Tensor = torch.linalg.qr(noise).Q
    return (rotation @ single.flatten(1)).view_as(single)


def orthogonality_residual(
    kernel: Tensor, size: int, stride: int = 1, norm: Literal["fro", "spectral"] = "fro"
) -> Tensor:
    r"""How far the layer's matrix is from orthogonal, in one of two norms.

    :math:`\|\mathcal K\mathcal K^\top-I\|` if :math:`M\le CS^2`, else
    :math:`\|\mathcal K^\top\mathcal K-I\|`: the Frobenius norm :math:`\mathrm{err}_F` or the
    largest singular value :math:`\mathrm{err}_s`.

    Args:
        kernel: shape (M, C, k, k), k odd.
        size: N, height and width of the output.
        stride: S, at least 1.
        norm: fro or spectral.

    Returns:
        A scalar, at least 0.

    Raises:
        ValueError: a number out of range, SN below k, or another norm.

    Source: Achour et al. 2022, definition of err_F and err_s.

    Example:
        >>> kernel = torch.tensor([[[[2.0]]]])
        >>> [orthogonality_residual(kernel, 2, norm=norm).item() for norm in ("fro", "spectral")]
        [6.0, 3.0]
    """
    if norm not in ("fro", "spectral"):
        raise ValueError(f"norm must be fro or spectral, got {norm!r}")
    m, c, k = ops.check_kernel(kernel, stride)
    ops.check_size(size, stride, k)
    blocks, counts = ops.frequency_blocks(kernel, size, stride)
    if m > c * stride**2:
        blocks = blocks.mT
    residual = blocks @ blocks.mH - torch.eye(blocks.shape[-2], device=kernel.device)
    if norm == "fro":
        squares = torch.view_as_real(residual).square().sum((1, 2, 3))
        return (squares * counts).sum().sqrt()
    largest: Tensor = torch.linalg.eigvalsh(residual).abs().max()
    return largest


def spectral_bound_factor(
    out_channels: int, in_channels: int, kernel_size: int, stride: int = 1
) -> float:
    r"""The factor :math:`\alpha` of :math:`\mathrm{err}_s^2\le\alpha L_{orth}`.

    :math:`M(2\lfloor\frac{k-1}S\rfloor+1)^2` for RO, :math:`C(2k-1)^2` for CO, the smaller one
    where both hold. It does not depend on the image, of at least 2k - 1 pixels a side.

    Args:
        out_channels, in_channels, kernel_size, stride: M, C, k (odd) and S, at least 1.

    Returns:
        The factor.

    Raises:
        ValueError: a number out of range.

    Source: Achour et al. 2022, theorem on the spectral norm.

    Example:
        >>> spectral_bound_factor(8, 16, 3), spectral_bound_factor(16, 8, 3)
        (200.0, 200.0)
    """
    ops.check_layer(out_channels, in_channels, kernel_size, stride)
    rows = out_channels * (2 * ((kernel_size - 1) // stride) + 1) ** 2
    columns = in_channels * (2 * kernel_size - 1) ** 2
    square = in_channels * stride**2
    if out_channels == square:
        return float(min(rows, columns))
    return float(rows if out_channels < square else columns)


class _Descent:
    """Adam on kernels side by side; keeps each kernel as it was when it first met the target."""

    def __init__(self, kernels: Tensor, lr: float, target: float) -> None:
        self.now = kernels.detach().clone()
        self.kept, self.target = self.now, target
        self.values = kernels.new_zeros(len(kernels))
        self.reached = self.values != 0.0
        self.history: list[Tensor] = []
        self.adam = StackedAdam([self.now], lr=lr)

    def step(self, values: Tensor, gradient: Tensor) -> None:
        self.record(values)
        self.now.grad = gradient
        self.adam.step()

    def record(self, values: Tensor) -> None:
        self.history.append(values)
        if self.target > 0.0:
            self.kept = torch.where(self.reached.view(-1, 1, 1, 1, 1), self.kept, self.now)
            self.values = torch.where(self.reached, self.values, values)
            self.reached = self.reached | (values <= self.target)

    def done(self) -> bool:
        """Whether all have met the target; looked at rarely, because a GPU must wait for it."""
        return len(self.history) % 50 == 0 and bool(self.reached.all())

    def result(self) -> Minimized:
        history = torch.stack(self.history)
        if self.target > 0.0:
            return Minimized(self.kept, self.values, history, self.reached)
        return Minimized(self.now, history[-1], history, history[-1] <= self.target)


def _check_descent(kernels: Tensor, steps: int, lr: float) -> None:
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    if not 0.0 < lr < float("inf"):
        raise ValueError(f"lr must be finite and positive, got {lr}")
    if not bool(kernels.isfinite().all()):
        raise ValueError("kernels must be finite")


@torch.no_grad()
def minimize_lorth(
    kernels: Tensor, stride: int = 1, *, steps: int = 800, lr: float = 0.01, target: float = 0.0
) -> Minimized:
    r"""Minimize :math:`L_{orth}` of several kernels side by side with Adam.

    The gradient is :math:`4\,\mathrm{conv}^\top(\mathrm{conv}(K,K)-I_{r0})` applied to K: both
    arguments of conv(K, K) contribute the same, so one transposed convolution does.

    Args:
        kernels: where to start, shape (r, M, C, k, k), k odd; not changed.
        stride: S, at least 1.
        steps: at least 1.
        lr: of Adam, positive.
        target: if positive, each kernel is returned as it was when its value first met it.

    Returns:
        The kernels and how they got there; one that misses the target says so in ``reached``.

    Raises:
        ValueError: kernels of another shape, not finite or too large, or a number out of range.

    Source: Achour et al. 2022, experiments on the landscape of L_orth.

    Example:
        >>> minimize_lorth(torch.full((1, 1, 1, 1, 1), 2.0), target=0.1).reached
        tensor([True])
    """
    m, c, k = ops.check_kernel(kernels, stride, 5)
    _check_descent(kernels, steps, lr)
    descent, r = _Descent(kernels, lr, target), len(kernels)
    pad, excess = (k - 1) // stride * stride, max(0, m - c * stride**2)
    identity = _identity(_self_convolution(descent.now, stride))
    for step in range(steps):
        residual = _self_convolution(descent.now, stride).sub_(identity)
        squares = residual.square().view(m, r, m, -1).sum((0, 2, 3)) - excess
        filters = descent.now.flatten(0, 1)
        slope = F.conv_transpose2d(residual, filters, stride=stride, padding=pad, groups=r)
        slope = 4.0 * slope.view(m, r, c, k, k).transpose(0, 1)
        if step == 0 and not bool(slope.square().isfinite().all()):
            raise ValueError("kernels are too large: the gradient overflows")
        descent.step(squares, slope)
        if descent.done():
            break
    descent.record(lorth_each(descent.now, stride))
    return descent.result()


def minimize_residual(
    kernels: Tensor,
    size: int,
    stride: int = 1,
    *,
    padding_mode: ops.Padding,
    steps: int = 300,
    lr: float = 0.02,
) -> Minimized:
    r"""Minimize :math:`\mathrm{err}_F^2` of the written-out matrix, for any padding, with Adam.

    Args:
        kernels: where to start, shape (r, M, C, k, k), k odd; not changed.
        size: N, height and width of the output.
        stride: S, at least 1.
        padding_mode: circular, zeros or valid, as in :func:`conv_matrix`.
        steps: at least 1.
        lr: of Adam, positive.

    Returns:
        The kernels and how they got there.

    Raises:
        ValueError: kernels of another shape, not finite or too large, or a number out of range.

    Source: ours, for the paper's statements on other paddings.

    Example:
        >>> start = torch.full((1, 1, 1, 1, 1), 2.0)
        >>> minimize_residual(start, 2, padding_mode="zeros").values < 1e-3
        tensor([True])
    """
    m, c, k = ops.check_kernel(kernels, stride, 5)
    ops.check_size(size, stride, k)
    ops.check_padding(padding_mode)
    _check_descent(kernels, steps, lr)
    descent, wide = _Descent(kernels, lr, 0.0), m <= c * stride**2

    def value(kernels: Tensor) -> Tensor:
        matrices = ops.responses(kernels, size, stride, padding_mode)
        gram = matrices @ matrices.mT if wide else matrices.mT @ matrices
        eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
        return (gram - eye).square().sum((1, 2))

    for step in range(steps):
        with torch.enable_grad():
            leaf = descent.now.detach().requires_grad_()
            values = value(leaf)
            (slope,) = torch.autograd.grad(values.sum(), leaf)
        if step == 0 and not bool(slope.square().isfinite().all()):
            raise ValueError("kernels are too large: the gradient overflows")
        descent.step(values.detach(), slope)
    descent.record(value(descent.now))
    return descent.result()
