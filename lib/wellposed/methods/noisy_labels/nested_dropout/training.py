"""Training on noisy labels: each network alone, then pairs that teach each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wellposed.data.label_noise import NoisyTask, check_tasks, outcome_shares
from wellposed.methods.noisy_labels.nested_dropout.layer import (
    PENALTY,
    NestedDropout,
    _by_width,
    _pick,
)
from wellposed.methods.noisy_labels.nested_dropout.networks import CompressedNetworks
from wellposed.ops.numerics import warn_of_nan
from wellposed.train import StackedSGD, accuracy, generator, minibatches, seeded

__all__ = ["CoTeachingRun", "CompressedRun", "co_teach", "small_loss_indices", "train_compressed"]


@dataclass(frozen=True)
class CompressedRun:
    """Networks side by side, measured after each epoch; fields have shape ``(s, epochs)``.

    With ``measure_every`` above 1 there are fewer columns. All accuracies are those of the network
    as it would be used: at the width ``keep``.

    Attributes:
        memorized: share of the wrongly labeled training points predicted as their wrong label.
        correct: share of them predicted as their true class.
        val_accuracy: accuracy on the noisy validation labels.
        test_accuracy: accuracy on the clean test labels.
        keep: number of channels in use, chosen on the noisy validation labels.
    """

    memorized: Tensor
    correct: Tensor
    val_accuracy: Tensor
    test_accuracy: Tensor
    keep: Tensor

    @property
    def early_stopped(self) -> Tensor:
        """Test accuracy ``(s,)`` at the (first) epoch with the best noisy validation accuracy."""
        return self.test_accuracy.gather(1, self.val_accuracy.argmax(1, keepdim=True)).squeeze(1)


@dataclass(frozen=True)
class CoTeachingRun(CompressedRun):
    """The same for pairs of networks, whose logits are averaged.

    Attributes:
        purity: share of correct labels among the examples that were selected for training.
    """

    purity: Tensor


def small_loss_indices(losses: Tensor, forget_rate: float) -> Tensor:
    r"""Positions of the :math:`\lfloor (1 - r) B \rfloor` smallest losses, smallest first.

    Args:
        losses: one a sample, shape ``(..., B)``; leading axes are separate batches.
        forget_rate: share :math:`r` of the samples to leave out, in [0, 1).

    Returns:
        int64, shape ``(..., kept)``; at least one is kept, also where the formula gives none.

    Raises:
        ValueError: ``forget_rate`` outside [0, 1), or no loss.

    Source: stage two; the authors' ``SampleSelection``.

    Example:
        >>> small_loss_indices(torch.tensor([0.3, 0.1, 0.2]), 0.3).tolist()
        [1, 2]
    """
    if not 0.0 <= forget_rate < 1.0:
        raise ValueError(f"forget_rate must lie in [0, 1), got {forget_rate}")
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError(f"losses must have shape (..., B) with B >= 1, got {tuple(losses.shape)}")
    return losses.argsort(dim=-1, stable=True)[..., : _kept(forget_rate, losses.shape[-1])]


def _kept(forget_rate: float, count: int) -> int:
    # (1 - 0.9) * 10 is 0.99999... in floating point; the small number mends that.
    return max(1, int((1.0 - forget_rate) * count + 1e-9))


def _stack(tasks: Sequence[NoisyTask], size: int) -> NoisyTask:
    """One task whose fields have a leading axis over networks."""
    if len(tasks) != size:
        raise ValueError(f"tasks must hold one task for each of {size} networks, got {len(tasks)}")
    check_tasks(tasks)
    return NoisyTask(*(torch.stack([vars(t)[name] for t in tasks]) for name in vars(tasks[0])))


def _batches(seeds: Sequence[int], n: int, batch_size: int, epoch: int) -> list[Tensor]:
    """Indices (s, b) of one epoch's batches; networks of one seed see one order."""
    orders = [list(minibatches(n, batch_size, generator(s + epoch))) for s in seeds]
    return [torch.stack(parts) for parts in zip(*orders)]


def _take(values: Tensor, index: Tensor) -> Tensor:
    """Entries values[i, index[i]] for each network i; one flat index is several times faster."""
    starts = torch.arange(len(index), device=index.device)[:, None] * values.shape[1]
    rows = values.flatten(0, 1).index_select(0, (index + starts).flatten())
    return rows.view(*index.shape, *values.shape[2:])


def _set_widths(members: Sequence[CompressedNetworks], val: Sequence[Tensor], y: Tensor) -> None:
    """Choose the width of each nested network (or of a pair's mean) from validation features."""
    for i, labels in enumerate(y):
        layers = [m.compress[i] for m in members]
        if isinstance(layers[0], NestedDropout):
            each = [_by_width(h[i], m.weight[i]) for h, m in zip(val, members)]
            keep, _ = _pick(sum(each[1:], each[0]) / len(each), labels, PENALTY)
            for layer in layers:
                setattr(layer, "keep", keep)  # noqa: B010 - mypy knows no attribute of a ModuleList's items


