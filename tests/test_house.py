"""The repository keeps the shape that DESIGN.md gave it."""

from __future__ import annotations

import ast
import importlib.metadata
import subprocess
import sys
from pathlib import Path

import pytest
import tomllib

ROOT = Path(__file__).parents[1]
PACKAGES = ("cluster", "jobs", "monitoring", "hooks", "templates")


def tracked_files() -> list[str]:
    """Return the files that git tracks."""
    return subprocess.run(
        ["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, timeout=30, check=True
    ).stdout.splitlines()


def test_the_top_level_is_as_fixed() -> None:
    """Nothing stands at the top level but what was agreed."""
    allowed = {*PACKAGES, "tests", "docs", "pyproject.toml", "README.md", "Makefile", "CHANGELOG.md", "CONTRIBUTING.md"}
    allowed |= {"LICENSE", ".ci", ".gitignore", ".pre-commit-config.yaml"}
    assert {name.split("/")[0] for name in tracked_files()} <= allowed


def test_no_other_distribution_owns_one_of_our_import_names() -> None:
    """`import jobs` means ours: no installed package brings a module of the same name."""
    owners = importlib.metadata.packages_distributions()
    assert {
        name: sorted(set(owners.get(name, []))) for name in PACKAGES if set(owners.get(name, [])) - {"muster-hpc"}
    } == {}


def test_the_wheel_lists_every_package() -> None:
    """A package added to the tree is also shipped."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert set(settings["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]) == set(PACKAGES)


@pytest.mark.parametrize("package", PACKAGES)
def test_init_files_hold_a_docstring_and_nothing_else(package: str) -> None:
    """`__init__.py` runs no code, so importing one module never loads another."""
    for path in (ROOT / package).rglob("__init__.py"):
        tree = ast.parse(path.read_text())
        assert ast.get_docstring(tree), path
        assert len(tree.body) == 1, path


def test_no_module_is_named_like_one_of_the_standard_library() -> None:
    """A script run from inside a package folder would otherwise import ours instead of Python's."""
    names = {path.stem for package in PACKAGES for path in (ROOT / package).rglob("*.py")} - {"__init__", "__main__"}
    assert names & sys.stdlib_module_names == set()


def test_tests_have_no_init_files() -> None:
    """With --import-mode=importlib the test folders are not packages."""
    assert [name for name in tracked_files() if name.startswith("tests/") and name.endswith("__init__.py")] == []


def test_every_system_package_is_known_to_the_error_messages() -> None:
    """A program that set-up installs is named with the same Debian package when it is missing at run time."""
    sys.path.insert(0, str(ROOT / ".ci"))
    try:
        import setup as ci_setup  # type: ignore[import-not-found]
    finally:
        sys.path.pop(0)
    from cluster.shell import DEBIAN_PACKAGES

    wrong = {p: (pkg, DEBIAN_PACKAGES[p]) for p, pkg in ci_setup.PROGRAMS.items() if DEBIAN_PACKAGES.get(p, pkg) != pkg}
    assert wrong == {}


def test_every_pinned_version_satisfies_pyproject() -> None:
    """The constraints file pins each direct dependency, in a version that pyproject.toml allows."""
    from packaging.requirements import Requirement

    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "tests" / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().replace("_", "-").split("==") for line in lines if "==" in line)
    direct = [*settings["dependencies"], *(r for extra in settings["optional-dependencies"].values() for r in extra)]
    for text in direct:
        requirement = Requirement(text)
        name = requirement.name.lower().replace("_", "-")
        assert name in pins, f"{name} is not pinned in tests/constraints.txt"
        assert requirement.specifier.contains(pins[name], prereleases=True), text
