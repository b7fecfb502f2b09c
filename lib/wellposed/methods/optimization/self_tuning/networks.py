"""Classifiers of all trials and seeds side by side: self-tuning, and plain for comparison."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.methods.optimization.self_tuning.alternation import _descend, _Tuner
from wellposed.methods.optimization.self_tuning.layers import (
    BestResponseConv2d,
    BestResponseLinear,
    _layer,
    _squared_norm,
)
from wellposed.methods.optimization.self_tuning.task import (
    HIGH,
    LOW,
    NAMES,
    TuningTask,
    _pick_shifted,
)
from wellposed.nets.dropout import dropout
from wellposed.ops.intervals import to_interval
from wellposed.ops.numerics import warn_of_nan
from wellposed.train import StackedSGD, seeded
from wellposed.train import generator as make_generator

__all__ = ["TuningRun", "train_fixed", "train_self_tuning"]

MOMENTUM = 0.9  # in the authors' code


@dataclass(frozen=True)
class TuningRun:
    """Curves of networks trained side by side, for ``(trials, seeds)`` networks.

    Attributes:
        valid_curve: validation cross-entropy at each evaluation, ``(evaluations, trials, seeds)``.
        valid_loss: the least of these, shape ``(trials, seeds)``.
        test_loss, test_error: cross-entropy and share of wrong labels with the weights of that
            evaluation; test data decide nothing.
        hyper_history: unconstrained hyperparameters ``(time, trials, seeds, H)``.
        scale: last standard deviations of the perturbation ``(trials, seeds, H)``; 0 if none.
    """

    valid_curve: Tensor
    valid_loss: Tensor
    test_loss: Tensor
    test_error: Tensor
    hyper_history: Tensor
    scale: Tensor


class _Networks:
    """Classifiers of all trials and seeds: stacked parameters, losses and evaluation."""

    def __init__(
        self, task: TuningTask, hyper: Tensor, seeds: Sequence[int], *, best_response: bool,
        channels: Sequence[int], hidden: Sequence[int], batch_size: int, seed: int,
    ) -> None:  # fmt: skip
        S = len(task.train)
        if len(seeds) != S or hyper.ndim != 3 or hyper.shape[1:] != (S, len(NAMES)):
            raise ValueError(
                f"hyperparameters must have shape (..., trials, {S}, {len(NAMES)}) and seeds {S} "
                f"numbers, got {tuple(hyper.shape)} and {len(seeds)}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        trials = len(hyper)
        self.task, self.shape, self.batch_size = task, (trials, S), batch_size
        self.side, self.classes = task.x.shape[-1], int(task.y.max()) + 1
        self.margin = math.ceil(HIGH[3] * self.side)
        self.padded = F.pad(task.x, (self.margin,) * 4, value=float(task.x.min()))
        self.generator = make_generator(seed, task.x.device)
        self.owner = torch.arange(S, device=task.x.device).repeat(trials)
        nets: list[list[nn.Module]] = []
        for s in seeds:
            with seeded(s):
                nets.append(self._layers(best_response, channels, hidden))
        self.layers: list[list[Tensor]] = []
        for layer in zip(*nets):
            stacks = [torch.stack(group) for group in zip(*(part.parameters() for part in layer))]
            runs = [p.detach().repeat(trials, *[1] * (p.ndim - 1)).to(task.x) for p in stacks]
            self.layers.append([p.requires_grad_() for p in runs])

    def _layers(
        self, best_response: bool, channels: Sequence[int], hidden: Sequence[int]
    ) -> list[nn.Module]:
        H, side, inputs = len(NAMES), self.side, 1
        layers: list[nn.Module] = []
        for out in channels:
            conv = (inputs, out, 3)
            layers.append(BestResponseConv2d(*conv, H) if best_response else nn.Conv2d(*conv))
            inputs, side = out, (side + 1) // 2  # stride 2 and padding 1 are those of _layer
        sizes = (inputs * side * side, *hidden, self.classes)
        for a, b in itertools.pairwise(sizes):
            layers.append(BestResponseLinear(a, b, H) if best_response else nn.Linear(a, b))
        return layers

    @property
    def parameters(self) -> list[Tensor]:
        return [p for layer in self.layers for p in layer]

    def logits(self, x: Tensor, hyper: Tensor, rates: Tensor | None) -> Tensor:
        """Scores of images (R, B, h, w) under hyper (R, B, H); dropout where there are rates."""
        x = x.unsqueeze(2) if self.layers[0][0].ndim == 5 else x.flatten(2)
        for i, layer in enumerate(self.layers):
            if layer[0].ndim == 3:
                x = x.flatten(2)
            if rates is not None:
                x = dropout(x, rates[..., min(i, 1)], True, self.generator)
            x = _layer(x, hyper, layer)
            if i < len(self.layers) - 1:
                x = x.relu()
        return x

    def _draw(self, part: Tensor) -> Tensor:
        """A minibatch for each run, with replacement, from its own seed's examples."""
        shape = (len(self.owner), self.batch_size)
        pick = torch.randint(part.shape[1], shape, generator=self.generator, device=part.device)
        return part[self.owner].gather(1, pick)

    def _images(self, rows: Tensor) -> Tensor:
        images: Tensor = self.task.x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        return images

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        own = logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        return (logits.logsumexp(-1) - own).mean(1)

    def _train_batch(self, hyper: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shifted images of a fresh minibatch, labels, dropout rates and log10 decay."""
        rows = self._draw(self.task.train)
        drop, drop_hidden, log_decay, shift = to_interval(hyper, LOW, HIGH).unbind(-1)
        x = _pick_shifted(self.padded, rows, shift * self.side, self.margin, self.generator)
        return x, self.task.y[rows], torch.stack((drop, drop_hidden), -1), log_decay

    def train_loss(self, hyper: Tensor) -> Tensor:
        """Regularized loss of a fresh minibatch, each example under its own hyperparameters."""
        x, y, rates, log_decay = self._train_batch(hyper)
        loss = self._cross_entropy(self.logits(x, hyper, rates), y)
        norms = torch.stack([_squared_norm(hyper, layer) for layer in self.layers]).sum(0)
        return loss + 0.5 * (10**log_decay * norms).mean(1)

    @torch.no_grad()
    def plain_gradients(self, hyper: Tensor) -> list[Tensor]:
        """Gradients of `train_loss` for plain fully connected networks, by hand: half the time."""
        x, y, rates, log_decay = self._train_batch(hyper)
        inputs, x = [], x.flatten(2)
        for i, (weight, bias) in enumerate(self.layers):
            x = dropout(x.relu() if i else x, rates[..., min(i, 1)], True, self.generator)
            inputs.append(x)
            x = torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
        slope = x.softmax(-1)
        slope.scatter_add_(-1, y.unsqueeze(-1), slope.new_full((*y.shape, 1), -1.0))
        slope /= self.batch_size
        decay = (10**log_decay).mean(1)[:, None, None]
        gradients: list[Tensor] = []
        for i in reversed(range(len(self.layers))):
            weight = self.layers[i][0]
            own = torch.bmm(slope.mT, inputs[i]).addcmul_(decay, weight)
            gradients = [own, slope.sum(1), *gradients]
            if i:  # what is positive after relu and dropout was neither cut nor dropped
                slope = torch.bmm(slope, weight).mul_(inputs[i] > 0)
                slope /= 1 - rates[..., 1:]
        return gradients

    def valid_loss(self, hyper: Tensor) -> Tensor:
        """Cross-entropy of a validation minibatch, every regularizer switched off."""
        rows = self._draw(self.task.valid)
        logits = self.logits(self._images(rows), hyper, None)
        return self._cross_entropy(logits, self.task.y[rows])

    @torch.no_grad()
    def evaluate(self, part: Tensor, hyper: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and error of all runs, shape (trials, seeds)."""
        rows = part[self.owner]
        y = self.task.y[rows]
        logits = self.logits(self._images(rows), hyper.unsqueeze(1).expand(*rows.shape, -1), None)
        error = (logits.argmax(-1) != y).to(logits.dtype).mean(1)
        return self._cross_entropy(logits, y).view(self.shape), error.view(self.shape)


def _interval(steps: int, evaluations: int) -> int:
    if min(steps, evaluations) < 1:
        raise ValueError(f"steps and evaluations must be at least 1, got {steps}, {evaluations}")
    return max(1, steps // evaluations)


class _Curves:
    """Validation losses during training, and the weights where each network had its least."""

    def __init__(self, nets: _Networks) -> None:
        self.nets, self.valid = nets, list[Tensor]()

    def add(self, hyper: Tensor) -> None:
        loss, _ = self.nets.evaluate(self.nets.task.valid, hyper)
        now = [hyper, *[p.detach() for p in self.nets.parameters]]
        if not self.valid:
            self.least, self.best = loss, [p.clone() for p in now]
        better = (loss < self.least).flatten()
        for old, new in zip(self.best, now):
            torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old, out=old)
        self.least = self.least.minimum(loss)
        self.valid.append(loss)

    @torch.no_grad()
    def run(self, history: Tensor, scale: Tensor) -> TuningRun:
        hyper, *best = self.best
        for p, value in zip(self.nets.parameters, best):
            p.copy_(value)
        test = self.nets.evaluate(self.nets.task.test, hyper)
        warn_of_nan("training", *self.valid, *test, history, scale)
        return TuningRun(torch.stack(self.valid), self.least, *test, history, scale)


def _per_run(value: float | Sequence[float], trials: int, seeds: int) -> float | list[float]:
    """One number for all runs, or one for each trial repeated over the seeds."""
    if isinstance(value, int | float):
        return float(value)
    if len(value) != trials:
        raise ValueError(f"expected one number, or one for each of {trials} trials: {value}")
    return [v for v in value for _ in range(seeds)]


def train_fixed(
    task: TuningTask,
    schedule: Tensor,
    *,
    seeds: Sequence[int],
    steps: int,
    channels: Sequence[int] = (),
    hidden: Sequence[int] = (32,),
    lr: float = 0.01,
    batch_size: int = 128,
    evaluations: int = 10,
    seed: int = 0,
) -> TuningRun:
    """Train plain networks side by side with given hyperparameters: the baseline and the replay.

    SGD with momentum 0.9, the learning rate falling linearly to zero, as for self-tuning networks.

    Args:
        task: splits of S seeds.
        schedule: unconstrained hyperparameters, shape ``(time, trials, S, 4)``, spread evenly over
            the steps; ``time`` 1 for constants. The order is that of :data:`NAMES`.
        seeds: S seeds of the initial weights, the same in each trial.
        steps: training steps, at least 1.
        channels: widths of 3 x 3 convolutions of stride 2.
        hidden: widths of fully connected layers after them.
        lr: learning rate of the weights.
        batch_size: examples a step, drawn with replacement.
        evaluations: how often the validation loss is taken.
        seed: of batches, masks and shifts.

    Returns:
        A :class:`TuningRun`; a RuntimeWarning if a network diverged.

    Raises:
        ValueError: shapes that do not fit, or a number below 1.

    Source: the authors' control, a plain network that replays a schedule (Table 1).

    Example:
        >>> from wellposed.methods.optimization.self_tuning.task import make_task
        >>> task = make_task(torch.rand(9, 4, 4), torch.arange(9) % 3, num_train=4, num_valid=3,
        ...     num_test=2, seeds=[0])
        >>> train_fixed(task, torch.zeros(1, 2, 1, 4), seeds=[0], steps=3).valid_loss.shape
        torch.Size([2, 1])
    """
    if schedule.ndim != 4 or 0 in schedule.shape:
        shape = tuple(schedule.shape)
        raise ValueError(f"schedule must have shape (time, trials, seeds, H), got {shape}")
    nets = _Networks(
        task, schedule[0], seeds, best_response=False, channels=channels, hidden=hidden,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    every = _interval(steps, evaluations)
    flat = schedule.to(task.x).flatten(1, 2)
    optimizer, curves = StackedSGD(nets.parameters, lr=lr, momentum=MOMENTUM), _Curves(nets)
    for i in range(steps):
        hyper = flat[i * len(flat) // steps]
        batch = hyper.unsqueeze(1).expand(-1, batch_size, -1)
        if channels:
            _descend(optimizer, nets.train_loss(batch).sum(), 1 - i / steps)
        else:
            for p, grad in zip(optimizer.params, nets.plain_gradients(batch)):
                p.grad = grad
            optimizer.step(1 - i / steps)
        if (i + 1) % every == 0:
            curves.add(hyper)
    return curves.run(schedule, torch.zeros_like(schedule[0]))


def train_self_tuning(
    task: TuningTask,
    hyper: Tensor,
    *,
    seeds: Sequence[int],
    steps: int,
    channels: Sequence[int] = (),
    hidden: Sequence[int] = (32,),
    lr: float = 0.01,
    hyper_lr: float | Sequence[float] = 3e-3,
    train_steps: int = 2,
    warmup_steps: int = 0,
    init_scale: float = 0.5,
    entropy_weight: float | Sequence[float] = 1e-3,
    batch_size: int = 128,
    evaluations: int = 10,
    seed: int = 0,
) -> TuningRun:
    """Train self-tuning networks side by side: best-response layers, hyperparameters by Adam.

    Args:
        task, seeds, channels, hidden, lr, batch_size, evaluations, seed: as in :func:`train_fixed`.
        hyper: unconstrained start, shape ``(trials, S, 4)``.
        steps: training steps on the weights, at least 1.
        hyper_lr: learning rate of hyperparameters and scales, one number or one for each trial;
            0 freezes them.
        train_steps: training steps to each validation step.
        warmup_steps: first training steps, without validation steps.
        init_scale: initial standard deviation of the perturbation.
        entropy_weight: weight of its entropy, one number or one for each trial.

    Returns:
        A :class:`TuningRun`; ``hyper_history`` has ``steps + 1`` entries. A RuntimeWarning if a
        network diverged.

    Raises:
        ValueError: shapes that do not fit, or a number below 1.

    Source: Algorithm 1; defaults from the authors' code for convolutional networks.

    Example:
        >>> from wellposed.methods.optimization.self_tuning.task import make_task
        >>> task = make_task(torch.rand(9, 4, 4), torch.arange(9) % 3, num_train=4, num_valid=3,
        ...     num_test=2, seeds=[0])
        >>> run = train_self_tuning(task, torch.zeros(2, 1, 4), seeds=[0], steps=3)
        >>> run.hyper_history.shape
        torch.Size([4, 2, 1, 4])
    """
    nets = _Networks(
        task, hyper, seeds, best_response=True, channels=channels, hidden=hidden,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    every = _interval(steps, evaluations)
    entropy = _per_run(entropy_weight, *hyper.shape[:2])
    tuner = _Tuner(
        nets.train_loss, nets.valid_loss, StackedSGD(nets.parameters, lr=lr, momentum=MOMENTUM),
        hyper.to(task.x).flatten(0, 1), hyper_lr=_per_run(hyper_lr, *hyper.shape[:2]),
        tune_scale=True, init_scale=init_scale,
        entropy_weight=entropy if isinstance(entropy, float) else task.x.new_tensor(entropy),
        batch_size=batch_size, generator=nets.generator,
    )  # fmt: skip
    curves, history = _Curves(nets), [tuner.hyper.detach().clone()]
    for i in range(steps):
        tuner.train_step(1 - i / steps)
        if (i + 1) % train_steps == 0 and i >= warmup_steps:
            tuner.valid_step()
        if (i + 1) % every == 0:
            curves.add(tuner.hyper.detach())
        history.append(tuner.hyper.detach().clone())
    path = torch.stack(history).unflatten(1, hyper.shape[:2])
    return curves.run(path, tuner.scale.view(hyper.shape))
