"""Datasets by name: ``load("mnist-5k")``; series and text have readers of their own.

Each dataset is one module in ``wellposed.data.sets``, found by its name, with a card (license,
citation, size, checksums, sources). Bundled sets come inside a dependency and work offline. The
others are fetched once by ``fetch`` and verified each time they are read. ``load`` downloads
nothing, and nothing is ever replaced by something else: what is missing or damaged is a
``DataError`` that names the command which mends it.

Importing this package imports neither torch nor numpy.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

from wellposed.data import sets, store
from wellposed.data.card import DataCard, DataError, DataFile, Dataset

__all__ = ["DataCard", "DataError", "DataFile", "Dataset", "card", "fetch", "load", "names"]


def names() -> tuple[str, ...]:
    """Return the names of all datasets, in alphabetical order."""
    found = (module.name.replace("_", "-") for module in pkgutil.iter_modules(sets.__path__))
    return tuple(sorted(found))


def card(name: str) -> DataCard:
    """Return the card of a dataset: license, citation, size, checksums, sources.

    Raises:
        DataError: there is no dataset of that name.

    Example:
        >>> card("digits").shapes
        '1,797 images of 1 x 8 x 8, 10 classes'
    """
    found = _module(name).CARD
    assert isinstance(found, DataCard)
    return found


def load(name: str) -> Dataset:
    """Return a dataset, verified against its checksums; nothing is downloaded.

    Args:
        name: one of ``names()``, e.g. ``"mnist-5k"``.

    Raises:
        DataError: no such dataset, its files are missing or damaged, or it holds neither images
            nor rows and has a reader of its own.

    Example:
        >>> tuple(load("digits").x.shape)
        (1797, 1, 8, 8)
    """
    module = _module(name)
    if not hasattr(module, "read"):
        raise DataError(f"dataset '{name}' holds {module.CARD.unit}: use {module.CARD.reader}()")
    found = module.read(store.folder_of(module.CARD))
    assert isinstance(found, Dataset)
    return found


def fetch(
    name: str, *, source: str | None = None, report: Callable[[str], None] | None = None
) -> Path:
    """Put a dataset on this machine and return its folder; whole files are kept as they are.

    Args:
        name: one of ``names()``. A bundled dataset is only verified.
        source: name of the one source to use; without it the card's sources are tried in order.
        report: called with one line for each step, such as ``print``.

    Raises:
        DataError: no such dataset or source, no source has the files whole, or the folder cannot
            be written.
    """
    known = card(name)
    sources = [one for one in known.sources if source in (None, one.name)]
    if not sources:
        having = ", ".join(one.name for one in known.sources)
        raise DataError(f"dataset '{name}' has no source '{source}', it has: {having}")
    return store.bring(known, sources, report or (lambda line: None))


def _module(name: str) -> ModuleType:
    known = names()
    if name in known:
        return importlib.import_module(f"wellposed.data.sets.{name.replace('-', '_')}")
    import difflib

    near = difflib.get_close_matches(str(name), known, n=1)
    hint = f"did you mean '{near[0]}'?" if near else f"there are {', '.join(known)}"
    raise DataError(f"no dataset '{name}': {hint}")
