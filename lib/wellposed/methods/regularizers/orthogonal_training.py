r"""Training classifiers whose convolutions are pushed towards orthogonal ones, and their rivals.

El Mehdi Achour, François Malgouyres, Franck Mamalet. Existence, Stability and Scalability of
Orthogonal Convolutional Neural Networks. JMLR 23(347), 2022.

The claim: the weight :math:`\lambda` of the regularizer tunes accuracy against robustness,

.. math:: \mathrm{loss}=\mathrm{CE}+\lambda\sum_{layers}L_{orth}(K).

Departures from the paper: small networks without biases, so that the product of the layers' largest
singular values bounds the network's Lipschitz constant; the rivals are ours to choose.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from wellposed.nets.circular import CircularConv, CircularNet
from wellposed.train import StackedAdam, minibatches

__all__ = ["SpectralNorm", "constrained", "fit", "repeated", "reshape_penalty"]

Penalty = Callable[[Tensor, int], Tensor]
"""Maps kernels (networks, M, C, k, k) and a stride to one number a network."""


def reshape_penalty(kernels: Tensor, stride: int = 1) -> Tensor:
    r"""How far the reshaped kernels are from orthogonal matrices.

    :math:`\|\bar K\bar K^\top-I\|_F^2` of the M x Ck² matrix, or
    :math:`\|\bar K^\top\bar K-I\|_F^2` if it has more rows than columns. Overlaps of shifted
    filters do not count: that is what :math:`L_{orth}` adds.

    Args:
        kernels: shape (r, M, C, k, k).
        stride: not used; the reshaped kernel does not know it.

    Returns:
        Shape (r,).

    Raises:
        ValueError: kernels of another shape.

    Source: the usual rival; Wang et al. 2020 call it kernel orthogonality.

    Example:
        >>> reshape_penalty(torch.tensor([1.0, 0.0, 1.0]).view(1, 1, 1, 1, 3))
        tensor([1.])
    """
    if kernels.ndim != 5:
        raise ValueError(f"kernels must have shape (r, M, C, k, k), got {tuple(kernels.shape)}")
    flat = kernels.flatten(2)
    gram = flat @ flat.mT if flat.shape[1] <= flat.shape[2] else flat.mT @ flat
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    return (gram - eye).square().sum((1, 2))


class SpectralNorm(nn.Module):
    r"""Divides each matrix of a stack by its largest singular value.

    What ``torch.nn.utils.parametrizations.spectral_norm`` approaches by power iteration, for
    several networks side by side.

    Source: Miyato et al. 2018, on the reshaped kernel.

    Example:
        >>> SpectralNorm()(torch.diag(torch.tensor([4.0, 1.0]))[None])
        tensor([[[1.0000, 0.0000],
                 [0.0000, 0.2500]]])
    """

    def __init__(self) -> None:
        super().__init__()

    def forward(self, weight: Tensor) -> Tensor:
        """Map matrices (r, m, n) to matrices of norm 1; zero stays zero."""
        largest = torch.linalg.svdvals(weight)[:, :1, None]
        return weight / torch.where(largest == 0, 1.0, largest)


def repeated(net: CircularNet, times: int) -> CircularNet:
    """The networks of a stack over and over, each copy with parameters of its own.

    Args:
        net: n networks without constraints.
        times: at least 1.

    Returns:
        ``times`` x n networks; network i is a copy of network i modulo n.

    Raises:
        ValueError: ``times`` below 1.

    Source: ours.

    Example:
        >>> net = CircularNet(2, 1, 4, 3, widths=[2], kernel_sizes=[3], strides=[2])
        >>> [layer.shape[0] for layer in repeated(net, 3).convolutions()]
        [6, 6]
    """
    if times < 1:
        raise ValueError(f"times must be at least 1, got {times}")
    table = [layer.shape for layer in net.convolutions()]
    first = net.convolutions()[0].shape
    copy = CircularNet(
        first[0] * times,
        first[2],
        net.sizes[0] * net.convolutions()[0].stride,
        table[-1][1],
        widths=[shape[1] for shape in table[:-1]],
        kernel_sizes=[shape[-1] for shape in table[:-1]],
        strides=[layer.stride for layer in net.convolutions()[:-1]],
    ).to(net.convolutions()[0].weight)
    with torch.no_grad():
        for new, old in zip(copy.convolutions(), net.convolutions(), strict=True):
            new.weight.copy_(old.weight.repeat(times, 1, 1))
    return copy


def constrained(net: CircularNet, constrain: Callable[[CircularConv], object]) -> CircularNet:
    """Put a constraint on the reshaped kernel of each layer, in place.

    Args:
        net: networks side by side.
        constrain: called with each layer; registers a parametrization of its ``weight``.

    Returns:
        The same networks.

    Raises:
        ValueError: a layer was left without a parametrization.

    Source: ours; see ``torch.nn.utils.parametrizations.orthogonal``.

    Example:
        >>> net = CircularNet(1, 1, 4, 3, widths=[2], kernel_sizes=[3], strides=[2])
        >>> net = constrained(net, torch.nn.utils.parametrizations.orthogonal)
        >>> round(reshape_penalty(net.convolutions()[0].kernel).item(), 6)
        0.0
    """
    for layer in net.convolutions():
        constrain(layer)
        if not parametrize.is_parametrized(layer, "weight"):
            raise ValueError("constrain must register a parametrization of the layer's weight")
    return net


def fit(
    net: CircularNet,
    x: Tensor,
    y: Tensor,
    rows: Tensor,
    *,
    penalty: Penalty,
    weight: Sequence[float],
    epochs: int,
    batch_size: int,
    lr: float | Sequence[float],
    generators: Sequence[torch.Generator],
) -> Tensor:
    r"""Train networks side by side with Adam, in place; the rate falls to zero like a cosine.

    Args:
        net: networks side by side.
        x: images (n, c, h, w) that the networks share.
        y: int64 labels (n,).
        rows: int64, shape (networks, m): the training images of each network.
        penalty: the regularizer, such as ``lorth_each``.
        weight: :math:`\lambda\ge0` of each network.
        epochs: passes over the training images, at least 1.
        batch_size: images a step, at least 1.
        lr: Adam's rate, one for all networks or one for each.
        generators: order of the images, one for each network.

    Returns:
        Mean cross-entropy, shape (epochs, networks).

    Raises:
        ValueError: numbers out of range, or not one weight, generator and list of rows a network.

    Source: Achour et al. 2022, experiments on images.

    Example:
        >>> net = CircularNet(1, 1, 4, 2, widths=[2], kernel_sizes=[3], strides=[2])
        >>> x, y, rows = torch.rand(6, 1, 4, 4), torch.tensor([0, 1] * 3), torch.arange(6)[None]
        >>> options = {"epochs": 2, "batch_size": 3, "lr": 0.1, "weight": [0.1]}
        >>> g = torch.Generator().manual_seed(0)
        >>> fit(net, x, y, rows, penalty=reshape_penalty, generators=[g], **options).shape
        torch.Size([2, 1])
    """
    layers = net.convolutions()
    size = layers[0].shape[0]
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs}, {batch_size}")
    if not len(weight) == len(generators) == len(rows) == size:
        raise ValueError(f"weight, generators and rows must have one entry for each of {size}")
    if min(weight) < 0:
        raise ValueError(f"weight must be at least 0, got {min(weight)}")
    if len(x) != len(y) or bool((rows < 0).any()) or bool((rows >= len(x)).any()):
        raise ValueError(f"y and rows must match the {len(x)} images of x")
    strength = x.new_tensor(list(weight))
    # Constrained layers may keep their parameters in another shape; the networks come first in all.
    adam = StackedAdam(net.parameters(), lr=lr)
    steps, step, m = epochs * -(-rows.shape[1] // batch_size), 0, rows.shape[1]
    history = []
    for _ in range(epochs):
        total = x.new_zeros(size)
        orders = [minibatches(m, batch_size, g, x.device) for g in generators]
        for batch in zip(*orders, strict=True):
            chosen = rows.gather(1, torch.stack(batch))
            logits = net(x[chosen])
            losses = F.cross_entropy(logits.flatten(0, 1), y[chosen].flatten(), reduction="none")
            losses = losses.view(size, -1)
            objective = losses.mean(1).sum()
            if max(weight) > 0:
                terms = [penalty(layer.kernel, layer.stride) for layer in layers]
                objective = objective + (strength * torch.stack(terms).sum(0)).sum()
            objective.backward()
            adam.step(0.5 + 0.5 * math.cos(math.pi * step / steps))
            total = total + losses.detach().sum(1)
            step += 1
        history.append(total / m)
    return torch.stack(history)
