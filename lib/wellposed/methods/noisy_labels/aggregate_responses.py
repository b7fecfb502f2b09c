r"""Learning when only the mean response of each bag of examples is known.

A. Javanmard, L. Chen, V. Mirrokni, A. Badanidiyuru, G. Fu, "Learning from Aggregate responses:
Instance Level versus Bag Level Loss Functions", ICLR 2024, arXiv:2401.11081.

Claim: fitting every prediction to its bag's mean (instance loss) is fitting the bag's mean
prediction to it (bag loss) plus a penalty on the spread of predictions inside a bag,

.. math::

    L_\rho = (1-\rho) L_{bag} + \rho L_{ins} = \frac1m \sum_a (\bar y_a - \bar f_a)^2
        + \frac{\rho}{n} \sum_a \sum_{i \in B_a} (f_i - \bar f_a)^2 ,

so :math:`\rho` trades variance for bias, and for linear models the trade is known exactly.

Glossary: :math:`n` examples in :math:`m` bags of :math:`k` (``bag_size``), contiguous blocks of
rows; :math:`d` features, :math:`\gamma = d/n`; noise variance :math:`\sigma^2` (``noise_var``),
:math:`r^2 = \|\theta_0\|^2` (``signal``).

Departures from the paper: the risk is written as our own derivation gives it, in another form than
the paper's fixed-point system; the Laplace noise has the scale that the sensitivity :math:`2C/k`
of a bag mean asks for; responses are clipped at a fixed bound, where the paper lets the bound grow
slowly with n. Added for comparison: a ridge penalty, leave-one-bag-out errors, sorted bags.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.train import StackedAdam

__all__ = [
    "BaggedSplits",
    "NetworkRun",
    "RiskResult",
    "asymptotic_risk",
    "bag_loss",
    "bag_means",
    "bagged_splits",
    "fit_interpolating",
    "instance_loss",
    "interpolating_loss",
    "leave_one_bag_out",
    "optimal_bag_size",
    "private_noise_var",
    "privatize_bag_means",
    "simulate_private_risk",
    "simulate_risk",
    "train_network",
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


@dataclass(frozen=True)
class BaggedSplits:
    """Random splits of one data set, standardized on their training rows and stacked.

    Attributes:
        x: training inputs, shape ``(splits, n, d)``; bags are contiguous rows.
        y: training responses ``(splits, n)``, in units of their standard deviation; hidden from
            the learner.
        bag_y: their bag means, shape ``(splits, m)``: what the learner sees.
        x_test, y_test: test inputs ``(splits, t, d)`` and responses ``(splits, t)``.
    """

    x: Tensor
    y: Tensor
    bag_y: Tensor
    x_test: Tensor
    y_test: Tensor

    def test_error(self, theta: Tensor) -> Tensor:
        """Mean squared test error of linear predictors ``(splits, d)``, shape ``(splits,)``."""
        predicted = (self.x_test @ theta.unsqueeze(-1)).squeeze(-1)
        return (predicted - self.y_test).square().mean(-1)


@dataclass(frozen=True)
class NetworkRun:
    """Networks trained side by side; fields have shape ``(splits, len(rhos))``.

    Attributes:
        test_error: mean squared test error at the step with the least validation error.
        val_error: bag loss of the held-out bags at that step.
        step: that step.
    """

    test_error: Tensor
    val_error: Tensor
    step: Tensor


# --- losses ----------------------------------------------------------------------------------


def _check_bag_size(n: int, bag_size: int) -> None:
    if bag_size < 1:
        raise ValueError(f"bag_size must be at least 1, got {bag_size}")
    if n < 1 or n % bag_size:
        raise ValueError(f"the number of rows must be a positive multiple of {bag_size}, got {n}")


def _check_rho(rho: float) -> None:
    if not 0.0 <= rho <= 1.0:
        raise ValueError(f"rho must lie in [0, 1], got {rho}")


def _in_bags(pred: Tensor, bag_y: Tensor, bag_size: int) -> Tensor:
    """Predictions as ``(..., m, k)``, after a check of both shapes."""
    _check_bag_size(pred.shape[-1] if pred.ndim else 0, bag_size)
    bags = pred.shape[-1] // bag_size
    if bag_y.ndim == 0 or bag_y.shape[-1] != bags:
        raise ValueError(f"bag_y must hold {bags} bag means, got shape {tuple(bag_y.shape)}")
    inside: Tensor = pred.unflatten(-1, (bags, bag_size))
    return inside


def bag_means(y: Tensor, bag_size: int) -> Tensor:
    r"""Mean of each bag: :math:`\bar y_a = \frac1k \sum_{i \in B_a} y_i`.

    Args:
        y: responses ``(n,)`` or features ``(..., n, d)``, whose rows are averaged.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.

    Returns:
        Shape ``(m,)`` or ``(..., m, d)`` with ``m = n / k``.

    Raises:
        ValueError: ``bag_size`` below 1 or no divisor of ``n``.

    Source: Section 2.

    Example:
        >>> bag_means(torch.tensor([1.0, 3.0, 5.0, 9.0]), 2).tolist()
        [2.0, 7.0]
    """
    axis = -1 if y.ndim < 2 else -2
    _check_bag_size(y.shape[axis] if y.ndim else 0, bag_size)
    means: Tensor = y.unflatten(axis, (-1, bag_size)).mean(axis)
    return means


def bag_loss(pred: Tensor, bag_y: Tensor, bag_size: int) -> Tensor:
    r"""Squared error of mean predictions, :math:`\frac1m \sum_a (\bar y_a - \bar f_a)^2`.

    Args:
        pred: predictions :math:`f`, shape ``(..., n)``.
        bag_y: bag means of the responses, shape ``(..., m)``.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.

    Returns:
        Scalar, or shape ``(...)`` for predictions with leading axes.

    Raises:
        ValueError: ``bag_size`` or shapes that do not fit.

    Source: Section 2, equation (1).

    Example:
        >>> bag_loss(torch.tensor([0.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 3.0]), 2).item()
        2.0
    """
    return (_in_bags(pred, bag_y, bag_size).mean(-1) - bag_y).square().mean(-1)


def instance_loss(pred: Tensor, bag_y: Tensor, bag_size: int) -> Tensor:
    r"""Squared error of each prediction against its bag's mean.

    .. math:: L_{ins} = \frac1n \sum_a \sum_{i \in B_a} (\bar y_a - f_i)^2

    Args:
        pred: predictions :math:`f`, shape ``(..., n)``.
        bag_y: bag means of the responses, shape ``(..., m)``.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.

    Returns:
        Scalar, or shape ``(...)``; never below :func:`bag_loss`.

    Raises:
        ValueError: ``bag_size`` or shapes that do not fit.

    Source: Section 2, equation (2).

    Example:
        >>> instance_loss(torch.tensor([0.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 3.0]), 2).item()
        2.5
    """
    return (_in_bags(pred, bag_y, bag_size) - bag_y.unsqueeze(-1)).square().mean((-2, -1))


def interpolating_loss(pred: Tensor, bag_y: Tensor, bag_size: int, rho: float) -> Tensor:
    r"""Mixture of both losses, :math:`L_\rho = (1-\rho) L_{bag} + \rho L_{ins}`.

    It is computed as bag loss plus :math:`\rho` times the spread inside the bags.

    Args:
        pred: predictions :math:`f`, shape ``(..., n)``.
        bag_y: bag means of the responses, shape ``(..., m)``.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.
        rho: 0 is the bag loss, 1 the instance loss.

    Returns:
        Scalar, or shape ``(...)``.

    Raises:
        ValueError: ``rho`` outside [0, 1], ``bag_size`` or shapes that do not fit.

    Source: Section 2 (the interpolating estimator).

    Example:
        >>> pred, bag_y = torch.tensor([0.0, 2.0, 1.0, 1.0]), torch.tensor([1.0, 3.0])
        >>> interpolating_loss(pred, bag_y, 2, 0.5).item()
        2.25
    """
    _check_rho(rho)
    bags = _in_bags(pred, bag_y, bag_size)
    means = bags.mean(-1)
    spread = (bags - means.unsqueeze(-1)).square().mean((-2, -1))
    return (means - bag_y).square().mean(-1) + rho * spread


# --- linear regression -----------------------------------------------------------------------


def _system(X: Tensor, bag_size: int, rho: float, ridge: float) -> tuple[Tensor, Tensor]:
    """Bag means U and the matrix ``U'U/m + rho V'V/n + ridge I`` of the normal equations."""
    if X.ndim < 2:
        raise ValueError(f"X must have shape (..., n, d), got {tuple(X.shape)}")
    _check_rho(rho)
    if not 0.0 <= ridge < math.inf:
        raise ValueError(f"ridge must be finite and at least 0, got {ridge}")
    U = bag_means(X, bag_size)
    V = X - U.repeat_interleave(bag_size, dim=-2)
    eye = torch.eye(X.shape[-1], dtype=X.dtype, device=X.device)
    return U, U.mT @ U / U.shape[-2] + rho * (V.mT @ V) / X.shape[-2] + ridge * eye


def _check_bag_y(U: Tensor, bag_y: Tensor) -> None:
    if bag_y.ndim == 0 or bag_y.shape[-1] != U.shape[-2]:
        raise ValueError(f"bag_y must hold {U.shape[-2]} bag means, got {tuple(bag_y.shape)}")


def fit_interpolating(
    X: Tensor, bag_y: Tensor, bag_size: int, rho: float, *, ridge: float = 0.0
) -> Tensor:
    r"""Linear predictor of least :math:`L_\rho`, of least norm if there are several.

    .. math:: \hat\theta = \Bigl(\tfrac1m U^\top U + \tfrac\rho n V^\top V + \lambda I\Bigr)^{+}
              \tfrac1m U^\top \bar y

    with the bag means :math:`U` of the features and the rows :math:`V` minus their bag mean.
    There is no intercept: center features and responses first.

    Args:
        X: features, shape ``(..., n, d)``; float64 recommended.
        bag_y: bag means of the responses, shape ``(..., m)``; leading axes broadcast.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.
        rho: 0 is the bag loss, 1 the instance loss.
        ridge: strength :math:`\lambda \ge 0` of a ridge penalty; 0 in the paper.

    Returns:
        Coefficients, shape ``(..., d)``.

    Raises:
        ValueError: ``rho`` or ``ridge`` out of range, ``bag_size`` or shapes that do not fit.

    Source: Section 2.1.

    Example:
        >>> X = torch.tensor([[1.0], [1.0], [2.0], [0.0]], dtype=torch.float64)
        >>> bag_y = torch.tensor([2.0, 4.0], dtype=torch.float64)
        >>> [round(fit_interpolating(X, bag_y, 2, rho).item(), 6) for rho in (0.0, 1.0)]
        [3.0, 2.0]
    """
    U, matrix = _system(X, bag_size, rho, ridge)
    _check_bag_y(U, bag_y)
    moment = U.mT @ bag_y.unsqueeze(-1) / U.shape[-2]
    theta: Tensor = (torch.linalg.pinv(matrix, hermitian=True) @ moment).squeeze(-1)
    return theta


def leave_one_bag_out(
    X: Tensor, bag_y: Tensor, bag_size: int, rho: float, *, ridge: float = 0.0
) -> Tensor:
    r"""Mean squared error on bags left out one by one, without refitting.

    With the diagonal :math:`h_a` of the hat matrix, the error on bag :math:`a` of the fit that
    does not see :math:`\bar y_a` is :math:`(\bar y_a - \bar f_a) / (1 - h_a)`. The features of the
    left-out bag stay in the penalty: they are known. It needs no single response, so a learner who
    sees bags alone can choose ``rho`` or ``ridge`` with it.

    Args:
        X: features, shape ``(..., n, d)``.
        bag_y: bag means of the responses, shape ``(..., m)``; leading axes broadcast.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``n``.
        rho: 0 is the bag loss, 1 the instance loss.
        ridge: strength :math:`\lambda \ge 0` of a ridge penalty.

    Returns:
        Shape ``(...)``; infinite where the fit passes through a bag whatever its response.

    Raises:
        ValueError: ``rho`` or ``ridge`` out of range, ``bag_size`` or shapes that do not fit.

    Source: not in the paper; the classical PRESS statistic, applied to bags.

    Example:
        >>> X, bag_y = torch.ones(4, 1), torch.tensor([0.0, 2.0])
        >>> leave_one_bag_out(X, bag_y, 2, 0.0).item()
        4.0
    """
    U, matrix = _system(X, bag_size, rho, ridge)
    _check_bag_y(U, bag_y)
    projected: Tensor = U @ torch.linalg.pinv(matrix, hermitian=True)
    leverage = (projected * U).sum(-1) / U.shape[-2]
    fitted = (projected @ (U.mT @ bag_y.unsqueeze(-1))).squeeze(-1) / U.shape[-2]
    error = ((bag_y - fitted) / (1 - leverage)).square()
    exact = 1 - leverage < torch.finfo(X.dtype).eps ** 0.5
    return error.masked_fill(exact, torch.inf).mean(-1)


# --- asymptotic risk -------------------------------------------------------------------------


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


# --- privacy ---------------------------------------------------------------------------------


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

    Source: Section 3 (the private mechanism); see the module's departures for the scale.

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


# --- experiments -----------------------------------------------------------------------------


def _gaussian_data(
    draws: int,
    n: int,
    dim: int,
    signal: float,
    generator: torch.Generator,
    dtype: torch.dtype,
    device: torch.device | str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Features ``(draws, n, dim)``, coefficients of norm ``sqrt(signal)``, unit noise."""
    if min(draws, n, dim) < 1:
        raise ValueError(f"draws, n and dim must be at least 1, got {draws}, {n} and {dim}")
    if signal <= 0.0:
        raise ValueError(f"signal must be positive, got {signal}")
    # Drawn where the generator lives: a CPU generator gives the same data on every device.
    X, theta, noise = (
        torch.randn(shape, generator=generator, dtype=dtype, device=generator.device).to(device)
        for shape in ((draws, n, dim), (draws, dim), (draws, n))
    )
    return X, theta * (signal**0.5 / theta.norm(dim=-1, keepdim=True)), noise


