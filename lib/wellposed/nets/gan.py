"""Small generators and discriminators for images that are kept as flat vectors."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import nn

from wellposed.nets.mlp import MLP

__all__ = ["conv_pair", "mlp_pair"]

LEAK = partial(nn.LeakyReLU, 0.2)


def mlp_pair(
    latent_dim: int, pixels: int, *, widths: Sequence[int] = (64, 64)
) -> tuple[nn.Module, nn.Module]:
    """A fully connected generator and discriminator.

    Args:
        latent_dim: length of a latent vector, at least 1.
        pixels: length of an image, at least 1; pixels lie in (-1, 1).
        widths: hidden layers of the generator; the discriminator has them in reverse.

    Returns:
        A module from latents (b, latent_dim) to images (b, pixels), and one from images to
        logits (b, 1), with leaky ReLUs of slope 0.2.

    Raises:
        ValueError: a size below 1.

    Source: ours.

    Example:
        >>> import torch
        >>> g, d = mlp_pair(2, 9, widths=(5,))
        >>> d(g(torch.zeros(4, 2))).shape
        torch.Size([4, 1])
    """
    _check(latent_dim=latent_dim, pixels=pixels, widths=min(widths, default=1))
    generator = nn.Sequential(MLP((latent_dim, *widths, pixels), activation=LEAK), nn.Tanh())
    return generator, MLP((pixels, *reversed(widths), 1), activation=LEAK)


def conv_pair(latent_dim: int, side: int, *, channels: int = 32) -> tuple[nn.Module, nn.Module]:
    """A convolutional generator and discriminator for square gray images, without normalization.

    Both pass through images of half and of a quarter of the side, with ``channels`` and twice
    as many channels.

    Args:
        latent_dim: length of a latent vector, at least 1.
        side: of the images, a multiple of 4.
        channels: at the finer of the two scales, at least 1.

    Returns:
        A module from latents (b, latent_dim) to flat images (b, side * side) in (-1, 1), and one
        from flat images to logits (b, 1).

    Raises:
        ValueError: a size below 1, or a side that is no multiple of 4.

    Source: Radford et al. 2016, at a smaller size.

    Example:
        >>> import torch
        >>> g, d = conv_pair(3, 8, channels=2)
        >>> d(g(torch.zeros(4, 3))).shape
        torch.Size([4, 1])
    """
    _check(latent_dim=latent_dim, channels=channels, side=side)
    if side % 4:
        raise ValueError(f"side must be a multiple of 4, got {side}")
    small, wide = side // 4, 2 * channels
    generator = nn.Sequential(
        nn.Linear(latent_dim, wide * small * small),
        nn.Unflatten(1, (wide, small, small)),
        LEAK(),
        nn.ConvTranspose2d(wide, channels, 4, 2, 1),
        LEAK(),
        nn.ConvTranspose2d(channels, 1, 4, 2, 1),
        nn.Flatten(),
        nn.Tanh(),
    )
    discriminator = nn.Sequential(
        nn.Unflatten(1, (1, side, side)),
        nn.Conv2d(1, channels, 4, 2, 1),
        LEAK(),
        nn.Conv2d(channels, wide, 4, 2, 1),
        LEAK(),
        nn.Flatten(),
        nn.Linear(wide * small * small, 1),
    )
    return generator, discriminator


def _check(**sizes: int) -> None:
    for name, size in sizes.items():
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
