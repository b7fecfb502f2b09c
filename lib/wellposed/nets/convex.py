r"""Input-convex networks whose gradients are the networks that one wants: proximal operators.

A sum of convex functions with nonnegative weights is convex, and so is a convex, non-decreasing
function of it; linear terms in the input may enter everywhere.

Source: Amos, Xu and Kolter, "Input convex neural networks", ICML 2017; gradients as proximal
operators: Fang, Buchanan and Sulam, ICLR 2024, arXiv:2310.14344.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, softplus

__all__ = ["LPN", "ConvLPN", "StackedLPN"]

LINEAR_FROM = 50.0  # beyond it softplus is the identity to the last bit of float64
CORE_SCALE = 0.1  # of the nonnegative weights at the start


def _check_rows(y: Tensor, ndim: int, features: int) -> None:
    want = ("b, " if ndim == 2 else "s, b, ") + str(features)
    if y.ndim != ndim or y.shape[-1] != features:
        raise ValueError(f"y must have shape ({want}), got {tuple(y.shape)}")


def _check_curvature(beta: float, alpha: float) -> None:
    if not 0.0 < beta < math.inf:
        raise ValueError(f"beta must be positive and finite, got {beta}")
    if not 0.0 <= alpha < math.inf:
        raise ValueError(f"alpha must be finite and at least 0, got {alpha}")


class _Convex(nn.Module):
    """Fully connected convex potential; a leading axis of the parameters counts networks.

    With preactivations :math:`a_1=H_1y+b_1`, :math:`a_l=W_lz_{l-1}+H_ly+b_l`, :math:`z_l=g(a_l)`.
    The :math:`H_l` of all layers are one matrix, because all of them see the input.
    """

    beta: float
    alpha: float
    skip: nn.Parameter  # H_1 ... H_L: (..., L h, d)
    bias: nn.Parameter  # b_1 ... b_L: (..., L h)
    core: nn.ParameterList  # W_2 ... W_L, nonnegative: (..., h, h)
    out: nn.Parameter  # w, nonnegative: (..., h)
    out_skip: nn.Parameter  # h: (..., d)

    def _layers(self, y: Tensor) -> list[Tensor]:
        seen = (y @ self.skip.mT + self.bias.unsqueeze(-2)).chunk(len(self.core) + 1, -1)
        layers = [seen[0]]
        for a, core in zip(seen[1:], self.core, strict=True):
            layers.append(a + softplus(layers[-1], self.beta, LINEAR_FROM) @ core.mT)
        return layers

    def _potential(self, y: Tensor) -> Tensor:
        z = softplus(self._layers(y)[-1], self.beta, LINEAR_FROM)
        linear = z @ self.out.unsqueeze(-1) + y @ self.out_skip.unsqueeze(-1)
        value: Tensor = linear.squeeze(-1) + self.alpha / 2 * y.square().sum(-1)
        return value

    def _gradient(self, y: Tensor) -> Tensor:
        slopes = [torch.sigmoid(self.beta * a) for a in self._layers(y)]
        deltas = [self.out.unsqueeze(-2) * slopes[-1]]
        for slope, core in zip(slopes[-2::-1], reversed(self.core), strict=True):
            deltas.append(deltas[-1] @ core * slope)
        f: Tensor = self.out_skip.unsqueeze(-2) + self.alpha * y
        return f + torch.cat(deltas[::-1], -1) @ self.skip

    @torch.no_grad()
    def clamp_weights(self) -> None:
        """Set the negative weights between layers to zero, in place; call it after each step."""
        for weight in (*self.core, self.out):
            weight.clamp_(min=0.0)


class LPN(_Convex):
    r"""Learned proximal network: the gradient of a fully connected convex network.

    .. math:: \psi(y)=w^\top z_L+h^\top y+\tfrac\alpha2\|y\|^2,\quad z_l=g(W_lz_{l-1}+H_ly+b_l),
              \quad W_l,w\ge0

    with softplus :math:`g(a)=\log(1+e^{\beta a})/\beta`. A convex, non-decreasing function of a
    convex function is convex, so :math:`f=\nabla\psi` is a proximal operator for all weights.

    Args:
        in_features: :math:`d\ge1`.
        hidden_features: width of each hidden layer, at least 1.
        num_layers: hidden layers :math:`L\ge1`.
        beta: sharpness of the softplus, positive.
        alpha: strong convexity, at least 0; positive makes :math:`f` invertible.

    Raises:
        ValueError: a number out of range; in a call, an input that is not ``(b, in_features)``.

    Source: Section 3, Proposition 3.1 (architecture); the numbering is from memory.

    Example:
        >>> net = LPN(3, hidden_features=8)
        >>> y = torch.randn(2, 3, requires_grad=True)
        >>> (gradient,) = torch.autograd.grad(net.potential(y).sum(), y)
        >>> torch.allclose(net(y), gradient, atol=1e-6)
        True
    """

    def __init__(
        self,
        in_features: int,
        hidden_features: int = 50,
        num_layers: int = 3,
        beta: float = 10.0,
        alpha: float = 0.0,
    ) -> None:
        super().__init__()
        if min(in_features, hidden_features, num_layers) < 1:
            raise ValueError(
                "in_features, hidden_features and num_layers must be at least 1, got "
                f"{in_features}, {hidden_features} and {num_layers}"
            )
        _check_curvature(beta, alpha)
        self.beta, self.alpha = beta, alpha
        d, h = in_features, hidden_features

        def uniform(bound: float, *shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(-bound, bound))

        def positive(*shape: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(*shape).uniform_(0.0, CORE_SCALE / math.sqrt(h)))

        self.skip = uniform(d**-0.5, num_layers * h, d)
        self.bias = uniform(d**-0.5, num_layers * h)
        self.core = nn.ParameterList(positive(h, h) for _ in range(num_layers - 1))
        self.out = positive(h)
        self.out_skip = nn.Parameter(torch.zeros(d))

    def potential(self, y: Tensor) -> Tensor:
        """The convex potential at each row: ``(b, d)`` to ``(b,)``."""
        _check_rows(y, 2, self.out_skip.shape[-1])
        return self._potential(y)

    def forward(self, y: Tensor) -> Tensor:
        """The gradient of the potential, a proximal operator: ``(b, d)`` to ``(b, d)``."""
        _check_rows(y, 2, self.out_skip.shape[-1])
        return self._gradient(y)


class StackedLPN(_Convex):
    """Learned proximal networks of one shape side by side; their parameters are stacked.

    Args:
        networks: at least one :class:`LPN`, all of one shape, ``beta`` and ``alpha``; copied.

    Raises:
        ValueError: no network, or networks that differ; in a call, an input that is not
            ``(s, b, d)``.

    Source: ours; the arithmetic of each network is that of :class:`LPN`.

    Example:
        >>> nets = [LPN(2, 4, 2), LPN(2, 4, 2)]
        >>> y = torch.ones(2, 3, 2)
        >>> torch.allclose(StackedLPN(nets)(y)[1], nets[1](y[1]))
        True
    """

    def __init__(self, networks: Sequence[LPN]) -> None:
        super().__init__()
        if not networks or len({_shape(net) for net in networks}) > 1:
            raise ValueError("networks must hold at least one LPN, all of one shape and curvature")
        self._shape = _shape(networks[0])
        self.beta, self.alpha = networks[0].beta, networks[0].alpha
        self.size = len(networks)
        layers = zip(*(net.core for net in networks), strict=True)
        self.core = nn.ParameterList(_stacked(layer) for layer in layers)
        for name in ("skip", "bias", "out", "out_skip"):
            setattr(self, name, _stacked([getattr(net, name) for net in networks]))

    def potential(self, y: Tensor) -> Tensor:
        """The potentials, each network at its own rows: ``(s, b, d)`` to ``(s, b)``."""
        _check_rows(y, 3, self.out_skip.shape[-1])
        return self._potential(y)

    def forward(self, y: Tensor) -> Tensor:
        """The proximal operators, each at its own rows: ``(s, b, d)`` to ``(s, b, d)``."""
        _check_rows(y, 3, self.out_skip.shape[-1])
        return self._gradient(y)

    @torch.no_grad()
    def networks(self) -> list[LPN]:
        """Copies of the networks, each by itself."""
        found = []
        for i in range(self.size):
            net = LPN(*self._shape).to(self.out)
            for name, own in net.named_parameters():
                own.copy_(self.get_parameter(name)[i])
            found.append(net)
        return found


def _shape(net: LPN) -> tuple[int, int, int, float, float]:
    return net.skip.shape[1], len(net.out), len(net.core) + 1, net.beta, net.alpha


def _stacked(tensors: Sequence[Tensor]) -> nn.Parameter:
    return nn.Parameter(torch.stack([t.detach() for t in tensors]))


class ConvLPN(nn.Module):
    r"""Learned proximal network for images: the gradient of a convolutional convex network.

    Four convolutions, two of them of stride 2, and two linear layers; each but the first also sees
    the image, scaled down to its resolution. Images go in and out as rows of pixels.

    Args:
        shape: channels, height and width of an image; height and width are multiples of 4.
        channels: of the convolutions, at least 1.
        hidden_features: width of the linear layer, at least 1.
        beta: sharpness of the softplus, positive.
        alpha: strong convexity, at least 0.

    Raises:
        ValueError: a number out of range; in a call, an input that is not ``(b, d)``.

    Source: Section 5; layer by layer as in the authors' network for MNIST.

    Example:
        >>> net = ConvLPN((1, 8, 8), channels=4)
        >>> net(torch.zeros(2, 64)).shape, net.potential(torch.zeros(2, 64)).shape
        (torch.Size([2, 64]), torch.Size([2]))
    """

    def __init__(
        self,
        shape: tuple[int, int, int] = (1, 28, 28),
        channels: int = 64,
        hidden_features: int = 64,
        beta: float = 10.0,
        alpha: float = 0.01,
    ) -> None:
        super().__init__()
        planes, height, width = shape
        if min(*shape, channels, hidden_features) < 1 or height % 4 or width % 4:
            raise ValueError(
                "shape must be positive with sides that 4 divides, channels and hidden_features at "
                f"least 1, got {shape}, {channels} and {hidden_features}"
            )
        _check_curvature(beta, alpha)
        self.shape, self.beta, self.alpha = shape, beta, alpha
        c, area = channels, height * width // 16

        def conv(inputs: int, stride: int, bias: bool) -> nn.Conv2d:
            return nn.Conv2d(inputs, c, 3, stride=stride, padding=1, bias=bias)

        self.first = conv(planes, 1, bias=True)
        self.core = nn.ModuleList(
            [
                *(conv(c, stride, bias=False) for stride in (2, 1, 2)),
                nn.Linear(c * area, hidden_features, bias=False),
                nn.Linear(hidden_features, 1, bias=False),
            ]
        )
        self.skip = nn.ModuleList(conv(planes, stride, bias=True) for stride in (2, 1, 2))
        self.skip.append(nn.Linear(planes * area, hidden_features))
        with torch.no_grad():
            for weight in self._cores():
                weight.abs_().mul_(CORE_SCALE)

    def potential(self, y: Tensor) -> Tensor:
        """The convex potential at each image: ``(b, d)`` to ``(b,)``."""
        _check_rows(y, 2, math.prod(self.shape))
        image = y.unflatten(1, self.shape)
        z = softplus(self.first(image), self.beta, LINEAR_FROM)
        for i, shrink in enumerate((1, 2, 2)):
            seen = self.skip[i](_shrunk(image, shrink))
            z = softplus(self.core[i](z) + seen, self.beta, LINEAR_FROM)
        seen = self.skip[3](_shrunk(image, 4).flatten(1))
        z = softplus(self.core[3](z.flatten(1)) + seen, self.beta, LINEAR_FROM)
        value: Tensor = self.core[4](z).squeeze(1) + self.alpha / 2 * y.square().sum(1)
        return value

    def forward(self, y: Tensor) -> Tensor:
        """The gradient of the potential, ``(b, d)``; differentiable where gradients are on."""
        keep = torch.is_grad_enabled()
        with torch.enable_grad():
            y = y if keep and y.requires_grad else y.detach().requires_grad_()
            (f,) = torch.autograd.grad(self.potential(y).sum(), y, create_graph=keep)
        return f

    @torch.no_grad()
    def clamp_weights(self) -> None:
        """Set the negative weights between layers to zero, in place; call it after each step."""
        for weight in self._cores():
            weight.clamp_(min=0.0)

    def _cores(self) -> list[Tensor]:
        return [p for layer in self.core for p in layer.parameters()]


def _shrunk(image: Tensor, factor: int) -> Tensor:
    size = (image.shape[2] // factor, image.shape[3] // factor)
    return image if factor == 1 else interpolate(image, size, mode="bilinear")
