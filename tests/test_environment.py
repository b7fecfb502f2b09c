"""One set of versions: pyproject.toml, environment.yml, the lock file, and what is installed."""

import re
import tomllib
from importlib import metadata
from pathlib import Path

import yaml
from packaging.requirements import Requirement

ROOT = Path(__file__).resolve().parents[1]


def canonical(name: str) -> str:
    """A package's name as the index compares it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins() -> dict[str, str]:
    """The direct dependencies of pyproject.toml with their versions."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["dev"]]
    assert all("==" in line for line in wanted), "every direct dependency is pinned"
    return {canonical(name): version for name, version in (line.split("==") for line in wanted)}


def locked() -> dict[str, set[str]]:
    """The versions of every package in the lock file; several where they differ by platform."""
    found: dict[str, set[str]] = {}
    for line in (ROOT / "requirements.lock").read_text().splitlines():
        match = re.match(r"([A-Za-z0-9_.-]+)==([^ ;]+)", line)
        if match:
            found.setdefault(canonical(match[1]), set()).add(match[2])
    return found


def test_the_conda_environment_has_the_same_pins() -> None:
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    pip = next(d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    given = dict(line.split("==") for line in pip if "==" in line)
    assert {canonical(name): version for name, version in given.items()} == pins()


def test_the_lock_file_holds_every_direct_pin() -> None:
    lock = locked()
    assert {name: version for name, version in pins().items() if version not in lock[name]} == {}


def test_what_is_installed_is_what_is_locked() -> None:
    """Indirect dependencies included: walk from wellposed to all it needs."""
    lock, wrong, seen, waiting = locked(), {}, {"wellposed"}, ["wellposed"]
    while waiting:
        package = waiting.pop()
        try:
            requires = metadata.requires(package) or []
        except metadata.PackageNotFoundError:
            continue  # Needed on another platform only.
        for requirement in map(Requirement, requires):
            name, marker = canonical(requirement.name), requirement.marker
            extra = "dev" if package == "wellposed" else ""
            if name in seen or (marker and not marker.evaluate({"extra": extra})):
                continue
            seen.add(name)
            waiting.append(name)
            try:
                version = metadata.version(name).partition("+")[0]
            except metadata.PackageNotFoundError:
                continue
            if version not in lock.get(name, set()):
                wrong[name] = version
    assert wrong == {}
    assert len(seen) > 100, "the walk reached the indirect dependencies"


def test_every_direct_dependency_has_a_reason() -> None:
    lines = (ROOT / "pyproject.toml").read_text().splitlines()
    bare = [line for line in lines if re.match(r'\s+"[^"]+==', line) and "# " not in line]
    assert bare == []
