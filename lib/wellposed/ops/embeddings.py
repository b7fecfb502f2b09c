"""How spread out embeddings are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Geometry", "embedding_geometry"]


@dataclass(frozen=True)
class Geometry:
    """How spread out embeddings are: mean cosine between two of them, and effective rank."""

    cosine: Tensor
    rank: Tensor


def embedding_geometry(embeddings: Tensor) -> Geometry:
    r"""Mean cosine between embeddings, and their effective rank.

    With unit vectors :math:`u_i = x_i / \|x_i\|` and the eigenvalues :math:`\lambda_k` of the
    covariance of the :math:`x_i`,

    .. math:: \mathrm{cosine} = \frac{\|\sum_i u_i\|^2 - n}{n (n - 1)}, \qquad
              \mathrm{rank} = \exp\Bigl(-\sum_k s_k \log s_k\Bigr), \;
              s_k = \lambda_k / \textstyle\sum_l \lambda_l .

    Args:
        embeddings: ``(n, d)`` with ``n >= 2``.

    Returns:
        Two scalars of the dtype of ``embeddings``; the rank is 1 where all embeddings are equal.

    Raises:
        ValueError: not a matrix with two rows or more.

    Source: ours; the rank after O. Roy, M. Vetterli, "The effective rank", EUSIPCO 2007.

    Example:
        >>> g = embedding_geometry(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
        >>> round(g.rank.item(), 4)  # the two directions vary equally
        2.0
    """
    if embeddings.ndim != 2 or embeddings.shape[0] < 2:
        raise ValueError(
            f"embeddings must have shape (n, d) with n >= 2, got {tuple(embeddings.shape)}"
        )
    n = embeddings.shape[0]
    units = F.normalize(embeddings, dim=1)
    cosine = (units.sum(0).square().sum() - units.square().sum()) / (n * (n - 1))
    share = torch.linalg.eigvalsh(torch.cov(embeddings.mT)).clamp_min(0)
    share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
    return Geometry(cosine, torch.special.entr(share).sum().exp())
