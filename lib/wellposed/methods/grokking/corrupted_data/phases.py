"""What a network answers where, and the phase that this tells."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wellposed.data.corrupted_modular import CorruptedData, LabelTable
from wellposed.nets.quadratic import QuadraticMLP, table_logits

__all__ = [
    "PHASES",
    "Accuracies",
    "History",
    "evaluate",
    "evaluate_side_by_side",
    "training_phase",
    "two_stages",
]

PHASES = ("memorization", "coexistence", "partial inversion", "full inversion", "forgetting")
"""Names of the phases, in the order of the codes of `training_phase`."""


@dataclass(frozen=True)
class Accuracies:
    """Shares of pairs answered as labeled.

    Attributes:
        train: over all training pairs, against the given labels.
        corrupted: over the corrupted training pairs, against the corrupted label; NaN without any.
        uncorrupted: over the other training pairs.
        test: over the held-out pairs, against the true sum.
    """

    train: float
    corrupted: float
    uncorrupted: float
    test: float


@dataclass(frozen=True)
class History:
    """Accuracies during training.

    Attributes:
        steps: number of updates done at each log, int64, shape (logs,).
        train, corrupted, uncorrupted, test: as in `Accuracies`; shape (logs,) for one network,
            (networks, logs) for several.
    """

    steps: Tensor
    train: Tensor
    corrupted: Tensor
    uncorrupted: Tensor
    test: Tensor


def evaluate(model: nn.Module, data: CorruptedData) -> Accuracies:
    """The four accuracies of a network, in evaluation mode.

    Args:
        model: maps pairs (B, 2) to scores (B, p), such as `QuadraticMLP`; its mode is restored.
        data: on any device.

    Returns:
        An `Accuracies` of floats; `corrupted` is NaN if no label is corrupted.

    Source: Doshi et al. (2024).

    Example:
        >>> from wellposed.data.corrupted_modular import modular_addition_data
        >>> from wellposed.nets.quadratic import analytic_mlp
        >>> data = modular_addition_data(7, 0.5, 0.0)
        >>> evaluate(analytic_mlp(7, 600, torch.Generator().manual_seed(0)), data).test
        1.0
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    mode = model.training
    model.eval()
    with torch.no_grad():
        values = LabelTable.of([data], like).accuracies(lambda pairs: model(pairs)[None])
    model.train(mode)
    return Accuracies(*values[:, 0].tolist())


def evaluate_side_by_side(
    models: Sequence[QuadraticMLP], datasets: Sequence[CorruptedData]
) -> Tensor:
    """The four accuracies of several networks at once.

    Args:
        models: of one size and activation, without BatchNorm, on one device.
        datasets: one for each network, with one modulus; sizes may differ.

    Returns:
        Shape (4, networks): train, corrupted, uncorrupted and test accuracy, as in `Accuracies`.

    Raises:
        ValueError: counts that differ, no network, or networks with BatchNorm.

    Source: Doshi et al. (2024).

    Example:
        >>> from wellposed.data.corrupted_modular import modular_addition_data
        >>> from wellposed.nets.quadratic import analytic_mlp
        >>> net, data = analytic_mlp(7, 600), modular_addition_data(7, 0.5, 0.0)
        >>> evaluate_side_by_side([net, net], [data, data])[3].tolist()
        [1.0, 1.0]
    """
    if len(models) == 0 or len(models) != len(datasets):
        raise ValueError(
            f"need one data set a network, got {len(models)} networks and {len(datasets)}"
        )
    states = [model.state_dict() for model in models]
    state = {name: torch.stack([s[name] for s in states]) for name in states[0]}
    table = LabelTable.of(datasets, state["U"])
    activation = models[0].activation
    return table.accuracies(lambda pairs: table_logits(state, activation=activation).mT)


def training_phase(
    corrupted: Tensor, test: Tensor, *, low: float = 0.1, high: float = 0.9
) -> Tensor:
    """The phase that two accuracies tell, as an index into `PHASES`.

    Where test accuracy is at least `high`: coexistence if corrupted accuracy is at least `high`,
    full inversion if it is at most `low`, else partial inversion. Elsewhere: memorization if
    corrupted accuracy is at least `high`, else forgetting (or never learned).

    Args:
        corrupted: accuracy on corrupted labels, any shape.
        test: accuracy on held-out pairs, same shape.
        low, high: thresholds, 0 <= low < high <= 1; ours.

    Returns:
        int64 codes of the shape of `test`.

    Raises:
        ValueError: shapes that differ, or thresholds out of order.

    Source: the phases of Doshi et al. (2024).

    Example:
        >>> corrupted, test = torch.tensor([[1.0, 1.0, 0.5, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0, 0.0]])
        >>> training_phase(corrupted, test).tolist()
        [0, 1, 2, 3, 4]
    """
    if corrupted.shape != test.shape:
        raise ValueError(
            f"corrupted and test must have one shape, got {tuple(corrupted.shape)} and "
            f"{tuple(test.shape)}"
        )
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"thresholds must satisfy 0 <= low < high <= 1, got {low} and {high}")
    fits, ignores = corrupted >= high, corrupted <= low
    general = torch.where(fits, 1, torch.where(ignores, 3, 2))
    return torch.where(test >= high, general, torch.where(fits, 0, 4))


def two_stages(history: History, *, level: float = 0.5) -> tuple[Tensor, Tensor]:
    """When each network grokked, and when it unlearned its corrupted labels.

    Args:
        history: curves of shape (networks, logs).
        level: the accuracy to cross, in (0, 1).

    Returns:
        Two float64 tensors of shape (networks,): the first step with test accuracy at least
        `level`; and the first one after the highest corrupted accuracy at which that is below
        `level`. Infinity where it does not happen.

    Raises:
        ValueError: `level` outside (0, 1), or curves of another shape.

    Source: the two stages of Doshi et al. (2024); the measure is ours.

    Example:
        >>> curve = torch.tensor([[0.0, 0.9, 1.0, 0.1]])
        >>> run = History(torch.arange(4) * 10, curve, curve, curve, curve.cummax(1).values)
        >>> [t.item() for t in two_stages(run)]
        [10.0, 30.0]
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be in (0, 1), got {level}")
    shape = history.corrupted.shape
    logs = len(history.steps)
    if len(shape) != 2 or history.test.shape != shape or shape[1] != logs or logs == 0:
        raise ValueError(
            f"history must hold curves of shape (networks, {logs}), with at least one log, got "
            f"{tuple(shape)} and {tuple(history.test.shape)}"
        )
    steps = history.steps.double().expand(history.test.shape)
    peak = history.corrupted.argmax(1, keepdim=True)
    later = torch.arange(steps.shape[1], device=steps.device) > peak
    grokked = torch.where(history.test >= level, steps, torch.inf).amin(1)
    unlearned = torch.where(later & (history.corrupted < level), steps, torch.inf).amin(1)
    return grokked, unlearned
