"""Imports point downward only, and every public name of the plan is where it says."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FAMILIES = ("mmd", "langevin", "perceptual", "nearest")
# What each floor may import of fastgen; `check` is below them all.
MAY = {
    "kernels": {"kernels"},
    "fastgen/reference": {"reference", "check"},
    "fastgen/data.py": {"check"},
    "fastgen/check.py": set(),
    "fastgen/ops": {"ops", "reference", "kernels", "check", "_C"},
    "fastgen/functional": {"functional", "ops", "reference", "check"},
    "fastgen/nn": {"nn", "functional", "reference", "check"},
    "fastgen/search": {"search", "functional", "reference", "check"},
    "fastgen/metrics.py": {"functional", "nn", "search", "data", "check"},
    "fastgen/report.py": {"functional", "nn", "search", "data", "check", "metrics"},
    "fastgen/models": {"models", "metrics", "report", "functional", "nn", "search", "data", "check", "__version__"},
}


def imported(file: Path) -> set[str]:
    """First name below `fastgen` of everything that a file imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("fastgen.")}
        elif isinstance(node, ast.ImportFrom) and node.module == "fastgen":
            found |= {a.name for a in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fastgen."):
            found.add(str(node.module).split(".")[1])
    return found


@pytest.mark.parametrize("place", MAY)
def test_imports_point_downward(place: str) -> None:
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    assert files
    for file in files:
        assert imported(file) <= MAY[place], f"{file.relative_to(ROOT)} imports {imported(file) - MAY[place]}"


def test_imports_among_the_benchmarks_are_no_circle() -> None:
    """Also those inside functions; a family is loaded by its name."""
    import graphlib

    below: dict[str, set[str]] = {"families": set(FAMILIES)}
    for file in (ROOT / "benchmarks").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "benchmarks":
                path = str(node.module).split(".")[1:]
                below.setdefault(file.stem, set()).update(path or (a.name for a in node.names))
    assert {"harness", "memory"} <= below["growth"]
    list(graphlib.TopologicalSorter(below).static_order())


def test_kernels_import_torch_and_triton_alone() -> None:
    import sys

    for file in (ROOT / "kernels").glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [str(node.module)] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            for name in names:
                top = name.split(".")[0]
                assert top in {"torch", "triton", "fastgen"} or top in sys.stdlib_module_names, f"{file.name}: {name}"


@pytest.mark.parametrize("stem", FAMILIES)
@pytest.mark.parametrize("floor", ["fastgen/reference", "fastgen/ops", "fastgen/functional", "benchmarks"])
def test_one_stem_on_every_floor(floor: str, stem: str) -> None:
    assert (ROOT / floor / f"{stem}.py").exists()


def test_version_is_one() -> None:
    import tomllib

    import fastgen

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert fastgen.__version__ == project["version"]
    assert f"## {project['version']}" in (ROOT / "CHANGELOG.md").read_text()


def test_a_checkout_has_its_own_kernels():
    """Also where another one is installed editable."""
    import fastgen.kernels

    import fastgen

    assert Path(fastgen.kernels.__file__).parents[1] == Path(fastgen.__file__).parents[1]
