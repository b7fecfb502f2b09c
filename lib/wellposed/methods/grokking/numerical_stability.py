r"""Grokking at the Edge of Numerical Stability.

Prieto, Barsbey, Mediano and Birdal, ICLR 2025, arXiv 2501.04697.

Claim: without regularization a network that has fitted its training set keeps growing its logits
along its own weights, until the softmax rounds to exactly 1 and learning stops. A softmax that
grows more slowly (StableMax), or a gradient without its component along the weights
($\perp$Grad), lets it generalize instead.

Glossary: z logits, y label, s the function that StableMax uses in place of the exponential,
W a weight tensor, g its gradient. The two equations that matter:

    p_i = s(z_i) / sum_j s(z_j),   s(x) = x + 1 for x >= 0,  1 / (1 - x) for x < 0   (StableMax)
    g_perp = g - (<W, g> / <W, W>) W                                                 (perp-Grad)

Departures from the paper:
- The projected gradient is rescaled to the length of the raw gradient, as in the authors' code;
  the paper's equation has no rescaling. `rescale=False` gives the equation.
- A closure given to `OrthoGrad.step` is evaluated before the projection; in the authors' code
  after it, which would leave its gradients unprojected.
- The softmax loss is spelled out, so that it rounds alike on every device; the authors call
  PyTorch's log-softmax.
- The first layer looks its two one-hot columns up instead of multiplying by them: the same
  function and parameters in less time.
- The transformer has no dropout.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from wellposed.data.modular import ModularData, modular_dataset
from wellposed.train import accuracy

__all__ = [
    "GrokkingMLP",
    "GrokkingRun",
    "GrokkingTransformer",
    "OrthoGrad",
    "StableMaxCrossEntropyLoss",
    "log_stablemax",
    "modular_dataset",
    "nlm_alignment",
    "orthogonal_gradient",
    "softmax_collapse",
    "softmax_cross_entropy",
    "stable_exp",
    "stablemax",
    "stablemax_cross_entropy",
    "train_grokking",
]

ADAM_EPS = 1e-25
"""Adam's eps in the authors' experiments: small enough never to freeze a tiny gradient."""

_TINY = 1e-30
"""Guard of the two divisions in the projection (authors' code)."""

_REDUCTIONS = ("mean", "sum", "none")


@dataclass(frozen=True)
class GrokkingRun:
    """Curves of several networks trained side by side; one row a network, one column a log.

    Attributes:
        steps: number of updates done at each log, int64, shape (logs,).
        train_accuracy: share of training pairs classified correctly, shape (networks, logs).
        test_accuracy: the same on the held-out pairs.
        collapsed: share of training pairs whose loss is exactly zero in the loss's own precision.
        largest_logit: largest training logit in absolute value.
        weight_norm: Euclidean norm of all parameters together.
        alignment: by parameter name, the cosine of minus the raw gradient and the parameter.
        step_alignment: the same for the gradient that the base optimizer received.
        parameters: the trained parameters by name, each of shape (networks, ...).
    """

    steps: Tensor
    train_accuracy: Tensor
    test_accuracy: Tensor
    collapsed: Tensor
    largest_logit: Tensor
    weight_norm: Tensor
    alignment: dict[str, Tensor]
    step_alignment: dict[str, Tensor]
    parameters: dict[str, Tensor]

    def first_step(self, curve: Tensor, level: float) -> Tensor:
        """First logged step at which `curve` (networks, logs) is at least `level`, else infinity.

        Returns:
            float64, shape (networks,).
        """
        steps = self.steps.double().expand(curve.shape)
        return torch.where(curve >= level, steps, torch.inf).amin(dim=1)


# --- softmax, its collapse, and StableMax ---------------------------------------------------------


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


# --- naive loss minimization and its projection ---------------------------------------------------


def _inner(a: Tensor, b: Tensor, batch_dims: int) -> Tensor:
    """Inner product over all but the first `batch_dims` dimensions, kept for broadcasting."""
    product = (a * b).flatten(batch_dims).sum(dim=-1)
    return product.reshape(product.shape + (1,) * (a.ndim - batch_dims))


def _cosine(a: Tensor, b: Tensor, batch_dims: int = 0) -> Tensor:
    norms = _inner(a, a, batch_dims).sqrt() * _inner(b, b, batch_dims).sqrt()
    return (_inner(a, b, batch_dims) / (norms + _TINY)).flatten(batch_dims).squeeze(-1)


def orthogonal_gradient(
    weight: Tensor, grad: Tensor, rescale: bool = True, batch_dims: int = 0
) -> Tensor:
    r"""The gradient without its component along the weight.

    $g_\perp=g-\frac{\langle W,g\rangle}{\langle W,W\rangle}W$. Moving along the weight scales the
    logits of a homogeneous network and changes no prediction: the naive way to lower the loss.
    What is left is still a descent direction, since $\langle g,g_\perp\rangle=\|g_\perp\|^2$.

    Args:
        weight: parameter tensor W, any shape.
        grad: gradient of the same shape.
        rescale: give the result the length of `grad` (authors' code) instead of the shorter one
            of the equation.
        batch_dims: number of leading dimensions that count independent networks; each is
            projected on its own.

    Returns:
        Tensor of the shape of `grad`; a zero weight returns `grad`.

    Raises:
        ValueError: different shapes, or `batch_dims` outside [0, grad.ndim].

    Source: Prieto et al. (2025), perp-Grad; rescaling from the authors' code.

    Example:
        >>> orthogonal_gradient(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0])).tolist()
        [0.0, 5.0]
        >>> orthogonal_gradient(torch.tensor([2.0, 0.0]), torch.tensor([3.0, 4.0]), False).tolist()
        [0.0, 4.0]
    """
    if weight.shape != grad.shape:
        raise ValueError(
            f"weight and grad must have one shape, got {tuple(weight.shape)}, {tuple(grad.shape)}"
        )
    if not 0 <= batch_dims <= grad.ndim:
        raise ValueError(f"batch_dims must be in [0, {grad.ndim}], got {batch_dims}")
    along = _inner(weight, grad, batch_dims) / (_inner(weight, weight, batch_dims) + _TINY)
    projected = grad - along * weight
    if not rescale:
        return projected
    length = _inner(projected, projected, batch_dims).sqrt()
    stretch = _inner(grad, grad, batch_dims).sqrt() / (length + _TINY)
    # Where nothing is left of a large gradient, this is infinite, and zero times it no number.
    return projected * stretch.clamp(max=torch.finfo(stretch.dtype).max)


class OrthoGrad(torch.optim.Optimizer):
    r"""$\perp$Grad: projects every gradient off its parameter, then lets a base optimizer step.

    Each parameter tensor is projected on its own. `param.grad` holds the projected gradient
    afterwards. The parameter groups are shared with the base optimizer, so learning-rate
    schedulers work on either.

    Args:
        params: parameters or parameter groups; a group with `project=False` is not projected.
        base_optimizer_cls: any `torch.optim.Optimizer` class.
        rescale: see `orthogonal_gradient`.
        batch_dims: see `orthogonal_gradient`; 1 for parameters stacked over networks.
        **base_kwargs: passed to `base_optimizer_cls` (lr, betas ...).

    Source: Prieto et al. (2025), perp-Grad.

    Example:
        >>> w = nn.Parameter(torch.tensor([2.0, 0.0]))
        >>> w.grad = torch.tensor([3.0, 4.0])
        >>> OrthoGrad([w], torch.optim.SGD, lr=0.1, rescale=False).step()
        >>> [round(v, 4) for v in w.tolist()]
        [2.0, -0.4]
    """

    def __init__(
        self,
        params: Any,
        base_optimizer_cls: type[torch.optim.Optimizer] = torch.optim.SGD,
        *,
        rescale: bool = True,
        batch_dims: int = 0,
        **base_kwargs: Any,
    ) -> None:
        super().__init__(params, {"project": True})
        self.rescale = rescale
        self.batch_dims = batch_dims
        self.base_optimizer = base_optimizer_cls(self.param_groups, **base_kwargs)
        self._share_with_base()

    def _share_with_base(self) -> None:
        self.param_groups = self.base_optimizer.param_groups
        self.state = self.base_optimizer.state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Projects the gradients and steps; a closure is evaluated first and its value returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if group["project"] and p.grad is not None:
                    p.grad.copy_(orthogonal_gradient(p, p.grad, self.rescale, self.batch_dims))
        self.base_optimizer.step()
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restores the base optimizer's state."""
        self.base_optimizer.load_state_dict(state_dict)
        self._share_with_base()


def nlm_alignment(model: nn.Module) -> dict[str, float]:
    r"""How far the gradient points along the weights: the sign of naive loss minimization (NLM).

    $\cos(-\nabla_W L, W)$ for every parameter that has a gradient. 1 means that a gradient step
    only scales the parameter up.

    Args:
        model: a module after `backward()`.

    Returns:
        Cosine in [-1, 1] by parameter name; 0 where gradient or parameter is zero.

    Source: Prieto et al. (2025), Fig. 5.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> layer.weight.grad = -2 * layer.weight.detach()
        >>> round(nlm_alignment(layer)["weight"], 4)
        1.0
    """
    return {
        name: float(_cosine(-p.grad, p.detach()))
        for name, p in model.named_parameters()
        if p.grad is not None
    }


# --- networks -------------------------------------------------------------------------------------


class GrokkingMLP(nn.Module):
    r"""The paper's network: ReLU, two hidden layers, no biases, on two one-hot residues.

    Sizes $2p\to$ width $\to$ width $\to p$. Without biases it is homogeneous of degree 3: scaling
    all weights by $c>0$ scales the logits by $c^3$. Initialized as PyTorch's linear layers.

    Args:
        p: modulus, at least 2.
        width: units in each hidden layer.

    Input: pairs of residues, int64, shape (N, 2). Output: logits, shape (N, p).

    Source: Prieto et al. (2025), experimental settings: p = 113, width = 200.

    Example:
        >>> sum(w.numel() for w in GrokkingMLP(5, width=10).parameters())  # 100 + 100 + 50
        250
    """

    def __init__(self, p: int, width: int = 200) -> None:
        super().__init__()
        if p < 2 or width < 1:
            raise ValueError(f"p must be >= 2 and width >= 1, got p={p}, width={width}")
        self.p = p
        # Transposed against nn.Linear: row a is the column that the one-hot code of a selects.
        self.first = nn.Parameter(torch.empty(2 * p, width).uniform_(-1, 1) / (2 * p) ** 0.5)
        self.hidden = nn.Linear(width, width, bias=False)
        self.output = nn.Linear(width, p, bias=False)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits (N, p) of residue pairs (N, 2)."""
        _check_pairs(pairs)
        left, right = self.first[: self.p], self.first[self.p :]
        x = F.embedding(pairs[:, 0], left) + F.embedding(pairs[:, 1], right)  # (N, width)
        return self.output(F.relu(self.hidden(F.relu(x))))  # type: ignore[no-any-return]


class GrokkingTransformer(nn.Module):
    """A one-layer transformer that reads the two residues as tokens and answers at the last one.

    Multi-head attention and a ReLU feed-forward block, each with a residual connection and a layer
    norm after it; no position code, no dropout.

    Args:
        p: modulus and vocabulary size, at least 2.
        width: embedding size, divisible by `heads`.
        heads: attention heads.
        feedforward: hidden units of the feed-forward block.

    Input: pairs of residues, int64, shape (N, 2). Output: logits, shape (N, p).

    Source: Prieto et al. (2025), Fig. 6; width 128 and 4 heads. The authors' code takes PyTorch's
    encoder layer with its defaults, hence 2048 feed-forward units (and dropout 0.1, left out here
    so that runs stay deterministic).

    Example:
        >>> GrokkingTransformer(5, width=8, heads=2, feedforward=16)(torch.tensor([[1, 2]])).shape
        torch.Size([1, 5])
    """

    def __init__(self, p: int, width: int = 128, heads: int = 4, feedforward: int = 2048) -> None:
        super().__init__()
        if p < 2 or heads < 1 or width % heads:
            raise ValueError(
                f"p must be >= 2 and width divisible by heads, got p={p}, width={width}, "
                f"heads={heads}"
            )
        self.heads = heads
        self.embedding = nn.Embedding(p, width)
        self.qkv = nn.Linear(width, 3 * width)
        self.mix = nn.Linear(width, width)
        nn.init.xavier_uniform_(self.qkv.weight)
        nn.init.zeros_(self.qkv.bias)
        nn.init.zeros_(self.mix.bias)
        self.norm_attention = nn.LayerNorm(width)
        self.expand = nn.Linear(width, feedforward)
        self.contract = nn.Linear(feedforward, width)
        self.norm_feedforward = nn.LayerNorm(width)
        self.output = nn.Linear(width, p)

    def forward(self, pairs: Tensor) -> Tensor:
        """Logits (N, p) of residue pairs (N, 2)."""
        _check_pairs(pairs)
        tokens = self.embedding(pairs)  # (N, 2, width)
        # (N, 2, 3 * width) -> three of (N, heads, 2, width / heads)
        q, k, v = self.qkv(tokens).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        # Only the last token is read out, so only its query is needed.
        scores = q[:, :, -1:] @ k.transpose(-1, -2) / k.shape[-1] ** 0.5  # (N, heads, 1, 2)
        attended = (scores.softmax(dim=-1) @ v).flatten(1)  # (N, width)
        x = self.norm_attention(tokens[:, -1] + self.mix(attended))
        x = self.norm_feedforward(x + self.contract(F.relu(self.expand(x))))
        return self.output(x)  # type: ignore[no-any-return]


def _check_pairs(pairs: Tensor) -> None:
    if pairs.ndim != 2 or pairs.shape[1] != 2 or pairs.dtype != torch.int64:
        raise ValueError(
            f"pairs must be int64 of shape (N, 2), got {pairs.dtype} {tuple(pairs.shape)}"
        )


# --- training -------------------------------------------------------------------------------------


_SCALARS = ("train_accuracy", "test_accuracy", "collapsed", "largest_logit", "weight_norm")


def _measure(
    logits: Tensor,
    y: Tensor,
    losses: Tensor,
    test_logits: Tensor,
    y_test: Tensor,
    weights: dict[str, Tensor],
) -> Tensor:
    """The `_SCALARS` at one step, shape (scalars, networks); nothing leaves the device."""
    squares = torch.stack([w.flatten(1).square().sum(dim=1) for w in weights.values()])
    scalars = (
        accuracy(logits, y),
        accuracy(test_logits, y_test),
        (losses == 0).float().mean(dim=1),
        logits.abs().amax(dim=(1, 2)),
        squares.sum(dim=0).sqrt(),
    )
    return torch.stack([v.to(logits.dtype) for v in scalars])


def _alignments(weights: dict[str, Tensor], holders: dict[str, Tensor]) -> Tensor:
    """Cosine of minus each holder's gradient and its weight, shape (parameters, networks)."""
    rows = []
    for name, holder in holders.items():
        if holder.grad is None:
            raise ValueError(f"the loss does not depend on parameter {name!r}")
        rows.append(_cosine(-holder.grad, weights[name], batch_dims=1))
    return torch.stack(rows)


def train_grokking(
    models: Sequence[nn.Module],
    datasets: Sequence[ModularData],
    *,
    loss: Callable[..., Tensor],
    optimizer: Callable[[list[Tensor]], torch.optim.Optimizer],
    steps: int,
    log_every: int = 10,
) -> GrokkingRun:
    """Full-batch training of several networks side by side, with the paper's diagnostics.

    The parameters of all networks are stacked along a first dimension and trained by one optimizer.
    Elementwise optimizers (SGD, Adam, AdamW) then do to each network exactly what they would do to
    it alone; `OrthoGrad` needs `batch_dims=1` for the same.

    Args:
        models: one network a seed, all of one architecture; left unchanged.
        datasets: one split a network, all of one size, on the networks' device.
        loss: called as `loss(logits, target, reduction="none")`.
        optimizer: builds the optimizer from the list of stacked parameters.
        steps: number of updates, at least 1.
        log_every: updates between two logs, at least 1; the last log is after the last update.

    Returns:
        A `GrokkingRun` with tensors on the CPU (the parameters stay on their device).

    Raises:
        ValueError: no models, another number of datasets, or `steps` or `log_every` below 1.

    Source: Prieto et al. (2025), Figs. 1, 2, 4 and 5: full-batch training and what is logged.

    Example:
        >>> data = modular_dataset(5, 0.6)
        >>> run = train_grokking([GrokkingMLP(5, 16)], [data], loss=softmax_cross_entropy,
        ...     optimizer=lambda params: torch.optim.Adam(params, lr=0.01), steps=4, log_every=2)
        >>> run.steps.tolist()
        [0, 2, 4]
    """
    if not models or len(models) != len(datasets):
        raise ValueError(f"need one dataset a model, got {len(models)} and {len(datasets)}")
    if steps < 1 or log_every < 1:
        raise ValueError(f"steps and log_every must be >= 1, got {steps} and {log_every}")
    stacked, _ = stack_module_state(list(models))
    template = models[0]
    forward = vmap(lambda weights, pairs: functional_call(template, weights, (pairs,)))
    x, y = torch.stack([d.x for d in datasets]), torch.stack([d.y for d in datasets])
    x_test = torch.stack([d.x_test for d in datasets])
    y_test = torch.stack([d.y_test for d in datasets])
    weights: list[Tensor] = list(stacked.values())
    update = optimizer(weights)

    logged: list[int] = []
    measured: list[Tensor] = []
    raw: list[Tensor] = []
    received: list[Tensor] = []
    for step in range(steps + 1):
        logits = forward(stacked, x)  # (networks, n, p)
        losses = loss(logits.flatten(0, 1), y.flatten(), reduction="none").view_as(y)
        update.zero_grad()
        # Summed over networks, so that each one gets the gradient of its own mean.
        losses.mean(dim=1).sum().backward()
        logging = step % log_every == 0 or step == steps
        if logging:
            with torch.no_grad():
                test_logits = forward(stacked, x_test)
            before = {name: w.detach().clone() for name, w in stacked.items()}
            logged.append(step)
            measured.append(_measure(logits.detach(), y, losses, test_logits, y_test, before))
            raw.append(_alignments(before, stacked))
        # The update after the last log is not kept; it only shows what the optimizer received.
        update.step()
        if logging:
            received.append(_alignments(before, stacked))

    scalars = torch.stack(measured, dim=-1).cpu()  # (scalars, networks, logs)
    alignment, step_alignment = (
        dict(zip(stacked, torch.stack(rows, dim=-1).cpu())) for rows in (raw, received)
    )
    return GrokkingRun(
        steps=torch.tensor(logged),
        **dict(zip(_SCALARS, scalars)),
        alignment=alignment,
        step_alignment=step_alignment,
        parameters=before,
    )