@torch.no_grad()
def _measure(members: Sequence[CompressedNetworks], data: NoisyTask) -> Tensor:
    """The five numbers of CompressedRun after one epoch, (5, s)."""
    for m in members:
        m.eval()
    parts = [data.x, data.x_val, data.x_test]
    features = [[m.features(x) for x in parts] for m in members]
    _set_widths(members, [h[1] for h in features], data.noisy_val)
    train, val, test = (
        torch.stack([m.classify(h) for m, h in zip(members, hs)]).mean(0) for hs in zip(*features)
    )
    right, memorized, _ = outcome_shares(train.argmax(-1), data.noisy, data.clean).unbind(-1)
    width = members[0].weight.shape[-1]
    keep = [getattr(layer, "keep", None) or width for layer in members[0].compress]
    return torch.stack(
        [
            memorized,
            right,
            accuracy(val, data.noisy_val),
            accuracy(test, data.y_test),
            torch.tensor(keep, dtype=right.dtype, device=right.device),
        ]
    )


def _check_budget(
    seeds: Sequence[int], size: int, epochs: int, batch_size: int, measure_every: int
) -> None:
    if len(seeds) != size:
        raise ValueError(f"seeds must hold one seed for each of {size} networks, got {len(seeds)}")
    if epochs < 1 or batch_size < 2:
        raise ValueError(
            f"epochs and batch_size must be at least 1 and 2, got {epochs} and {batch_size}"
        )
    if measure_every < 1:
        raise ValueError(f"measure_every must be at least 1, got {measure_every}")


