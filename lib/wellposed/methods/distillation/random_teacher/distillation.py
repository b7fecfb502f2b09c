"""Students that copy their teacher, and what can be read off their encoders."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from wellposed.nets import Stacked
from wellposed.nets.batchnorm import recalibrate_batchnorm_
from wellposed.nets.columns import stacked_forward
from wellposed.ops.linear_probe import ProbeTask, linear_probes
from wellposed.train import StackedAdam, minibatches

__all__ = [
    "DistillationRun",
    "distill",
    "distillation_epochs",
    "distillation_loss",
    "embed",
    "probe_encoders",
    "probed_distillation",
]

EVAL_BATCH = 4096  # inputs at a time where nothing is trained


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
        >>> from wellposed.methods.distillation.random_teacher.networks import interpolate_init
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
    x = (
        recalibrate_batchnorm_(encoder, task.x)
        if recalibrate
        else _outputs(encoder, task.x, EVAL_BATCH)
    )
    x_test = _outputs(encoder, task.x_test, EVAL_BATCH)
    for name, before in buffers.items():
        encoder.get_buffer(name).copy_(before)
    encoder.train(training)
    return ProbeTask(x, task.y, x_test, task.y_test)


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
