"""Distribution backtracking (DisBack, arXiv 2408.15991): the teacher's way to the untrained student, walked back."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import InitVar, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from torch import Tensor, nn

from fewstep.core import distributed
from fewstep.core.cond import Batch, Cond
from fewstep.core.denoiser import Precond, rewrapped
from fewstep.core.fit import Data
from fewstep.core.generator import CONFIG, WEIGHTS, Generator, check_device
from fewstep.core.noise import Noise
from fewstep.core.options import HANDED_ON, Budget
from fewstep.core.role import Models, Optim, Role, Update
from fewstep.core.state import Run, load_tensors, load_weights, read_json
from fewstep.core.tableau import Tableau
from fewstep.data.conditions import ConditionsOnly
from fewstep.distill.dmd2 import DMD2
from fewstep.errors import InputError
from fewstep.models.frozen import frozen, network_under
from fewstep.train.run import options_of, train

STAGES, BACK = "stages", "backtracking"


@dataclass(frozen=True)
class DisBack(DMD2):
    """DMD2 whose teacher comes back, checkpoint by checkpoint, from where the untrained student is.

    :meth:`run` first fine-tunes a copy of the teacher on samples of the untrained student and keeps ``nodes``
    checkpoints of it. Then it distils with them as teachers, the last but one first, and ends with the teacher itself.
    As a training method, without :meth:`run`, it is DMD2.

    Attributes:
        nodes: checkpoints on the way from the teacher to the student; with 0 it is DMD2 in every bit.
        record: share of the budget in which they are made.
        back: share of the rest at whose end the teacher is reached; it stays until the end.
        ready: starts the fake score as the last checkpoint, which fits the student already, else as the teacher.
        degrade: optimizer of the fine-tuning.
        fake_draw: noise levels of the fake score's, the checkpoints' and the discriminator's training.
        features: what the discriminator reads: fake, because the teacher changes under way.
    """

    any_steps: ClassVar[bool] = False

    nodes: int = 5
    record: float = 0.1
    back: float = 0.5
    ready: bool = True
    degrade: Optim = Optim(lr=1e-4, weight_decay=0.01, clip=10.0)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.nodes < 0 or not 0 < self.record < 1 or not 0 < self.back <= 1:
            raise InputError(
                f"DisBack needs nodes >= 0, 0 < record < 1 and 0 < back <= 1, got {self.nodes}, {self.record} and "
                f"{self.back}"
            )
        if self.gan and self.features == "teacher":
            raise InputError(
                "DisBack changes its teacher while it trains, so that a discriminator cannot read the teacher: use "
                "features fake, or gan 0"
            )

    def node_at(self, progress: float) -> int:
        """Which checkpoint is the teacher when the share ``progress`` of the second stage is spent; 0 is the teacher.

        From ``nodes - 1`` down, each for the same share, and 0 from ``back`` on.
        """
        first = max(self.nodes - 1, 0)
        return max(0, first - int(progress * first / self.back))

    def run(
        self,
        teacher: Generator,
        data: Data | None,
        *,
        out: str | Path,
        budget: str | int | Budget,
        resume: bool = False,
        overwrite: bool = False,
        recipe: dict[str, Any] | None = None,
        **options: Any,
    ) -> Generator:
        """Both stages; returns the student, which ``out`` then holds.

        ``out/stages/node-<k>`` is the run folder of checkpoint k, a generator too, and ``out/stages/backtracking`` that
        of the second stage, or of the only one. With ``resume`` finished stages are read and a broken one goes on, to
        the same bits. ``options`` are those of :func:`fewstep.train.run.train`, but for lora and offload.

        Raises:
            InputError: no data for the GAN term, options that cannot be had, bad settings, or an ``out`` that holds
                another run.
            NonFiniteError: training diverged.
        """
        folder = Path(out)
        whole = options_of(budget, {k: v for k, v in options.items() if k not in HANDED_ON})
        self.check(teacher, data, options)
        lasting = {k: v for k, v in asdict(whole).items() if k not in ("checkpointing", "offload")}
        body = {
            "method": type(self).__name__,
            "settings": asdict(self),
            "options": lasting,
            "from": teacher.fingerprint(),
            "data": getattr(data, "fingerprint", None),
        }
        source: Data = ConditionsOnly(teacher.conds) if data is None else data
        distributed.start(check_device(whole.device))
        first = distributed.rank() == 0
        run = Run.open(folder, {**(recipe or {}), **body}, resume=resume, overwrite=overwrite) if first else Run(folder)
        distributed.barrier()
        places = [folder / STAGES / f"node-{k + 1}" for k in range(self.nodes)]
        ends: list[tuple[Any, Path, float]] = [
            (self.degradation(k, places), place, self.record / self.nodes) for k, place in enumerate(places)
        ]
        ends.append((self.backtracking(places), folder / STAGES / BACK, 1 - self.record if self.nodes else 1.0))
        told: list[dict[str, Any]] = []
        for k, (method, place, share) in enumerate(ends):
            if not (place / CONFIG).is_file():
                # The folder is this run's own, so that what is in it is to be gone on with.
                part = whole.budget.part(share)
                train(teacher, method, source, out=place, budget=part, resume=True, **options)
            told.append({"stage": place.name, **read_json(place / CONFIG)["card"]["trained"]})
            if first:
                run.rewind_log(k)
                run.log({**told[-1], "step": k + 1})
        network = loaded(teacher, ends[-1][1]).to(whole.device)
        card = {**body, "stages": told, "trained": read_json(ends[-1][1] / CONFIG)["card"]["trained"]}
        student = replace(teacher, denoiser=network, sampler=self.sampler(teacher), card=card)
        if first:
            student.save(folder)
        distributed.barrier()
        return student

    def check(self, teacher: Generator, data: Data | None, options: dict[str, Any]) -> None:
        """Refuses what a stage would fail at.

        Raises:
            InputError: see :meth:`run`.
        """
        if self.needs_data and data is None:
            raise InputError("DisBack with a GAN term learns from data and got none: pass data, or set gan 0")
        for name in ("lora", "offload"):
            if options.get(name):
                raise InputError(
                    f"DisBack changes its teacher's weights while it trains, which {name} does not allow: leave {name} "
                    "out, or distil with DMD2"
                )
        self.roles(teacher)

    def degradation(self, k: int, places: list[Path]) -> Degradation:
        """What makes checkpoint ``k + 1`` of the one before it, in ``places``."""
        own = {f.name: getattr(self, f.name) for f in fields(DisBack)}
        return Degradation(**{**own, "gan": 0.0}, segment=k, before=places[k - 1] if k else None)

    def backtracking(self, places: list[Path]) -> Backtracking:
        """The second stage, with the checkpoints in ``places``."""
        return Backtracking(**{f.name: getattr(self, f.name) for f in fields(DisBack)}, places=tuple(places))


@dataclass(frozen=True)
class Degradation(DisBack):
    """Denoising of the untrained student's samples, from the checkpoint ``before`` or from the teacher.

    Attributes:
        segment: how many checkpoints there are already.
    """

    segment: int = 0
    before: InitVar[Path | None] = None

    def __post_init__(self, before: Path | None) -> None:
        super().__post_init__()
        object.__setattr__(self, "_before", before)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """The untrained student, frozen, and what is fine-tuned, which ships."""
        self.grid(teacher.denoiser)
        made, before = network_under(teacher.denoiser), getattr(self, "_before", None)
        return {
            "student": Role(lambda: made),
            "fake": Role(lambda: loaded(teacher, before), self.degrade, ships=True),
        }

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """The fake score's update of VSD, on noise of this checkpoint's own; the student's is left out."""
        for update in super().step(m, batch, i, noise.fold("node", self.segment)):
            if "student" not in update.roles:
                yield update

    def sampler(self, teacher: Generator) -> Tableau:
        """The teacher's: a checkpoint is no student."""
        found: Tableau = teacher.sampler  # type: ignore[assignment]
        return found


