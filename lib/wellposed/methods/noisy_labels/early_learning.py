r"""Early-learning regularization (ELR): keep what the network knew before it memorized.

S. Liu, J. Niles-Weed, N. Razavian, C. Fernandez-Granda, "Early-Learning Regularization Prevents
Memorization of Noisy Labels", NeurIPS 2020, arXiv:2007.00151.

Claim: a network trained on partly wrong labels first predicts the true class even where the label
is wrong, and memorizes the wrong label later; pulling each prediction toward a running average
:math:`t_i` of its own past stops the second phase. The loss on a minibatch :math:`B` is

.. math::

    L = \frac{1}{|B|} \sum_{i \in B} \Bigl[ -\log p_{i, \tilde y_i}
        + \lambda \log \bigl(1 - \langle p_i, t_i \rangle \bigr) \Bigr], \qquad
    t_i \leftarrow \beta\, t_i + (1 - \beta)\, p_i ,

with the softmax output :math:`p_i`, the given (noisy) label :math:`\tilde y_i` and a target
:math:`t_i` that starts at zero, is updated before the loss is taken and is a constant for the
gradient.

Departures from the paper: none in the loss. The two-network variant ELR+ is not included.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.data.label_noise import (
    NoisyTask,
    asymmetric_noise,
    check_tasks,
    memorization_stats,
    noisy_split,
    outcome_shares,
    symmetric_noise,
)
from wellposed.nets import Stacked
from wellposed.train import StackedSGD, accuracy

__all__ = [
    "ELRLoss",
    "LinearTrajectory",
    "NoisyRun",
    "NoisyTask",
    "asymmetric_noise",
    "elr_loss",
    "elr_regularizer",
    "linear_early_learning",
    "memorization_stats",
    "noisy_split",
    "symmetric_noise",
    "train_on_noisy_labels",
]

LAMBDA, BETA = 3.0, 0.7  # the paper's values for CIFAR-10 with symmetric noise
EPS = 1e-4  # floor of 1 - <p, t>, from the authors' code; without it log(0) ends the training
CHUNK = 500  # examples a network that are measured at once; it bounds the memory


@dataclass(frozen=True)
class NoisyRun:
    """What one training run did, measured after each epoch; every field has shape ``(epochs,)``.

    Attributes:
        correct, memorized, other: shares of the wrongly labeled training points that are predicted
            as their true class, as their wrong label, as neither. They sum to one.
        fitted: share of the correctly labeled training points predicted as their label.
        val_accuracy: accuracy on the noisy validation labels.
        test_accuracy: accuracy on the clean test labels.
        target_accuracy: share of training points whose target is largest at the true class.
    """

    correct: Tensor
    memorized: Tensor
    other: Tensor
    fitted: Tensor
    val_accuracy: Tensor
    test_accuracy: Tensor
    target_accuracy: Tensor

    @property
    def stop_epoch(self) -> int:
        """Index of the (first) epoch with the best noisy validation accuracy."""
        return int(self.val_accuracy.argmax())

    @property
    def early_stopped_accuracy(self) -> float:
        """Test accuracy at ``stop_epoch``: what early stopping on noisy labels would deliver."""
        return float(self.test_accuracy[self.stop_epoch])


@dataclass(frozen=True)
class LinearTrajectory:
    """Gradient descent on the linear model; entry ``k`` is after ``k`` steps, ``(steps + 1,)``.

    Attributes:
        true_accuracy: share of mislabeled points on the side of their *true* class.
        memorized: share of them on the side of their *given* label. Both are 0 at step 0.
        gradient_cosine: cosine between the negative gradient and the true separator ``v``.
        pull_correct: mean gradient coefficient ``1 - p(given label)`` of correctly labeled points.
        pull_wrong: the same for mislabeled points.
        test_accuracy: exact probability that a fresh point is classified correctly.
    """

    true_accuracy: Tensor
    memorized: Tensor
    gradient_cosine: Tensor
    pull_correct: Tensor
    pull_wrong: Tensor
    test_accuracy: Tensor


def _check_pair(name: str, value: Tensor, targets: Tensor) -> None:
    if value.ndim < 2 or value.shape != targets.shape or value.shape[-2] == 0:
        raise ValueError(
            f"{name} and targets must both have shape (..., b, c) with b >= 1, got "
            f"{tuple(value.shape)} and {tuple(targets.shape)}"
        )


def _check_length(name: str, value: Tensor, logits: Tensor) -> None:
    if value.shape != logits.shape[:-1]:
        raise ValueError(
            f"{name} must have shape {tuple(logits.shape[:-1])}, got {tuple(value.shape)}"
        )


def elr_regularizer(probs: Tensor, targets: Tensor) -> Tensor:
    r"""The regularizer of ELR: :math:`\frac1b \sum_i \log(1 - \langle p_i, t_i \rangle)`.

    Minimizing it raises :math:`\langle p_i, t_i \rangle`. Nothing is clamped away from 1 here: a
    pair with :math:`\langle p, t \rangle = 1` (or, by rounding, above) gives minus infinity.

    Args:
        probs: class probabilities :math:`p`, shape ``(..., b, c)``, in [0, 1].
        targets: targets :math:`t`, shape ``(..., b, c)``, in [0, 1]; a constant for the gradient.

    Returns:
        Mean over the batch, shape ``(...)``: a scalar for one batch.

    Raises:
        ValueError: shapes that differ, have less than two axes, or an empty batch.

    Source: Section 4 (the ELR loss).

    Example:
        >>> elr_regularizer(torch.tensor([[0.5, 0.5]]), torch.tensor([[1.0, 0.0]])).exp().item()
        0.5
    """
    _check_pair("probs", probs, targets)
    inner = (probs * targets.detach()).sum(dim=-1).clamp(max=1.0)
    return torch.log1p(-inner).mean(dim=-1)


def elr_loss(
    logits: Tensor,
    labels: Tensor,
    targets: Tensor,
    *,
    lam: float | Tensor = LAMBDA,
    beta: float | Tensor = BETA,
    eps: float = EPS,
) -> tuple[Tensor, Tensor]:
    r"""The loss of ELR: move the targets of a minibatch, then use them.

    .. math:: \bar p = \mathrm{clamp}(\mathrm{softmax}(z), \epsilon, 1 - \epsilon), \qquad
              t_i \leftarrow \beta t_i + (1 - \beta) \frac{\bar p_i}{\sum_c \bar p_{ic}}, \qquad
              L = \mathrm{CE}(z, \tilde y) + \lambda \, \frac1b \sum_i
              \log(1 - \langle \bar p_i, t_i \rangle)

    Leading axes count independent networks. The clamp keeps the regularizer above
    :math:`\log \epsilon`.

    Args:
        logits: network outputs :math:`z`, shape ``(..., b, c)``, floating point.
        labels: given (noisy) classes, shape ``(..., b)``, int64.
        targets: targets of these examples before the visit, shape ``(..., b, c)``.
        lam: strength :math:`\lambda`; a number, or a tensor of shape ``(...)``.
        beta: memory :math:`\beta` in [0, 1]; a number, or a tensor of shape ``(...)``. With 1 the
            targets stay as they are.
        eps: clamp :math:`\epsilon`, in (0, 0.5).

    Returns:
        Loss of shape ``(...)``, in the dtype of ``logits``, and the new targets.

    Raises:
        ValueError: shapes that do not match, or an empty batch.
        IndexError: a label out of range (on the CPU).

    Source: Section 4 (the ELR loss); the clamp and its renormalization: the authors' ``loss.py``.

    Example:
        >>> old = torch.zeros(1, 2)
        >>> value, new = elr_loss(torch.zeros(1, 2), torch.tensor([0]), old, lam=1.0, beta=0.5)
        >>> new.tolist(), round(value.exp().item(), 4)  # -log(1/2) + log(1 - 1/4) = log(3/2)
        ([[0.25, 0.25]], 1.5)
    """
    _check_pair("logits", logits, targets)
    _check_length("labels", labels, logits)
    if isinstance(beta, Tensor):
        beta = beta[..., None, None]
    # At least float32: 1 - eps rounds to 1 in half precision, and log(1 - 1) is -inf.
    wide = torch.promote_types(logits.dtype, torch.float32)
    log_probs = logits.log_softmax(dim=-1, dtype=wide)
    probs = log_probs.exp().clamp(eps, 1.0 - eps)
    belief = probs.detach() / probs.detach().sum(dim=-1, keepdim=True)
    targets = beta * targets.to(wide) + (1.0 - beta) * belief
    cross_entropy = F.nll_loss(log_probs.flatten(0, -2), labels.flatten(), reduction="none")
    value = cross_entropy.view(labels.shape).mean(-1) + lam * elr_regularizer(probs, targets)
    return value.to(logits.dtype), targets


class ELRLoss(nn.Module):
    r"""Cross-entropy plus early-learning regularization, with one target per training example.

    In training mode each call is one :func:`elr_loss`; in evaluation mode the targets stay. There
    is no bias correction: after :math:`m` visits the entries of :math:`t_i` sum to
    :math:`1 - \beta^m`.

    Args:
        num_examples: size :math:`n` of the training set, at least 1.
        num_classes: number of classes :math:`c`, at least 2.
        lam: strength :math:`\lambda \ge 0`; 0 is plain cross-entropy.
        beta: memory :math:`\beta` of the targets, in [0, 1).
        eps: clamp :math:`\epsilon`, in (0, 0.5).

    Attributes:
        targets: buffer of shape ``(n, c)``, zeros at the start, saved with the ``state_dict``.

    Raises:
        ValueError: a hyper-parameter out of range.

    Source: Section 4 (the ELR loss).

    Example:
        >>> loss = ELRLoss(num_examples=4, num_classes=2, lam=1.0, beta=0.5)
        >>> value = loss(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([3]))
        >>> loss.targets[3].tolist()
        [0.25, 0.25]
    """

    targets: Tensor

    def __init__(
        self,
        num_examples: int,
        num_classes: int,
        lam: float = LAMBDA,
        beta: float = BETA,
        eps: float = EPS,
    ) -> None:
        super().__init__()
        if num_examples < 1:
            raise ValueError(f"num_examples must be at least 1, got {num_examples}")
        if num_classes < 2:
            raise ValueError(f"num_classes must be at least 2, got {num_classes}")
        if not 0.0 <= lam < math.inf:
            raise ValueError(f"lam must be finite and at least 0, got {lam}")
        if not 0.0 <= beta < 1.0:
            raise ValueError(f"beta must lie in [0, 1), got {beta}")
        if not 0.0 < eps < 0.5:
            raise ValueError(f"eps must lie in (0, 0.5), got {eps}")
        self.lam, self.beta, self.eps = lam, beta, eps
        self.register_buffer("targets", torch.zeros(num_examples, num_classes))

    def extra_repr(self) -> str:
        n, c = self.targets.shape
        return f"num_examples={n}, num_classes={c}, lam={self.lam}, beta={self.beta}"

    def _check(self, logits: Tensor, labels: Tensor, index: Tensor) -> None:
        n, c = self.targets.shape
        if logits.ndim != 2 or logits.shape[1] != c or logits.shape[0] == 0:
            raise ValueError(f"logits must have shape (b, {c}), got {tuple(logits.shape)}")
        _check_length("index", index, logits)
        # On a GPU this would wait for the device; there, indexing itself stops with an assertion.
        if index.device.type == "cpu" and bool(((index < 0) | (index >= n)).any()):
            raise IndexError(f"index out of range: training examples are numbered 0..{n - 1}")

    def forward(self, logits: Tensor, labels: Tensor, index: Tensor) -> Tensor:
        r"""Loss of one minibatch; in training mode, updates the targets of its examples.

        Args:
            logits: network outputs, shape ``(b, c)``, floating point.
            labels: given (noisy) classes, shape ``(b,)``, int64.
            index: positions of the examples in the *training set* (not in the batch), each at
                most once, shape ``(b,)``, int64.

        Returns:
            Scalar of the dtype of ``logits``.

        Raises:
            ValueError: wrong shapes.
            IndexError: ``index`` or ``labels`` out of range (checked on the CPU only).
        """
        self._check(logits, labels, index)
        beta = self.beta if self.training else 1.0
        value, moved = elr_loss(
            logits, labels, self.targets[index], lam=self.lam, beta=beta, eps=self.eps
        )
        if self.training:
            self.targets[index] = moved.to(self.targets.dtype)
        return value


def train_on_noisy_labels(
    networks: Sequence[nn.Module],
    losses: Sequence[ELRLoss],
    tasks: Sequence[NoisyTask],
    *,
    generators: Sequence[torch.Generator],
    epochs: int = 120,
    batch_size: int = 128,
    lr: float = 0.02,
    momentum: float = 0.9,
    weight_decay: float = 1e-3,
    visit: Callable[..., tuple[Tensor, Tensor]] = elr_loss,
) -> list[NoisyRun]:
    r"""Train networks side by side on noisy labels and follow the wrongly labeled points.

    Network ``j`` is trained with ``losses[j]`` on ``tasks[j]`` by momentum SGD, in the order that
    ``generators[j]`` draws, as if it were alone. Defaults are the paper's for CIFAR-10.

    Args:
        networks: ``k`` modules of one architecture, ``(b, ...)`` to ``(b, c)``; trained in place.
        losses: one for each network; ``lam=0`` is the cross-entropy baseline. Their targets are
            moved in place.
        tasks: one for each network, all of one size, on the device of the networks.
        generators: one for each network, the source of the order of its examples.
        epochs: passes over the data, at least 1.
        batch_size: examples a step, at least 1.
        lr, momentum, weight_decay: constants of :class:`~wellposed.train.StackedSGD`.
        visit: another loss with the arguments and results of :func:`elr_loss`.

    Returns:
        The curves of each network's run, on the CPU.

    Raises:
        ValueError: ``epochs`` or ``batch_size`` below 1, lists of different lengths, tasks or
            losses that do not match, a task whose parts are empty or do not pair up, or one with
            another number of examples than the losses.

    Source: Section 6; the curves are those of Figure 1.

    Example:
        >>> x, y = torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1])
        >>> task = NoisyTask(x, torch.tensor([1, 1]), y, x, y, x, y)
        >>> net, loss, g = nn.Linear(1, 2), ELRLoss(2, 2, lam=0.0), torch.Generator()
        >>> [run] = train_on_noisy_labels([net], [loss], [task], generators=[g], epochs=20, lr=1.0)
        >>> run.memorized[-1].item(), run.test_accuracy[-1].item()
        (1.0, 0.5)
    """
    if epochs < 1 or batch_size < 1:
        raise ValueError(f"epochs and batch_size must be at least 1, got {epochs} and {batch_size}")
    counts = [len(networks), len(losses), len(tasks), len(generators)]
    if min(counts) != max(counts):
        raise ValueError(
            f"networks, losses, tasks and generators must have the same length, got {counts}"
        )
    if len({(loss.targets.shape, loss.eps) for loss in losses}) > 1:
        raise ValueError("losses must agree in num_examples, num_classes and eps")
    model, (data, own) = Stacked(networks), _shared(tasks)
    optimizer = StackedSGD(model.parameters(), lr=lr, momentum=momentum, weight_decay=weight_decay)
    targets = torch.stack([loss.targets for loss in losses])
    settings = {
        "lam": targets.new_tensor([loss.lam for loss in losses]),
        "beta": targets.new_tensor([loss.beta for loss in losses]),
        "eps": losses[0].eps,
    }
    n, device = data.noisy.shape[1], data.x.device
    if n > targets.shape[1]:
        raise ValueError(f"losses must have a target for each of {n} examples")
    each = torch.arange(len(networks), device=device)[:, None]
    curves = []
    for _ in range(epochs):
        model.train()
        order = torch.stack([torch.randperm(n, generator=g, device=g.device) for g in generators])
        for index in order.to(device).split(batch_size, dim=1):
            logits, labels = model(data.x[own, index]), data.noisy[own, index]
            value, moved = visit(logits, labels, targets[each, index], **settings)
            targets[each, index] = moved.to(targets.dtype)
            value.sum().backward()  # type: ignore[no-untyped-call]
            optimizer.step()
        model.eval()
        curves.append(_measure(model, targets, data, own))
    for net, loss, trained, moved in zip(networks, losses, model.networks(), targets, strict=True):
        net.load_state_dict(trained.state_dict())
        loss.targets.copy_(moved)
    return [NoisyRun(*run) for run in torch.stack(curves, dim=-1).cpu().unbind(1)]


def _shared(tasks: Sequence[NoisyTask]) -> tuple[NoisyTask, Tensor]:
    """The different tasks on a first axis, and which of them each network has, (k, 1)."""
    check_tasks(tasks)
    different = list({id(task): task for task in tasks}.values())
    place = {id(task): i for i, task in enumerate(different)}
    sizes = {(t.x.shape, t.x_val.shape, t.x_test.shape) for t in different}
    if len(sizes) > 1:
        raise ValueError("tasks must have parts of equal sizes")
    parts = [torch.stack([getattr(t, f.name) for t in different]) for f in fields(NoisyTask)]
    own = torch.tensor([place[id(task)] for task in tasks], device=parts[0].device)
    return NoisyTask(*parts), own[:, None]


@torch.no_grad()
def _measure(model: Stacked, targets: Tensor, data: NoisyTask, own: Tensor) -> Tensor:
    """The seven numbers of NoisyRun after one epoch, (7, k), on the device of the data."""

    def predict(x: Tensor) -> Tensor:
        places = torch.arange(x.shape[1], device=x.device).split(CHUNK)
        return torch.cat([model(x[own, place]).argmax(-1) for place in places], dim=1)

    each = own[:, 0]
    noisy, clean = data.noisy[each], data.clean[each]
    pred, right = predict(data.x), noisy == clean
    fitted = (right & (pred == noisy)).sum(1) / right.sum(1)
    val = (predict(data.x_val) == data.noisy_val[each]).float().mean(1)
    test = (predict(data.x_test) == data.y_test[each]).float().mean(1)
    shares = outcome_shares(pred, noisy, clean)
    return torch.cat([shares.T, torch.stack([fitted, val, test, accuracy(targets, clean)])])


def linear_early_learning(
    num_examples: int = 1000,
    dim: int = 2000,
    *,
    sigma: float = 0.1,
    flip_rate: float = 0.4,
    lr: float = 1.0,
    steps: int = 1000,
    generator: torch.Generator | None = None,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
) -> LinearTrajectory:
    r"""Early learning and memorization in the paper's linear model.

    Points :math:`x_i = y_i^* v + \sigma z_i` with :math:`y_i^* = \pm 1`, a unit vector :math:`v`
    and Gaussian :math:`z_i`; given labels :math:`\tilde y_i = -y_i^*` with probability
    :math:`\Delta`. Gradient descent from zero on the logistic loss,

    .. math:: \theta \leftarrow \theta + \frac{\eta}{n} \sum_i r_i \tilde y_i x_i, \qquad
              r_i = \frac{1}{1 + \exp(\tilde y_i \langle \theta, x_i \rangle)} .

    Here :math:`r_i` is how hard point :math:`i` pulls. Every iterate combines the data points, so
    only margins and Gram matrix are kept: one :math:`n \times n` product a step.

    Args:
        num_examples, dim: number :math:`n \ge 2` of points and their dimension :math:`p \ge 1`;
            the theory wants both of one order.
        sigma: spread :math:`\sigma > 0` of a cluster in each coordinate.
        flip_rate: probability :math:`\Delta` of a wrong label, in (0, 0.5).
        lr, steps: step size :math:`\eta > 0` and number of steps, at least 1.
        generator: CPU source of the data.
        dtype, device: where the computation runs.

    Returns:
        The trajectory, on the CPU.

    Raises:
        ValueError: an argument out of range, or no flipped label was drawn.

    Source: Section 3 (the linear model).

    Example:
        >>> path = linear_early_learning(200, 400, generator=torch.Generator().manual_seed(0))
        >>> path.true_accuracy[2].item(), path.memorized[-1].item()
        (1.0, 1.0)
    """
    if num_examples < 2 or dim < 1 or steps < 1:
        raise ValueError(
            "num_examples, dim and steps must be at least 2, 1 and 1, got "
            f"{num_examples}, {dim} and {steps}"
        )
    if not sigma > 0.0 or not lr > 0.0:
        raise ValueError(f"sigma and lr must be positive, got {sigma} and {lr}")
    if not 0.0 < flip_rate < 0.5:
        raise ValueError(f"flip_rate must lie in (0, 0.5), got {flip_rate}")
    signed, wrong = _linear_data(num_examples, dim, sigma, flip_rate, generator, dtype)
    if not bool(wrong.any()) or bool(wrong.all()):
        raise ValueError(f"flip_rate {flip_rate} gave no mixture of right and wrong labels")
    return _descend(signed.to(device), wrong.to(device), sigma=sigma, lr=lr, steps=steps)


def _linear_data(
    n: int, p: int, sigma: float, rate: float, generator: torch.Generator | None, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Rows given label times x, (n, p), with v the first unit vector; which labels are wrong."""
    wrong = torch.rand(n, generator=generator) < rate
    # The true label drops out: (given label) * x = (+-1) v + sigma z with z again Gaussian.
    signed = sigma * torch.randn(n, p, generator=generator, dtype=dtype)
    signed[:, 0] += torch.where(wrong, -1.0, 1.0).to(dtype)
    return signed, wrong


