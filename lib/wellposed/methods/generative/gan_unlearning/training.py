"""GANs trained side by side: the game that all stages play."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.nets.columns import stacked_forward
from wellposed.nets.stacked import Stacked
from wellposed.ops.numerics import warn_of_nan
from wellposed.train.optim import StackedAdam

__all__ = [
    "GanRun",
    "GanSettings",
    "discriminator_loss",
    "flat",
    "generator_loss",
    "play",
    "r1_penalty",
    "train_gan",
]

Params = Sequence[Tensor]
Force = Callable[[Tensor], Tensor]
"""From parameters, one row a network, to the gradient of a penalty on them."""


@dataclass(frozen=True)
class GanSettings:
    """How a GAN is trained, in every stage.

    Attributes:
        steps: iterations, each one step of the discriminator and one of the generator.
        batch_size: images a step.
        lr: step size of Adam.
        betas: of Adam.
        r1_weight: of the gradient penalty, ``r1_weight / 2`` times :func:`r1_penalty`.
        r1_every: the penalty is added in every so many steps, so many times as strongly.
        ema_decay: of the running average of the generator's weights.
        checks: how many times on the way, equally spaced, the average is kept.
    """

    steps: int = 1000
    batch_size: int = 64
    lr: float = 2e-3
    betas: tuple[float, float] = (0.0, 0.99)
    r1_weight: float = 0.5
    r1_every: int = 4
    ema_decay: float = 0.99
    checks: int = 1

    def __post_init__(self) -> None:
        for name in ("steps", "batch_size", "r1_every", "checks"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.checks > self.steps:
            raise ValueError(f"checks must be at most steps, {self.steps}, got {self.checks}")
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"ema_decay must be in [0, 1), got {self.ema_decay}")
        if not 0 <= self.r1_weight < math.inf:
            raise ValueError(f"r1_weight must be finite and at least 0, got {self.r1_weight}")


@dataclass(frozen=True)
class GanRun:
    """Networks after training side by side, and their history.

    Attributes:
        generators: with the running average of the weights.
        discriminators: with their last weights.
        steps: when the average was kept, k numbers; the last is the end.
        snapshots: generators with the average of each of these steps.
        discriminator_loss: (k, networks), in these steps.
        generator_loss: (k, networks), without penalties.
        distance: (k, networks), squared distance of the average from the anchors: the adapted
            generators in :func:`unlearn`, the start elsewhere.
    """

    generators: list[nn.Module]
    discriminators: list[nn.Module]
    steps: list[int]
    snapshots: list[list[nn.Module]]
    discriminator_loss: Tensor
    generator_loss: Tensor
    distance: Tensor


def discriminator_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    r"""Loss of the discriminator, :math:`E\,\mathrm{sp}(-D(x))+E\,\mathrm{sp}(D(G(z)))`.

    Args:
        real_logits: :math:`D(x)` of images from the data, any shape, not empty.
        fake_logits: :math:`D(G(z))`.

    Returns:
        A scalar, with sp = softplus.

    Raises:
        ValueError: no logits.

    Source: Goodfellow et al. 2014, as in StyleGAN2.

    Example:
        >>> discriminator_loss(torch.zeros(2), torch.zeros(3)).item() / 2  # log 2
        0.6931471824645996
    """
    _not_empty(real_logits=real_logits, fake_logits=fake_logits)
    return F.softplus(-real_logits).mean() + F.softplus(fake_logits).mean()


def generator_loss(fake_logits: Tensor) -> Tensor:
    r"""Non-saturating loss of the generator, :math:`E\,\mathrm{sp}(-D(G(z)))`.

    Args:
        fake_logits: :math:`D(G(z))`, any shape, not empty.

    Returns:
        A scalar.

    Raises:
        ValueError: no logits.

    Source: Goodfellow et al. 2014, as in StyleGAN2.

    Example:
        >>> generator_loss(torch.zeros(2)).item()  # log 2
        0.6931471824645996
    """
    _not_empty(fake_logits=fake_logits)
    return F.softplus(-fake_logits).mean()


def r1_penalty(logits: Tensor, images: Tensor) -> Tensor:
    r"""Mean squared norm of the discriminator's gradient at real images, without a factor 1/2.

    Args:
        logits: (...), one for each image, computed from `images`.
        images: (..., p), in the graph of `logits`.

    Returns:
        A scalar :math:`E\|\nabla_xD(x)\|^2` that can be differentiated.

    Raises:
        ValueError: shapes that do not match, no image, or images that require no gradient.

    Source: Mescheder et al. 2018, regularizer R1.

    Example:
        >>> x = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> r1_penalty((x * torch.tensor([3.0, 4.0])).sum(1), x).item()
        25.0
    """
    _not_empty(images=images)
    if images.shape[: logits.ndim] != logits.shape or images.ndim <= logits.ndim:
        raise ValueError(
            f"logits must have one entry an image, got {tuple(logits.shape)} for images of shape "
            f"{tuple(images.shape)}"
        )
    if not (images.requires_grad and logits.requires_grad):
        raise ValueError("images must require a gradient, and logits must be computed from them")
    (slope,) = torch.autograd.grad(logits.sum(), images, create_graph=True)
    return slope.square().sum() / logits.numel()


# --- training ----------------------------------------------------------------------------------


def train_gan(
    generators: Sequence[nn.Module],
    discriminators: Sequence[nn.Module],
    images: Sequence[Tensor],
    *,
    seeds: Sequence[int],
    settings: GanSettings | None = None,
) -> GanRun:
    """Train GANs side by side, each exactly as if it were alone.

    Args:
        generators: modules from latents (b, d) to flat images (b, p), all of one architecture;
            their first parameter has shape (width, d). They are not changed.
        discriminators: modules from images to logits (b, 1), one for each generator.
        images: for each network its data (n, p); n may differ.
        seeds: for each network the seed of its batches and latents. Networks of one seed see the
            same numbers.
        settings: steps, rates and penalties.

    Returns:
        The run. Warns where a network diverged to NaN.

    Raises:
        ValueError: sequences of different lengths, no image, or shapes that do not match.

    Source: StyleGAN2's losses with lazy R1 (Karras et al. 2020), on small networks.

    Example:
        >>> g, d = nn.Linear(1, 2), nn.Linear(2, 1)
        >>> run = train_gan([g], [d], [torch.zeros(3, 2)], seeds=[0], settings=GanSettings(steps=2))
        >>> run.steps, len(run.generators), run.distance.shape
        ([2], 1, torch.Size([1, 1]))
    """
    return play(generators, discriminators, images, seeds=seeds, settings=settings)


def play(
    generators: Sequence[nn.Module],
    discriminators: Sequence[nn.Module],
    images: Sequence[Tensor],
    *,
    seeds: Sequence[int],
    settings: GanSettings | None = None,
    force: Force | None = None,
    anchors: Sequence[Sequence[Params]] | None = None,
) -> GanRun:
    """The game of all stages: :func:`train_gan` with a penalty on the generators' parameters.

    Args:
        generators: see :func:`train_gan`.
        discriminators: see :func:`train_gan`.
        images: see :func:`train_gan`.
        seeds: see :func:`train_gan`.
        settings: see :func:`train_gan`.
        force: from the parameters of all generators (networks, P), flattened in their order, to
            the gradient of a penalty, of the same shape; none if not given.
        anchors: for each network, parameters to measure distances from; its start if not given.

    Returns:
        The run. Warns where a network diverged to NaN.

    Raises:
        ValueError: see :func:`train_gan`.

    Source: StyleGAN2's losses with lazy R1 (Karras et al. 2020), on small networks.

    Example:
        >>> g, d = nn.Linear(1, 2), nn.Linear(2, 1)
        >>> run = play([g], [d], [torch.ones(3, 2)], seeds=[0], force=lambda theta: 1e6 * theta)
        >>> max(p.abs().max().item() for p in run.generators[0].parameters()) < 0.1
        True
    """
    settings = settings or GanSettings()
    _check_networks(generators, discriminators, images, seeds)
    g_net, d_net = Stacked(generators), Stacked(discriminators)
    g_rows, d_rows = _Rows(g_net, settings), _Rows(d_net, settings)
    size, batch = g_net.size, settings.batch_size
    average = g_rows.theta.clone()
    draw = _batches(g_rows.params[0], images, seeds, batch)
    keep = {round(settings.steps * (i + 1) / settings.checks) for i in range(settings.checks)}
    kept: list[Tensor] = []
    losses: list[Tensor] = []
    for step in range(settings.steps):
        real, latents = draw()
        fake = stacked_forward(g_net, latents)
        both = stacked_forward(d_net, torch.cat([real, fake.detach()], 1)).squeeze(2)
        d_loss = size * discriminator_loss(both[:, :batch], both[:, batch:])
        if settings.r1_weight and step % settings.r1_every == 0:
            real.requires_grad_()
            slope = r1_penalty(stacked_forward(d_net, real).squeeze(2), real)
            d_loss = d_loss + size * settings.r1_every * settings.r1_weight / 2 * slope
        d_rows.descend(d_loss)
        fooled = stacked_forward(d_net, fake).squeeze(2)
        g_rows.descend(size * generator_loss(fooled), force)
        average.lerp_(g_rows.theta, 1 - settings.ema_decay)
        if step + 1 in keep:
            kept.append(average.clone())
            losses.append(_losses(both.detach(), fooled.detach(), batch))
    distance = _distances(kept, anchors or [[list(net.parameters())] for net in generators])
    d_end, g_end = torch.stack(losses).unbind(1)
    warn_of_nan("play", distance, d_end, g_end)
    snapshots = [g_rows.networks(theta) for theta in kept]
    last = d_net.networks()
    return GanRun(snapshots[-1], last, sorted(keep), snapshots, d_end, g_end, distance)


class _Rows:
    """Parameters of networks side by side, as rows of one matrix that Adam takes in one call."""

    def __init__(self, stack: Stacked, settings: GanSettings) -> None:
        self.stack, self.params = stack, list(stack.parameters())
        self.theta = torch.cat([p.detach().flatten(1) for p in self.params], 1)
        widths = [p[0].numel() for p in self.params]
        for p, part in zip(self.params, self.theta.split(widths, 1)):
            p.data = part.view_as(p)  # shares its memory with the matrix
        self.adam = StackedAdam([self.theta], lr=settings.lr, betas=settings.betas)

    def descend(self, loss: Tensor, force: Force | None = None) -> None:
        """One step; the gradient is asked for these parameters alone."""
        slopes = torch.autograd.grad(loss, self.params)
        slope = torch.cat([s.flatten(1) for s in slopes], 1)
        self.theta.grad = slope if force is None else slope + force(self.theta)
        self.adam.step()

    def networks(self, theta: Tensor) -> list[nn.Module]:
        self.theta.copy_(theta)
        return self.stack.networks()


def flat(params: Params) -> Tensor:
    """Parameters of one network as a vector (P,), without gradient.

    Args:
        params: at least one tensor.

    Returns:
        Their entries in order.

    Raises:
        ValueError: no tensor.

    Source: ours.

    Example:
        >>> flat([torch.ones(1, 2), torch.zeros(1)])
        tensor([1., 1., 0.])
    """
    if len(params) == 0:
        raise ValueError("params must hold at least one tensor")
    return torch.cat([p.detach().flatten() for p in params])


def _losses(both: Tensor, fooled: Tensor, batch: int) -> Tensor:
    """Losses of each network, (2, networks)."""
    d_loss = F.softplus(-both[:, :batch]).mean(1) + F.softplus(both[:, batch:]).mean(1)
    return torch.stack([d_loss, F.softplus(-fooled).mean(1)])


def _normal(shape: tuple[int, ...], like: Tensor, rng: torch.Generator) -> Tensor:
    return torch.randn(shape, generator=rng, device=like.device, dtype=like.dtype)


def _batches(
    like: Tensor, images: Sequence[Tensor], seeds: Sequence[int], batch: int
) -> Callable[[], tuple[Tensor, Tensor]]:
    """Draws images (networks, batch, p) and latents (networks, batch, d), once for each seed."""
    unique = sorted(set(seeds))
    rngs = [torch.Generator(like.device).manual_seed(s) for s in unique]
    place = torch.tensor([unique.index(s) for s in seeds], device=like.device)
    parts = {id(x): x for x in images}
    starts, total = {}, 0
    for key, x in parts.items():
        starts[key], total = total, total + len(x)
    pool = torch.cat(list(parts.values())).to(like)
    first = torch.tensor([[starts[id(x)]] for x in images], device=like.device)
    count = torch.tensor([[len(x)] for x in images], device=like.device)

    def draw() -> tuple[Tensor, Tensor]:
        large = [torch.randint(2**40, (batch,), generator=r, device=like.device) for r in rngs]
        rows = torch.stack(large)[place] % count + first
        latents = torch.stack([_normal((batch, like.shape[2]), like, r) for r in rngs])
        return pool[rows], latents[place]

    return draw


def _distances(kept: list[Tensor], anchors: Sequence[Sequence[Params]]) -> Tensor:
    """Mean squared distances from each network's anchors, (k, networks)."""
    homes = [torch.stack([flat(anchor) for anchor in own]) for own in anchors]
    rows = [[(v - h).square().sum(1).mean() for v, h in zip(theta, homes)] for theta in kept]
    return torch.stack([torch.stack(row) for row in rows])


# --- checks ------------------------------------------------------------------------------------


def _not_empty(**tensors: Tensor) -> None:
    for name, value in tensors.items():
        if value.numel() == 0:
            raise ValueError(f"{name} must not be empty, got shape {tuple(value.shape)}")


def _check_networks(
    generators: Sequence[nn.Module],
    discriminators: Sequence[nn.Module],
    images: Sequence[Tensor],
    seeds: Sequence[int],
) -> None:
    lengths = [len(v) for v in (generators, discriminators, images, seeds)]
    if len(set(lengths)) > 1 or lengths[0] == 0:
        raise ValueError(
            "generators, discriminators, images and seeds must be one a network, got lengths "
            f"{lengths}"
        )
    if any(x.ndim != 2 or 0 in x.shape for x in images):
        raise ValueError(f"images must be (n, p), got {[tuple(x.shape) for x in images]}")
    if next(generators[0].parameters()).ndim != 2:
        raise ValueError("generators must begin with a linear layer")
