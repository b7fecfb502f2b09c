"""The risk of linear predictors in the limit, and the bag size that privacy asks for."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.methods.noisy_labels.aggregate_responses.losses import _check_rho

__all__ = [
    "RiskResult",
    "asymptotic_risk",
    "optimal_bag_size",
    "private_noise_var",
    "privatize_bag_means",
]


@dataclass(frozen=True)
class RiskResult:
    """Limit of the risk :math:`E\\|\\hat\\theta-\\theta_0\\|^2`; ``risk = bias + variance``.

    Attributes:
        risk: the whole, excess prediction error for a fresh standard normal input.
        bias: the (squared) part that stays without noise.
        variance: the part proportional to the noise variance.
    """

    risk: float
    bias: float
    variance: float


def _fixed_point(gamma: float, a: float, rho: float) -> float:
    """The delta > 0 with ``delta kappa(delta) = gamma``; the left side rises from 0 to 1."""

    def side(delta: float) -> float:
        return delta * (a / (1 + delta) + (1 - a) * rho / (1 + rho * delta))

    low, high = 0.0, 1.0
    while side(high) < gamma:
        low, high = high, 2 * high
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if side(middle) < gamma else (low, middle)
    return (low + high) / 2


def asymptotic_risk(
    gamma: float, bag_size: int, rho: float, noise_var: float, signal: float = 1.0
) -> RiskResult:
    r"""Risk of :func:`fit_interpolating` for standard normal features as :math:`n, d \to \infty`.

    Let :math:`a = 1/k`, :math:`q = 1-a` and let :math:`\delta` solve
    :math:`\delta\kappa = \gamma` with
    :math:`\kappa = \frac{a}{1+\delta} + \frac{q\rho}{1+\rho\delta}`. Then, with
    :math:`\alpha = \frac{a}{(1+\delta)\kappa}`, :math:`g = \delta^2/\gamma`,
    :math:`c_1 = \frac{a}{(1+\delta)^2}` and :math:`c_2 = \frac{q\rho^2}{(1+\rho\delta)^2}`,

    .. math:: R = (1-\alpha)^2 r^2 + \frac{g\,[c_1(\sigma^2 + (1-\alpha)^2 r^2)
              + c_2 \alpha^2 r^2]}{1 - g(c_1 + c_2)} .

    For :math:`\rho = 0` this is :math:`\sigma^2 \frac{\gamma k}{1 - \gamma k}`, and
    :math:`r^2 (1 - \frac1{\gamma k}) + \frac{\sigma^2}{\gamma k - 1}` beyond :math:`\gamma k = 1`.

    Args:
        gamma: :math:`d/n > 0`; below 1 for ``rho > 0``.
        bag_size: rows in a bag :math:`k \ge 1`.
        rho: 0 is the bag loss, 1 the instance loss.
        noise_var: variance :math:`\sigma^2 \ge 0` of a single response.
        signal: :math:`r^2 \ge 0`.

    Returns:
        A :class:`RiskResult` of floats.

    Raises:
        ValueError: an argument out of range, or ``gamma * bag_size == 1`` with ``rho == 0``.

    Source: Theorem 2.5 and its corollary for the two ends; this form is derived here.

    Example:
        >>> [round(asymptotic_risk(0.25, 2, rho, 1.0).risk, 6) for rho in (0.0, 1.0)]
        [1.0, 0.5]
    """
    if bag_size < 1:
        raise ValueError(f"bag_size must be at least 1, got {bag_size}")
    _check_rho(rho)
    if not 0.0 < gamma < math.inf:
        raise ValueError(f"gamma must be positive and finite, got {gamma}")
    if min(noise_var, signal) < 0.0:
        raise ValueError(f"noise_var and signal must be at least 0, got {noise_var} and {signal}")
    if rho == 0.0:
        return _bag_risk(gamma * bag_size, noise_var, signal)
    if gamma >= 1.0:
        raise ValueError(f"gamma must be below 1 for rho > 0, got {gamma}")
    a = 1 / bag_size
    delta = _fixed_point(gamma, a, rho)
    alpha = a * delta / ((1 + delta) * gamma)
    bag, spread = a / (1 + delta) ** 2, (1 - a) * (rho / (1 + rho * delta)) ** 2
    gain = delta**2 / gamma
    gain /= 1 - gain * (bag + spread)
    shrunk = (1 - alpha) ** 2 * signal
    bias = shrunk + gain * (bag * shrunk + spread * alpha**2 * signal)
    variance = gain * bag * noise_var
    return RiskResult(bias + variance, bias, variance)


def _bag_risk(load: float, noise_var: float, signal: float) -> RiskResult:
    """The end rho = 0, where ``load = gamma k`` is the number of features a bag."""
    if math.isclose(load, 1.0, rel_tol=1e-12):
        raise ValueError("gamma * bag_size must differ from 1 for rho = 0: the risk is infinite")
    bias = max(0.0, signal * (1 - 1 / load))
    variance = noise_var * (load / (1 - load) if load < 1 else 1 / (load - 1))
    return RiskResult(bias + variance, bias, variance)


def _noise_scale(bag_size: int, bound: float, epsilon: float) -> float:
    if bag_size < 1:
        raise ValueError(f"bag_size must be at least 1, got {bag_size}")
    if not (0.0 < bound < math.inf and 0.0 < epsilon < math.inf):
        raise ValueError(
            f"bound and epsilon must be positive and finite, got {bound} and {epsilon}"
        )
    return 2 * bound / (bag_size * epsilon)


def privatize_bag_means(
    bag_y: Tensor,
    bag_size: int,
    bound: float,
    epsilon: float,
    generator: torch.Generator | None = None,
) -> Tensor:
    r"""Add Laplace noise of scale :math:`b = \frac{2C}{k\varepsilon}` to each bag mean.

    Changing one response in :math:`[-C, C]` moves one mean by at most :math:`2C/k`, and a Laplace
    density changes by at most the factor :math:`e^{(2C/k)/b} = e^\varepsilon`: the released means
    are :math:`\varepsilon`-label differentially private. Clip the responses *before* they are
    averaged. For study; floating-point noise is not a hardened release.

    Args:
        bag_y: bag means of responses in ``[-bound, bound]``, any shape.
        bag_size: responses in a bag :math:`k \ge 1`.
        bound: largest absolute response :math:`C > 0`.
        epsilon: privacy budget :math:`\varepsilon > 0`; smaller is stricter.
        generator: source of the noise; a CPU generator gives the same noise on every device.

    Returns:
        Noisy means, shape and dtype of ``bag_y``.

    Raises:
        ValueError: ``bag_size``, ``bound`` or ``epsilon`` out of range.

    Source: Section 3 (the private mechanism); see the package's departures for the scale.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> noisy = privatize_bag_means(torch.zeros(100_000), 4, 1.0, 0.5, g)
        >>> round(noisy.abs().mean().item(), 1)  # the scale 2 / (4 * 0.5) = 1
        1.0
    """
    scale = _noise_scale(bag_size, bound, epsilon)
    device = bag_y.device if generator is None else generator.device
    # The difference of two exponentials is Laplace, and neither is ever infinite.
    draw = torch.empty((2, *bag_y.shape), dtype=bag_y.dtype, device=device)
    draw.exponential_(generator=generator)
    return bag_y + scale * (draw[0] - draw[1]).to(bag_y.device)


def private_noise_var(noise_var: float, bag_size: int, bound: float, epsilon: float) -> float:
    r"""Noise of a single response that would do the same harm as both noises together.

    A bag mean carries noise of variance :math:`\sigma^2/k + 2b^2`. This is :math:`k` times that,
    :math:`\sigma^2 + 8C^2/(k\varepsilon^2)`.

    Args:
        noise_var: variance :math:`\sigma^2 \ge 0` of a single response.
        bag_size: responses in a bag :math:`k \ge 1`.
        bound: largest absolute response :math:`C > 0`.
        epsilon: privacy budget :math:`\varepsilon > 0`.

    Returns:
        The variance to give to :func:`asymptotic_risk`.

    Raises:
        ValueError: an argument out of range.

    Source: Section 3 (risk of the private estimator).

    Example:
        >>> private_noise_var(1.0, 2, 1.0, 2.0)
        2.0
    """
    if noise_var < 0.0:
        raise ValueError(f"noise_var must be at least 0, got {noise_var}")
    return noise_var + 2 * bag_size * _noise_scale(bag_size, bound, epsilon) ** 2


def optimal_bag_size(
    gamma: float,
    epsilon: float,
    *,
    bound: float,
    rho: float = 1.0,
    noise_var: float = 1.0,
    signal: float = 1.0,
    bag_sizes: Iterable[int] = range(1, 41),
) -> int:
    r"""Bag size of least asymptotic risk when the means are private.

    Args:
        gamma: :math:`d/n > 0`; below 1 for ``rho > 0``.
        epsilon: privacy budget :math:`\varepsilon > 0`.
        bound: largest absolute response :math:`C > 0`; clipping itself is left out of the risk.
        rho: 0 is the bag loss, 1 the instance loss.
        noise_var: variance :math:`\sigma^2 \ge 0` of a single response.
        signal: :math:`r^2 \ge 0`.
        bag_sizes: the sizes to choose from; a size with infinite risk is passed over.

    Returns:
        The best size; the smallest of several.

    Raises:
        ValueError: an argument out of range.

    Source: Section 3 (optimal bag size).

    Example:
        >>> [optimal_bag_size(0.02, epsilon, bound=3.0) for epsilon in (0.5, 1.0, 2.0, 5.0)]
        [7, 3, 2, 1]
    """
    finite = [k for k in bag_sizes if rho > 0.0 or not math.isclose(gamma * k, 1.0, rel_tol=1e-12)]
    if not finite:
        raise ValueError("bag_sizes must hold a size with finite risk")

    def risk(k: int) -> float:
        noise = private_noise_var(noise_var, k, bound, epsilon)
        return asymptotic_risk(gamma, k, rho, noise, signal).risk

    return min(finite, key=risk)
