"""The softmax loss in a precision of choice, its collapse, and StableMax."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = [
    "StableMaxCrossEntropyLoss",
    "log_stablemax",
    "softmax_collapse",
    "softmax_cross_entropy",
    "stable_exp",
    "stablemax",
    "stablemax_cross_entropy",
]

_REDUCTIONS = ("mean", "sum", "none")


def _check_logits(logits: Tensor, target: Tensor | None) -> None:
    if logits.ndim != 2:
        raise ValueError(f"logits must have shape (N, C), got {tuple(logits.shape)}")
    if not logits.is_floating_point():
        raise ValueError(f"logits must be floating point, got {logits.dtype}")
    if target is None:
        return
    if target.shape != logits.shape[:1] or target.dtype != torch.int64:
        raise ValueError(
            f"target must be int64 of shape ({logits.shape[0]},), "
            f"got {target.dtype} {tuple(target.shape)}"
        )
    # On a GPU this test would stall the training loop, and `gather` reports the same mistake there.
    if target.device.type == "cpu" and target.numel():
        low, high = (int(v) for v in target.aminmax())
        if low < 0 or high >= logits.shape[1]:
            raise ValueError(
                f"target must be in [0, {logits.shape[1]}), got values from {low} to {high}"
            )


def _check_reduction(reduction: str) -> None:
    if reduction not in _REDUCTIONS:
        raise ValueError(f"reduction must be one of {_REDUCTIONS}, got {reduction!r}")


def _reduced(losses: Tensor, reduction: str) -> Tensor:
    if reduction == "none":
        return losses
    if reduction == "mean" and len(losses) == 0:
        raise ValueError("logits must hold an example with reduction 'mean', got an empty batch")
    return losses.mean() if reduction == "mean" else losses.sum()


def _shifted(logits: Tensor) -> Tensor:
    # The shift cancels in the softmax, so it carries no gradient. Left attached, autograd would
    # add two rounded terms where exact arithmetic has none, and hide the zero gradient.
    return logits - logits.detach().amax(dim=-1, keepdim=True)


def softmax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    reduction: str = "mean",
    compute_dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Ordinary cross-entropy, with every operation rounded to `compute_dtype`.

    $-z_y + \max z + \log\sum_k e^{z_k-\max z}$. When the sum rounds to 1 with the maximum at the
    label, the loss and the gradient of the true logit are exactly zero: softmax collapse. PyTorch's
    fused kernels may round elsewhere on another device; spelled out, the threshold is the same
    everywhere.

    Args:
        logits: floating point, shape (N, C).
        target: int64, shape (N,), in [0, C).
        reduction: "mean", "sum" or "none".
        compute_dtype: floating-point type of the computation and of the result.

    Returns:
        The loss in `compute_dtype`: a scalar, or shape (N,) for "none".

    Raises:
        ValueError: wrong ranks, integer logits, a target outside [0, C), an unknown reduction, the
            mean of an empty batch.

    Source: Prieto et al. (2025); Fig. 2 runs it in three precisions.

    Example:
        >>> z, y = torch.tensor([[8.0, 0.0]]), torch.tensor([0])
        >>> float(softmax_cross_entropy(z, y, compute_dtype=torch.float16))  # 8 > log 2**11
        0.0
        >>> round(float(softmax_cross_entropy(z, y)), 6)  # e**-8
        0.000335
    """
    _check_logits(logits, target)
    _check_reduction(reduction)
    bound = torch.finfo(compute_dtype).max
    if bound < torch.finfo(logits.dtype).max:  # infinity minus infinity is no number
        logits = logits.clamp(-bound, bound)
    shifted = _shifted(logits.to(compute_dtype))
    true = shifted.gather(1, target[:, None]).squeeze(1)  # (N,)
    return _reduced(shifted.exp().sum(dim=1).log() - true, reduction)


def softmax_collapse(
    logits: Tensor, target: Tensor | None = None, dtype: torch.dtype = torch.float32
) -> Tensor:
    r"""Which samples have collapsed: the softmax's denominator rounds to 1 in `dtype`.

    $\sum_k e^{z_k-\max z}=1$ in floating point. With two classes and logits $[\Delta,0]$ this
    happens once $e^{-\Delta}$ is at most half the gap between 1 and the next number:
    $\Delta\ge\log 2^{11}=7.6$ in float16, $\log 2^{24}=16.6$ in float32, $\log 2^{53}=36.7$ in
    float64.

    Args:
        logits: floating point, shape (N, C).
        target: int64, shape (N,). When given, the largest logit must also be the target's; without
            it, a confident mistake counts too.
        dtype: floating-point type in which the loss is computed.

    Returns:
        bool, shape (N,).

    Raises:
        ValueError: wrong ranks, integer logits, a target outside [0, C).

    Source: Prieto et al. (2025), definition of softmax collapse.

    Example:
        >>> gaps = torch.tensor([[7.0, 0.0], [8.0, 0.0]])
        >>> softmax_collapse(gaps, dtype=torch.float16).tolist()
        [False, True]
    """
    _check_logits(logits, target)
    shifted = _shifted(logits.to(dtype))
    collapsed = shifted.exp().sum(dim=-1) == 1
    if target is None:
        return collapsed
    return collapsed & (shifted.gather(1, target[:, None]).squeeze(1) == 0)


