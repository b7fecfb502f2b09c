"""Networks of all criteria and seeds, trained side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.methods.distillation.progressive_self.loss import PSKDLoss
from wellposed.methods.distillation.progressive_self.rescaling import _residual
from wellposed.methods.distillation.progressive_self.task import ImageTask
from wellposed.nets import Stacked
from wellposed.nets.columns import stacked_forward
from wellposed.ops.numerics import warn_of_nan
from wellposed.train import StackedSGD, generator, seeded

__all__ = ["SideBySide", "train_side_by_side"]

EVALUATED = 256  # examples at once after training; the copies of all test images fill gigabytes
MILESTONES = (0.5, 0.75)  # the learning rate drops tenfold at 150 and 225 of 300 epochs

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A loss of a minibatch: (logits, labels, positions in the training set) to a mean."""


@dataclass(frozen=True)
class SideBySide:
    """What ``k`` criteria made of ``s`` seeds in ``t`` epochs.

    Attributes:
        val_logits: outputs after training on validation data, ``(k, s, n_val, c)``.
        test_logits: the same on test data, ``(k, s, n_test, c)``.
        residual: ``1 - P_g``, the probability missing on the label when the example was visited,
            ``(k, s, t, n)``.
        gradient: 1-norm of the loss gradient in the logits of the example at that visit,
            ``(k, s, t, n)``; cross-entropy has twice the residual.
    """

    val_logits: Tensor
    test_logits: Tensor
    residual: Tensor
    gradient: Tensor


@dataclass(frozen=True)
class _Epoch:
    """What one epoch draws for every seed: order (s, n), shift (s, n, 2), noise (s, n, ...)."""

    order: Tensor
    shift: Tensor
    noise: Tensor | None


def _draw_epoch(x: Tensor, generators: Sequence[torch.Generator], shift: int, sd: float) -> _Epoch:
    """Drawn on the CPU, one seed at a time, so that a seed's run does not depend on the others."""
    n = x.shape[1]
    order = torch.stack([torch.randperm(n, generator=g) for g in generators])
    drawn = [torch.randint(2 * shift + 1, (n, 2), generator=g) for g in generators]
    noise = None
    if sd > 0:
        noise = torch.stack([torch.randn(x.shape[1:], generator=g) for g in generators])
        noise = (sd * noise).to(x)
    return _Epoch(order.to(x.device), torch.stack(drawn).to(x.device), noise)


def _windows(x: Tensor, shift: int) -> Tensor:
    """Views (s, n, ch, 2 shift + 1, 2 shift + 1, h, w) of images (s, n, ch, h, w), moved about."""
    height, width = x.shape[-2:]
    return F.pad(x, (shift,) * 4).unfold(3, height, 1).unfold(4, width, 1)


