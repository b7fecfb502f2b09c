"""Batch normalization whose statistics are taken again, in one network or several side by side."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from wellposed.nets import Stacked
from wellposed.nets.columns import stacked_forward

__all__ = ["recalibrate_batchnorm", "recalibrate_batchnorm_"]


@torch.no_grad()
def recalibrate_batchnorm(module: nn.Module, inputs: Tensor) -> nn.Module:
    """Estimate the statistics of all batch normalization layers again, on one big batch.

    Args:
        module: any network; left as it is.
        inputs: what the statistics are taken of, shape ``(n, ...)`` with ``n >= 2``.

    Returns:
        A copy in eval mode whose running means and variances are those of ``inputs``.

    Raises:
        ValueError: fewer than two inputs.

    Source: ours; the control for a network whose statistics were never updated.

    Example:
        >>> net = recalibrate_batchnorm(nn.BatchNorm1d(1), torch.tensor([[1.0], [3.0]]))
        >>> net.running_mean.item(), net.running_var.item()
        (2.0, 2.0)
    """
    if inputs.shape[0] < 2:
        raise ValueError(f"inputs must hold at least two examples, got {inputs.shape[0]}")
    twin = copy.deepcopy(module)
    recalibrate_batchnorm_(twin, inputs)
    return twin


@torch.no_grad()
def recalibrate_batchnorm_(network: nn.Module, inputs: Tensor) -> Tensor:
    """Replace the statistics of all batch normalization layers in place, by those of one big batch.

    Args:
        network: any network, or several :class:`~wellposed.nets.Stacked`; it ends in eval mode.
        inputs: what the statistics are taken of, ``(n, ...)`` with ``n >= 2``, or
            ``(size, n, ...)`` for stacked networks.

    Returns:
        The outputs of this batch, each layer normalized by the batch itself.

    Raises:
        ValueError: fewer than two inputs to a layer of batch normalization (torch says so).

    Source: ours.

    Example:
        >>> layer = nn.BatchNorm1d(1)
        >>> _ = recalibrate_batchnorm_(layer, torch.tensor([[1.0], [3.0]]))
        >>> layer.running_mean.item(), layer.training
        (2.0, False)
    """
    layers = network.template if isinstance(network, Stacked) else network
    norms = [m for m in layers.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    rates = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this batch replace what was there
    network.train(bool(norms))
    out: Tensor = (
        stacked_forward(network, inputs) if isinstance(network, Stacked) else network(inputs)
    )
    network.eval()
    for norm, rate in zip(norms, rates):
        norm.momentum = rate
    return out
