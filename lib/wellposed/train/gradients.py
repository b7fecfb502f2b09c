"""Gradients clipped or normalized by their joint norm, for one network or several side by side."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["rescale_gradients_"]


@torch.no_grad()
def rescale_gradients_(
    parameters: Sequence[Tensor], max_norm: float, mode: str = "clip", *, stacked: bool = False
) -> Tensor:
    r"""Clip or normalize gradients by their joint norm, in place.

    Clip: :math:`g \leftarrow g \min(1, c / \lVert g \rVert)`; normalize:
    :math:`g \leftarrow c g / \lVert g \rVert`. A gradient of norm zero stays zero.

    Args:
        parameters: tensors; those without a gradient are skipped.
        max_norm: :math:`c`, positive.
        mode: "clip" or "normalize".
        stacked: whether the first axis of each tensor counts networks, each with its own norm.

    Returns:
        Norm before, a scalar, or of shape (n,) where ``stacked``.

    Raises:
        ValueError: ``max_norm`` not positive, an unknown ``mode``, or no gradient at all.

    Source: Xiao 2024, gradient normalization among the compared techniques; standard.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> rescale_gradients_([w], 1.0).item(), w.grad.tolist()
        (5.0, [0.6000000238418579, 0.800000011920929])
    """
    if not max_norm > 0.0:
        raise ValueError(f"max_norm must be positive, got {max_norm}")
    if mode not in ("clip", "normalize"):
        raise ValueError(f"mode must be 'clip' or 'normalize', got {mode!r}")
    grads = [p.grad for p in parameters if p.grad is not None]
    if not grads:
        raise ValueError("parameters must hold at least one tensor with a gradient")
    if stacked:
        parts = torch.stack([torch.linalg.vector_norm(g.flatten(1), dim=1) for g in grads])
    else:
        parts = torch.stack([torch.linalg.vector_norm(g) for g in grads])
    norm: Tensor = torch.linalg.vector_norm(parts, dim=0)
    factor = max_norm / norm.clamp(min=torch.finfo(norm.dtype).tiny)
    factor = factor.clamp(max=1.0) if mode == "clip" else torch.where(norm > 0, factor, 1.0)
    for g in grads:
        g.mul_(factor.view(-1, *[1] * (g.ndim - 1)) if stacked else factor)
    return norm
