"""Alternating training: weights on the training loss, hyperparameters on the validation loss."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wellposed.train import StackedAdam, StackedSGD

__all__ = ["SelfTuningResult", "gaussian_entropy", "perturb", "self_tune"]


@dataclass(frozen=True)
class SelfTuningResult:
    """Tuned hyperparameters; leading axes are runs side by side.

    Attributes:
        hyper: last unconstrained hyperparameters, shape ``(..., H)``.
        scale: last standard deviations of the perturbation, ``(..., H)``.
        hyper_history: shape ``(rounds + 1, ..., H)``, the start first.
    """

    hyper: Tensor
    scale: Tensor
    hyper_history: Tensor


def perturb(
    hyper: Tensor, raw_scale: Tensor, batch_size: int, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw :math:`\lambda + \epsilon` for each example, :math:`\epsilon\sim N(0,\sigma^2)`.

    Args:
        hyper: :math:`\lambda`, shape ``(..., H)``.
        raw_scale: :math:`s` with :math:`\sigma = \mathrm{softplus}(s)`, shape ``(..., H)``.
        batch_size: examples B, at least 1.
        generator: source of the noise, on the device of ``hyper``.

    Returns:
        Shape ``(..., B, H)``; differentiable in both tensors.

    Raises:
        ValueError: shapes that differ, or ``batch_size`` below 1.

    Source: Section 3.3; the form of sigma from the authors' code.

    Example:
        >>> perturb(torch.tensor([1.0, 2.0]), torch.full((2,), -99.0), 3).tolist()[2]
        [1.0, 2.0]
    """
    if hyper.ndim == 0 or hyper.shape != raw_scale.shape:
        shapes = f"{tuple(hyper.shape)} and {tuple(raw_scale.shape)}"
        raise ValueError(f"hyper and raw_scale must have one shape (..., H), got {shapes}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    shape = (*hyper.shape[:-1], batch_size, hyper.shape[-1])
    noise = torch.randn(shape, generator=generator, dtype=hyper.dtype, device=hyper.device)
    return hyper.unsqueeze(-2) + F.softplus(raw_scale).unsqueeze(-2) * noise


def gaussian_entropy(raw_scale: Tensor) -> Tensor:
    r"""Entropy of the perturbation, :math:`\sum_i \log(\sigma_i \sqrt{2\pi e})`.

    Args:
        raw_scale: :math:`s` with :math:`\sigma = \mathrm{softplus}(s)`, shape ``(..., H)``.

    Returns:
        Shape ``(...)``, 0-d for one run.

    Source: Section 3.3.

    Example:
        >>> unit = torch.tensor([math.log(math.e - 1)])  # softplus of it is 1
        >>> round(gaussian_entropy(unit).item(), 4)
        1.4189
    """
    return (F.softplus(raw_scale).log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


Loss = Callable[[Tensor], Tensor]


def _descend(optimizer: StackedAdam | StackedSGD, loss: Tensor, lr_factor: float = 1.0) -> None:
    """One step in the optimizer's own parameters; no other tensor collects a gradient."""
    for p, grad in zip(optimizer.params, torch.autograd.grad(loss, optimizer.params)):
        p.grad = grad
    optimizer.step(lr_factor)


class _Tuner:
    """The state of alternating training: hyperparameters, scales and both optimizers."""

    def __init__(
        self, train_loss: Loss, valid_loss: Loss, weights: StackedAdam | StackedSGD,
        hyper: Tensor, *, hyper_lr: float | list[float], tune_scale: bool, init_scale: float,
        entropy_weight: float | Tensor, batch_size: int, generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        if init_scale <= 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        raw = math.log(math.expm1(init_scale))
        self.hyper = hyper.detach().clone().requires_grad_()
        self.raw_scale = torch.full_like(hyper, raw, requires_grad=True)
        self.train_loss, self.valid_loss = train_loss, valid_loss
        self.tune_scale, self.entropy_weight = tune_scale, entropy_weight
        self.batch_size, self.generator = batch_size, generator
        self.weights = weights
        self.tuned = StackedAdam([self.hyper, *[self.raw_scale] * tune_scale], lr=hyper_lr)

    @property
    def scale(self) -> Tensor:
        return F.softplus(self.raw_scale.detach())

    def _perturbed(self) -> Tensor:
        return perturb(self.hyper, self.raw_scale, self.batch_size, self.generator)

    def train_step(self, lr_factor: float = 1.0) -> None:
        # Detached: hyperparameters must not collect gradients of the training loss.
        _descend(self.weights, self.train_loss(self._perturbed().detach()).sum(), lr_factor)

    def valid_step(self) -> None:
        if not self.tune_scale:
            batch = self.hyper.unsqueeze(-2).expand(*self.hyper.shape[:-1], self.batch_size, -1)
            _descend(self.tuned, self.valid_loss(batch).sum())
            return
        entropy = gaussian_entropy(self.raw_scale)
        loss = self.valid_loss(self._perturbed()).sum()
        _descend(self.tuned, loss - (self.entropy_weight * entropy).sum())


def self_tune(
    train_loss: Loss,
    valid_loss: Loss,
    response_parameters: Iterable[Tensor],
    hyper: Tensor,
    *,
    steps: int,
    train_steps: int = 2,
    valid_steps: int = 1,
    warmup_steps: int = 0,
    response_lr: float = 1e-2,
    hyper_lr: float = 1e-2,
    tune_scale: bool = True,
    init_scale: float = 0.5,
    entropy_weight: float = 1e-3,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> SelfTuningResult:
    r"""Alternate between fitting the best response and descending the validation loss.

    With :math:`\mu = \lambda+\epsilon`, a round is ``train_steps`` steps on
    :math:`E_\epsilon f(\mu, \hat w_\phi(\mu))` in :math:`\phi`, then ``valid_steps`` steps on
    :math:`E_\epsilon F(\mu, \hat w_\phi(\mu)) - \tau \mathcal H[\epsilon]` in :math:`\lambda`
    and :math:`s`, all by Adam.

    Args:
        train_loss, valid_loss: map perturbed hyperparameters ``(..., B, H)`` to a scalar, or to
            one number a run. Regularizers must be set by the hyperparameters they are given.
        response_parameters: :math:`\phi`, leaf tensors that require gradients; trained in place.
        hyper: the start, shape ``(H,)``, or ``(..., H)`` for runs side by side; copied.
        steps: rounds, at least 1.
        train_steps, valid_steps: steps in a round, at least 1.
        warmup_steps: first rounds, in which only :math:`\phi` is trained.
        response_lr, hyper_lr: learning rates.
        tune_scale: whether :math:`\sigma` is tuned; if not, validation steps are unperturbed.
        init_scale: initial :math:`\sigma > 0`.
        entropy_weight: :math:`\tau`.
        batch_size: perturbations a step.
        generator: source of the perturbations.

    Returns:
        A :class:`SelfTuningResult`.

    Raises:
        ValueError: a number of steps below 1, or ``init_scale`` not positive.

    Source: Algorithm 1.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)  # best response w[0] + w[1] * hyper
        >>> f = lambda h: (w[0] + w[1] * h - h).square().mean()  # training wants it to be hyper
        >>> g = lambda h: (w[0] + w[1] * h - 3).square().mean()  # validation wants it to be 3
        >>> torch.manual_seed(0) and None
        >>> result = self_tune(f, g, [w], torch.zeros(1), steps=500, hyper_lr=0.03)
        >>> round(result.hyper.item(), 1)
        3.0
    """
    if min(steps, train_steps, valid_steps) < 1:
        raise ValueError("steps, train_steps and valid_steps must be at least 1")
    tuner = _Tuner(
        train_loss, valid_loss, StackedAdam(response_parameters, lr=response_lr), hyper,
        hyper_lr=hyper_lr, tune_scale=tune_scale, init_scale=init_scale,
        entropy_weight=entropy_weight, batch_size=batch_size, generator=generator,
    )  # fmt: skip
    history = [tuner.hyper.detach().clone()]
    for i in range(steps):
        for _ in range(train_steps):
            tuner.train_step()
        for _ in range(valid_steps if i >= warmup_steps else 0):
            tuner.valid_step()
        history.append(tuner.hyper.detach().clone())
    return SelfTuningResult(history[-1], tuner.scale, torch.stack(history))
