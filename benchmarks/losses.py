"""The losses of the noisy-label, distillation and grokking papers beside their plain formulas.

A call computes the loss of one minibatch and its gradient in the logits. Ours check their inputs
and keep their state; the plain formulas are what a paper's page shows, typed in.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from contest import OURS, Contender, contest
from wellposed.methods.distillation.progressive_self import PSKDLoss
from wellposed.methods.distillation.random_teacher import distillation_loss
from wellposed.methods.grokking.numerical_stability import (
    orthogonal_gradient,
    stablemax_cross_entropy,
)
from wellposed.methods.noisy_labels.aggregate_responses import interpolating_loss
from wellposed.methods.noisy_labels.early_learning import ELRLoss, elr_loss
from wellposed.methods.noisy_labels.nested_dropout import small_loss_indices

PLAIN = "plain formula"


def minibatch(small: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, labels, and numbers of 256 examples with 100 classes."""
    b, c = (4, 3) if small else (256, 100)
    g = torch.Generator().manual_seed(0)
    logits = torch.randn(b, c, generator=g, dtype=torch.float64)
    return logits, torch.randint(c, (b,), generator=g), torch.randperm(10 * b, generator=g)[:b]


def with_gradient(
    logits: Tensor, loss: Callable[[Tensor], Tensor]
) -> Callable[[], tuple[Tensor, Tensor]]:
    """A call that returns the loss and its gradient."""

    def call() -> tuple[Tensor, Tensor]:
        z = logits.detach().requires_grad_()
        value = loss(z)
        return value.detach(), torch.autograd.grad(value, z)[0]

    return call


def both(
    logits: Tensor, ours: Callable[[Tensor], Tensor], plain: Callable[[Tensor], Tensor]
) -> dict[str, Contender]:
    """Contenders that must agree on loss and gradient."""
    value, grad = with_gradient(logits, plain)()

    def error(found: tuple[Tensor, Tensor]) -> float:
        return float((found[0] - value).abs() + (found[1] - grad).abs().max())

    return {
        OURS: Contender(with_gradient(logits, ours), error),
        PLAIN: Contender(with_gradient(logits, plain), error),
    }


@contest(OURS, PLAIN, goal=1e-9, paper=True)
def test_elr(small: bool) -> dict[str, Contender]:
    """Early-learning regularization: the loss of 256 examples in 100 classes."""
    logits, labels, _ = minibatch(small)
    past = logits.roll(1, 0).softmax(1)

    def plain(z: Tensor) -> Tensor:
        p = z.softmax(1).clamp(1e-4, 1 - 1e-4)
        target = 0.7 * past + 0.3 * (p / p.sum(1, keepdim=True)).detach()
        inner = (p * target).sum(1)
        return F.cross_entropy(z, labels) + 3.0 * (1 - inner).log().mean()

    return both(logits, lambda z: elr_loss(z, labels, past)[0], plain)


@contest(OURS, PLAIN, goal=1e-9)
def test_elr_module(small: bool) -> dict[str, Contender]:
    """Early-learning regularization with targets that are looked up and stored."""
    logits, labels, index = minibatch(small)
    n, c = 10 * len(logits), logits.shape[1]
    kept = ELRLoss(n, c).double()
    targets = torch.zeros(n, c, dtype=torch.float64)

    def ours(z: Tensor) -> Tensor:
        kept.targets.zero_()
        loss: Tensor = kept(z, labels, index)
        return loss

    def plain(z: Tensor) -> Tensor:
        targets.zero_()
        p = z.softmax(1).clamp(1e-4, 1 - 1e-4)
        q = p.detach()
        targets[index] = 0.7 * targets[index] + 0.3 * q / q.sum(1, keepdim=True)
        inner = (p * targets[index]).sum(1)
        return F.cross_entropy(z, labels) + 3.0 * (1 - inner).log().mean()

    return both(logits, ours, plain)


