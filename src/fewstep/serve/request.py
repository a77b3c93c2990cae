"""What a visitor asks for and gets, as values, and what is checked before anything runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from fewstep.core.noise import whole
from fewstep.core.solver import SOLVERS, build
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.grid import grid

# What the page calls the samplers that are no solver's name.
OWN, UPLOADED = "its own", "uploaded tableau"
# Beyond this a page cannot say a whole number exactly, because it only has floats.
TOP_SEED = 2**53 - 1


@dataclass(frozen=True)
class Limits:
    """What one request may ask for.

    Attributes:
        pictures: by each sampler of each generator.
        steps: of a named solver, and evaluations of an uploaded tableau.
        panels: generators times samplers.
        upload: bytes of an uploaded file.
        prompt: letters of a prompt.
        columns: points of a trajectory that are shown.
    """

    pictures: int = 16
    steps: int = 100
    panels: int = 8
    upload: int = 1 << 20
    prompt: int = 1000
    columns: int = 8

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if whole(name, value) < 1:
                raise InputError(f"the limit on {name} must be at least 1, got {value}")


@dataclass(frozen=True)
class Request:
    """What a visitor asks for; the pictures are a function of it.

    Attributes:
        generators: names, in the order of the panels.
        samplers: :data:`OWN`, :data:`UPLOADED`, or names of solvers.
        count: pictures of each panel; picture i is a function of (seed, i).
        seed: of the noise, and of conditions that are not given.
        label: for generators with classes; drawn by the seed without one.
        prompt: for generators that read prompts.
        negative: prompt that guidance moves away from.
        guidance: scale of classifier-free guidance; 1 leaves every generator as it is.
        steps: of named solvers.
        table: the JSON of a tableau that was uploaded.
    """

    generators: tuple[str, ...]
    samplers: tuple[str, ...] = (OWN,)
    count: int = 4
    seed: int = 0
    label: int | None = None
    prompt: str = ""
    negative: str = ""
    guidance: float = 1.0
    steps: int = 8
    table: str | bytes | None = None


@dataclass(frozen=True)
class Panel:
    """The pictures of one generator by one sampler, or why there are none.

    Attributes:
        generator: its name.
        sampler: the sampler's name.
        pictures: (count, C, H, W) in [-1, 1]; None after an error.
        nfe: denoiser evaluations of each picture.
        seconds: wall time of all pictures, decoding included.
        distance: root mean square to the pictures of the first panel, of pixels in [-1, 1]; None for the first itself,
            and for pictures of another size.
        notes: what was done otherwise than the request may suggest.
        error: one line; empty when there are pictures.
    """

    generator: str
    sampler: str
    pictures: Tensor | None = None
    nfe: int = 0
    seconds: float = 0.0
    distance: float | None = None
    notes: tuple[str, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Stage:
    """One point of a trajectory at noise level ``level``.

    ``state`` (C, H, W) is the point, scaled by ``1 / sqrt(1 + level^2)`` and decoded; ``guess`` the decoded output of
    the denoiser there, None where it was not asked.
    """

    level: float
    state: Tensor
    guess: Tensor | None


@dataclass(frozen=True)
class Path:
    """How one picture of a panel came about; ``points`` counts those that the sampler passed, shown or not."""

    generator: str
    sampler: str
    stages: tuple[Stage, ...] = ()
    points: int = 0
    error: str = ""


def read_table(text: str | bytes, limits: Limits) -> Tableau:
    """An uploaded tableau.

    Raises:
        InputError: larger than the limit, no tableau, damaged, or of more evaluations than the limit.
    """
    data = text.encode("utf-8", "surrogatepass") if isinstance(text, str) else text
    if len(data) > limits.upload:
        raise InputError(
            f"the uploaded file has {len(data):,} bytes: a tableau has at most {limits.upload:,}; "
            "upload the tableau.json of a calibration"
        )
    try:
        table = Tableau.from_json(data.decode())
        _ = table.start_std
    except InputError as error:
        raise InputError(f"the uploaded file is {error}" if str(error).startswith("not ") else str(error)) from None
    except UnicodeDecodeError:
        raise InputError("the uploaded file is not text: upload the tableau.json of a calibration") from None
    except (AttributeError, TypeError, ValueError, OverflowError):
        raise InputError("the uploaded tableau is garbled: upload the tableau.json of a calibration") from None
    if table.nfe > limits.steps or table.rows > 2 * limits.steps:
        told = f"{table.nfe} evaluations in {table.rows} rows"
        raise InputError(f"the uploaded tableau has {told}: at most {limits.steps} evaluations are run here")
    return table


def solver_names() -> list[str]:
    """The solvers that need nothing but levels, sorted, without the forms that fits fill in."""
    levels, found = grid("karras", 4, 0.1, 10.0), []
    for name in sorted(name for name in SOLVERS if not name.endswith("_table")):
        try:
            build(name, levels)
        except (InputError, TypeError):
            continue
        found.append(name)
    return found


def names_of(sources: Sequence[str]) -> list[str]:
    """A short name for each source: the last part of its path, and more of it where two would be the same.

    Raises:
        InputError: a source that is given twice.
    """
    parts = [[p for p in s.replace("\\", "/").split("/") if p not in ("", ".")] or [s] for s in sources]
    for i, s in enumerate(sources):
        if parts[i] in parts[:i]:
            raise InputError(f"{s} is given twice: give each generator once")
    names = []
    for own in parts:
        size = 1
        while size < len(own) and sum(p[-size:] == own[-size:] for p in parts) > 1:
            size += 1
        names.append("/".join(own[-size:]))
    return names


def spread(count: int, most: int) -> list[int]:
    """At most ``most`` of the indices 0 .. count - 1, evenly apart, with the first and the last."""
    if count <= most or most < 2:
        return list(range(min(count, most)))
    return sorted({round(i * (count - 1) / (most - 1)) for i in range(most)})


def between(what: str, value: Any, low: int, top: int) -> int:
    """``value`` as a whole number within [low, top].

    Raises:
        InputError: it is none.
    """
    if value is None:
        raise InputError(f"{what} is empty: give a whole number from {low} to {top}")
    number = whole(what, value)
    if not low <= number <= top:
        raise InputError(f"{what} must be from {low} to {top}, got {number}")
    return number
