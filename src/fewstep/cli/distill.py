"""``fewstep distill METHOD``: a student of few steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, fields, make_dataclass
from pathlib import Path
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
from fewstep.distill.published import leaves, scaled, told
from fewstep.distill.several import SAMPLERS, distill_steps
from fewstep.errors import InputError, unknown
from fewstep.models.lora import LoRA
from fewstep.train.run import options_of


@dataclass(frozen=True, kw_only=True)
class Distill:
    """Distils a teacher.

    Where no learning rate is given, the published one is carried over to the size of the network, and told; so are
    other settings that networks below 10 M parameters need. With a list, such as --steps 1,2,4, there is a student or a
    sampler for every number of steps.

    Attributes:
        teacher: the generator to distil: a folder of fewstep or diffusers, a Hub id, or a checkpoint.
        name: the method.
        several: the numbers of --steps, where those are several.
        fixed: the method's settings that were given.
        published: takes the paper's own learning rates and settings, whatever the size of the network.
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
    several: Annotated[tuple[int, ...], tyro.conf.Suppress] = ()
    fixed: Annotated[tuple[str, ...], tyro.conf.Suppress] = ()
    published: bool = False
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
        options = {**flags.options(), "recipe": clean(recipe_of("distill", self)), "lora": lora, "lora_roles": roles}
        method = self._method(teacher)
        flags.tell(out)
        if self.several:
            students = distill_steps(teacher, method, pictures, steps=self.several, out=out, **options)
            first, last = min(students), max(students)
            once = getattr(method, "any_steps", False) and not hasattr(method, "ships")
            shown = f"{out} --sampler {_table(out, first)}" if once else f"{out / str(last)}"
            line = f"{out}: for {', '.join(map(str, students))} steps; try `fewstep sample {shown}`"
        else:
            count = distill(teacher, method, pictures, out=out, **options).sampler.nfe
            line = f"{out}: {count} evaluation{'' if count == 1 else 's'}; try `fewstep sample {out}`"
        if distributed.rank() == 0:
            Console(stderr=True).print(line, highlight=False)

    def _method(self, teacher: Generator) -> Any:
        """The method with the settings that a network of this size is to have."""
        given: Any = self.settings  # type: ignore[attr-defined]
        if self.lora is not None:
            # The published rates are those of whole networks.
            return given
        method = scaled(given, teacher, fixed=self.fixed, published=self.published)
        line = told(given, method, teacher)
        if line is not None and distributed.rank() == 0:
            # Not on stderr, where bad input is told on a line of its own.
            Console().print(line, highlight=False, soft_wrap=True)
        return method

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
    argv, several = _several(argv)
    fixed = _fixed(argv, method)
    if recipe is not None:
        # What a recipe leaves out was not known when it was made: its settings are those that it ran with.
        fixed = tuple(dict.fromkeys([*recipe.get("fixed", leaves(method())), *fixed]))
        several = tuple(recipe.get("several", ())) if several is None else several
        recipe |= {"fixed": list(fixed), "several": list(several)}
    added: list[Any] = [
        ("name", Annotated[str, tyro.conf.Suppress], field(default=name)),
        ("several", Annotated[tuple[int, ...], tyro.conf.Suppress], field(default=several or ())),
        ("fixed", Annotated[tuple[str, ...], tyro.conf.Suppress], field(default=fixed)),
        ("settings", Annotated[method, tyro.conf.arg(name="")], field(default_factory=method)),
    ]
    made = make_dataclass(f"Distill{method.__name__}", added, bases=(Distill,), frozen=True, kw_only=True)
    made.__doc__ = f"{(method.__doc__ or '').splitlines()[0]}\n\n{(Distill.__doc__ or '').partition(chr(10))[2]}"
    return made, argv


def _several(argv: Sequence[str]) -> tuple[list[str], tuple[int, ...] | None]:
    """``--steps 1,2,4`` as ``--steps 4`` and the numbers; one number are none; None where there is no such flag.

    Raises:
        InputError: a list of something else than whole numbers.
    """
    words = list(argv)
    found: tuple[int, ...] | None = None
    for i, word in enumerate(words):
        flag, equals, value = word.partition("=")
        if flag != "--steps" or not (equals or i + 1 < len(words)):
            continue
        value = value if equals else words[i + 1]
        found = ()
        if "," not in value:
            continue
        try:
            found = tuple(int(part) for part in value.split(","))
        except ValueError:
            raise InputError(f"--steps {value}: expected whole numbers such as 4 or 1,2,4") from None
        largest = str(max(found))
        if equals:
            words[i] = f"--steps={largest}"
        else:
            words[i + 1] = largest
    return words, found


def _fixed(argv: Sequence[str], method: type[Any]) -> tuple[str, ...]:
    """The settings of the method that are among the flags."""
    flags = {word.partition("=")[0].replace("_", "-") for word in argv}
    return tuple(path for path in leaves(method()) if f"--{path.replace('_', '-')}" in flags)


def _table(out: Path, count: int) -> Path:
    """The sampler of ``count`` steps in the folder of a student that serves several."""
    file = out / SAMPLERS / f"{count}.json"
    return file if file.is_file() else file.with_suffix("")
