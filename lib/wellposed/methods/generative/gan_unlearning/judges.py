"""Judges of a GAN that unlearns a class, and controls: what is left, how good is the rest?"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.nets.columns import stacked_forward
from wellposed.nets.mlp import MLP
from wellposed.nets.stacked import Stacked
from wellposed.ops.gaussian_frechet import frechet_distance, weighted_moments
from wellposed.train.optim import StackedAdam
from wellposed.train.reproducible import seeded

__all__ = ["Score", "fit_classifiers", "random_anchors", "sample", "score", "with_parameters"]


@dataclass(frozen=True)
class Score:
    """What a judge sees in generated images.

    Attributes:
        share: (networks,), part of the images that show the target.
        fid: (networks,), Fréchet distance of the other images to real ones without the target;
            infinite where fewer than two others are left.
        classes: (networks, c), part of the images in each class.
        covered: (networks,), number of other classes with at least a fifth of an equal share.
    """

    share: Tensor
    fid: Tensor
    classes: Tensor
    covered: Tensor


def fit_classifiers(
    images: Sequence[Tensor],
    labels: Sequence[Tensor],
    classes: int,
    *,
    seeds: Sequence[int],
    width: int = 64,
    steps: int = 300,
    batch_size: int = 128,
    lr: float = 3e-3,
) -> list[nn.Sequential]:
    """Train classifiers side by side: two hidden layers, cross entropy, Adam.

    Args:
        images: for each classifier its data (n, p); n may differ.
        labels: for each classifier int64 (n,), in 0..classes-1.
        classes: how many there are.
        seeds: for each classifier the seed of its weights and batches.
        width: of the hidden layers.
        steps: of Adam, at least 1.
        batch_size: images a step.
        lr: step size.

    Returns:
        Modules from images (b, p) to logits (b, classes), linear layers with ReLUs.

    Raises:
        ValueError: sequences of different lengths, no image, or labels of another shape.

    Source: ours; the authors take a trained LeNet.

    Example:
        >>> x, y = torch.eye(2).repeat(8, 1), torch.arange(2).repeat(8)
        >>> net, = fit_classifiers([x], [y], 2, seeds=[0], steps=30)
        >>> net(torch.eye(2)).argmax(1).tolist()
        [0, 1]
    """
    if not 0 < len(images) == len(labels) == len(seeds) or min(steps, batch_size) < 1:
        raise ValueError("images, labels and seeds must be one a classifier, with steps >= 1")
    if any(x.ndim != 2 or 0 in x.shape or y.shape != x.shape[:1] for x, y in zip(images, labels)):
        raise ValueError("images must be (n, p), n >= 1, and labels (n,)")
    fresh = []
    for s in seeds:
        with seeded(s):
            fresh.append(MLP((images[0].shape[1], width, width, classes)).to(images[0]))
    stack = Stacked(fresh)
    params = list(stack.parameters())
    adam = StackedAdam(params, lr=lr)
    rngs = [torch.Generator(images[0].device).manual_seed(s) for s in seeds]
    for _ in range(steps):
        rows = [
            torch.randint(len(x), (batch_size,), generator=r, device=x.device)
            for x, r in zip(images, rngs)
        ]
        x = torch.stack([x[i] for x, i in zip(images, rows)])
        y = torch.stack([y[i] for y, i in zip(labels, rows)])
        loss = F.cross_entropy(stacked_forward(stack, x).flatten(0, 1), y.flatten())
        (len(seeds) * loss).backward()
        adam.step()
    return [nn.Sequential(*list(net.children())[1:]) for net in stack.networks()]


@torch.no_grad()
def sample(generators: Sequence[nn.Module], latents: Tensor) -> Tensor:
    """Images of several generators of one architecture.

    Args:
        generators: modules from latents (b, d) to flat images (b, p).
        latents: (networks, b, d), or (b, d) for the same in all.

    Returns:
        Images (networks, b, p).

    Raises:
        ValueError: no generator, different architectures, or latents of another shape.

    Source: ours.

    Example:
        >>> sample([nn.Identity(), nn.Identity()], torch.ones(3, 4)).shape
        torch.Size([2, 3, 4])
    """
    stack = Stacked(generators)
    if latents.ndim == 2:
        latents = latents.expand(stack.size, *latents.shape)
    if latents.ndim != 3 or len(latents) != stack.size:
        raise ValueError(
            f"latents must have shape (b, d) or ({stack.size}, b, d), got {tuple(latents.shape)}"
        )
    return stacked_forward(stack, latents)


@torch.no_grad()
def score(
    images: Tensor,
    judges: Sequence[nn.Sequential],
    real: Tensor,
    labels: Tensor,
    target: int | Sequence[int],
) -> Score:
    """Let classifiers look at generated images.

    Features for the Fréchet distance are what a judge's last layer gets. They are compared among
    images without the target: generated ones by the judge's answer, real ones by their label.

    Args:
        images: (networks, n, p).
        judges: for each network a classifier (b, p) to (b, c), all of one architecture.
        real: (m, p), real images.
        labels: int64 (m,), their classes.
        target: the class to be unlearned, in 0..c-1, one for all or one for each network.

    Returns:
        Share of the target, Fréchet distance, share of every class, classes covered.

    Raises:
        ValueError: shapes that do not match, no image, or `target` out of range.

    Source: the paper's two measures, with features of a digit classifier in place of Inception.

    Example:
        >>> judge = nn.Sequential(nn.Identity(), nn.Identity())
        >>> x = torch.eye(3).repeat(4, 1)
        >>> result = score(x[None], [judge], x, torch.arange(3).repeat(4), target=2)
        >>> round(result.share.item(), 4), result.covered.item(), abs(result.fid.item()) < 1e-6
        (0.3333, 2, True)
    """
    if images.ndim != 3 or 0 in images.shape or len(judges) != len(images):
        raise ValueError(f"images must be (judges, n, p), got {tuple(images.shape)}")
    if real.ndim != 2 or real.shape[1:] != images.shape[2:] or labels.shape != real.shape[:1]:
        raise ValueError(
            f"real (m, p) and labels (m,) must match images, got {tuple(real.shape)} and "
            f"{tuple(labels.shape)}"
        )
    targets = [target] * len(images) if isinstance(target, int) else list(target)
    answers, features = _looks(judges, images)
    c = answers.shape[2]
    if len(targets) != len(images) or not all(0 <= k < c for k in targets):
        raise ValueError(f"target must be one class in 0..{c - 1} a network, got {target}")
    # Networks with the same judge and target share the moments of the real images.
    keys = [(id(judge), k) for judge, k in zip(judges, targets)]
    pairs = list(dict(zip(keys, zip(judges, targets))).values())
    place = torch.tensor([list(dict.fromkeys(keys)).index(key) for key in keys])
    truth = _looks([judge for judge, _ in pairs], real.expand(len(pairs), *real.shape))[1]
    kept = torch.stack([labels != k for _, k in pairs]).to(truth.dtype)
    mean, cov = weighted_moments(truth.double(), kept)

    hits = F.one_hot(answers.argmax(2), c).to(images.dtype)
    classes = hits.mean(1)
    row = torch.arange(len(images), device=images.device)
    wanted = torch.tensor(targets, device=images.device)
    share = classes[row, wanted]
    other = 1 - hits[row, :, wanted]
    ours = weighted_moments(features.double(), other)
    fid = frechet_distance(*ours, mean[place], cov[place])
    fid = torch.where(other.sum(1) < 2, math.inf, fid).to(images.dtype)
    enough = (classes >= 0.2 / c).long()
    return Score(share, fid, classes, enough.sum(1) - enough[row, wanted])


def _looks(judges: Sequence[nn.Sequential], images: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and features of images (judges, n, p)."""
    bodies = Stacked([nn.Sequential(*list(judge)[:-1]) for judge in judges])
    features = stacked_forward(bodies, images)
    return stacked_forward(
        Stacked([nn.Sequential(judge[-1]) for judge in judges]), features
    ), features


