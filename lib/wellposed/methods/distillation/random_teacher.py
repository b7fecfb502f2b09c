r"""Random Teachers are Good Teachers.

F. Sarnthein, G. Bachmann, S. Anagnostidis, T. Hofmann, "Random Teachers are Good Teachers",
ICML 2023, arXiv:2302.12091.

Claim: a student trained to copy a *random, frozen* network of its own architecture, without
labels, ends with better features than that teacher; they depend on the data, and the student
behaves like a network early in labeled training. Over the inputs it minimizes

.. math::

    \min_{\theta_S} \; E_x \,
        \mathrm{KL}\bigl(\mathrm{softmax} f_{\theta_T}(x) \,\|\,
        \mathrm{softmax} f_{\theta_S}(x)\bigr),
    \qquad
    \theta_S(\alpha) = \frac{(1 - \alpha)\, \theta_T + \alpha\, \tilde\theta}
                            {\sqrt{(1 - \alpha)^2 + \alpha^2}}

with the teacher :math:`\theta_T` and an independent draw :math:`\tilde\theta`. A network is an
encoder, whose outputs (embeddings) are what counts, and a head that is thrown away afterwards.

Departures from the paper: the KL divergence instead of the cross-entropy (same gradients); the
teacher's outputs are computed once and kept; the linear probe is solved to its minimum on
standardized embeddings instead of trained for some epochs; pruning leaves biases alone.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.nets import Stacked
from wellposed.nets.columns import columns, stacked_forward
from wellposed.train import StackedAdam, StackedSGD, accuracy, minibatches

__all__ = [
    "DistillationRun",
    "Geometry",
    "L2BottleneckHead",
    "ProbeTask",
    "distill",
    "distillation_epochs",
    "distillation_loss",
    "embed",
    "embedding_geometry",
    "finetune",
    "interpolate_init",
    "linear_path",
    "linear_probe",
    "linear_probes",
    "magnitude_mask",
    "mlp_encoder",
    "probe_encoders",
    "probed_distillation",
    "random_mask",
    "recalibrate_batchnorm",
    "vgg_encoder",
]

HEAD_STD = 0.02  # of the truncated normal that fills the head (Appendix E.1)
EVAL_BATCH = 4096  # inputs at a time where nothing is trained
PROBE_C = 0.1  # inverse ridge penalty of the probe, in scikit-learn's convention
PROBE_TOL = 3e-4  # largest entry of the gradient at which the probe's solver stops
PROBE_STEPS = 2000  # after which it gives up
PROBE_TASKS = 4  # solved side by side: more of them fall out of a CPU's cache


@dataclass(frozen=True)
class Geometry:
    """How spread out embeddings are: mean cosine between two of them, and effective rank."""

    cosine: Tensor
    rank: Tensor


@dataclass(frozen=True)
class ProbeTask:
    """Inputs ``(n, ...)`` and classes ``(n,)`` for fitting a probe, and the same for testing."""

    x: Tensor
    y: Tensor
    x_test: Tensor
    y_test: Tensor


@dataclass(frozen=True)
class DistillationRun:
    """What became of students that were distilled side by side.

    Attributes:
        epochs: epochs after which the encoders were probed, 0 first, ``(k,)``.
        accuracy: probing accuracy of each student then, ``(size, k)``.
        loss: mean loss of each epoch, ``(size, epochs)``.
        students: the trained networks, in eval mode.
    """

    epochs: Tensor
    accuracy: Tensor
    loss: Tensor
    students: list[nn.Module]


class L2BottleneckHead(nn.Module):
    r"""Projection head whose outputs are cosines: an MLP, a normalized bottleneck, unit rows.

    .. math:: z = W\, \mathrm{mlp}(x) + b, \qquad
              f(x)_i = \Bigl\langle \frac{v_i}{\|v_i\|}, \frac{z}{\|z\|} \Bigr\rangle \in [-1, 1]

    Weights are truncated normal with deviation 0.02, biases zero. The hidden layers are ``mlp``,
    the map to :math:`z` is ``bottleneck``, and row ``i`` of ``last.weight`` is :math:`v_i`.

    Args:
        in_dim: size of the embeddings.
        hidden_dims: widths of the hidden layers, each followed by GELU.
        bottleneck_dim: size of :math:`z`.
        out_dim: number of outputs.

    Raises:
        ValueError: a width below 1.

    Source: Appendix A and E.1.

    Example:
        >>> head = L2BottleneckHead(3, hidden_dims=(4,), bottleneck_dim=2, out_dim=5)
        >>> with torch.no_grad():  # the first row along the bottleneck of this input
        ...     x = torch.ones(1, 3)
        ...     _ = head.last.weight[0].copy_(7 * head.bottleneck(head.mlp(x))[0])
        >>> round(head(x)[0, 0].item(), 4)
        1.0
    """

    def __init__(
        self,
        in_dim: int,
        hidden_dims: tuple[int, ...] = (2048, 2048),
        bottleneck_dim: int = 256,
        out_dim: int = 65536,
    ) -> None:
        super().__init__()
        sizes = [in_dim, *hidden_dims, bottleneck_dim, out_dim]
        if min(sizes) < 1:
            raise ValueError(f"all widths of the head must be at least 1, got {sizes}")
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes, hidden_dims):
            layers += [nn.Linear(inputs, outputs), nn.GELU()]
        self.mlp = nn.Sequential(*layers)
        self.bottleneck = nn.Linear(sizes[-3], bottleneck_dim)
        self.last = nn.Linear(bottleneck_dim, out_dim, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=HEAD_STD)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map embeddings (b, in_dim) to cosines (b, out_dim)."""
        z = F.normalize(self.bottleneck(self.mlp(x)), dim=-1)
        return F.linear(z, F.normalize(self.last.weight, dim=-1))

    def columns(self, own: Mapping[str, Tensor], x: Tensor, prefix: str) -> Tensor:
        """The same for networks side by side; see :func:`wellposed.nets.columns.columns`."""
        x = columns(self.mlp, own, x, f"{prefix}mlp.")
        z = F.normalize(columns(self.bottleneck, own, x, f"{prefix}bottleneck."), dim=1)
        return F.normalize(own[f"{prefix}last.weight"], dim=-1) @ z


