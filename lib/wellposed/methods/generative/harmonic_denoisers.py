r"""Denoisers that generalize, and the bases in which they shrink.

Zahra Kadkhodaie, Florentin Guth, Eero P. Simoncelli, Stéphane Mallat. Generalization in diffusion
models arises from geometry-adaptive harmonic representations. ICLR 2024.

The claim: networks trained to denoise on disjoint halves of a data set first memorize and then,
with more images, become the same function; the Jacobian of that function shrinks in a basis of
harmonics that follow the geometry of the image.

The equations that matter: :math:`\hat x(y)=y+\sigma^2\nabla\log p_\sigma(y)` is the best denoiser
of :math:`y=x+\sigma z` (Miyasawa); without additive constants in the network
:math:`\hat x(y)=J(y)y=\sum_k\lambda_k\langle y,e_k\rangle f_k`.

Departures from the paper: no normalization layers; one cycle of the learning rate instead of
halvings; the squared error may be divided by a power of the noise. The data are digits and drawn
images. Sampling, Jacobians and the test on disjoint halves are the paper's.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from wellposed.data.shapes import calpha_images, disk_images
from wellposed.nets.unet import BiasFreeUNet, StackedUNets
from wellposed.ops.numerics import warn_of_nan
from wellposed.train import StackedAdam

__all__ = [
    "BiasFreeUNet",
    "Trained",
    "adaptive_basis",
    "calpha_images",
    "denoiser_jacobian",
    "disk_images",
    "energy_outside",
    "image_correlation",
    "jacobian_trace",
    "step_schedule",
    "stochastic_ascent",
    "sure",
    "train_denoisers",
]

Denoiser = Callable[[Tensor], Tensor]

FLOOR = 0.01
"""Added to the variance of the noise where the loss is divided by it."""

CHUNK = 512
"""Rows of a Jacobian that are computed at once."""


@dataclass(frozen=True)
class Trained:
    """What a training leaves behind.

    Attributes:
        losses: of each network and step, ``(size, steps)``.
        snapshots: copies of the networks after the steps that were asked for.
    """

    losses: Tensor
    snapshots: tuple[StackedUNets, ...]


def _one_cycle(share: float, warmup: float = 0.3) -> float:
    """Factor on the learning rate after a share of the steps: a line up, half a cosine down."""
    if share < warmup:
        return 0.04 + 0.96 * share / warmup
    return 0.5 * (1.0 + math.cos(math.pi * (share - warmup) / (1.0 - warmup)))


def train_denoisers(
    nets: StackedUNets,
    images: Sequence[Tensor],
    *,
    generator: torch.Generator,
    steps: int,
    batch_size: int = 512,
    lr: float = 1e-3,
    sigma_max: float = 1.0,
    noise_power: float = 2.0,
    loss_power: float = 0.0,
    snapshots: Sequence[int] = (),
) -> Trained:
    r"""Train blind denoisers side by side, each on its own images, for equally many steps.

    .. math:: \min\ \mathbb E\frac{\|\hat x(x+\sigma z)-x\|^2}{(\sigma^2+0.01)^{q}},\qquad
        \sigma=\sigma_{\max}u^{r},\ u\sim\mathcal U[0,1]

    Args:
        nets: the networks; trained in place, with Adam and one cycle of the learning rate.
        images: of each network, ``(N, C, H, W)``; the numbers ``N`` may differ. Batches are drawn
            with replacement, so that small sets give as many steps as large ones.
        generator: source of batches and noise, on the images' device.
        steps, batch_size: at least 1.
        lr: largest learning rate.
        sigma_max: largest standard deviation of the noise, positive.
        noise_power: :math:`r`, positive; 2 is the paper's, 1 makes all levels equally likely.
        loss_power: :math:`q`, at least 0; 0 is the paper's.
        snapshots: steps after which copies are kept, in 1 to ``steps``.

    Returns:
        A :class:`Trained`.

    Raises:
        ValueError: a number out of range, or not one non-empty set of images a network.

    Source: Kadkhodaie et al. 2024, training of universal blind denoisers; the authors' code.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> nets = StackedUNets([BiasFreeUNet(2, 2) for _ in range(2)])
        >>> sets = [torch.rand(n, 1, 4, 4, generator=g) for n in (1, 9)]
        >>> train_denoisers(nets, sets, generator=g, steps=3, batch_size=2).losses.shape
        torch.Size([2, 3])
    """
    if len(images) != nets.size or any(v.ndim != 4 or len(v) == 0 for v in images):
        raise ValueError(f"images must be {nets.size} sets of shape (N, C, H, W), none empty")
    if steps < 1 or batch_size < 1 or any(not 1 <= s <= steps for s in snapshots):
        raise ValueError(
            "steps and batch_size must be at least 1 and snapshots in 1 to steps, got "
            f"{steps}, {batch_size} and {list(snapshots)}"
        )
    if not (0 < sigma_max < math.inf and 0 < noise_power < math.inf and loss_power >= 0):
        raise ValueError(
            "sigma_max and noise_power must be positive and loss_power at least 0, got "
            f"{sigma_max}, {noise_power} and {loss_power}"
        )
    device, dtype = images[0].device, images[0].dtype
    shape = (nets.size, batch_size, 1, 1, 1)
    adam = StackedAdam(nets.parameters(), lr=lr, betas=(0.9, 0.99))
    losses, kept = [], []
    for step in range(1, steps + 1):
        picks = [
            torch.randint(len(v), (batch_size,), generator=generator, device=device) for v in images
        ]
        x = torch.stack([v[i] for v, i in zip(images, picks, strict=True)])
        u = torch.rand(shape, generator=generator, device=device, dtype=dtype)
        sigma = sigma_max * u**noise_power
        noise = torch.randn(x.shape, generator=generator, device=device, dtype=dtype)
        error = (nets(x + sigma * noise) - x).square().sum((2, 3, 4), keepdim=True)
        loss = (error / (sigma.square() + FLOOR) ** loss_power).flatten(1).mean(1)
        loss.sum().backward()  # type: ignore[no-untyped-call]
        adam.step(_one_cycle(step / steps))
        losses.append(loss.detach())
        if step in snapshots:
            kept.append(copy.deepcopy(nets))
    curve = torch.stack(losses, dim=1)
    warn_of_nan("train_denoisers", curve)
    return Trained(curve, tuple(kept))


def _as_images(name: str, value: Tensor) -> None:
    if value.ndim != 4 or 0 in value.shape or not value.is_floating_point():
        raise ValueError(
            f"{name} must be floating-point images (n, C, H, W), got {tuple(value.shape)}"
        )


def denoiser_jacobian(denoiser: Denoiser, y: Tensor) -> Tensor:
    r"""The Jacobian :math:`J=\partial\hat x/\partial y` at one image.

    The image is copied once for each row, so that rows are computed together.

    Args:
        denoiser: maps images ``(n, C, H, W)`` to images, each by itself; a module is put into
            evaluation mode meanwhile.
        y: one noisy image, ``(1, C, H, W)``.

    Returns:
        Shape ``(d, d)`` with ``d = C * H * W``; row ``a`` is the gradient of output ``a``.

    Raises:
        ValueError: not one image.

    Source: Kadkhodaie et al. 2024, section on adaptive bases.

    Example:
        >>> denoiser_jacobian(lambda y: y.flip(-1) / 2, torch.ones(1, 1, 1, 2)).tolist()
        [[0.0, 0.5], [0.5, 0.0]]
    """
    _as_images("y", y)
    if len(y) != 1:
        raise ValueError(f"y must be one image, got {len(y)}")
    module = denoiser if isinstance(denoiser, nn.Module) else None
    before = module.training if module is not None else False
    if module is not None:
        module.eval()
    d, rows = y[0].numel(), []
    with torch.enable_grad():
        for start in range(0, d, CHUNK):
            index = torch.arange(start, min(start + CHUNK, d), device=y.device)
            copies = y.detach().repeat(len(index), 1, 1, 1).requires_grad_()
            outputs = denoiser(copies).flatten(1).gather(1, index[:, None])
            rows.append(torch.autograd.grad(outputs.sum(), copies)[0].flatten(1))
    if module is not None:
        module.train(before)
    return torch.cat(rows)


def adaptive_basis(jacobian: Tensor) -> tuple[Tensor, Tensor]:
    r"""Eigenvalues and eigenvectors of the symmetric part :math:`(J+J^\top)/2`, largest first.

    Args:
        jacobian: :math:`J`, ``(..., d, d)``, finite.

    Returns:
        Shrinkage factors ``(..., d)`` and the basis ``(..., d, d)``, whose columns are vectors.

    Raises:
        ValueError: not square, or not finite.

    Source: Kadkhodaie et al. 2024, shrinkage in an adaptive basis; the paper decomposes the
        Jacobian itself, which is close to symmetric after long training.

    Example:
        >>> values, vectors = adaptive_basis(torch.diag(torch.tensor([1.0, 3.0])))
        >>> values.tolist(), vectors.abs()[:, 0].tolist()
        ([3.0, 1.0], [0.0, 1.0])
    """
    if jacobian.ndim < 2 or jacobian.shape[-1] != jacobian.shape[-2] or 0 in jacobian.shape:
        raise ValueError(f"jacobian must be square, got {tuple(jacobian.shape)}")
    if not bool(jacobian.isfinite().all()):
        raise ValueError("jacobian must be finite")
    values, vectors = torch.linalg.eigh(jacobian / 2 + jacobian.mT / 2)
    return values.flip(-1), vectors.flip(-1)


def jacobian_trace(
    denoiser: Denoiser, y: Tensor, *, probes: int, generator: torch.Generator
) -> Tensor:
    r"""An unbiased estimate of :math:`\operatorname{tr}J`, the number of dimensions that are kept.

    .. math:: \operatorname{tr}J=\mathbb E[s^\top Js],\qquad s\in\{-1,1\}^d\text{ at random}

    Args:
        denoiser: maps images ``(n, C, H, W)`` to images, each by itself.
        y: noisy images ``(n, C, H, W)``.
        probes: random signs an image, at least 1.
        generator: source of the signs, on the images' device.

    Returns:
        One estimate an image, ``(n,)``.

    Raises:
        ValueError: ``y`` is not images, or ``probes`` below 1.

    Source: Hutchinson 1989.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> jacobian_trace(lambda y: y / 2, torch.ones(1, 1, 2, 3), probes=1, generator=g).item()
        3.0
    """
    _as_images("y", y)
    if probes < 1:
        raise ValueError(f"probes must be at least 1, got {probes}")
    with torch.enable_grad():
        copies = y.detach().repeat(probes, 1, 1, 1).requires_grad_()
        flips = torch.randint(2, copies.shape, generator=generator, device=y.device)
        signs = (2 * flips - 1).to(y.dtype)
        (back,) = torch.autograd.grad((denoiser(copies) * signs).sum(), copies)
    return (back * signs).flatten(1).sum(1).view(probes, len(y)).mean(0)


def sure(y: Tensor, denoised: Tensor, trace: Tensor | float, sigma: float) -> Tensor:
    r"""Stein's unbiased estimate of the squared error, without the clean image.

    .. math:: \|y-\hat x\|^2-d\sigma^2+2\sigma^2\operatorname{tr}J

    Args:
        y: one noisy image of :math:`d` numbers, any shape.
        denoised: the estimate :math:`\hat x`, of the same shape.
        trace: of the Jacobian at ``y``.
        sigma: standard deviation of the noise, at least 0.

    Returns:
        A scalar: a sum over pixels, no mean.

    Raises:
        ValueError: shapes that differ, or ``sigma`` out of range.

    Source: Stein 1981; Kadkhodaie et al. 2024.

    Example:
        >>> y = torch.tensor([1.0, 3.0])
        >>> sure(y, y / 2, 1.0, 1.0).item()  # 2.5 - 2 + 2
        2.5
    """
    if y.shape != denoised.shape:
        raise ValueError(f"denoised must have shape {tuple(y.shape)}, got {tuple(denoised.shape)}")
    if not 0.0 <= sigma < math.inf:
        raise ValueError(f"sigma must be at least 0 and finite, got {sigma}")
    return (y - denoised).square().sum() - y.numel() * sigma**2 + 2 * sigma**2 * trace


def step_schedule(t: int, h0: float = 0.01, beta: float = 0.01) -> tuple[float, float]:
    r"""Step size and noise of the sampler, :math:`h_t` and :math:`g_t=\gamma_t/\sigma_t`.

    .. math:: h_t=\frac{h_0t}{1+h_0(t-1)},\qquad g_t=\sqrt{(1-\beta h_t)^2-(1-h_t)^2}

    A step multiplies the remaining noise by :math:`1-\beta h_t`, about.

    Args:
        t: number of the step, from 1.
        h0: first step size, in (0, 1].
        beta: in (0, 1]; 1 adds no noise, and the smaller, the more of it.

    Returns:
        :math:`h_t` and :math:`g_t`.

    Raises:
        ValueError: a number out of range.

    Source: Kadkhodaie and Simoncelli 2021, Algorithm 1; the authors' code.

    Example:
        >>> step_schedule(1, h0=0.5, beta=1.0), step_schedule(9, h0=1.0, beta=0.2)
        ((0.5, 0.0), (1.0, 0.8))
    """
    if t < 1 or not 0.0 < h0 <= 1.0 or not 0.0 < beta <= 1.0:
        raise ValueError(
            f"t must be at least 1, h0 and beta in (0, 1], got t={t}, h0={h0}, beta={beta}"
        )
    h = h0 * t / (1.0 + h0 * (t - 1))
    return h, math.sqrt(max(0.0, (1.0 - beta * h) ** 2 - (1.0 - h) ** 2))


@torch.no_grad()
def stochastic_ascent(
    denoiser: Denoiser,
    y: Tensor,
    h0: float = 0.01,
    beta: float = 0.01,
    sigma_end: float = 0.01,
    max_steps: int = 1000,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Draw images from the density that a blind denoiser has learned.

    With :math:`f=y-\hat x(y)` and :math:`\sigma_t=\|f\|/\sqrt d`, which is each image's own,

    .. math:: y\leftarrow y-h_tf+g_t\sigma_tz,\qquad z\sim\mathcal N(0,I).

    An image rests once its :math:`\sigma_t\le\sigma_{\rm end}`. Two denoisers get the same noise
    from generators of one seed.

    Args:
        denoiser: maps images ``(n, C, H, W)`` to images.
        y: where to start, mean and noise, ``(n, C, H, W)``.
        h0, beta: of :func:`step_schedule`.
        sigma_end: positive.
        max_steps: at least 1; a warning says how many images are not at rest by then.
        generator: source of the noise, on the device of ``y``; without one torch's own.

    Returns:
        :math:`\hat x(y)` at the end, ``(n, C, H, W)``.

    Raises:
        ValueError: ``y`` is not images, or a number out of range.

    Source: Kadkhodaie and Simoncelli 2021, Algorithm 1; Kadkhodaie et al. 2024.

    Example:
        >>> y = torch.full((1, 1, 1, 2), 8.0)  # each step halves y: the density is a point
        >>> stochastic_ascent(lambda y: 0 * y, y, h0=0.5, beta=1.0, sigma_end=0.1).tolist()
        [[[[0.0, 0.0]]]]
    """
    _as_images("y", y)
    if not 0.0 < sigma_end < math.inf or max_steps < 1:
        raise ValueError(
            f"sigma_end must be positive and max_steps at least 1, got {sigma_end} and {max_steps}"
        )
    for t in range(1, max_steps + 1):
        h, g = step_schedule(t, h0, beta)
        f = y - denoiser(y)
        sigma = f.square().mean((1, 2, 3), keepdim=True).sqrt()
        moves = ~(sigma <= sigma_end)
        if t % 8 == 1 and not bool(moves.any()):  # asking costs a wait for the device
            break
        z = torch.randn(y.shape, generator=generator, device=y.device, dtype=y.dtype)
        y = torch.where(moves, y - h * f + g * sigma * z, y)
    result = denoiser(y)
    left = int(((y - result).square().mean((1, 2, 3)).sqrt() > sigma_end).sum())
    if left:
        message = f"stochastic_ascent: {left} of {len(y)} images are not at rest"
        warnings.warn(message, RuntimeWarning, stacklevel=2)
    warn_of_nan("stochastic_ascent", result)
    return result


