"""The two stages, the repulsion between them, and the walk in parameter space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from wellposed.methods.generative.gan_unlearning.training import GanRun, GanSettings, flat, play
from wellposed.nets.columns import columns

__all__ = [
    "Repulsion",
    "adapt",
    "diagonal_fisher",
    "ewc_penalty",
    "extrapolate",
    "parameter_distance",
    "percentage_unlearned",
    "repulsion_loss",
    "unlearn",
]

Kind = Literal["il2", "nl2", "el2"]
KINDS: tuple[Kind, ...] = get_args(Kind)
Params = Sequence[Tensor]
DENSE = (nn.Sequential, nn.Flatten, nn.Linear, nn.LeakyReLU, nn.ReLU, nn.Tanh, nn.Identity)


@dataclass(frozen=True)
class Repulsion:
    """A repulsion term, in units of the squared distance at the start.

    Attributes:
        kind: of :func:`repulsion_loss`.
        weight: at least 0; with 0 only the positives count.
        alpha: rate of the exponential, positive.
    """

    kind: Kind = "il2"
    weight: float = 1.0
    alpha: float = 1.0

    def __post_init__(self) -> None:
        _check_kind(self.kind, self.alpha)
        if not 0 <= self.weight < math.inf:
            raise ValueError(f"weight must be finite and at least 0, got {self.weight}")


# --- parameter space ---------------------------------------------------------------------------


def parameter_distance(params: Params, anchors: Sequence[Params]) -> Tensor:
    r"""Mean over anchors of the squared distance, :math:`\frac1R\sum_r\|\theta-\theta^{(r)}\|^2`.

    Args:
        params: tensors of one network.
        anchors: R sequences of tensors of the same shapes; they get no gradient.

    Returns:
        A scalar, summed over all tensors.

    Raises:
        ValueError: no anchor, no tensor, or shapes that do not match.

    Source: the paper's distance to the adapted generators. (The authors' code averages within
        each tensor and over tensors instead.)

    Example:
        >>> anchors = [[torch.tensor([1.0, 0.0])], [torch.ones(2)]]
        >>> parameter_distance([torch.zeros(2)], anchors).item()
        1.5
    """
    _check_anchors(params, anchors)
    parts = [(p - a.detach()).square().sum() for anchor in anchors for p, a in zip(params, anchor)]
    return torch.stack(parts).sum() / len(anchors)


def repulsion_loss(
    params: Params, anchors: Sequence[Params], kind: Kind = "il2", alpha: float = 1.0
) -> Tensor:
    r"""A loss that falls with the distance.

    IL2 is :math:`1/d`, NL2 is :math:`-d`, EL2 is :math:`e^{-\alpha d}`.

    Args:
        params: tensors of one network.
        anchors: R sequences of tensors of the same shapes; they get no gradient.
        kind: "il2", "nl2" or "el2".
        alpha: rate of the exponential, positive; the others ignore it.

    Returns:
        A scalar; IL2 is infinite where the distance is 0.

    Raises:
        ValueError: an unknown kind, `alpha` not positive, no anchor, shapes that do not match.

    Source: the paper's three repulsion losses.

    Example:
        >>> theta, anchor = [torch.tensor([2.0])], [[torch.tensor([0.0])]]
        >>> repulsion_loss(theta, anchor).item(), repulsion_loss(theta, anchor, "nl2").item()
        (0.25, -4.0)
    """
    _check_kind(kind, alpha)
    return _repel(parameter_distance(params, anchors), kind, alpha)


def _repel(distance: Tensor, kind: Kind, alpha: float) -> Tensor:
    if kind == "il2":
        return 1 / distance
    return -distance if kind == "nl2" else torch.exp(-alpha * distance)


def diagonal_fisher(
    generator: nn.Module, discriminator: nn.Module, latents: Tensor
) -> list[Tensor]:
    r"""How much the discriminator's answer depends on each parameter of the generator.

    :math:`F_i=\frac1n\sum_j\bigl(\partial D(G_\theta(z_j))/\partial\theta_i\bigr)^2`: the gradient
    of each sample is squared, then averaged. (The square of the mean gradient is smaller by up to a
    factor n.)

    Args:
        generator: maps (b, d) to images, each row for itself.
        discriminator: maps images to logits.
        latents: (n, d), not empty.

    Returns:
        Tensors at least 0 in the shapes of ``generator.parameters()``.

    Raises:
        ValueError: latents of another shape than (n, d), or none.

    Source: Kirkpatrick et al. 2017; for generators, Li et al. 2020, and the authors' code.

    Example:
        >>> g, d = nn.Linear(1, 1, bias=False), nn.Identity()
        >>> diagonal_fisher(g, d, torch.tensor([[1.0], [3.0]]))[0].item()  # (1 + 9) / 2
        5.0
    """
    if latents.ndim != 2 or len(latents) == 0:
        raise ValueError(f"latents must have shape (n, d), n >= 1, got {tuple(latents.shape)}")
    with torch.enable_grad():
        slopes = _sample_slopes(generator, discriminator, latents.detach())
    return [s.square().mean(0) for s in slopes]


def _sample_slopes(
    generator: nn.Module, discriminator: nn.Module, latents: Tensor
) -> tuple[Tensor, ...]:
    """Gradients of D(G(z)) in the generator's parameters, (n, ...), one for each latent."""
    names, shared = zip(*generator.named_parameters())
    n = len(latents)
    if not all(isinstance(m, DENSE) for net in (generator, discriminator) for m in net.modules()):
        fixed = {name: p.detach() for name, p in discriminator.named_parameters()}

        def answer(params: dict[str, Tensor], z: Tensor) -> Tensor:
            image = functional_call(generator, params, (z[None],))
            out: Tensor = functional_call(discriminator, fixed, (image,)).sum()
            return out

        params = {name: p.detach() for name, p in zip(names, shared)}
        found = vmap(grad(answer), in_dims=(None, 0), chunk_size=64)(params, latents)
        return tuple(found[name] for name in names)
    # Every sample gets weights of its own: a stack of n networks, each with a batch of one.
    own = [p.detach().expand(n, *p.shape).requires_grad_() for p in shared]
    images = columns(generator, dict(zip(names, own)), latents.unsqueeze(2))
    fixed = {k: p.detach().expand(n, *p.shape) for k, p in discriminator.named_parameters()}
    return torch.autograd.grad(columns(discriminator, fixed, images).sum(), own)


