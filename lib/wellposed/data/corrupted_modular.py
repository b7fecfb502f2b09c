"""The addition table with wrong labels: a split of it, and accuracy on each of its parts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor, nn

from wellposed.data.modular import modular_dataset

__all__ = ["CorruptedData", "LabelTable", "modular_addition_data"]


@dataclass(frozen=True)
class CorruptedData:
    """The addition table modulo `p`, split, with some training labels drawn at random.

    Attributes:
        train_pairs: int64, shape (n, 2), entries in [0, p).
        train_labels: int64, shape (n,): what the network is trained on.
        clean_labels: int64, shape (n,): the true sums; for measuring only.
        corrupted: bool, shape (n,): whose label was drawn again (by chance 1 in p stays right).
        test_pairs: int64, shape (p * p - n, 2).
        test_labels: int64, shape (p * p - n,): true sums.
        p: the modulus.
    """

    train_pairs: Tensor
    train_labels: Tensor
    clean_labels: Tensor
    corrupted: Tensor
    test_pairs: Tensor
    test_labels: Tensor
    p: int

    def to(self, device: torch.device | str) -> CorruptedData:
        """The same data with its tensors on `device`."""
        moved = {f.name: getattr(self, f.name).to(device) for f in fields(self) if f.name != "p"}
        return replace(self, **moved)


def modular_addition_data(
    p: int,
    train_fraction: float,
    corruption: float,
    generator: torch.Generator | None = None,
) -> CorruptedData:
    r"""Split the table of $(m+n)\bmod p$ and draw a share of the training labels at random.

    Args:
        p: modulus, at least 3.
        train_fraction: share of the $p^2$ pairs used for training, in (0, 1); rounded down.
        corruption: share of the training labels replaced by uniform draws from all `p` classes,
            in [0, 1); rounded down.
        generator: CPU generator of split and labels; None uses the global one.

    Returns:
        A `CorruptedData` on the CPU.

    Raises:
        ValueError: an argument out of range, or no training pair.

    Source: Doshi et al. (2024) and the authors' data loader.

    Example:
        >>> data = modular_addition_data(5, 0.8, 0.25)
        >>> len(data.train_pairs), int(data.corrupted.sum()), len(data.test_pairs)
        (20, 5, 5)
    """
    if p < 3:
        raise ValueError(f"p must be at least 3, got {p}")
    if not 0.0 < train_fraction < 1.0:
        raise ValueError(f"train_fraction must be in (0, 1), got {train_fraction}")
    if not 0.0 <= corruption < 1.0:
        raise ValueError(f"corruption must be in [0, 1), got {corruption}")
    table = modular_dataset(p, train_fraction, "add", generator)
    n = len(table.y)
    drawn = torch.randperm(n, generator=generator)[: int(corruption * n)]
    labels, corrupted = table.y.clone(), torch.zeros(n, dtype=torch.bool)
    labels[drawn] = torch.randint(0, p, (len(drawn),), generator=generator)
    corrupted[drawn] = True
    return CorruptedData(table.x, labels, table.y, corrupted, table.x_test, table.y_test, p)


@dataclass(frozen=True)
class LabelTable:
    """Several `CorruptedData` side by side, padded to one length, to measure networks on.

    Attributes:
        pairs: training pairs, int64, shape (k, n, 2).
        labels: given labels, int64, shape (k, n).
        weight: 1 on pairs and 0 on padding, which stands behind; shape (k, n).
        corrupted: 1 where the label was drawn again, else 0; shape (k, n).
        test_pairs, test_labels, test_weight: the same of the held-out pairs.
        p: the modulus.
    """

    pairs: Tensor
    labels: Tensor
    weight: Tensor
    corrupted: Tensor
    test_pairs: Tensor
    test_labels: Tensor
    test_weight: Tensor
    p: int

    @staticmethod
    def of(datasets: Sequence[CorruptedData], like: Tensor) -> LabelTable:
        """Data of several networks on the device and in the floating type of `like`."""

        def joined(name: str) -> Tensor:
            rows = [getattr(d, name) for d in datasets]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True).to(like.device)

        def valid(name: str) -> Tensor:
            rows = [like.new_ones(len(getattr(d, name))) for d in datasets]
            return nn.utils.rnn.pad_sequence(rows, batch_first=True)

        return LabelTable(
            joined("train_pairs"),
            joined("train_labels"),
            valid("train_labels"),
            joined("corrupted").to(like.dtype),
            joined("test_pairs"),
            joined("test_labels"),
            valid("test_labels"),
            datasets[0].p,
        )

    def accuracies(self, logits_of: Callable[[Tensor], Tensor]) -> Tensor:
        """Train, corrupted, uncorrupted and test accuracy, shape (4, k); stays on the device."""
        residues = torch.arange(self.p, device=self.pairs.device)
        # One row of the table after another, so that cell m * p + n holds the answer to (m, n).
        answers = logits_of(torch.cartesian_prod(residues, residues)).argmax(-1)  # (k, p * p)

        def hits(pairs: Tensor, labels: Tensor) -> Tensor:
            cell = pairs[..., 0] * self.p + pairs[..., 1]
            return (answers.gather(1, cell) == labels).to(self.weight.dtype)

        known, unseen = hits(self.pairs, self.labels), hits(self.test_pairs, self.test_labels)
        shares = [
            (known, self.weight),
            (known, self.weight * self.corrupted),
            (known, self.weight * (1 - self.corrupted)),
            (unseen, self.test_weight),
        ]
        return torch.stack([(hit * w).sum(1) / w.sum(1) for hit, w in shares])