@torch.no_grad()
def _descend(
    signed: Tensor, wrong: Tensor, *, sigma: float, lr: float, steps: int
) -> LinearTrajectory:
    n = signed.shape[0]
    gram, along_v = signed @ signed.T, signed[:, 0]
    margin, history = signed.new_zeros(n), []
    for _ in range(steps + 1):
        pull = torch.sigmoid(-margin)
        push = gram @ pull  # what one step of size n does to the margins
        history.append(torch.stack([margin, pull, push]))
        margin = margin + lr / n * push
    margins, pulls, pushes = torch.stack(history, dim=1)
    weights = lr / n * (pulls.cumsum(0) - pulls)  # theta = signed.T @ weights
    grad_norm = (pulls * pushes).sum(1).clamp_min(1e-30).sqrt()
    theta_norm = (weights * margins).sum(1).clamp_min(1e-30).sqrt()
    curves = [
        (margins[:, wrong] < 0).to(gram).mean(1),
        (margins[:, wrong] > 0).to(gram).mean(1),
        pulls @ along_v / grad_norm,
        pulls[:, ~wrong].mean(1),
        pulls[:, wrong].mean(1),
        torch.special.ndtr(weights @ along_v / (sigma * theta_norm)),
    ]
    return LinearTrajectory(*(curve.cpu() for curve in curves))
