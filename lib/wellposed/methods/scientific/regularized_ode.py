r"""Train a neural differential equation to be easy for its own solver.

Pal, Ma, Shah and Rackauckas, "Opening the Blackbox: Accelerating Neural Differential Equations by
Regularizing Internal Solver Heuristics", ICML 2021, arXiv 2105.03918.

Claim: an adaptive solver estimates its error $q_j$ and the stiffness $S_j$ at each step $h_j$
anyway; in the loss they give an equation that needs fewer evaluations, at no extra one in training.

$$L=L_\text{task}+\lambda_E\sum_jq_j|h_j|+\lambda_S\sum_jS_j|h_j|,$$

differentiated through the accepted steps (discrete adjoint), whose sizes are constants.

Departures from the paper: $q_j$ is the error in units of the tolerance, training takes the mean
over steps of $q_jh_j$ and the largest $S_j$, all as in the authors' code; the vector field ends in
no tanh; gradients are clipped to norm 1 and the learning rate falls to zero; several networks are
trained side by side, each with step sizes of its own.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.ops.ode import ODESolution, odeint, odeint_rows
from wellposed.ops.sde import BrownianPath, brownian_path, sdeint_rows
from wellposed.train import StackedSGD, accuracy, generator, minibatches

__all__ = [
    "Arm",
    "ClassifierRuns",
    "NeuralClassifier",
    "NeuralODE",
    "ODESolution",
    "classifier_loss",
    "error_regularizer",
    "evaluate_classifiers",
    "odeint",
    "stiffness_regularizer",
    "train_classifiers",
]

STABILITY = 3.5068  # length of the real stability interval of Tsitouras' pair, authors' code
FINAL_WEIGHT = 0.1  # the weight of the error falls to this part of its first value, section 4
CLIP = 1.0  # largest norm of a gradient


def _over_steps(values: Tensor, solution: ODESolution, reduction: str, words: str) -> Tensor:
    """Sum over accepted steps, or their mean."""
    if reduction not in ("sum", "mean"):
        raise ValueError(f"reduction must be {words}, got {reduction!r}")
    total = (values * solution.step_sizes).sum(0)
    return total if reduction == "sum" else total / (solution.step_sizes > 0).sum(0)


def error_regularizer(solution: ODESolution, reduction: str = "sum") -> Tensor:
    r"""The solver's own error estimates, weighted with the lengths of their steps.

    $$\mathcal R_E=\sum_jq_j|h_j|$$

    Args:
        solution: of a solver in :mod:`wellposed.ops`.
        reduction: "sum" as in the paper, or "mean" over accepted steps as in its code.

    Returns:
        One number, or one for each row `(r,)`; differentiable.

    Raises:
        ValueError: another `reduction`.

    Source: Pal et al. 2021, error-estimate regularization.

    Example:
        >>> run = odeint(lambda t, z: 0 * z + 5, torch.ones(1, dtype=torch.float64))
        >>> round(float(error_regularizer(run)), 6)   # a straight path is free of error
        0.0
    """
    return _over_steps(solution.error, solution, reduction, "'sum' or 'mean'")


def stiffness_regularizer(solution: ODESolution, reduction: str = "sum") -> Tensor:
    r"""The solver's own stiffness estimates, weighted with the lengths of their steps.

    $$\mathcal R_S=\sum_jS_j|h_j|\qquad\text{or}\qquad\max_jS_j\,/\,3.5068$$

    Args:
        solution: of a solver in :mod:`wellposed.ops`.
        reduction: "sum" as in the paper, "mean" over accepted steps, or "max" as in its code.

    Returns:
        One number, or one for each row `(r,)`; differentiable.

    Raises:
        ValueError: another `reduction`.

    Source: Pal et al. 2021, stiffness-estimate regularization.

    Example:
        >>> run = odeint(lambda t, z: -7.0136 * z, torch.ones(1, dtype=torch.float64))
        >>> round(float(stiffness_regularizer(run, "max")), 6)
        2.0
    """
    if reduction == "max":
        return solution.stiffness.amax(0) / STABILITY
    return _over_steps(solution.stiffness, solution, reduction, "'sum', 'mean' or 'max'")


class NeuralODE(nn.Module):
    r"""A vector field as a layer: maps $z(0)$ to the solution whose `y` is $z(1)$.

    Args:
        func: module or function $f(t,z)$, `t` a float, with a value like `z`.
        t_span: start and end.
        rtol, atol, first_step, max_steps: as in `odeint`.

    Raises:
        TypeError: `func` cannot be called. ValueError and RuntimeError as in `odeint`, when called.

    Source: Chen et al. 2018; the solution carries the estimates of Pal et al. 2021.

    Example:
        >>> layer = NeuralODE(lambda t, z: -z, t_span=(0.0, math.log(2)))
        >>> solution = layer(torch.ones(3, dtype=torch.float64))
        >>> [round(v, 4) for v in solution.y.tolist()]
        [0.5, 0.5, 0.5]
    """

    def __init__(
        self,
        func: Callable[[float, Tensor], Tensor],
        *,
        t_span: tuple[float, float] = (0.0, 1.0),
        rtol: float = 1e-6,
        atol: float = 1e-6,
        first_step: float | None = None,
        max_steps: int = 10_000,
    ) -> None:
        super().__init__()
        if not callable(func):
            raise TypeError(f"func must be callable, got {type(func).__name__}")
        self.func, self.t_span = func, t_span
        self.solve = partial(
            odeint, rtol=rtol, atol=atol, first_step=first_step, max_steps=max_steps
        )

    def forward(self, z: Tensor) -> ODESolution:
        """The solution from `z`, any shape."""
        return self.solve(self.func, z, self.t_span)


@dataclass(frozen=True)
class Arm:
    """What one arm of a comparison adds to the task's loss; all zero is the plain network."""

    error: float = 0.0  # weight of the error estimates at the start; falls to a tenth
    stiffness: float = 0.0  # weight of the largest stiffness estimate
    taylor: float = 0.0  # weight of the squared second derivative along the path (TayNODE)
    jitter: float = 0.0  # the end is drawn from 1 - jitter to 1 + jitter (STEER)
    weight_decay: float = 0.0