def train_side_by_side(
    task: ImageTask,
    criteria: Sequence[Criterion],
    build: Callable[[], nn.Module],
    *,
    seeds: Sequence[int],
    epochs: int,
    weight_decay: Sequence[float],
    batch_size: int = 128,
    lr: float = 0.1,
    momentum: float = 0.9,
    shift: int = 0,
    fresh_noise: float = 0.0,
) -> SideBySide:
    r"""Train one network for each criterion and seed, all of them side by side.

    Nesterov SGD with the paper's step schedule. For one seed, all criteria see the same initial
    network, images, order, shifts and noise, so differences between criteria are paired. A
    criterion is called as ``criterion(logits, labels, index)`` on the minibatches of all its seeds
    at once, with ``index = seed number * n + position``; a :class:`PSKDLoss` therefore needs
    ``num_examples = s * n``.

    Args:
        task: data of ``s`` seeds, on the device to train on.
        criteria: ``k`` losses, each the mean over the examples it is given.
        build: makes a network from ``(b, ch, h, w)`` to ``(b, c)`` without buffers.
        seeds: one seed for each of the ``s`` data sets; it rules initial weights and order.
        epochs: passes over the data, at least 1.
        weight_decay: one constant for each criterion.
        batch_size: examples a step and seed, at least 1.
        lr: first learning rate; a tenth of it from half of the epochs on, a hundredth from three
            quarters on.
        momentum: of Nesterov's method.
        shift: images are moved by up to so many pixels at random at each visit.
        fresh_noise: standard deviation of Gaussian noise drawn anew at each visit.

    Returns:
        Final outputs and the course of residuals and gradients, on the device of the task. A
        RuntimeWarning if a network diverged.

    Raises:
        ValueError: numbers of criteria, constants and seeds that do not match; an empty budget.

    Source: experiments on CIFAR-100 (recipe) and the authors' ``main.py``.

    Example:
        >>> from wellposed.methods.distillation.progressive_self import noisy_images
        >>> x, y = torch.tensor([0.0, 1.0] * 4).reshape(8, 1, 1, 1), torch.tensor([0, 1] * 4)
        >>> task = noisy_images(x, y, seeds=[0], num_train=4, num_val=2)
        >>> run = train_side_by_side(
        ...     task, [PSKDLoss(4, 2, 30)], lambda: nn.Sequential(nn.Flatten(), nn.Linear(1, 2)),
        ...     seeds=[0], epochs=30, weight_decay=[0.0],
        ... )
        >>> (run.test_logits.argmax(-1) == task.y_test).float().mean().item()
        1.0
    """
    k, (s, n), device = len(criteria), task.y.shape, task.x.device
    if k == 0 or len(weight_decay) != k or len(seeds) != s:
        raise ValueError(
            f"need criteria, as many weight_decay, and {s} seeds, got {k}, {len(weight_decay)} "
            f"and {len(seeds)}"
        )
    if epochs < 1 or batch_size < 1 or shift < 0 or fresh_noise < 0:
        raise ValueError("epochs and batch_size must be at least 1, shift and fresh_noise 0")
    nets = Stacked(k * _initial(build, seeds)).to(task.x)
    decays = [decay for decay in weight_decay for _ in seeds]
    sgd = StackedSGD(
        nets.parameters(), lr=lr, momentum=momentum, nesterov=momentum > 0, weight_decay=decays
    )
    generators = [generator(seed) for seed in seeds]
    windows = _windows(task.x, shift)
    offset = torch.arange(s, device=device)[:, None]
    log = task.x.new_zeros(2, k, s, epochs, n)
    for epoch in range(epochs):
        drops = sum(epoch >= part * epochs for part in MILESTONES)
        for criterion in criteria:
            if isinstance(criterion, PSKDLoss):
                criterion.set_epoch(epoch)
        drawn = _draw_epoch(task.x, generators, shift, fresh_noise)
        for index in drawn.order.split(batch_size, dim=1):
            rows, columns = drawn.shift[offset, index].unbind(-1)
            x = windows[offset, index, :, rows, columns]
            if drawn.noise is not None:
                x = x + drawn.noise[offset, index]
            labels = task.y[offset, index]
            logits = stacked_forward(nets, x.repeat(k, *[1] * (x.ndim - 1)))
            logits.retain_grad()
            _backward(logits.unflatten(0, (k, s)), labels, criteria, index + n * offset)
            sgd.step(0.1**drops)
            assert logits.grad is not None
            log[:, :, offset, epoch, index] = _visit(logits, labels, index.shape[1])
    val, test = (_outputs(nets, x, k) for x in (task.x_val, task.x_test))
    warn_of_nan("train_side_by_side", val, test, log)
    return SideBySide(val, test, *log)


@torch.no_grad()
def _outputs(nets: Stacked, x: Tensor, k: int) -> Tensor:
    """Outputs (k, s, n, c), in pieces: every criterion's networks get their own copy of x."""
    parts = x.split(EVALUATED, dim=1)
    pieces = [stacked_forward(nets, part.repeat(k, 1, 1, 1, 1)) for part in parts]
    outputs = torch.cat(pieces, dim=1)
    return outputs.view(k, len(x), *outputs.shape[1:])


def _initial(build: Callable[[], nn.Module], seeds: Sequence[int]) -> list[nn.Module]:
    nets = []
    for seed in seeds:
        with seeded(seed):
            nets.append(build())
    return nets


def _backward(logits: Tensor, labels: Tensor, criteria: Sequence[Criterion], at: Tensor) -> None:
    """Gradients of the sum over the networks of each one's mean loss; logits (k, s, b, c)."""
    losses = [
        criterion(own.flatten(0, 1), labels.flatten(), at.flatten())
        for criterion, own in zip(criteria, logits)
    ]
    (len(labels) * torch.stack(losses).sum()).backward()  # type: ignore[no-untyped-call]


@torch.no_grad()
def _visit(logits: Tensor, labels: Tensor, b: int) -> Tensor:
    """Residuals and gradient norms of the minibatches that were just visited, (2, k, s, b)."""
    assert logits.grad is not None
    c, (s, _) = logits.shape[-1], labels.shape
    k = len(logits) // s
    probs = logits.softmax(dim=-1).reshape(-1, c)
    residual = _residual(probs, labels.repeat(k, 1).flatten())
    norms = b * logits.grad.abs().sum(dim=-1)  # the loss is a mean over b examples
    return torch.stack([residual.view(k, s, b), norms.view(k, s, b)])