def ewc_penalty(params: Params, reference: Params, fisher: Params, weight: float) -> Tensor:
    r"""Elastic weight consolidation, :math:`\frac w2\sum_iF_i(\theta_i-\theta_{ref,i})^2`.

    Args:
        params: tensors :math:`\theta`.
        reference: tensors of the same shapes; they get no gradient.
        fisher: tensors of the same shapes, at least 0.
        weight: :math:`w`, at least 0.

    Returns:
        A scalar.

    Raises:
        ValueError: shapes that do not match, no tensor, a negative weight.

    Source: Kirkpatrick et al. 2017, equation (3).

    Example:
        >>> theta, start, fisher = ([torch.tensor([v])] for v in (3.0, 1.0, 5.0))
        >>> ewc_penalty(theta, start, fisher, 2.0).item()
        20.0
    """
    if not 0 <= weight < math.inf:
        raise ValueError(f"weight must be finite and at least 0, got {weight}")
    _check_anchors(params, [reference, fisher])
    parts = [
        (f.detach() * (p - r.detach()).square()).sum() for p, r, f in zip(params, reference, fisher)
    ]
    return weight / 2 * torch.stack(parts).sum()


def extrapolate(params: Params, anchors: Sequence[Params], gamma: float) -> list[Tensor]:
    r"""Walk away from the mean of the anchors, :math:`\theta-\gamma(\bar\theta_N-\theta)`.

    Args:
        params: tensors of one network.
        anchors: R sequences of tensors of the same shapes.
        gamma: how far; 0 stays, -1 goes to the mean of the anchors.

    Returns:
        New tensors without gradient.

    Raises:
        ValueError: no anchor, no tensor, shapes that do not match, `gamma` not finite.

    Source: the paper's parameter-space semantics.

    Example:
        >>> extrapolate([torch.tensor([1.0])], [[torch.tensor([2.0])], [torch.tensor([4.0])]], 0.5)
        [tensor([0.])]
    """
    if not math.isfinite(gamma):
        raise ValueError(f"gamma must be finite, got {gamma}")
    _check_anchors(params, anchors)
    means = [torch.stack([t.detach() for t in column]).mean(0) for column in zip(*anchors)]
    return [p.detach() - gamma * (m - p.detach()) for p, m in zip(params, means)]


