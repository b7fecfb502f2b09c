"""SGD and Adam for networks side by side, each with hyper-parameters of its own.

``torch.optim`` has one learning rate and one weight decay for a whole tensor; here the first axis
of every parameter counts networks (:class:`wellposed.nets.Stacked`), and each network may have its
own. The arithmetic is that of ``torch.optim``, entry by entry. They also start at once: the first
step of a ``torch.optim`` optimizer imports torch's compiler, which takes longer than some of the
trainings here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

PerNetwork = float | Sequence[float]
"""One number for all networks, or one for each."""


def _spread(name: str, value: PerNetwork, param: Tensor) -> float | Tensor:
    """The number itself, or a tensor with one entry a network that multiplies ``param``."""
    values = [value] if isinstance(value, int | float) else list(value)
    if not all(0.0 <= v < math.inf for v in values):
        raise ValueError(f"{name} must be finite and at least 0, got {value}")
    if isinstance(value, int | float):
        return float(value)
    if param.ndim == 0 or len(values) != len(param):
        raise ValueError(
            f"{name} must be one number, or one for each network; got {len(values)} numbers for a "
            f"parameter of shape {tuple(param.shape)}"
        )
    return param.detach().new_tensor(values).view(-1, *[1] * (param.ndim - 1))


class _SideBySide:
    """What the two optimizers share: parameters, their learning rates and weight decays."""

    def __init__(self, params: Iterable[Tensor], lr: PerNetwork, weight_decay: PerNetwork) -> None:
        self.params = list(params)
        if not self.params or not all(isinstance(p, Tensor) for p in self.params):
            raise ValueError("params must hold at least one tensor, and only tensors")
        self.lr = [_spread("lr", lr, p) for p in self.params]
        self.weight_decay = [_spread("weight_decay", weight_decay, p) for p in self.params]

    def zero_grad(self) -> None:
        """Forget the gradients."""
        for p in self.params:
            p.grad = None

    def _decayed(self, p: Tensor, decay: float | Tensor) -> Tensor:
        """Gradient of the loss plus that of the L2 penalty; the gradient itself is not changed."""
        assert p.grad is not None
        if isinstance(decay, Tensor):
            return torch.addcmul(p.grad, decay, p)
        return p.grad if decay == 0.0 else p.grad.add(p, alpha=decay)


class StackedSGD(_SideBySide):
    r"""SGD with momentum on stacked parameters.

    :math:`g = \nabla + \lambda w`, :math:`v \leftarrow \mu v + g`,
    :math:`w \leftarrow w - \eta v` (or :math:`w - \eta (g + \mu v)` with Nesterov's momentum).

    Args:
        params: leaf tensors with gradients; where a hyper-parameter is a sequence, the first axis
            of each counts networks.
        lr: learning rate :math:`\eta \ge 0`, or one for each network.
        momentum: :math:`\mu` in [0, 1).
        nesterov: whether to look ahead along the momentum.
        weight_decay: coefficient :math:`\lambda \ge 0`, or one for each network.

    Raises:
        ValueError: no parameter, a number out of range, or numbers that do not match the networks.

    Source: the update of ``torch.optim.SGD``.

    Example:
        >>> w = torch.ones(2, 1, requires_grad=True)  # two networks of one weight
        >>> sgd = StackedSGD([w], lr=[0.1, 0.5])
        >>> w.sum().backward(); sgd.step()
        >>> w.flatten().tolist() == [torch.tensor(0.9).item(), 0.5]
        True
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: PerNetwork,
        momentum: float = 0.0,
        nesterov: bool = False,
        weight_decay: PerNetwork = 0.0,
    ) -> None:
        super().__init__(params, lr, weight_decay)
        if not 0.0 <= momentum < 1.0:
            raise ValueError(f"momentum must be in [0, 1), got {momentum}")
        self.momentum, self.nesterov = momentum, nesterov
        self._velocity: list[Tensor | None] = [None] * len(self.params)

    @torch.no_grad()
    def step(self, lr_factor: float = 1.0) -> None:
        """Move along the gradients, learning rates times ``lr_factor``, and forget them."""
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            step = grad = self._decayed(p, self.weight_decay[i])
            if self.momentum:
                velocity = self._velocity[i]
                if velocity is None:
                    velocity = grad.clone()
                else:
                    velocity.mul_(self.momentum).add_(grad)
                self._velocity[i] = velocity
                step = grad.add(velocity, alpha=self.momentum) if self.nesterov else velocity
            _descend(p, step, self.lr[i], lr_factor)
        self.zero_grad()


class StackedAdam(_SideBySide):
    r"""Adam or AdamW on stacked parameters.

    Args:
        params: leaf tensors with gradients; where a hyper-parameter is a sequence, the first axis
            of each counts networks.
        lr: learning rate, at least 0, or one for each network.
        betas: decay of the two moments, each in [0, 1).
        eps: added to the root of the second moment, positive.
        weight_decay: coefficient, at least 0, or one for each network.
        decoupled: the decay shrinks weights (AdamW) instead of joining the gradient (Adam).

    Raises:
        ValueError: no parameter, a number out of range, or numbers that do not match the networks.

    Source: Kingma and Ba 2015, Algorithm 1; Loshchilov and Hutter 2019 for the decoupled decay;
        the update of ``torch.optim.Adam``.

    Example:
        >>> w = torch.ones(2, 1, requires_grad=True)
        >>> adam = StackedAdam([w], lr=[0.25, 0.5])  # the first step is one learning rate long
        >>> w.sum().backward(); adam.step()
        >>> [round(v, 4) for v in w.flatten().tolist()]
        [0.75, 0.5]
    """

    def __init__(
        self,
        params: Iterable[Tensor],
        *,
        lr: PerNetwork = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: PerNetwork = 0.0,
        decoupled: bool = False,
    ) -> None:
        super().__init__(params, lr, weight_decay)
        if not all(0.0 <= b < 1.0 for b in betas):
            raise ValueError(f"betas must be in [0, 1), got {betas}")
        if not eps > 0.0:
            raise ValueError(f"eps must be positive, got {eps}")
        self.betas, self.eps, self.decoupled = betas, eps, decoupled
        self._first = [torch.zeros_like(p) for p in self.params]
        self._second = [torch.zeros_like(p) for p in self.params]
        self._steps = 0

    @torch.no_grad()
    def step(self, lr_factor: float = 1.0) -> None:
        """Move along the gradients, learning rates times ``lr_factor``, and forget them."""
        self._steps += 1
        beta1, beta2 = self.betas
        first_scale = 1.0 - beta1**self._steps
        second_scale = math.sqrt(1.0 - beta2**self._steps)
        for i, p in enumerate(self.params):
            if p.grad is None:
                continue
            decay = self.weight_decay[i]
            grad = p.grad if self.decoupled else self._decayed(p, decay)
            if self.decoupled and not (isinstance(decay, float) and decay == 0.0):
                p.mul_(1.0 - self.lr[i] * lr_factor * decay)
            self._first[i].lerp_(grad, 1.0 - beta1)
            self._second[i].mul_(beta2).addcmul_(grad, grad, value=1.0 - beta2)
            root = self._second[i].sqrt().div_(second_scale).add_(self.eps)
            _descend(p, self._first[i] / root, self.lr[i], lr_factor / first_scale)
        self.zero_grad()


def _descend(p: Tensor, step: Tensor, lr: float | Tensor, factor: float) -> None:
    """Subtract ``lr * factor * step`` from the parameter."""
    if isinstance(lr, Tensor):
        p.addcmul_(lr, step, value=-factor)
    else:
        p.sub_(step, alpha=lr * factor)
