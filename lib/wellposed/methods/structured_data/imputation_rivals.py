r"""Rivals of the joint model: gaps filled by rule, or by a generator trained before.

Beside S. Kim et al., "Probabilistic Imputation for Time-series Classification with Missing Data",
ICML 2023, arXiv:2308.06738 (:mod:`wellposed.methods.structured_data.probabilistic_imputation`).

The rivals share one recurrent classifier. They differ in what stands in the gaps: zero (the mean
of a standardized channel), the last observed value, a learned mixture of the two beside the mask
(after GRU-D, Che et al. 2018), or the mean of a generative model that never saw a label.

Departures from the paper: the paper's rivals have architectures of their own; these have that of
the joint model's classifier. The GRU-D-like one has its decay of inputs, not that of states.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wellposed.data.series import batches_by_seed, check_repeated, rows_by_seed, valid_steps
from wellposed.nets.sequence import StackedGRU, StackedLinear
from wellposed.ops.confidence import expected_calibration_error
from wellposed.ops.imputation import last_observed, observation_dropout
from wellposed.train import StackedAdam

DECAY_BIAS = 0.05  # first bias of the decay, as in the joint model

__all__ = [
    "RULES",
    "FilledClassifiers",
    "Scores",
    "score",
    "train_filled",
]

RULES = ("zero", "zero + mask", "forward", "GRU-D-like", "two-stage")
"""What stands in the gaps, in the order of the networks of :class:`FilledClassifiers`."""


@dataclass(frozen=True)
class Scores:
    """Scores of several classifiers, shape ``(copies,)`` each.

    Attributes:
        nll: mean negative log-likelihood of the true class, in nats.
        accuracy: share of right predictions.
        brier: mean squared distance of the probabilities from the one-hot label.
        ece: expected calibration error with ten bins.
    """

    nll: Tensor
    accuracy: Tensor
    brier: Tensor
    ece: Tensor


def score(log_probs: Tensor, y: Tensor) -> Scores:
    r"""Likelihood, accuracy, Brier score and calibration of predicted log-probabilities.

    Args:
        log_probs: shape ``(copies, n, classes)``.
        y: int64 labels, shape ``(n,)``.

    Returns:
        :class:`Scores`.

    Raises:
        ValueError: shapes that do not fit.

    Source: the paper's metrics.

    Example:
        >>> log_probs = torch.tensor([[[0.5, 0.5], [0.5, 0.5]]]).log()
        >>> score(log_probs, torch.tensor([0, 1])).brier.item()
        0.5
    """
    if log_probs.ndim != 3 or y.shape != log_probs.shape[1:2]:
        raise ValueError(
            f"log_probs must be (copies, n, classes) and y (n,), got {tuple(log_probs.shape)} and "
            f"{tuple(y.shape)}"
        )
    probs = log_probs.exp()
    truth = nn.functional.one_hot(y, log_probs.shape[-1]).to(probs.dtype)
    return Scores(
        nll=-(log_probs * truth).sum(-1).mean(-1),
        accuracy=(log_probs.argmax(-1) == y).to(probs.dtype).mean(-1),
        brier=(probs - truth).square().sum(-1).mean(-1),
        ece=probs.new_tensor([expected_calibration_error(p, y) for p in probs]),
    )


class FilledClassifiers(nn.Module):
    """Recurrent classifiers of series whose gaps are filled, one for each rule and group.

    Networks are ordered by rule (:data:`RULES`), then by group; a group is a seed with a rate of
    observation dropout, and its rules share masks.

    Args:
        features: channels of the series.
        classes: at least 2.
        groups: at least 1.
        hidden: units.

    Raises:
        ValueError: a size out of range, or inputs of another shape.

    Source: mean, forward and decay filling as in GRU-D (Che et al. 2018).

    Example:
        >>> nets = FilledClassifiers(2, 3, groups=1)
        >>> x, mask = torch.zeros(1, 4, 5, 2), torch.ones(1, 4, 5, 2, dtype=torch.bool)
        >>> nets(x, mask, torch.zeros_like(x), torch.full((1, 4), 5)).shape
        torch.Size([5, 4, 3])
    """

    def __init__(self, features: int, classes: int, *, groups: int, hidden: int = 24) -> None:
        super().__init__()
        if features < 1 or classes < 2:
            raise ValueError(f"need features >= 1 and classes >= 2, got {features}, {classes}")
        self.groups = groups
        copies = len(RULES) * groups
        self.classifier = StackedGRU(copies, 2 * features, hidden)
        self.to_class = StackedLinear(copies, hidden, classes)
        self.decay_weight = nn.Parameter(torch.zeros(groups, 1, 1, features))
        self.decay_bias = nn.Parameter(torch.full((groups, 1, 1, features), DECAY_BIAS))

    def forward(self, x: Tensor, mask: Tensor, drawn: Tensor, lengths: Tensor) -> Tensor:
        """Log-probabilities ``(rules * groups, n, classes)``.

        Args:
            x, mask: series and bool mask, shape ``(groups, n, steps, features)``.
            drawn: what the generative model proposes for each entry, the same shape.
            lengths: int64, shape ``(groups, n)``.
        """
        if x.ndim != 4 or x.shape[0] != self.groups or drawn.shape != x.shape:
            raise ValueError(
                f"x and drawn must be ({self.groups}, n, steps, features), got {tuple(x.shape)} "
                f"and {tuple(drawn.shape)}"
            )
        valid = valid_steps(lengths, x.shape[2])
        mask = mask & valid.unsqueeze(-1)
        last, since = last_observed(x, mask, torch.arange(x.shape[2], device=x.device))
        gap = torch.where(since.isfinite(), since, 0)
        gamma = torch.exp(-torch.relu(self.decay_weight * gap + self.decay_bias))
        zero = torch.zeros_like(x)
        fills = (zero, zero, last, gamma * last, drawn)
        values = torch.stack([torch.where(mask, x, fill) for fill in fills])
        seen = mask.to(x.dtype)
        flags = torch.stack([zero, seen, zero, seen, zero])
        states = self.classifier(torch.cat([values, flags], -1).flatten(0, 1))
        share = (valid / valid.sum(-1, keepdim=True)).to(x.dtype).repeat(len(RULES), 1, 1)
        pooled = (states * share.unsqueeze(-1)).sum(-2)
        log_probs: Tensor = self.to_class(pooled).log_softmax(-1)
        return log_probs


def train_filled(
    nets: FilledClassifiers,
    x: Tensor,
    mask: Tensor,
    drawn: Tensor,
    lengths: Tensor,
    y: Tensor,
    *,
    rates: Sequence[float],
    epochs: int,
    generator: torch.Generator,
    batch: int = 54,
    lr: float = 5e-3,
) -> None:
    """Fit the rivals; groups are ordered by dropout rate, then by seed.

    Args:
        nets: with ``len(rates) * seeds`` groups; changed in place.
        x, mask: training series and bool masks, shape ``(seeds, n, steps, features)``.
        drawn: proposals of the generative model for every entry, of the same shape.
        lengths, y: int64, shape ``(n,)``.
        rates: rates of the observation dropout.
        epochs: passes over the data.
        generator: source of all draws, on the device of ``x``.
        batch: series in a batch.
        lr: rate of Adam.

    Raises:
        ValueError: shapes that do not fit.

    Source: the rivals of the paper, with one classifier for all.

    Example:
        >>> nets, g = FilledClassifiers(2, 2, groups=1), torch.Generator().manual_seed(0)
        >>> x, mask = torch.zeros(1, 3, 4, 2), torch.ones(1, 3, 4, 2, dtype=torch.bool)
        >>> train_filled(nets, x, mask, x, torch.full((3,), 4), torch.tensor([0, 1, 0]),
        ...              rates=[0.0], epochs=1, generator=g)
    """
    check_repeated(x, mask, lengths)
    arms, seeds = len(rates), len(x)
    if nets.groups != arms * seeds:
        raise ValueError(f"nets must have {arms * seeds} groups, got {nets.groups}")
    dropout = torch.tensor(list(rates), dtype=x.dtype, device=x.device).repeat_interleave(seeds)
    adam = StackedAdam(nets.parameters(), lr=lr)
    for _ in range(epochs):
        for index in batches_by_seed(len(y), batch, seeds, generator):
            own, seen, fill = (
                rows_by_seed(v, index).repeat(arms, 1, 1, 1) for v in (x, mask, drawn)
            )
            rows = index.repeat(arms, 1)
            kept, _ = observation_dropout(seen, dropout.unsqueeze(-1), generator)
            log_probs = nets(own, kept, fill, lengths[rows])
            target = y[rows].repeat(len(RULES), 1).unsqueeze(-1)
            (-log_probs.gather(-1, target).mean((1, 2)).sum()).backward()
            adam.step()
