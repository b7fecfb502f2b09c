r"""To grok or not to grok: generalization and memorization on corrupted algorithmic data.

Doshi, Das, He and Gromov, ICLR 2024, arXiv 2310.13061.

Claim: a network can learn addition modulo p and, at the same time, learn wrong labels by heart.
Different neurons do the two jobs. A neuron that generalizes is a single wave in Fourier space, so
its inverse participation ratio tells it apart; pruning the other neurons removes the memorized
labels. Weight decay and dropout turn all neurons into waves, BatchNorm turns the others down.

    z = W (U e_m + V e_n)^2,   IPR_r(u) = sum_j (|u^_j| / |u^|_2)^(2 r),   u^ = rfft(u)

Departures from the paper:
- Networks of several seeds, weight decays and data sets are trained side by side.
- The transformer is the book's (root-mean-square norms, GELU); the authors' has neither norm nor
  GELU and scales its output for width.
- The phases are told apart by thresholds on two accuracies, ours.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.data.corrupted_modular import CorruptedData, LabelTable, modular_addition_data
from wellposed.nets.quadratic import (
    QuadraticMLP,
    analytic_mlp,
    one_hot_columns,
    stacked_logits,
)
from wellposed.nets.transformer import Transformer
from wellposed.train import StackedAdam

__all__ = [
    "PHASES",
    "Accuracies",
    "CorruptedData",
    "History",
    "QuadraticMLP",
    "analytic_mlp",
    "evaluate",
    "inverse_participation_ratio",
    "modular_addition_data",
    "neuron_ipr",
    "neuron_magnitude",
    "prune_neurons",
    "train",
    "train_side_by_side",
    "train_transformers",
    "training_phase",
    "two_stages",
]

PHASES = ("memorization", "coexistence", "partial inversion", "full inversion", "forgetting")
"""Names of the phases, in the order of the codes of `training_phase`."""

BETAS = (0.9, 0.98)
"""Adam's two decays in the authors' code."""


@dataclass(frozen=True)
class Accuracies:
    """Shares of pairs answered as labeled.

    Attributes:
        train: over all training pairs, against the given labels.
        corrupted: over the corrupted training pairs, against the corrupted label; NaN without any.
        uncorrupted: over the other training pairs.
        test: over the held-out pairs, against the true sum.
    """

    train: float
    corrupted: float
    uncorrupted: float
    test: float


@dataclass(frozen=True)
class History:
    """Accuracies during training.

    Attributes:
        steps: number of updates done at each log, int64, shape (logs,).
        train, corrupted, uncorrupted, test: as in `Accuracies`; shape (logs,) for one network,
            (networks, logs) for several.
    """

    steps: Tensor
    train: Tensor
    corrupted: Tensor
    uncorrupted: Tensor
    test: Tensor


# --- telling neurons apart, and pruning -----------------------------------------------------------


def inverse_participation_ratio(vectors: Tensor, r: int = 2) -> Tensor:
    r"""How few frequencies a real vector is made of: 1 for one wave.

    $\mathrm{IPR}_r=\sum_j(|\hat u_j|/\|\hat u\|_2)^{2r}$ over the $\lfloor p/2\rfloor+1$
    frequencies of the one-sided transform. All frequencies alike give one over their number to the
    power $r-1$. A constant vector has one frequency, zero, and IPR 1 as well.

    Args:
        vectors: real, shape (..., p).
        r: exponent, at least 1 (where the ratio is always 1).

    Returns:
        Shape (...), in [0, 1]; 0 for a vector of zeros.

    Raises:
        ValueError: `r` below 1, or a tensor that is not real floating point or has no entries
            along its last dimension.

    Source: Doshi et al. (2024), with r = 2; the one-sided transform is the authors' code.

    Example:
        >>> vectors = torch.tensor([[1.0, 0.0, -1.0, 0.0], [1.0, 0.0, 0.0, 0.0]])
        >>> [round(v, 4) for v in inverse_participation_ratio(vectors).tolist()]
        [1.0, 0.3333]
    """
    if r < 1:
        raise ValueError(f"r must be at least 1, got {r}")
    if not vectors.is_floating_point() or vectors.ndim == 0 or vectors.shape[-1] == 0:
        raise ValueError(
            f"vectors must be floating point of shape (..., p), got {vectors.dtype} "
            f"{tuple(vectors.shape)}"
        )
    if vectors.numel() == 0:  # which the transform does not accept
        return vectors.new_zeros(vectors.shape[:-1])
    # The ratio does not depend on the scale; dividing first keeps squares from overflowing.
    scale = vectors.abs().amax(-1, keepdim=True)
    power = torch.fft.rfft(vectors / scale.where(scale > 0, 1.0)).abs().square()
    total = power.sum(-1, keepdim=True)
    ratio: Tensor = (power / total.where(total > 0, 1.0)).pow(r).sum(-1)
    return ratio


def neuron_ipr(model: QuadraticMLP, r: int = 2) -> Tensor:
    r"""A neuron's score: the mean ratio of its rows of U and V and its column of W.

    Args:
        model: a `QuadraticMLP`.
        r: exponent, at least 1.

    Returns:
        Shape (width,), in [0, 1], detached.

    Raises:
        ValueError: `r` below 1.

    Source: Doshi et al. (2024).

    Example:
        >>> net = analytic_mlp(7, 3, torch.Generator().manual_seed(0))
        >>> [round(v, 3) for v in neuron_ipr(net).tolist()]
        [1.0, 1.0, 1.0]
    """
    weights = torch.stack([model.U, model.V, model.W.T]).detach()  # (3, width, p)
    scores: Tensor = inverse_participation_ratio(weights, r).mean(0)
    return scores


def neuron_magnitude(model: QuadraticMLP) -> Tensor:
    r"""The competing score: $\|U_{k\cdot}\|\,\|V_{k\cdot}\|\,\|W_{\cdot k}\|$.

    Args:
        model: a `QuadraticMLP`.

    Returns:
        Shape (width,), at least 0, detached.

    Source: ours; magnitude is the usual score in pruning.

    Example:
        >>> net = QuadraticMLP(4, 2)
        >>> for weight in net.parameters():
        ...     _ = weight.data.fill_(1.0)
        >>> neuron_magnitude(net).tolist()  # 2 * 2 * 2
        [8.0, 8.0]
    """
    rows = torch.stack([model.U, model.V, model.W.T]).detach()  # (3, width, p)
    size: Tensor = torch.linalg.vector_norm(rows, dim=2).prod(0)
    return size


def prune_neurons(
    model: QuadraticMLP,
    fraction: float,
    order: str = "low",
    generator: torch.Generator | None = None,
    *,
    score: Tensor | None = None,
) -> QuadraticMLP:
    r"""A copy of the network with some neurons set to zero.

    Args:
        model: a `QuadraticMLP`; left as it is.
        fraction: share of the neurons, in [0, 1]; `int(fraction * width)` of them are pruned.
        order: which neurons go first: those of the "low" or "high" scores, or "random" ones.
        generator: CPU generator of the random order.
        score: one number a neuron, shape (width,); None takes `neuron_ipr`.

    Returns:
        The copy; rows of U and V and columns of W of pruned neurons are zero.

    Raises:
        ValueError: `fraction` outside [0, 1], an unknown order, or a score of another shape.

    Source: Doshi et al. (2024).

    Example:
        >>> net = QuadraticMLP(5, 4)
        >>> pruned = prune_neurons(net, 0.5, score=torch.tensor([3.0, 0.0, 2.0, 1.0]))
        >>> pruned.U.abs().sum(1).gt(0).tolist()
        [True, False, True, False]
    """
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"fraction must be in [0, 1], got {fraction}")
    if order not in ("low", "high", "random"):
        raise ValueError(f"order must be 'low', 'high' or 'random', got {order!r}")
    if score is not None and score.shape != (model.width,):
        raise ValueError(f"score must have shape ({model.width},), got {tuple(score.shape)}")
    if order == "random":
        ranked = torch.randperm(model.width, generator=generator)
    else:
        chosen = neuron_ipr(model) if score is None else score
        ranked = chosen.argsort(descending=order == "high", stable=True)
    gone = ranked[: int(fraction * model.width)].to(model.U.device)
    pruned = copy.deepcopy(model)
    with torch.no_grad():
        pruned.U[gone], pruned.V[gone], pruned.W[:, gone] = 0.0, 0.0, 0.0
    return pruned


# --- measuring ------------------------------------------------------------------------------------


def evaluate(model: nn.Module, data: CorruptedData) -> Accuracies:
    """The four accuracies of a network, in evaluation mode.

    Args:
        model: maps pairs (B, 2) to scores (B, p), such as `QuadraticMLP`; its mode is restored.
        data: on any device.

    Returns:
        An `Accuracies` of floats; `corrupted` is NaN if no label is corrupted.

    Source: Doshi et al. (2024).

    Example:
        >>> data = modular_addition_data(7, 0.5, 0.0)
        >>> evaluate(analytic_mlp(7, 600, torch.Generator().manual_seed(0)), data).test
        1.0
    """
    like = next(p for p in model.parameters() if p.is_floating_point())
    mode = model.training
    model.eval()
    with torch.no_grad():
        values = LabelTable.of([data], like).accuracies(lambda pairs: model(pairs)[None])
    model.train(mode)
    return Accuracies(*values[:, 0].tolist())


def training_phase(
    corrupted: Tensor, test: Tensor, *, low: float = 0.1, high: float = 0.9
) -> Tensor:
    """The phase that two accuracies tell, as an index into `PHASES`.

    Where test accuracy is at least `high`: coexistence if corrupted accuracy is at least `high`,
    full inversion if it is at most `low`, else partial inversion. Elsewhere: memorization if
    corrupted accuracy is at least `high`, else forgetting (or never learned).

    Args:
        corrupted: accuracy on corrupted labels, any shape.
        test: accuracy on held-out pairs, same shape.
        low, high: thresholds, 0 <= low < high <= 1; ours.

    Returns:
        int64 codes of the shape of `test`.

    Raises:
        ValueError: shapes that differ, or thresholds out of order.

    Source: the phases of Doshi et al. (2024).

    Example:
        >>> corrupted, test = torch.tensor([[1.0, 1.0, 0.5, 0.0, 0.0], [0.0, 1.0, 1.0, 1.0, 0.0]])
        >>> training_phase(corrupted, test).tolist()
        [0, 1, 2, 3, 4]
    """
    if corrupted.shape != test.shape:
        raise ValueError(
            f"corrupted and test must have one shape, got {tuple(corrupted.shape)} and "
            f"{tuple(test.shape)}"
        )
    if not 0.0 <= low < high <= 1.0:
        raise ValueError(f"thresholds must satisfy 0 <= low < high <= 1, got {low} and {high}")
    fits, ignores = corrupted >= high, corrupted <= low
    general = torch.where(fits, 1, torch.where(ignores, 3, 2))
    return torch.where(test >= high, general, torch.where(fits, 0, 4))


def two_stages(history: History, *, level: float = 0.5) -> tuple[Tensor, Tensor]:
    """When each network grokked, and when it unlearned its corrupted labels.

    Args:
        history: curves of shape (networks, logs).
        level: the accuracy to cross, in (0, 1).

    Returns:
        Two float64 tensors of shape (networks,): the first step with test accuracy at least
        `level`; and the first one after the highest corrupted accuracy at which that is below
        `level`. Infinity where it does not happen.

    Raises:
        ValueError: `level` outside (0, 1), or curves of another shape.

    Source: the two stages of Doshi et al. (2024); the measure is ours.

    Example:
        >>> curve = torch.tensor([[0.0, 0.9, 1.0, 0.1]])
        >>> run = History(torch.arange(4) * 10, curve, curve, curve, curve.cummax(1).values)
        >>> [t.item() for t in two_stages(run)]
        [10.0, 30.0]
    """
    if not 0.0 < level < 1.0:
        raise ValueError(f"level must be in (0, 1), got {level}")
    shape = history.corrupted.shape
    logs = len(history.steps)
    if len(shape) != 2 or history.test.shape != shape or shape[1] != logs or logs == 0:
        raise ValueError(
            f"history must hold curves of shape (networks, {logs}), with at least one log, got "
            f"{tuple(shape)} and {tuple(history.test.shape)}"
        )
    steps = history.steps.double().expand(history.test.shape)
    peak = history.corrupted.argmax(1, keepdim=True)
    later = torch.arange(steps.shape[1], device=steps.device) > peak
    grokked = torch.where(history.test >= level, steps, torch.inf).amin(1)
    unlearned = torch.where(later & (history.corrupted < level), steps, torch.inf).amin(1)
    return grokked, unlearned


# --- training -------------------------------------------------------------------------------------


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
    pending: list[Tensor] = []

    def batch() -> tuple[Tensor, Tensor]:
        if batch_size is None:
            return x, target
        if not pending:
            order = torch.rand(k, 1, n, generator=generator, device=source).argsort(2).to(x.device)
            pending.extend(order[..., : n - n % batch_size].split(batch_size, dim=2))
        index = pending.pop(0)
        return x.take_along_dim(index, 2), target.take_along_dim(index, 2)

    def backward() -> None:
        inputs, wanted = batch()
        mask = None
        if template.dropout:
            # rand and a comparison: bernoulli_ takes several times as long.
            size = (k, template.width, inputs.shape[2])
            kept = torch.rand(size, generator=generator, device=source)
            mask = kept.to(inputs).ge(template.dropout).to(dtype) / (1 - template.dropout)
        given = stacked_logits(
            state, inputs, activation=activation, mask=mask, batch_statistics=True
        )
        # The gradient of the squared error by hand: cheaper than building its graph. Losses are
        # summed over networks; an average would couple their learning rates.
        given.backward((given.detach() - wanted).mul_(scale))

    def logits_of(pairs: Tensor) -> Tensor:
        everything = one_hot_columns(pairs, template.p, dtype=dtype).expand(k, -1, -1)
        return stacked_logits(state, everything, activation=activation).mT

    history = _fit(table, backward, logits_of, optimizer, steps, log_every)
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
