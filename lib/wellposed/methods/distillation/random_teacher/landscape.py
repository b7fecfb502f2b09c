"""Training on labels from a student, pruned or not, and paths between the networks it leads to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.nets import Stacked
from wellposed.nets.batchnorm import recalibrate_batchnorm_
from wellposed.nets.columns import stacked_forward
from wellposed.train import StackedSGD, accuracy, minibatches

__all__ = ["finetune", "linear_path"]


def finetune(
    networks: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    epochs: int,
    generators: Sequence[torch.Generator],
    masks: Sequence[Mapping[str, Tensor]] = (),
    batch_size: int = 256,
    lr: float = 0.1,
    momentum: float = 0.9,
) -> list[nn.Module]:
    """Train networks on labels with momentum SGD, side by side, each in its own order.

    Args:
        networks: classifiers of one architecture; left as they are.
        x: inputs ``(size, n, ...)``, one slice a network.
        y: classes ``(size, n)``, int64.
        epochs: passes over the data, at least 0.
        generators: one for each network; it gives the order of its examples.
        masks: one for each network (or none at all), as :func:`magnitude_mask` makes them: pruned
            weights are zero from the start and stay so.
        batch_size: examples a step, at least 1.
        lr, momentum: constants of SGD.

    Returns:
        Trained copies, in eval mode.

    Raises:
        ValueError: lengths that do not match the number of networks.

    Source: Section 6; the optimizer of Appendix E.5 without its schedule and weight decay.

    Example:
        >>> net = nn.Linear(1, 2)
        >>> x, y = torch.tensor([[[-1.0], [1.0]]]), torch.tensor([[0, 1]])
        >>> (best,) = finetune([net], x, y, epochs=20, generators=[torch.Generator()])
        >>> best(x[0]).argmax(1).tolist()
        [0, 1]
    """
    size = len(networks)
    if not len(x) == len(y) == len(generators) == size or len(masks) not in (0, size):
        raise ValueError(
            f"x, y, generators and masks must hold one entry for each of {size} networks, got "
            f"{len(x)}, {len(y)}, {len(generators)} and {len(masks)}"
        )
    stack = Stacked(networks).train()
    parameters, names = dict(stack.named_parameters()), stack.names()
    pruned = [
        (parameters[names[name]], torch.stack([mask[name] for mask in masks]).to(x.device))
        for name in (masks[0] if masks else ())
    ]
    optimizer = StackedSGD(parameters.values(), lr=lr, momentum=momentum)
    rows = torch.arange(size, device=x.device)[:, None]
    _zero(pruned)
    for _ in range(epochs):
        orders = [minibatches(x.shape[1], batch_size, g, x.device) for g in generators]
        for parts in zip(*orders):
            index = torch.stack(parts)
            logits = stacked_forward(stack, x[rows, index])
            loss = F.cross_entropy(logits.flatten(0, 1), y[rows, index].flatten(), reduction="sum")
            (loss / index.shape[1]).backward()
            optimizer.step()
            _zero(pruned)
    return [net.eval() for net in stack.networks()]


@torch.no_grad()
def _zero(pruned: Sequence[tuple[Tensor, Tensor]]) -> None:
    """Set the pruned weights to zero again: a step moves them, momentum too."""
    for parameter, mask in pruned:
        parameter.mul_(mask)


@torch.no_grad()
def linear_path(
    first: Sequence[nn.Module],
    second: Sequence[nn.Module],
    x: Tensor,
    y: Tensor,
    *,
    calibration: Tensor,
    points: int = 11,
) -> Tensor:
    r"""Error along the straight line between pairs of networks, in weight space.

    .. math:: \theta(\gamma) = (1 - \gamma)\, \theta_1 + \gamma\, \theta_2,
              \qquad \gamma = 0, \dots, 1

    Args:
        first, second: networks, paired; all of one architecture.
        x: inputs ``(pairs, n, ...)``, one slice a pair.
        y: classes ``(pairs, n)``, int64.
        calibration: inputs ``(pairs, k, ...)`` of which the statistics of batch normalization are
            taken anew at every point: those of the ends do not fit in between.
        points: number of points on the line, ends included, at least 2.

    Returns:
        Error rates, shape ``(pairs, points)``, float32.

    Raises:
        ValueError: lengths that do not match, no pair or no input, or fewer than two points.

    Source: Section 6, "Linear Mode Connectivity".

    Example:
        >>> a, b = nn.Linear(1, 2, bias=False), nn.Linear(1, 2, bias=False)
        >>> _ = a.weight.data.copy_(torch.tensor([[1.0], [0.0]]))
        >>> _ = b.weight.data.copy_(torch.tensor([[0.0], [2.0]]))
        >>> x, y = torch.ones(1, 1, 1), torch.tensor([[0]])
        >>> linear_path([a], [b], x, y, calibration=x, points=3)
        tensor([[0., 1., 1.]])
    """
    lengths = {len(first), len(second), len(x), len(y), len(calibration)}
    if points < 2 or len(lengths) > 1 or 0 in (*y.shape, *calibration.shape):
        raise ValueError(
            "first, second, x, y and calibration must have one entry a pair, and points be at "
            f"least 2, got {len(first)}, {len(second)}, {len(x)}, {len(y)}, {len(calibration)} "
            f"and {points}"
        )
    ends, other = Stacked(first).eval(), dict(Stacked(second).named_parameters())
    start = {name: p.clone() for name, p in ends.named_parameters()}
    errors = []
    for gamma in torch.linspace(0.0, 1.0, points).tolist():
        for name, parameter in ends.named_parameters():
            parameter.copy_((1.0 - gamma) * start[name] + gamma * other[name])
        recalibrate_batchnorm_(ends, calibration)
        errors.append(1.0 - accuracy(stacked_forward(ends, x), y))
    return torch.stack(errors, dim=1)
