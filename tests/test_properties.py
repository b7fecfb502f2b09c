"""Every public name on hostile numbers: the answer holds no NaN, or a documented error says why.

The inputs of each contract case are kept in shape and replaced in value: scaled by powers of ten,
set to zero or to one value, given one huge entry; or they are cut to
fewer rows, all of them or only one. A case that draws its sizes meets another shape in each
example. Magnitudes stay where squares do not overflow or vanish:
beyond, an infinity is what floating-point arithmetic promises.

A name gets as many examples as fit into a time, fewer where a call is slow. To search for longer:
``WELLPOSED_PROPERTY_SECONDS=5``.
"""

import importlib
import inspect
import os
import time
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from test_contract import CASES, SHARED_CASES, cast, tensors
from torch import Tensor

SECONDS = float(os.environ.get("WELLPOSED_PROPERTY_SECONDS", "0.25"))  # for one name, about
MOST = 40 if SECONDS < 1 else 400
LEAST = 4  # examples, however slow
ALL = CASES | SHARED_CASES


def documented(name: tuple[str, str]) -> str:
    """All that a public name says about itself and its methods."""
    value = getattr(importlib.import_module(name[0]), name[1])
    texts = [inspect.getdoc(value) or ""]
    if inspect.isclass(value):
        texts += [inspect.getdoc(m) or "" for _, m in inspect.getmembers(value, callable)]
    return "\n".join(text.partition("Raises:")[2] or text for text in texts if "Error" in text)


CHANGES = ("as it is", "scale", "zero", "one value", "one huge entry", "fewer rows", "no row")


@st.composite
def changes(draw: Any) -> tuple[str, int, int, bool]:
    """A change, a power of ten, which input it meets, and whether it meets all of them."""
    return (
        draw(st.sampled_from(CHANGES)),
        draw(st.integers(-100, 100)),
        draw(st.integers(0, 5)),
        draw(st.booleans()),
    )


def changed(value: Tensor, change: str, power: int) -> Tensor:
    """A tensor after a change; always finite if it was."""
    if change == "fewer rows":
        return value[: max(1, len(value) // 2)] if value.ndim else value
    if change == "no row":
        return value[:0] if value.ndim else value
    if not value.is_floating_point():
        return value
    reach = {torch.float32: 15, torch.float64: 100}.get(value.dtype, 4)
    factor = 10.0 ** (power * reach / 100)
    if change == "scale":
        return value * factor
    if change == "zero":
        return torch.zeros_like(value)
    if change == "one value":
        return torch.full_like(value, factor)
    if change == "one huge entry" and value.numel():
        value = value.clone()
        value.view(-1)[0] = 10.0**reach
    return value


@pytest.mark.parametrize("key", ALL, ids=lambda key: f"{key[0].split('.')[-1]}.{key[1]}")
def test_no_silent_nan(key: tuple[str, str]) -> None:
    case, text = ALL[key], documented(key)
    end, tried, failed = time.process_time() + SECONDS, 0, False

    @settings(
        max_examples=MOST,
        deadline=None,
        derandomize=True,
        database=None,
        phases=(Phase.generate, Phase.shrink),
        suppress_health_check=list(HealthCheck),
    )
    @given(changes(), st.integers(0, 2**31), st.sampled_from(case.dtypes))
    def check(change: tuple[str, int, int, bool], seed: int, dtype: torch.dtype) -> None:
        nonlocal tried, failed
        if tried >= LEAST and time.process_time() > end and not failed:
            return
        tried += 1
        kind, power, place, everywhere = change
        torch.manual_seed(seed)
        inputs = [cast(v, dtype) for v in case.inputs(torch.Generator().manual_seed(seed))]
        places = [i for i, v in enumerate(inputs) if isinstance(v, Tensor)]
        met = places if everywhere else places[place % len(places) :][:1] if places else []
        for i in met:
            inputs[i] = changed(inputs[i], kind, power)
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            problem, outputs = None, []
            try:
                outputs = list(tensors(case.call(*inputs)))
            except Exception as error:
                problem = error
        silent = not any(w.category in (RuntimeWarning, UserWarning) for w in said)
        nan = any(t.is_floating_point() and bool(t.isnan().any()) for t in outputs)
        named = problem is None or (type(problem).__name__ in text and bool(str(problem)))
        failed = not named or (nan and silent and not case.nan_means)
        assert named, f"undocumented: {problem!r}"
        assert not failed, f"NaN, and no word about it, in {kind}, {power}, {met}"

    check()
