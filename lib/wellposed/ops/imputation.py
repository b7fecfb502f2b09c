"""Series with gaps: filling them, hiding entries, and weighing samples of what might be there."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "cauchy_kernel",
    "check_series",
    "decay_impute",
    "effective_sample_size",
    "last_observed",
    "observation_dropout",
    "predictive_log_prob",
    "supervised_bound",
]


def cauchy_kernel(
    length: int, length_scale: float = 7.0, variance: float = 1.005, jitter: float = 1e-3
) -> Tensor:
    r"""Covariance of the Gaussian process prior over the steps of one latent dimension.

    .. math:: k(t, t') = \frac{v}{1 + (t - t')^2 / \ell^2} + \epsilon\, 1[t = t']

    Args:
        length: steps, at least 1.
        length_scale: :math:`\ell > 0`, in steps.
        variance: :math:`v > 0`.
        jitter: :math:`\epsilon \ge 0`.

    Returns:
        Shape ``(length, length)``, the default float dtype.

    Raises:
        ValueError: an argument out of range.

    Source: authors' code, Cauchy kernel.

    Example:
        >>> cauchy_kernel(2, 1.0, 1.0, 0.0).tolist()
        [[1.0, 0.5], [0.5, 1.0]]
    """
    if length < 1:
        raise ValueError(f"length must be at least 1, got {length}")
    if not (0 < length_scale < math.inf and 0 < variance < math.inf and 0 <= jitter < math.inf):
        raise ValueError(
            f"length_scale and variance must be positive and jitter at least 0, got "
            f"{(length_scale, variance, jitter)}"
        )
    t = torch.arange(length, dtype=torch.get_default_dtype())
    gap = (t - t.unsqueeze(1)) / length_scale
    return variance / (1 + gap.square()) + jitter * torch.eye(length)


def observation_dropout(
    mask: Tensor, rate: float | Tensor, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    r"""Hide observed entries at random: :math:`m \sim \mathrm{Bernoulli}(1 - \beta)` on each.

    Args:
        mask: bool, shape ``(..., steps, features)``, True where observed.
        rate: :math:`\beta` in [0, 1), or a tensor of rates whose shape broadcasts to ``(...)``.
        generator: source of the draws, on the device of ``mask``.

    Returns:
        The observed entries that stay, of the shape of ``mask``; and the log-probability of the
        draw, shape ``(...)``: log(1 - rate) for each entry that stays, log(rate) for each that
        goes.

    Raises:
        ValueError: ``mask`` is not bool or has fewer than two axes, or ``rate`` out of range.

    Source: Section on observation dropout; authors' code.

    Example:
        >>> kept, log_prob = observation_dropout(torch.ones(2, 3, dtype=torch.bool), 0.5)
        >>> round(log_prob.item() / math.log(0.5), 4)
        6.0
    """
    if mask.dtype != torch.bool or mask.ndim < 2:
        raise ValueError(
            f"mask must be bool of shape (..., steps, features), got {mask.dtype} of shape "
            f"{tuple(mask.shape)}"
        )
    if isinstance(rate, Tensor):
        rates = rate.to(device=mask.device)[..., None, None]
    else:
        if not 0.0 <= rate < 1.0:
            raise ValueError(f"rate must be in [0, 1), got {rate}")
        rates = torch.tensor(rate, device=mask.device)[..., None, None]
    draw = torch.rand(mask.shape, generator=generator, device=mask.device, dtype=rates.dtype)
    kept = mask & (draw >= rates)
    gone = mask & ~kept
    # A rate of 0 drops nothing: 0 * log(0) must not turn up as NaN.
    log_drop = torch.where(rates > 0, rates, torch.ones_like(rates)).log()
    log_prob = torch.where(gone, log_drop, torch.where(kept, torch.log1p(-rates), 0.0))
    return kept, log_prob.sum((-2, -1))


def last_observed(x: Tensor, mask: Tensor, times: Tensor) -> tuple[Tensor, Tensor]:
    """Last observed value of each channel, and the time since then.

    Args:
        x: series, shape ``(..., steps, features)``; missing entries may hold anything.
        mask: bool, the same shape, True where observed.
        times: ascending times of the steps, shape ``(steps,)``.

    Returns:
        Values, 0 before the first observation; and times since then, infinite before it. Both
        have the shape of ``x``.

    Raises:
        ValueError: shapes that do not fit.

    Source: the decay of GRU-D (Che et al. 2018).

    Example:
        >>> x, mask = torch.tensor([[5.0], [0.0]]), torch.tensor([[True], [False]])
        >>> value, since = last_observed(x, mask, torch.tensor([0.0, 2.0]))
        >>> value.flatten().tolist(), since.flatten().tolist()
        ([5.0, 5.0], [0.0, 2.0])
    """
    check_series(x, mask)
    if times.shape != x.shape[-2:-1]:
        raise ValueError(f"times must have shape ({x.shape[-2]},), got {tuple(times.shape)}")
    clock = times.to(x.dtype)
    values, since = [], []
    value, gap = torch.zeros_like(x[..., 0, :]), torch.full_like(x[..., 0, :], math.inf)
    for t in range(x.shape[-2]):
        seen = mask[..., t, :]
        value = torch.where(seen, x[..., t, :], value)
        gap = torch.where(seen, 0, gap + (clock[t] - clock[max(t - 1, 0)]))
        values.append(value)
        since.append(gap)
    return torch.stack(values, -2), torch.stack(since, -2)


def decay_impute(
    x: Tensor, generated: Tensor, mask: Tensor, times: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    r"""Fill gaps with a mixture of the last observed value and the generated one.

    .. math:: x_{td} = \gamma x^{last}_{td} + (1 - \gamma) \tilde x_{td}, \qquad
              \gamma = e^{-\max(0,\, w_d \Delta t + b_d)}

    Before the first observation of a channel the generated value stands alone.

    Args:
        x: series, shape ``(..., steps, features)``; missing entries are never read.
        generated: values :math:`\tilde x` of the same shape.
        mask: bool, the same shape, True where observed.
        times: ascending times of the steps, shape ``(steps,)``.
        weight, bias: :math:`w, b`, shape ``(features,)`` or one that broadcasts to that of ``x``.

    Returns:
        Completed series of the shape of ``x``.

    Raises:
        ValueError: shapes that do not fit.

    Source: decay imputation of the authors' code, after GRU-D.

    Example:
        >>> x, mask = torch.tensor([[4.0], [9.0]]), torch.tensor([[True], [False]])
        >>> half = torch.tensor([math.log(2.0)])
        >>> decay_impute(x, torch.zeros(2, 1), mask, torch.arange(2), half, 0 * half).tolist()
        [[4.0], [2.0]]
    """
    if generated.shape != x.shape:
        raise ValueError(
            f"generated must have the shape of x, got {tuple(generated.shape)} and {tuple(x.shape)}"
        )
    for part in (weight, bias):
        pairs = zip(reversed(part.shape), reversed(x.shape))
        if part.ndim > x.ndim or any(size not in (1, full) for size, full in pairs):
            raise ValueError(
                f"weight and bias must broadcast to x, got {tuple(part.shape)}, {tuple(x.shape)}"
            )
    last, since = last_observed(x, mask, times)
    known = since.isfinite()
    gamma = torch.exp(-F.relu(weight * torch.where(known, since, 0) + bias)) * known
    return torch.where(mask, x, generated + gamma * (last - generated))


def effective_sample_size(log_weights: Tensor) -> Tensor:
    r"""How many equal weights would do the same: :math:`1 / \sum_k \bar w_k^2`.

    Args:
        log_weights: logarithms of unnormalized weights, shape ``(K, ...)``.

    Returns:
        Shape ``(...)``, between 1 and K.

    Raises:
        ValueError: no sample.

    Source: standard; the authors report none.

    Example:
        >>> effective_sample_size(torch.zeros(4, 1)).tolist()
        [4.0]
    """
    if log_weights.ndim < 1 or len(log_weights) < 1:
        raise ValueError(f"log_weights must hold samples, got {tuple(log_weights.shape)}")
    return 1 / log_weights.softmax(0).square().sum(0)


def check_series(x: Tensor, mask: Tensor) -> None:
    """Raise ValueError unless ``x`` is (..., steps, features) and ``mask`` bool of its shape."""
    if x.ndim < 2 or mask.shape != x.shape or mask.dtype != torch.bool:
        raise ValueError(
            f"x must be (..., steps, features) and mask bool of the same shape, got "
            f"{tuple(x.shape)} and {mask.dtype} of shape {tuple(mask.shape)}"
        )


def _same_shape(**terms: Tensor) -> None:
    shapes = {name: tuple(term.shape) for name, term in terms.items()}
    if len(set(shapes.values())) != 1 or min(map(len, shapes.values())) < 2:
        raise ValueError(f"log-terms must all have one shape (K, ..., n), got {shapes}")


def supervised_bound(
    log_py: Tensor,
    log_px: Tensor,
    log_pz: Tensor,
    log_qz: Tensor,
    log_ps: Tensor | None = None,
    log_pm: Tensor | None = None,
) -> Tensor:
    r"""Loss of the joint model: the negative importance-weighted bound, mean over the series.

    .. math:: -\log \frac1K \sum_k \exp(\log p_y + \log p_x + \log p_z - \log q_z
              + \log p_s + \log p_m)

    Args:
        log_py: log-probability of the label given completed series k, shape ``(K, n)``.
        log_px: of the observed entries given latent series k.
        log_pz, log_qz: of latent series k under prior and encoder.
        log_ps: of the mask given completed series k; left out if None.
        log_pm: of the observation dropout of completed series k; left out if None.

    Returns:
        Scalar. Further axes between K and n are averaged as well.

    Raises:
        ValueError: log-terms of different shapes.

    Source: the objective (supervised not-MIWAE bound); authors' code.

    Example:
        >>> zero = torch.zeros(2, 1)
        >>> weights = torch.tensor([[1.0], [3.0]])
        >>> round(supervised_bound(weights.log(), zero, zero, zero).exp().item(), 4)  # 1 / mean
        0.5
    """
    extra = {k: v for k, v in (("log_ps", log_ps), ("log_pm", log_pm)) if v is not None}
    _same_shape(log_py=log_py, log_px=log_px, log_pz=log_pz, log_qz=log_qz, **extra)
    total = log_py + log_px + log_pz - log_qz
    for term in extra.values():
        total = total + term
    return (math.log(len(total)) - total.logsumexp(0)).mean()


def predictive_log_prob(log_py: Tensor, log_px: Tensor, log_pz: Tensor, log_qz: Tensor) -> Tensor:
    r"""Log-probabilities of the classes, averaged over weighted completed series.

    .. math:: p(y|x^o) \approx \sum_k \bar w_k\, p(y|x_k), \qquad
              w_k = p(x^o|z_k)\, p(z_k) / q(z_k|x^o)

    Args:
        log_py: log-probabilities given completed series k, shape ``(K, ..., n, classes)``.
        log_px, log_pz, log_qz: as in :func:`supervised_bound`, shape ``(K, ..., n)``.

    Returns:
        Shape ``(..., n, classes)``.

    Raises:
        ValueError: shapes that do not fit.

    Source: authors' code (the mask's probability is left out of the weights).

    Example:
        >>> log_py = torch.tensor([[[0.2, 0.8]], [[0.6, 0.4]]]).log()
        >>> zero, weight = torch.zeros(2, 1), torch.tensor([[3.0], [1.0]])
        >>> out = predictive_log_prob(log_py, weight.log(), zero, zero)
        >>> [round(p, 4) for p in out[0].exp().tolist()]
        [0.3, 0.7]
    """
    _same_shape(log_py=log_py[..., 0], log_px=log_px, log_pz=log_pz, log_qz=log_qz)
    weight = (log_px + log_pz - log_qz).log_softmax(0)
    return (weight.unsqueeze(-1) + log_py).logsumexp(0)