def image_correlation(a: Tensor, b: Tensor) -> Tensor:
    r"""Correlation of every image of one set with every image of another.

    The normalized inner product of the images after their means are removed.

    Args:
        a: images ``(n, ...)``.
        b: images ``(m, ...)`` with as many pixels.

    Returns:
        In [-1, 1], ``(n, m)``; 0 for constant images.

    Raises:
        ValueError: images with different numbers of pixels.

    Source: Kadkhodaie et al. 2024, similarity of samples.

    Example:
        >>> a = torch.tensor([[0.0, 1.0], [3.0, 3.0]])
        >>> image_correlation(a, a).round(decimals=4).tolist()
        [[1.0, 0.0], [0.0, 0.0]]
    """
    if min(a.ndim, b.ndim) < 2 or a[:1].numel() != b[:1].numel() or 0 in (*a.shape, *b.shape):
        raise ValueError(
            f"a and b must hold images of one size, got {tuple(a.shape)} and {tuple(b.shape)}"
        )

    def normalized(x: Tensor) -> Tensor:
        rows = x.flatten(1)
        size = rows.abs().amax(1, keepdim=True)
        rows = rows / torch.where(size > 0, size, 1.0)
        rows = rows - rows.mean(1, keepdim=True)
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        flat = length <= 1e-5 * rows.shape[1] ** 0.5  # rounding, after division by the largest
        return rows.masked_fill(flat, 0.0) / torch.where(flat, 1.0, length)

    return (normalized(a) @ normalized(b).mT).clamp(-1, 1)


