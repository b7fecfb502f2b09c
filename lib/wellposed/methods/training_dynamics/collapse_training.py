r"""Networks for the study of neural collapse: a decay for each layer, and layers that are grown.

Tom Tirer, Haoxiang Huang and Jonathan Niles-Weed, "Perturbation Analysis of Neural Collapse",
ICML 2023, arXiv 2210.16658.

Claim: the decay of the feature layers moves the features of a network toward collapse, that of the
last layer hardly; and each layer that is trained on top of frozen ones is nearer to collapse. The
networks are

$$h_0=x,\qquad h_l=\mathrm{relu}(h_{l-1}V_l+b_l),\qquad \hat y=h_LV_{L+1},\qquad
\text{loss}=\tfrac1b\sum_i\|\hat y_i-y_i\|^2,$$

trained by SGD with momentum, where layer $l$ has a weight decay of its own.

Departures from the paper: fully connected networks on small data in both experiments, where one of
the paper's uses ResNet18 on CIFAR-10; the squared loss only; the networks of all arms and seeds are
trained side by side.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from wellposed.ops.numerics import warn_of_nan
from wellposed.train import StackedSGD

__all__ = ["GrownLayers", "ReLUNetworks", "Training", "grow_layers", "train_networks"]

Observer = Callable[[list[Tensor], Tensor], Tensor]
DROPS = (1 / 2, 3 / 4)  # shares of training after which the rate is divided by 10


@dataclass(frozen=True)
class Training:
    """What :func:`train_networks` saw on the way."""

    epochs: list[int]  # of the observations
    observed: Tensor  # (t, ...), what the observer returned


@dataclass(frozen=True)
class GrownLayers:
    """What :func:`grow_layers` made."""

    features: list[Tensor]  # (k, n, width) after each layer
    accuracy: Tensor  # (depth, k), of each layer's head on the training data


class ReLUNetworks(nn.Module):
    r"""Fully connected ReLU networks side by side, without a bias in the head.

    Weights and biases start uniform on $\pm1/\sqrt{\text{fan-in}}$, as in `nn.Linear`.

    Args:
        sizes: widths, input and output included; at least one hidden layer.
        seeds: one network for each, or as many as `copies` says.
        copies: networks that start alike, next to each other.

    Raises:
        ValueError: fewer than three sizes, a size or `copies` below 1, no seed.

    Source: Tirer et al. 2023, Section 5 (squared loss, no bias in the last layer).

    Example:
        >>> nets = ReLUNetworks((4, 3, 2), seeds=[0, 1], copies=2)
        >>> hidden, out = nets(torch.ones(4, 5, 4))
        >>> out.shape, torch.equal(out[0], out[1]), torch.equal(out[1], out[2])
        (torch.Size([4, 5, 2]), True, False)
    """

    def __init__(self, sizes: Sequence[int], *, seeds: Sequence[int], copies: int = 1) -> None:
        super().__init__()
        if len(sizes) < 3 or min(sizes) < 1:
            raise ValueError(f"sizes must be at least three positive widths, got {list(sizes)}")
        if not seeds or copies < 1:
            raise ValueError(f"seeds must not be empty and copies positive, got {copies}")
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]

        def uniform(*shape: int, fan_in: int) -> nn.Parameter:
            drawn = torch.stack([torch.rand(shape, generator=g) for g in draws])
            start = (2 * drawn - 1) / math.sqrt(fan_in)
            return nn.Parameter(start.repeat_interleave(copies, 0))

        self.weights = nn.ParameterList(uniform(a, b, fan_in=a) for a, b in pairwise(sizes))
        self.biases = nn.ParameterList(uniform(1, b, fan_in=a) for a, b in pairwise(sizes[:-1]))

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """Hidden features, each `(k, b, width)`, and outputs `(k, b, K)` of `x`, `(k, b, d)`."""
        hidden = []
        for weight, bias in zip(self.weights, self.biases):
            x = torch.baddbmm(bias, x, weight).relu()
            hidden.append(x)
        return hidden, x @ self.weights[-1]

    def layer(self, index: int) -> list[Tensor]:
        """Parameters of one layer; the last has no bias."""
        own: list[Tensor] = [self.weights[index]]
        return own if index == len(self.biases) else [*own, self.biases[index]]


def train_networks(
    networks: ReLUNetworks,
    inputs: Tensor,
    labels: Tensor,
    *,
    decays: Tensor,
    epochs: int,
    lr: float = 0.05,
    momentum: float = 0.9,
    batch_size: int = 100,
    generator: torch.Generator | None = None,
    observe: Observer | None = None,
    observe_at: Collection[int] = (),
) -> Training:
    r"""Train networks side by side, in place, each layer with a weight decay of its own.

    SGD with momentum on the squared loss (sum over classes, mean over the batch). The rate is
    divided by 10 after half and after three quarters of the epochs. Networks on the same data see
    the same batches.

    Args:
        networks: $k$ networks with $L+1$ layers.
        inputs: `(s, n, d)`, one data set for each `k / s` neighboring networks.
        labels: `(n,)`, int64, shared by the data sets.
        decays: `(k, L + 1)`, weight decay of each layer, at least 0.
        epochs: passes over the data, at least 1.
        lr: rate at the start, positive.
        momentum: in [0, 1).
        batch_size: examples a step, positive.
        generator: source of the order, on the CPU.
        observe: maps the hidden features and outputs on all data to a tensor.
        observe_at: epochs after which it is called; 0 is the start.

    Returns:
        The observations; a warning tells if a network diverged.

    Raises:
        ValueError: shapes that do not fit, a number out of range.

    Source: Tirer et al. 2023, Section 5 (rate 0.05, momentum 0.9, decay 5e-4).

    Example:
        >>> nets = ReLUNetworks((2, 8, 2), seeds=[0])
        >>> fit = lambda hidden, out: out.argmax(-1).float().mean()
        >>> run = train_networks(nets, torch.eye(2)[None], torch.tensor([0, 1]), epochs=50,
        ...                      decays=torch.zeros(1, 2), observe=fit, observe_at=[50])
        >>> run.observed.item()     # one example is given to each class
        0.5
    """
    _, per = _check(networks, inputs, labels, decays)
    if epochs < 1 or batch_size < 1 or not 0 < lr < math.inf:
        raise ValueError(
            f"epochs, batch_size and lr must be positive, got {epochs}, {batch_size}, {lr}"
        )
    sets, n = inputs.shape[:2]
    targets = nn.functional.one_hot(labels, networks.weights[-1].shape[-1]).to(inputs)
    every = [
        StackedSGD(networks.layer(i), lr=lr, momentum=momentum, weight_decay=column)
        for i, column in enumerate(decays.T.tolist())
    ]
    offsets = n * torch.arange(sets, device=inputs.device)[:, None]
    rows, seen, marks = inputs.flatten(0, 1), [], []

    def look(epoch: int) -> None:
        if observe is not None and epoch in observe_at:
            with torch.no_grad():
                seen.append(observe(*networks(inputs.repeat_interleave(per, 0))))
            marks.append(epoch)

    look(0)
    for epoch in range(epochs):
        factor = 0.1 ** sum(epoch >= drop * epochs for drop in DROPS)
        order = torch.rand(sets, n, generator=generator).argsort(1).to(inputs.device)
        for batch in order.split(batch_size, 1):
            x = rows[batch + offsets].repeat_interleave(per, 0)
            y = targets[batch].repeat_interleave(per, 0)
            # Summed over the networks: each is trained as if it were alone.
            (networks(x)[1] - y).square().sum().div(batch.shape[1]).backward()
            for one in every:
                one.step(factor)
        look(epoch + 1)
    warn_of_nan("train_networks", *networks.parameters())
    return Training(marks, torch.stack(seen) if seen else inputs.new_zeros(0))


def grow_layers(
    inputs: Tensor,
    labels: Tensor,
    *,
    width: int,
    depth: int,
    seeds: Sequence[int],
    epochs: int,
    decay: float = 5e-4,
    lr: float = 0.05,
    momentum: float = 0.9,
    batch_size: int = 100,
    generator: torch.Generator | None = None,
) -> GrownLayers:
    r"""Grow networks layer by layer: train a hidden layer and a head, freeze it, go on with it.

    Args:
        inputs: `(k, n, d)`, one data set for each network.
        labels: `(n,)`, int64, shared.
        width: of every hidden layer, positive.
        depth: hidden layers, at least 1.
        seeds: $k$ seeds of the networks.
        epochs: passes over the data for each layer.
        decay: weight decay of everything, at least 0.
        lr, momentum, batch_size, generator: as in :func:`train_networks`.

    Returns:
        The features after each layer.

    Raises:
        ValueError: shapes that do not fit, a number out of range.

    Source: Tirer et al. 2023, Section 5, layer-wise training.

    Example:
        >>> grown = grow_layers(torch.eye(2)[None], torch.tensor([0, 1]), width=8, depth=2,
        ...                     seeds=[0], epochs=50)
        >>> [tuple(h.shape) for h in grown.features], grown.accuracy[-1].item()
        ([(1, 2, 8), (1, 2, 8)], 1.0)
    """
    if depth < 1 or width < 1:
        raise ValueError(f"depth and width must be positive, got {depth} and {width}")
    if len(seeds) != len(inputs):
        raise ValueError(f"seeds must be one for each of {len(inputs)} data sets, got {len(seeds)}")
    if labels.numel() == 0:
        raise ValueError("labels must not be empty")
    classes = int(labels.max()) + 1
    features, right, x = [], [], inputs
    for level in range(depth):
        # Distinct seeds for the layers: large, odd steps do not meet those of other networks.
        own = [seed + 1_000_003 * level for seed in seeds]
        networks = ReLUNetworks((x.shape[-1], width, classes), seeds=own).to(x.device, x.dtype)
        train_networks(
            networks,
            x,
            labels,
            decays=torch.full((len(seeds), 2), decay, dtype=torch.float64),
            epochs=epochs,
            lr=lr,
            momentum=momentum,
            batch_size=batch_size,
            generator=generator,
        )
        with torch.no_grad():
            hidden, out = networks(x)
        x = hidden[0]
        features.append(x)
        right.append((out.argmax(-1) == labels).to(x.dtype).mean(-1))
    return GrownLayers(features, torch.stack(right))


def _check(
    networks: ReLUNetworks, inputs: Tensor, labels: Tensor, decays: Tensor
) -> tuple[int, int]:
    """Number of networks, and of those on one data set."""
    k, width = networks.weights[0].shape[:2]
    if inputs.ndim != 3 or inputs.shape[-1] != width or len(inputs) == 0 or k % len(inputs):
        raise ValueError(
            f"inputs must be (s, n, {width}) with s a divisor of {k}, got {tuple(inputs.shape)}"
        )
    if labels.numel() == 0 or labels.shape != inputs.shape[1:2] or labels.dtype != torch.int64:
        raise ValueError(
            f"labels must be int64 of shape ({inputs.shape[1]},), got {tuple(labels.shape)}"
        )
    classes = networks.weights[-1].shape[-1]
    if int(labels.min()) < 0 or int(labels.max()) >= classes:
        raise ValueError(f"labels must lie in 0..{classes - 1}")
    if decays.shape != (k, len(networks.weights)):
        raise ValueError(
            f"decays must have shape ({k}, {len(networks.weights)}), got {tuple(decays.shape)}"
        )
    return k, k // len(inputs)
