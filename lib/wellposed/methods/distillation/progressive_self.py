r"""Progressive self-knowledge distillation (PS-KD): soften labels with one's own past predictions.

K. Kim, B. Ji, D. Yoon, S. Hwang, "Self-Knowledge Distillation with Progressive Refinement of
Targets", ICCV 2021, arXiv:2006.12000.

Claim: mixing each one-hot label with what the network itself predicted for that example one epoch
earlier, with a weight that grows during training, gives fewer errors, better calibrated confidence
and a better ranking of right above wrong predictions. The target of example :math:`i` in epoch
:math:`t = 1, \dots, T` is

.. math::

    \tilde y_i^{(t)} = (1 - \alpha_t)\, y_i + \alpha_t\, P_i^{(t-1)}, \qquad
    \alpha_t = \alpha_T \, t / T ,

and the loss is the cross-entropy of the prediction :math:`P_i^{(t)}` to that target. For the true
class :math:`g`, the gradient in the logits :math:`z` is a rescaled one,

.. math::

    \frac{\|\partial_z L_{PS}\|_1}{\|\partial_z L_{CE}\|_1}
    = 1 - \alpha_t \, \frac{1 - P^{(t-1)}_g}{1 - P^{(t)}_g} ,

as long as no probability fell below :math:`\alpha_t` times its past value (the true class's is
replaced by its complement).

Departures from the paper: none in the targets and the loss. The schedule can be exchanged (for an
ablation). The training loop is for small stacks of networks trained side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.nets import Stacked
from wellposed.nets.columns import stacked_forward
from wellposed.ops.confidence import aurc, eaurc, expected_calibration_error
from wellposed.ops.numerics import warn_of_nan
from wellposed.train import StackedSGD, generator, seeded

__all__ = [
    "ImageTask",
    "PSKDLoss",
    "SideBySide",
    "aurc",
    "constant_alpha",
    "eaurc",
    "expected_calibration_error",
    "gradient_ratio",
    "hard_share",
    "noisy_images",
    "progressive_alpha",
    "rescaling_applies",
    "soft_targets",
    "train_side_by_side",
]

ALPHA_T = 0.8  # the paper's value for all its image classifiers
EVALUATED = 256  # examples at once after training; the copies of all test images fill gigabytes
MILESTONES = (0.5, 0.75)  # the learning rate drops tenfold at 150 and 225 of 300 epochs

Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]
"""A loss of a minibatch: (logits, labels, positions in the training set) to a mean."""


@dataclass(frozen=True)
class ImageTask:
    """Images and labels of several seeds, stacked on the first axis.

    Attributes:
        x, y: training images ``(s, n, ch, h, w)`` and classes ``(s, n)``.
        x_val, y_val: validation data, for choosing hyper-parameters.
        x_test, y_test: test data, for reporting.
    """

    x: Tensor
    y: Tensor
    x_val: Tensor
    y_val: Tensor
    x_test: Tensor
    y_test: Tensor

    def to(self, device: torch.device | str) -> ImageTask:
        """The same task on another device."""
        return ImageTask(*(value.to(device) for value in vars(self).values()))

    def seeds(self, part: slice) -> ImageTask:
        """The task of some of the seeds."""
        return ImageTask(*(value[part] for value in vars(self).values()))


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


def hard_share(mass: Tensor, hardness: Tensor, *, fraction: float = 0.25) -> Tensor:
    r"""Share of a total that falls on the hardest examples.

    Hard-example mining would give the hardest quarter of the examples a larger share of the
    gradient than cross-entropy does.

    Args:
        mass: non-negative numbers to add up, such as gradient norms, shape ``(..., n)``.
        hardness: larger is harder, of the same shape.
        fraction: part of the examples that counts as hardest, in (0, 1); at least one example.

    Returns:
        Shares in [0, 1], shape ``(...)``; 0 where the total is 0.

    Raises:
        ValueError: shapes that differ, no example, or ``fraction`` out of range.

    Source: ours, a measure of what the paper calls hard example mining.

    Example:
        >>> hard_share(torch.tensor([1.0, 3.0]), torch.tensor([0.1, 0.9]), fraction=0.5).item()
        0.75
    """
    if mass.shape != hardness.shape or mass.ndim == 0 or mass.shape[-1] == 0:
        raise ValueError(
            "mass and hardness must have the same shape (..., n) with n >= 1, got "
            f"{tuple(mass.shape)} and {tuple(hardness.shape)}"
        )
    if not 0.0 < fraction < 1.0:
        raise ValueError(f"fraction must lie in (0, 1), got {fraction}")
    count = max(1, round(fraction * mass.shape[-1]))
    hardest = hardness.topk(count, dim=-1).indices
    total = mass.sum(dim=-1)
    return mass.gather(-1, hardest).sum(dim=-1) / torch.where(total == 0, 1.0, total)


def noisy_images(
    x: Tensor,
    y: Tensor,
    *,
    seeds: Sequence[int],
    num_train: int,
    num_val: int,
    pool: int = 1,
    noise: float = 0.0,
    train_noise: float | None = None,
) -> ImageTask:
    r"""Split images at random, once for each seed, and add noise that stays fixed.

    Args:
        x: images, shape ``(n, ch, h, w)``.
        y: classes, shape ``(n,)``, int64.
        seeds: one split and one draw of the noise for each.
        num_train, num_val: sizes; the rest is test data.
        pool: side of the squares that are averaged first, at least 1.
        noise: standard deviation of the Gaussian noise on every image, at least 0.
        train_noise: the same for the training images alone; None for ``noise``.

    Returns:
        The task, on the device of ``x``; a seed gives the same one on every device.

    Raises:
        ValueError: sizes that leave no test data, or noise below 0.

    Source: ours; it stands in for an image set on which cross-entropy overfits.

    Example:
        >>> x, y = torch.zeros(9, 1, 4, 4), torch.zeros(9, dtype=torch.int64)
        >>> task = noisy_images(x, y, seeds=[0, 1], num_train=4, num_val=2, pool=2)
        >>> tuple(task.x.shape), tuple(task.y_test.shape)
        ((2, 4, 1, 2, 2), (2, 3))
    """
    train_noise = noise if train_noise is None else train_noise
    if min(noise, train_noise) < 0:
        raise ValueError(f"noise must be at least 0, got {min(noise, train_noise)}")
    if min(num_train, num_val) < 1 or num_train + num_val >= len(y) or len(x) != len(y):
        raise ValueError(
            f"num_train and num_val must be positive and leave test data out of {len(x)} images, "
            f"got {num_train} and {num_val}"
        )
    small = F.avg_pool2d(x, pool)
    sizes = [num_train, num_val, len(y) - num_train - num_val]
    level = torch.tensor([train_noise, noise, noise]).repeat_interleave(torch.tensor(sizes))
    images, classes = [], []
    for seed in seeds:
        g = generator(seed)
        order = torch.randperm(len(y), generator=g).to(y.device)
        drawn = torch.randn(small.shape, generator=g, dtype=small.dtype)
        drawn = drawn * level[:, None, None, None].to(drawn)
        images.append(small[order] + drawn.to(x.device))
        classes.append(y[order])
    parts = zip(torch.stack(images).split(sizes, 1), torch.stack(classes).split(sizes, 1))
    return ImageTask(*(value for part in parts for value in part))


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
