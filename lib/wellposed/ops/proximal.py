r"""Is a map a proximal operator?

Source: Gribonval and Nikolova, "A characterization of proximity operators", Journal of Mathematical
Imaging and Vision 2020: a continuous map is one exactly if it is the gradient of a convex function.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["ProxDefects", "prox_defects"]


@dataclass(frozen=True)
class ProxDefects:
    """How far a denoiser is from a proximal operator at some points; shapes ``(b,)``.

    Attributes:
        asymmetry: :math:`\\|J-J^\\top\\|_F/\\|J\\|_F` of the Jacobian; 0 for every gradient.
        min_eigenvalue: least eigenvalue of its symmetric part; at least 0 for a convex potential.
    """

    asymmetry: Tensor
    min_eigenvalue: Tensor


def prox_defects(denoiser: Callable[[Tensor], Tensor], y: Tensor) -> ProxDefects:
    r"""Asymmetry and least eigenvalue of a denoiser's Jacobian.

    A smooth map is a proximal operator exactly if its Jacobian is symmetric and positive
    semidefinite everywhere.

    Args:
        denoiser: maps ``(b, d)`` to ``(b, d)``, row by row.
        y: where to look, shape ``(b, d)``.

    Returns:
        A :class:`ProxDefects`.

    Raises:
        ValueError: ``y`` or the denoiser's output of another shape.

    Source: the characterization by Gribonval and Nikolova 2020.

    Example:
        >>> turn = torch.tensor([[0.0, 1.0], [-1.0, 0.0]])
        >>> prox_defects(lambda y: y @ turn, torch.ones(1, 2)).asymmetry.item()
        2.0
    """
    if y.ndim != 2 or 0 in y.shape:
        raise ValueError(f"y must have shape (b, d), not empty, got {tuple(y.shape)}")
    with torch.enable_grad():
        y = y.detach().requires_grad_()
        f = denoiser(y)
        if f.shape != y.shape:
            raise ValueError(f"denoiser must keep the shape {tuple(y.shape)}, got {tuple(f.shape)}")
        rows = [
            torch.autograd.grad(column.sum(), y, retain_graph=True)[0] for column in f.unbind(1)
        ]
    jacobian = torch.stack(rows, dim=1)
    size = jacobian.flatten(1).norm(dim=1).clamp_min(torch.finfo(y.dtype).tiny)
    asymmetry = (jacobian - jacobian.mT).flatten(1).norm(dim=1) / size
    symmetric = (jacobian + jacobian.mT) / 2
    return ProxDefects(asymmetry, torch.linalg.eigvalsh(symmetric)[:, 0])
