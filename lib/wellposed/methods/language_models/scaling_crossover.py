r"""Rules of training that hold at one scale and fail at another, on small language models.

Lechao Xiao. Rethinking Conventional Wisdom in Machine Learning: From Generalization to Scaling.
arXiv 2409.15156, 2024.

Where data is short and seen many times, a regularizer earns its keep; where every example is seen
once, training and test loss coincide and what counts is how fast the loss falls. So advice from the
first regime (an L2 penalty, a rate near the largest stable one, small batches) need not hold in the
second, and of two methods the better one on small models may be the worse one on large models:
their curves cross. With :math:`\Delta_i = \log L_A(s_i) - \log L_B(s_i)`, a crossover lies where
:math:`\Delta` changes sign.

Departures from the paper: its models are transformers of up to billions of weights on web text;
ours, in :mod:`~wellposed.methods.language_models.scaling_training`, read characters. The constants
of the two rate rules are set for our widths. Interpolation between scales, the power-law fits and
all thresholds are ours; the paper, of which we have not seen the full text, is empirical and gives
no algorithm.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from wellposed.train.gradients import rescale_gradients_

__all__ = [
    "PowerLaw",
    "find_crossovers",
    "fit_power_law",
    "power_law_crossover",
    "proposal_learning_rate",
    "regularization_gain",
    "rescale_gradients_",
    "tuned_gain",
]


@dataclass(frozen=True)
class PowerLaw:
    r"""The curve :math:`L(s) = E + A s^{-\alpha}`.

    Attributes:
        irreducible: :math:`E`, the loss at infinite scale.
        coefficient: :math:`A`.
        exponent: :math:`\alpha`.
    """

    irreducible: float
    coefficient: float
    exponent: float

    def __call__(self, scales: ArrayLike) -> NDArray[np.float64]:
        """Losses at positive scales, of the same shape."""
        scaled = self.coefficient * np.asarray(scales, np.float64) ** -self.exponent
        return np.asarray(self.irreducible + scaled)


def proposal_learning_rate(
    width: int, constant: float = 2.0, reference_width: int | None = None
) -> float:
    r"""A rate in inverse proportion to the width, or that of a reference width for every width.

    :math:`\eta = c / D`, or :math:`\eta = c / D_0`.

    Args:
        width: :math:`D`, at least 1.
        constant: :math:`c`, positive.
        reference_width: :math:`D_0`; None for the scaled rule.

    Returns:
        The rate.

    Raises:
        ValueError: an argument out of range.

    Source: Xiao 2024, the rate rules of the crossover example (2/D against 2/1024).

    Example:
        >>> proposal_learning_rate(128), proposal_learning_rate(128, reference_width=64)
        (0.015625, 0.03125)
    """
    if width < 1 or (reference_width is not None and reference_width < 1):
        raise ValueError(
            f"width and reference_width must be at least 1, got {width} and {reference_width}"
        )
    if not 0.0 < constant < math.inf:
        raise ValueError(f"constant must be positive and finite, got {constant}")
    return constant / (width if reference_width is None else reference_width)


def _curve(name: str, values: ArrayLike, *, least: int) -> NDArray[np.float64]:
    array = np.asarray(values, np.float64)
    if array.ndim != 1 or len(array) < least:
        raise ValueError(f"{name} must have one axis with at least {least} entries")
    if not (np.isfinite(array).all() and (array > 0).all()):
        raise ValueError(f"{name} must be positive and finite")
    return array


def _curves(
    scales: ArrayLike, least: int, **losses: ArrayLike
) -> tuple[NDArray[np.float64], list[NDArray[np.float64]]]:
    """Checked scales, and losses of the same length."""
    places = _curve("scales", scales, least=least)
    if (np.diff(places) <= 0).any():
        raise ValueError("scales must be sorted, each larger than the one before")
    curves = [_curve(name, values, least=least) for name, values in losses.items()]
    for name, curve in zip(losses, curves, strict=True):
        if len(curve) != len(places):
            raise ValueError(
                f"{name} must have {len(places)} entries like scales, got {len(curve)}"
            )
    return places, curves


def find_crossovers(scales: ArrayLike, losses_a: ArrayLike, losses_b: ArrayLike) -> Tensor:
    r"""Scales at which two loss curves cross, interpolated in logarithms.

    Between neighbors with :math:`\Delta` of opposite signs,
    :math:`\log s = \log s_i + (\log s_{i+1} - \log s_i) \Delta_i / (\Delta_i - \Delta_{i+1})`.
    Where curves touch on the grid, that is a crossover if the signs on both sides differ; of
    several equal points in a row, the middle (in logarithms) counts.

    Args:
        scales: positive, increasing, shape (m,) with m at least 2.
        losses_a: positive, shape (m,).
        losses_b: positive, shape (m,).

    Returns:
        float64 (k,), ascending; empty without a crossover.

    Raises:
        ValueError: scales that are not positive and sorted, unequal lengths, a loss that is not
            positive and finite.

    Source: ours, for the crossovers of Xiao 2024.

    Example:
        >>> find_crossovers([1, 4], [1, 4], [4, 1])
        tensor([2.], dtype=torch.float64)
    """
    places, (a, b) = _curves(scales, 2, losses_a=losses_a, losses_b=losses_b)
    where, delta = np.log(places), np.log(a) - np.log(b)
    found: list[float] = []
    last = None  # the latest point at which the curves differ
    for i in range(len(delta)):
        if delta[i] == 0.0:
            continue
        if last is not None and delta[last] * delta[i] < 0.0:
            if i == last + 1:
                share = delta[last] / (delta[last] - delta[i])
                found.append(where[last] + (where[i] - where[last]) * share)
            else:
                found.append(0.5 * (where[last + 1] + where[i - 1]))
        last = i
    return torch.tensor(found, dtype=torch.float64).exp()


def fit_power_law(
    scales: ArrayLike, losses: ArrayLike, irreducible: float | None = None
) -> PowerLaw:
    r"""Fit :math:`E + A s^{-\alpha}` by least squares in logarithms.

    For a fixed :math:`E`, :math:`\log(L - E)` is a straight line in :math:`\log s`. A free
    :math:`E` in [0, min L) is the one with the smallest sum of squares: a grid, then a scalar
    search in each of its valleys. With few points :math:`E` is ill-determined.

    Args:
        scales: positive, increasing, shape (m,) with m at least 2, or 3 if :math:`E` is free.
        losses: positive, shape (m,).
        irreducible: :math:`E`, at least 0 and below all losses; None to fit it.

    Returns:
        A :class:`PowerLaw`.

    Raises:
        ValueError: bad curves as in :func:`find_crossovers`, or :math:`E` out of range.

    Source: ours; the form is that of the scaling-law literature.

    Example:
        >>> law = fit_power_law([1, 4, 16], [4, 2, 1], irreducible=0.0)
        >>> round(law.coefficient, 6), round(law.exponent, 6)
        (4.0, 0.5)
    """
    places, (curve,) = _curves(scales, 3 if irreducible is None else 2, losses=losses)
    where, lowest = np.log(places), float(curve.min())

    def line(floor: float) -> tuple[float, float, float]:
        rest = np.log(curve - floor)
        centered = where - where.mean()
        slope = float(centered @ rest / (centered @ centered))
        start = float(rest.mean() - slope * where.mean())
        return float(((rest - start - slope * where) ** 2).sum()), start, slope

    if irreducible is None:
        from scipy.optimize import minimize_scalar

        # Finer towards the lowest loss, where the logarithm is steep. The sum of squares may have
        # several valleys, so each is searched.
        grid = lowest * (1.0 - np.geomspace(1.0, 1e-6, 241))
        sums = np.array([line(float(floor))[0] for floor in grid])
        walled = np.concatenate([[np.inf], sums, [np.inf]])
        flags = (sums <= walled[:-2]) & (sums <= walled[2:])
        valleys: list[int] = np.flatnonzero(flags).tolist()
        candidates = [float(grid[k]) for k in valleys]
        for k in valleys:
            bounds = float(grid[max(k - 1, 0)]), float(grid[min(k + 1, len(grid) - 1)])
            found = minimize_scalar(
                lambda floor: line(float(floor))[0],
                bounds=bounds,
                method="bounded",
                options={"xatol": 1e-6 * (lowest - bounds[0])},
            )
            candidates.append(float(found.x))
        irreducible = min(candidates, key=lambda floor: line(float(floor))[0])
    elif not 0.0 <= irreducible < lowest:
        raise ValueError(f"irreducible must be in [0, {lowest:g}), got {irreducible}")
    _, start, slope = line(irreducible)
    return PowerLaw(float(irreducible), math.exp(start), -slope)


def power_law_crossover(
    law_a: Callable[[float], ArrayLike],
    law_b: Callable[[float], ArrayLike],
    lower: float,
    upper: float,
) -> float | None:
    r"""The scale between two bounds at which two laws agree.

    The root of :math:`L_A(s) - L_B(s)` in :math:`\log s`. With :math:`E = 0` it is
    :math:`(A_A / A_B)^{1/(\alpha_A - \alpha_B)}`.

    Args:
        law_a: losses from scales, such as a :class:`PowerLaw`.
        law_b: the other law.
        lower: positive.
        upper: larger than ``lower``.

    Returns:
        The root, or None where the difference has the same sign at both bounds.

    Raises:
        ValueError: bounds that are not positive, finite and in order.

    Source: ours.

    Example:
        >>> round(power_law_crossover(PowerLaw(0, 4, 1), PowerLaw(0, 1, 0.5), 1, 100), 6)
        16.0
    """
    if not 0.0 < lower < upper < math.inf:
        raise ValueError(f"bounds must be 0 < lower < upper, got {lower} and {upper}")

    def gap(place: float) -> float:
        return float(np.asarray(law_a(math.exp(place)))) - float(np.asarray(law_b(math.exp(place))))

    low, high = math.log(lower), math.log(upper)
    if gap(low) == 0.0 or gap(high) == 0.0:
        return lower if gap(low) == 0.0 else upper
    if gap(low) * gap(high) > 0.0:
        return None
    from scipy.optimize import brentq

    return math.exp(float(brentq(gap, low, high, xtol=1e-13)))


def regularization_gain(strengths: ArrayLike, losses: ArrayLike) -> float:
    r"""The share of the unregularized loss that the best strength saves.

    :math:`(L_0 - \min L) / L_0`.

    Args:
        strengths: at least 0, with exactly one 0 among them, shape (m,).
        losses: one for each strength, positive, shape (m,).

    Returns:
        The gain, in [0, 1).

    Raises:
        ValueError: no strength 0, a negative one, unequal lengths, a loss that is no number.

    Source: ours.

    Example:
        >>> regularization_gain([0.0, 0.1, 1.0], [4.0, 3.0, 5.0])
        0.25
    """
    doses = np.asarray(strengths, np.float64)
    curve = _curve("losses", losses, least=1)
    if doses.shape != curve.shape:
        raise ValueError(f"strengths must have shape {curve.shape} like losses, got {doses.shape}")
    if not (doses >= 0).all() or (doses == 0).sum() != 1:
        raise ValueError("strengths must be at least 0, with exactly one 0 among them")
    base = float(curve[doses == 0][0])
    return (base - float(curve.min())) / base


def tuned_gain(strengths: Sequence[float], valid: Tensor, test: Tensor) -> list[float]:
    """The gain of a regularizer when strength and rate are chosen on other data.

    For each strength the rate with the lowest mean validation loss is taken, then the strength
    with the lowest of these; the gain is that of the chosen strength over 0 on the test data.

    Args:
        strengths: at least 0, with exactly one 0 among them, length m.
        valid: losses to choose by, (seeds, m, rates).
        test: losses to report, of the same shape.

    Returns:
        The gain of each seed; 0 where the chosen strength is 0 or does worse.

    Raises:
        ValueError: shapes that do not match, or bad strengths or losses.

    Source: ours.

    Example:
        >>> losses = torch.tensor([[[4.0, 8.0], [3.0, 2.0]]])
        >>> tuned_gain([0.0, 0.1], losses, losses)
        [0.5]
    """
    if valid.shape != test.shape or valid.ndim != 3 or valid.shape[1] != len(strengths):
        raise ValueError(
            f"valid and test must have shape (seeds, {len(strengths)}, rates), "
            f"got {tuple(valid.shape)} and {tuple(test.shape)}"
        )
    best, rate = valid.mean(0).min(1)
    found = test.gather(2, rate[None, :, None].expand(len(test), -1, 1))[..., 0]
    strength = float(strengths[int(best.argmin())])
    keep = [i for i, s in enumerate(strengths) if s in (0.0, strength)]
    doses = [strengths[i] for i in keep]
    return [regularization_gain(doses, row[keep].tolist()) for row in found.cpu()]