def energy_outside(images: Tensor, bases: Tensor, keep: int) -> Tensor:
    r"""Share of each image's energy that the leading vectors of each basis leave out.

    .. math:: 1-\sum_{k\le K}\langle x,e_k\rangle^2/\|x\|^2

    Args:
        images: clean images, ``(n, ...)`` with :math:`d` pixels each, none of them zero.
        bases: orthonormal columns, leading ones first, ``(m, d, d)``.
        keep: :math:`K`, in 1 to ``d``.

    Returns:
        In [0, 1], ``(m, n)``: row is the basis, column the image; 1 for an image that is zero.

    Raises:
        ValueError: shapes that do not fit, or ``keep`` out of range.

    Source: ours, after the coefficients in the adaptive basis shown by Kadkhodaie et al. 2024.

    Example:
        >>> energy_outside(torch.tensor([[3.0, 4.0]]), torch.eye(2)[None], 1).item()
        0.6399999856948853
    """
    rows = images.flatten(1) if images.ndim > 1 else images
    if rows.ndim != 2 or bases.ndim != 3 or 0 in (*rows.shape, *bases.shape):
        raise ValueError(
            "images must be (n, ...) and bases (m, d, d), got "
            f"{tuple(images.shape)} and {tuple(bases.shape)}"
        )
    if bases.shape[1:] != (rows.shape[1],) * 2 or not 1 <= keep <= rows.shape[1]:
        raise ValueError(
            f"bases must be (m, {rows.shape[1]}, {rows.shape[1]}) and keep in 1 to "
            f"{rows.shape[1]}, got {tuple(bases.shape)} and {keep}"
        )
    length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
    unit = rows / torch.where(length > 0, length, 1.0)
    inside = torch.einsum("nd,mdk->mnk", unit, bases[:, :, :keep]).square().sum(-1)
    return (1 - inside).clamp(0, 1)
