"""Multi-student distillation (MSD, arXiv 2410.23274): the classes are divided among several students."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from fewstep.core import distributed
from fewstep.core.cond import Batch, Classes
from fewstep.core.denoiser import build_denoiser, module_of, rewrapped
from fewstep.core.fit import Data
from fewstep.core.generator import CONFIG, WEIGHTS, Generator, check_device
from fewstep.core.noise import Noise
from fewstep.core.options import HANDED_ON, Budget, FitOptions
from fewstep.core.path import widen
from fewstep.core.role import Ema, Models, Optim, Role, Update
from fewstep.core.state import Run, load_tensors, load_weights, read_json
from fewstep.data.conditions import ConditionsOnly
from fewstep.data.of_classes import OfClasses, labels_of
from fewstep.distill.dmd2 import DMD2
from fewstep.errors import InputError
from fewstep.loss.draw import LogNormal
from fewstep.models.frozen import frozen, network_under
from fewstep.models.router import check_routes, routed, shrunk
from fewstep.train.run import options_of, train

STUDENTS = "students"


@dataclass(frozen=True)
class MSD:
    """One student for each part of the classes, and a network that sends every sample to the student of its class.

    A picture costs what one student costs. A student and its fake score are told of their own classes alone, and the
    discriminator sees the data of these alone. Students that are smaller than the teacher cannot start as it: they
    learn the teacher's scores first.

    Attributes:
        students: how many there are.
        assign: the number of the student of every class; without it the classes are divided into even ranges.
        steps: evaluations of a student.
        inner: how each student is distilled; in Python any method, on the command line DMD2 and its settings.
        divided: whether the budget is that of the whole run, of which each student has the share of its classes, or
            that of each student.
        size: channels of a student's network as a share of the teacher's; 1 is the teacher's network.
        matching: share of a student's budget for the teacher's scores, where it is smaller than the teacher.
        plain: share of a student's budget without the GAN term; the rest goes on from there with it (the paper's
            adversarial stage). 0 has it from the start.
        draw: noise levels at which a smaller student learns the teacher's scores.
        optim: optimizer of that stage.
    """

    any_steps: ClassVar[bool] = False

    students: int = 4
    assign: tuple[int, ...] = ()
    steps: int = 1
    inner: DMD2 = DMD2()
    divided: bool = True
    size: float = 1.0
    matching: float = 0.3
    plain: float = 0.0
    draw: LogNormal = LogNormal()
    optim: Optim = Optim(lr=1e-3, warmup=20, clip=1.0)

    def __post_init__(self) -> None:
        if self.students < 1 or not 0 < self.size <= 1:
            raise InputError(f"MSD needs students >= 1 and size within (0, 1], got {self.students} and {self.size}")
        spent = self.plain + (self.matching if self.size < 1 else 0)
        if not (0 < self.matching < 1 and 0 <= self.plain < 1 and spent < 1):
            raise InputError(
                "MSD needs matching within (0, 1) and plain within [0, 1), together below 1, got "
                f"{self.matching} and {self.plain}"
            )
        name, inner = type(self.inner).__name__, self.inner
        if self.plain and not getattr(inner, "gan", 0):
            raise InputError(
                f"MSD with plain {self.plain:g} needs an inner method with a GAN term, got {name}: set gan"
            )
        if getattr(inner, "steps", 1) not in (1, self.steps) or (self.steps != 1 and not hasattr(inner, "steps")):
            raise InputError(
                f"MSD of {self.steps} steps does not go with {name} of {getattr(inner, 'steps', 1)}: give both the same"
            )
        if self.size < 1 and hasattr(inner, "run"):
            raise InputError(f"MSD cannot start the stages of {name} from a smaller network: use size 1")
        # Refuses what the inner method cannot do.
        _ = self.each

    @property
    def each(self) -> Any:
        """The method that distils one student."""
        same = getattr(self.inner, "steps", self.steps) == self.steps
        return self.inner if same else replace(self.inner, steps=self.steps)

    @property
    def needs_data(self) -> bool:
        """Where the inner method does, or students are smaller than the teacher."""
        return bool(self.each.needs_data) or self.size < 1

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Those of one student at a time."""
        found: dict[str, Role] = self.each.roles(teacher)
        return found

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """That of one student."""
        yield from self.each.step(m, batch, i, noise)

    def sampler(self, teacher: Generator) -> Any:
        """That of every student."""
        return self.each.sampler(teacher)

    def routes(self, teacher: Generator) -> tuple[int, ...]:
        """The number of the student of every class.

        Raises:
            InputError: a teacher without classes, a class without a student, or a student without a class that occurs.
        """
        if not isinstance(teacher.conds, Classes):
            raise InputError("MSD divides classes among students, and this teacher has none: use one with labels")
        own = teacher.conds.frequencies
        if self.assign and len(self.assign) != len(own):
            raise InputError(f"MSD needs a student for each of {len(own)} classes, got {len(self.assign)} in assign")
        if not self.assign and len(own) < self.students:
            raise InputError(f"MSD cannot divide {len(own)} classes among {self.students} students: use fewer students")
        found = self.assign or tuple(k * self.students // len(own) for k in range(len(own)))
        check_routes(found, self.students)
        for k, share in enumerate(shares(own, found, self.students)):
            if not share > 0:
                raise InputError(f"MSD: the classes of student {k} never occur: assign it one that does")
        return found

    def stages(self) -> list[tuple[str, Any, float]]:
        """Name, method and share of the budget of what a student goes through; the last one's name is empty."""
        found: list[tuple[str, Any, float]] = []
        if self.size < 1:
            found.append(("matching", ScoreMatching(self.size, self.draw, self.optim), self.matching))
        if self.plain:
            found.append(("plain", replace(self.each, gan=0.0), self.plain))
        return [*found, ("", self.each, 1 - sum(share for *_, share in found))]

    def run(
        self,
        teacher: Generator,
        data: Data | None,
        *,
        out: str | Path,
        budget: str | int | Budget,
        resume: bool = False,
        overwrite: bool = False,
        recipe: Mapping[str, Any] | None = None,
        **options: Any,
    ) -> Generator:
        """Distils every student and returns them as one generator, which ``out`` then holds.

        The students' runs lie in ``out/students/<number>``, stages before the last beside them. With ``resume`` what
        is finished is read and a broken run goes on; the result is the same in every bit. ``options`` are further ones
        of :func:`fewstep.train.run.train`. A single student ships as it is.

        Raises:
            InputError: see :meth:`routes`; data that lack the pictures of a student; a network that cannot be made
                smaller; LoRA on smaller students; bad options; an ``out`` that holds another run.
            NonFiniteError: training diverged.
        """
        folder, routes = Path(out), self.routes(teacher)
        whole = options_of(budget, {k: v for k, v in options.items() if k not in HANDED_ON})
        sources = self._sources(teacher, data, routes, options)
        body = _recipe(teacher, data, self, whole)
        distributed.start(check_device(whole.device))
        first = distributed.rank() == 0
        run = Run.open(folder, {**(recipe or {}), **body}, resume=resume, overwrite=overwrite) if first else Run(folder)
        distributed.barrier()
        assert isinstance(teacher.conds, Classes)
        parts = shares(teacher.conds.frequencies, routes, self.students)
        students, trained = [], []
        for k, source in enumerate(sources):
            part = whole.budget.part(parts[k]) if self.divided else whole.budget
            own = replace(teacher, conds=_only(teacher.conds, routes, k))
            made, facts = self._student(own, source, folder / STUDENTS / f"{k:02d}", part, whole.device, options)
            students.append(made)
            trained.append({"student": k, "stages": facts})
            if first:
                run.rewind_log(k)
                run.log({**facts[-1], "student": k, "step": k + 1})
        card = {**body, "routes": list(routes), "students": trained}
        shipped = replace(teacher, denoiser=_together(students, routes), sampler=self.sampler(teacher), card=card)
        if first:
            shipped.save(folder)
        distributed.barrier()
        return shipped

    def _sources(
        self, teacher: Generator, data: Data | None, routes: tuple[int, ...], options: Mapping[str, Any]
    ) -> Sequence[OfClasses | None]:
        """The data of every student, None without data; refuses what a later stage would fail at."""
        name, roles = type(self.inner).__name__, self.each.roles(teacher)
        if self.size < 1:
            if options.get("lora") is not None:
                raise InputError("LoRA adapts the teacher's weights, and smaller students have their own: use size 1")
            small = shrunk(network_under(teacher.denoiser), self.size)
            usual = next(role for role in roles.values() if role.ships).start()
            if type(usual) is not type(small) or type(getattr(usual, "net", None)) is not type(small.net):
                raise InputError(f"MSD with size {self.size:g}: {name} trains another kind of network: use size 1")
        if data is None:
            if self.needs_data:
                raise InputError(f"MSD with {name} learns from data and got none: pass data, e.g. --data digits")
            return [None] * self.students
        labels = labels_of(data)
        found = [OfClasses(data, labels, [c for c, r in enumerate(routes) if r == k]) for k in range(self.students)]
        for k, own in enumerate(found):
            if not len(own):
                raise InputError(f"MSD: the data hold no picture of classes {own.kept} of student {k}: assign others")
        return found

    def _student(
        self,
        teacher: Generator,
        source: OfClasses | None,
        folder: Path,
        budget: Budget,
        device: str,
        options: Mapping[str, Any],
    ) -> tuple[Generator, list[dict[str, Any]]]:
        """One student, and what was trained for it, stage by stage."""
        made: Generator | None = None
        facts = []
        for name, method, share in self.stages():
            place = folder.with_name(f"{folder.name}-{name}") if name else folder
            stage: Any = method if made is None else continued(method, made)
            if (place / CONFIG).is_file():
                made = _finished(teacher, stage, place, device)
            elif hasattr(stage, "run"):
                made = stage.run(teacher, source, out=place, budget=budget.part(share), resume=True, **options)
            else:
                given = source if stage.needs_data else ConditionsOnly(teacher.conds)
                assert given is not None
                # The folder is this run's own, so that what is in it is to be gone on with.
                made = train(teacher, stage, given, out=place, budget=budget.part(share), resume=True, **options)
            assert made is not None
            facts.append({"stage": name or type(method).__name__, **made.card.get("trained", {})})
        assert made is not None
        return made, facts


@dataclass(frozen=True)
class ScoreMatching:
    """Teacher score matching: a network of another size learns what the teacher says of noised pictures.

    Attributes:
        size: channels of the network as a share of the teacher's.
        draw: noise levels, with EDM's weight.
        optim: of the network.
        ema: the average that the next stage starts from.
    """

    needs_data: ClassVar[bool] = True

    size: float = 0.5
    draw: LogNormal = LogNormal()
    optim: Optim = Optim(lr=1e-3, warmup=20, clip=1.0)
    ema: Ema = Ema(power=0.05)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The teacher, which may be guided, and a smaller network with fresh weights.

        Raises:
            InputError: see :func:`shrunk`.
        """
        own, whole = network_under(teacher.denoiser), frozen(teacher.denoiser)
        return {
            "teacher": Role(lambda: whole),
            "student": Role(lambda: shrunk(own, self.size), self.optim, self.ema, ships=True),
        }

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """``w(sigma) |D_student - D_teacher|^2`` on noised pictures."""
        x0, cond = batch.x, batch.cond
        assert x0 is not None
        sigma, weight = self.draw(noise, m.student.sigma_data)
        y = x0 + widen(sigma, x0) * noise.normal(x0.shape[1:], "n")
        with torch.no_grad():
            target = m.teacher(y, sigma, cond)

        yield Update("student", lambda: (widen(weight, y) * (m.student(y, sigma, cond) - target).square()).mean())

    def sampler(self, teacher: Generator) -> Any:
        """The teacher's own, because the student stands for it."""
        return teacher.sampler


@dataclass(frozen=True)
class Continued:
    """A method whose student starts where another stage ended; made by :func:`continued`.

    Attributes:
        inner: the method.
        start: fingerprint of the network that the student starts as.
    """

    network: ClassVar[Any] = None

    inner: Any
    start: str

    @property
    def needs_data(self) -> bool:
        """Where the method does."""
        return bool(self.inner.needs_data)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Those of the method, with a copy of that network for student."""
        own: dict[str, Role] = self.inner.roles(teacher)
        return {
            k: replace(role, start=lambda: copy.deepcopy(self.network)) if role.ships else role
            for k, role in own.items()
        }

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """That of the method."""
        yield from self.inner.step(m, batch, i, noise)

    def sampler(self, teacher: Generator) -> Any:
        """That of the method."""
        return self.inner.sampler(teacher)

    def ships(self, network: Any) -> Any:
        """That of the method."""
        return self.inner.ships(network) if hasattr(self.inner, "ships") else network


def continued(method: Any, start: Generator) -> Continued:
    """``method`` with a student that starts as the network of ``start``."""
    made = Continued(method, start.fingerprint())
    # No field, because a recipe holds fields, and no weights.
    object.__setattr__(made, "network", network_under(start.denoiser))
    return made


def shares(frequencies: tuple[float, ...], routes: tuple[int, ...], count: int) -> list[float]:
    """What share of the samples each of ``count`` students makes."""
    total = sum(frequencies)
    return [sum(f for f, r in zip(frequencies, routes, strict=True) if r == k) / total for k in range(count)]


def _only(conds: Classes, routes: tuple[int, ...], k: int) -> Classes:
    """The classes of student ``k``, with their frequencies."""
    own = (f if r == k else 0.0 for f, r in zip(conds.frequencies, routes, strict=True))
    return Classes(tuple(own), conds.names)


def _together(students: list[Generator], routes: tuple[int, ...]) -> Any:
    """One denoiser of all students; what is wrapped around them is alike."""
    if len(students) == 1:
        return students[0].denoiser
    return rewrapped(students[0].denoiser, routed([network_under(s.denoiser) for s in students], routes))


def _finished(teacher: Generator, method: Any, place: Path, device: str) -> Generator:
    """The student that a stage left."""
    told = read_json(place / CONFIG)
    D = build_denoiser(told["denoiser"], teacher.conds)
    network = module_of(D)
    assert network is not None
    load_weights(network, load_tensors(place / WEIGHTS), place / WEIGHTS)
    network.to(device).eval().requires_grad_(False)
    return replace(teacher, denoiser=D, sampler=method.sampler(teacher), card=told.get("card", {}))


def _recipe(teacher: Generator, data: Data | None, method: MSD, options: FitOptions) -> dict[str, Any]:
    """What a run is resumed with; what only saves memory may change."""
    lasting = {k: v for k, v in asdict(options).items() if k not in ("checkpointing", "offload")}
    return {
        "method": "MSD",
        "settings": {**asdict(method), "inner": {"method": type(method.inner).__name__, **asdict(method.inner)}},
        "options": lasting,
        "from": teacher.fingerprint(),
        "data": getattr(data, "fingerprint", None),
    }