def _kaiming(module: nn.Module) -> nn.Module:
    """Draw all weights again, Kaiming normal for ReLU, with zero biases."""
    for layer in module.modules():
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            if isinstance(layer, nn.Conv2d):  # as in torchvision's VGG and ResNet
                nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="relu")
            else:
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
    return module


def mlp_encoder(
    in_features: int, *, width: int = 64, depth: int = 12, batch_norm: bool = False
) -> nn.Module:
    """Deep narrow encoder: ``depth`` times linear, batch normalization if wanted, ReLU.

    Args:
        in_features: number of inputs, flattened.
        width: size of every layer and of the embedding.
        depth: number of layers, at least 1.
        batch_norm: whether each linear map is followed by batch normalization.

    Returns:
        A module from ``(b, ...)`` to ``(b, width)``; weights are Kaiming normal.

    Raises:
        ValueError: a size below 1.

    Source: our stand-in for the paper's VGG11 and ResNet18 on one core.

    Example:
        >>> sum(p.numel() for p in mlp_encoder(4, width=3, depth=2).parameters())
        27
    """
    if min(in_features, width, depth) < 1:
        raise ValueError(
            f"in_features, width and depth must be at least 1, got {in_features}, {width}, {depth}"
        )
    layers: list[nn.Module] = [nn.Flatten()]
    for size in [in_features, *[width] * (depth - 1)]:
        layers.append(nn.Linear(size, width))
        layers += [nn.BatchNorm1d(width)] if batch_norm else []
        layers.append(nn.ReLU())
    return _kaiming(nn.Sequential(*layers))


def vgg_encoder(in_channels: int, *, width: int = 64, batch_norm: bool = False) -> nn.Module:
    """The eight convolutions of VGG11 for images of up to 32 by 32 pixels, without classifier.

    Args:
        in_channels: channels of the image.
        width: channels of the first convolution, 64 in VGG11; the embedding is 8 times as wide.
        batch_norm: whether each convolution is followed by batch normalization.

    Returns:
        A module from ``(b, in_channels, h, w)`` to ``(b, 8 * width)``, Kaiming normal (fan-out).

    Raises:
        ValueError: a size below 1.

    Source: Appendix E.1 (VGG11 without classifier).

    Example:
        >>> vgg_encoder(1, width=2)(torch.zeros(3, 1, 28, 28)).shape
        torch.Size([3, 16])
    """
    if min(in_channels, width) < 1:
        raise ValueError(f"in_channels and width must be at least 1, got {in_channels}, {width}")
    layers: list[nn.Module] = []
    channels = in_channels
    for stage in [(1,), (2,), (4, 4), (8, 8), (8, 8)]:
        for factor in stage:
            layers.append(nn.Conv2d(channels, factor * width, 3, padding=1))
            layers += [nn.BatchNorm2d(factor * width)] if batch_norm else []
            layers.append(nn.ReLU())
            channels = factor * width
        layers.append(nn.MaxPool2d(2, ceil_mode=True))
    return _kaiming(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten()))


