"""Ten home-made corruptions of gray images, in the spirit of MNIST-C (Mu and Gilmer, 2019).

Each corruption with each class makes one task: tell this class, so corrupted, from the others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import affine_grid, avg_pool2d, conv2d, grid_sample, pad

__all__ = [
    "CORRUPTIONS",
    "CorruptedTasks",
    "balanced_accuracy",
    "corrupt",
    "corrupted_tasks",
    "draw_task",
]


@dataclass(frozen=True)
class CorruptedTasks:
    """Features of one set of images under c corruptions; task `10 c + digit` for ten classes."""

    features: Tensor  # (c, n, p), the last one constant
    labels: Tensor  # (n,), int64
    test_features: Tensor  # (c, n_test, p)
    test_labels: Tensor  # (n_test,), int64
    order: Tensor  # (classes, n), rows of that class first
    positives: tuple[int, ...]  # rows of each class

    @property
    def num_tasks(self) -> int:
        """Corruptions times classes."""
        return len(self.features) * len(self.positives)


def corrupt(images: Tensor, name: str, *, generator: torch.Generator) -> Tensor:
    r"""Corrupt every image; the strength is fixed, what is random differs between images.

    Args:
        images: gray values in $[0,1]$, `(n, 1, h, w)`, floating point.
        name: one of `CORRUPTIONS`: `noise` (Gaussian, deviation 0.4), `blur` (Gaussian, deviation
            2 pixels), `shear` and `rotation` (to a random side), `stripes` (vertical, of random
            phase), `inversion`, `contrast` (a quarter of it), `occlusion` (a square of three
            eighths of the height), `zigzag` (a bright line across) and `brightness` (half-way to
            white).
        generator: source of what is random; a CPU generator gives the same on every device.

    Returns:
        Gray values in $[0,1]$, of the shape, dtype and device of `images`.

    Raises:
        TypeError: `images` is not of floating point.
        ValueError: another shape, no such corruption.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> corrupt(torch.full((1, 1, 1, 2), 0.25), "inversion", generator=g).flatten().tolist()
        [0.75, 0.75]
    """
    if not images.is_floating_point():
        raise TypeError(f"images must be of floating point, got {images.dtype}")
    if images.ndim != 4 or images.shape[1] != 1:
        raise ValueError(f"images must have shape (n, 1, h, w), got {tuple(images.shape)}")
    if name not in _CORRUPTIONS:
        raise ValueError(f"name must be one of {', '.join(CORRUPTIONS)}, got {name!r}")
    return _CORRUPTIONS[name](images, generator).clamp(0, 1)


def _uniform(images: Tensor, generator: torch.Generator, shape: tuple[int, ...]) -> Tensor:
    drawn = torch.rand(shape, generator=generator, dtype=images.dtype, device=generator.device)
    return drawn.to(images.device)


def _each(images: Tensor, generator: torch.Generator) -> Tensor:
    """One uniform number an image, `(n, 1, 1, 1)`."""
    return _uniform(images, generator, (len(images), 1, 1, 1))


def _side(images: Tensor, generator: torch.Generator) -> Tensor:
    return (_each(images, generator).flatten() < 0.5).to(images.dtype) * 2 - 1


def _grid(images: Tensor) -> tuple[Tensor, Tensor]:
    """Row and column of every pixel, each divided by the height, `(h, 1)` and `(1, w)`."""
    h, w = images.shape[-2:]
    rows = torch.arange(h, dtype=images.dtype, device=images.device) / h
    columns = torch.arange(w, dtype=images.dtype, device=images.device) / h
    return rows[:, None], columns[None, :]


def _warp(images: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor) -> Tensor:
    """Resample at the matrix [[a, b], [c, d]] times (column, row), black outside."""
    zero = torch.zeros_like(a)
    theta = torch.stack([torch.stack([a, b, zero], -1), torch.stack([c, d, zero], -1)], -2)
    grid = affine_grid(theta, list(images.shape), align_corners=False)
    return grid_sample(images, grid, align_corners=False)


def _noise(images: Tensor, generator: torch.Generator) -> Tensor:
    drawn = torch.randn(
        images.shape, generator=generator, dtype=images.dtype, device=generator.device
    )
    return images + 0.4 * drawn.to(images.device)


def _blur(images: Tensor, generator: torch.Generator) -> Tensor:
    offset = torch.arange(-5, 6, dtype=images.dtype, device=images.device)
    kernel = torch.exp(-offset.square() / 8)
    kernel = kernel / kernel.sum()
    across = conv2d(pad(images, (5, 5, 5, 5)), kernel[None, None, None, :])
    return conv2d(across, kernel[None, None, :, None])


def _shear(images: Tensor, generator: torch.Generator) -> Tensor:
    side = _side(images, generator)
    one = torch.ones_like(side)
    return _warp(images, one, 0.6 * side, 0 * one, one)


def _rotation(images: Tensor, generator: torch.Generator) -> Tensor:
    angle = math.radians(40) * _side(images, generator)
    return _warp(images, angle.cos(), -angle.sin(), angle.sin(), angle.cos())


def _stripes(images: Tensor, generator: torch.Generator) -> Tensor:
    _, columns = _grid(images)
    wave = torch.sin(2 * math.pi * (5 * columns + _each(images, generator)))
    return torch.where(wave > 0.4, 1 - images, images)


def _inversion(images: Tensor, generator: torch.Generator) -> Tensor:
    return 1 - images


def _contrast(images: Tensor, generator: torch.Generator) -> Tensor:
    return 0.25 * images + 0.375


def _occlusion(images: Tensor, generator: torch.Generator) -> Tensor:
    rows, columns = _grid(images)
    top, left = (0.15 + 0.35 * _each(images, generator) for _ in range(2))
    inside = (rows >= top) & (rows < top + 0.375) & (columns >= left) & (columns < left + 0.375)
    return torch.where(inside, 0.0, images)


def _zigzag(images: Tensor, generator: torch.Generator) -> Tensor:
    rows, columns = _grid(images)
    level = 0.25 + 0.5 * _each(images, generator)
    phase = 4 * columns + _each(images, generator)
    line = level + 0.15 * (4 * (phase - phase.floor() - 0.5).abs() - 1)
    return torch.where((rows - line).abs() < 0.05, 1.0, images)


def _brightness(images: Tensor, generator: torch.Generator) -> Tensor:
    return 0.5 * images + 0.5


_CORRUPTIONS: dict[str, Callable[[Tensor, torch.Generator], Tensor]] = {
    "noise": _noise,
    "blur": _blur,
    "shear": _shear,
    "rotation": _rotation,
    "stripes": _stripes,
    "inversion": _inversion,
    "contrast": _contrast,
    "occlusion": _occlusion,
    "zigzag": _zigzag,
    "brightness": _brightness,
}
CORRUPTIONS: tuple[str, ...] = tuple(_CORRUPTIONS)
"""The names that :func:`corrupt` knows."""


def corrupted_tasks(
    images: Tensor,
    labels: Tensor,
    *,
    dim: int,
    num_train: int,
    generator: torch.Generator,
    dtype: torch.dtype = torch.float64,
) -> CorruptedTasks:
    r"""Corrupt all images in all ways and compress them to a few features.

    Pixels are averaged in blocks of two by two and projected on the leading principal components of
    the training images under all corruptions together, each scaled to variance one. No label is
    used for that.

    Args:
        images: gray values in $[0,1]$, `(n, 1, h, w)`, with h and w even.
        labels: int64 `(n,)`, each class in 0..max present in the training part.
        dim: principal components, at most `h w / 4`.
        num_train: images for training, the others are for the test; split at random.
        generator: source of split and corruptions.
        dtype: of the features.

    Returns:
        :class:`CorruptedTasks` with `dim + 1` features.

    Raises:
        ValueError: shapes or sizes that do not fit.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> images, labels = torch.rand(20, 1, 8, 8, generator=g), torch.arange(20) % 2
        >>> tasks = corrupted_tasks(images, labels, dim=3, num_train=15, generator=g)
        >>> tuple(tasks.features.shape), tuple(tasks.test_features.shape), tasks.num_tasks
        ((10, 15, 4), (10, 5, 4), 20)
    """
    n = len(images)
    if images.ndim != 4 or labels.shape != (n,) or not 1 <= num_train < n:
        raise ValueError(
            f"images (n, 1, h, w), labels (n,) and 1 <= num_train < n, got {tuple(images.shape)}, "
            f"{tuple(labels.shape)} and {num_train}"
        )
    pixels = torch.stack(
        [avg_pool2d(corrupt(images, name, generator=generator), 2) for name in CORRUPTIONS]
    ).flatten(2)
    if not 1 <= dim <= pixels.shape[-1]:
        raise ValueError(f"dim must lie in 1..{pixels.shape[-1]}, got {dim}")
    drawn = torch.randperm(n, generator=generator, device=generator.device).to(images.device)
    train, test = drawn[:num_train], drawn[num_train:]
    known = pixels[:, train].flatten(0, 1).to(dtype)
    mean = known.mean(0)
    variance, directions = torch.linalg.eigh((known - mean).mT @ (known - mean) / len(known))
    project = directions[:, -dim:] / variance[-dim:].clamp(min=1e-12).sqrt()
    features = (pixels.to(dtype) - mean) @ project
    features = torch.cat([features, torch.ones_like(features[..., :1])], dim=-1)
    kept = labels[train]
    inside = kept == torch.arange(int(labels.max()) + 1, device=kept.device)[:, None]
    order = inside.to(torch.uint8).argsort(dim=1, descending=True, stable=True)
    positives = tuple(inside.sum(1).tolist())
    return CorruptedTasks(
        features[:, train], kept, features[:, test], labels[test], order, positives
    )


def draw_task(
    tasks: CorruptedTasks, task: int, n: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    r"""A balanced sample of a task, with replacement: half from its class, half from the others.

    Args:
        tasks: the images.
        task: corruption times number of classes, plus class.
        n: samples, at least 0; for odd n the others get one more.
        generator: source of the draw, on the CPU for speed.

    Returns:
        Features `(n, p)` and targets `(n,)`, 1 for the class and -1 for the others.

    Raises:
        ValueError: no such task.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> images, labels = torch.rand(20, 1, 8, 8, generator=g), torch.arange(20) % 2
        >>> tasks = corrupted_tasks(images, labels, dim=3, num_train=15, generator=g)
        >>> draw_task(tasks, 7, 4, g)[1].tolist()
        [1.0, 1.0, -1.0, -1.0]
    """
    if not 0 <= task < tasks.num_tasks:
        raise ValueError(f"task must lie in 0..{tasks.num_tasks - 1}, got {task}")
    corruption, label = divmod(task, len(tasks.positives))
    num, total, half = tasks.positives[label], len(tasks.labels), n // 2
    inside = torch.randint(num, (half,), generator=generator)
    outside = torch.randint(num, total, (n - half,), generator=generator)
    picked = torch.cat([inside, outside]).to(tasks.order.device)
    y = tasks.features.new_ones(n)
    y[half:] = -1
    return tasks.features[corruption][tasks.order[label][picked]], y


def balanced_accuracy(tasks: CorruptedTasks, chosen: Tensor, coefficients: Tensor) -> Tensor:
    r"""Mean of the shares of right signs inside and outside the class, on the test images.

    Args:
        tasks: the images.
        chosen: tasks, int64 `(b,)`.
        coefficients: of each one's linear predictor, `(b, p)`.

    Returns:
        `(b,)`, in $[0,1]$; 1/2 is chance.

    Raises:
        ValueError: shapes do not fit.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> images, labels = torch.rand(20, 1, 8, 8, generator=g), torch.arange(20) % 2
        >>> tasks = corrupted_tasks(images, labels, dim=3, num_train=15, generator=g)
        >>> balanced_accuracy(tasks, torch.tensor([4]), torch.tensor([[0.0, 0, 0, 1]])).tolist()
        [0.5]
    """
    if coefficients.shape != (len(chosen), tasks.features.shape[-1]):
        raise ValueError(
            f"coefficients must have shape {(len(chosen), tasks.features.shape[-1])}, "
            f"got {tuple(coefficients.shape)}"
        )
    classes = len(tasks.positives)
    scores = tasks.test_features[chosen // classes] @ coefficients.to(tasks.features).unsqueeze(-1)
    inside = tasks.test_labels == (chosen % classes)[:, None]
    right = ((scores.squeeze(-1) > 0) == inside).to(coefficients.dtype)
    sides = [(right * side).sum(1) / side.sum(1) for side in (inside, ~inside)]
    return (sides[0] + sides[1]) / 2
