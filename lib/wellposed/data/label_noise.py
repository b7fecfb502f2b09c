"""Wrong labels on purpose: noise models, a noisy split, and what a model makes of it.

The noise models are those that the literature on noisy labels shares; where a docstring says
"the paper", it is Liu et al., "Early-Learning Regularization Prevents Memorization of Noisy
Labels", NeurIPS 2020, whose code draws them this way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = [
    "NoisyTask",
    "asymmetric_noise",
    "check_tasks",
    "memorization_stats",
    "noisy_split",
    "outcome_shares",
    "symmetric_noise",
]


@dataclass(frozen=True)
class NoisyTask:
    """A data set with wrong training and validation labels and a clean test set.

    Attributes:
        x, noisy, clean: training inputs ``(n, ...)``, given labels ``(n,)``, true labels ``(n,)``.
            Training sees ``noisy`` only; ``clean`` is for measuring.
        x_val, noisy_val: validation inputs and labels, with the same kind of noise.
        x_test, y_test: test inputs and true labels.
    """

    x: Tensor
    noisy: Tensor
    clean: Tensor
    x_val: Tensor
    noisy_val: Tensor
    x_test: Tensor
    y_test: Tensor


PARTS = (("x", "noisy", "clean"), ("x_val", "noisy_val"), ("x_test", "y_test"))  # of a task


def check_tasks(tasks: Sequence[NoisyTask]) -> None:
    """Raise ValueError unless the inputs and labels of each part pair up, and none is empty."""
    for task in tasks:
        lengths = [[len(vars(task)[name]) for name in part] for part in PARTS]
        if any(len(set(part)) > 1 or part[0] == 0 for part in lengths):
            raise ValueError(f"tasks must have parts of one length each, not 0, got {lengths}")


def _check_labels(labels: Tensor, num_classes: int, rate: float) -> None:
    if num_classes < 2:
        raise ValueError(f"num_classes must be at least 2, got {num_classes}")
    if not 0.0 <= rate <= 1.0:
        raise ValueError(f"rate must lie in [0, 1], got {rate}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must have dtype torch.int64, got {labels.dtype}")
    if labels.ndim != 1 or labels.numel() == 0:
        raise ValueError(f"labels must be 1-D and not empty, got shape {tuple(labels.shape)}")
    if int(labels.min()) < 0 or int(labels.max()) >= num_classes:
        raise ValueError(f"labels must lie in 0..{num_classes - 1}")


def _draw_device(labels: Tensor, generator: torch.Generator | None) -> torch.device:
    """Draw where the generator lives: a CPU generator then gives the same noise on every device."""
    return labels.device if generator is None else generator.device


def symmetric_noise(
    labels: Tensor,
    num_classes: int,
    rate: float,
    generator: torch.Generator | None = None,
    include_true: bool = True,
) -> Tensor:
    r"""Replace a random share of the labels by uniformly drawn classes.

    Exactly ``round(rate * n)`` labels are drawn again. With ``include_true=True`` (the paper) the
    true class may be drawn, so only ``rate * (1 - 1/num_classes)`` of the labels end up wrong: 36 %
    at "40 %" and ten classes. With ``include_true=False`` every drawn label is wrong.

    Args:
        labels: true classes, shape ``(n,)``, int64 in ``[0, num_classes)``.
        num_classes: number of classes, at least 2.
        rate: share of labels to draw again, in [0, 1].
        generator: source of randomness; a CPU generator gives the same noise on every device.
        include_true: whether the true class may be drawn.

    Returns:
        Noisy labels, shape ``(n,)``, int64; ``labels`` is left as it is.

    Raises:
        ValueError: ``num_classes``, ``rate`` or ``labels`` out of range.
        TypeError: ``labels`` is not int64.

    Source: Section 6 and the authors' data loaders.

    Example:
        >>> labels = torch.zeros(10, dtype=torch.int64)
        >>> noisy = symmetric_noise(labels, 5, 0.4, include_true=False)
        >>> int((noisy != labels).sum())
        4
    """
    _check_labels(labels, num_classes, rate)
    n, device = labels.numel(), _draw_device(labels, generator)
    chosen = torch.randperm(n, generator=generator, device=device)[: round(rate * n)]
    low = 0 if include_true else 1  # a shift of 0 keeps the true class
    shift = torch.randint(low, num_classes, chosen.shape, generator=generator, device=device)
    noisy, chosen = labels.clone(), chosen.to(labels.device)
    noisy[chosen] = (labels[chosen] + shift.to(labels.device)) % num_classes
    return noisy


def asymmetric_noise(
    labels: Tensor,
    num_classes: int,
    rate: float,
    generator: torch.Generator | None = None,
    flips_to: Sequence[int] | None = None,
) -> Tensor:
    r"""Flip a share of each class to one fixed other class (pair noise).

    In each class ``c``, exactly ``round(rate * n_c)`` labels become ``flips_to[c]``. A class with
    ``flips_to[c] == c`` stays clean. By default each class flips to the next one, as in the
    paper's CIFAR-100 experiment; for CIFAR-10 the paper flips similar classes (cat and dog, truck
    to automobile, ...), which is ``flips_to=[0, 1, 0, 5, 7, 3, 6, 7, 8, 1]``.

    Args:
        labels: true classes, shape ``(n,)``, int64 in ``[0, num_classes)``.
        num_classes: number of classes, at least 2.
        rate: share of each class to flip, in [0, 1].
        generator: source of randomness; a CPU generator gives the same noise on every device.
        flips_to: ``num_classes`` classes, or None for ``(c + 1) % num_classes``.

    Returns:
        Noisy labels, shape ``(n,)``, int64; ``labels`` is left as it is.

    Raises:
        ValueError: ``num_classes``, ``rate``, ``labels`` or ``flips_to`` out of range.
        TypeError: ``labels`` is not int64.

    Source: Section 6 and the authors' data loaders.

    Example:
        >>> labels = torch.tensor([0, 0, 1, 1])
        >>> sorted(asymmetric_noise(labels, 3, 0.5).tolist())
        [0, 1, 1, 2]
    """
    _check_labels(labels, num_classes, rate)
    partner = list(flips_to) if flips_to is not None else [*range(1, num_classes), 0]
    if len(partner) != num_classes or not all(0 <= c < num_classes for c in partner):
        raise ValueError(
            f"flips_to must hold {num_classes} classes in 0..{num_classes - 1}, got {partner}"
        )
    noisy, device = labels.clone(), _draw_device(labels, generator)
    for c, other in enumerate(partner):
        members = (labels == c).nonzero().flatten()
        n = members.numel()
        chosen = torch.randperm(n, generator=generator, device=device)[: round(rate * n)]
        noisy[members[chosen.to(labels.device)]] = other
    return noisy


def noisy_split(
    x: Tensor,
    y: Tensor,
    corrupt: Callable[[Tensor], Tensor],
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    generator: torch.Generator | None = None,
) -> NoisyTask:
    r"""Split a clean data set at random and corrupt the training and validation labels.

    Validation labels are corrupted too: whoever has no clean training labels has no clean
    validation labels either. The test labels stay clean.

    Args:
        x: inputs, shape ``(n, ...)``.
        y: true classes, shape ``(n,)``, int64.
        corrupt: maps true labels to noisy ones; called for training and validation separately.
        num_train, num_val, num_test: sizes, each at least 1, together at most ``n``.
        generator: source of the split.

    Returns:
        A :class:`NoisyTask` whose parts do not overlap.

    Raises:
        ValueError: sizes that do not fit, or ``x`` and ``y`` of different lengths.

    Source: Section 6 (the authors' loaders keep 10 % as a noisy validation set).

    Example:
        >>> x, y = torch.arange(6.0).reshape(6, 1), torch.zeros(6, dtype=torch.int64)
        >>> task = noisy_split(x, y, lambda y: y + 1, num_train=3, num_val=2, num_test=1)
        >>> task.noisy.tolist(), task.noisy_val.tolist(), task.y_test.tolist()
        ([1, 1, 1], [1, 1], [0])
    """
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same length, got {len(x)} and {len(y)}")
    sizes = (num_train, num_val, num_test)
    if min(sizes) < 1 or sum(sizes) > len(y):
        raise ValueError(
            "num_train, num_val, num_test must be positive and sum to at most "
            f"{len(y)}, got {sizes}"
        )
    order = torch.randperm(len(y), generator=generator, device=_draw_device(y, generator))
    train, val, test = order.to(y.device)[: sum(sizes)].split(list(sizes))
    return NoisyTask(
        x=x[train],
        noisy=corrupt(y[train]),
        clean=y[train],
        x_val=x[val],
        noisy_val=corrupt(y[val]),
        x_test=x[test],
        y_test=y[test],
    )


def outcome_shares(pred: Tensor, noisy: Tensor, clean: Tensor) -> Tensor:
    """Shares (correct, memorized, other) of the wrongly labeled points, without a sync.

    Args:
        pred, noisy, clean: predicted, given and true classes, each (..., n).

    Returns:
        Shares of shape (..., 3), which sum to one along the last axis.
    """
    wrong = noisy != clean
    correct = (wrong & (pred == clean)).sum(-1)
    memorized = (wrong & (pred == noisy)).sum(-1)
    total = wrong.sum(-1)
    parts = torch.stack([correct, memorized, total - correct - memorized], dim=-1)
    return parts / total.unsqueeze(-1)


def memorization_stats(pred: Tensor, noisy: Tensor, clean: Tensor) -> dict[str, float]:
    """What became of the wrongly labeled points: predicted right, memorized, or neither.

    Args:
        pred: predicted classes, shape ``(n,)``, int64.
        noisy: given labels, shape ``(n,)``, int64.
        clean: true labels, shape ``(n,)``, int64.

    Returns:
        Shares ``correct``, ``memorized`` and ``other`` of the points with ``noisy != clean``; they
        sum to one.

    Raises:
        ValueError: shapes that differ, or no point is wrongly labeled.

    Source: Figure 1 (right column).

    Example:
        >>> pred, noisy, clean = torch.tensor([[0, 1, 2, 0], [1, 1, 1, 0], [0, 0, 0, 0]])
        >>> memorization_stats(pred, noisy, clean)["other"]  # the third of three wrong points
        0.3333333432674408
    """
    if pred.ndim != 1 or not pred.shape == noisy.shape == clean.shape:
        raise ValueError(
            "pred, noisy and clean must have the same shape (n,), got "
            f"{tuple(pred.shape)}, {tuple(noisy.shape)}, {tuple(clean.shape)}"
        )
    if bool((noisy == clean).all()):
        raise ValueError("noisy must differ from clean somewhere: no point is wrongly labeled")
    correct, memorized, other = outcome_shares(pred, noisy, clean).tolist()
    return {"correct": correct, "memorized": memorized, "other": other}