@torch.no_grad()
def interpolate_init(teacher: nn.Module, other: nn.Module, alpha: float) -> nn.Module:
    r"""A student between the teacher and an independent draw, with the variance kept.

    .. math:: \theta_S(\alpha) = \frac{(1 - \alpha)\, \theta_T + \alpha\, \tilde\theta}
                                      {\sqrt{(1 - \alpha)^2 + \alpha^2}}

    Args:
        teacher: network with :math:`\theta_T`.
        other: network of the same architecture with :math:`\tilde\theta`.
        alpha: 0 gives the teacher, 1 the other network; in [0, 1].

    Returns:
        A new module; all parameters (biases and scales too) are mixed, buffers are the teacher's.

    Raises:
        ValueError: ``alpha`` out of range, or architectures that differ.

    Source: Section 4, "Local Initialization".

    Example:
        >>> a, b = nn.Linear(1, 1), nn.Linear(1, 1)
        >>> _ = nn.init.constant_(a.weight, 3.0), nn.init.constant_(b.weight, 4.0)
        >>> round(interpolate_init(a, b, 0.5).weight.item(), 4)  # (3 + 4) / sqrt(2)
        4.9497
    """
    if not 0.0 <= alpha <= 1.0:
        raise ValueError(f"alpha must lie in [0, 1], got {alpha}")
    student, theirs = copy.deepcopy(teacher), dict(other.named_parameters())
    own = dict(student.named_parameters())
    if {n: p.shape for n, p in own.items()} != {n: p.shape for n, p in theirs.items()}:
        raise ValueError("teacher and other must have the same architecture")
    delta = math.hypot(1.0 - alpha, alpha)
    for name, parameter in own.items():
        parameter.copy_(((1.0 - alpha) * parameter + alpha * theirs[name]) / delta)
    return student


def distillation_loss(
    student_logits: Tensor,
    teacher_logits: Tensor,
    teacher_temp: float = 1.0,
    student_temp: float = 1.0,
) -> Tensor:
    r"""KL divergence from the teacher's distribution to the student's.

    .. math:: \frac1b \sum_i \sum_c p_{ic} (\log p_{ic} - \log q_{ic}), \qquad
              p = \mathrm{softmax}(t / T_t), \; q = \mathrm{softmax}(s / T_s)

    Args:
        student_logits: :math:`s`, shape ``(..., b, m)``.
        teacher_logits: :math:`t`, same shape; treated as a constant.
        teacher_temp, student_temp: temperatures :math:`T_t, T_s > 0`.

    Returns:
        Mean over the batch, shape ``(...)``: one value for each network.

    Raises:
        ValueError: shapes that differ, an empty batch, a temperature that is not positive.

    Source: Section 3, equation (1) with the KL divergence; temperatures: Appendix E.3.

    Example:
        >>> t = torch.tensor([[0.0, 0.0]])
        >>> s = torch.tensor([[3.0, 1.0]]).log()  # 1/2 log(1/2 / (3/4)) + 1/2 log(1/2 / (1/4))
        >>> round(distillation_loss(s, t).exp().item() ** 2, 4)  # = 1/2 log(4/3)
        1.3333
    """
    shape = student_logits.shape
    if len(shape) < 2 or shape[-2] == 0 or shape != teacher_logits.shape:
        raise ValueError(
            "student_logits and teacher_logits must have the same shape (..., b, m), b >= 1, got "
            f"{tuple(student_logits.shape)} and {tuple(teacher_logits.shape)}"
        )
    if not teacher_temp > 0.0 or not student_temp > 0.0:
        raise ValueError(f"temperatures must be positive, got {teacher_temp} and {student_temp}")
    log_p = (teacher_logits.detach() / teacher_temp).log_softmax(dim=-1)
    log_q = (student_logits / student_temp).log_softmax(dim=-1)
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1).mean(dim=-1)


