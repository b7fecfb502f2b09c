r"""Networks that tune their own regularization while they train.

M. MacKay, P. Vicol, J. Lorraine, D. Duvenaud, R. Grosse, "Self-Tuning Networks: Bilevel
Optimization of Hyperparameters using Structured Best-Response Functions", ICLR 2019,
arXiv:1903.03088.

Claim: the best weights are a function of the hyperparameters :math:`\lambda`. A layer whose units
are gated by :math:`\lambda`,

.. math:: \hat W(\lambda) = W_e + \mathrm{diag}(V\lambda)\,W_h , \qquad
          \hat b(\lambda) = b_e + (C\lambda) \odot b_h ,

learns that function near the current :math:`\lambda` from randomly perturbed copies of it; the
gradient of the validation loss through it then tunes :math:`\lambda` within one run.

Glossary: :math:`H` hyperparameters :math:`\lambda` (``hyper``), unconstrained; perturbations
:math:`\epsilon \sim N(0, \mathrm{diag}\,\sigma^2)` with
:math:`\sigma = \mathrm{softplus}(s)` (``scale``, ``raw_scale``); weight :math:`\tau` of their
entropy (``entropy_weight``). A leading axis of *runs* means networks trained side by side.

Departures from the paper: the learned scalar that the authors' code puts on the elementary output
is left out (it is not in the formula); :func:`self_tune` trains weights by Adam (networks have the
authors' SGD with momentum); the learning rate of weights falls linearly; weight decay is tuned too,
as the exact squared norm of each example's own weights. Added for comparison: plain networks with
fixed or replayed hyperparameters.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from wellposed.ops.numerics import warn_of_nan
from wellposed.train import StackedAdam, StackedSGD, seeded
from wellposed.train import generator as make_generator

__all__ = [
    "HIGH",
    "LOW",
    "NAMES",
    "BestResponseConv2d",
    "BestResponseLinear",
    "SelfTuningResult",
    "TuningRun",
    "TuningTask",
    "best_of_drawn",
    "dropout",
    "from_interval",
    "gaussian_entropy",
    "make_task",
    "perturb",
    "ridge_best_response",
    "ridge_gates",
    "ridge_response_jacobian",
    "self_tune",
    "to_interval",
    "train_fixed",
    "train_self_tuning",
]

NAMES = ("input dropout", "hidden dropout", "log10 weight decay", "shift")
"""What the networks tune; the shift is a share of the image's side."""
LOW = (0.0, 0.0, -5.0, 0.0)
HIGH = (0.9, 0.9, -1.0, 0.3)
MOMENTUM = 0.9  # in the authors' code
GATE_STD = 0.01  # initial standard deviation of V and C in the authors' code


@dataclass(frozen=True)
class SelfTuningResult:
    """Tuned hyperparameters; leading axes are runs side by side.

    Attributes:
        hyper: last unconstrained hyperparameters, shape ``(..., H)``.
        scale: last standard deviations of the perturbation, ``(..., H)``.
        hyper_history: shape ``(rounds + 1, ..., H)``, the start first.
    """

    hyper: Tensor
    scale: Tensor
    hyper_history: Tensor


@dataclass(frozen=True)
class TuningTask:
    """Images and one split for each seed; the index tensors have shape ``(seeds, n)``."""

    x: Tensor
    y: Tensor
    train: Tensor
    valid: Tensor
    test: Tensor


@dataclass(frozen=True)
class TuningRun:
    """Curves of networks trained side by side, for ``(trials, seeds)`` networks.

    Attributes:
        valid_curve: validation cross-entropy at each evaluation, ``(evaluations, trials, seeds)``.
        valid_loss: the least of these, shape ``(trials, seeds)``.
        test_loss, test_error: cross-entropy and share of wrong labels with the weights of that
            evaluation; test data decide nothing.
        hyper_history: unconstrained hyperparameters ``(time, trials, seeds, H)``.
        scale: last standard deviations of the perturbation ``(trials, seeds, H)``; 0 if none.
    """

    valid_curve: Tensor
    valid_loss: Tensor
    test_loss: Tensor
    test_error: Tensor
    hyper_history: Tensor
    scale: Tensor


# --- hyperparameters -------------------------------------------------------------------------


def _bounds(raw: Tensor, low: Sequence[float], high: Sequence[float]) -> tuple[Tensor, Tensor]:
    if any(not a < b for a, b in zip(low, high)) or len(low) != len(high):
        raise ValueError(f"low must be below high in each interval, got {low} and {high}")
    if raw.ndim == 0 or raw.shape[-1] != len(low):
        raise ValueError(f"the last axis must hold {len(low)} values, got {tuple(raw.shape)}")
    return raw.new_tensor(low), raw.new_tensor(high)


def to_interval(raw: Tensor, low: Sequence[float], high: Sequence[float]) -> Tensor:
    r"""Map unconstrained numbers into intervals: :math:`lo + (hi - lo)\,\mathrm{sigmoid}(raw)`.

    Args:
        raw: shape ``(..., H)``.
        low, high: ends of the H intervals.

    Returns:
        Shape ``(..., H)``.

    Raises:
        ValueError: an empty interval, or another number of them.

    Source: the authors' code.

    Example:
        >>> to_interval(torch.zeros(1), [0.0], [0.9]).item()
        0.44999998807907104
    """
    a, b = _bounds(raw, low, high)
    return a + (b - a) * raw.sigmoid()


