"""Training side by side, with the diagnostics of the paper."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from wellposed.data.modular import ModularData
from wellposed.methods.grokking.numerical_stability.projection import _cosine
from wellposed.train import accuracy

__all__ = ["GrokkingRun", "train_grokking"]

ADAM_EPS = 1e-25
"""Adam's eps in the authors' experiments: small enough never to freeze a tiny gradient."""


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
        >>> from wellposed.data.modular import modular_dataset
        >>> from wellposed.nets.residues import GrokkingMLP
        >>> from wellposed.methods.grokking.numerical_stability.losses import softmax_cross_entropy
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
