"""Training on a table with corrupted labels, one network or several side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from wellposed.data.corrupted_modular import CorruptedData, LabelTable
from wellposed.methods.grokking.corrupted_data.phases import History
from wellposed.nets.quadratic import (
    QuadraticMLP,
    one_hot_columns,
    stacked_logits,
    table_logits,
)
from wellposed.nets.transformer import Transformer
from wellposed.train import StackedAdam

__all__ = ["train", "train_side_by_side", "train_transformers"]

BETAS = (0.9, 0.98)
"""Adam's two decays in the authors' code."""


def _check_training(steps: int, log_every: int, count: int, datasets: int) -> None:
    if steps < 1 or log_every < 1:
        raise ValueError(f"steps and log_every must be at least 1, got {steps} and {log_every}")
    if count < 1 or count != datasets:
        raise ValueError(f"need one data set a network, got {count} networks and {datasets}")


def _fit(
    table: LabelTable,
    backward: Callable[[], None],
    logits_of: Callable[[Tensor], Tensor],
    optimizer: StackedAdam,
    steps: int,
    log_every: int,
) -> History:
    """Step along the gradients that `backward` leaves; measure `logits_of` before and between."""
    measured, at = [], []
    for step in range(steps + 1):
        if step % log_every == 0 or step == steps:
            with torch.no_grad():
                measured.append(table.accuracies(logits_of))
            at.append(step)
        if step < steps:
            backward()
            optimizer.step()
    curves = torch.stack(measured, dim=-1).cpu()  # (4, networks, logs)
    return History(torch.tensor(at), *curves)


def _square_gradients(
    w: Tensor, before: Tensor, wanted: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the squared error in W and in the pre-activations of squared neurons."""
    hidden = before.square()  # (networks, width, pairs)
    error = torch.bmm(w, hidden).sub_(wanted).mul_(scale)
    return torch.bmm(error, hidden.mT), torch.bmm(w.mT, error).mul_(before).mul_(2)


def _one_hot_step(
    state: dict[str, Tensor], x: Tensor, wanted: Tensor, scale: Tensor, kept: Tensor | None
) -> None:
    """A batch of one-hot columns `x` through squared neurons, with gradients by hand."""
    u, v, w = (state[name].detach() for name in ("U", "V", "W"))
    before = torch.bmm(torch.cat([u, v], 2), x)
    if kept is not None:
        before *= kept
    state["W"].grad, back = _square_gradients(w, before, wanted, scale)
    if kept is not None:
        back *= kept
    slope = torch.bmm(back, x.mT)
    state["U"].grad, state["V"].grad = slope.split(u.shape[2], 2)


def _whole_table_step(state: dict[str, Tensor], table: LabelTable) -> Callable[[], None]:
    """A full batch through squared neurons, with gradients by hand.

    All pairs are cells of one table, so U e_m + V e_n is an outer sum: half the work of a product
    with one-hot columns. Cells without a training pair have no weight.
    """
    u, v, w = (state[name].detach() for name in ("U", "V", "W"))
    k, p = len(u), table.p
    cell = table.pairs[..., 0] * p + table.pairs[..., 1]
    empty = w.new_zeros(k, p * p)
    given = empty.long().scatter_add(1, cell, table.labels * table.weight.long())
    wanted = F.one_hot(given, p).mT.to(w.dtype)  # (k, p, p * p)
    share = table.weight / table.weight.sum(1, keepdim=True) * (2 / p)
    scale = empty.scatter_add(1, cell, share)[:, None]
    # On a CPU one network after another, so that its hidden layer stays in the cache.
    groups = [slice(i, i + 1) for i in range(k)] if w.device.type == "cpu" else [slice(k)]

    def backward() -> None:
        slopes = [torch.empty_like(weight) for weight in (u, v, w)]
        for i in groups:
            before = u[i, :, :, None] + v[i, :, None, :]  # (networks, width, p, p)
            slopes[2][i], back = _square_gradients(w[i], before.flatten(2), wanted[i], scale[i])
            back = back.view_as(before)
            slopes[0][i], slopes[1][i] = back.sum(3), back.sum(2)
        state["U"].grad, state["V"].grad, state["W"].grad = slopes

    return backward


