"""Several networks of one architecture, trained side by side."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vmap

__all__ = ["Stacked"]


class Stacked(nn.Module):
    """Networks of one architecture side by side, with their parameters stacked on a first axis.

    One forward pass serves all of them, which for small fully connected networks costs little more
    than one network alone. Sum the losses over the networks (do not average them), and use an
    optimizer that treats every entry of a parameter for itself, such as SGD or Adam without
    clipping: then each network is trained exactly as if it were alone.

    Names of parameters and buffers are those of the networks, with dots replaced by underscores
    (see :meth:`names`). Dropout draws from torch's global random state, a different mask for each
    network.

    Args:
        networks: at least one module, all of one architecture; they are copied.

    Raises:
        ValueError: no network, or architectures that differ.

    Example:
        >>> a, b = nn.Linear(2, 1), nn.Linear(2, 1)
        >>> pair = Stacked([a, b])
        >>> x = torch.ones(3, 2)
        >>> out = pair(x.expand(2, 3, 2))
        >>> out.shape, torch.allclose(out[1], b(x))
        (torch.Size([2, 3, 1]), True)
    """

    def __init__(self, networks: Sequence[nn.Module]) -> None:
        super().__init__()
        if len(networks) == 0:
            raise ValueError("networks must hold at least one module")
        shapes = [{k: v.shape for k, v in net.state_dict().items()} for net in networks]
        if any(other != shapes[0] for other in shapes):
            raise ValueError("networks must all have the same architecture")
        # A list hides the template from nn.Module: its own parameters take no part.
        self._template = [copy.deepcopy(networks[0])]
        self.size = len(networks)
        self._parameter_names = [name for name, _ in networks[0].named_parameters()]
        self._buffer_names = [name for name, _ in networks[0].named_buffers()]
        for name in self._parameter_names:
            stacked = torch.stack([net.get_parameter(name).detach() for net in networks])
            self.register_parameter(self._flat(name), nn.Parameter(stacked))
        for name in self._buffer_names:
            stacked = torch.stack([net.get_buffer(name) for net in networks])
            self.register_buffer(self._flat(name), stacked)

    @staticmethod
    def _flat(name: str) -> str:
        return "stacked_" + name.replace(".", "_")

    def names(self) -> dict[str, str]:
        """Each network's own parameter names, as keys to the names they have here."""
        return {name: self._flat(name) for name in self._parameter_names}

    @property
    def template(self) -> nn.Module:
        """The module that computes: its layers carry the settings, but not the parameters."""
        return self._template[0]

    def train(self, mode: bool = True) -> Stacked:
        """Set the mode of all networks."""
        super().train(mode)
        self.template.train(mode)
        return self

    def forward(self, x: Tensor) -> Tensor:
        """Map inputs (size, b, ...), one slice a network, to outputs (size, b, ...)."""
        template = self.template
        state = {n: getattr(self, self._flat(n)) for n in self._parameter_names}
        state |= {n: getattr(self, self._flat(n)) for n in self._buffer_names}

        def one(own: dict[str, Tensor], inputs: Tensor) -> Tensor:
            out: Tensor = functional_call(template, own, (inputs,))
            return out

        result: Tensor = vmap(one, randomness="different")(state, x)
        return result

    @torch.no_grad()
    def networks(self) -> list[nn.Module]:
        """Copies of the networks as they are now, each a module of its own."""
        copies = [copy.deepcopy(self.template) for _ in range(self.size)]
        for i, net in enumerate(copies):
            for name in self._parameter_names:
                net.get_parameter(name).copy_(getattr(self, self._flat(name))[i])
            for name in self._buffer_names:
                net.get_buffer(name).copy_(getattr(self, self._flat(name))[i])
        return copies
