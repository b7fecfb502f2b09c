"""Simulations on Gaussian data, and predictors of real responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from wellposed.methods.noisy_labels.aggregate_responses.losses import (
    _check_bag_size,
    _check_rho,
    _fit_each,
    bag_loss,
    bag_means,
    fit_interpolating,
    instance_loss,
    leave_one_bag_out,
)
from wellposed.methods.noisy_labels.aggregate_responses.risk import privatize_bag_means
from wellposed.train import StackedAdam

__all__ = [
    "BaggedSplits",
    "NetworkRun",
    "bagged_splits",
    "simulate_private_risk",
    "simulate_risk",
    "train_network",
]


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
    fits = _fit_each(X, bag_y, bag_size, rhos)
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
