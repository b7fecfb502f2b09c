"""Training of small language models side by side, in one pass or on repeated data.

Lechao Xiao. Rethinking Conventional Wisdom in Machine Learning: From Generalization to Scaling.
arXiv 2409.15156, 2024.

The models and the training that the curves of
:mod:`~wellposed.methods.language_models.scaling_crossover` come from: a perceptron on the last few
characters, trained like the shared small transformer, and a perceptron on images as the contrast
from the world of small data.

Departures from the paper: characters instead of subwords, models and budgets many orders of
magnitude smaller, and for the quick runs a perceptron in the place of the transformer.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from wellposed.data.text import Corpus
from wellposed.nets.char_lm import CharLM
from wellposed.nets.transformer import Transformer
from wellposed.train.gradients import rescale_gradients_
from wellposed.train.optim import PerNetwork, StackedAdam, StackedSGD

__all__ = ["Sweep", "TrainResult", "train_char_lm", "train_classifiers", "train_sweep"]

ADAM_BETAS = (0.9, 0.95)  # common for language models; the dossier of the paper names them
WARMUP = 0.1  # share of the steps in which the rate rises, before it falls like a cosine
EVALUATED = 3000  # about so many predictions measure a loss
EVALUATION_BATCH = 1024  # windows at once


@dataclass(frozen=True)
class TrainResult:
    """What became of networks trained side by side.

    Attributes:
        train_loss: mean loss over the last tenth of the steps, in nats, shape (n,).
        valid_loss: loss on text to choose by, at the end, shape (n,); infinite after divergence.
        test_loss: loss on text to report, at the end, shape (n,); infinite after divergence.
        valid_curve: losses on text to choose by at evenly spaced steps, shape (n, evaluations).
        steps: updates made.
    """

    train_loss: Tensor
    valid_loss: Tensor
    test_loss: Tensor
    valid_curve: Tensor
    steps: int


def _targets(model: CharLM | Transformer) -> int:
    """Predictions a window: at its end for a perceptron, at every position of a transformer."""
    return 1 if isinstance(model, CharLM) else model.context


def _losses(model: CharLM | Transformer, windows: Tensor) -> Tensor:
    """Mean loss of each network on its windows (n, b, context + 1); shape (n,)."""
    n = len(windows)
    device = windows.device
    with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
        logits = model(windows[..., :-1])
    last = windows[..., -_targets(model) :].reshape(-1)
    each = F.cross_entropy(logits.reshape(-1, logits.shape[-1]).float(), last, reduction="none")
    return each.view(n, -1).mean(1)


@torch.no_grad()
def _evaluate(model: CharLM | Transformer, tokens: Tensor) -> Tensor:
    """Loss of each network on a text cut into windows that share no target; shape (n,)."""
    size = model.context + 1
    each = _targets(model)
    windows = tokens.unfold(0, size, each * max(1, len(tokens) // EVALUATED))
    n, parts = len(model.seeds), windows.split(EVALUATION_BATCH)
    total = sum(_losses(model, p.expand(n, *p.shape)) * len(p) for p in parts)
    assert isinstance(total, Tensor)
    return torch.nan_to_num(total / len(windows), nan=math.inf)


def _order(windows: int, needed: int, pool_size: int | None, generator: torch.Generator) -> Tensor:
    """Numbers of the windows in the order of training: each once, or epochs over a fixed pool."""
    if pool_size is None:
        if needed > windows:
            raise ValueError(
                f"one pass needs steps * batch_size = {needed} windows, tokens has {windows}"
            )
        return torch.randperm(windows, generator=generator)[:needed]
    if not 1 <= pool_size <= windows:
        raise ValueError(f"pool_size must be in [1, {windows}], got {pool_size}")
    pool = torch.randperm(windows, generator=generator)[:pool_size]
    epochs = [
        torch.randperm(pool_size, generator=generator) for _ in range(-(-needed // pool_size))
    ]
    return pool[torch.cat(epochs)[:needed]]


def _rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then half a cosine down to zero."""
    warm = max(1, round(WARMUP * steps))
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1.0 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