@contest(OURS, PLAIN, goal=1e-9)
def test_small_losses(small: bool) -> dict[str, Contender]:
    """Co-teaching: the mean of the smallest losses, 20 % left out."""
    logits, labels, _ = minibatch(small)

    def ours(z: Tensor) -> Tensor:
        losses = F.cross_entropy(z, labels, reduction="none")
        return losses[small_loss_indices(losses.detach(), 0.2)].mean()

    def plain(z: Tensor) -> Tensor:
        losses = F.cross_entropy(z, labels, reduction="none")
        return losses[losses.argsort()[: int(0.8 * len(losses))]].mean()

    return both(logits, ours, plain)


@contest(OURS, PLAIN, goal=1e-9)
def test_bags(small: bool) -> dict[str, Contender]:
    """Aggregate responses: the interpolating loss of 25,600 predictions in bags of 4."""
    n = 8 if small else 25_600
    g = torch.Generator().manual_seed(0)
    pred = torch.randn(n, generator=g, dtype=torch.float64)
    bags = torch.randn(n // 4, generator=g, dtype=torch.float64)

    def plain(z: Tensor) -> Tensor:
        bag = (bags - z.reshape(-1, 4).mean(1)).square().mean()
        instance = (bags.repeat_interleave(4) - z).square().mean()
        return 0.7 * bag + 0.3 * instance

    return both(pred, lambda z: interpolating_loss(z, bags, 4, 0.3), plain)


@contest(OURS, PLAIN, goal=1e-9, paper=True)
def test_pskd(small: bool) -> dict[str, Contender]:
    """Progressive self-distillation: the loss with the targets of the last epoch."""
    logits, labels, index = minibatch(small)
    n, c = 10 * len(logits), logits.shape[1]
    module = PSKDLoss(n, c, total_epochs=10, alpha_T=0.8).double()
    module.set_epoch(5)
    past = torch.full((n, c), 1 / c, dtype=torch.float64)
    module.memory.copy_(past)
    alpha = module.alpha

    def ours(z: Tensor) -> Tensor:
        module.memory[index] = 1 / c
        loss: Tensor = module(z, labels, index)
        return loss

    def plain(z: Tensor) -> Tensor:
        past[index] = 1 / c
        refined = (1 - alpha) * F.one_hot(labels, c).to(z) + alpha * past[index]
        past[index] = z.detach().softmax(1)
        return -(refined * z.log_softmax(1)).sum(1).mean()

    return both(logits, ours, plain)


@contest(OURS, PLAIN, goal=1e-9, paper=True)
def test_distillation(small: bool) -> dict[str, Contender]:
    """Random teachers: the divergence of a student from its teacher."""
    logits, _, _ = minibatch(small)
    teacher = logits.roll(1, 0)

    def plain(z: Tensor) -> Tensor:
        return F.kl_div(
            z.log_softmax(1), teacher.log_softmax(1), log_target=True, reduction="batchmean"
        )

    return both(logits, lambda z: distillation_loss(z, teacher), plain)


@contest(OURS, PLAIN, goal=1e-9, paper=True)
def test_stablemax(small: bool) -> dict[str, Contender]:
    """Grokking: cross-entropy on StableMax."""
    logits, labels, _ = minibatch(small)

    def plain(z: Tensor) -> Tensor:
        s = torch.where(z >= 0, z + 1, 1 / (1 - z))
        return -(s / s.sum(1, keepdim=True)).log().gather(1, labels[:, None]).mean()

    return both(logits, lambda z: stablemax_cross_entropy(z, labels), plain)


@contest(OURS, PLAIN, goal=1e-9, paper=True)
def test_orthogonal_gradient(small: bool) -> dict[str, Contender]:
    """Grokking: a gradient of 200 x 200 without its part along the weight."""
    size = 4 if small else 200
    g = torch.Generator().manual_seed(0)
    weight, grad = torch.randn(2, size, size, generator=g, dtype=torch.float64)

    def plain() -> Tensor:
        w, v = weight.flatten(), grad.flatten()
        across = v - (w @ v) / (w @ w) * w
        return (across * v.norm() / across.norm()).reshape(weight.shape)

    truth = plain()

    def error(found: Tensor) -> float:
        return float((found - truth).abs().max())

    return {
        OURS: Contender(lambda: orthogonal_gradient(weight, grad), error),
        PLAIN: Contender(plain, error),
    }
