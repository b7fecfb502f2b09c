r"""Constant bounds on the Hessian of linear models, and small systems with their blocks.

Source: Böhning, "Multinomial logistic regression algorithm", Ann. Inst. Stat. Math. 1992, for the
bound of the softmax loss.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

__all__ = [
    "BlockPartition",
    "Bound",
    "DenseBound",
    "GramBound",
    "as_bound",
    "check_blocks",
    "diagonal_gain",
    "divide_or_zero",
    "hard_threshold_block",
    "solve_semidefinite",
]

GRAM_COLUMNS = 4096  # up to this many, hard thresholding forms the Gram matrix once
SHIFT = 2.0  # times k units of rounding: Cholesky's own error is about one of them


@dataclass(frozen=True)
class GramBound:
    r"""The bound of a linear model, without forming it: $H=s\,A^\top A$.

    $s=1$ for least squares and $\frac14$ for logistic loss. With `classes` $K>1$ it is
    $s(I-\frac1K\mathbf 1\mathbf 1^\top)\otimes A^\top A$ (softmax, $s=\frac12$), for coefficients
    `(p, K)` flattened by rows. What is worked out once is kept: do not change the features.
    """

    features: Tensor  # A, (m, p)
    scale: float = 1.0
    classes: int = 1

    @cached_property
    def _diagonal(self) -> Tensor:
        share = 1 - 1 / self.classes if self.classes > 1 else 1.0
        squares = self.features.square().sum(0).repeat_interleave(self.classes)
        return self.scale * share * squares

    @cached_property
    def _gram(self) -> Tensor:
        return self.scale * (self.features.T @ self.features)

    @cached_property
    def _largest(self) -> Tensor:
        a = self.features if self.features.shape[0] < self.features.shape[1] else self.features.T
        largest: Tensor = torch.linalg.eigvalsh(a @ a.T)[-1]
        return self.scale * largest

    def diagonal(self) -> Tensor:
        """All $L_i=H_{ii}$, `(n,)`."""
        return self._diagonal

    def block(self, index: Tensor) -> Tensor:
        """$H_{bb}$ for each row of `index` `(..., k)`."""
        columns = self.features[:, index // self.classes].movedim(0, -2)
        gram = self.scale * (columns.mT @ columns)
        if self.classes == 1:
            return gram
        label = index % self.classes
        return gram * ((label[..., :, None] == label[..., None, :]).to(gram) - 1 / self.classes)

    def subtract(self, base: Tensor, index: Tensor, values: Tensor, step: float) -> Tensor:
        """`base` - step $H_{:b}v$, `(n,)`: the step of a gradient that moved in one block only."""
        if self.classes == 1 and len(base) <= GRAM_COLUMNS:
            return torch.addmv(base, self._gram[index].T, values, alpha=-step)
        columns = self.features[:, index // self.classes]
        if self.classes == 1:
            return torch.addmv(base, self.features.T, columns @ values, alpha=-step * self.scale)
        # (classes, rows): what the coefficients of the block predict, summed by class
        fitted = columns.new_zeros(self.classes, len(columns))
        fitted.index_add_(0, index % self.classes, (columns * values).T)
        product = ((fitted - fitted.mean(0)) @ self.features).T.flatten()
        return torch.add(base, product, alpha=-step * self.scale)

    def apply(self, vector: Tensor) -> Tensor:
        """$Hv$, `(n,)`."""
        fitted = self.features @ vector.view(-1, self.classes)
        if self.classes > 1:
            fitted = fitted - fitted.mean(1, keepdim=True)
        return self.scale * (self.features.T @ fitted).flatten()

    def largest_eigenvalue(self) -> Tensor:
        r"""$\lambda_{max}(H)$, 0-d."""
        return self._largest


@dataclass(frozen=True)
class DenseBound:
    """A bound that is a matrix."""

    matrix: Tensor  # (n, n), symmetric positive semidefinite

    def diagonal(self) -> Tensor:
        """All $L_i=H_{ii}$, `(n,)`."""
        return self.matrix.diagonal()

    def block(self, index: Tensor) -> Tensor:
        """$H_{bb}$ for each row of `index` `(..., k)`."""
        return self.matrix[index[..., :, None], index[..., None, :]]

    def subtract(self, base: Tensor, index: Tensor, values: Tensor, step: float) -> Tensor:
        """`base` - step $H_{:b}v$, `(n,)`: the step of a gradient that moved in one block only."""
        return torch.addmv(base, self.matrix[index].T, values, alpha=-step)

    def apply(self, vector: Tensor) -> Tensor:
        """$Hv$, `(n,)`."""
        return self.matrix @ vector

    def largest_eigenvalue(self) -> Tensor:
        r"""$\lambda_{max}(H)$, 0-d."""
        largest: Tensor = torch.linalg.eigvalsh(self.matrix)[-1]
        return largest


Bound = GramBound | DenseBound


def divide_or_zero(value: Tensor, curvature: Tensor) -> Tensor:
    """Divide by a curvature, and return 0 where there is none.

    Args:
        value: any shape.
        curvature: broadcasts with it, at least 0.

    Returns:
        `value / curvature`, or 0 where `curvature` is 0 (a column of zeros, say).

    Raises:
        RuntimeError: from torch, where shapes do not fit.

    Example:
        >>> divide_or_zero(torch.tensor([3.0, 3.0]), torch.tensor([2.0, 0.0])).tolist()
        [1.5, 0.0]
    """
    return value / torch.where(curvature > 0, curvature, torch.inf)


def solve_semidefinite(matrix: Tensor, rhs: Tensor) -> Tensor:
    """Solve symmetric positive semidefinite systems by Cholesky's method, singular ones too.

    The diagonal is scaled to one and raised by a few units of rounding. For a singular system whose
    right-hand side is in the range, the result is a solution up to rounding.

    Args:
        matrix: `(..., k, k)`; a zero on the diagonal means a row and column of zeros.
        rhs: `(..., k)`.

    Returns:
        `(..., k)`; nothing is read back from the device.

    Raises:
        RuntimeError: from torch, where shapes do not fit.

    Example:
        >>> solve_semidefinite(torch.tensor([[4.0, 0.0], [0.0, 0.0]]), torch.tensor([8.0, 0.0]))
        tensor([2.0000, 0.0000])
    """
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    scale = torch.where(diagonal > 0, diagonal, torch.inf).rsqrt()
    scaled = matrix * scale[..., :, None] * scale[..., None, :]
    raised = 1 + SHIFT * matrix.shape[-1] * torch.finfo(matrix.dtype).eps
    scaled.diagonal(dim1=-2, dim2=-1).fill_(raised)
    factor, _ = torch.linalg.cholesky_ex(scaled)
    return scale * torch.cholesky_solve((scale * rhs)[..., None], factor)[..., 0]


def diagonal_gain(gradient: Tensor, lipschitz: Tensor, x: Tensor | None = None) -> Tensor:
    r"""Decrease of $g_id+\frac{L_i}2d^2$ at its best $d$; with $x$, at the best with $x_i+d\ge0$.

    Args:
        gradient: $g$, `(n,)`.
        lipschitz: $L_i\ge0$, `(n,)`.
        x: the point, `(n,)`, at least 0; no constraint if not given.

    Returns:
        `(n,)`, at least 0.

    Raises:
        RuntimeError: from torch, where shapes do not fit.

    Example:
        >>> g, L = torch.tensor([2.0, 2.0]), torch.tensor([1.0, 2.0])
        >>> diagonal_gain(g, L).tolist(), diagonal_gain(g, L, torch.zeros(2)).abs().tolist()
        ([2.0, 1.0], [0.0, 0.0])
    """
    if x is None:
        return divide_or_zero(gradient.square(), lipschitz) / 2
    flat = (lipschitz <= 0) & (gradient > 0)
    step = torch.maximum(torch.where(flat, -x, -divide_or_zero(gradient, lipschitz)), -x)
    return -(gradient * step + lipschitz / 2 * step.square())


def hard_threshold_block(
    gradient: Tensor, size: int, bound: Bound, step: float, num_iters: int
) -> Tensor:
    r"""Approximately the $k$ coordinates with the largest $g_b^\top H_{bb}^{-1}g_b$.

    $d\leftarrow\mathcal H_k(d-\mu(g+Hd))$ from the dense $d=-g/\sqrt{\mathrm{diag}\,H}$. (From zero
    it would return the largest $|g_i|$ and stay there.)

    Args:
        gradient: $g$, `(n,)`.
        size: $k$.
        bound: $H$.
        step: $\mu$, at most $1/\lambda_{max}(H)$.
        num_iters: at least 1.

    Returns:
        int64 `(size,)`, the support of the last $d$, its largest entry first.

    Raises:
        RuntimeError, IndexError: from torch, where shapes do not fit.
    """
    d = -divide_or_zero(gradient, bound.diagonal().sqrt())
    base = -step * gradient
    d = d + base - step * bound.apply(d)
    index = torch.topk(d.abs(), size).indices
    for _ in range(num_iters - 1):
        values = d[index]
        d = bound.subtract(base, index, values, step).index_add_(0, index, values)
        index = torch.topk(d.abs(), size).indices
    return index


@dataclass(frozen=True)
class BlockPartition:
    """Fixed blocks side by side, padded by the index n."""

    index: Tensor  # (B, k)
    matrix: Tensor  # H_bb of each, (B, k, k), zero where padded; empty if no rule needs it

    @classmethod
    def of(cls, blocks: Sequence[Tensor], n: int, bound: Bound | None) -> BlockPartition:
        """Pad and stack int64 blocks of coordinates below n."""
        index = torch.nn.utils.rnn.pad_sequence(list(blocks), batch_first=True, padding_value=n)
        if bound is None:
            return cls(index, index.new_zeros(0))
        real = index < n
        pair = real[:, :, None] & real[:, None, :]
        return cls(index, torch.where(pair, bound.block(index.clamp(max=n - 1)), 0.0))

    def gather(self, vector: Tensor) -> Tensor:
        """The entries of each block, `(B, k)`, 0 where padded."""
        return torch.cat([vector, vector.new_zeros(1)])[self.index]

    def lipschitz(self) -> Tensor:
        """$L_b$ of each block, `(B,)`."""
        largest: Tensor = torch.linalg.eigvalsh(self.matrix)[:, -1]
        return largest

    def scores(self, gradient: Tensor, rule: str, curvature: Tensor) -> Tensor:
        """What each block promises; `curvature` is $L_b$ for gsl and $D_i$ for gsd."""
        if rule == "gsd":
            return self.gather(divide_or_zero(gradient.square(), curvature)).sum(1)
        g = self.gather(gradient)
        if rule == "gsq":
            return (g * solve_semidefinite(self.matrix, g)).sum(1)
        total = g.square().sum(1)
        return divide_or_zero(total, curvature) if rule == "gsl" else total


def as_bound(
    hessian: Tensor | GramBound | None, n: int, *, dtype: torch.dtype | None = None
) -> Bound:
    """Wrap a bound over n variables; ValueError if it is not one, TypeError if not of `dtype`."""
    numbers = hessian.features if isinstance(hessian, GramBound) else hessian
    if dtype is not None and numbers is not None and numbers.dtype != dtype:
        raise TypeError(f"hessian must be {dtype} like the variables, got {numbers.dtype}")
    if isinstance(hessian, Tensor) and hessian.shape == (n, n):
        return DenseBound(hessian)
    if isinstance(hessian, GramBound) and hessian.features.shape[1] * hessian.classes == n:
        return hessian
    raise ValueError(f"hessian must be of shape ({n}, {n}) or a GramBound over {n} variables")


def check_blocks(blocks: Sequence[Tensor], n: int) -> None:
    """Raise a ValueError unless blocks hold coordinates below n."""
    if not len(blocks):
        raise ValueError("blocks must hold at least one block")
    for block in blocks:
        if block.ndim != 1 or not len(block) or block.dtype != torch.int64:
            raise ValueError("blocks must be int64 tensors of shape (k,) with k >= 1")
    index = torch.cat(list(blocks))
    if int(index.min()) < 0 or int(index.max()) >= n:
        raise ValueError(f"blocks must hold coordinates from 0 to {n - 1}")