class _Adam:
    """Adam with L2 and decoupled decay for networks side by side, by torch's fused kernel.

    :class:`wellposed.train.StackedAdam` gives the same numbers in eight passes over the weights;
    here that is a third of the time of a training. It checks the arguments.
    """

    def __init__(
        self,
        params: list[Tensor],
        rates: PerNetwork,
        betas: tuple[float, float],
        l2: PerNetwork,
        decoupled_decay: PerNetwork,
    ) -> None:
        plain = StackedAdam(params, lr=rates, betas=betas, weight_decay=l2)
        shrinking = StackedAdam(params, lr=rates, weight_decay=decoupled_decay)
        self.params, self.betas, self.lr = params, betas, plain.lr
        self.l2, self.decay = plain.weight_decay, shrinking.weight_decay
        self.count = torch.zeros((), device=params[0].device)
        n = len(params[0])
        each = [float(rates)] * n if isinstance(rates, int | float) else [float(r) for r in rates]
        self.groups = [
            (rate, [i for i in range(n) if each[i] == rate]) for rate in dict.fromkeys(each)
        ]
        self.first = [torch.zeros_like(p).unbind() for p in params]
        self.second = [torch.zeros_like(p).unbind() for p in params]
        self.rows = [p.detach().unbind() for p in params]

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """One update, the rates times ``factor``; forgets the gradients."""
        grads = []
        for p, lr, l2, decay in zip(self.params, self.lr, self.l2, self.decay, strict=True):
            if isinstance(decay, Tensor) or decay > 0.0:
                p.mul_(1.0 - factor * lr * decay)
            if p.grad is not None and (isinstance(l2, Tensor) or l2 > 0.0):
                p.grad.add_(l2 * p)
            grads.append((torch.zeros_like(p) if p.grad is None else p.grad).unbind())
            p.grad = None
        self.count += 1
        for rate, members in self.groups:
            rows, steps, first, second = (
                [part[i] for part in parts for i in members]
                for parts in (self.rows, grads, self.first, self.second)
            )
            torch._fused_adam_(
                rows, steps, first, second, [], [self.count] * len(rows),
                lr=rate * factor, beta1=self.betas[0], beta2=self.betas[1], weight_decay=0.0,
                eps=1e-8, amsgrad=False, maximize=False,
            )  # fmt: skip


