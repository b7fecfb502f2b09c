"""Features in an order of importance: the layer, and how many of them to keep."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from wellposed.train import accuracy

__all__ = ["NestedDropout", "nested_distribution", "select_truncation", "truncate"]

PENALTY = 1e-5  # on each further channel when the width is chosen: of equals, the narrower wins


def nested_distribution(num_features: int, std: float, mean: float = 0.0) -> Tensor:
    r"""Distribution of the cut point: :math:`P(k) \propto \exp(-((k-\mu)/\eta)^2)`.

    There is no factor 1/2 in the exponent, so :math:`\eta` is not a standard deviation.

    Args:
        num_features: number :math:`D` of channels, at least 1.
        std: :math:`\eta > 0`; small is strong compression.
        mean: :math:`\mu`, 0 in all of the paper's experiments.

    Returns:
        Shape ``(D,)``, float64, sums to one; entry ``j`` is :math:`P(k = j + 1)`.

    Raises:
        ValueError: ``num_features`` below 1 or ``std`` not positive.

    Source: Section III; the exponent is that of the authors' ``GaussianDist``.

    Example:
        >>> p = nested_distribution(2, std=1.0)
        >>> round((p[0] / p[1]).log().item(), 6)  # 2^2 - 1^2
        3.0
    """
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, got {num_features}")
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}")
    k = torch.arange(1, num_features + 1, dtype=torch.float64)
    # A softmax: far from the mean, all of the exponentials themselves would round to zero.
    return torch.softmax(-(((k - mean) / std) ** 2), dim=0)


def truncate(x: Tensor, k: int) -> Tensor:
    """Keep the first k features and set the rest to zero.

    Args:
        x: features, shape ``(..., D)``.
        k: number of channels to keep, in 1..D.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: ``k`` outside 1..D.

    Source: Section III.

    Example:
        >>> truncate(torch.ones(3), 2).tolist()
        [1.0, 1.0, 0.0]
    """
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"k must lie in 1..{x.shape[-1]}, got {k}")
    return x * (torch.arange(x.shape[-1], device=x.device) < k)


class NestedDropout(nn.Module):
    r"""In training, zero all but the first k features; nothing is rescaled.

    Draws from torch's global random state, as ``nn.Dropout`` does. Channel :math:`j` survives where
    a uniform number lies below :math:`P(k \ge j)`, which falls with :math:`j`: one comparison
    gives the whole mask.

    Args:
        num_features: number :math:`D` of channels, at least 1.
        std, mean: :math:`\eta` and :math:`\mu` of :func:`nested_distribution`.
        per_sample: draw a cut point for each example; False (the paper) draws one a batch.

    Attributes:
        keep: in evaluation, the number of channels kept; None keeps them all.

    Raises:
        ValueError: a hyper-parameter out of range, or an input without D features.

    Source: Section III and the authors' training loop.

    Example:
        >>> NestedDropout(3, std=0.1)(torch.ones(1, 3)).tolist()  # P(k = 1) is one
        [[1.0, 0.0, 0.0]]
    """

    survival: Tensor

    def __init__(
        self, num_features: int, std: float, mean: float = 0.0, per_sample: bool = False
    ) -> None:
        super().__init__()
        p = nested_distribution(num_features, std, mean)
        survival = p.flip(0).cumsum(0).flip(0).clamp(max=1.0)
        survival[0] = 1.0  # exactly: the first channel always survives
        self.register_buffer("survival", survival)
        self.std, self.mean, self.per_sample = std, mean, per_sample
        self.keep: int | None = None

    def extra_repr(self) -> str:
        d = len(self.survival)
        return f"{d}, std={self.std}, mean={self.mean}, per_sample={self.per_sample}"

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, D) to features (B, D), with a suffix of the channels set to zero."""
        if x.ndim != 2 or x.shape[1] != len(self.survival):
            raise ValueError(f"x must have shape (B, {len(self.survival)}), got {tuple(x.shape)}")
        if not self.training:
            return x if self.keep is None else truncate(x, self.keep)
        rows = len(x) if self.per_sample else 1
        u = torch.rand(rows, 1, dtype=self.survival.dtype, device=x.device)
        return x * (u < self.survival).to(x.dtype)


def _by_width(features: Tensor, weight: Tensor) -> Tensor:
    """Logits of all truncations, (D, n, C): channels enter the sum one after the other."""
    return (features.T[:, :, None] * weight.T[:, None, :]).cumsum(dim=0)


def _pick(logits: Tensor, labels: Tensor, penalty: float) -> tuple[int, Tensor]:
    """The best width, and the accuracies of all, from logits (D, n, C)."""
    accuracies = accuracy(logits, labels.expand(logits.shape[:2]))
    cost = penalty * torch.arange(len(logits), dtype=torch.float64, device=logits.device)
    return int((accuracies - cost).argmax()) + 1, accuracies


def select_truncation(
    features: Tensor, weight: Tensor, labels: Tensor, penalty: float = PENALTY
) -> tuple[int, Tensor]:
    r"""Choose how many channels to keep: :math:`\arg\max_k\,\mathrm{acc}_k - \epsilon (k - 1)`.

    Args:
        features: :math:`h`, shape ``(n, D)``.
        weight: classifier :math:`W`, shape ``(C, D)``.
        labels: classes of validation examples, shape ``(n,)``, int64.
        penalty: :math:`\epsilon \ge 0`, the price of a channel.

    Returns:
        The number ``k`` of channels, in 1..D, and the accuracies of all truncations, ``(D,)``.

    Raises:
        ValueError: shapes that do not match or are empty, or a negative ``penalty``.

    Source: the authors' ``TestNested`` (their stored K counts from zero: it is ``k - 1``).

    Example:
        >>> h, W = torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> k, accuracies = select_truncation(h, W, torch.tensor([1]))
        >>> k, accuracies.tolist()
        (2, [0.0, 1.0])
    """
    n = len(labels)
    fits = weight.ndim == 2 and features.shape == (n, weight.shape[1])
    if not fits or 0 in (n, *weight.shape):
        raise ValueError(
            "features, weight and labels must have shapes (n, D), (C, D), (n,), not empty, got "
            f"{tuple(features.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if not penalty >= 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    return _pick(_by_width(features, weight), labels, penalty)
