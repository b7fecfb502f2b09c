"""The policy's losses, training under its masks, and training in the usual way."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.methods.regularizers.noise_mask.masks import render_mask
from wellposed.methods.regularizers.noise_mask.policy import sample_cells
from wellposed.ops.numerics import warn_of_nan
from wellposed.train import generator, minibatches, seeded

__all__ = ["HeatRun", "fit", "heat", "policy_loss"]

Objective = Callable[[Tensor, Tensor], Tensor]


class _Optimizer(Protocol):
    """What a step needs: an optimizer of ``torch.optim`` or of ``wellposed.train``."""

    def zero_grad(self) -> None: ...

    def step(self) -> object: ...


@dataclass(frozen=True)
class HeatRun:
    """What the pretraining did; row ``k`` of the masks is after ``k`` epochs.

    Attributes:
        mean_mask: mean of each cell's distribution over the images, ``(epochs + 1, grid * grid)``.
        spread: standard deviation of that mean between images, averaged over the cells,
            ``(epochs + 1,)``; zero means that all images get the same distribution.
        cost: mean cross-entropy of the masked images in each epoch, ``(epochs,)``.
    """

    mean_mask: Tensor
    spread: Tensor
    cost: Tensor


def policy_loss(
    log_prob: Tensor, cost: Tensor, mode: str = "reinforce", baseline: bool = True
) -> Tensor:
    r"""Loss whose gradient teaches the policy: REINFORCE, or the scalar of the released code.

    .. math:: L_{\text{reinforce}} = \frac1N \sum_i (c_i - b) \sum_j \log p_{ij}, \qquad
              L_{\text{released}} = \bar c \, \frac1N \sum_i \log \sum_j p_{ij}

    In ``reinforce`` the cost is a constant, :math:`b` is its mean over the batch or zero, and the
    classifier needs its own loss. (With the batch mean as :math:`b` the expected gradient shrinks
    by the harmless factor :math:`1 - 1/N`, because :math:`b` contains the image's own cost.) In
    ``released`` the cost keeps its gradient and the classifier learns from the same scalar.

    Args:
        log_prob: log-densities of the drawn cells, shape ``(N, J)``.
        cost: loss of the classifier on each masked image, shape ``(N,)``.
        mode: ``"reinforce"`` or ``"released"``.
        baseline: whether to subtract the mean cost; of no effect in ``released``.

    Returns:
        Scalar.

    Raises:
        ValueError: shapes that do not match, an empty batch, or another mode.

    Source: the method's name and README (REINFORCE); the released code (training loop).

    Example:
        >>> log_prob = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
        >>> policy_loss(log_prob, torch.tensor([4.0, 2.0])).item()  # ((4-3) 3 + (2-3) 0) / 2
        1.5
    """
    if log_prob.ndim != 2 or log_prob.numel() == 0 or cost.shape != log_prob.shape[:1]:
        raise ValueError(
            "log_prob must have shape (N, J) and cost (N,), got "
            f"{tuple(log_prob.shape)} and {tuple(cost.shape)}"
        )
    if mode == "released":
        return log_prob.logsumexp(dim=1).mean() * cost.mean()
    if mode != "reinforce":
        raise ValueError(f"mode must be 'reinforce' or 'released', got {mode!r}")
    advantage = cost.detach()
    if baseline:
        advantage = advantage - advantage.mean()
    return (advantage * log_prob.sum(dim=1)).mean()


def _reinforce(log_prob: Tensor, cost: Tensor) -> Tensor:
    """REINFORCE for the policy plus the mean cost for the classifier."""
    return policy_loss(log_prob, cost) + cost.mean()


def heat(
    classifier: nn.Module,
    policy: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    classifier_optimizer: _Optimizer,
    policy_optimizer: _Optimizer,
    seed: int,
    objective: Objective = _reinforce,
    epochs: int = 90,
    batch_size: int = 32,
    kernel_size: int | None = None,
    sigma: float | None = None,
) -> HeatRun:
    """Pretrain ("heat") a classifier on images masked by a policy that learns along with it.

    An optimizer with ``lr=0`` freezes its network: so one function also trains under masks that
    do not learn, and teaches a policy about a classifier that stays as it is.

    Args:
        classifier: network from images to logits ``(N, classes)``; trained in place.
        policy: :class:`MaskPolicy`, or a module that maps images to a ``Beta``; trained in place.
        x: images, shape ``(n, channels, H, W)``, on the device of the networks.
        y: labels, shape ``(n,)``, int64.
        classifier_optimizer, policy_optimizer: one step each per minibatch.
        seed: of the order of the images and the drawn masks.
        objective: from ``log_prob (N, J)`` and ``cost (N,)`` to the scalar that both networks
            descend; REINFORCE plus the mean cost unless told otherwise.
        epochs: passes over the images, at least 1.
        batch_size: images a step, at least 2 for batch normalization.
        kernel_size, sigma: blur of the masks, see :func:`render_mask`.

    Returns:
        Mean masks and costs, on the CPU. A RuntimeWarning if the run diverged.

    Raises:
        ValueError: ``epochs`` below 1, images that are not 4-D, fewer than two of them.

    Source: the released code (training loop; 90 epochs, batches of 32 a device).

    Example:
        >>> x, y = torch.rand(8, 1, 4, 4), torch.arange(8) % 2
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 2))
        >>> from wellposed.methods.regularizers.noise_mask import MaskPolicy
        >>> policy = MaskPolicy(nn.Flatten(), feature_dim=16, grid=2)
        >>> sgd = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, policy)]
        >>> run = heat(
        ...     net, policy, x, y, classifier_optimizer=sgd[0], policy_optimizer=sgd[1], seed=0,
        ...     epochs=3, batch_size=4,
        ... )
        >>> run.mean_mask.shape
        torch.Size([4, 4])
    """
    if epochs < 1 or x.ndim != 4 or len(x) < 2 or len(x) != len(y):
        raise ValueError(
            "epochs must be at least 1, x 4-D with two images or more, and y as long, got "
            f"{epochs} and shapes {tuple(x.shape)} and {tuple(y.shape)}"
        )
    order = generator(seed)
    size = (x.shape[-2], x.shape[-1])
    masks, spreads, costs = [], [], []

    def look() -> None:
        policy.eval()
        with torch.no_grad():
            mean = policy(x).mean
        masks.append(mean.mean(0))
        spreads.append(mean.std(0).mean())
        policy.train()

    classifier.train()
    look()
    with seeded(seed):
        for _ in range(epochs):
            total = x.new_zeros(())
            for index in minibatches(len(x), batch_size, order, device=x.device):
                batch = x[index]
                dist = policy(batch)
                cells = sample_cells(dist)
                masked = batch * render_mask(cells, size, kernel_size, sigma)
                cost = F.cross_entropy(classifier(masked), y[index], reduction="none")
                classifier_optimizer.zero_grad()
                policy_optimizer.zero_grad()
                objective(dist.log_prob(cells), cost).backward()  # type: ignore[no-untyped-call]
                classifier_optimizer.step()
                policy_optimizer.step()
                total += cost.detach().sum()
            costs.append(total / len(x))
            look()
    run = [torch.stack(part).cpu() for part in (masks, spreads, costs)]
    warn_of_nan("heat", *run)
    return HeatRun(*run)


def _clean(x: Tensor) -> Tensor:
    return x


def fit(
    classifier: nn.Module,
    x: Tensor,
    y: Tensor,
    *,
    optimizer: _Optimizer,
    seed: int,
    corrupt: Callable[[Tensor], Tensor] = _clean,
    epochs: int = 10,
    batch_size: int = 32,
) -> Tensor:
    """Train a classifier in the usual way: fine-tuning after :func:`heat`, and the baselines.

    Args:
        classifier: network from images to logits ``(N, classes)``; trained in place.
        x: images, shape ``(n, ...)``.
        y: labels, shape ``(n,)``, int64.
        optimizer: one step per minibatch.
        seed: of the order of the images and of all noise.
        corrupt: what happens to a minibatch of images before the classifier sees it; may draw
            from torch's global random state.
        epochs: passes over the images, at least 1.
        batch_size: images a step, at least 1.

    Returns:
        Mean cross-entropy in each epoch, ``(epochs,)``, on the CPU.

    Raises:
        ValueError: ``epochs`` below 1.

    Source: the authors' README (fine-tuning for 10 epochs on clean images).

    Example:
        >>> net = nn.Linear(1, 2)
        >>> sgd = torch.optim.SGD(net.parameters(), lr=1.0)
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> bool(fit(net, x, y, optimizer=sgd, seed=0, epochs=50)[-1] < 0.1)
        True
    """
    if epochs < 1:
        raise ValueError(f"epochs must be at least 1, got {epochs}")
    order = generator(seed)
    costs = []
    classifier.train()
    with seeded(seed):
        for _ in range(epochs):
            total = x.new_zeros(())
            for index in minibatches(len(x), batch_size, order, device=x.device):
                loss = F.cross_entropy(classifier(corrupt(x[index])), y[index])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                total += loss.detach() * len(index)
            costs.append(total / len(x))
    return torch.stack(costs).cpu()
