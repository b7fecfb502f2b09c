"""Soft targets, their schedule, and the loss that remembers an epoch."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PSKDLoss", "constant_alpha", "progressive_alpha", "soft_targets"]

ALPHA_T = 0.8  # the paper's value for all its image classifiers


def _check_alpha(name: str, alpha: float) -> None:
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"{name} must lie in [0, 1], got {alpha}")


def _check_probs(probs: Tensor, labels: Tensor, past_probs: Tensor) -> None:
    if probs.ndim != 2 or probs.shape[0] == 0 or probs.shape != past_probs.shape:
        raise ValueError(
            "probabilities must have shape (b, c) with b >= 1, now and in the past, got "
            f"{tuple(probs.shape)} and {tuple(past_probs.shape)}"
        )
    _check_labels(labels, *probs.shape)


def _check_labels(labels: Tensor, b: int, c: int) -> None:
    if labels.shape != (b,):
        raise ValueError(f"labels must have shape ({b},), got {tuple(labels.shape)}")
    # On a GPU this would wait for the device; there, indexing itself stops with an assertion.
    if labels.device.type == "cpu" and bool(((labels < 0) | (labels >= c)).any()):
        raise ValueError(f"labels must lie in 0..{c - 1}")


def progressive_alpha(epoch: int, total_epochs: int, alpha_T: float = ALPHA_T) -> float:
    r"""Weight of the past prediction: :math:`\alpha_T (e + 1) / T` in zero-based epoch :math:`e`.

    Args:
        epoch: zero-based epoch :math:`e`, in ``[0, total_epochs)``.
        total_epochs: number :math:`T` of epochs, at least 1.
        alpha_T: weight in the last epoch, in [0, 1].

    Returns:
        The weight, in [0, 1].

    Raises:
        ValueError: an argument out of range.

    Source: method section (linear growth); the authors' ``main.py`` counts epochs from zero.

    Example:
        >>> [progressive_alpha(e, 4) for e in (0, 1, 3)]
        [0.2, 0.4, 0.8]
    """
    _check_alpha("alpha_T", alpha_T)
    if not 0 <= epoch < total_epochs:
        raise ValueError(f"epoch must lie in [0, {total_epochs}), got {epoch}")
    return alpha_T * (epoch + 1) / total_epochs


def constant_alpha(epoch: int, total_epochs: int, alpha_T: float = ALPHA_T) -> float:
    r"""The same weight :math:`\alpha_T` in every epoch: the schedule without progression.

    Args:
        epoch: zero-based epoch, in ``[0, total_epochs)``.
        total_epochs: number of epochs, at least 1.
        alpha_T: the weight, in [0, 1].

    Returns:
        ``alpha_T``.

    Raises:
        ValueError: an argument out of range.

    Source: ours, an ablation of the linear growth.

    Example:
        >>> constant_alpha(0, 4)
        0.8
    """
    progressive_alpha(epoch, total_epochs, alpha_T)  # for its checks
    return alpha_T


def soft_targets(labels: Tensor, past_probs: Tensor, alpha: float) -> Tensor:
    r"""Refined targets :math:`(1 - \alpha)\, y + \alpha\, P^{past}`, without a gradient.

    Args:
        labels: classes, shape ``(b,)``, int64 in ``[0, c)``.
        past_probs: past predictions, shape ``(b, c)``, floating point, rows sum to 1.
        alpha: weight of the past, in [0, 1].

    Returns:
        Targets, shape ``(b, c)``, of the dtype of ``past_probs``; rows sum to 1.

    Raises:
        ValueError: ``alpha`` or labels out of range, shapes that do not match.

    Source: method section (definition of the soft targets).

    Example:
        >>> soft_targets(torch.tensor([0]), torch.tensor([[0.5, 0.5]]), alpha=0.5).tolist()
        [[0.75, 0.25]]
    """
    _check_alpha("alpha", alpha)
    _check_probs(past_probs, labels, past_probs)
    past = past_probs.detach()
    hard = F.one_hot(labels, past.shape[1]).to(past.dtype)
    return (1.0 - alpha) * hard + alpha * past


class PSKDLoss(nn.Module):
    r"""Cross-entropy to labels refined with the predictions of one epoch ago.

    .. math:: L = -\frac1b \sum_i \sum_c \tilde y_{ic} \log P_{ic}, \qquad
              \tilde y_i = (1 - \alpha_t)\, y_i + \alpha_t\, P_i^{(t-1)}

    The past is what the network said when the example was last visited, under the weights and the
    augmentation of that moment; an example that was never visited has its one-hot label as past.
    In training mode each call first builds the targets and *then* stores the new predictions.

    Args:
        num_examples: size :math:`n` of the training set, at least 1.
        num_classes: number :math:`c` of classes, at least 2.
        total_epochs: number :math:`T` of epochs, at least 1.
        alpha_T: weight of the past in the last epoch, in [0, 1]; 0 is plain cross-entropy.
        schedule: maps (epoch, total epochs, alpha_T) to the weight.

    Attributes:
        memory: buffer of shape ``(n, c)``, the last predictions; a row of zeros was never visited.
        alpha: weight of the past in the current epoch.

    Raises:
        ValueError: an argument out of range.

    Source: method section; order of reading and writing the memory: the authors' ``main.py``.

    Example:
        >>> loss = PSKDLoss(num_examples=4, num_classes=2, total_epochs=2)
        >>> z, y, index = torch.zeros(1, 2), torch.tensor([0]), torch.tensor([3])
        >>> first = loss(z, y, index)
        >>> loss.memory[3].tolist()
        [0.5, 0.5]
        >>> loss.set_epoch(1)  # now the target is 0.2 (1, 0) + 0.8 (1/2, 1/2) = (0.6, 0.4)
        >>> logit = torch.tensor([[1.0, 0.0]])  # its loss is log(1 + e) - 0.6
        >>> round(loss(logit, y, index).item() + 0.6, 4)
        1.3133
    """

    memory: Tensor

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        total_epochs: int,
        alpha_T: float = ALPHA_T,
        *,
        schedule: Callable[[int, int, float], float] = progressive_alpha,
    ) -> None:
        super().__init__()
        if num_examples < 1 or num_classes < 2 or total_epochs < 1:
            raise ValueError(
                "num_examples, num_classes and total_epochs must be at least 1, 2 and 1, got "
                f"{num_examples}, {num_classes} and {total_epochs}"
            )
        _check_alpha("alpha_T", alpha_T)
        self.total_epochs, self.alpha_T, self.schedule = total_epochs, alpha_T, schedule
        self.register_buffer("memory", torch.zeros(num_examples, num_classes))
        self.set_epoch(0)

    @property
    def alpha(self) -> float:
        """Weight of the past in the current epoch."""
        return self._alpha

    def set_epoch(self, epoch: int) -> None:
        """Start zero-based epoch ``epoch``; ValueError outside ``[0, total_epochs)``."""
        if not 0 <= epoch < self.total_epochs:
            raise ValueError(f"epoch must lie in [0, {self.total_epochs}), got {epoch}")
        self._alpha = self.schedule(epoch, self.total_epochs, self.alpha_T)

    def extra_repr(self) -> str:
        n, c = self.memory.shape
        return f"num_examples={n}, num_classes={c}, alpha_T={self.alpha_T}, alpha={self.alpha}"

    def forward(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        r"""Loss of one minibatch; in training mode, stores its predictions afterwards.

        Args:
            logits: network outputs, shape ``(b, c)``, floating point.
            labels: classes, shape ``(b,)``, int64 in ``[0, c)``.
            index: positions of the examples in the *training set*, each at most once, shape
                ``(b,)``, int64.

        Returns:
            Scalar of the dtype of ``logits``.

        Raises:
            ValueError: wrong shapes, labels out of range (checked on the CPU only).
            IndexError: ``index`` out of range (checked on the CPU only).
        """
        n, c = self.memory.shape
        if logits.ndim != 2 or logits.shape[1] != c or logits.shape[0] == 0:
            raise ValueError(f"logits must have shape (b, {c}), got {tuple(logits.shape)}")
        _check_labels(labels, *logits.shape)
        if index.shape != labels.shape:
            raise ValueError(f"index must have shape {tuple(labels.shape)}, got {index.shape}")
        if index.device.type == "cpu" and bool(((index < 0) | (index >= n)).any()):
            raise IndexError(f"index out of range: training examples are numbered 0..{n - 1}")
        wide = torch.promote_types(logits.dtype, torch.float32)
        log_probs = logits.log_softmax(dim=1, dtype=wide)
        past = self.memory[index].to(wide)
        hard = F.one_hot(labels, c).to(wide)
        past = torch.where(past.sum(dim=1, keepdim=True) > 0, past, hard)
        targets = soft_targets(labels, past, self.alpha)
        if self.training:
            self.memory[index] = log_probs.detach().exp().to(self.memory.dtype)
        return -(targets * log_probs).sum(dim=1).mean().to(logits.dtype)