def train_side_by_side(
    models: Sequence[QuadraticMLP],
    datasets: Sequence[CorruptedData],
    *,
    steps: int,
    lr: float = 0.01,
    weight_decay: float | Sequence[float] = 0.0,
    batch_size: int | None = None,
    log_every: int = 20,
    generator: torch.Generator | None = None,
) -> History:
    r"""Train several networks at once, each as if it were alone; they are changed in place.

    AdamW with decoupled decay on the squared error against one-hot labels, averaged over pairs and
    outputs.

    Args:
        models: of one size, dropout, norm and activation, on one device.
        datasets: one for each network, with one modulus; sizes may differ in full batches.
        steps: updates, at least 1.
        lr: learning rate.
        weight_decay: one number, or one for each network.
        batch_size: pairs a step; None takes all. An epoch leaves out the last, incomplete batch.
        log_every: updates between two measurements; the last one is after the last update.
        generator: of batches and dropout; None uses the global one.

    Returns:
        A `History` with curves of shape (networks, logs), on the CPU.

    Raises:
        ValueError: numbers out of range, models that differ, or sizes that do not fit.

    Source: Doshi et al. (2024): MSE, AdamW, rate 0.01, betas (0.9, 0.98).

    Example:
        >>> from wellposed.data.corrupted_modular import modular_addition_data
        >>> data = modular_addition_data(5, 0.8, 0.0, torch.Generator().manual_seed(0))
        >>> nets = [QuadraticMLP(5, 64, generator=torch.Generator().manual_seed(s)) for s in (0, 1)]
        >>> train_side_by_side(nets, [data, data], steps=100, log_every=100).train[:, -1].tolist()
        [1.0, 1.0]
    """
    _check_training(steps, log_every, len(models), len(datasets))
    template = models[0]
    kinds = {(m.p, m.width, m.dropout, m.norm is None, m.activation) for m in models}
    if len(kinds) > 1 or {d.p for d in datasets} != {template.p}:
        raise ValueError("models and datasets must all have one modulus, and models one kind")
    states = [m.state_dict() for m in models]
    state = {name: torch.stack([s[name] for s in states]) for name in states[0]}
    learned = [name for name, _ in template.named_parameters()]
    for name in learned:
        state[name].requires_grad_()
    optimizer = StackedAdam(
        [state[name] for name in learned],
        lr=lr,
        betas=BETAS,
        weight_decay=weight_decay,
        decoupled=True,
    )
    table = LabelTable.of(datasets, state["U"])
    k, n = table.labels.shape
    sizes = {len(d.train_labels) for d in datasets}
    if batch_size is not None and (len(sizes) > 1 or not 1 <= batch_size <= n):
        raise ValueError(f"batch_size must be in [1, {n}], and data of one size, got {batch_size}")
    dtype, activation = state["U"].dtype, template.activation
    x = one_hot_columns(table.pairs, template.p, dtype=dtype)  # (k, 2 p, n)
    target = F.one_hot(table.labels, template.p).mT.to(dtype)  # (k, p, n)
    scale = (table.weight / table.weight.sum(1, keepdim=True))[:, None] * (2 / template.p)
    if batch_size is not None:
        scale = torch.full_like(scale[..., :batch_size], 2 / (batch_size * template.p))
    source = x.device if generator is None else generator.device
    pending: list[tuple[Tensor, Tensor]] = []
    square = template.norm is None and activation is torch.square

    def batch() -> tuple[Tensor, Tensor]:
        if batch_size is None:
            return x, target
        if not pending:
            order = torch.rand(k, 1, n, generator=generator, device=source).argsort(2).to(x.device)
            order = order[..., : n - n % batch_size]
            epoch = [part.take_along_dim(order, 2).split(batch_size, 2) for part in (x, target)]
            pending.extend(zip(*epoch, strict=True))
        return pending.pop(0)

    def backward() -> None:
        inputs, wanted = batch()
        mask = None
        if template.dropout:
            # rand and a comparison: bernoulli_ takes several times as long.
            size = (k, template.width, inputs.shape[2])
            drawn = torch.rand(size, generator=generator, device=source).to(inputs)
            mask = drawn.ge_(template.dropout).mul_(1 / (1 - template.dropout))
        if square:
            _one_hot_step(state, inputs, wanted, scale, mask)
            return
        given = stacked_logits(
            state, inputs, activation=activation, mask=mask, batch_statistics=True
        )
        # The gradient of the squared error by hand: cheaper than building its graph. Losses are
        # summed over networks; an average would couple their learning rates.
        given.backward((given.detach() - wanted).mul_(scale))

    def logits_of(pairs: Tensor) -> Tensor:
        if template.norm is None:
            return table_logits(state, activation=activation).mT
        everything = one_hot_columns(pairs, template.p, dtype=dtype).expand(k, -1, -1)
        return stacked_logits(state, everything, activation=activation).mT

    whole = square and not template.dropout and batch_size is None
    step = _whole_table_step(state, table) if whole else backward
    history = _fit(table, step, logits_of, optimizer, steps, log_every)
    for i, model in enumerate(models):
        model.load_state_dict({name: value[i].detach() for name, value in state.items()})
    return history


