"""A sweep over every public name of methods and shared layers: dtype, purity, determinism."""

import copy
import dataclasses
import importlib
import importlib.util
import inspect
import pkgutil
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from contract import Case
from wellposed import methods, nets, ops, train

TESTS = Path(__file__).parent
SEED = 20


def method_modules() -> list[str]:
    """The modules of all papers; a long one is a package, whose ``__init__`` offers the names."""
    chapters = pkgutil.iter_modules(methods.__path__, methods.__name__ + ".")
    folders = {chapter.name: importlib.import_module(chapter.name).__path__ for chapter in chapters}
    return sorted(
        f"{chapter}.{module.name}"
        for chapter, folder in folders.items()
        for module in pkgutil.iter_modules(folder)
    )


def shared_modules() -> list[str]:
    """The modules of the layers that papers share; `train` offers its names as a whole."""
    found = [
        package.__name__ + "." + module.name
        for package in (ops, nets)
        for module in pkgutil.iter_modules(package.__path__)
    ]
    return sorted({*found, train.__name__})


def cases_of(name: str) -> dict[str, Case]:
    """The small cases that the test module of a module brings."""
    *folder, module = name.split(".")[1:]
    path = TESTS.joinpath(*(folder or [module]), f"test_{module}.py")
    if not path.is_file():
        return {}
    spec = importlib.util.spec_from_file_location(f"cases_{'_'.join(folder)}_{module}", path)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(loaded)
    cases: dict[str, Case] = getattr(loaded, "CASES", {})
    return cases


def public_names(module: ModuleType) -> set[str]:
    """Functions and classes that need a case: all but result dataclasses."""
    names = set()
    for name in module.__all__:
        value = getattr(module, name)
        if inspect.isfunction(value) or (
            inspect.isclass(value) and not dataclasses.is_dataclass(value)
        ):
            names.add(name)
    return names


MODULES, SHARED = method_modules(), shared_modules()
CASES = {(m, name): case for m in MODULES for name, case in cases_of(m).items()}
SHARED_CASES = {(m, name): case for m in SHARED for name, case in cases_of(m).items()}
ALL = CASES | SHARED_CASES


def tensors(value: Any) -> Iterator[Tensor]:
    """All tensors in a nested result."""
    if isinstance(value, Tensor):
        yield value
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from tensors(getattr(value, field.name))
    elif isinstance(value, dict):
        for item in value.values():
            yield from tensors(item)
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from tensors(item)


def cast(value: Any, dtype: torch.dtype, device: str = "cpu") -> Any:
    """An input with its float tensors in a dtype, on a device."""
    if not isinstance(value, Tensor):
        return value
    value = value.detach().clone().to(device)
    return value.to(dtype) if value.is_floating_point() else value


def run(case: Case, dtype: torch.dtype, device: str = "cpu") -> tuple[list[Tensor], list[Any]]:
    """Call a case on fresh inputs; returns the output tensors and the inputs after the call."""
    torch.manual_seed(SEED)
    drawn = case.inputs(torch.Generator().manual_seed(SEED))
    inputs = [cast(value, dtype, device) for value in drawn]
    before = copy.deepcopy([v for v in inputs if isinstance(v, Tensor)])
    outputs = [t.detach() for t in tensors(case.call(*inputs))]
    after = [v for v in inputs if isinstance(v, Tensor)]
    for old, new in zip(before, after):
        torch.testing.assert_close(new.detach(), old, rtol=0, atol=0, equal_nan=True)
        assert not new.requires_grad, "an input was made to require a gradient"
    return outputs, inputs


@pytest.mark.parametrize("name", [*MODULES, *SHARED])
def test_every_public_name_has_a_case(name: str) -> None:
    module = importlib.import_module(name)
    assert set(cases_of(name)) == public_names(module)
    assert module.__doc__
    assert name in SHARED or "Departures" in module.__doc__, (
        "the docstring says where it departs from the paper"
    )


@pytest.mark.parametrize("key", ALL, ids=lambda key: f"{key[0].split('.')[-1]}.{key[1]}")
def test_contract(key: tuple[str, str]) -> None:
    """Inputs unharmed, dtype kept, the same answer twice."""
    case = ALL[key]
    for dtype in case.dtypes:
        first, _ = run(case, dtype)
        second, _ = run(case, dtype)
        assert len(first) == len(second)
        for one, two in zip(first, second):
            torch.testing.assert_close(one, two, rtol=0, atol=0, equal_nan=True)
            if case.keeps_dtype and one.is_floating_point():
                assert one.dtype == dtype


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("key", ALL, ids=lambda key: f"{key[0].split('.')[-1]}.{key[1]}")
def test_same_on_a_gpu(key: tuple[str, str]) -> None:
    case = ALL[key]
    if not case.on_device:
        pytest.skip("the case is for the CPU alone")
    dtype = case.dtypes[-1]
    here, _ = run(case, dtype)
    there, _ = run(case, dtype, "cuda")
    for one, two in zip(here, there):
        torch.testing.assert_close(one, two.cpu(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("key", CASES, ids=lambda key: f"{key[0].split('.')[-1]}.{key[1]}")
def test_docstring(key: tuple[str, str]) -> None:
    """A public name explains itself and says where in the paper it stands."""
    value = getattr(importlib.import_module(key[0]), key[1])
    text = inspect.getdoc(value) or ""
    assert "Source:" in text, "the docstring names the paper and equation under 'Source:'"
    assert "Args:" in text or not inspect.signature(value).parameters
    assert "Example:" in text, "the docstring has an example that runs"
