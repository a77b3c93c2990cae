"""What commands share: the sampler flags, output folders, recipes, and one-line errors."""

from __future__ import annotations

import contextlib
import dataclasses
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fewstep import __version__
from fewstep.core.generator import Generator
from fewstep.core.sample import Sampler
from fewstep.core.solver import SOLVERS, build
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid import GRIDS, grid


@dataclasses.dataclass(frozen=True)
class SamplerFlags:
    """How to sample.

    Attributes:
        sampler: a solver's name, a tableau's JSON file, or nothing for the generator's own.
        steps: steps of the grid for a named solver (evaluations, except for Heun: about two a step).
        grid: how the noise levels are spaced: karras, logsnr, vp_time or flow_shift.
        rho: of the karras grid.
        sigma_min: last positive noise level; the generator's own without one.
        sigma_max: first noise level; the generator's own without one.
        force: runs a tableau that was fitted to another generator.
    """

    sampler: str | None = None
    steps: int | None = None
    grid: str = "karras"
    rho: float = 7.0
    sigma_min: float | None = None
    sigma_max: float | None = None
    force: bool = False

    def resolve(self, generator: Generator) -> tuple[str, Sampler]:
        """The sampler's name and the sampler.

        Raises:
            InputError: an unknown name, flags that contradict each other, or a tableau of another generator.
        """
        D = generator.denoiser
        if self.sampler is None:
            if self.steps is not None:
                raise InputError("--steps needs a named --sampler: the generator's own has its own number of steps")
            return str(getattr(generator.sampler, "name", "sampler")), generator.sampler
        if self.sampler.endswith(".json") or Path(self.sampler).is_file():
            return self._from_file(generator)
        if self.sampler not in SOLVERS:
            raise InputError(f"{unknown('sampler', self.sampler, SOLVERS)}; or the path of a tableau's .json")
        if self.grid not in GRIDS:
            raise unknown("grid", self.grid, GRIDS)
        options = {"rho": self.rho} if self.grid == "karras" else {}
        low = D.sigma_min if self.sigma_min is None else self.sigma_min
        high = D.sigma_max if self.sigma_max is None else self.sigma_max
        steps = 18 if self.steps is None else self.steps
        made = build(self.sampler, grid(self.grid, steps, low, high, **options))
        return made.name, made

    def _from_file(self, generator: Generator) -> tuple[str, Sampler]:
        assert self.sampler is not None
        if self.steps is not None:
            raise InputError(f"--steps does not go with the tableau {self.sampler}: it has its own steps")
        path = Path(self.sampler)
        if not path.is_file():
            raise InputError(f"{path} does not exist: --sampler takes a solver's name or a tableau's .json")
        try:
            table = Tableau.from_json(path.read_text())
        except UnicodeDecodeError:
            raise InputError(f"{path} is not a tableau: it is not text") from None
        facts = table.meta.get("calibration", {})
        made_for = facts.get("fingerprint") if isinstance(facts, dict) else None
        if not self.force and made_for not in (None, generator.fingerprint()):
            raise InputError(f"{path} was fitted to another generator ({made_for}): calibrate anew, or pass --force")
        if not self.force and table.start > 1.01 * generator.denoiser.sigma_max:
            top = generator.denoiser.sigma_max
            raise InputError(
                f"{path} starts at sigma {table.start:g}, the generator ends at {top:g}: pass --force to run it"
            )
        return table.name, table


def next_folder(command: str) -> Path:
    """The first free ``runs/<command>-<number>``."""
    number = 1
    while (Path("runs") / f"{command}-{number:03d}").exists():
        number += 1
    return Path("runs") / f"{command}-{number:03d}"


def recipe_of(command: str, flags: Any) -> dict[str, Any]:
    """What ``recipe.json`` holds of a call: all but where it wrote and whether it resumed."""
    arguments = jsonable(flags)
    for name in ("out", "resume", "overwrite"):
        arguments.pop(name, None)
    return {"command": command, "fewstep": __version__, "arguments": arguments}


def jsonable(value: Any) -> Any:
    """Dataclasses, paths and tuples as JSON values."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: jsonable(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple | list):
        return [jsonable(v) for v in value]
    return value


def from_json(kind: Any, value: Any, where: str = "recipe") -> Any:
    """The inverse of :func:`jsonable` for a type.

    Raises:
        InputError: fields that the type does not have, or a value of another kind.
    """
    origin, parts = typing.get_origin(kind), typing.get_args(kind)
    if origin is typing.Annotated:
        return from_json(parts[0], value, where)
    if origin in (typing.Union, types.UnionType):
        if value is None and type(None) in parts:
            return None
        for part in (p for p in parts if p is not type(None)):
            with contextlib.suppress(InputError):
                return from_json(part, value, where)
        raise InputError(f"{where}: {value!r} is none of {', '.join(str(getattr(p, '__name__', p)) for p in parts)}")
    if dataclasses.is_dataclass(kind):
        if not isinstance(value, Mapping):
            raise InputError(f"{where}: expected an object, got {value!r}")
        hints = typing.get_type_hints(kind, include_extras=True)
        names = {f.name for f in dataclasses.fields(kind)}
        if set(value) - names:
            raise InputError(f"{where}: unknown fields {sorted(set(value) - names)}, expected some of {sorted(names)}")
        made = {k: from_json(hints[k], v, f"{where}.{k}") for k, v in value.items()}
        try:
            return kind(**made)  # type: ignore[operator]
        except TypeError as error:
            raise InputError(f"{where}: {str(error).partition('() ')[2] or error}") from None
    if origin is typing.Literal:
        expected, fits = f"one of {parts}", value in parts
    elif origin is tuple:
        expected, fits = "a list", isinstance(value, list)
    else:
        # bool is an int to Python, but not to a reader of the file.
        kinds: Any = {Path: str, float: (int, float)}.get(kind, kind)
        expected, fits = kind.__name__, isinstance(value, kinds) and (kind is bool) == isinstance(value, bool)
    if not fits:
        raise InputError(f"{where}: expected {expected}, got {value!r}")
    if origin is tuple:
        # (int, ...) is as long as the list; (float, float) is not.
        each = parts[:1] * len(value) if parts[-1] is ... else parts
        if len(each) != len(value):
            raise InputError(f"{where}: expected {len(each)} values, got {value!r}")
        return tuple(from_json(p, v, where) for p, v in zip(each, value, strict=True))
    return Path(value) if kind is Path else value
