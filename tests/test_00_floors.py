"""The floors of the house: which part may import which, read from the source itself."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

import fewstep

ROOT = Path(fewstep.__file__).parent
LEFT = {
    "path",
    "denoiser",
    "cond",
    "noise",
    "tableau",
    "sample",
    "generator",
    "exact",
    "solver",
    "network",
    "figure",
    "stored",
    "pipeline",
}
RIGHT = {"role", "fit", "options", "state", "distributed", "memory"}
DIFFUSION = {f"fewstep.core.{name}" for name in ("path", "denoiser", "tableau", "sample", "generator")}


def name_of(file: Path) -> str:
    parts = ("fewstep", *file.relative_to(ROOT).with_suffix("").parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


FILES = {name_of(file): file for file in sorted(ROOT.rglob("*.py"))}


def imports_of(source: str, module: str, package: bool, known: frozenset[str]) -> set[str]:
    """The modules of fewstep that a source names anywhere: at the top, inside functions, or for types only."""
    home = module.split(".") if package else module.split(".")[:-1]
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = home[: len(home) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            inner = {f"{base}.{alias.name}" for alias in node.names}
            found |= inner & known
            # `from package import name` reads the package itself only for names that are not modules.
            found |= {base} if inner - known else set()
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            called = node.func.id if isinstance(node.func, ast.Name) else node.func.attr
            texts = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
            found |= {t for t in texts if called in ("import_module", "__import__")}
    return {m for m in found if m == "fewstep" or m.startswith("fewstep.")}


@cache
def imports(module: str) -> frozenset[str]:
    file = FILES[module]
    return frozenset(imports_of(file.read_text(), module, file.name == "__init__.py", frozenset(FILES)) - {module})


def reached(module: str) -> set[str]:
    """Everything a module imports, at any distance."""
    seen, todo = set(), [module]
    while todo:
        for other in imports(todo.pop()):
            if other not in seen:
                seen.add(other)
                todo += [other] if other in FILES else []
    return seen


def test_the_reader_sees_every_kind_of_import() -> None:
    source = """
import fewstep.cli.main
from fewstep import grid, InputError
from fewstep.solve import euler as e, build
from ..data import digits
from . import path
from .noise import Noise
import torch
def f():
    from fewstep.train.run import train
    importlib.import_module("fewstep.loss")
if TYPE_CHECKING:
    import fewstep.measure as m
"""
    known = frozenset({"fewstep.grid", "fewstep.solve.euler", "fewstep.core.path"})
    assert imports_of(source, "fewstep.core.x", False, known) == {
        "fewstep.cli.main",
        "fewstep.grid",
        "fewstep",
        "fewstep.solve.euler",
        "fewstep.solve",
        "fewstep.data",
        "fewstep.core.path",
        "fewstep.core.noise",
        "fewstep.train.run",
        "fewstep.loss",
        "fewstep.measure",
    }


def test_every_file_of_core_has_its_side() -> None:
    inside = {m.removeprefix("fewstep.core.") for m in FILES if m.startswith("fewstep.core.")}
    assert inside == LEFT | RIGHT
    assert imports("fewstep.core") == set()


@pytest.mark.parametrize("name", sorted(LEFT))
def test_the_left_half_of_core_knows_nothing_above_it(name: str) -> None:
    allowed = {f"fewstep.core.{other}" for other in LEFT} | {"fewstep.errors"}
    if name in ("generator", "stored"):
        allowed.add("fewstep.core.state")
    assert imports(f"fewstep.core.{name}") <= allowed


@pytest.mark.parametrize("name", sorted(RIGHT))
def test_the_right_half_of_core_knows_no_diffusion(name: str) -> None:
    found = reached(f"fewstep.core.{name}")
    assert not found & DIFFUSION
    assert all(m == "fewstep.errors" or m.startswith("fewstep.core.") for m in found)


def test_errors_import_nothing() -> None:
    assert imports("fewstep.errors") == set()


@pytest.mark.parametrize("module", sorted(FILES))
def test_nothing_imports_the_command_line(module: str) -> None:
    if module.split(".")[1:2] != ["cli"] and module != "fewstep.__main__":
        assert not [m for m in imports(module) if m == "fewstep.cli" or m.startswith("fewstep.cli.")]


@pytest.mark.parametrize("module", sorted(set(FILES) - {"fewstep"}))
def test_no_module_leans_on_the_front_page(module: str) -> None:
    if module.split(".")[1] != "cli":
        assert "fewstep" not in imports(module)


@pytest.mark.parametrize("room", ["solve", "distill"])
def test_a_method_file_has_at_most_one_parent(room: str) -> None:
    # Not methods: the front doors, and what all calibrations stand on.
    apart = {f"fewstep.{room}.{name}" for name in ("front", "several", "published", "calibrate", "teacher", "step")}
    own = {m for m in FILES if m.startswith(f"fewstep.{room}.")} - apart
    assert len(own) >= 2
    for module in own:
        parents = imports(module) & (own | {f"fewstep.{room}", f"fewstep.{room}.front", f"fewstep.{room}.calibrate"})
        assert len(parents) <= 1, f"{module} imports {sorted(parents)}"
        assert parents <= own, f"{module} imports its own front: {sorted(parents)}"


def test_grids_and_losses_know_no_method() -> None:
    for module in FILES:
        if module.split(".")[1:2] in (["grid"], ["loss"], ["models"], ["data"], ["measure"]):
            above = [m for m in imports(module) if m.split(".")[1:2] in (["solve"], ["distill"], ["train"], ["report"])]
            assert not above, f"{module} imports {above}"


@pytest.mark.parametrize("module", sorted(FILES))
def test_files_stay_readable(module: str) -> None:
    assert len(FILES[module].read_text().splitlines()) < 400
