"""Students of several numbers of steps at once: one training where the method allows it, one for each elsewhere."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

from fewstep.core import distributed
from fewstep.core.fit import Data
from fewstep.core.generator import Generator, check_device
from fewstep.core.options import Budget
from fewstep.core.sample import Sampler
from fewstep.core.state import Run
from fewstep.core.stored import save_sampler
from fewstep.core.tableau import Tableau
from fewstep.distill.front import distill
from fewstep.distill.progressive import STAGES, Progressive, halvings
from fewstep.errors import InputError
from fewstep.models.frozen import network_under

SAMPLERS = "samplers"
# Of one training among several, which goes on wherever the run as a whole stopped.
_OWN = ("resume", "overwrite", "recipe")


def distill_steps(
    teacher: Generator,
    method: Any,
    data: Data | None = None,
    *,
    steps: Sequence[int] = (1, 2, 4),
    out: str | Path,
    budget: str | int | Budget,
    resume: bool = False,
    overwrite: bool = False,
    recipe: Mapping[str, Any] | None = None,
    **options: Any,
) -> dict[int, Generator]:
    """Distils ``teacher`` for every number of ``steps``; returns the generators by it.

    * A method with ``any_steps`` is trained once. ``out`` is the generator of the largest number, and
      ``out/samplers/<n>.json`` the table of each (a folder ``out/samplers/<n>`` for a sampler that is no table), to be
      used as ``fewstep sample out --sampler out/samplers/1.json``. Where the network is told of its steps (CTM,
      MeanFlow, SFD-v) each number is a generator in ``out/<n>`` instead.
    * Progressive distillation runs once, down to the smallest number; the stages that it passes are the other students.
      ``out`` is the generator of the smallest number, and ``out/<n>`` that of each.
    * Any other method is trained once for each number, each with the whole ``budget``, in ``out/<n>``.

    With ``resume`` finished trainings are read and a broken one goes on, to the same bits. ``options`` are further ones
    of :func:`fewstep.distill.distill`.

    Raises:
        InputError: numbers that are not distinct and positive, a method without steps, or what ``distill`` refuses.
        NonFiniteError: training diverged.
    """
    counts = check_steps(method, steps)
    own: dict[str, Any] = {"resume": resume, "overwrite": overwrite, "recipe": recipe, "budget": budget, **options}
    if getattr(method, "any_steps", False):
        return _once(teacher, method, data, counts, Path(out), own)
    if isinstance(method, Progressive):
        return _stages(teacher, method, data, counts, Path(out), own)
    return _each(teacher, method, data, counts, Path(out), own)


def check_steps(method: Any, steps: Sequence[int]) -> tuple[int, ...]:
    """The numbers of steps in rising order.

    Raises:
        InputError: none, not distinct, not positive whole numbers, a method without steps, or one that cannot do some.
    """
    name = type(method).__name__
    if "steps" not in {f.name for f in fields(method)}:
        raise InputError(f"{name} has no number of steps to choose: leave --steps out")
    wrong = [n for n in steps if isinstance(n, bool) or not isinstance(n, int) or n < 1]
    if wrong or not steps or len(set(steps)) < len(steps):
        raise InputError(f"steps {list(steps)}: expected distinct whole numbers from 1 on, such as 1,2,4")
    counts = tuple(sorted(steps))
    for count in counts:
        # The method refuses a number that it cannot do, before anything is spent.
        replace(method, steps=count)
    return counts


def _once(
    teacher: Generator, method: Any, data: Data | None, counts: tuple[int, ...], out: Path, own: Mapping[str, Any]
) -> dict[int, Generator]:
    """One training, and a sampler for every number."""
    made: dict[int, Sampler] = {count: replace(method, steps=count).sampler(teacher) for count in counts}
    student = distill(teacher, replace(method, steps=counts[-1]), data, out=out, **own)
    if hasattr(method, "ships"):
        # What stands around the network, such as what it is told, belongs to one number of steps.
        return _shipped(method, student, made, out)
    if distributed.rank() == 0:
        for count, sampler in made.items():
            save_sampler(sampler, sampler_place(out, count, sampler))
    distributed.barrier()
    return {count: student.with_sampler(sampler) for count, sampler in made.items()}


def _shipped(method: Any, student: Generator, samplers: Mapping[int, Sampler], out: Path) -> dict[int, Generator]:
    """The one network as it ships for every number, each in a folder of its own."""
    network = network_under(student.denoiser)
    found = {
        count: replace(student, denoiser=replace(method, steps=count).ships(network), sampler=sampler)
        for count, sampler in samplers.items()
    }
    if distributed.rank() == 0:
        for count, made in found.items():
            made.save(out / str(count))
    distributed.barrier()
    return found


def sampler_place(out: Path, count: int, sampler: Sampler) -> Path:
    """Where the sampler of ``count`` steps lies in the folder of a student that serves several."""
    return out / SAMPLERS / (f"{count}.json" if isinstance(sampler, Tableau) else str(count))


def _stages(
    teacher: Generator,
    method: Progressive,
    data: Data | None,
    counts: tuple[int, ...],
    out: Path,
    own: Mapping[str, Any],
) -> dict[int, Generator]:
    """One progressive run; its stages are the students."""
    passed = {few for _, few in halvings(method.start_steps, counts[0])}
    missed = [count for count in counts if count not in passed]
    if missed:
        raise InputError(
            f"progressive distillation from {method.start_steps} to {counts[0]} steps passes "
            f"{', '.join(map(str, sorted(passed)))}, and not {', '.join(map(str, missed))}: choose among those"
        )
    last = distill(teacher, replace(method, steps=counts[0]), data, out=out, **own)
    device = own.get("device", "cpu")
    students = {count: Generator.load(out / STAGES / f"{count:04d}", device=device) for count in counts[1:]}
    found = {counts[0]: last, **{count: _around(teacher, student) for count, student in students.items()}}
    if distributed.rank() == 0:
        for count, student in found.items():
            student.save(out / str(count))
    distributed.barrier()
    return found


def _around(teacher: Generator, student: Generator) -> Generator:
    """The student with the codec, conditions and pipeline that the teacher holds already."""
    return replace(teacher, denoiser=student.denoiser, sampler=student.sampler, card=student.card)


def _each(
    teacher: Generator, method: Any, data: Data | None, counts: tuple[int, ...], out: Path, own: Mapping[str, Any]
) -> dict[int, Generator]:
    """A training for every number, in a folder of its own."""
    methods = {count: replace(method, steps=count) for count in counts}
    for made in methods.values():
        # Refused before the first training, what would be refused before the last.
        made.sampler(teacher)
    distributed.start(check_device(own.get("device", "cpu")))
    if distributed.rank() == 0:
        body = {
            **(own["recipe"] or {}),
            "method": type(method).__name__,
            "settings": asdict(methods[counts[0]]),
            "steps": list(counts),
            "budget": asdict(Budget.parse(own["budget"])),
            "from": teacher.fingerprint(),
            "data": getattr(data, "fingerprint", None),
        }
        Run.open(out, body, resume=own["resume"], overwrite=own["overwrite"])
    distributed.barrier()
    rest = {k: v for k, v in own.items() if k not in _OWN}
    # The folders are this run's own, so that what is in them is to be gone on with.
    return {
        count: distill(teacher, made, data, out=out / str(count), resume=(out / str(count)).is_dir(), **rest)
        for count, made in methods.items()
    }