@torch.no_grad()
def _outputs(module: nn.Module, inputs: Tensor, batch_size: int, axis: int = 0) -> Tensor:
    """Outputs for all inputs in eval mode, a batch at a time; axis counts the examples."""
    module.eval()
    parts = inputs.split(batch_size, dim=axis)
    return torch.cat([_forward(module, part) for part in parts], dim=axis)


def _forward(network: nn.Module, x: Tensor) -> Tensor:
    out: Tensor = stacked_forward(network, x) if isinstance(network, Stacked) else network(x)
    return out


def distillation_epochs(
    student: nn.Module,
    teacher: nn.Module,
    inputs: Tensor,
    *,
    epochs: int,
    batch_size: int = 256,
    lr: float = 1e-3,
    generator: torch.Generator,
    teacher_inputs: Tensor | None = None,
) -> Iterator[Tensor]:
    r"""Train a student on its teacher's outputs with Adam, and stop after each epoch to look.

    Both may be :class:`~wellposed.nets.Stacked`; then ``inputs`` has a first axis for networks.

    Args:
        student: trained in place; it is in eval mode whenever this function yields.
        teacher: put into eval mode, otherwise unchanged. Batch normalization uses its running
            statistics, which for a random teacher are mean 0 and variance 1.
        inputs: ``(n, ...)``, or ``(size, n, ...)`` for stacked networks.
        epochs: passes over the inputs, at least 0.
        batch_size: inputs a step, at least 2.
        lr: step size of Adam.
        generator: source of the order of the inputs.
        teacher_inputs: what the teacher sees instead of ``inputs``, of the same shape.

    Yields:
        Mean loss of the epoch, shape ``()``, or ``(size,)`` for stacked networks.

    Raises:
        ValueError: ``epochs`` or ``batch_size`` too small, or ``teacher_inputs`` of another shape.

    Source: Section 4; optimizer: Appendix E.4.

    Example:
        >>> teacher = nn.Linear(2, 3)
        >>> student = interpolate_init(teacher, nn.Linear(2, 3), 0.5)
        >>> run = distillation_epochs(
        ...     student, teacher, torch.eye(2), epochs=200, lr=0.05, generator=torch.Generator()
        ... )
        >>> [loss.item() for loss in run][-1] < 1e-4
        True
    """
    if epochs < 0 or batch_size < 2:
        raise ValueError(f"epochs must be >= 0 and batch_size >= 2, got {epochs} and {batch_size}")
    shown = inputs if teacher_inputs is None else teacher_inputs
    if shown.shape != inputs.shape:
        raise ValueError(
            "teacher_inputs must have the shape of inputs, got "
            f"{tuple(shown.shape)} and {tuple(inputs.shape)}"
        )
    axis = int(isinstance(student, Stacked))
    targets = _outputs(teacher, shown, max(batch_size, EVAL_BATCH >> 3), axis)
    optimizer = StackedAdam(student.parameters(), lr=lr)
    for _ in range(epochs):
        student.train()
        losses = []
        for index in minibatches(inputs.shape[axis], batch_size, generator, inputs.device):
            if len(index) == 1:  # batch normalization cannot use a batch of one
                continue
            x, target = inputs.index_select(axis, index), targets.index_select(axis, index)
            loss = distillation_loss(_forward(student, x), target)
            optimizer.zero_grad()
            loss.sum().backward()
            optimizer.step()
            losses.append(loss.detach())
        student.eval()
        yield torch.stack(losses).mean(dim=0)


