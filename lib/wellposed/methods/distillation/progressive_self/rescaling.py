"""By how much the loss shrinks the gradient of each example."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from wellposed.methods.distillation.progressive_self.loss import _check_alpha, _check_probs

__all__ = ["gradient_ratio", "rescaling_applies"]


def _residual(probs: Tensor, labels: Tensor) -> Tensor:
    """Probability that is missing on the label, (b,): the sum of the others keeps its digits."""
    hard = F.one_hot(labels, probs.shape[1]).to(torch.bool)
    return probs.masked_fill(hard, 0.0).sum(dim=1)


def gradient_ratio(probs: Tensor, past_probs: Tensor, labels: Tensor, alpha: float) -> Tensor:
    r"""By how much PS-KD shrinks an example's gradient: :math:`1 - \alpha (1 - q_g) / (1 - p_g)`.

    It equals :math:`\|\partial_z L_{PS}\|_1 / \|\partial_z L_{CE}\|_1` wherever
    :func:`rescaling_applies`. An example that made progress (:math:`q_g < p_g`) is scaled down by
    more than one that did not.

    Args:
        probs: predictions :math:`p` now, shape ``(b, c)``.
        past_probs: predictions :math:`q` one epoch ago, shape ``(b, c)``.
        labels: true classes :math:`g`, shape ``(b,)``, int64.
        alpha: weight of the past, in [0, 1].

    Returns:
        The ratio, shape ``(b,)``; minus infinity where :math:`p_g = 1` and :math:`q_g < 1`, and 1
        wherever :math:`q_g = 1`.

    Raises:
        ValueError: ``alpha`` or labels out of range, shapes that do not match.

    Source: method section (gradient rescaling).

    Example:
        >>> now, past = torch.tensor([[0.5, 0.5]]), torch.tensor([[0.25, 0.75]])
        >>> gradient_ratio(now, past, torch.tensor([0]), alpha=0.5).item()
        0.25
    """
    _check_alpha("alpha", alpha)
    _check_probs(probs, labels, past_probs)
    past, now = _residual(past_probs, labels), _residual(probs, labels)
    return 1.0 - alpha * past / torch.where(past == 0, 1.0, now)


def rescaling_applies(probs: Tensor, past_probs: Tensor, labels: Tensor, alpha: float) -> Tensor:
    r"""Where the gradient is the rescaled one: no class fell below its share of the past.

    For every class :math:`c \ne g` it needs :math:`p_c \ge \alpha q_c`; the sum of these is
    :math:`1 - p_g \ge \alpha (1 - q_g)`.

    Args:
        probs: predictions :math:`p` now, shape ``(b, c)``.
        past_probs: predictions :math:`q` one epoch ago, shape ``(b, c)``.
        labels: true classes :math:`g`, shape ``(b,)``, int64.
        alpha: weight of the past, in [0, 1].

    Returns:
        Truth values, shape ``(b,)``.

    Raises:
        ValueError: ``alpha`` or labels out of range, shapes that do not match.

    Source: method section (assumption behind the rescaling).

    Example:
        >>> now = torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.2, 0.0]])
        >>> past = torch.tensor([[0.8, 0.1, 0.1], [0.8, 0.1, 0.1]])
        >>> rescaling_applies(now, past, torch.tensor([0, 0]), alpha=0.8).tolist()
        [True, False]
    """
    _check_alpha("alpha", alpha)
    _check_probs(probs, labels, past_probs)
    hard = F.one_hot(labels, probs.shape[1]).to(torch.bool)
    return ((probs >= alpha * past_probs) | hard).all(dim=1)
