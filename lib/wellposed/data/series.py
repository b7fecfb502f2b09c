"""Multivariate time series with labels, and ways in which their entries go missing.

A mask is True where an entry is observed. Steps past the end of a series are never observed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from wellposed.data.sets.japanese_vowels import CARD
from wellposed.data.store import folder_of, verified

if TYPE_CHECKING:
    import torch
    from torch import Tensor

__all__ = [
    "Series",
    "batches_by_seed",
    "check_repeated",
    "japanese_vowels",
    "missing_at_random",
    "missing_by_value",
    "missing_channels",
    "missing_in_blocks",
    "rows_by_seed",
    "standardize",
    "valid_steps",
]


@dataclass(frozen=True)
class Series:
    """Labeled series of different lengths, padded with zeros at the end.

    Attributes:
        x: float32, shape ``(n, steps, channels)``, in the units of the source.
        lengths: int64, shape ``(n,)``, steps that belong to each series.
        y: int64, shape ``(n,)``, the classes from 0.
    """

    x: Tensor
    lengths: Tensor
    y: Tensor


def _parse(text: str, steps: int) -> Series:
    import torch

    rows = [line.split(":") for line in text.splitlines() if line and line[0] not in "#@"]
    parsed = [[[float(v) for v in channel.split(",")] for channel in row[:-1]] for row in rows]
    x = torch.zeros(len(rows), steps, len(parsed[0]))
    for i, series in enumerate(parsed):
        values = torch.tensor(series).T[:steps]
        x[i, : len(values)] = values
    lengths = torch.tensor([min(len(series[0]), steps) for series in parsed])
    return Series(x, lengths, torch.tensor([int(row[-1]) - 1 for row in rows]))


def japanese_vowels(*, steps: int = 29) -> tuple[Series, Series]:
    """Official training and test split, each series cut after ``steps`` steps.

    Args:
        steps: at least 1; the longest series has 29.

    Returns:
        270 series for training and 370 for the test, 12 channels, 9 classes.

    Raises:
        ValueError: ``steps`` below 1.
        DataError: the package that carries the data is not installed, or it is damaged.

    Example:
        >>> train, test = japanese_vowels()
        >>> tuple(train.x.shape), tuple(test.x.shape), int(train.lengths.min())
        ((270, 29, 12), (370, 29, 12), 7)
    """
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    content = verified(CARD, folder_of(CARD))
    train, test = (_parse(content[f.name].decode(), steps) for f in CARD.files)
    return train, test


def valid_steps(lengths: Tensor, steps: int) -> Tensor:
    """True at the steps that belong to each series, shape ``(..., n, steps)``.

    Example:
        >>> import torch
        >>> valid_steps(torch.tensor([1, 3]), 3).tolist()
        [[True, False, False], [True, True, True]]
    """
    import torch

    return torch.arange(steps, device=lengths.device) < lengths.unsqueeze(-1)


def standardize(reference: Tensor, mask: Tensor, *series: Tensor) -> tuple[Tensor, ...]:
    """Subtract the mean and divide by the deviation of what is *observed* in the reference.

    Args:
        reference: training series, shape ``(n, steps, channels)``.
        mask: bool, shape ``(..., n, steps, channels)``, True where observed; leading axes count
            repetitions, each with statistics of its own.
        series: what to standardize, shape ``(m, steps, channels)`` each.

    Returns:
        Each series with the leading axes of the mask.

    Raises:
        ValueError: shapes that do not fit, or a channel without two different observed values.

    Example:
        >>> import torch
        >>> x = torch.tensor([[[1.0], [3.0], [99.0]]])
        >>> standardize(x, x < 50, x)[0].flatten().tolist()
        [-1.0, 1.0, 97.0]
    """
    import torch

    if mask.shape[-3:] != reference.shape or reference.ndim != 3:
        raise ValueError(
            f"mask must be (..., n, steps, channels) like reference, got {tuple(mask.shape)} and "
            f"{tuple(reference.shape)}"
        )
    seen = mask.sum((-3, -2), keepdim=True)
    mean = torch.where(mask, reference, 0).sum((-3, -2), keepdim=True) / seen
    square = torch.where(mask, reference - mean, 0).square().sum((-3, -2), keepdim=True) / seen
    if not bool((square > 0).all()):
        raise ValueError("reference must have two different observed values in each channel")
    return tuple((x - mean) / square.sqrt() for x in series)


def _check(x: Tensor, lengths: Tensor, rate: float) -> None:
    if x.ndim != 3 or lengths.shape != x.shape[:1]:
        raise ValueError(
            f"x must be (n, steps, channels) and lengths (n,), got {tuple(x.shape)} and "
            f"{tuple(lengths.shape)}"
        )
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"rate must be in [0, 1), got {rate}")


def missing_at_random(
    x: Tensor, lengths: Tensor, *, rate: float, generator: torch.Generator
) -> Tensor:
    """Each entry is missing with probability ``rate``, whatever happens to the others.

    Args:
        x: series, shape ``(n, steps, channels)``.
        lengths: int64, shape ``(n,)``.
        rate: in [0, 1).
        generator: source of the draws, on the device of ``x``.

    Returns:
        Mask of the shape of ``x``, True where observed.

    Raises:
        ValueError: shapes that do not fit, or ``rate`` out of range.
    """
    import torch

    _check(x, lengths, rate)
    seen = torch.rand(x.shape, generator=generator, device=x.device) >= rate
    return seen & valid_steps(lengths, x.shape[1]).unsqueeze(-1)


def missing_in_blocks(
    x: Tensor, lengths: Tensor, *, rate: float, generator: torch.Generator
) -> Tensor:
    """Sensor dropout: each channel is silent for one run of steps, about ``rate`` of its series.

    The run starts at a uniformly drawn step and goes on from the first step if it meets the end,
    so every step is missing equally often. Arguments, result and errors are those of
    :func:`missing_at_random`.
    """
    import torch

    _check(x, lengths, rate)
    n, steps, channels = x.shape
    draw = torch.rand(n, 1, channels, generator=generator, device=x.device)
    length = lengths.view(-1, 1, 1)
    start = (draw * length).floor()
    place = (torch.arange(steps, device=x.device).view(1, -1, 1) - start) % length
    extra = torch.rand(n, 1, channels, generator=generator, device=x.device)
    run = (rate * length + extra).floor()  # a random rounding keeps the mean rate exact
    return (place >= run) & valid_steps(lengths, steps).unsqueeze(-1)


def missing_channels(
    x: Tensor, lengths: Tensor, *, rate: float, generator: torch.Generator
) -> Tensor:
    """Whole channels are missing, each with probability ``rate`` in each series.

    One channel, drawn at random, always stays. Arguments, result and errors are those of
    :func:`missing_at_random`.
    """
    import torch

    _check(x, lengths, rate)
    draw = torch.rand(len(x), 1, x.shape[2], generator=generator, device=x.device)
    seen = (draw >= rate) | (draw == draw.amax(2, keepdim=True))
    return seen & valid_steps(lengths, x.shape[1]).unsqueeze(-1)


def missing_by_value(
    x: Tensor, lengths: Tensor, *, slope: float, generator: torch.Generator
) -> Tensor:
    r"""Large values are missing: entry :math:`x` with probability :math:`\sigma(a x)`.

    Args:
        x: standardized series, shape ``(n, steps, channels)``.
        lengths: int64, shape ``(n,)``.
        slope: :math:`a`; 0 hides half of the entries at random.
        generator: source of the draws, on the device of ``x``.

    Returns:
        Mask of the shape of ``x``, True where observed.

    Raises:
        ValueError: shapes that do not fit.
    """
    import torch

    _check(x, lengths, 0.0)
    draw = torch.rand(x.shape, generator=generator, device=x.device)
    return (draw >= torch.sigmoid(slope * x)) & valid_steps(lengths, x.shape[1]).unsqueeze(-1)


def batches_by_seed(n: int, batch: int, seeds: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Batches of one epoch for several seeds, each with an order of its own.

    Yields:
        int64 tensors of shape ``(seeds, b)`` with b <= ``batch``.

    Raises:
        ValueError: ``n`` or ``batch`` below 1.

    Example:
        >>> import torch
        >>> [tuple(b.shape) for b in batches_by_seed(5, 3, 2, torch.Generator())]
        [(2, 3), (2, 2)]
    """
    import torch

    if n < 1 or batch < 1:
        raise ValueError(f"n and batch must be at least 1, got {n} and {batch}")
    place = generator.device
    orders = [torch.randperm(n, generator=generator, device=place) for _ in range(seeds)]
    yield from torch.stack(orders).split(batch, dim=1)


def rows_by_seed(values: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` (seeds, b) of ``values`` (seeds, n, ...), seed by seed."""
    import torch

    return values[torch.arange(len(values), device=values.device)[:, None], index]


def check_repeated(x: Tensor, mask: Tensor, lengths: Tensor) -> None:
    """Raise ValueError unless shapes are ``(seeds, n, steps, features)`` twice, and ``(n,)``."""
    if x.ndim != 4 or mask.shape != x.shape or lengths.shape != x.shape[1:2]:
        raise ValueError(
            f"x and mask must be (seeds, n, steps, features) and lengths (n,), got "
            f"{tuple(x.shape)}, {tuple(mask.shape)} and {tuple(lengths.shape)}"
        )