def train_char_lm(
    tokens: Tensor,
    model: CharLM | Transformer,
    rates: PerNetwork,
    *,
    valid_tokens: Tensor,
    test_tokens: Tensor,
    steps: int,
    batch_size: int,
    generator: torch.Generator,
    l2: PerNetwork = 0.0,
    decoupled_decay: PerNetwork = 0.0,
    pool_size: int | None = None,
    max_norm: float | None = 1.0,
    betas: tuple[float, float] = ADAM_BETAS,
    evaluations: int = 1,
) -> TrainResult:
    r"""Train language models side by side with Adam, in one pass or on repeated windows.

    Per step: gradient of the mean cross-entropy, clipped to ``max_norm`` for each network; L2 adds
    :math:`\lambda w` to the gradient, *before* Adam divides by the root of its second moment; the
    decoupled decay shrinks :math:`w` by the factor :math:`1 - \eta_t\lambda`. The rate rises over a
    tenth of the steps and falls like a cosine.

    Networks of equal seeds (``model.seeds``) see the same windows in the same order. A perceptron
    predicts one character a window, a transformer one at each position; in one pass no target
    comes twice.

    Args:
        tokens: training text, int64 (m,).
        model: networks side by side, trained in place, on the device of ``tokens``.
        rates: peak rate, or one for each network.
        valid_tokens: text to choose by, int64.
        test_tokens: text to report on, int64.
        steps: updates, at least 1.
        batch_size: windows a step, at least 1.
        generator: CPU generator of the order.
        l2: :math:`\lambda` of the penalty, or one for each network.
        decoupled_decay: :math:`\lambda` of the decay, or one for each network.
        pool_size: how many windows are repeated; None for one pass over fresh windows.
        max_norm: gradients are clipped to this norm; None for no clipping.
        betas: decay of Adam's two moments.
        evaluations: how often the validation loss is measured, at least 1 (the end).

    Returns:
        A :class:`TrainResult`.

    Raises:
        ValueError: an argument out of range, too little text for one pass, or numbers that do not
            match the networks.

    Source: ours; Adam's settings as for language models, schedule of the experiment.

    Example:
        >>> text = torch.arange(2).repeat(60)
        >>> net = CharLM(2, context=2, width=8)
        >>> done = train_char_lm(text, net, 0.1, valid_tokens=text[:20], test_tokens=text[:20],
        ...                      steps=20, batch_size=4, generator=torch.Generator())
        >>> round(done.test_loss.item(), 1)
        0.0
    """
    for name, value in {
        "steps": steps,
        "batch_size": batch_size,
        "evaluations": evaluations,
    }.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    for name, text in {
        "tokens": tokens,
        "valid_tokens": valid_tokens,
        "test_tokens": test_tokens,
    }.items():
        if text.ndim != 1 or text.dtype != torch.int64 or len(text) <= model.context:
            raise ValueError(
                f"{name} must be int64 of one axis with more than {model.context} entries, "
                f"got {text.dtype} of shape {tuple(text.shape)}"
            )
    params: list[Tensor] = list(model.parameters())
    device = tokens.device
    stride = _targets(model)
    windows = (len(tokens) - model.context - 1) // stride + 1
    sources = list(dict.fromkeys(model.seeds))
    starts = torch.stack(
        [_order(windows, steps * batch_size, pool_size, generator) for _ in sources]
    )
    starts = (stride * starts).view(len(sources), steps, batch_size).to(device)
    own = torch.tensor([sources.index(s) for s in model.seeds], device=device)
    offsets = torch.arange(model.context + 1, device=device)
    optimizer = _Adam(params, rates, betas, l2, decoupled_decay)
    marks = {round(steps * (i + 1) / evaluations) for i in range(evaluations)}
    tail = max(1, steps // 10)
    written_out = model.backward_pass() if isinstance(model, CharLM) else None
    recent, curve = torch.zeros(len(model.seeds), device=device), []
    for step in range(steps):
        batch = tokens[starts[:, step, :, None] + offsets][own]
        if written_out is not None:
            losses = written_out(batch)
        else:
            losses = _losses(model, batch)
            losses.sum().backward()
        if max_norm is not None:
            rescale_gradients_(params, max_norm, stacked=True)
        optimizer.step(_rate_factor(step, steps))
        if step >= steps - tail:
            recent += losses.detach() / tail
        if step + 1 in marks:
            curve.append(_evaluate(model, valid_tokens))
    return TrainResult(
        torch.nan_to_num(recent, nan=math.inf),
        curve[-1],
        _evaluate(model, test_tokens),
        torch.stack(curve, dim=1),
        steps,
    )


@dataclass(frozen=True)
class Sweep:
    """Losses of several settings, several seeds each, in float64 on the CPU.

    Attributes:
        valid_loss: to choose by, shape (seeds, settings).
        test_loss: to report, shape (seeds, settings).
        valid_curve: shape (seeds, settings, evaluations).
    """

    valid_loss: Tensor
    test_loss: Tensor
    valid_curve: Tensor

    def chosen(self) -> tuple[int, Tensor]:
        """The setting with the lowest mean validation loss, and its test losses (seeds,)."""
        best = int(self.valid_loss.mean(0).argmin())
        return best, self.test_loss[:, best]


def train_sweep(
    corpus: Corpus,
    make: Callable[..., CharLM | Transformer],
    rates: Sequence[float],
    *,
    seeds: Sequence[int],
    steps: int,
    batch_size: int,
    l2: Sequence[float] | None = None,
    decoupled_decay: Sequence[float] | None = None,
    pool_size: int | None = None,
    max_norm: float | None = 1.0,
    betas: tuple[float, float] = ADAM_BETAS,
    evaluations: int = 1,
    at_once: int = 400_000,
) -> Sweep:
    """Train each setting with each seed; see :func:`train_char_lm` for what a training is.

    All settings of a seed stand side by side, and so do seeds as long as their weights fit the
    cache. The order of the text follows from the seeds alone.

    Args:
        corpus: text to train on, to choose by and to report on; its device counts.
        make: called as ``make(seeds=...)``, gives networks side by side.
        rates: peak rate of each setting.
        seeds: numbers of the networks' start and of the order of the text.
        steps: updates, at least 1.
        batch_size: windows a step, at least 1.
        l2: penalty of each setting; None for none.
        decoupled_decay: decay of each setting; None for none.
        pool_size: how many windows are repeated; None for one pass.
        max_norm: gradients are clipped to this norm; None for no clipping.
        betas: decay of Adam's two moments.
        evaluations: how often the validation loss is measured.
        at_once: about so many weights are trained together, at least 1.

    Returns:
        A :class:`Sweep`.

    Raises:
        ValueError: no seed, lengths that differ, or what :func:`train_char_lm` raises.

    Source: ours.

    Example:
        >>> text = torch.arange(2).repeat(60)
        >>> corpus = Corpus(text, text[:20], text[:20], ("a", "b"))
        >>> sweep = train_sweep(corpus, lambda seeds: CharLM(2, 2, 8, seeds=seeds), [0.0, 0.1],
        ...                     seeds=[0], steps=20, batch_size=4)
        >>> sweep.chosen()[0], sweep.test_loss.shape
        (1, torch.Size([1, 2]))
    """
    count = len(rates)
    decays = {"l2": l2, "decoupled_decay": decoupled_decay}
    for name, values in decays.items():
        if values is not None and len(values) != count:
            raise ValueError(f"{name} must have {count} entries like rates, got {len(values)}")
    if len(seeds) == 0 or count == 0 or at_once < 1:
        raise ValueError("seeds and rates must not be empty, and at_once must be at least 1")
    weights = sum(p.numel() for p in make(seeds=[seeds[0]] * count).parameters())
    group = max(1, at_once // weights)
    parts: list[TrainResult] = []
    for first in range(0, len(seeds), group):
        own = list(seeds[first : first + group])
        net = make(seeds=[s for s in own for _ in rates]).to(corpus.tokens.device)
        done = train_char_lm(
            corpus.tokens,
            net,
            list(rates) * len(own),
            valid_tokens=corpus.valid,
            test_tokens=corpus.test,
            steps=steps,
            batch_size=batch_size,
            generator=torch.Generator().manual_seed(own[0]),
            l2=0.0 if l2 is None else list(l2) * len(own),
            decoupled_decay=0.0 if decoupled_decay is None else list(decoupled_decay) * len(own),
            pool_size=pool_size,
            max_norm=max_norm,
            betas=betas,
            evaluations=evaluations,
        )
        parts.append(done)

    def joined(name: str) -> Tensor:
        flat: Tensor = torch.cat([getattr(part, name) for part in parts])
        return flat.double().cpu().view(len(seeds), count, *flat.shape[1:])

    return Sweep(joined("valid_loss"), joined("test_loss"), joined("valid_curve"))


def train_classifiers(
    x: Tensor,
    y: Tensor,
    x_test: Tensor,
    y_test: Tensor,
    rates: Sequence[float],
    *,
    seeds: Sequence[int],
    width: int = 64,
    steps: int = 400,
    batch_size: int = 32,
    momentum: float = 0.9,
) -> tuple[Tensor, Tensor]:
    r"""Train perceptrons on a small data set by SGD, side by side, many epochs.

    Two ReLU layers, He start, constant rate, batches drawn with replacement. The classical regime:
    the training error vanishes for most rates, and they differ in what they predict.

    Args:
        x: inputs (n, d).
        y: int64 labels (n,).
        x_test: other inputs (n', d).
        y_test: their labels (n',).
        rates: peak rates.
        seeds: networks of each rate.
        width: units of a layer.
        steps: updates, at least 1.
        batch_size: examples a step, at least 1.
        momentum: of SGD.

    Returns:
        Shares of errors on training and test data, both of shape (seeds, rates).

    Raises:
        ValueError: an argument out of range, or lengths that do not match.

    Source: ours, for the contrast with the small-data regime in Xiao 2024.

    Example:
        >>> x, y = torch.eye(3), torch.arange(3)
        >>> train, test = train_classifiers(x, y, x, y, [0.0, 0.1], seeds=[0], steps=100)
        >>> test[0, 1].item()
        0.0
    """
    if steps < 1 or batch_size < 1 or width < 1:
        raise ValueError(
            f"steps, batch_size and width must be at least 1, got {steps}, {batch_size}, {width}"
        )
    if x.ndim != 2 or not 0 < len(x) == len(y) or not 0 < len(x_test) == len(y_test):
        raise ValueError("x must have shape (n, d) with n > 0 labels in y, and x_test likewise")
    fan = [x.shape[1], width, width, int(y.max()) + 1]
    count, layers = len(rates), []
    sources = [torch.Generator().manual_seed(s) for s in seeds]
    for i, o in pairwise(fan):
        drawn = torch.stack([torch.randn(i, o, generator=g) for g in sources]).to(x)
        layers.append((math.sqrt(2.0 / i) * drawn).repeat_interleave(count, 0).requires_grad_())
    optimizer = StackedSGD(layers, lr=list(rates) * len(seeds), momentum=momentum)
    draws = torch.stack([torch.randint(len(x), (steps, batch_size), generator=g) for g in sources])
    draws = draws.to(x.device).repeat_interleave(count, 0)

    def logits(inputs: Tensor) -> Tensor:
        h = inputs
        for layer in layers[:-1]:
            h = F.relu(h @ layer)
        return h @ layers[-1]

    for step in range(steps):
        rows = draws[:, step]
        each = F.cross_entropy(logits(x[rows]).flatten(0, 1), y[rows].flatten(), reduction="none")
        (each.sum() / batch_size).backward()
        optimizer.step()
    with torch.no_grad():
        errors = [
            (logits(part.expand(len(draws), *part.shape)).argmax(2) != label).to(x).mean(1)
            for part, label in ((x, y), (x_test, y_test))
        ]
    return errors[0].view(len(seeds), count), errors[1].view(len(seeds), count)
