"""What commands share: the sampler flags, output folders, recipes, and one-line errors."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import types
import typing
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro
from torch import Tensor

from fewstep import __version__
from fewstep.core.denoiser import module_of
from fewstep.core.generator import Generator
from fewstep.core.path import FlowPath
from fewstep.core.sample import Sampler
from fewstep.core.solver import SOLVERS, build
from fewstep.core.stored import load_sampler
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.grid import GRIDS, grid
from fewstep.guide import guided
from fewstep.solve.calibrate import report_of
from fewstep.sources import load


@dataclasses.dataclass(frozen=True)
class SamplerFlags:
    """How to sample.

    Attributes:
        sampler: a solver's name, a tableau's JSON file, the folder of a learned sampler, or nothing for the generator's
            own.
        option: KEY=VALUE is passed to the named solver, such as order=3 or eta=0.5; may be repeated.
        steps: steps of the grid for a named solver (evaluations, except for solvers with several a step).
        grid: how the noise levels are spaced: karras, logsnr, polyexponential, cosine, beta, vp_time, flow_shift,
            discrete or ays.
        grid_option: KEY=VALUE is passed to the grid, such as shift=2 or spacing=leading; may be repeated.
        rho: of the karras grid.
        sigma_min: last positive noise level; the generator's own without one.
        sigma_max: first noise level; the generator's own without one.
        guidance: scale of classifier-free guidance; 1 is none.
        negative: prompt that guidance moves away from, for text pipelines.
        force: runs a sampler that was fitted to another generator or to other noise levels.
    """

    sampler: str | None = None
    option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    steps: int | None = None
    grid: str = "karras"
    grid_option: Annotated[tuple[str, ...], tyro.conf.UseAppendAction] = ()
    rho: float = 7.0
    sigma_min: float | None = None
    sigma_max: float | None = None
    guidance: float = 1.0
    negative: str = ""
    force: bool = False

    def guided(self, generator: Generator) -> Generator:
        """The generator under the guidance asked for."""
        return guided(generator, self.guidance, self.negative)

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
        if self.sampler.endswith(".json") or Path(self.sampler).exists():
            return self._from_file(generator)
        if self.sampler not in SOLVERS:
            raise InputError(f"{unknown('sampler', self.sampler, SOLVERS)}; or the path of a tableau's .json")
        low = D.sigma_min if self.sigma_min is None else self.sigma_min
        high = D.sigma_max if self.sigma_max is None else self.sigma_max
        levels = self.levels(18 if self.steps is None else self.steps, low, high)
        made = build(self.sampler, levels, **pairs("--option", self.option))
        return made.name, made

    def levels(self, steps: int, low: float, high: float) -> Tensor:
        """The grid asked for, between two noise levels."""
        if self.grid not in GRIDS:
            raise unknown("grid", self.grid, GRIDS)
        options = {"rho": self.rho} if self.grid == "karras" else {}
        return grid(self.grid, steps, low, high, **options, **pairs("--grid-option", self.grid_option))

    def _from_file(self, generator: Generator) -> tuple[str, Sampler]:
        assert self.sampler is not None
        if self.steps is not None or self.option or self.grid_option:
            raise InputError(f"--steps and options do not go with the file {self.sampler}: it has its own steps")
        found = load_sampler(self.sampler)
        if not self.force:
            check_fits(found, generator, self.sampler)
        return str(getattr(found, "name", "sampler")), found


@dataclasses.dataclass(frozen=True)
class SourceFlags:
    """How to open a generator.

    Attributes:
        kind: fewstep, diffusers, edm, guided, consistency or k-diffusion; recognised without one.
        open_with: KEY=VALUE is passed to whatever opens it, such as variant=fp16, steps=25, prompts=prompts.txt or
            preset=imagenet64; may be repeated.
    """

    kind: str | None = None
    open_with: Annotated[tuple[str, ...], tyro.conf.UseAppendAction, tyro.conf.arg(name="open")] = ()

    def open(self, source: str | Path, device: str = "cpu") -> Generator:
        """The generator, on a device.

        Raises:
            InputError: see :func:`fewstep.sources.load`.
        """
        options = pairs("--open", self.open_with)
        for name, instead in _APART.items():
            if name in options:
                raise InputError(f"--open cannot take {name}={options[name]}: {instead}")
        return load(source, kind=self.kind, device=device, **options)


# What flags of their own say.
_APART = {
    "device": "pass --device where the command has it",
    "kind": "pass --kind",
    "source": "what to open is an argument of its own",
}
# The share of noise, sigma / (1 + sigma), that a flow model's sampler must at least start from to make pictures.
_NOISE = 0.99


def check_fits(sampler: Sampler, generator: Generator, place: str) -> None:
    """Refuses a sampler that was made for something else.

    Raises:
        InputError: it was fitted to another generator or guidance, it uses noise levels that the generator lacks, or
            it starts too low for a flow model, as the tables of variance-preserving models do.
    """
    facts, D = report_of(sampler), generator.denoiser
    made_for = facts.get("fingerprint")
    if made_for not in (None, generator.fingerprint()):
        fitted = facts.get("guidance", 1.0)
        raise InputError(
            f"{place} was fitted to another generator or guidance (fingerprint {made_for}, guidance {fitted:g}): "
            "calibrate anew, or pass --force"
        )
    levels = [sampler.start]
    if isinstance(sampler, Tableau):
        levels += sampler.sigmas[~sampler.sigmas.isnan()].tolist()
    if max(levels) > 1.01 * D.sigma_max or min(levels) < 0.99 * D.sigma_min:
        raise InputError(
            f"{place} uses noise levels from {min(levels):g} to {max(levels):g}, the generator knows those from "
            f"{D.sigma_min:g} to {D.sigma_max:g}: pass --force to run it all the same"
        )
    share = sampler.start / (1 + sampler.start)
    if isinstance(getattr(module_of(D), "path", None), FlowPath) and share < _NOISE * D.sigma_max / (1 + D.sigma_max):
        raise InputError(
            f"{place} starts at noise level {sampler.start:g}, {share:.3g} noise, and this flow model makes pictures "
            f"from pure noise, level {D.sigma_max:g}: make the table for it, or pass --force to run it all the same"
        )


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


def pairs(flag: str, given: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` words as a mapping; a value is JSON, or text where it is no JSON.

    Raises:
        InputError: a word without ``=`` or without a key.
    """
    found: dict[str, Any] = {}
    for word in given:
        key, equals, text = word.partition("=")
        if not key or not equals:
            raise InputError(f"{flag} takes KEY=VALUE, got {word!r}")
        found[key] = _value(text)
    return found


def _value(text: str) -> Any:
    # Python's spelling is what a reader of diffusers' own pages would write.
    known = {"True": True, "False": False, "None": None}
    if text in known:
        return known[text]
    try:
        return json.loads(text)
    except json.JSONDecodeError:
        return text