def stable_exp(x: Tensor) -> Tensor:
    r"""StableMax's stand-in for the exponential: $s(x)=1+x$ for $x\ge0$ and $1/(1-x)$ below.

    Like the exponential it is positive, increasing and 1 at 0 with slope 1, but it grows linearly.

    Args:
        x: floating point, any shape.

    Returns:
        Positive values of the shape and dtype of `x`.

    Raises:
        ValueError: integer input.

    Source: Prieto et al. (2025), definition of StableMax.

    Example:
        >>> stable_exp(torch.tensor([3.0, 0.0, -3.0])).tolist()
        [4.0, 1.0, 0.25]
    """
    if not x.is_floating_point():
        raise ValueError(f"logits must be floating point, got {x.dtype}")
    # torch.where would evaluate both branches, and at x = 1 the one not taken divides by zero and
    # makes the gradient NaN. At 0 clamp passes the gradient and relu stops it: one branch counts.
    return x.clamp(min=0) + 1 / (1 + F.relu(-x))


def stablemax(logits: Tensor, dim: int = -1) -> Tensor:
    r"""StableMax: a softmax whose exponential is replaced by $s$, which grows linearly.

    $p_i=s(z_i)/\sum_j s(z_j)$ with $s(x)=x+1$ for $x\ge0$ and $1/(1-x)$ for $x<0$. It equals the
    softmax of $g(x)=\mathrm{sign}(x)\log(1+|x|)$. Unlike softmax it is not invariant to a shift of
    the logits, so nothing is subtracted first.

    Args:
        logits: floating point, any shape.
        dim: dimension along which the result sums to 1.

    Returns:
        Probabilities of the shape and dtype of `logits`.

    Raises:
        ValueError: integer logits.

    Source: Prieto et al. (2025), definition of StableMax.

    Example:
        >>> p = stablemax(torch.tensor([1.0, 0.0, -1.0]))  # s = 2, 1, 1/2
        >>> [round(v, 4) for v in (7 * p).tolist()]
        [4.0, 2.0, 1.0]
    """
    s = stable_exp(logits)
    return s / s.sum(dim=dim, keepdim=True)


def log_stablemax(logits: Tensor, dim: int = -1) -> Tensor:
    r"""Logarithm of StableMax, $\log s(z_i)-\log\sum_j s(z_j)$.

    Args:
        logits: floating point, any shape.
        dim: dimension along which the probabilities sum to 1.

    Returns:
        Log-probabilities of the shape and dtype of `logits`.

    Raises:
        ValueError: integer logits.

    Source: Prieto et al. (2025), definition of StableMax.

    Example:
        >>> round(log_stablemax(torch.tensor([3.0, 0.0, 0.0]))[0].item(), 4)  # log(4 / 6)
        -0.4055
    """
    s = stable_exp(logits)
    return s.log() - s.sum(dim=dim, keepdim=True).log()


def stablemax_cross_entropy(
    logits: Tensor,
    target: Tensor,
    reduction: str = "mean",
    compute_dtype: torch.dtype = torch.float64,
) -> Tensor:
    r"""Cross-entropy on StableMax probabilities, $-\log p_y$.

    Args:
        logits: floating point, shape (N, C).
        target: int64, shape (N,), in [0, C).
        reduction: "mean", "sum" or "none".
        compute_dtype: floating-point type of the computation and of the result; the authors use
            float64.

    Returns:
        The loss in `compute_dtype`: a scalar, or shape (N,) for "none".

    Raises:
        ValueError: wrong ranks, integer logits, a target outside [0, C), an unknown reduction.

    Source: Prieto et al. (2025); the cast to float64 is in the authors' code.

    Example:
        >>> z, y = torch.tensor([[3.0, 0.0, 0.0, 0.0, 0.0]]), torch.tensor([0])
        >>> round(stablemax_cross_entropy(z, y).item(), 6)  # log 2
        0.693147
    """
    _check_logits(logits, target)
    _check_reduction(reduction)
    s = stable_exp(logits.to(compute_dtype))
    true = s.gather(1, target[:, None]).squeeze(1)  # (N,)
    return _reduced(s.sum(dim=1).log() - true.log(), reduction)


class StableMaxCrossEntropyLoss(nn.Module):
    """`stablemax_cross_entropy` as a module, for code that expects one.

    Args:
        reduction: "mean", "sum" or "none".

    Source: Prieto et al. (2025), definition of StableMax.

    Example:
        >>> loss = StableMaxCrossEntropyLoss(reduction="sum")
        >>> round(loss(torch.zeros(2, 8), torch.tensor([0, 7])).item(), 4)  # 2 log 8
        4.1589
    """

    def __init__(self, reduction: str = "mean") -> None:
        super().__init__()
        _check_reduction(reduction)
        self.reduction = reduction

    def forward(self, logits: Tensor, target: Tensor) -> Tensor:
        """The loss of `logits` (N, C) against `target` (N,)."""
        return stablemax_cross_entropy(logits, target, reduction=self.reduction)