class NeuralClassifier(nn.Module):
    r"""Classifiers side by side: a differential equation from the input on, then a linear layer.

    $$z(0)=x,\quad\dot z=W_2\tanh(W_1z+u_1t+b_1)+u_2t+b_2,\quad\text{logits}=W_3z(1)+b_3,$$

    and for the stochastic equation the noise $(W_4z+b_4)\,dW$, entry by entry. Weights start
    uniform within $\pm1/\sqrt{\text{inputs}}$; rows of equal seeds start equal.

    Args:
        seeds: one for each row.
        sizes: numbers of states, of hidden units and of classes.
        dtype: of the parameters.

    Raises:
        ValueError: no seed, or sizes that are not three positive numbers.

    Source: Pal et al. 2021, experiments on MNIST (there 784 states and 100 hidden units).

    Example:
        >>> net = NeuralClassifier([0, 1], (5, 3, 4), dtype=torch.float32)
        >>> tuple(net.drift(torch.zeros(2), torch.ones(2, 6, 5)).shape)
        (2, 6, 5)
    """

    def __init__(
        self,
        seeds: Sequence[int],
        sizes: tuple[int, int, int],
        *,
        dtype: torch.dtype = torch.float64,
    ) -> None:
        super().__init__()
        if len(seeds) == 0:
            raise ValueError("seeds must hold at least one seed")
        if len(sizes) != 3 or min(sizes) < 1:
            raise ValueError(f"sizes must be three positive numbers, got {tuple(sizes)}")
        dim, width, classes = sizes
        layers = {1: (dim, width), 2: (width, dim), 3: (dim, classes), 4: (dim, dim)}
        sources = {s: generator(s) for s in seeds}
        for layer, (fan, out) in layers.items():
            for name, rows in (("w", fan), ("b", 1), ("u", 1)):
                if name == "u" and layer > 2:
                    continue
                drawn = {
                    s: (2 * torch.rand(rows, out, generator=g, dtype=torch.float64) - 1)
                    for s, g in sources.items()
                }
                stack = torch.stack([drawn[s] for s in seeds]) / math.sqrt(fan)
                self.register_parameter(f"{name}{layer}", nn.Parameter(stack.to(dtype)))

    def _affine(self, layer: int, t: Tensor | None, y: Tensor) -> Tensor:
        bias: Tensor = getattr(self, f"b{layer}")  # `get_parameter` takes much longer
        if t is not None:
            bias = torch.addcmul(bias, getattr(self, f"u{layer}"), t.view(-1, 1, 1))
        return torch.baddbmm(bias, y, getattr(self, f"w{layer}"))

    def drift(self, t: Tensor, z: Tensor) -> Tensor:
        """The vector field at times `(r,)` and states `(r, b, dim)`."""
        return self._affine(2, t, self._affine(1, t, z).tanh())

    def diffusion(self, t: Tensor, z: Tensor) -> Tensor:
        """The noise of each state; the time plays no part."""
        return self._affine(4, None, z)

    def classify(self, z: Tensor) -> Tensor:
        """Logits `(r, b, classes)` of states `(r, b, dim)`."""
        return self._affine(3, None, z)

    def bend(self, t: Tensor, z: Tensor) -> tuple[Tensor, Tensor]:
        r"""The vector field $f$ and the second derivative, $\partial_zf\,f+\partial_tf$."""
        hidden = self._affine(1, t, z).tanh()
        f = self._affine(2, t, hidden)
        inner = torch.baddbmm(self.get_parameter("u1"), f, self.get_parameter("w1"))
        inner = (1 - hidden.square()) * inner
        second = torch.baddbmm(self.get_parameter("u2"), inner, self.get_parameter("w2"))
        return f, second

    def take(self, row: int) -> NeuralClassifier:
        """A copy of one row, as a stack of one."""
        if not 0 <= row < len(self.get_parameter("b1")):
            raise ValueError(f"row must be in [0, {len(self.get_parameter('b1'))}), got {row}")
        one = copy.deepcopy(self)
        for p in one.parameters():
            p.data = p.data[row : row + 1].clone()
        return one


