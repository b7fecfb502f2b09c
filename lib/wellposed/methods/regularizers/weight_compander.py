r"""Weight compander: train each weight through a bounded, nonlinear function.

R. Cakaj, J. Mehnert, B. Yang, "Weight Compander: A Simple Weight Reparameterization for
Regularization", IJCNN 2023, arXiv:2306.16993.

Claim: writing each weight as a nonlinear function of a free parameter limits large weights, keeps
weights away from zero, and so reduces overfitting on top of the usual regularizers; the function's
two hyper-parameters can be learned. With the free tensor :math:`v` and scalars :math:`a, b > 0`,

.. math::

    w = \Psi(v) = a \arctan(v / b), \qquad |w| < \tfrac{\pi}{2} a, \qquad
    \Psi'(v) = \frac{a}{b} \, \frac{1}{1 + (v / b)^2} .

A gradient step of size :math:`\eta` on :math:`v` moves the weight by
:math:`-\eta \, \Psi'(v)^2 \, \partial L / \partial w`: weights near zero move freely, large ones
are held back.

Departures from the paper: only its abstract was at hand. The arctan form is how the method is
remembered, not checked; the choice :math:`a = b = \kappa \cdot \mathrm{std}(w_0)` with an
unchanged network at the start, scalars per layer, and weight decay on :math:`v` are ours. The
formula stands in one place, so that another one can replace it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellposed.nets import Stacked
from wellposed.nets.columns import stacked_forward
from wellposed.ops.numerics import unit_of
from wellposed.train import StackedSGD, generator, seeded

__all__ = [
    "SideBySide",
    "Splits",
    "WeightCompander",
    "apply_weight_compander",
    "compand",
    "compand_inverse",
    "make_splits",
    "train_side_by_side",
    "weight_statistics",
]

SCALE = 2.0  # kappa: a and b in units of the initial weights' standard deviation (our choice)
CLAMP = 1.5  # largest |w / a| of the inverse, just below pi / 2, where the tangent explodes
NEAR_ZERO = 0.1  # a weight is near zero below this many standard deviations
M = TypeVar("M", bound=nn.Module)
EVAL_CHUNK = 500  # examples a network sees at once while it is only measured

PerNetwork = float | Sequence[float]
"""One number for all networks, or one for each."""


@dataclass(frozen=True)
class Splits:
    """One pool of examples, and for each network its own split of the pool.

    Attributes:
        x, y: inputs ``(n, ...)`` and classes ``(n,)`` of the pool.
        train, val, test: positions in the pool, int64, ``(s, ...)``: row ``i`` is network ``i``'s.
    """

    x: Tensor
    y: Tensor
    train: Tensor
    val: Tensor
    test: Tensor


@dataclass(frozen=True)
class SideBySide:
    """What ``s`` networks, trained side by side, ended with; on the CPU.

    Attributes:
        train_error, val_error, test_error: shares of wrong predictions, ``(s,)``.
        train_nll, val_nll, test_nll: mean cross-entropies in nats, ``(s,)``.
    """

    train_error: Tensor
    val_error: Tensor
    test_error: Tensor
    train_nll: Tensor
    val_nll: Tensor
    test_nll: Tensor

    def part(self, networks: slice) -> SideBySide:
        """The same for some of the networks."""
        return SideBySide(*(value[networks] for value in vars(self).values()))


def _psi(v: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    """The reparameterization; to try another one, change this function and the next."""
    return a * torch.arctan(v / b)


def _psi_inverse(w: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    return b * torch.tan(w / a)


def _check_positive(**values: Tensor | float) -> None:
    for name, value in values.items():
        good = bool((value > 0).all()) if isinstance(value, Tensor) else 0.0 < value < math.inf
        if not good:
            raise ValueError(f"{name} must be positive and finite, got {value}")


def compand(v: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    r"""Map free parameters to bounded weights: :math:`\Psi(v) = a \arctan(v / b)`.

    Args:
        v: free parameters, any shape, floating point.
        a: scale of the weights, positive; they stay below :math:`a \pi / 2` in size.
        b: scale of the free parameters, positive. The slope at zero is ``a / b``.

    Returns:
        Weights, in the shape of ``v``.

    Raises:
        ValueError: ``a`` or ``b`` is not positive.

    Source: the form is not verified, see the module's departures.

    Example:
        >>> round(compand(torch.tensor(3.0), 2.0, 3.0).item(), 4)  # 2 arctan(1) = pi / 2
        1.5708
    """
    _check_positive(a=a, b=b)
    return _psi(v, a, b)


def compand_inverse(w: Tensor, a: Tensor | float, b: Tensor | float) -> Tensor:
    r"""Free parameters that give these weights: :math:`\Psi^{-1}(w) = b \tan(w / a)`.

    Args:
        w: weights, any shape, floating point, smaller than :math:`a \pi / 2` in size.
        a, b: scales, positive.

    Returns:
        Free parameters, in the shape of ``w``.

    Raises:
        ValueError: ``a`` or ``b`` is not positive, or a weight lies outside the range of
            :func:`compand`.

    Source: the form is not verified, see the module's departures.

    Example:
        >>> round(compand_inverse(torch.tensor(math.pi / 2), 2.0, 3.0).item(), 4)
        3.0
    """
    _check_positive(a=a, b=b)
    if not bool((w.abs() < a * (math.pi / 2)).all()):
        raise ValueError(f"w must be smaller than a * pi / 2 in size, got a = {a}")
    return _psi_inverse(w, a, b)


class WeightCompander(nn.Module):
    r"""The compander as a parametrization, for ``torch.nn.utils.parametrize``.

    Args:
        a: scale of the weights, positive; one scalar for the whole tensor.
        b: scale of the free parameters, positive.
        learnable: whether :math:`\log a` and :math:`\log b` are parameters to train. Keep weight
            decay away from them: it would pull both scales to one.
        device, dtype: of the two scalars.

    Raises:
        ValueError: ``a`` or ``b`` is not positive.

    Source: the abstract (learned hyper-parameters); the form is not verified.

    Example:
        >>> layer = nn.Linear(1, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.fill_(math.pi / 2)
        >>> _ = parametrize.register_parametrization(layer, "weight", WeightCompander(2.0, 3.0))
        >>> weight, free = layer.weight.item(), layer.parametrizations.weight.original.item()
        >>> round(weight, 4), round(free, 4)  # the weight is kept: v = 3 tan(pi / 4)
        (1.5708, 3.0)
    """

    log_a: Tensor
    log_b: Tensor

    def __init__(
        self,
        a: float,
        b: float,
        learnable: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_positive(a=a, b=b)
        for name, value in (("log_a", a), ("log_b", b)):
            log = torch.tensor(math.log(value), device=device, dtype=dtype)
            if learnable:
                self.register_parameter(name, nn.Parameter(log))
            else:
                self.register_buffer(name, log)

    @property
    def a(self) -> Tensor:
        """Scale of the weights, a positive scalar."""
        return self.log_a.exp()

    @property
    def b(self) -> Tensor:
        """Scale of the free parameters, a positive scalar."""
        return self.log_b.exp()

    def extra_repr(self) -> str:
        return f"learnable={isinstance(self.log_a, nn.Parameter)}"

    def forward(self, v: Tensor) -> Tensor:
        """Weights from free parameters ``v`` of any shape."""
        return _psi(v, self.a, self.b)

    def right_inverse(self, w: Tensor) -> Tensor:
        """Free parameters from weights; what exceeds ``1.5 a`` in size is first cut to that."""
        a = self.a
        return _psi_inverse(w.clamp(-CLAMP * a, CLAMP * a), a, self.b)


def apply_weight_compander(module: M, scale: float = SCALE, learnable: bool = False) -> M:
    r"""Train the weight of every linear and convolutional layer through a compander.

    Each layer gets its own scalars :math:`a = b = \kappa \cdot \mathrm{std}(w_0)`, so the slope at
    zero is one, and :math:`v_0 = \Psi^{-1}(w_0)`, so the layer computes what it did before as long
    as no initial weight exceeds :math:`1.5 a`; PyTorch's uniform initialization reaches
    :math:`\sqrt 3 \, \mathrm{std}(w_0)`, which fits from :math:`\kappa = 1.16` on.

    Args:
        module: changed in place: ``weight`` of each ``Linear``, ``Conv1d`` and ``Conv2d`` in it
            becomes a function of ``parametrizations.weight.original``. Biases and the parameters of
            normalization layers stay as they are. Make the optimizer afterward.
        scale: :math:`\kappa`, positive: the smaller, the tighter the bound.
        learnable: whether the scalars are parameters to train.

    Returns:
        The same module.

    Raises:
        ValueError: ``scale`` is not positive, the module has no such layer, one of them has
            a compander already, or its weights are all equal.

    Source: the abstract (each weight is reparameterized); scales and start are our choice.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> with torch.no_grad():
        ...     _ = layer.weight.copy_(torch.tensor([[-1.0, 1.0]]))
        >>> layer = apply_weight_compander(layer, scale=2.0)
        >>> round(layer.parametrizations.weight[0].a.item(), 4)  # twice the standard deviation
        2.0
    """
    _check_positive(scale=scale)
    layers = [m for m in module.modules() if isinstance(m, nn.Linear | nn.Conv1d | nn.Conv2d)]
    if not layers:
        raise ValueError("module must contain a Linear, Conv1d or Conv2d layer")
    for layer in layers:
        if parametrize.is_parametrized(layer, "weight"):
            raise ValueError(f"module must not have parametrized weights yet, got {layer}")
        weight = layer.weight
        spread = float(weight.detach().std(correction=0))
        if not spread > 0.0:
            raise ValueError(f"module must have weights that differ, those of {layer} are equal")
        compander = WeightCompander(
            scale * spread, scale * spread, learnable, device=weight.device, dtype=weight.dtype
        )
        parametrize.register_parametrization(layer, "weight", compander)
    return module


def weight_statistics(w: Tensor) -> dict[str, Tensor]:
    r"""How peaked and how long-tailed a weight distribution is.

    Args:
        w: effective weights (not the free parameters), any shape.

    Returns:
        Scalars: ``kurtosis``, the fourth central moment over the squared second (1.8 for a uniform,
        3 for a normal distribution); ``near_zero``, the share of weights with size below a tenth of
        the standard deviation; ``max_over_std``, the largest size in standard deviations.

    Raises:
        ValueError: fewer than two weights, or no two that differ.

    Source: stands in for the histograms of the paper.

    Example:
        >>> stats = weight_statistics(torch.tensor([-1.0, 0.0, 0.0, 1.0]))
        >>> [round(v.item(), 4) for v in stats.values()]  # variance 1/2, fourth moment 1/2
        [2.0, 0.5, 1.4142]
    """
    if w.numel() < 2:
        raise ValueError(f"w must hold at least two weights, got shape {tuple(w.shape)}")
    w = w / unit_of(w, power=4)
    squares = (w - w.mean()).square()
    variance = squares.mean()
    if not bool(variance > 0):
        raise ValueError("w must hold at least two different weights")
    std = variance.sqrt()
    return {
        "kurtosis": squares.square().mean() / variance.square(),
        "near_zero": (w.abs() < NEAR_ZERO * std).to(w.dtype).mean(),
        "max_over_std": w.abs().max() / std,
    }


def make_splits(
    x: Tensor,
    y: Tensor,
    *,
    num_train: int,
    num_val: int,
    num_test: int,
    seeds: Sequence[int],
) -> Splits:
    """Draw one random split of a pool of examples for each seed.

    Args:
        x: inputs, shape ``(n, ...)``.
        y: classes, shape ``(n,)``, int64.
        num_train, num_val, num_test: sizes, each at least 1, together at most ``n``.
        seeds: one for each network; equal seeds give equal splits.

    Returns:
        The pool and ``len(seeds)`` splits, on the device of ``x``.

    Raises:
        ValueError: sizes that do not fit, no seeds, or ``x`` and ``y`` of different lengths.

    Source: our own experiment.

    Example:
        >>> x, y = torch.zeros(6, 1), torch.zeros(6, dtype=torch.int64)
        >>> splits = make_splits(x, y, num_train=3, num_val=2, num_test=1, seeds=[0, 1])
        >>> everything = torch.cat([splits.train, splits.val, splits.test], dim=1)
        >>> splits.train.shape, everything.sum(1).tolist()  # 0 + 1 + ... + 5
        (torch.Size([2, 3]), [15, 15])
    """
    sizes = [num_train, num_val, num_test]
    if len(x) != len(y) or not len(seeds):
        raise ValueError(
            f"x and y must pair up and seeds not be empty, got {len(x)}, {len(y)}, {len(seeds)}"
        )
    if min(sizes) < 1 or sum(sizes) > len(y):
        raise ValueError(
            f"num_train, num_val, num_test must be positive and sum to at most {len(y)}, "
            f"got {sizes}"
        )
    orders = [torch.randperm(len(y), generator=generator(seed)) for seed in seeds]
    parts = torch.stack(orders)[:, : sum(sizes)].to(x.device).split(sizes, dim=1)
    return Splits(x, y, *parts)


class _Step:
    """Momentum SGD in three groups: weights, with decay and bounds; scalars; and the rest."""

    def __init__(
        self,
        params: Sequence[Tensor],
        lr: PerNetwork,
        momentum: float,
        weight_decay: PerNetwork,
        clip_scale: PerNetwork,
        scalar_lr_factor: PerNetwork,
    ) -> None:
        # Stacked scalars have one axis, stacked biases and normalization parameters two.
        self.weights = [p for p in params if p.ndim > 2]
        scalars, others = [p for p in params if p.ndim == 1], [p for p in params if p.ndim == 2]
        size = len(params[0])
        rates, factors = _each("lr", lr, size), _each("scalar_lr_factor", scalar_lr_factor, size)
        slow = [rate * factor for rate, factor in zip(rates, factors)]
        decays, none = _each("weight_decay", weight_decay, size), [0.0] * size
        groups = [(self.weights, rates, decays), (scalars, slow, none), (others, rates, none)]
        self.groups = [
            StackedSGD(group, lr=rate, momentum=momentum, weight_decay=decay)
            for group, rate, decay in groups
            if group
        ]
        clips = _each("clip_scale", clip_scale, size)
        clipped = any(clip < math.inf for clip in clips)
        self.bounds = [_bound(p, clips) for p in self.weights] if clipped else []

    def __call__(self, losses: Tensor, lr_factor: float) -> None:
        # The sum, not the mean, over networks leaves each its own gradient.
        losses.sum().backward()  # type: ignore[no-untyped-call]
        for group in self.groups:
            group.step(lr_factor)
        with torch.no_grad():
            for p, bound in zip(self.weights, self.bounds):
                p.clamp_(-bound, bound)


def _each(name: str, value: PerNetwork, size: int) -> list[float]:
    """A number for each network."""
    values = [float(value)] * size if isinstance(value, int | float) else list(value)
    if len(values) != size or not all(v >= 0.0 for v in values):
        raise ValueError(f"{name} must be one number >= 0, or {size} of them, got {value}")
    return values


def _bound(param: Tensor, clips: Sequence[float]) -> Tensor:
    """Largest weight that clipping leaves, for each network."""
    spread = param.detach().flatten(1).std(1, correction=0)
    bounds = param.new_tensor(clips) * math.pi / 2 * spread
    return bounds.view(-1, *[1] * (param.ndim - 1))


class _Forward:
    """Outputs of networks side by side, the companders of all of them evaluated at once."""

    def __init__(self, networks: Stacked) -> None:
        self.networks = networks
        tensors = dict(networks.named_parameters()) | dict(networks.named_buffers())
        stem = ".parametrizations.weight."
        layers = [n.removesuffix(f"{stem}original") for n in networks.names() if stem in n]
        self.companders = {}
        for layer in dict.fromkeys(n for n in layers if stem not in n):
            flat = "stacked_" + (layer + stem).replace(".", "_")
            v, *logs = (tensors[flat + end] for end in ("original", "0_log_a", "0_log_b"))
            self.companders[f"{layer}.weight"] = v, *(p.view(-1, *[1] * (v.ndim - 1)) for p in logs)

    def __call__(self, x: Tensor) -> Tensor:
        weights = {n: _psi(v, a.exp(), b.exp()) for n, (v, a, b) in self.companders.items()}
        return stacked_forward(self.networks, x, weights)


@torch.no_grad()
def _measure(forward: _Forward, splits: Splits, index: Tensor) -> Tensor:
    """Error and cross-entropy of each network on its examples ``index`` (s, m); (2, s)."""
    total = splits.x.new_zeros(2, len(index))
    for part in index.split(EVAL_CHUNK, dim=1):
        logits, y = forward(splits.x[part]), splits.y[part]
        wrong = (logits.argmax(-1) != y).to(total.dtype).mean(1)
        total += torch.stack([wrong, _nll(logits, y)]) * part.shape[1]
    return total / index.shape[1]


def _nll(logits: Tensor, y: Tensor) -> Tensor:
    """Mean cross-entropy of each network: logits (s, b, c), y (s, b), result (s,)."""
    each = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    return each.view(y.shape).mean(1)


def train_side_by_side(
    models: Sequence[nn.Module],
    splits: Splits,
    *,
    seeds: Sequence[int],
    epochs: int = 30,
    batch_size: int = 50,
    lr: PerNetwork = 0.05,
    momentum: float = 0.9,
    weight_decay: PerNetwork = 5e-4,
    clip_scale: PerNetwork = math.inf,
    scalar_lr_factor: PerNetwork = 1.0,
) -> SideBySide:
    r"""Train networks of one structure at the same time, each on its own split.

    Momentum SGD, learning rate divided by ten after half and after three quarters of the epochs.
    Weight decay acts on what the optimizer moves, so on :math:`v` in a companded layer, and only on
    tensors with two axes or more: not on biases, normalization parameters, or learned scales.

    Args:
        models: ``s`` networks that differ in their tensors only; trained in place.
        splits: data, on the device of the models; row ``i`` is network ``i``'s.
        seeds: order of the examples of each network; equal seeds see equal batches.
        epochs: passes over the training examples, at least 1.
        batch_size: examples a step, at least 1.
        lr: learning rate, or one for each network.
        momentum: of SGD, in [0, 1).
        weight_decay: coefficient, or one for each network.
        clip_scale: after each step, weights are clipped to
            :math:`\pm \frac\pi2 \cdot \mathrm{clip\_scale} \cdot \mathrm{std}(w_0)`, the bound of a
            compander of that scale; infinity leaves them alone. For plain networks. One number, or
            one for each network.
        scalar_lr_factor: learning rate of scalar parameters (the learned :math:`\log a` and
            :math:`\log b`) over that of the others, at least 0, or one for each network.

    Returns:
        Errors and cross-entropies of each network.

    Raises:
        ValueError: lengths that differ, or an argument out of range.

    Source: our own experiment.

    Example:
        >>> x = torch.tensor([[-1.0], [1.0]]).repeat(3, 1)
        >>> splits = make_splits(
        ...     x, (x[:, 0] > 0).long(), num_train=2, num_val=2, num_test=2, seeds=[0]
        ... )
        >>> splits.train[:] = torch.tensor([0, 1])
        >>> run = train_side_by_side([nn.Linear(1, 2)], splits, seeds=[0], epochs=40, lr=1.0)
        >>> run.test_error.tolist()
        [0.0]
    """
    count = len(models)
    if not count == len(seeds) == len(splits.train) > 0:
        raise ValueError(
            f"models, seeds and splits must pair up, got {count}, {len(seeds)}, {len(splits.train)}"
        )
    if min(epochs, batch_size) < 1 or not 0.0 <= momentum < 1.0:
        raise ValueError(
            "epochs and batch_size must be at least 1, momentum in [0, 1), got "
            f"{epochs}, {batch_size} and {momentum}"
        )
    if min(_each("clip_scale", clip_scale, count)) == 0.0:
        raise ValueError(f"clip_scale must be positive, got {clip_scale}")
    networks = Stacked(models).train()
    params, forward = list(networks.parameters()), _Forward(networks)
    step = _Step(params, lr, momentum, weight_decay, clip_scale, scalar_lr_factor)
    generators = [generator(seed) for seed in seeds]
    with seeded(seeds[0]):  # dropout draws from the global state
        for epoch in range(epochs):
            drops = int(2 * epoch >= epochs) + int(4 * epoch >= 3 * epochs)
            orders = [torch.randperm(splits.train.shape[1], generator=g) for g in generators]
            shuffled = splits.train.gather(1, torch.stack(orders).to(splits.train.device))
            for index in shuffled.split(batch_size, dim=1):
                step(_nll(forward(splits.x[index]), splits.y[index]), lr_factor=0.1**drops)
    networks.eval()
    parts = [_measure(forward, splits, i) for i in (splits.train, splits.val, splits.test)]
    _write_back(networks, models)
    errors, nlls = torch.stack(parts, dim=1).cpu()
    return SideBySide(*errors, *nlls)


@torch.no_grad()
def _write_back(networks: Stacked, models: Sequence[nn.Module]) -> None:
    """Give each model the tensors that its network ended with."""
    for i, model in enumerate(models):
        for name, own in model.state_dict().items():
            own.copy_(getattr(networks, "stacked_" + name.replace(".", "_"))[i])