def _sorted_along(X: Tensor, theta: Tensor, cosine: float, generator: torch.Generator) -> Tensor:
    """Rows of X in order of ``X s``, with a random direction s at that cosine to theta."""
    if not -1.0 <= cosine <= 1.0:
        raise ValueError(f"sort_cosine must lie in [-1, 1], got {cosine}")
    unit = theta / theta.norm(dim=-1, keepdim=True)
    other = torch.randn(theta.shape, generator=generator, dtype=X.dtype, device=generator.device)
    other = other.to(X.device)
    other = other - (other * unit).sum(-1, keepdim=True) * unit
    other = other / other.norm(dim=-1, keepdim=True)
    along = cosine * unit + (1 - cosine**2) ** 0.5 * other
    order = (X @ along.unsqueeze(-1)).argsort(dim=-2)
    return X.take_along_dim(order, dim=-2)


def simulate_risk(
    n: int,
    dim: int,
    bag_size: int,
    *,
    rhos: Sequence[float],
    noise_vars: Sequence[float],
    draws: int,
    generator: torch.Generator,
    signal: float = 1.0,
    sort_cosine: float | None = None,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Risk :math:`\|\hat\theta - \theta_0\|^2` on fresh Gaussian data sets.

    All noise levels and all ``rhos`` see the same features, coefficients and standardized noise.

    Args:
        n, dim: rows and features; ``bag_size`` divides ``n``.
        bag_size: rows in a bag :math:`k \ge 1`.
        rhos: values of :math:`\rho`, in [0, 1].
        noise_vars: noise variances :math:`\sigma^2 \ge 0`.
        draws: number of data sets, at least 1.
        generator: source of the data.
        signal: :math:`r^2 > 0`; the direction of :math:`\theta_0` is random.
        sort_cosine: None for random bags; else rows are sorted along a direction with this cosine
            to :math:`\theta_0` before they are cut into bags.
        dtype: of the data.
        device: where to compute.

    Returns:
        Shape ``(draws, len(noise_vars), len(rhos))``.

    Raises:
        ValueError: an argument out of range.

    Source: Section 4 (verification of the theory on synthetic data).

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> risk = simulate_risk(8, 2, 1, rhos=[0.0], noise_vars=[0.0], draws=3, generator=g)
        >>> tuple(risk.shape), bool(risk.max() < 1e-20)
        ((3, 1, 1), True)
    """
    if min(noise_vars) < 0.0:
        raise ValueError(f"noise_vars must be at least 0, got {list(noise_vars)}")
    X, theta, noise = _gaussian_data(draws, n, dim, signal, generator, dtype, device)
    if sort_cosine is not None:
        X = _sorted_along(X, theta, sort_cosine, generator)
    clean = (X @ theta.unsqueeze(-1)).squeeze(-1)
    levels = torch.tensor(noise_vars, dtype=dtype, device=device).sqrt()
    y = clean + levels[:, None, None] * noise
    bag_y = y.unflatten(-1, (-1, bag_size)).mean(-1)
    fits = [fit_interpolating(X, bag_y, bag_size, rho) for rho in rhos]
    return torch.stack([(fit - theta).square().sum(-1) for fit in fits], dim=-1).transpose(0, 1)


def simulate_private_risk(
    n: int,
    dim: int,
    bag_sizes: Sequence[int],
    *,
    epsilons: Sequence[float],
    bound: float,
    draws: int,
    generator: torch.Generator,
    rho: float = 1.0,
    ridges: Sequence[float] = (0.0,),
    noise_var: float = 1.0,
    signal: float = 1.0,
    dtype: torch.dtype = torch.float64,
    device: torch.device | str = "cpu",
) -> Tensor:
    r"""Risk on Gaussian data whose responses are clipped, averaged and made private.

    Args:
        n, dim: rows and features; every bag size divides ``n``.
        bag_sizes: values of :math:`k \ge 1`; all see the same data.
        epsilons: privacy budgets :math:`\varepsilon > 0`.
        bound: responses are clipped to ``[-bound, bound]``.
        draws: number of data sets, at least 1.
        generator: source of data and privacy noise.
        rho: 0 is the bag loss, 1 the instance loss.
        ridges: ridge strengths; of several, each fit takes the one with the least
            :func:`leave_one_bag_out` error on the private means.
        noise_var: variance :math:`\sigma^2 \ge 0` of a single response.
        signal: :math:`r^2 > 0`.
        dtype: of the data.
        device: where to compute.

    Returns:
        Shape ``(draws, len(bag_sizes), len(epsilons))``.

    Raises:
        ValueError: an argument out of range.

    Source: Section 3 (the private mechanism); the paper has no such simulation.

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> lenient = {"epsilons": [1e9], "bound": 1e3, "noise_var": 0.0, "rho": 0.0}
        >>> risk = simulate_private_risk(8, 2, [1, 2], draws=3, generator=g, **lenient)
        >>> tuple(risk.shape), bool(risk.max() < 1e-8)
        ((3, 2, 1), True)
    """
    if noise_var < 0.0:
        raise ValueError(f"noise_var must be at least 0, got {noise_var}")
    X, theta, noise = _gaussian_data(draws, n, dim, signal, generator, dtype, device)
    y = (X @ theta.unsqueeze(-1)).squeeze(-1) + noise_var**0.5 * noise
    risks = []
    for bag_size in bag_sizes:
        means = bag_means(y.clamp(-bound, bound).unsqueeze(-1), bag_size).squeeze(-1)
        noisy = [privatize_bag_means(means, bag_size, bound, e, generator) for e in epsilons]
        bag_y = torch.stack(noisy)
        fits = torch.stack([fit_interpolating(X, bag_y, bag_size, rho, ridge=r) for r in ridges])
        if len(ridges) > 1:
            errors = [leave_one_bag_out(X, bag_y, bag_size, rho, ridge=r) for r in ridges]
            best = torch.stack(errors).argmin(0)
            fits = fits.take_along_dim(best[None, ..., None], dim=0)
        risks.append((fits[0] - theta).square().sum(-1))
    return torch.stack(risks).permute(2, 0, 1)


def bagged_splits(
    x: Tensor,
    y: Tensor,
    bag_size: int,
    *,
    num_train: int,
    splits: int,
    generator: torch.Generator,
    sort_by: int | None = None,
) -> BaggedSplits:
    r"""Cut a data set into training and test rows many times, and the training rows into bags.

    Features are standardized on the training rows. Responses are centered by the training mean,
    which bag means reveal; their standard deviation only sets the unit of the errors. What is
    constant on the training rows is centered alone.

    Args:
        x: features, shape ``(n, d)``.
        y: responses, shape ``(n,)``.
        bag_size: rows in a bag :math:`k \ge 1`; it divides ``num_train``.
        num_train: training rows, less than ``n``; the others are for the test.
        splits: number of random splits, at least 1.
        generator: source of splits and bags; a CPU generator gives the same on every device.
        sort_by: None for random bags; else the feature by which training rows are sorted first.

    Returns:
        :class:`BaggedSplits`, in the dtype of ``x``.

    Raises:
        ValueError: shapes or sizes that do not fit.

    Source: Section 4 (experiment on real data).

    Example:
        >>> x, y = torch.arange(6.0)[:, None], torch.arange(6.0)
        >>> task = bagged_splits(
        ...     x, y, 2, num_train=4, splits=3, generator=torch.Generator().manual_seed(0)
        ... )
        >>> tuple(task.x.shape), tuple(task.bag_y.shape), tuple(task.y_test.shape)
        ((3, 4, 1), (3, 2), (3, 2))
    """
    if x.ndim != 2 or y.shape != x.shape[:1]:
        raise ValueError(f"x (n, d) and y (n,), got {tuple(x.shape)} and {tuple(y.shape)}")
    if not 1 < num_train < len(y) or splits < 1:
        raise ValueError(
            f"num_train must lie in 2..{len(y) - 1} and splits be at least 1, "
            f"got {num_train} and {splits}"
        )
    _check_bag_size(num_train, bag_size)
    uniform = torch.rand(splits, len(y), generator=generator, device=generator.device)
    train, test = uniform.argsort(1).to(x.device).tensor_split([num_train], dim=1)
    if sort_by is not None:
        train = train.gather(1, x[:, sort_by][train].argsort(1))
    x_train, y_train = x[train], y[train].to(x.dtype)
    x_mean, x_std = x_train.mean(1, keepdim=True), x_train.std(1, keepdim=True, correction=0)
    y_mean, y_std = y_train.mean(1, keepdim=True), y_train.std(1, keepdim=True, correction=0)
    x_std, y_std = (torch.where(std > 0, std, 1.0) for std in (x_std, y_std))
    standard = (y_train - y_mean) / y_std
    return BaggedSplits(
        x=(x_train - x_mean) / x_std,
        y=standard,
        bag_y=bag_means(standard.unsqueeze(-1), bag_size).squeeze(-1),
        x_test=(x[test] - x_mean) / x_std,
        y_test=(y[test].to(x.dtype) - y_mean) / y_std,
    )


def _initial_layers(x: Tensor, copies: int, width: int, generator: torch.Generator) -> list[Tensor]:
    """Weights and biases of two layers, ``(splits, copies, rows, columns)``; copies are equal."""
    splits, dim = x.shape[0], x.shape[-1]
    layers = []
    for rows, columns, gain in ((dim, width, 2.0), (width, 1, 1.0)):
        drawn = torch.randn(splits, 1, rows, columns, generator=generator, device=generator.device)
        layers.append((drawn * (gain / rows) ** 0.5).to(x).repeat(1, copies, 1, 1))
        layers.append(x.new_zeros(splits, copies, 1, columns))
    return [layer.requires_grad_() for layer in layers]


def train_network(
    task: BaggedSplits,
    bag_size: int,
    rhos: Sequence[float],
    *,
    generator: torch.Generator,
    width: int = 32,
    steps: int = 200,
    lr: float = 0.01,
    val_share: float = 0.2,
    check_every: int = 5,
) -> NetworkRun:
    r"""Train one hidden layer on :math:`L_\rho`, all splits and all ``rhos`` side by side.

    Full-batch Adam, stopped early: the last bags are held out, and of all checks the one with the
    least bag loss on them counts. Networks of one split start from the same weights.

    Args:
        task: splits with bags of ``bag_size``.
        bag_size: rows in a bag :math:`k \ge 1`.
        rhos: values of :math:`\rho`, in [0, 1].
        generator: source of the initial weights.
        width: hidden units, at least 1.
        steps: steps of Adam, at least 1.
        lr: its step size, positive.
        val_share: share of the bags held out, in (0, 1); at least one bag on each side.
        check_every: steps between two checks, at least 1.

    Returns:
        A :class:`NetworkRun`.

    Raises:
        ValueError: an argument out of range, or fewer than two bags.

    Source: Section 4 (a network on real data; the paper uses Boston Housing).

    Example:
        >>> g = torch.Generator().manual_seed(0)
        >>> x, y = torch.randn(30, 2, generator=g), torch.randn(30, generator=g)
        >>> task = bagged_splits(x, y, 2, num_train=20, splits=3, generator=g)
        >>> tuple(train_network(task, 2, [0.0, 1.0], generator=g, steps=5).test_error.shape)
        (3, 2)
    """
    for rho in rhos:
        _check_rho(rho)
    if min(width, steps, check_every) < 1 or lr <= 0.0 or not 0.0 < val_share < 1.0:
        raise ValueError("width, steps, check_every and lr must be positive, val_share in (0, 1)")
    splits, bags = task.bag_y.shape
    held = max(1, round(val_share * bags))
    if held >= bags:
        raise ValueError(f"training needs at least two bags, got {bags}")
    layers = _initial_layers(task.x, len(rhos), width, generator)

    def predict(x: Tensor) -> Tensor:
        hidden = (x.unsqueeze(1) @ layers[0] + layers[1]).relu()
        return (hidden @ layers[2] + layers[3]).squeeze(-1)

    x, x_val = task.x.tensor_split([(bags - held) * bag_size], dim=1)
    bag_y, val_y = task.bag_y.unsqueeze(1).tensor_split([bags - held], dim=2)
    mix = task.x.new_tensor(rhos)
    optimizer = StackedAdam(layers, lr=lr)
    best = task.x.new_full((3, splits, len(rhos)), torch.inf)
    for step in range(steps + 1):
        if step % check_every == 0:
            with torch.no_grad():
                val = bag_loss(predict(x_val), val_y, bag_size)
                test = (predict(task.x_test) - task.y_test.unsqueeze(1)).square().mean(-1)
                now = torch.stack([val, test, torch.full_like(val, step)])
                best = torch.where(val < best[0], now, best)
        pred = predict(x)
        each = bag_loss(pred, bag_y, bag_size) * (1 - mix)
        each = each + mix * instance_loss(pred, bag_y, bag_size)
        each.sum().backward()
        optimizer.step()
    return NetworkRun(test_error=best[1], val_error=best[0], step=best[2])