def percentage_unlearned(before: float, after: float) -> float:
    r"""PUL, the part of the target that is gone, :math:`100\,(n_{before}-n_{after})/n_{before}`.

    Args:
        before: number (or share) of samples with the feature before unlearning, positive.
        after: the same afterwards, at least 0.

    Returns:
        Percent; negative where the feature became more frequent.

    Raises:
        ValueError: `before` not positive, or a number that is not finite or negative.

    Source: the paper's PUL.

    Example:
        >>> percentage_unlearned(0.10, 0.02)
        80.0
    """
    if not (0 < before < math.inf):
        raise ValueError(f"before must be positive and finite, got {before}")
    if not (0 <= after < math.inf):
        raise ValueError(f"after must be finite and at least 0, got {after}")
    return 100 * (1 - after / before)


# --- training ----------------------------------------------------------------------------------


def adapt(
    generators: Sequence[nn.Module],
    discriminators: Sequence[nn.Module],
    negatives: Sequence[Tensor],
    *,
    seeds: Sequence[int],
    ewc_weights: Sequence[float],
    fisher_latents: int = 128,
    settings: GanSettings | None = None,
) -> GanRun:
    """Stage 1: fine-tune on samples with the undesired feature, held by elastic weights.

    Args:
        generators: pretrained, see :func:`train_gan`; they are not changed.
        discriminators: pretrained with them.
        negatives: for each network the images (n, p) that show the feature.
        seeds: for each network the seed of its batches and latents.
        ewc_weights: for each network the weight of :func:`ewc_penalty`, at least 0.
        fisher_latents: how many latents estimate the Fisher diagonal, at least 1.
        settings: steps, rates and penalties.

    Returns:
        The run; its distances are from the start.

    Raises:
        ValueError: sequences of different lengths, no image, shapes that do not match, a negative
            weight, no latent.

    Source: the paper's first stage, negative adaptation.

    Example:
        >>> g, d = nn.Linear(1, 2), nn.Linear(2, 1)
        >>> run = adapt([g], [d], [torch.ones(3, 2)], seeds=[0], ewc_weights=[1.0],
        ...             settings=GanSettings(steps=2))
        >>> bool(run.distance > 0)
        True
    """
    if len(ewc_weights) != len(generators) or not all(0 <= w < math.inf for w in ewc_weights):
        raise ValueError(f"ewc_weights must be one number >= 0 a network, got {ewc_weights}")
    if fisher_latents < 1:
        raise ValueError(f"fisher_latents must be at least 1, got {fisher_latents}")
    if not 0 < len(generators) == len(discriminators) == len(seeds):
        raise ValueError("generators, discriminators and seeds must be one a network")
    known: dict[tuple[int, int], list[Tensor]] = {}
    for g, d, s in zip(generators, discriminators, seeds):
        if (id(g), id(d)) not in known:  # several subsets of negatives, one pretrained network
            first = next(g.parameters())
            rng = torch.Generator(first.device).manual_seed(s)
            size = (fisher_latents, first.shape[1])
            z = torch.randn(size, generator=rng, device=first.device, dtype=first.dtype)
            known[id(g), id(d)] = diagonal_fisher(g, d, z)
    rows = [
        w * flat(known[id(g), id(d)]) for w, g, d in zip(ewc_weights, generators, discriminators)
    ]
    fisher = torch.stack(rows)
    start = torch.stack([flat(list(g.parameters())) for g in generators])
    return play(
        generators,
        discriminators,
        negatives,
        seeds=seeds,
        settings=settings,
        force=lambda theta: fisher * (theta - start),
    )


