"""Noisy images, split once for each seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from wellposed.train import generator

__all__ = ["ImageTask", "noisy_images"]


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