def from_interval(value: Tensor, low: Sequence[float], high: Sequence[float]) -> Tensor:
    r"""Inverse of :func:`to_interval`.

    Args:
        value: shape ``(..., H)``, strictly inside the intervals.
        low, high: ends of the H intervals.

    Returns:
        Unconstrained numbers, shape ``(..., H)``.

    Raises:
        ValueError: an empty interval, or a value on or beyond an end.

    Source: the authors' code.

    Example:
        >>> from_interval(torch.tensor([0.75]), [0.0], [1.0]).exp().round(decimals=4).item()
        3.0
    """
    a, b = _bounds(value, low, high)
    if not bool(((value > a) & (value < b)).all()):
        raise ValueError("value must lie strictly inside its interval")
    return ((value - a) / (b - a)).logit()


def perturb(
    hyper: Tensor, raw_scale: Tensor, batch_size: int, generator: torch.Generator | None = None
) -> Tensor:
    r"""Draw :math:`\lambda + \epsilon` for each example, :math:`\epsilon\sim N(0,\sigma^2)`.

    Args:
        hyper: :math:`\lambda`, shape ``(..., H)``.
        raw_scale: :math:`s` with :math:`\sigma = \mathrm{softplus}(s)`, shape ``(..., H)``.
        batch_size: examples B, at least 1.
        generator: source of the noise, on the device of ``hyper``.

    Returns:
        Shape ``(..., B, H)``; differentiable in both tensors.

    Raises:
        ValueError: shapes that differ, or ``batch_size`` below 1.

    Source: Section 3.3; the form of sigma from the authors' code.

    Example:
        >>> perturb(torch.tensor([1.0, 2.0]), torch.full((2,), -99.0), 3).tolist()[2]
        [1.0, 2.0]
    """
    if hyper.ndim == 0 or hyper.shape != raw_scale.shape:
        shapes = f"{tuple(hyper.shape)} and {tuple(raw_scale.shape)}"
        raise ValueError(f"hyper and raw_scale must have one shape (..., H), got {shapes}")
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    shape = (*hyper.shape[:-1], batch_size, hyper.shape[-1])
    noise = torch.randn(shape, generator=generator, dtype=hyper.dtype, device=hyper.device)
    return hyper.unsqueeze(-2) + F.softplus(raw_scale).unsqueeze(-2) * noise


def gaussian_entropy(raw_scale: Tensor) -> Tensor:
    r"""Entropy of the perturbation, :math:`\sum_i \log(\sigma_i \sqrt{2\pi e})`.

    Args:
        raw_scale: :math:`s` with :math:`\sigma = \mathrm{softplus}(s)`, shape ``(..., H)``.

    Returns:
        Shape ``(...)``, 0-d for one run.

    Source: Section 3.3.

    Example:
        >>> unit = torch.tensor([math.log(math.e - 1)])  # softplus of it is 1
        >>> round(gaussian_entropy(unit).item(), 4)
        1.4189
    """
    return (F.softplus(raw_scale).log() + 0.5 * math.log(2 * math.pi * math.e)).sum(-1)


# --- best-response layers --------------------------------------------------------------------


def _affine(x: Tensor, weight: Tensor, bias: Tensor | None, stride: int, padding: int) -> Tensor:
    """Layers of R runs side by side: ``weight`` (R, out, in) or (R, out, in, k, k)."""
    if weight.ndim == 3:
        return x @ weight.mT if bias is None else torch.baddbmm(bias.unsqueeze(1), x, weight.mT)
    runs = len(x)
    out = F.conv2d(  # one group of channels a run
        x.transpose(0, 1).flatten(1, 2), weight.flatten(0, 1),
        None if bias is None else bias.flatten(), stride, padding, groups=runs,
    )  # fmt: skip
    apart: Tensor = out.unflatten(1, (runs, -1)).transpose(0, 1)
    return apart


Weights = Sequence[Tensor | None]


def _layer(x: Tensor, hyper: Tensor, w: Weights, stride: int = 2, padding: int = 1) -> Tensor:
    """A layer of R runs: (weight, bias), or these with (response, response, gate, gate)."""
    weight, bias = w[0], w[1]
    assert weight is not None
    out = _affine(x, weight, bias, stride, padding)
    if len(w) == 2:
        return out
    response, bias_response, gate, bias_gate = w[2:]
    assert response is not None
    assert gate is not None
    axes = (1,) * (weight.ndim - 3)
    gates = (hyper @ gate.mT).unflatten(-1, (-1, *axes))
    out = torch.addcmul(out, gates, _affine(x, response, None, stride, padding))
    if bias_response is not None and bias_gate is not None:
        shift = (hyper @ bias_gate.mT) * bias_response.unsqueeze(1)
        out = out + shift.unflatten(-1, (-1, *axes))
    return out


def _squared_norm(hyper: Tensor, w: Weights) -> Tensor:
    r""":math:`\|\hat W(\lambda)\|^2` for each example without forming it, shape ``(R, B)``."""
    assert w[0] is not None
    weight = w[0].flatten(2)
    norm = weight.square().sum((1, 2)).unsqueeze(1)
    if len(w) == 2:
        return norm
    assert w[2] is not None
    assert w[4] is not None
    response, gates = w[2].flatten(2), hyper @ w[4].mT
    cross, square = (weight * response).sum(2), response.square().sum(2)
    return norm + (gates * (2 * cross.unsqueeze(1) + gates * square.unsqueeze(1))).sum(2)


