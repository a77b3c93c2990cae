"""``fewstep distill METHOD``: a student of few steps."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, make_dataclass
from typing import Annotated, Any

import tyro
from rich.console import Console

from fewstep.cli.base import SourceFlags, next_folder, recipe_of
from fewstep.cli.train import RunFlags, clean
from fewstep.core import distributed
from fewstep.core.generator import Generator
from fewstep.core.options import FitOptions
from fewstep.data import load_data
from fewstep.distill import METHODS, distill
from fewstep.errors import InputError, unknown
from fewstep.models.lora import LoRA
from fewstep.train.run import options_of


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distils a teacher.

    Attributes:
        teacher: the generator to distil: a folder of fewstep or diffusers, a Hub id, or a checkpoint.
        name: the method.
        data: pictures, for methods that learn from data.
        resize: side that encoded images are resized to, in pixels.
        lora: rank of LoRA layers that are trained instead of copies of the teacher; full copies without one.
        lora_alpha: their scale is alpha / rank; alpha is the rank without one.
        lora_targets: names of the layers they stand on, or one regular expression; those of the network's kind
            without any.
        lora_roles: the roles that train them, such as student and fake; all copies of the teacher without any.
        dry_run: tells the memory that the run would need, and does nothing else.
        source: how to open the teacher; text pipelines need --open prompts=FILE.
        run_flags: how to run.
    """

    teacher: str
    name: Annotated[str, tyro.conf.Suppress] = ""
    data: str | None = None
    resize: int | None = None
    lora: int | None = None
    lora_alpha: float | None = None
    lora_targets: tuple[str, ...] = ()
    lora_roles: tuple[str, ...] = ()
    dry_run: bool = False
    source: Annotated[SourceFlags, tyro.conf.arg(name="")] = field(default_factory=SourceFlags)
    run_flags: Annotated[RunFlags, tyro.conf.arg(name="")] = field(default_factory=RunFlags)

    def run(self) -> None:
        """Runs the command."""
        flags = self.run_flags
        teacher = self.source.open(self.teacher, flags.device)
        pictures = None if self.data is None else load_data(self.data, resize=self.resize)
        lora, roles = self._lora(), self.lora_roles or None
        if self.dry_run:
            self._tell(teacher, pictures, lora, roles)
            return
        out = flags.out or next_folder(f"distill-{self.name}")
        options = {**flags.options(), "recipe": clean(recipe_of("distill", self))}
        method: Any = self.settings  # type: ignore[attr-defined]
        student = distill(teacher, method, pictures, out=out, lora=lora, lora_roles=roles, **options)
        count = student.sampler.nfe
        told = f"{out}: {count} evaluation{'' if count == 1 else 's'}; try `fewstep sample {out}`"
        if distributed.rank() == 0:
            Console(stderr=True).print(told, highlight=False)

    def _lora(self) -> LoRA | None:
        if self.lora is None:
            wrong = [f"--lora-{name}" for name in ("alpha", "targets", "roles") if getattr(self, f"lora_{name}")]
            if wrong:
                raise InputError(f"{', '.join(wrong)} needs --lora RANK")
            return None
        words = self.lora_targets
        expression = len(words) == 1 and set(words[0]) & set("*+?()[]|^$\\")
        return LoRA(self.lora, self.lora_alpha, words[0] if expression else words or None)

    def _tell(self, teacher: Generator, pictures: Any, lora: LoRA | None, roles: tuple[str, ...] | None) -> None:
        """The memory of the run, on stdout."""
        # Not at the top, because tensors without contents take a second to import.
        from fewstep.train.memory import estimate_memory

        own = vars(self.run_flags)
        names = {f.name for f in fields(FitOptions)} - {"budget"}
        chosen = options_of(self.run_flags.budget, {k: v for k, v in own.items() if k in names})
        method: Any = self.settings  # type: ignore[attr-defined]
        found = estimate_memory(method, teacher, pictures, chosen, lora=lora, lora_roles=roles)
        if distributed.rank() == 0:
            Console().print(found.table(), highlight=False)


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
    added: list[Any] = [
        ("name", Annotated[str, tyro.conf.Suppress], field(default=name)),
        ("settings", Annotated[method, tyro.conf.arg(name="")], field(default_factory=method)),
    ]
    made = make_dataclass(f"Distill{method.__name__}", added, bases=(Distill,), frozen=True, kw_only=True)
    made.__doc__ = f"{(method.__doc__ or '').splitlines()[0]}\n\n{(Distill.__doc__ or '').partition(chr(10))[2]}"
    return made, argv