def train(
    model: QuadraticMLP,
    data: CorruptedData,
    *,
    steps: int,
    lr: float = 0.01,
    weight_decay: float = 0.0,
    batch_size: int | None = None,
    log_every: int = 20,
    generator: torch.Generator | None = None,
) -> History:
    """Train one network in place; see `train_side_by_side` for the arguments.

    Args:
        model: changed in place.
        data: on any device.
        steps: updates, at least 1.
        lr: learning rate.
        weight_decay: decoupled.
        batch_size: pairs a step; None takes all.
        log_every: updates between two measurements.
        generator: of batches and dropout.

    Returns:
        A `History` with curves of shape (logs,), on the CPU.

    Raises:
        ValueError: numbers out of range.

    Source: Doshi et al. (2024).

    Example:
        >>> from wellposed.data.corrupted_modular import modular_addition_data
        >>> data = modular_addition_data(5, 0.8, 0.0, torch.Generator().manual_seed(0))
        >>> net = QuadraticMLP(5, 64, generator=torch.Generator().manual_seed(0))
        >>> train(net, data, steps=100, log_every=50).steps.tolist()
        [0, 50, 100]
    """
    runs = train_side_by_side(
        [model],
        [data],
        steps=steps,
        lr=lr,
        weight_decay=weight_decay,
        batch_size=batch_size,
        log_every=log_every,
        generator=generator,
    )
    return History(runs.steps, runs.train[0], runs.corrupted[0], runs.uncorrupted[0], runs.test[0])


def train_transformers(
    datasets: Sequence[CorruptedData],
    *,
    seeds: Sequence[int],
    steps: int,
    width: int = 128,
    heads: int = 4,
    lr: float = 0.01,
    weight_decay: float | Sequence[float] = 0.0,
    batch_size: int | None = None,
    embed_std: float = 1.0,
    log_every: int = 20,
    generator: torch.Generator | None = None,
) -> tuple[Transformer, History]:
    r"""Train one-layer transformers side by side; the answer is read at the second residue.

    Cross-entropy and AdamW. The gains of the norms stay at one.

    Args:
        datasets: one for each network, with one modulus, on one device; sizes may differ.
        seeds: one for each network, of its starting weights.
        steps: updates, at least 1.
        width: size of the residual stream, a multiple of `heads`.
        heads: attention heads.
        lr: learning rate.
        weight_decay: one number, or one for each network; decoupled.
        batch_size: pairs a step, drawn with replacement; None takes all.
        embed_std: standard deviation of the embeddings at the start.
        log_every: updates between two measurements.
        generator: of batches; None uses the global one.

    Returns:
        The networks, and a `History` with curves of shape (networks, logs), on the CPU.

    Raises:
        ValueError: numbers out of range, or counts that differ.

    Source: Doshi et al. (2024); one layer, 128 units, four heads and cross-entropy as in the
    authors' notebook.

    Example:
        >>> from wellposed.data.corrupted_modular import modular_addition_data
        >>> data = modular_addition_data(5, 0.8, 0.0, torch.Generator().manual_seed(0))
        >>> _, run = train_transformers([data], seeds=[0], steps=60, width=16, heads=2)
        >>> run.train[0, -1].item()
        1.0
    """
    _check_training(steps, log_every, len(seeds), len(datasets))
    p = datasets[0].p
    if {d.p for d in datasets} != {p}:
        raise ValueError("datasets must all have one modulus")
    nets = Transformer(
        p, context=2, width=width, depth=1, heads=heads, seeds=seeds, embed_std=embed_std
    )
    nets.to(datasets[0].train_pairs.device)
    for name, weight in nets.named_parameters():
        if name.endswith("norm") or "_norm_" in name:
            weight.requires_grad_(False)
    optimizer = StackedAdam(
        [weight for weight in nets.parameters() if weight.requires_grad],
        lr=lr,
        betas=BETAS,
        weight_decay=weight_decay,
        decoupled=True,
    )
    table = LabelTable.of(datasets, next(nets.parameters()))
    sizes = table.weight.sum(1, keepdim=True)  # (k, 1)
    if batch_size is not None and batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    source = sizes.device if generator is None else generator.device

    def answers(pairs: Tensor) -> Tensor:
        out: Tensor = nets(pairs)[:, :, -1]
        return out

    def backward() -> None:
        pairs, labels, scale = table.pairs, table.labels, table.weight / sizes
        if batch_size is not None:
            share = torch.rand(nets.size, batch_size, generator=generator, device=source).to(sizes)
            index = (share * sizes).long()  # padding stands behind, so it is never drawn
            pairs, labels = pairs.take_along_dim(index[..., None], 1), labels.gather(1, index)
            scale = torch.full_like(share, 1 / batch_size)
        surprise = F.cross_entropy(answers(pairs).mT, labels, reduction="none")
        (surprise * scale).sum().backward()  # type: ignore[no-untyped-call]

    def logits_of(pairs: Tensor) -> Tensor:
        return answers(pairs.expand(nets.size, -1, -1))

    return nets, _fit(table, backward, logits_of, optimizer, steps, log_every)