class _BestResponse(nn.Module):
    """Parameters and initial values that both layers share."""

    def __init__(self, shape: tuple[int, ...], num_hyper: int, bias: bool) -> None:
        super().__init__()
        if min(*shape, num_hyper) < 1:
            raise ValueError(f"sizes and num_hyper must be at least 1, got {shape}, {num_hyper}")
        bound = math.prod(shape[1:]) ** -0.5
        out = shape[0]

        def uniform(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size).uniform_(-bound, bound))

        def gate() -> nn.Parameter:
            return nn.Parameter(GATE_STD * torch.randn(out, num_hyper))

        self.weight = uniform(*shape)
        self.bias = uniform(out) if bias else None
        self.weight_response = uniform(*shape)
        self.bias_response = uniform(out) if bias else None
        self.weight_gate = gate()
        self.bias_gate = gate() if bias else None

    def _one_run(self, input: Tensor, hyper: Tensor) -> tuple[Tensor, Tensor, Weights]:
        """Input, hyperparameters and parameters with a leading axis of one run."""
        width = self.weight_gate.shape[1]
        if hyper.ndim == 1:
            hyper = hyper.expand(len(input), -1)
        if hyper.ndim != 2 or hyper.shape[1] != width or len(hyper) != len(input):
            expected = f"({width},) or ({len(input)}, {width})"
            raise ValueError(f"hyper must have shape {expected}, got {tuple(hyper.shape)}")
        every = (self.weight, self.bias, self.weight_response, self.bias_response)
        weights = [p if p is None else p[None] for p in (*every, self.weight_gate, self.bias_gate)]
        return input[None], hyper[None], weights

    def squared_norm(self, hyper: Tensor) -> Tensor:
        r""":math:`\|\hat W(\lambda)\|^2` for hyperparameters ``(B, H)``, shape ``(B,)``."""
        _, hyper, weights = self._one_run(hyper, hyper)
        return _squared_norm(hyper, weights)[0]


class BestResponseLinear(_BestResponse):
    r"""Linear layer whose weights are a function of the hyperparameters.

    .. math:: y = W_e x + b_e + (V\lambda) \odot (W_h x) + (C\lambda) \odot b_h

    so each example of a batch can have its own :math:`\lambda`. Parameters: ``weight``,
    ``weight_response`` (out, in), ``bias``, ``bias_response`` (out,), ``weight_gate``,
    ``bias_gate`` (out, H).

    Args:
        in_features, out_features, num_hyper: sizes, at least 1.
        bias: whether there is a bias.

    Raises:
        ValueError: a size below 1; in ``forward(input (B, in), hyper (B, H) or (H,))``,
            hyperparameters of another shape.

    Source: the paper's best-response layer; initial values from the authors' code.

    Example:
        >>> layer = BestResponseLinear(3, 2, num_hyper=1)
        >>> x = torch.ones(1, 3)
        >>> at = [layer(x, torch.tensor([v])) for v in (0.0, 1.0, 2.0)]  # affine in hyper
        >>> torch.allclose(at[2] - at[1], at[1] - at[0], atol=1e-6)
        True
    """

    def __init__(self, in_features: int, out_features: int, num_hyper: int, bias: bool = True):
        super().__init__((out_features, in_features), num_hyper, bias)

    def forward(self, input: Tensor, hyper: Tensor) -> Tensor:
        """Map input ``(B, in)`` and hyperparameters ``(B, H)`` or ``(H,)`` to ``(B, out)``."""
        return _layer(*self._one_run(input, hyper))[0]