@dataclass(frozen=True)
class Backtracking(DisBack):
    """DMD2 against the checkpoints in ``places``, the first of which is nearest to the teacher."""

    places: InitVar[tuple[Path, ...]] = ()

    def __post_init__(self, places: tuple[Path, ...]) -> None:
        super().__post_init__()
        object.__setattr__(self, "_places", places)

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Those of DMD2, with a teacher that can change and a fake score that may start as the last checkpoint."""
        found = super().roles(teacher)
        places: tuple[Path, ...] = getattr(self, "_places", ())
        if not places:
            return found
        found["teacher"] = Role(lambda: Changing(teacher, places))
        if self.ready:
            found["fake"] = replace(found["fake"], start=lambda: loaded(teacher, places[-1]))
        return found

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """That of DMD2, with the teacher of the share of the budget that is spent."""
        if self.nodes:
            m.teacher.turn(self.node_at(m.progress))
        yield from super().step(m, batch, i, noise)


class Changing(nn.Module):
    """A teacher whose weights are those of one checkpoint at a time; guidance around it stays.

    The network of the ``teacher`` it is made from is not touched. ``places`` are folders of generators.
    """

    def __init__(self, teacher: Generator, places: tuple[Path, ...]) -> None:
        super().__init__()
        self.network = loaded(teacher, None)
        self.inside = frozen(rewrapped(teacher.denoiser, self.network))
        # In a list, because the teacher's own weights are no part of this module.
        self.own, self.places, self.node = [network_under(teacher.denoiser)], places, 0
        like = self.network
        self.shape, self.sigma_data = like.shape, like.sigma_data
        self.sigma_min, self.sigma_max = like.sigma_min, like.sigma_max

    def turn(self, node: int) -> None:
        """Takes the weights of checkpoint ``node``, 0 for the teacher's own; those that it has are not read again."""
        if node == self.node:
            return
        if node == 0:
            self.network.load_state_dict(self.own[0].state_dict())
        else:
            place = self.places[node - 1] / WEIGHTS
            load_weights(self.network, load_tensors(place), place)
        self.node = node

    def forward(self, x: Tensor, sigma: Tensor | float, cond: Cond | None = None) -> Tensor:
        """See :class:`fewstep.core.denoiser.Denoiser`."""
        made: Tensor = self.inside(x, sigma, cond)
        return made


def loaded(teacher: Generator, place: Path | None) -> Precond:
    """A copy of the teacher's network, with the weights of the generator in ``place`` if there is one."""
    made = copy.deepcopy(network_under(teacher.denoiser)).requires_grad_(False).eval()
    if place is not None:
        load_weights(made, load_tensors(place / WEIGHTS), place / WEIGHTS)
    return made
