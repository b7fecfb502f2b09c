r"""Nested dropout: compress the features, so that little room is left for wrong labels.

Y. Chen, S. X. Hu, X. Shen, C. Ai, J. A. K. Suykens, "Compressing Features for Learning with Noisy
Labels", IEEE TNNLS 2022, arXiv:2206.13140 (workshop version: arXiv:2104.13766).

Claim: a network whose features are cut off at a random width :math:`k` in training memorizes far
fewer wrong labels, and puts what matters into its first channels. With features
:math:`h = f(x) \in \mathbb R^D` and a linear classifier :math:`W` without bias,

.. math:: s = W\,(h \odot m_k), \qquad m_k = (\underbrace{1, \dots, 1}_{k}, 0, \dots, 0), \qquad
          P(k) \propto \exp\!\bigl(-((k - \mu)/\eta)^2\bigr), \quad k = 1, \dots, D .

Two such networks then clean the data for each other by co-teaching (stage two).

Departures from the paper: validation labels are noisy here, the paper's are clean. Weights are
those of the last epoch, the authors keep the epoch that is best on validation data. There is no
warm-up of the step size. In co-teaching each network draws its own cut points: with one cut point
an example there is nothing that the two could share.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.data.label_noise import NoisyTask, check_tasks, outcome_shares
from wellposed.nets import Stacked
from wellposed.ops.numerics import warn_of_nan
from wellposed.train import StackedAdam, StackedSGD, accuracy, generator, minibatches, seeded

__all__ = [
    "CoTeachingRun",
    "CompressedNetworks",
    "CompressedRun",
    "NestedDropout",
    "bias_variance",
    "co_teach",
    "fit_regression",
    "nested_distribution",
    "select_truncation",
    "small_loss_indices",
    "train_compressed",
    "truncate",
]

PENALTY = 1e-5  # on each further channel when the width is chosen: of equals, the narrower wins


@dataclass(frozen=True)
class CompressedRun:
    """Networks side by side, measured after each epoch; fields have shape ``(s, epochs)``.

    With ``measure_every`` above 1 there are fewer columns. All accuracies are those of the network
    as it would be used: at the width ``keep``.

    Attributes:
        memorized: share of the wrongly labeled training points predicted as their wrong label.
        correct: share of them predicted as their true class.
        val_accuracy: accuracy on the noisy validation labels.
        test_accuracy: accuracy on the clean test labels.
        keep: number of channels in use, chosen on the noisy validation labels.
    """

    memorized: Tensor
    correct: Tensor
    val_accuracy: Tensor
    test_accuracy: Tensor
    keep: Tensor

    @property
    def early_stopped(self) -> Tensor:
        """Test accuracy ``(s,)`` at the (first) epoch with the best noisy validation accuracy."""
        return self.test_accuracy.gather(1, self.val_accuracy.argmax(1, keepdim=True)).squeeze(1)


@dataclass(frozen=True)
class CoTeachingRun(CompressedRun):
    """The same for pairs of networks, whose logits are averaged.

    Attributes:
        purity: share of correct labels among the examples that were selected for training.
    """

    purity: Tensor


def nested_distribution(num_features: int, std: float, mean: float = 0.0) -> Tensor:
    r"""Distribution of the cut point: :math:`P(k) \propto \exp(-((k-\mu)/\eta)^2)`.

    There is no factor 1/2 in the exponent, so :math:`\eta` is not a standard deviation.

    Args:
        num_features: number :math:`D` of channels, at least 1.
        std: :math:`\eta > 0`; small is strong compression.
        mean: :math:`\mu`, 0 in all of the paper's experiments.

    Returns:
        Shape ``(D,)``, float64, sums to one; entry ``j`` is :math:`P(k = j + 1)`.

    Raises:
        ValueError: ``num_features`` below 1 or ``std`` not positive.

    Source: Section III; the exponent is that of the authors' ``GaussianDist``.

    Example:
        >>> p = nested_distribution(2, std=1.0)
        >>> round((p[0] / p[1]).log().item(), 6)  # 2^2 - 1^2
        3.0
    """
    if num_features < 1:
        raise ValueError(f"num_features must be at least 1, got {num_features}")
    if not std > 0:
        raise ValueError(f"std must be positive, got {std}")
    k = torch.arange(1, num_features + 1, dtype=torch.float64)
    # A softmax: far from the mean, all of the exponentials themselves would round to zero.
    return torch.softmax(-(((k - mean) / std) ** 2), dim=0)


def truncate(x: Tensor, k: int) -> Tensor:
    """Keep the first k features and set the rest to zero.

    Args:
        x: features, shape ``(..., D)``.
        k: number of channels to keep, in 1..D.

    Returns:
        The same shape and dtype.

    Raises:
        ValueError: ``k`` outside 1..D.

    Source: Section III.

    Example:
        >>> truncate(torch.ones(3), 2).tolist()
        [1.0, 1.0, 0.0]
    """
    if not 1 <= k <= x.shape[-1]:
        raise ValueError(f"k must lie in 1..{x.shape[-1]}, got {k}")
    return x * (torch.arange(x.shape[-1], device=x.device) < k)


class NestedDropout(nn.Module):
    r"""In training, zero all but the first k features; nothing is rescaled.

    Draws from torch's global random state, as ``nn.Dropout`` does. Channel :math:`j` survives where
    a uniform number lies below :math:`P(k \ge j)`, which falls with :math:`j`: one comparison
    gives the whole mask.

    Args:
        num_features: number :math:`D` of channels, at least 1.
        std, mean: :math:`\eta` and :math:`\mu` of :func:`nested_distribution`.
        per_sample: draw a cut point for each example; False (the paper) draws one a batch.

    Attributes:
        keep: in evaluation, the number of channels kept; None keeps them all.

    Raises:
        ValueError: a hyper-parameter out of range, or an input without D features.

    Source: Section III and the authors' training loop.

    Example:
        >>> NestedDropout(3, std=0.1)(torch.ones(1, 3)).tolist()  # P(k = 1) is one
        [[1.0, 0.0, 0.0]]
    """

    survival: Tensor

    def __init__(
        self, num_features: int, std: float, mean: float = 0.0, per_sample: bool = False
    ) -> None:
        super().__init__()
        p = nested_distribution(num_features, std, mean)
        survival = p.flip(0).cumsum(0).flip(0).clamp(max=1.0)
        survival[0] = 1.0  # exactly: the first channel always survives
        self.register_buffer("survival", survival)
        self.std, self.mean, self.per_sample = std, mean, per_sample
        self.keep: int | None = None

    def extra_repr(self) -> str:
        d = len(self.survival)
        return f"{d}, std={self.std}, mean={self.mean}, per_sample={self.per_sample}"

    def forward(self, x: Tensor) -> Tensor:
        """Map features (B, D) to features (B, D), with a suffix of the channels set to zero."""
        if x.ndim != 2 or x.shape[1] != len(self.survival):
            raise ValueError(f"x must have shape (B, {len(self.survival)}), got {tuple(x.shape)}")
        if not self.training:
            return x if self.keep is None else truncate(x, self.keep)
        rows = len(x) if self.per_sample else 1
        u = torch.rand(rows, 1, dtype=self.survival.dtype, device=x.device)
        return x * (u < self.survival)


def _by_width(features: Tensor, weight: Tensor) -> Tensor:
    """Logits of all truncations, (D, n, C): channels enter the sum one after the other."""
    return (features.T[:, :, None] * weight.T[:, None, :]).cumsum(dim=0)


def _pick(logits: Tensor, labels: Tensor, penalty: float) -> tuple[int, Tensor]:
    """The best width, and the accuracies of all, from logits (D, n, C)."""
    accuracies = accuracy(logits, labels.expand(logits.shape[:2]))
    cost = penalty * torch.arange(len(logits), dtype=torch.float64, device=logits.device)
    return int((accuracies - cost).argmax()) + 1, accuracies


def select_truncation(
    features: Tensor, weight: Tensor, labels: Tensor, penalty: float = PENALTY
) -> tuple[int, Tensor]:
    r"""Choose how many channels to keep: :math:`\arg\max_k\,\mathrm{acc}_k - \epsilon (k - 1)`.

    Args:
        features: :math:`h`, shape ``(n, D)``.
        weight: classifier :math:`W`, shape ``(C, D)``.
        labels: classes of validation examples, shape ``(n,)``, int64.
        penalty: :math:`\epsilon \ge 0`, the price of a channel.

    Returns:
        The number ``k`` of channels, in 1..D, and the accuracies of all truncations, ``(D,)``.

    Raises:
        ValueError: shapes that do not match or are empty, or a negative ``penalty``.

    Source: the authors' ``TestNested`` (their stored K counts from zero: it is ``k - 1``).

    Example:
        >>> h, W = torch.tensor([[1.0, 5.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> k, accuracies = select_truncation(h, W, torch.tensor([1]))
        >>> k, accuracies.tolist()
        (2, [0.0, 1.0])
    """
    n = len(labels)
    fits = weight.ndim == 2 and features.shape == (n, weight.shape[1])
    if not fits or 0 in (n, *weight.shape):
        raise ValueError(
            "features, weight and labels must have shapes (n, D), (C, D), (n,), not empty, got "
            f"{tuple(features.shape)}, {tuple(weight.shape)} and {tuple(labels.shape)}"
        )
    if not penalty >= 0:
        raise ValueError(f"penalty must be at least 0, got {penalty}")
    return _pick(_by_width(features, weight), labels, penalty)


def small_loss_indices(losses: Tensor, forget_rate: float) -> Tensor:
    r"""Positions of the :math:`\lfloor (1 - r) B \rfloor` smallest losses, smallest first.

    Args:
        losses: one a sample, shape ``(..., B)``; leading axes are separate batches.
        forget_rate: share :math:`r` of the samples to leave out, in [0, 1).

    Returns:
        int64, shape ``(..., kept)``; at least one is kept, also where the formula gives none.

    Raises:
        ValueError: ``forget_rate`` outside [0, 1), or no loss.

    Source: stage two; the authors' ``SampleSelection``.

    Example:
        >>> small_loss_indices(torch.tensor([0.3, 0.1, 0.2]), 0.3).tolist()
        [1, 2]
    """
    if not 0.0 <= forget_rate < 1.0:
        raise ValueError(f"forget_rate must lie in [0, 1), got {forget_rate}")
    if losses.ndim == 0 or losses.shape[-1] == 0:
        raise ValueError(f"losses must have shape (..., B) with B >= 1, got {tuple(losses.shape)}")
    return losses.argsort(dim=-1, stable=True)[..., : _kept(forget_rate, losses.shape[-1])]


def _kept(forget_rate: float, count: int) -> int:
    # (1 - 0.9) * 10 is 0.99999... in floating point; the small number mends that.
    return max(1, int((1.0 - forget_rate) * count + 1e-9))


def bias_variance(log_q: Tensor, p: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    r"""Split the expected cross-entropy of a network with random features (Theorem 1).

    .. math:: E\bigl[-\log q(y|z)\bigr] = \mathrm{KL}(p \,\|\, \tilde q)
              + E_z \mathrm{KL}(\tilde q \,\|\, q(\cdot|z)) + H(p), \qquad
              \tilde q = \frac{\exp E_z \log q(\cdot|z)}{Z}

    The variance, the second term, equals :math:`-\log Z`.

    Args:
        log_q: normalized log-probabilities under draws of :math:`z`, shape ``(draws, B, C)``.
        p: true probabilities of the classes, shape ``(B, C)``.

    Returns:
        Bias, variance and entropy, means over the B inputs, scalars.

    Raises:
        ValueError: shapes that do not match, or no draw or input.

    Source: Theorem 1.

    Example:
        >>> log_q = torch.tensor([[[0.8, 0.2]], [[0.2, 0.8]]]).log()  # undecided, and certain of it
        >>> bias, variance, entropy = bias_variance(log_q, torch.tensor([[0.5, 0.5]]))
        >>> round(bias.item(), 4), round(variance.exp().item(), 4)  # 1 / (2 * sqrt(0.8 * 0.2))
        (0.0, 1.25)
    """
    if log_q.ndim != 3 or log_q.shape[1:] != p.shape or 0 in log_q.shape:
        raise ValueError(
            "log_q and p must have shapes (draws, B, C) and (B, C), none of them empty, got "
            f"{tuple(log_q.shape)} and {tuple(p.shape)}"
        )
    mean_log = log_q.mean(dim=0)
    log_z = mean_log.logsumexp(dim=-1, keepdim=True)
    surprise = torch.where(p > 0, -p * (mean_log - log_z), 0.0).sum(dim=-1)
    entropy = torch.special.entr(p).sum(dim=-1)
    return (surprise - entropy).mean(), -log_z.mean(), entropy.mean()


class CompressedNetworks(nn.Module):
    """Networks of the form (features, compression, linear map without bias), side by side.

    Features and linear maps are stacked; each network has a compression of its own, so that plain
    networks (``nn.Identity``), dropout and nested dropout can be trained in one go.

    Args:
        networks: ``nn.Sequential(features, compression, linear)`` each; they are copied.

    Raises:
        ValueError: no network, or one of another form.

    Source: Section III; the networks of ``nested/model`` in the authors' code.

    Example:
        >>> net = nn.Sequential(nn.Flatten(), NestedDropout(2, 1.0), nn.Linear(2, 1, bias=False))
        >>> pair = CompressedNetworks([net, net])
        >>> pair.by_width(torch.ones(2, 3, 2)).shape  # networks, widths, examples, outputs
        torch.Size([2, 2, 3, 1])
    """

    def __init__(self, networks: Sequence[nn.Sequential]) -> None:
        super().__init__()
        weights: list[Tensor] = []
        for net in networks:
            linear = net[2] if len(net) == 3 else None
            if not isinstance(linear, nn.Linear) or linear.bias is not None:
                raise ValueError(
                    "networks must each be nn.Sequential(features, compression, "
                    "nn.Linear(..., bias=False))"
                )
            weights.append(linear.weight.detach())
        self.features = Stacked([net[0] for net in networks])
        self.compress = nn.ModuleList(copy.deepcopy(net[1]) for net in networks)
        # One linear map a network, (s, C, D).
        self.weight = nn.Parameter(torch.stack(weights))
        kinds = groupby(range(len(networks)), key=lambda i: _kind(networks[i][1], i))
        self._groups = [list(members) for _, members in kinds]

    @torch.no_grad()
    def networks(self) -> list[nn.Sequential]:
        """Copies of the networks as they are now, each a module of its own."""
        copies = []
        for body, compress, weight in zip(self.features.networks(), self.compress, self.weight):
            linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
            linear.weight = nn.Parameter(weight.clone())
            copies.append(nn.Sequential(body, copy.deepcopy(compress), linear))
        return copies

    def subset(self, index: Sequence[int]) -> CompressedNetworks:
        """Copies of some of the networks, as they are now."""
        networks = self.networks()
        return CompressedNetworks([networks[i] for i in index])

    def classify(self, h: Tensor) -> Tensor:
        """Map features (s, b, D) through compression and linear map to outputs (s, b, C)."""
        parts = [
            self._squeeze(members, h[members[0] : members[-1] + 1]) for members in self._groups
        ]
        return torch.bmm(torch.cat(parts), self.weight.transpose(1, 2))

    def _squeeze(self, members: list[int], h: Tensor) -> Tensor:
        """Compress the features (g, b, D) of neighbors with one kind of compression."""
        layer, width = self.compress[members[0]], h.shape[-1]
        if isinstance(layer, NestedDropout) and not self.training:
            keep = torch.tensor([getattr(self.compress[i], "keep", None) or width for i in members])
            return h * (torch.arange(width, device=h.device) < keep.to(h.device)[:, None, None])
        squeezed: Tensor = layer(h.flatten(0, 1)).view_as(h)
        return squeezed

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (s, b, ...), one slice a network, to outputs (s, b, C)."""
        return self.classify(self.features(x))

    @torch.no_grad()
    def by_width(self, x: Tensor) -> Tensor:
        """Outputs when only the first 1, ..., D channels are kept, shape (s, D, b, C)."""
        return torch.stack([_by_width(h, w) for h, w in zip(self.features(x), self.weight)])


def _kind(layer: nn.Module, place: int) -> tuple[object, ...]:
    """Equal for layers that may treat the examples of several networks as one batch."""
    if isinstance(layer, NestedDropout):
        return (NestedDropout, layer.std, layer.mean, layer.per_sample or place)
    if isinstance(layer, nn.Dropout):
        return (nn.Dropout, layer.p)
    return (nn.Identity,) if isinstance(layer, nn.Identity) else (type(layer), place)


def _stack(tasks: Sequence[NoisyTask], size: int) -> NoisyTask:
    """One task whose fields have a leading axis over networks."""
    if len(tasks) != size:
        raise ValueError(f"tasks must hold one task for each of {size} networks, got {len(tasks)}")
    check_tasks(tasks)
    return NoisyTask(*(torch.stack([vars(t)[name] for t in tasks]) for name in vars(tasks[0])))


def _batches(seeds: Sequence[int], n: int, batch_size: int, epoch: int) -> list[Tensor]:
    """Indices (s, b) of one epoch's batches; networks of one seed see one order."""
    orders = [list(minibatches(n, batch_size, generator(s + epoch))) for s in seeds]
    return [torch.stack(parts) for parts in zip(*orders)]


def _set_widths(members: Sequence[CompressedNetworks], val: Sequence[Tensor], y: Tensor) -> None:
    """Choose the width of each nested network (or of a pair's mean) from validation features."""
    for i, labels in enumerate(y):
        layers = [m.compress[i] for m in members]
        if isinstance(layers[0], NestedDropout):
            each = [_by_width(h[i], m.weight[i]) for h, m in zip(val, members)]
            keep, _ = _pick(torch.stack(each).mean(0), labels, PENALTY)
            for layer in layers:
                setattr(layer, "keep", keep)  # noqa: B010 - mypy knows no attribute of a ModuleList's items


@torch.no_grad()
def _measure(members: Sequence[CompressedNetworks], data: NoisyTask) -> Tensor:
    """The five numbers of CompressedRun after one epoch, (5, s)."""
    for m in members:
        m.eval()
    parts = [data.x, data.x_val, data.x_test]
    features = [[m.features(x) for x in parts] for m in members]
    _set_widths(members, [h[1] for h in features], data.noisy_val)
    train, val, test = (
        torch.stack([m.classify(h) for m, h in zip(members, hs)]).mean(0) for hs in zip(*features)
    )
    right, memorized, _ = outcome_shares(train.argmax(-1), data.noisy, data.clean).unbind(-1)
    width = members[0].weight.shape[-1]
    keep = [getattr(layer, "keep", None) or width for layer in members[0].compress]
    return torch.stack(
        [
            memorized,
            right,
            accuracy(val, data.noisy_val),
            accuracy(test, data.y_test),
            torch.tensor(keep, dtype=right.dtype, device=right.device),
        ]
    )


def _check_budget(
    seeds: Sequence[int], size: int, epochs: int, batch_size: int, measure_every: int
) -> None:
    if len(seeds) != size:
        raise ValueError(f"seeds must hold one seed for each of {size} networks, got {len(seeds)}")
    if epochs < 1 or batch_size < 2:
        raise ValueError(
            f"epochs and batch_size must be at least 1 and 2, got {epochs} and {batch_size}"
        )
    if measure_every < 1:
        raise ValueError(f"measure_every must be at least 1, got {measure_every}")


def train_compressed(
    networks: CompressedNetworks,
    tasks: Sequence[NoisyTask],
    *,
    seeds: Sequence[int],
    epochs: int = 350,
    batch_size: int = 320,
    lr: float = 0.1,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    milestones: Sequence[int] = (200, 300),
    measure_every: int = 1,
) -> CompressedRun:
    """Stage one: train each network alone, with cross-entropy on the noisy labels.

    Args:
        networks: trained in place, side by side, each as if it were alone.
        tasks: one a network, all of one size, on the networks' device.
        seeds: one a network, for the order of its examples; masks are drawn from the first one.
        epochs: passes over the data, at least 1.
        batch_size: examples a step, at least 2.
        lr, momentum, weight_decay: constants of :class:`~wellposed.train.StackedSGD`.
        milestones: epochs at which the step size falls to a tenth.
        measure_every: measure after every so many epochs, and after the last one.

    Returns:
        The curves, on the CPU. A RuntimeWarning if a network diverged.

    Raises:
        ValueError: as many tasks or seeds as networks are needed; a task whose parts do not pair
            up or are empty; ``epochs`` or ``batch_size`` too small.

    Source: the paper's settings for CIFAR-10 are the defaults.

    Example:
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> task = NoisyTask(x, torch.tensor([1, 1]), y, x, y, x, y)
        >>> net = nn.Sequential(nn.Linear(1, 1), nn.Identity(), nn.Linear(1, 2, bias=False))
        >>> nets = CompressedNetworks([net])
        >>> run = train_compressed(nets, [task], seeds=[0], epochs=30, batch_size=2)
        >>> run.memorized[0, -1].item(), run.test_accuracy[0, -1].item()
        (1.0, 0.5)
    """
    size = networks.features.size
    _check_budget(seeds, size, epochs, batch_size, measure_every)
    data = _stack(tasks, size)
    sgd = StackedSGD(networks.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    rows, curves = torch.arange(size, device=data.x.device)[:, None], []
    with seeded(seeds[0]):
        for epoch in range(epochs):
            networks.train()
            for index in _batches(seeds, data.noisy.shape[1], batch_size, epoch):
                index = index.to(data.x.device)
                logits = networks(data.x[rows, index])
                # A sum over networks: none of them must feel how many train beside it.
                each = F.cross_entropy(
                    logits.flatten(0, 1), data.noisy[rows, index].flatten(), reduction="sum"
                )
                (each / index.shape[1]).backward()
                sgd.step(_lr_factor(epoch, milestones))
            if (epoch + 1) % measure_every == 0 or epoch + 1 == epochs:
                curves.append(_measure([networks], data))
    warn_of_nan("train_compressed", *networks.parameters())
    return CompressedRun(*torch.stack(curves, dim=2).cpu())


def _lr_factor(epoch: int, milestones: Sequence[int]) -> float:
    return float(0.1 ** sum(epoch >= m for m in milestones))


@torch.no_grad()
def _rank(
    networks: CompressedNetworks, data: NoisyTask, index: Tensor, forget_rates: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The part of index (s, b) that networks trust, and each one's weight, both (s, kept).

    Networks with a larger rate keep fewer: their last weights are zero. Weights sum to one.
    """
    rows = torch.arange(len(index), device=index.device)[:, None]
    networks.eval()
    logits = networks(data.x[rows, index]).transpose(1, 2)
    losses = F.cross_entropy(logits, data.noisy[rows, index], reduction="none")
    networks.train()
    kept = index.gather(1, small_loss_indices(losses, min(forget_rates)))
    counts = torch.tensor([[_kept(r, index.shape[1])] for r in forget_rates], device=index.device)
    inside = torch.arange(kept.shape[1], device=index.device) < counts
    return kept, inside.to(losses.dtype) / counts


def co_teach(
    first: CompressedNetworks,
    second: CompressedNetworks,
    tasks: Sequence[NoisyTask],
    *,
    forget_rate: float | Sequence[float],
    seeds: Sequence[int],
    epochs: int = 100,
    batch_size: int = 320,
    lr: float = 1e-3,
    momentum: float = 0.9,
    weight_decay: float = 5e-4,
    milestones: Sequence[int] = (50,),
    ramp_epochs: int = 0,
    exchange: bool = True,
    measure_every: int = 1,
) -> CoTeachingRun:
    """Stage two: each network picks, from its half of a batch, what the other one learns from.

    Entry ``i`` of ``first`` and entry ``i`` of ``second`` are a pair. Ranking is in evaluation mode
    at the current width, training with fresh masks; the prediction is the mean of both logits.

    Args:
        first, second: as many networks each; trained in place.
        tasks, seeds: one a pair.
        forget_rate: share of each half that is left out, in [0, 1), or one for each pair; ideally
            the noise rate.
        epochs, batch_size, lr, momentum, weight_decay, milestones: as in :func:`train_compressed`.
        ramp_epochs: over so many epochs the share rises linearly from zero.
        exchange: False lets each network learn from its own selection (a control).
        measure_every: measure, and choose the width anew, after every so many epochs and the last.

    Returns:
        The curves of the pairs, on the CPU. A RuntimeWarning if a network diverged.

    Raises:
        ValueError: numbers of networks, tasks or seeds that differ, tasks with fewer than two
            examples or with parts that do not pair up, a ``forget_rate`` outside [0, 1), or
            ``epochs`` or ``batch_size`` too small.

    Source: stage two; the paper's settings for CIFAR-10 are the defaults.

    Example:
        >>> x, y = torch.tensor([[-1.0], [1.0], [-1.0], [1.0]]), torch.tensor([0, 1, 0, 1])
        >>> task = NoisyTask(x, torch.tensor([0, 1, 0, 0]), y, x, y, x, y)
        >>> net = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(1, 2, bias=False))
        >>> net[2].weight = nn.Parameter(torch.tensor([[-5.0], [5.0]]))
        >>> one, two = CompressedNetworks([net]), CompressedNetworks([net])
        >>> run = co_teach(
        ...     one, two, [task], forget_rate=0.5, seeds=[0], epochs=1, batch_size=4
        ... )
        >>> run.purity.item()  # of the half with the wrong label, the right one was kept
        1.0
    """
    size = first.features.size
    _check_budget(seeds, size, epochs, batch_size, measure_every)
    if second.features.size != size:
        raise ValueError(f"second must hold {size} networks, got {second.features.size}")
    rates = [forget_rate] * size if isinstance(forget_rate, int | float) else list(forget_rate)
    if len(rates) != size or not all(0.0 <= r < 1.0 for r in rates):
        raise ValueError(
            f"forget_rate must lie in [0, 1), one number or {size} of them, got {forget_rate}"
        )
    data, pair = _stack(tasks, size), (first, second)
    if data.x.shape[1] < 2:
        raise ValueError("tasks must hold at least two training examples, one for each network")
    parameters = [p for nets in pair for p in nets.parameters()]
    sgd = StackedSGD(parameters, lr=lr, momentum=momentum, weight_decay=weight_decay)
    rows, curves = torch.arange(size, device=data.x.device)[:, None], []
    with seeded(seeds[0]):
        _measure(pair, data)  # sets the width at which the first epoch ranks
        for epoch in range(epochs):
            ramp = epoch / max(ramp_epochs - 1, 1) if epoch < ramp_epochs else 1.0
            pure = []
            for index in _batches(seeds, data.noisy.shape[1], batch_size, epoch):
                half = index.shape[1] // 2
                parts = index[:, : 2 * half].to(data.x.device).split(max(half, 1), dim=1)[:2]
                if len(parts) < 2:
                    continue
                left_out = [ramp * r for r in rates]
                picks = [_rank(n, data, part, left_out) for n, part in zip(pair, parts)]
                for kept, weight in picks:
                    true = data.noisy[rows, kept] == data.clean[rows, kept]
                    pure.append((weight * true).sum(1))
                order = picks[::-1] if exchange else picks
                loss = data.x.new_zeros(())
                for nets, (kept, weight) in zip(pair, order):
                    logits = nets(data.x[rows, kept]).transpose(1, 2)
                    each = F.cross_entropy(logits, data.noisy[rows, kept], reduction="none")
                    loss = loss + (weight * each).sum()
                loss.backward()
                sgd.step(_lr_factor(epoch, milestones))
            if (epoch + 1) % measure_every == 0 or epoch + 1 == epochs:
                curves.append(torch.cat([_measure(pair, data), torch.stack(pure).mean(0)[None]]))
    warn_of_nan("co_teach", *parameters)
    return CoTeachingRun(*torch.stack(curves, dim=2).cpu())


def fit_regression(
    networks: CompressedNetworks,
    x: Tensor,
    y: Tensor,
    *,
    seed: int,
    steps: int = 1500,
    lr: float = 2e-3,
) -> Tensor:
    """The toy: fit noisy points by full-batch Adam on the squared error.

    Args:
        networks: with one output each; trained in place.
        x: inputs, shape ``(s, n, 1)`` with ``n >= 1``, one slice a network.
        y: noisy values, shape ``(s, n)``.
        seed: source of the masks.
        steps: at least 1.
        lr: step size of Adam.

    Returns:
        The last training error of each network, shape ``(s,)``; a RuntimeWarning if it diverged.

    Raises:
        ValueError: shapes that do not match or are empty, or ``steps`` below 1.

    Source: the toy example of the authors' README, whose data are not published.

    Example:
        >>> x, y = torch.tensor([[[1.0], [2.0]]]), torch.tensor([[2.0, 4.0]])
        >>> net = nn.Sequential(nn.Identity(), nn.Identity(), nn.Linear(1, 1, bias=False))
        >>> nets = CompressedNetworks([net])
        >>> error = fit_regression(nets, x, y, seed=0, steps=500, lr=0.1)
        >>> round(nets.weight.item(), 3)
        2.0
    """
    fits = x.ndim == 3 and x.shape[:2] == y.shape and len(x) == networks.features.size
    if not fits or 0 in y.shape or steps < 1:
        raise ValueError(
            "x and y must have shapes (s, n, 1) and (s, n), one slice a network, and steps must be "
            f"at least 1, got {tuple(x.shape)}, {tuple(y.shape)} and {steps}"
        )
    adam = StackedAdam(networks.parameters(), lr=lr)
    networks.train()
    error = y.new_zeros(len(y))
    with seeded(seed):
        for _ in range(steps):
            error = (networks(x).squeeze(-1) - y).square().mean(1)
            error.sum().backward()
            adam.step()
    networks.eval()
    warn_of_nan("fit_regression", error, *networks.parameters())
    return error.detach()