def _solve(
    net: NeuralClassifier,
    x: Tensor,
    end: float | Tensor,
    tol: float,
    taylor: bool = False,
    path: BrownianPath | None = None,
) -> tuple[ODESolution, Tensor, Tensor | None]:
    """The solution, the logits, and the Taylor penalty of each row if asked for."""
    if path is not None:
        noisy = sdeint_rows(net.drift, net.diffusion, x, path, rtol=tol, atol=tol)
        return noisy, net.classify(noisy.y), None
    if not taylor:
        plain = odeint_rows(net.drift, x, (0.0, end), rtol=tol, atol=tol)
        return plain, net.classify(plain.y), None

    def wider(t: Tensor, state: Tensor) -> Tensor:
        f, second = net.bend(t, state[..., :-1])
        return torch.cat([f, second.square().mean(-1, keepdim=True)], -1)

    both = torch.cat([x, torch.zeros_like(x[..., :1])], -1)
    solution = odeint_rows(wider, both, (0.0, end), rtol=tol, atol=tol)
    return solution, net.classify(solution.y[..., :-1]), solution.y[..., -1].mean(1)


def classifier_loss(
    net: NeuralClassifier,
    x: Tensor,
    y: Tensor,
    arms: Sequence[Arm],
    *,
    progress: float = 0.0,
    tol: float = 1e-6,
    end: float | Tensor = 1.0,
    path: BrownianPath | None = None,
) -> tuple[Tensor, ODESolution]:
    r"""Loss of each row: cross entropy, and what the row's arm adds.

    $$L=L_\text{task}+\lambda_E\,10^{-p}\,\overline{q_jh_j}+\lambda_S\max_jS_j/3.5068
    +\lambda_T\int\overline{\ddot z^2}\,dt$$

    Args:
        net: networks of `r` rows.
        x, y: inputs `(r, b, dim)` and labels `(r, b)`.
        arms: one for each row; either all or none has a Taylor weight.
        progress: $p$, from 0 at the start of the training to 1 at its end.
        tol: relative and absolute tolerance of the solver.
        end: of the interval, one number or one for each row.
        path: Brownian motions; with them the equation is stochastic.

    Returns:
        Losses `(r,)` and the solution.

    Raises:
        ValueError: arms do not match the rows, only some are Taylor's, or these have a path.

    Source: Pal et al. 2021; the Taylor penalty: Kelly et al. 2020, order 2.

    Example:
        >>> net = NeuralClassifier([0], (5, 3, 4))
        >>> x, y = torch.ones(1, 6, 5, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.int64)
        >>> plain, _ = classifier_loss(net, x, y, [Arm()])
        >>> more, run = classifier_loss(net, x, y, [Arm(error=2.0)])
        >>> torch.allclose(more - plain, 2 * error_regularizer(run, "mean"))
        True
    """
    if len(arms) != len(x) or x.shape[:2] != y.shape:
        raise ValueError(
            f"arms, x (r, b, dim) and y (r, b) must agree in rows, got {len(arms)} arms, "
            f"{tuple(x.shape)} and {tuple(y.shape)}"
        )
    taylor = any(arm.taylor for arm in arms)
    if taylor != all(arm.taylor for arm in arms):
        raise ValueError("arms must all have a Taylor weight, or none")
    if path is not None and (taylor or not isinstance(end, float) or end != 1.0):
        raise ValueError("path allows neither a Taylor weight nor an end other than 1")
    solution, logits, bends = _solve(net, x, end, tol, taylor, path)
    weights = lambda name: x.new_tensor([getattr(arm, name) for arm in arms])  # noqa: E731
    task = F.cross_entropy(logits.flatten(0, 1), y.flatten(), reduction="none")
    loss = task.view(y.shape).mean(1)
    if any(arm.error for arm in arms):
        falling = weights("error") * FINAL_WEIGHT**progress
        loss = loss + falling * error_regularizer(solution, "mean")
    if any(arm.stiffness for arm in arms):
        loss = loss + weights("stiffness") * stiffness_regularizer(solution, "max")
    if bends is not None:
        loss = loss + weights("taylor") * bends
    return loss, solution


