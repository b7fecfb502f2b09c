"""The small case that every public name of a method brings for the contract sweep."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch


def sizes(g: torch.Generator, count: int, *, least: int = 1, most: int = 8) -> list[int]:
    """So many random sizes: a case that draws them is run on another shape each time."""
    drawn: list[int] = torch.randint(least, most + 1, (count,), generator=g).tolist()
    return drawn


@dataclass(frozen=True)
class Case:
    """How to call a public name on a small problem.

    Attributes:
        inputs: makes the arguments from a seeded CPU generator; float tensors among them are
            cast to each of ``dtypes`` by the sweep.
        call: runs the public name on the arguments; returns a tensor, a number, or a tuple,
            dictionary or dataclass of them.
        keeps_dtype: whether floating outputs must have the dtype of the inputs.
        dtypes: the floating dtypes to try.
        on_device: whether the case also runs on a GPU where there is one, with the same value.
        nan_means: what a NaN in the answer says, where the docstring promises one; then the sweep
            over hostile numbers lets it pass.
    """

    inputs: Callable[[torch.Generator], tuple[Any, ...]]
    call: Callable[..., Any]
    keeps_dtype: bool = True
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.float64)
    on_device: bool = True
    nan_means: str = ""


def module_call(build: Callable[[], torch.nn.Module]) -> Callable[..., Any]:
    """A case's ``call`` for a network: the same weights each time, in the dtype of ``like``."""

    def call(x: torch.Tensor, like: torch.Tensor) -> Any:
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network = build().to(device=like.device, dtype=like.dtype)
        return network(x)

    return call