def unlearn(
    generators: Sequence[nn.Module],
    discriminators: Sequence[nn.Module],
    positives: Sequence[Tensor],
    anchors: Sequence[Sequence[Params]],
    *,
    seeds: Sequence[int],
    repulsions: Sequence[Repulsion],
    settings: GanSettings | None = None,
) -> GanRun:
    """Stage 2: fine-tune the original on the other samples, repelled from the adapted weights.

    The squared distance is taken in units of its value at the start.

    Args:
        generators: the original, pretrained ones, see :func:`train_gan`; they are not changed.
        discriminators: pretrained with them.
        positives: for each network the images (n, p) without the feature.
        anchors: for each network the parameters of its adapted generators.
        seeds: for each network the seed of its batches and latents.
        repulsions: for each network kind, weight and rate.
        settings: steps, rates and penalties.

    Returns:
        The run; its distances are from the anchors.

    Raises:
        ValueError: sequences of different lengths, no image, shapes that do not match, anchors that
            all equal the start.

    Source: the paper's second stage.

    Example:
        >>> g, d = nn.Linear(1, 2), nn.Linear(2, 1)
        >>> away = [[p.detach() + 1 for p in g.parameters()]]
        >>> run = unlearn([g], [d], [torch.ones(3, 2)], [away], seeds=[0],
        ...               repulsions=[Repulsion("nl2", 100.0)], settings=GanSettings(steps=3))
        >>> bool(run.distance > parameter_distance(list(g.parameters()), away))
        True
    """
    if not len(anchors) == len(repulsions) == len(generators):
        raise ValueError(
            f"anchors and repulsions must be one a network, got {len(anchors)} and "
            f"{len(repulsions)} for {len(generators)} networks"
        )
    for net, own in zip(generators, anchors):
        _check_anchors(list(net.parameters()), own)
    start = torch.stack([flat(list(net.parameters())) for net in generators])
    homes = [torch.stack([flat(anchor) for anchor in own]) for own in anchors]
    center = torch.stack([home.mean(0) for home in homes])
    # The mean squared distance is the one to the center plus the spread around it.
    spread = torch.stack([(h - c).square().sum(1).mean() for h, c in zip(homes, center)])
    unit = (start - center).square().sum(1) + spread
    if not bool(((unit > 0) & unit.isfinite()).all()):
        raise ValueError("anchors must be finite and differ from the generator's parameters")
    weight = {k: start.new_tensor([r.weight * (r.kind == k) for r in repulsions]) for k in KINDS}
    alpha = start.new_tensor([r.alpha for r in repulsions])

    def force(theta: Tensor) -> Tensor:
        away = theta - center
        d = (away.square().sum(1) + spread) / unit
        fade = weight["el2"] * alpha * torch.exp(-alpha * d)
        push = weight["il2"] / d.square() + weight["nl2"] + fade  # minus the slope of the loss in d
        return (-2 * push / unit).unsqueeze(1) * away

    return play(
        generators,
        discriminators,
        positives,
        seeds=seeds,
        settings=settings,
        force=force,
        anchors=anchors,
    )


# --- checks ------------------------------------------------------------------------------------


def _check_kind(kind: str, alpha: float) -> None:
    if kind not in KINDS:
        raise ValueError(f"kind must be 'il2', 'nl2' or 'el2', got {kind!r}")
    if not 0 < alpha < math.inf:
        raise ValueError(f"alpha must be positive and finite, got {alpha}")


def _check_anchors(params: Params, anchors: Sequence[Params]) -> None:
    if len(anchors) == 0 or len(params) == 0:
        raise ValueError("params and anchors must hold at least one entry each")
    shapes = [tuple(p.shape) for p in params]
    for anchor in anchors:
        if [tuple(a.shape) for a in anchor] != shapes:
            raise ValueError(
                f"anchors must have the shapes of params, {shapes}, got "
                f"{[tuple(a.shape) for a in anchor]}"
            )