def with_parameters(net: nn.Module, params: Sequence[Tensor]) -> nn.Module:
    """A copy of a network with other parameters.

    Args:
        net: it is not changed.
        params: tensors in the shapes and order of ``net.parameters()``.

    Returns:
        A module of the same architecture.

    Raises:
        ValueError: shapes that do not match.

    Source: ours.

    Example:
        >>> net = with_parameters(nn.Linear(1, 1, bias=False), [torch.tensor([[2.0]])])
        >>> net(torch.tensor([[3.0]])).item()
        6.0
    """
    changed = copy.deepcopy(net)
    own = list(changed.parameters())
    if [p.shape for p in own] != [p.shape for p in params]:
        raise ValueError(f"params must have the shapes {[tuple(p.shape) for p in own]}")
    with torch.no_grad():
        for p, value in zip(own, params):
            p.copy_(value)
    return changed


def random_anchors(
    params: Sequence[Tensor], anchors: Sequence[Sequence[Tensor]], rng: torch.Generator
) -> list[list[Tensor]]:
    """Points as far from the parameters as the anchors, in random directions: a control.

    Args:
        params: tensors of one network.
        anchors: sequences of tensors of the same shapes.
        rng: source of the directions, on the device of `params`.

    Returns:
        For each anchor a list of tensors; each tensor is displaced by a random direction, as far
        as the anchor's.

    Raises:
        ValueError: shapes that do not match.

    Source: ours.

    Example:
        >>> rng = torch.Generator().manual_seed(0)
        >>> ((point,),) = random_anchors([torch.zeros(2)], [[torch.tensor([3.0, 4.0])]], rng)
        >>> round(point.norm().item(), 4)
        5.0
    """
    found = []
    for anchor in anchors:
        if [p.shape for p in params] != [a.shape for a in anchor]:
            raise ValueError("anchors must have the shapes of params")
        point = []
        for p, a in zip(params, anchor):
            noise = torch.randn(p.shape, generator=rng, device=p.device, dtype=p.dtype)
            unit = noise / noise.norm().clamp(min=torch.finfo(p.dtype).tiny)
            point.append(p.detach() + (a.detach() - p.detach()).norm() * unit)
        found.append(point)
    return found
