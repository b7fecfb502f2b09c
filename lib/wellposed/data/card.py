"""What is known about a dataset before a byte of it is read, and what a loaded one looks like.

Nothing here imports torch: the command line lists and describes datasets without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from wellposed.data.sources import Installed, Source

if TYPE_CHECKING:
    import torch

__all__ = ["DataCard", "DataError", "DataFile", "Dataset"]


class DataError(Exception):
    """Data that cannot be had; the message names what is wrong and the command that mends it."""


@dataclass(frozen=True)
class DataFile:
    """One decompressed file of a dataset; every source is held to the same size and checksum."""

    name: str
    size: int
    sha256: str


@dataclass(frozen=True)
class DataCard:
    """A dataset in words and checksums.

    ``train`` and ``test`` count the examples of the official splits (``test`` is 0 where there is
    none), ``image`` is ``(channels, height, width)``, and ``sources`` are tried in order. A table
    has ``image = (features,)``; without ``classes`` the number to predict is a real one. What is
    neither names its ``unit`` and the function that returns it, its ``reader``.
    """

    name: str
    title: str
    notes: str
    license: str
    license_url: str
    citation: str
    homepage: str
    train: int
    test: int
    image: tuple[int, ...]
    classes: tuple[str, ...]
    files: tuple[DataFile, ...]
    sources: tuple[Source, ...]
    unit: str = "images"
    reader: str = "wellposed.data.load"

    @property
    def bundled(self) -> bool:
        """Whether the data comes inside a dependency, and so is always at hand, offline too."""
        return isinstance(self.sources[0], Installed)

    @property
    def size(self) -> int:
        """Bytes on disk once fetched (decompressed)."""
        return sum(file.size for file in self.files)

    @property
    def shapes(self) -> str:
        """The data in one phrase, e.g. ``1,797 images of 1 x 8 x 8, 10 classes``."""
        split = f"{self.train:,} train and {self.test:,} test" if self.test else f"{self.train:,}"
        image = " x ".join(map(str, self.image))
        if not image:
            return f"{split} {self.unit}"
        if not self.classes:
            return f"{split} rows of {image} numbers, and a number to predict"
        return f"{split} {self.unit} of {image}, {len(self.classes)} classes"


@dataclass(frozen=True)
class Dataset:
    """Inputs and labels in memory.

    ``x`` is float32 in [0, 1] of shape ``(n, channels, height, width)`` and ``y`` int64 of shape
    ``(n,)``, the position of each image's class in ``classes``. ``x_test`` and ``y_test`` are the
    official test split, or None where there is none.

    A set without classes is a regression: ``x`` is float32 of shape ``(n, features)`` and ``y``
    float32 of shape ``(n,)``, both in the units of the source.
    """

    name: str
    classes: tuple[str, ...]
    x: torch.Tensor
    y: torch.Tensor
    x_test: torch.Tensor | None = None
    y_test: torch.Tensor | None = None
