"""``fewstep distill METHOD``: a student of few steps."""

from __future__ import annotations

from dataclasses import dataclass, field, make_dataclass
from pathlib import Path
from typing import Annotated, Any

import tyro
from rich.console import Console

from fewstep.cli.base import next_folder, recipe_of
from fewstep.cli.train import RunFlags, clean
from fewstep.core import distributed
from fewstep.data import load_data
from fewstep.distill import METHODS, distill
from fewstep.errors import InputError, unknown
from fewstep.sources import load


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distils a teacher.

    Attributes:
        teacher: folder of the generator to distil.
        name: the method.
        data: pictures, for methods that learn from data.
        resize: side that encoded images are resized to, in pixels.
        run_flags: how to run.
    """

    teacher: Path
    name: Annotated[str, tyro.conf.Suppress] = ""
    data: str | None = None
    resize: int | None = None
    run_flags: Annotated[RunFlags, tyro.conf.arg(name="")] = field(default_factory=RunFlags)

    def run(self) -> None:
        """Runs the command."""
        flags = self.run_flags
        teacher = load(self.teacher, device=flags.device)
        pictures = None if self.data is None else load_data(self.data, resize=self.resize)
        out = flags.out or next_folder(f"distill-{self.name}")
        options = {**flags.options(), "recipe": clean(recipe_of("distill", self))}
        method: Any = self.settings  # type: ignore[attr-defined]
        student = distill(teacher, method, pictures, out=out, **options)
        told = f"{out}: {student.sampler.nfe} evaluations; try `fewstep sample {out}`"
        if distributed.rank() == 0:
            Console(stderr=True).print(told, highlight=False)


def command_for(argv: list[str], recipe: dict[str, Any] | None) -> tuple[type, list[str]]:
    """The command with the fields of the method that comes first in ``argv``, or that the recipe names.

    Raises:
        InputError: no method, or an unknown one.
    """
    if argv and not argv[0].startswith("-"):
        name, argv = argv[0], argv[1:]
    elif recipe is not None and "name" in recipe:
        name = str(recipe["name"])
    elif "--help" in argv or "-h" in argv:
        name = next(iter(METHODS))
    else:
        raise InputError(f"distill needs a method first: fewstep distill {'|'.join(METHODS)} --teacher FOLDER")
    if name not in METHODS:
        raise unknown("method", name, METHODS)
    method = METHODS[name]
    fields: list[Any] = [
        ("name", Annotated[str, tyro.conf.Suppress], field(default=name)),
        ("settings", Annotated[method, tyro.conf.arg(name="")], field(default_factory=method)),
    ]
    made = make_dataclass(f"Distill{method.__name__}", fields, bases=(Distill,), frozen=True, kw_only=True)
    made.__doc__ = f"{(method.__doc__ or '').splitlines()[0]}\n\n{(Distill.__doc__ or '').partition(chr(10))[2]}"
    return made, argv