def train_compressed(
    networks: CompressedNetworks,
    tasks: Sequence[NoisyTask],
    *,
    seeds: Sequence[int],
    epochs: int = 350,
    batch_size: int = 320,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    milestones: Sequence[int] = (200, 300),
    measure_every: int = 1,
) -> CompressedRun:
    """Stage one: train each network alone, with cross-entropy on the noisy labels.

    Args:
        networks: trained in place, side by side, each as if it were alone.
        tasks: one a network, all of one size, on the networks' device.
        seeds: one a network, for the order of its examples; masks are drawn from the first one.
        epochs: passes over the data, at least 1.
        batch_size: examples a step, at least 2.
        lr, momentum, weight_decay: constants of :class:`~wellposed.train.StackedSGD`.
        milestones: epochs at which the step size falls to a tenth.
        measure_every: measure after every so many epochs, and after the last one.

    Returns:
        The curves, on the CPU. A RuntimeWarning if a network diverged.

    Raises:
        ValueError: as many tasks or seeds as networks are needed; a task whose parts do not pair
            up or are empty; ``epochs`` or ``batch_size`` too small.

    Source: the paper's settings for CIFAR-10 are the defaults.

    Example:
        >>> from torch import nn
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> task = NoisyTask(x, torch.tensor([1, 1]), y, x, y, x, y)
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Identity(), nn.Linear(1, 2, bias=False))
        >>> nets = CompressedNetworks([net])
        >>> run = train_compressed(nets, [task], seeds=[0], epochs=30, batch_size=2)
        >>> run.memorized[0, -1].item(), run.test_accuracy[0, -1].item()
        (1.0, 0.5)
    """
    size = networks.features.size
    _check_budget(seeds, size, epochs, batch_size, measure_every)
    data = _stack(tasks, size)
    sgd = StackedSGD(networks.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    curves = []
    with seeded(seeds[0]):
        for epoch in range(epochs):
            networks.train()
            for index in _batches(seeds, data.noisy.shape[1], batch_size, epoch):
                index = index.to(data.x.device)
                logits = networks(_take(data.x, index))
                # A sum over networks: none of them must feel how many train beside it.
                each = F.cross_entropy(
                    logits.flatten(0, 1), _take(data.noisy, index).flatten(), reduction="sum"
                )
                (each / index.shape[1]).backward()
                sgd.step(_lr_factor(epoch, milestones))
            if (epoch + 1) % measure_every == 0 or epoch + 1 == epochs:
                curves.append(_measure([networks], data))
    warn_of_nan("train_compressed", *networks.parameters())
    return CompressedRun(*torch.stack(curves, dim=2).cpu())


def _lr_factor(epoch: int, milestones: Sequence[int]) -> float:
    return float(0.1 ** sum(epoch >= m for m in milestones))


@torch.no_grad()
def _rank(
    networks: CompressedNetworks, data: NoisyTask, index: Tensor, forget_rates: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The part of index (s, b) that networks trust, and each one's weight, both (s, kept).

    Networks with a larger rate keep fewer: their last weights are zero. Weights sum to one.
    """
    networks._switch(training=False)
    logits = networks(_take(data.x, index)).transpose(1, 2)
    losses = F.cross_entropy(logits, _take(data.noisy, index), reduction="none")
    networks._switch(training=True)
    kept = index.gather(1, small_loss_indices(losses, min(forget_rates)))
    counts = torch.tensor([[_kept(r, index.shape[1])] for r in forget_rates], device=index.device)
    inside = torch.arange(kept.shape[1], device=index.device) < counts
    return kept, inside.to(losses.dtype) / counts


def co_teach(
    first: CompressedNetworks,
    second: CompressedNetworks,
    tasks: Sequence[NoisyTask],
    *,
    forget_rate: float | Sequence[float],
    seeds: Sequence[int],
    epochs: int = 100,
    batch_size: int = 320,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    milestones: Sequence[int] = (50,),
    ramp_epochs: int = 0,
    exchange: bool = True,
    measure_every: int = 1,
) -> CoTeachingRun:
    """Stage two: each network picks, from its half of a batch, what the other one learns from.

    Entry ``i`` of ``first`` and entry ``i`` of ``second`` are a pair. Ranking is in evaluation mode
    at the current width, training with fresh masks; the prediction is the mean of both logits.

    Args:
        first, second: as many networks each; trained in place.
        tasks, seeds: one a pair.
        forget_rate: share of each half that is left out, in [0, 1), or one for each pair; ideally
            the noise rate.
        epochs, batch_size, lr, momentum, weight_decay, milestones: as in :func:`train_compressed`.
        ramp_epochs: over so many epochs the share rises linearly from zero.
        exchange: False lets each network learn from its own selection (a control).
        measure_every: measure, and choose the width anew, after every so many epochs and the last.

    Returns:
        The curves of the pairs, on the CPU. A RuntimeWarning if a network diverged.

    Raises:
        ValueError: numbers of networks, tasks or seeds that differ, tasks with fewer than two
            examples or with parts that do not pair up, a ``forget_rate`` outside [0, 1), or
            ``epochs`` or ``batch_size`` too small.

    Source: stage two; the paper's settings for CIFAR-10 are the defaults.

    Example:
        >>> from torch import nn
        >>> x, y = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]), torch.tensor([0, 1, 0, 1])
        >>> task = NoisyTask(x, torch.tensor([0, 1, 0, 0]), y, x, y, x, y)
        >>> net = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(1, 2, bias=False))
        >>> net[2].weight = nn.Parameter(torch.tensor([[-5.0], [5.0]]))
        >>> one, two = CompressedNetworks([net]), CompressedNetworks([net])
        >>> run = co_teach(
        ...     one, two, [task], forget_rate=0.5, seeds=[0], epochs=1, batch_size=4
        ... )
        >>> run.purity.item()  # of the half with the wrong label, the right one was kept
        1.0
    """
    size = first.features.size
    _check_budget(seeds, size, epochs, batch_size, measure_every)
    if second.features.size != size:
        raise ValueError(f"second must hold {size} networks, got {second.features.size}")
    rates = [forget_rate] * size if isinstance(forget_rate, int | float) else list(forget_rate)
    if len(rates) != size or not all(0.0 <= r < 1.0 for r in rates):
        raise ValueError(
            f"forget_rate must lie in [0, 1), one number or {size} of them, got {forget_rate}"
        )
    data, pair = _stack(tasks, size), (first, second)
    if data.x.shape[1] < 2:
        raise ValueError("tasks must hold at least two training examples, one for each network")
    parameters = [p for nets in pair for p in nets.parameters()]
    sgd = StackedSGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    curves = []
    with seeded(seeds[0]):
        for nets in pair:
            nets.eval()
        # The width at which the first epoch ranks.
        _set_widths(pair, [n.features(data.x_val).detach() for n in pair], data.noisy_val)
        for epoch in range(epochs):
            ramp = epoch / max(ramp_epochs - 1, 1) if epoch < ramp_epochs else 1.0
            pure = []
            for index in _batches(seeds, data.noisy.shape[1], batch_size, epoch):
                half = index.shape[1] // 2
                parts = index[:, : 2 * half].to(data.x.device).split(max(half, 1), dim=1)[:2]
                if len(parts) < 2:
                    continue
                left_out = [ramp * r for r in rates]
                picks = [_rank(n, data, part, left_out) for n, part in zip(pair, parts)]
                for kept, weight in picks:
                    true = _take(data.noisy, kept) == _take(data.clean, kept)
                    pure.append((weight * true).sum(1))
                order = picks[::-1] if exchange else picks
                for nets, (kept, weight) in zip(pair, order):
                    logits = nets(_take(data.x, kept)).transpose(1, 2)
                    each = F.cross_entropy(logits, _take(data.noisy, kept), reduction="none")
                    (weight * each).sum().backward()
                sgd.step(_lr_factor(epoch, milestones))
            if (epoch + 1) % measure_every == 0 or epoch + 1 == epochs:
                curves.append(torch.cat([_measure(pair, data), torch.stack(pure).mean(0)[None]]))
    warn_of_nan("co_teach", *parameters)
    return CoTeachingRun(*torch.stack(curves, dim=2).cpu())
