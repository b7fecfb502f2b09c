"""Networks of one structure, trained side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.methods.regularizers.weight_compander.reparameterization import _psi
from wellposed.methods.regularizers.weight_compander.splits import Splits
from wellposed.nets import Stacked
from wellposed.nets.columns import stacked_forward
from wellposed.train import StackedSGD, generator, seeded

__all__ = ["SideBySide", "train_side_by_side"]

EVAL_CHUNK = 500  # examples a network sees at once while it is only measured

PerNetwork = float | Sequence[float]
"""One number for all networks, or one for each."""


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


def _take(x: Tensor, index: Tensor) -> Tensor:
    """``x[index]``, in a fraction of the time."""
    return x.index_select(0, index.flatten()).view(*index.shape, *x.shape[1:])


@torch.no_grad()
def _measure(forward: _Forward, splits: Splits, index: Tensor) -> Tensor:
    """Error and cross-entropy of each network on its examples ``index`` (s, m); (2, s)."""
    total = splits.x.new_zeros(2, len(index))
    for part in index.split(EVAL_CHUNK, dim=1):
        logits, y = forward(_take(splits.x, part)), splits.y[part]
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
        >>> from wellposed.methods.regularizers.weight_compander import make_splits
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
                logits = forward(_take(splits.x, index))
                step(_nll(logits, splits.y[index]), lr_factor=0.1**drops)
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