class BestResponseConv2d(_BestResponse):
    r"""Convolution whose output channels are gated by the hyperparameters.

    .. math:: y = W_e * x + b_e + (V\lambda) \odot (W_h * x) + (C\lambda) \odot b_h

    Args:
        in_channels, out_channels, kernel_size, num_hyper: sizes, at least 1.
        stride, padding: as in ``torch.nn.Conv2d``.
        bias: whether there is a bias.

    Raises:
        ValueError: a size below 1; in ``forward``, hyperparameters of another shape.

    Source: the paper's convolutional best response; initial values from the authors' code.

    Example:
        >>> layer = BestResponseConv2d(1, 4, 3, num_hyper=2, padding=1)
        >>> layer(torch.zeros(5, 1, 8, 8), torch.zeros(2)).shape
        torch.Size([5, 4, 8, 8])
    """

    def __init__(
        self, in_channels: int, out_channels: int, kernel_size: int, num_hyper: int,
        stride: int = 1, padding: int = 0, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__((out_channels, in_channels, kernel_size, kernel_size), num_hyper, bias)
        self.stride, self.padding = stride, padding

    def forward(self, input: Tensor, hyper: Tensor) -> Tensor:
        """Map input ``(B, in, h, w)`` and ``hyper`` ``(B, H)`` or ``(H,)`` to ``(B, out, ...)``."""
        return _layer(*self._one_run(input, hyper), self.stride, self.padding)[0]


# --- the alternating training ----------------------------------------------------------------


Loss = Callable[[Tensor], Tensor]


def _descend(optimizer: StackedAdam | StackedSGD, loss: Tensor, lr_factor: float = 1.0) -> None:
    """One step in the optimizer's own parameters; no other tensor collects a gradient."""
    for p, grad in zip(optimizer.params, torch.autograd.grad(loss, optimizer.params)):
        p.grad = grad
    optimizer.step(lr_factor)


class _Tuner:
    """The state of alternating training: hyperparameters, scales and both optimizers."""

    def __init__(
        self, train_loss: Loss, valid_loss: Loss, weights: StackedAdam | StackedSGD,
        hyper: Tensor, *, hyper_lr: float | list[float], tune_scale: bool, init_scale: float,
        entropy_weight: float | Tensor, batch_size: int, generator: torch.Generator | None,
    ) -> None:  # fmt: skip
        if init_scale <= 0:
            raise ValueError(f"init_scale must be positive, got {init_scale}")
        raw = math.log(math.expm1(init_scale))
        self.hyper = hyper.detach().clone().requires_grad_()
        self.raw_scale = torch.full_like(hyper, raw, requires_grad=True)
        self.train_loss, self.valid_loss = train_loss, valid_loss
        self.tune_scale, self.entropy_weight = tune_scale, entropy_weight
        self.batch_size, self.generator = batch_size, generator
        self.weights = weights
        self.tuned = StackedAdam([self.hyper, *[self.raw_scale] * tune_scale], lr=hyper_lr)

    @property
    def scale(self) -> Tensor:
        return F.softplus(self.raw_scale.detach())

    def _perturbed(self) -> Tensor:
        return perturb(self.hyper, self.raw_scale, self.batch_size, self.generator)

    def train_step(self, lr_factor: float = 1.0) -> None:
        # Detached: hyperparameters must not collect gradients of the training loss.
        _descend(self.weights, self.train_loss(self._perturbed().detach()).sum(), lr_factor)

    def valid_step(self) -> None:
        if not self.tune_scale:
            batch = self.hyper.unsqueeze(-2).expand(*self.hyper.shape[:-1], self.batch_size, -1)
            _descend(self.tuned, self.valid_loss(batch).sum())
            return
        entropy = gaussian_entropy(self.raw_scale)
        loss = self.valid_loss(self._perturbed()).sum()
        _descend(self.tuned, loss - (self.entropy_weight * entropy).sum())


def self_tune(
    train_loss: Loss,
    valid_loss: Loss,
    response_parameters: Iterable[Tensor],
    hyper: Tensor,
    *,
    steps: int,
    train_steps: int = 2,
    valid_steps: int = 1,
    warmup_steps: int = 0,
    response_lr: float = 1e-2,
    hyper_lr: float = 1e-2,
    tune_scale: bool = True,
    init_scale: float = 0.5,
    entropy_weight: float = 1e-3,
    batch_size: int = 32,
    generator: torch.Generator | None = None,
) -> SelfTuningResult:
    r"""Alternate between fitting the best response and descending the validation loss.

    With :math:`\mu = \lambda+\epsilon`, a round is ``train_steps`` steps on
    :math:`E_\epsilon f(\mu, \hat w_\phi(\mu))` in :math:`\phi`, then ``valid_steps`` steps on
    :math:`E_\epsilon F(\mu, \hat w_\phi(\mu)) - \tau \mathcal H[\epsilon]` in :math:`\lambda`
    and :math:`s`, all by Adam.

    Args:
        train_loss, valid_loss: map perturbed hyperparameters ``(..., B, H)`` to a scalar, or to
            one number a run. Regularizers must be set by the hyperparameters they are given.
        response_parameters: :math:`\phi`, leaf tensors that require gradients; trained in place.
        hyper: the start, shape ``(H,)``, or ``(..., H)`` for runs side by side; copied.
        steps: rounds, at least 1.
        train_steps, valid_steps: steps in a round, at least 1.
        warmup_steps: first rounds, in which only :math:`\phi` is trained.
        response_lr, hyper_lr: learning rates.
        tune_scale: whether :math:`\sigma` is tuned; if not, validation steps are unperturbed.
        init_scale: initial :math:`\sigma > 0`.
        entropy_weight: :math:`\tau`.
        batch_size: perturbations a step.
        generator: source of the perturbations.

    Returns:
        A :class:`SelfTuningResult`.

    Raises:
        ValueError: a number of steps below 1, or ``init_scale`` not positive.

    Source: Algorithm 1.

    Example:
        >>> w = torch.zeros(2, requires_grad=True)  # best response w[0] + w[1] * hyper
        >>> f = lambda h: (w[0] + w[1] * h - h).square().mean()  # training wants it to be hyper
        >>> g = lambda h: (w[0] + w[1] * h - 3).square().mean()  # validation wants it to be 3
        >>> torch.manual_seed(0) and None
        >>> result = self_tune(f, g, [w], torch.zeros(1), steps=500, hyper_lr=0.03)
        >>> round(result.hyper.item(), 1)
        3.0
    """
    if min(steps, train_steps, valid_steps) < 1:
        raise ValueError("steps, train_steps and valid_steps must be at least 1")
    tuner = _Tuner(
        train_loss, valid_loss, StackedAdam(response_parameters, lr=response_lr), hyper,
        hyper_lr=hyper_lr, tune_scale=tune_scale, init_scale=init_scale,
        entropy_weight=entropy_weight, batch_size=batch_size, generator=generator,
    )  # fmt: skip
    history = [tuner.hyper.detach().clone()]
    for i in range(steps):
        for _ in range(train_steps):
            tuner.train_step()
        for _ in range(valid_steps if i >= warmup_steps else 0):
            tuner.valid_step()
        history.append(tuner.hyper.detach().clone())
    return SelfTuningResult(history[-1], tuner.scale, torch.stack(history))


# --- ridge regression, where the best response is known --------------------------------------


def _spectrum(inputs: Tensor, log_reg: float | Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if inputs.ndim != 2 or 0 in inputs.shape:
        raise ValueError(f"inputs must have shape (n, d), not empty, got {tuple(inputs.shape)}")
    U, d, Q = torch.linalg.svd(inputs, full_matrices=False)
    return U, d, Q, torch.sigmoid(2 * d.log() - log_reg)


def _divided(gates: Tensor, d: Tensor) -> Tensor:
    """Gates over singular values; both vanish together, the gates faster."""
    return gates / torch.where(d > 0, d, 1.0)


def ridge_gates(inputs: Tensor, log_reg: float | Tensor) -> Tensor:
    r"""Gates that turn least squares into ridge, :math:`\mathrm{sigmoid}(\log d_i^2 - \lambda)`.

    Args:
        inputs: shape ``(n, d)``.
        log_reg: :math:`\lambda`, the logarithm of the penalty on :math:`\|w\|^2` beside a *sum*
            of squared errors.

    Returns:
        One gate for each singular value :math:`d_i`, in descending order, ``(min(n, d),)``.

    Raises:
        ValueError: ``inputs`` is not a matrix.

    Source: the paper's two-layer linear network with Jacobian norm penalty.

    Example:
        >>> ridge_gates(torch.tensor([[2.0, 0.0], [0.0, 1.0]]), 0.0).tolist()
        [0.800000011920929, 0.5]
    """
    return _spectrum(inputs, log_reg)[3]


def _checked_targets(inputs: Tensor, targets: Tensor) -> Tensor:
    if targets.shape != inputs.shape[:1]:
        raise ValueError(f"targets must have shape ({len(inputs)},), got {tuple(targets.shape)}")
    return targets


def ridge_best_response(inputs: Tensor, targets: Tensor, log_reg: float | Tensor) -> Tensor:
    r"""Ridge weights in gated form, :math:`w^* = Q^\top[\mathrm{gates}\odot Q w_{OLS}]`.

    Here :math:`X = U \mathrm{diag}(d) Q`; they minimize
    :math:`\|Xw - t\|^2 + e^\lambda \|w\|^2`.

    Args:
        inputs: :math:`X`, shape ``(n, d)``.
        targets: :math:`t`, shape ``(n,)``.
        log_reg: :math:`\lambda`.

    Returns:
        Weights, shape ``(d,)``.

    Raises:
        ValueError: shapes that do not fit.

    Source: the paper's theorem on linear networks; the gates in :func:`ridge_gates`.

    Example:
        >>> ridge_best_response(torch.eye(2), torch.tensor([2.0, 4.0]), 0.0).tolist()
        [1.0, 2.0]
    """
    U, d, Q, gates = _spectrum(inputs, log_reg)
    return Q.mT @ (_divided(gates, d) * (U.mT @ _checked_targets(inputs, targets)))


def ridge_response_jacobian(inputs: Tensor, targets: Tensor, log_reg: float | Tensor) -> Tensor:
    r"""Slope of ridge weights, :math:`dw^*/d\lambda = -e^\lambda A^{-1}A^{-1}X^\top t`.

    With :math:`A = X^\top X + e^\lambda I`; here by the slope of the gates.

    Args:
        inputs: :math:`X`, shape ``(n, d)``.
        targets: :math:`t`, shape ``(n,)``.
        log_reg: :math:`\lambda`.

    Returns:
        Shape ``(d,)``.

    Raises:
        ValueError: shapes that do not fit.

    Source: derivative of the best response, derived here.

    Example:
        >>> ridge_response_jacobian(torch.eye(2), torch.tensor([2.0, 4.0]), 0.0).tolist()
        [-0.5, -1.0]
    """
    U, d, Q, gates = _spectrum(inputs, log_reg)
    slope = -gates * (1 - gates)
    return Q.mT @ (_divided(slope, d) * (U.mT @ _checked_targets(inputs, targets)))


# --- networks side by side -------------------------------------------------------------------


def dropout(
    input: Tensor, probability: Tensor, training: bool, generator: torch.Generator | None = None
) -> Tensor:
    """Dropout with one rate for each example; what is kept is divided by its probability.

    Args:
        input: shape ``(..., B, features...)``.
        probability: rates in [0, 1], one for each leading entry; they get no gradient.
        training: whether to drop; if not, the input is returned.
        generator: source of the masks.

    Returns:
        Shape of ``input``.

    Raises:
        ValueError: ``probability`` does not match the leading axes of ``input``.

    Source: the authors' code.

    Example:
        >>> dropout(torch.ones(2, 3), torch.tensor([0.0, 0.0]), True).tolist()
        [[1.0, 1.0, 1.0], [1.0, 1.0, 1.0]]
    """
    if probability.shape != input.shape[: probability.ndim]:
        expected = tuple(input.shape[: probability.ndim])
        raise ValueError(f"probability must have shape {expected}, got {tuple(probability.shape)}")
    if not training:
        return input
    keep = 1 - probability.detach().reshape(
        *probability.shape, *[1] * (input.ndim - probability.ndim)
    )
    noise = torch.rand(input.shape, generator=generator, dtype=input.dtype, device=input.device)
    gain = torch.where(keep > 0, keep.reciprocal(), 0.0)
    return input * noise.lt_(keep).mul_(gain)


def best_of_drawn(valid_loss: Tensor, values: Tensor, k: int) -> Tensor:
    r"""Mean of ``values`` at the least validation loss among k trials, over all choices of k.

    The trial of rank j (from 0) among m is the best of k drawn ones in
    :math:`\binom{m-1-j}{k-1}` of :math:`\binom mk` cases.

    Args:
        valid_loss: shape ``(m, ...)``, one entry a trial.
        values: what to report, same shape.
        k: trials drawn, at least 1; more than m count as m.

    Returns:
        Shape ``(...)``.

    Raises:
        ValueError: shapes that differ, or ``k`` below 1.

    Source: not in the paper; what a grid or random search finds does not depend on its order.

    Example:
        >>> loss = torch.tensor([3.0, 1.0, 2.0])
        >>> round(best_of_drawn(loss, loss, 2).item(), 4)  # pairs give 1, 2 and 1
        1.3333
    """
    if values.shape != valid_loss.shape or valid_loss.ndim == 0:
        raise ValueError("values must have the shape of valid_loss, (trials, ...)")
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    m = len(valid_loss)
    k = min(k, m)
    share = [math.comb(m - 1 - j, k - 1) / math.comb(m, k) for j in range(m)]
    ranked = values.gather(0, valid_loss.argsort(0))
    mean: Tensor = torch.tensordot(values.new_tensor(share), ranked, dims=1)
    return mean


def make_task(
    x: Tensor, y: Tensor, *, num_train: int, num_valid: int, num_test: int, seeds: Sequence[int]
) -> TuningTask:
    """Draw disjoint training, validation and test examples for each seed.

    Args:
        x: images, shape ``(N, h, w)``.
        y: int64 labels, shape ``(N,)``.
        num_train, num_valid, num_test: sizes, at least 1 each and at most N together.
        seeds: one split for each.

    Returns:
        A :class:`TuningTask`.

    Raises:
        ValueError: sizes that do not fit, or images of another shape.

    Source: our splits; validation data steer the hyperparameters, so test data are a third part.

    Example:
        >>> x, y = torch.zeros(6, 2, 2), torch.zeros(6).long()
        >>> make_task(x, y, num_train=2, num_valid=2, num_test=1, seeds=[0, 1]).train.shape
        torch.Size([2, 2])
    """
    sizes = (num_train, num_valid, num_test)
    if min(sizes) < 1 or sum(sizes) > len(x):
        raise ValueError(f"num_train, num_valid, num_test must fit {len(x)} rows, got {sizes}")
    if x.ndim != 3 or y.shape != x.shape[:1]:
        raise ValueError(f"x must have shape (N, h, w), y (N,), got {tuple(x.shape)}")
    order = torch.stack([torch.randperm(len(x), generator=make_generator(s)) for s in seeds])
    parts = order[:, : sum(sizes)].to(x.device).split(sizes, dim=1)
    return TuningTask(x, y, *parts)


def _pick_shifted(
    padded: Tensor, rows: Tensor, reach: Tensor, margin: int, generator: torch.Generator
) -> Tensor:
    """Images moved by whole pixels: uniform in [-reach, reach], rounded at random, zero-filled.

    ``padded`` (N, side, side) has ``margin`` zero pixels around each image; ``rows`` and ``reach``
    (in pixels) have shape (R, B), the result (R, B, h, h).
    """
    side = padded.shape[-1]
    shape = (2, 2, *reach.shape)
    noise = torch.rand(shape, generator=generator, dtype=reach.dtype, device=reach.device)
    direction, rounding = noise.unbind(1)
    offset = ((2 * direction - 1) * reach + rounding).nan_to_num().floor().clamp(-margin, margin)
    dy, dx = (offset + margin).to(torch.int64)
    inner = torch.arange(side - 2 * margin, device=padded.device)
    window = (inner.unsqueeze(1) * side + inner).flatten()
    corner = rows * side * side + dy * side + dx
    index = corner.unsqueeze(-1) + window
    moved: Tensor = padded.flatten()[index].unflatten(-1, (len(inner), len(inner)))
    return moved


class _Networks:
    """Classifiers of all trials and seeds: stacked parameters, losses and evaluation."""

    def __init__(
        self, task: TuningTask, hyper: Tensor, seeds: Sequence[int], *, best_response: bool,
        channels: Sequence[int], hidden: Sequence[int], batch_size: int, seed: int,
    ) -> None:  # fmt: skip
        S = len(task.train)
        if len(seeds) != S or hyper.ndim != 3 or hyper.shape[1:] != (S, len(NAMES)):
            raise ValueError(
                f"hyperparameters must have shape (..., trials, {S}, {len(NAMES)}) and seeds {S} "
                f"numbers, got {tuple(hyper.shape)} and {len(seeds)}"
            )
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1, got {batch_size}")
        trials = len(hyper)
        self.task, self.shape, self.batch_size = task, (trials, S), batch_size
        self.side, self.classes = task.x.shape[-1], int(task.y.max()) + 1
        self.margin = math.ceil(HIGH[3] * self.side)
        self.padded = F.pad(task.x, (self.margin,) * 4, value=float(task.x.min()))
        self.generator = make_generator(seed, task.x.device)
        self.owner = torch.arange(S, device=task.x.device).repeat(trials)
        nets: list[list[nn.Module]] = []
        for s in seeds:
            with seeded(s):
                nets.append(self._layers(best_response, channels, hidden))
        self.layers: list[list[Tensor]] = []
        for layer in zip(*nets):
            stacks = [torch.stack(group) for group in zip(*(part.parameters() for part in layer))]
            runs = [p.detach().repeat(trials, *[1] * (p.ndim - 1)).to(task.x) for p in stacks]
            self.layers.append([p.requires_grad_() for p in runs])

    def _layers(
        self, best_response: bool, channels: Sequence[int], hidden: Sequence[int]
    ) -> list[nn.Module]:
        H, side, inputs = len(NAMES), self.side, 1
        layers: list[nn.Module] = []
        for out in channels:
            conv = (inputs, out, 3)
            layers.append(BestResponseConv2d(*conv, H) if best_response else nn.Conv2d(*conv))
            inputs, side = out, (side + 1) // 2  # stride 2 and padding 1 are those of _layer
        sizes = (inputs * side * side, *hidden, self.classes)
        for a, b in itertools.pairwise(sizes):
            layers.append(BestResponseLinear(a, b, H) if best_response else nn.Linear(a, b))
        return layers

    @property
    def parameters(self) -> list[Tensor]:
        return [p for layer in self.layers for p in layer]

    def logits(self, x: Tensor, hyper: Tensor, rates: Tensor | None) -> Tensor:
        """Scores of images (R, B, h, w) under hyper (R, B, H); dropout where there are rates."""
        x = x.unsqueeze(2) if self.layers[0][0].ndim == 5 else x.flatten(2)
        for i, layer in enumerate(self.layers):
            if layer[0].ndim == 3:
                x = x.flatten(2)
            if rates is not None:
                x = dropout(x, rates[..., min(i, 1)], True, self.generator)
            x = _layer(x, hyper, layer)
            if i < len(self.layers) - 1:
                x = x.relu()
        return x

    def _draw(self, part: Tensor) -> Tensor:
        """A minibatch for each run, with replacement, from its own seed's examples."""
        shape = (len(self.owner), self.batch_size)
        pick = torch.randint(part.shape[1], shape, generator=self.generator, device=part.device)
        return part[self.owner].gather(1, pick)

    def _images(self, rows: Tensor) -> Tensor:
        images: Tensor = self.task.x.index_select(0, rows.flatten()).unflatten(0, rows.shape)
        return images

    def _cross_entropy(self, logits: Tensor, y: Tensor) -> Tensor:
        own = logits.gather(-1, y.unsqueeze(-1)).squeeze(-1)
        return (logits.logsumexp(-1) - own).mean(1)

    def train_loss(self, hyper: Tensor) -> Tensor:
        """Regularized loss of a fresh minibatch, each example under its own hyperparameters."""
        rows = self._draw(self.task.train)
        y = self.task.y[rows]
        drop, drop_hidden, log_decay, shift = to_interval(hyper, LOW, HIGH).unbind(-1)
        x = _pick_shifted(self.padded, rows, shift * self.side, self.margin, self.generator)
        loss = self._cross_entropy(self.logits(x, hyper, torch.stack((drop, drop_hidden), -1)), y)
        norms = torch.stack([_squared_norm(hyper, layer) for layer in self.layers]).sum(0)
        return loss + 0.5 * (10**log_decay * norms).mean(1)

    def valid_loss(self, hyper: Tensor) -> Tensor:
        """Cross-entropy of a validation minibatch, every regularizer switched off."""
        rows = self._draw(self.task.valid)
        logits = self.logits(self._images(rows), hyper, None)
        return self._cross_entropy(logits, self.task.y[rows])

    @torch.no_grad()
    def evaluate(self, part: Tensor, hyper: Tensor) -> tuple[Tensor, Tensor]:
        """Loss and error of all runs, shape (trials, seeds)."""
        rows = part[self.owner]
        y = self.task.y[rows]
        logits = self.logits(self._images(rows), hyper.unsqueeze(1).expand(*rows.shape, -1), None)
        error = (logits.argmax(-1) != y).to(logits.dtype).mean(1)
        return self._cross_entropy(logits, y).view(self.shape), error.view(self.shape)


def _interval(steps: int, evaluations: int) -> int:
    if min(steps, evaluations) < 1:
        raise ValueError(f"steps and evaluations must be at least 1, got {steps}, {evaluations}")
    return max(1, steps // evaluations)


class _Curves:
    """Validation losses during training, and the weights where each network had its least."""

    def __init__(self, nets: _Networks) -> None:
        self.nets, self.valid = nets, list[Tensor]()

    def add(self, hyper: Tensor) -> None:
        loss, _ = self.nets.evaluate(self.nets.task.valid, hyper)
        now = [hyper, *[p.detach() for p in self.nets.parameters]]
        if not self.valid:
            self.least, self.best = loss, [p.clone() for p in now]
        better = (loss < self.least).flatten()
        for old, new in zip(self.best, now):
            torch.where(better.view(-1, *[1] * (new.ndim - 1)), new, old, out=old)
        self.least = self.least.minimum(loss)
        self.valid.append(loss)

    @torch.no_grad()
    def run(self, history: Tensor, scale: Tensor) -> TuningRun:
        hyper, *best = self.best
        for p, value in zip(self.nets.parameters, best):
            p.copy_(value)
        test = self.nets.evaluate(self.nets.task.test, hyper)
        warn_of_nan("training", *self.valid, *test, history, scale)
        return TuningRun(torch.stack(self.valid), self.least, *test, history, scale)


def _per_run(value: float | Sequence[float], trials: int, seeds: int) -> float | list[float]:
    """One number for all runs, or one for each trial repeated over the seeds."""
    if isinstance(value, int | float):
        return float(value)
    if len(value) != trials:
        raise ValueError(f"expected one number, or one for each of {trials} trials: {value}")
    return [v for v in value for _ in range(seeds)]


def train_fixed(
    task: TuningTask,
    schedule: Tensor,
    *,
    seeds: Sequence[int],
    steps: int,
    channels: Sequence[int] = (),
    hidden: Sequence[int] = (32,),
    lr: float = 0.01,
    batch_size: int = 128,
    evaluations: int = 10,
    seed: int = 0,
) -> TuningRun:
    """Train plain networks side by side with given hyperparameters: the baseline and the replay.

    SGD with momentum 0.9, the learning rate falling linearly to zero, as for self-tuning networks.

    Args:
        task: splits of S seeds.
        schedule: unconstrained hyperparameters, shape ``(time, trials, S, 4)``, spread evenly over
            the steps; ``time`` 1 for constants. The order is that of :data:`NAMES`.
        seeds: S seeds of the initial weights, the same in each trial.
        steps: training steps, at least 1.
        channels: widths of 3 x 3 convolutions of stride 2.
        hidden: widths of fully connected layers after them.
        lr: learning rate of the weights.
        batch_size: examples a step, drawn with replacement.
        evaluations: how often the validation loss is taken.
        seed: of batches, masks and shifts.

    Returns:
        A :class:`TuningRun`; a RuntimeWarning if a network diverged.

    Raises:
        ValueError: shapes that do not fit, or a number below 1.

    Source: the authors' control, a plain network that replays a schedule (Table 1).

    Example:
        >>> task = make_task(torch.rand(9, 4, 4), torch.arange(9) % 3, num_train=4, num_valid=3,
        ...     num_test=2, seeds=[0])
        >>> train_fixed(task, torch.zeros(1, 2, 1, 4), seeds=[0], steps=3).valid_loss.shape
        torch.Size([2, 1])
    """
    if schedule.ndim != 4 or 0 in schedule.shape:
        shape = tuple(schedule.shape)
        raise ValueError(f"schedule must have shape (time, trials, seeds, H), got {shape}")
    nets = _Networks(
        task, schedule[0], seeds, best_response=False, channels=channels, hidden=hidden,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    every = _interval(steps, evaluations)
    flat = schedule.to(task.x).flatten(1, 2)
    optimizer, curves = StackedSGD(nets.parameters, lr=lr, momentum=MOMENTUM), _Curves(nets)
    for i in range(steps):
        hyper = flat[i * len(flat) // steps]
        batch = hyper.unsqueeze(1).expand(-1, batch_size, -1)
        _descend(optimizer, nets.train_loss(batch).sum(), 1 - i / steps)
        if (i + 1) % every == 0:
            curves.add(hyper)
    return curves.run(schedule, torch.zeros_like(schedule[0]))


def train_self_tuning(
    task: TuningTask,
    hyper: Tensor,
    *,
    seeds: Sequence[int],
    steps: int,
    channels: Sequence[int] = (),
    hidden: Sequence[int] = (32,),
    lr: float = 0.01,
    hyper_lr: float | Sequence[float] = 3e-3,
    train_steps: int = 2,
    warmup_steps: int = 0,
    init_scale: float = 0.5,
    entropy_weight: float | Sequence[float] = 1e-3,
    batch_size: int = 128,
    evaluations: int = 10,
    seed: int = 0,
) -> TuningRun:
    """Train self-tuning networks side by side: best-response layers, hyperparameters by Adam.

    Args:
        task, seeds, channels, hidden, lr, batch_size, evaluations, seed: as in :func:`train_fixed`.
        hyper: unconstrained start, shape ``(trials, S, 4)``.
        steps: training steps on the weights, at least 1.
        hyper_lr: learning rate of hyperparameters and scales, one number or one for each trial;
            0 freezes them.
        train_steps: training steps to each validation step.
        warmup_steps: first training steps, without validation steps.
        init_scale: initial standard deviation of the perturbation.
        entropy_weight: weight of its entropy, one number or one for each trial.

    Returns:
        A :class:`TuningRun`; ``hyper_history`` has ``steps + 1`` entries. A RuntimeWarning if a
        network diverged.

    Raises:
        ValueError: shapes that do not fit, or a number below 1.

    Source: Algorithm 1; defaults from the authors' code for convolutional networks.

    Example:
        >>> task = make_task(torch.rand(9, 4, 4), torch.arange(9) % 3, num_train=4, num_valid=3,
        ...     num_test=2, seeds=[0])
        >>> run = train_self_tuning(task, torch.zeros(2, 1, 4), seeds=[0], steps=3)
        >>> run.hyper_history.shape
        torch.Size([4, 2, 1, 4])
    """
    nets = _Networks(
        task, hyper, seeds, best_response=True, channels=channels, hidden=hidden,
        batch_size=batch_size, seed=seed,
    )  # fmt: skip
    every = _interval(steps, evaluations)
    entropy = _per_run(entropy_weight, *hyper.shape[:2])
    tuner = _Tuner(
        nets.train_loss, nets.valid_loss, StackedSGD(nets.parameters, lr=lr, momentum=MOMENTUM),
        hyper.to(task.x).flatten(0, 1), hyper_lr=_per_run(hyper_lr, *hyper.shape[:2]),
        tune_scale=True, init_scale=init_scale,
        entropy_weight=entropy if isinstance(entropy, float) else task.x.new_tensor(entropy),
        batch_size=batch_size, generator=nets.generator,
    )  # fmt: skip
    curves, history = _Curves(nets), [tuner.hyper.detach().clone()]
    for i in range(steps):
        tuner.train_step(1 - i / steps)
        if (i + 1) % train_steps == 0 and i >= warmup_steps:
            tuner.valid_step()
        if (i + 1) % every == 0:
            curves.add(tuner.hyper.detach())
        history.append(tuner.hyper.detach().clone())
    path = torch.stack(history).unflatten(1, hyper.shape[:2])
    return curves.run(path, tuner.scale.view(hyper.shape))