def distill(
    student: nn.Module,
    teacher: nn.Module,
    inputs: Tensor,
    epochs: int,
    batch_size: int = 256,
    lr: float = 1e-3,
    generator: torch.Generator | None = None,
) -> list[float]:
    """Train a student on its teacher's outputs; :func:`distillation_epochs` in one go.

    Args:
        student, teacher, inputs, epochs, batch_size, lr: as there.
        generator: source of the order of the inputs; torch's global one if not given.

    Returns:
        Mean loss of each epoch (over the networks too, if they are stacked).

    Raises:
        ValueError: ``epochs`` or ``batch_size`` too small.

    Source: Section 4; optimizer: Appendix E.4.

    Example:
        >>> teacher = nn.Linear(2, 3)
        >>> losses = distill(nn.Linear(2, 3), teacher, torch.randn(40, 2), 5, batch_size=8)
        >>> losses[-1] < losses[0]
        True
    """
    source = torch.default_generator if generator is None else generator
    run = distillation_epochs(
        student, teacher, inputs, epochs=epochs, batch_size=batch_size, lr=lr, generator=source
    )
    losses = [loss.mean() for loss in run]
    return torch.stack(losses).tolist() if losses else []


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

    Source: not in the paper; the control for its teacher with untouched statistics (Appendix E.3).

    Example:
        >>> net = recalibrate_batchnorm(nn.BatchNorm1d(1), torch.tensor([[1.0], [3.0]]))
        >>> net.running_mean.item(), net.running_var.item()
        (2.0, 2.0)
    """
    if inputs.shape[0] < 2:
        raise ValueError(f"inputs must hold at least two examples, got {inputs.shape[0]}")
    twin = copy.deepcopy(module)
    _refresh(twin, inputs)
    return twin


@torch.no_grad()
def _refresh(network: nn.Module, inputs: Tensor) -> Tensor:
    """Replace the statistics of batch normalization in place; outputs; ends in eval mode."""
    layers = network.template if isinstance(network, Stacked) else network
    norms = [m for m in layers.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    rates = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 1.0  # the statistics of this batch replace what was there
    network.train(bool(norms))
    outputs = _forward(network, inputs)
    network.eval()
    for norm, rate in zip(norms, rates):
        norm.momentum = rate
    return outputs


@torch.no_grad()
def embed(encoder: nn.Module, task: ProbeTask, *, recalibrate: bool = True) -> ProbeTask:
    """Embeddings in place of inputs, batch normalization first re-estimated on the task.

    Args:
        encoder: from inputs to embeddings ``(n, d)``; left as it is.
        task: the labeled data.
        recalibrate: whether to use :func:`recalibrate_batchnorm` on ``task.x``.

    Returns:
        The task with ``x`` and ``x_test`` embedded.

    Source: Section 3, "Probing".

    Example:
        >>> x, y = torch.tensor([[1.0], [3.0]]), torch.tensor([0, 1])
        >>> embed(nn.BatchNorm1d(1), ProbeTask(x, y, x, 1 - y)).x_test.sum().item()
        0.0
    """
    training, buffers = encoder.training, {k: v.clone() for k, v in encoder.named_buffers()}
    x = _refresh(encoder, task.x) if recalibrate else _outputs(encoder, task.x, EVAL_BATCH)
    x_test = _outputs(encoder, task.x_test, EVAL_BATCH)
    for name, before in buffers.items():
        encoder.get_buffer(name).copy_(before)
    encoder.train(training)
    return ProbeTask(x, task.y, x_test, task.y_test)


@torch.no_grad()
def linear_probes(tasks: Sequence[ProbeTask], *, c: float = PROBE_C) -> Tensor:
    r"""Accuracy of linear classifiers, one for each task: how much a linear map can read off.

    Multinomial logistic regression on standardized features with a ridge penalty,

    .. math:: \min_{W, b} \; \sum_i -\log \mathrm{softmax}(W x_i + b)_{y_i}
              + \frac{1}{2 c} \|W\|^2 ,

    all tasks side by side. The Hessian is at most :math:`\tfrac12 X^\top X` plus the penalty, for
    each class; gradients are divided by that bound, with Nesterov's momentum and restarts.

    Args:
        tasks: features ``(n, ...)``, flattened (constant ones are ignored), and classes ``(n,)``;
            all of the same sizes.
        c: inverse strength of the penalty, positive.

    Returns:
        Shares of test examples classified correctly, ``(len(tasks),)``, float64, on the CPU. One
        warning if the solver gave up.

    Raises:
        ValueError: no task or an empty one, ``c`` not positive, or features and classes that do
            not pair up.

    Source: Section 3, "Probing"; the bound: D. Böhning, Ann. Inst. Stat. Math. 44, 1992.

    Example:
        >>> x, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> linear_probes([ProbeTask(x, y, x, y), ProbeTask(-x, y, x, y)]).tolist()
        [1.0, 0.0]
    """
    if not c > 0.0 or not tasks:
        raise ValueError(f"c must be positive and tasks not be empty, got {c} and {len(tasks)}")
    if any(not 0 < len(t.x) == len(t.y) or not 0 < len(t.x_test) == len(t.y_test) for t in tasks):
        raise ValueError("x and y, and x_test and y_test, must have the same length, not 0")
    classes = int(torch.stack([torch.cat([t.y, t.y_test]) for t in tasks]).max()) + 1
    parts = [tasks[i : i + PROBE_TASKS] for i in range(0, len(tasks), PROBE_TASKS)]
    return torch.cat([_probe(part, classes, c) for part in parts]).cpu()


def _probe(tasks: Sequence[ProbeTask], classes: int, c: float) -> Tensor:
    """Probing accuracy of some tasks, shape (len(tasks),)."""
    x, z = (torch.stack([p.flatten(1) for p in q]) for q in zip(*((t.x, t.x_test) for t in tasks)))
    y, target = (torch.stack(list(q)) for q in zip(*((t.y, t.y_test) for t in tasks)))
    x, z = (v if v.dtype == torch.float64 else v.float() for v in (x, z))
    mean, std = x.mean(1, keepdim=True), x.std(1, correction=0, keepdim=True)
    std = torch.where(std > 1e-6 * (1 + mean.abs()), std, torch.inf)
    weight, bias = _logistic((x - mean) / std, F.one_hot(y, classes).to(x).mT.contiguous(), c)
    hits = (((z - mean) / std) @ weight.mT + bias.mT).argmax(2) == target
    return hits.double().mean(1)


def _logistic(x: Tensor, onehot: Tensor, c: float) -> tuple[Tensor, Tensor]:
    """Weights (k, classes, d) and biases (k, classes, 1) for centered features (k, n, d)."""
    k, n, d = x.shape
    ridge = 1.0 / (c * n)
    metric = torch.linalg.inv(0.5 * x.mT @ x / n + ridge * torch.eye(d, dtype=x.dtype).to(x))
    now = [x.new_zeros(k, onehot.shape[1], d), x.new_zeros(k, onehot.shape[1], 1)]
    ahead, pace = now, x.new_ones(k, 1, 1)
    for step in range(PROBE_STEPS):
        residual = torch.baddbmm(ahead[1], ahead[0], x.mT).softmax(1).sub_(onehot)
        grad = [residual @ x / n + ridge * ahead[0], residual.mean(2, keepdim=True)]
        if step % 10 == 0 and max(g.abs().max().item() for g in grad) < PROBE_TOL:
            break
        new = [ahead[0] - grad[0] @ metric, ahead[1] - 2.0 * grad[1]]
        move = [a - b for a, b in zip(new, now)]
        uphill = sum((g * m).sum((1, 2), keepdim=True) for g, m in zip(grad, move)) > 0
        pace = torch.where(uphill, 1.0, pace)  # the momentum points uphill: forget it
        faster = (1 + (1 + 4 * pace.square()).sqrt()) / 2
        ahead = [a + (pace - 1) / faster * m for a, m in zip(new, move)]
        now, pace = new, faster
    else:
        warnings.warn("the probe's solver stopped before it converged", stacklevel=4)
    return ahead[0], ahead[1]


def linear_probe(
    train_x: Tensor, train_y: Tensor, test_x: Tensor, test_y: Tensor, *, c: float = PROBE_C
) -> float:
    """Accuracy of a linear classifier on frozen features; :func:`linear_probes` for one task.

    Args:
        train_x: features ``(n, ...)``, flattened.
        train_y: classes ``(n,)``, int64.
        test_x, test_y: the same for testing.
        c: inverse strength of the penalty, positive.

    Returns:
        Share of test examples classified correctly, in [0, 1].

    Raises:
        ValueError: ``c`` not positive, no example, or features and classes that do not pair up.

    Source: Section 3, "Probing".

    Example:
        >>> x, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> linear_probe(x, y, torch.tensor([[-3.0], [3.0], [4.0], [5.0]]), y)
        0.75
    """
    return float(linear_probes([ProbeTask(train_x, train_y, test_x, test_y)], c=c))


def probe_encoders(encoders: Sequence[nn.Module], tasks: Sequence[ProbeTask]) -> Tensor:
    """Probing accuracy of encoders, batch normalization first re-estimated on the task.

    Args:
        encoders: from inputs to embeddings ``(n, d)``; left as they are.
        tasks: the labeled data, one task for each encoder, all of the same sizes.

    Returns:
        :func:`linear_probes` on the embeddings, ``(len(encoders),)``.

    Raises:
        ValueError: lengths that differ, or an empty task.

    Source: Section 3, "Probing".

    Example:
        >>> x, y = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]]), torch.tensor([0, 0, 1, 1])
        >>> probe_encoders([nn.Identity()], [ProbeTask(x, y, x, y)]).tolist()
        [1.0]
    """
    if len(encoders) != len(tasks):
        raise ValueError("encoders and tasks must have the same length")
    return linear_probes([embed(encoder, task) for encoder, task in zip(encoders, tasks)])


def probed_distillation(
    students: Sequence[nn.Module],
    teachers: Sequence[nn.Module],
    inputs: Sequence[Tensor],
    tasks: Sequence[ProbeTask],
    *,
    looks: Sequence[int],
    batch_size: int = 256,
    lr: float = 1e-3,
    generator: torch.Generator,
    teacher_inputs: Sequence[Tensor] = (),
) -> DistillationRun:
    """Distill students side by side, and probe their encoders along the way.

    Args:
        students: networks of one architecture, each a ``nn.Sequential`` of an encoder and a head;
            left as they are.
        teachers: one for each student; left as they are.
        inputs: what each student is distilled on, ``(n, ...)`` each, all of one shape.
        tasks: what each encoder is probed on.
        looks: epochs after which to probe, increasing; the last one ends the training.
        batch_size, lr, generator: as in :func:`distillation_epochs`.
        teacher_inputs: what each teacher sees, if that differs from ``inputs``.

    Returns:
        Curves on the CPU, and the trained students.

    Raises:
        ValueError: ``looks`` not increasing from 1 up, lengths that do not match, or empty tasks.

    Source: Section 4 and Figure 1.

    Example:
        >>> x, y = torch.randn(8, 2), torch.arange(8) % 2
        >>> teacher = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 4))
        >>> run = probed_distillation(
        ...     [teacher] * 2, [teacher] * 2, [x, x], [ProbeTask(x, y, x, y)] * 2,
        ...     looks=[1, 3], batch_size=4, generator=torch.Generator(),
        ... )
        >>> run.epochs.tolist(), run.accuracy.shape, run.loss.shape
        ([0, 1, 3], torch.Size([2, 3]), torch.Size([2, 3]))
    """
    lengths = {len(part) for part in (students, teachers, inputs, tasks, teacher_inputs or inputs)}
    if len(lengths) > 1:
        raise ValueError("students, teachers, inputs and tasks must have the same length")
    if not looks or looks[0] < 1 or any(b <= a for a, b in pairwise(looks)):
        raise ValueError(f"looks must be increasing epochs from 1 up, got {list(looks)}")
    stack = Stacked(students)
    run = distillation_epochs(
        stack,
        Stacked(teachers),
        torch.stack(list(inputs)),
        epochs=looks[-1],
        batch_size=batch_size,
        lr=lr,
        generator=generator,
        teacher_inputs=torch.stack(list(teacher_inputs)) if teacher_inputs else None,
    )
    name, encoder = next(students[0].named_children())
    scratch, stacked = copy.deepcopy(encoder), dict(stack.named_parameters())
    sources = [
        (parameter, stacked[stack.names()[f"{name}.{own}"]])
        for own, parameter in scratch.named_parameters()
    ]

    @torch.no_grad()
    def probe() -> Tensor:
        features = []
        for i, task in enumerate(tasks):  # one encoder at a time takes on each student's weights
            for parameter, source in sources:
                parameter.copy_(source[i])
            features.append(embed(scratch, task))
        return linear_probes(features)

    accuracies, losses = [probe()], []
    for epoch, loss in enumerate(run, start=1):
        losses.append(loss)
        if epoch in looks:
            accuracies.append(probe())
    return DistillationRun(
        epochs=torch.tensor([0, *looks]),
        accuracy=torch.stack(accuracies, dim=1),
        loss=torch.stack(losses, dim=1).cpu(),
        students=stack.networks(),
    )


def embedding_geometry(embeddings: Tensor) -> Geometry:
    r"""Mean cosine between embeddings, and their effective rank.

    With unit vectors :math:`u_i = x_i / \|x_i\|` and the eigenvalues :math:`\lambda_k` of the
    covariance of the :math:`x_i`,

    .. math:: \mathrm{cosine} = \frac{\|\sum_i u_i\|^2 - n}{n (n - 1)}, \qquad
              \mathrm{rank} = \exp\Bigl(-\sum_k s_k \log s_k\Bigr), \;
              s_k = \lambda_k / \textstyle\sum_l \lambda_l .

    Args:
        embeddings: ``(n, d)`` with ``n >= 2``.

    Returns:
        Two scalars of the dtype of ``embeddings``; the rank is 1 where all embeddings are equal.

    Raises:
        ValueError: not a matrix with two rows or more.

    Source: not in the paper, which speaks of *uncollapsing* the initialization (Section 4).

    Example:
        >>> g = embedding_geometry(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
        >>> round(g.rank.item(), 4)  # the two directions vary equally
        2.0
    """
    if embeddings.ndim != 2 or embeddings.shape[0] < 2:
        raise ValueError(
            f"embeddings must have shape (n, d) with n >= 2, got {tuple(embeddings.shape)}"
        )
    n = embeddings.shape[0]
    units = F.normalize(embeddings, dim=1)
    cosine = (units.sum(0).square().sum() - units.square().sum()) / (n * (n - 1))
    share = torch.linalg.eigvalsh(torch.cov(embeddings.mT)).clamp_min(0)
    share = share / share.sum().clamp_min(torch.finfo(share.dtype).tiny)
    return Geometry(cosine, torch.special.entr(share).sum().exp())


@torch.no_grad()
def magnitude_mask(module: nn.Module, sparsity: float) -> dict[str, Tensor]:
    r"""Which weights survive when the globally smallest are pruned.

    Args:
        module: any network; all parameters with two axes or more take part, biases do not.
        sparsity: share to prune, in [0, 1).

    Returns:
        Boolean masks by name of parameter: False for the ``floor(sparsity * N)`` smallest
        magnitudes among all ``N`` weights.

    Raises:
        ValueError: ``sparsity`` out of range, or no such parameter.

    Source: Section 6, "Lottery Tickets" (global magnitude pruning).

    Example:
        >>> net = nn.Linear(4, 1)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, -1.0, 2.0, -4.0]]))
        >>> magnitude_mask(net, 0.5)["weight"].tolist()
        [[True, False, False, True]]
    """
    if not 0.0 <= sparsity < 1.0:
        raise ValueError(f"sparsity must lie in [0, 1), got {sparsity}")
    weights = {name: p for name, p in module.named_parameters() if p.dim() > 1}
    if not weights:
        raise ValueError("module must have at least one parameter with two axes or more")
    size = torch.cat([w.abs().flatten() for w in weights.values()])
    keep = torch.ones_like(size, dtype=torch.bool)
    keep[size.argsort(stable=True)[: math.floor(sparsity * len(size))]] = False
    parts = keep.split([w.numel() for w in weights.values()])
    return {name: part.view_as(w) for (name, w), part in zip(weights.items(), parts)}


def random_mask(
    module: nn.Module, sparsity: float, *, generator: torch.Generator
) -> dict[str, Tensor]:
    """Masks with as many survivors a layer as :func:`magnitude_mask`, at random places.

    Args:
        module: any network.
        sparsity: share to prune, in [0, 1).
        generator: source of the places; it must live on the CPU.

    Returns:
        Boolean masks by name of parameter.

    Raises:
        ValueError: as in :func:`magnitude_mask`.

    Source: not in the paper; J. Frankle, M. Carbin, arXiv:1803.03635, reinitialize instead.

    Example:
        >>> net = nn.Linear(4, 1)
        >>> random_mask(net, 0.5, generator=torch.Generator())["weight"].sum().item()
        2
    """

    def shuffled(mask: Tensor) -> Tensor:
        order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
        return mask.flatten()[order].view_as(mask)

    return {name: shuffled(mask) for name, mask in magnitude_mask(module, sparsity).items()}


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
        _refresh(ends, calibration)
        errors.append(1.0 - accuracy(stacked_forward(ends, x), y))
    return torch.stack(errors, dim=1)