@dataclass(frozen=True)
class ClassifierRuns:
    """What training showed, before the first epoch and after each; axes: time, arm, seed."""

    nfe: Tensor  # mean evaluations a batch of the watched examples
    accuracy: Tensor  # on the watched examples
    stiffness: Tensor  # largest estimate on the watched examples
    training_nfe: Tensor  # evaluations in training, added up
    nets: list[NeuralClassifier]  # after each epoch, the first before training


@torch.no_grad()
def evaluate_classifiers(
    net: NeuralClassifier,
    x: Tensor,
    y: Tensor,
    *,
    tol: float = 1e-6,
    batch_size: int = 50,
    path: BrownianPath | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Cost and quality of each network.

    Args:
        net: networks of `r` rows.
        x, y: inputs `(n, dim)` and labels `(n,)`, the same for all networks.
        tol: relative and absolute tolerance of the solver.
        batch_size: examples that share a step size; the rest of a batch is left out.
        path: Brownian motions of `(paths, batch_size, dim)`, the same for every batch.

    Returns:
        Mean evaluations a batch, accuracy and largest stiffness estimate, each `(r,)`.

    Raises:
        ValueError: `batch_size` not in `[1, n]`, or another number of labels.

    Source: ours.

    Example:
        >>> net = NeuralClassifier([0], (5, 3, 4))
        >>> x, y = torch.zeros(4, 5, dtype=torch.float64), torch.arange(4)
        >>> float(evaluate_classifiers(net, x, y, batch_size=4)[1])   # equal inputs, equal answers
        0.25
    """
    if not 1 <= batch_size <= len(x):
        raise ValueError(f"batch_size must be in [1, {len(x)}], got {batch_size}")
    if len(x) != len(y):
        raise ValueError(f"x and y must have the same length, got {len(x)} and {len(y)}")
    rows, counts, right, stiff = len(net.get_parameter("b1")), [], [], []
    for part in torch.arange(len(x) // batch_size * batch_size).to(x.device).split(batch_size):
        solution, logits, _ = _solve(net, x[part].expand(rows, -1, -1), 1.0, tol, path=path)
        assert isinstance(solution.nfe, Tensor)
        counts.append(solution.nfe.to(x.dtype))
        right.append(accuracy(logits, y[part].expand(rows, -1)).to(x.dtype))
        stiff.append(solution.stiffness.amax(0))
    return torch.stack(counts).mean(0), torch.stack(right).mean(0), torch.stack(stiff).amax(0)


def _clip(net: NeuralClassifier) -> None:
    """Scale the gradient of each row to at most norm 1."""
    grads = [p.grad for p in net.parameters() if p.grad is not None]
    norm = torch.stack([g.square().sum((1, 2)) for g in grads]).sum(0).sqrt()
    factor = (CLIP / norm.clamp_min(1e-12)).clamp_max(1.0).view(-1, 1, 1)
    for g in grads:
        g.mul_(factor)


def train_classifiers(
    x: Tensor,
    y: Tensor,
    x_watch: Tensor,
    y_watch: Tensor,
    *,
    arms: Sequence[Arm],
    seeds: Sequence[int],
    width: int = 16,
    epochs: int = 10,
    batch_size: int = 50,
    lr: float = 0.3,
    momentum: float = 0.9,
    tol: float = 1e-6,
    stochastic: bool = False,
) -> ClassifierRuns:
    r"""Train all arms with all seeds side by side; arms share initial weights and minibatches.

    In the stochastic equation the arms share their Brownian motions, too.

    Args:
        x, y: training inputs `(n, dim)` and labels `(n,)`.
        x_watch, y_watch: those on which the curves are measured; nothing is trained on them.
        arms: what is added to the loss.
        seeds: of weights, minibatches and motions.
        width: hidden units of the vector field.
        epochs: passes over the training data.
        batch_size: examples a step; the rest of an epoch that fills no batch is left out.
        lr, momentum: learning rate at the start, which falls linearly to zero, and momentum.
        tol: relative and absolute tolerance, in training and test.
        stochastic: whether the equation has noise.

    Returns:
        Curves `(epochs + 1, arms, seeds)` and the networks.

    Raises:
        ValueError: no arm or seed, a number out of range, fewer examples than a batch, another
            number of labels, nothing to watch.

    Source: Pal et al. 2021, supervised classification; hyper-parameters are ours.

    Example:
        >>> x = torch.eye(4, dtype=torch.float64).repeat(5, 1)
        >>> data = (x, x.argmax(1), x, x.argmax(1))
        >>> runs = train_classifiers(*data, arms=[Arm()], seeds=[0], epochs=20, batch_size=20)
        >>> tuple(runs.nfe.shape), float(runs.accuracy[-1, 0, 0])
        ((21, 1, 1), 1.0)
    """
    if len(arms) == 0 or len(seeds) == 0:
        raise ValueError("arms and seeds must not be empty")
    if epochs < 1 or not 1 <= batch_size <= len(x):
        raise ValueError(
            f"epochs must be at least 1 and batch_size in [1, {len(x)}], got {epochs}, {batch_size}"
        )
    if len(x) != len(y) or not 0 < len(x_watch) == len(y_watch):
        raise ValueError("x and y, and x_watch and y_watch, must pair up and hold examples")
    rows, shape = [arm for arm in arms for _ in seeds], (len(arms), len(seeds))
    classes = int(torch.maximum(y.max(), y_watch.max())) + 1
    sizes = (x.shape[1], width, classes)
    net = NeuralClassifier(list(seeds) * len(arms), sizes, dtype=x.dtype).to(x.device)
    decay = [arm.weight_decay for arm in rows]
    sgd = StackedSGD(net.parameters(), lr=lr, momentum=momentum, weight_decay=decay)
    batches, motions = [generator(s) for s in seeds], [generator(s + 1) for s in seeds]
    ends = generator(seeds[0] + 2)
    jitter = x.new_tensor([arm.jitter for arm in rows])
    draw_path = partial(brownian_path, generator=motions, like=x)
    paths = lambda b: draw_path((len(seeds), b, x.shape[1])) if stochastic else None  # noqa: E731
    size = min(batch_size, len(x_watch))
    look = partial(evaluate_classifiers, x=x_watch, y=y_watch, tol=tol, batch_size=size)
    fixed = paths(size)
    looks = [look(net, path=fixed)]
    nets = [copy.deepcopy(net)]
    spent = [torch.zeros(len(rows), dtype=torch.int64, device=x.device)]
    steps = len(x) // batch_size
    for epoch in range(epochs):
        used = spent[-1].clone()
        orders = zip(*(minibatches(len(x), batch_size, g, x.device) for g in batches))
        for step, parts in zip(range(steps), orders):
            index = torch.stack(parts).repeat(len(arms), 1)
            draw = 2 * torch.rand(len(rows), generator=ends, dtype=torch.float64) - 1
            end = 1 + jitter * draw.to(jitter) if any(arm.jitter for arm in rows) else 1.0
            done, path = epoch / max(epochs - 1, 1), paths(batch_size)
            loss, solution = classifier_loss(
                net, x[index], y[index], rows, progress=done, tol=tol, end=end, path=path
            )
            loss.sum().backward()
            _clip(net)
            sgd.step(1 - (epoch * steps + step) / (epochs * steps))
            used += solution.nfe
        spent.append(used)
        looks.append(look(net, path=fixed))
        nets.append(copy.deepcopy(net))
    nfe, right, stiff = (torch.stack(part).unflatten(1, shape) for part in zip(*looks))
    return ClassifierRuns(nfe, right, stiff, torch.stack(spent).unflatten(1, shape), nets)
