"""Score forgetting distillation (arXiv 2409.11219): a data-free one-step student that has unlearned classes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fewstep.core.cond import Batch, Classes, Cond, take
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.role import Models, Role, Update, added
from fewstep.distill.sid import WHOLE, SiD
from fewstep.errors import InputError


@dataclass(frozen=True)
class ScoreForgetting(SiD):
    """SiD on the classes that stay, and on those to be forgotten SiD against the teacher's score of another class.

    The student and its fake score are told the forgotten class, the teacher the one in its place. So the student still
    takes the label, and what it makes of it is the other class. No data are needed.

    Attributes:
        forget: the classes to be forgotten.
        override: the class that stands in for them; None draws one that stays, by its frequency.
        forgetting: weight of the forgotten classes in the student's loss; 0.01 in the paper, beside 1 of the others.
        fake_forgetting: weight of the forgotten classes in the fake score's loss; 0.01 in the paper.
        alpha: weight of the squared difference; 1.2 in the paper.
        student: optimizer of the student. The paper's lr is 1e-5 for CIFAR-10.
        fake: optimizer of the fake score; 1e-5, or 3e-5 where the student starts from a distilled one.
    """

    forget: tuple[int, ...] = (0,)
    override: int | None = None
    forgetting: float = 0.01
    fake_forgetting: float = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.forget or len(set(self.forget)) < len(self.forget) or min(self.forget) < 0:
            raise InputError(f"ScoreForgetting needs different classes to forget, from 0 on, got {self.forget}")
        if self.override is not None and (self.override in self.forget or self.override < 0):
            raise InputError(
                f"ScoreForgetting cannot put class {self.override} in the place of {self.forget}: override with a "
                "class that stays, or with none"
            )
        if not (0 <= self.forgetting < math.inf and 0 <= self.fake_forgetting < math.inf):
            raise InputError(
                "ScoreForgetting needs forgetting >= 0 and fake_forgetting >= 0, both finite, got "
                f"{self.forgetting} and {self.fake_forgetting}"
            )

    def roles(self, teacher: Generator) -> dict[str, Role]:
        """Those of SiD, and the classes to draw from.

        Raises:
            InputError: see :meth:`SiD.roles`, a teacher without classes, a class that it does not have, or none that
                stays.
        """
        if not isinstance(teacher.conds, Classes):
            raise InputError("ScoreForgetting forgets classes, and this teacher has none: use one with labels")
        own = teacher.conds.frequencies
        for label in (*self.forget, *(() if self.override is None else (self.override,))):
            if label >= len(own):
                raise InputError(f"ScoreForgetting: class {label} is unknown: the teacher has 0 to {len(own) - 1}")
        if not sum(own[k] for k in range(len(own)) if k not in self.forget) > 0:
            raise InputError(f"ScoreForgetting of {self.forget} would forget every class: leave at least one")
        return {**super().roles(teacher), "classes": Role(lambda: Staying(own, self.forget))}

    def step(self, m: Models, batch: Batch, i: int, noise: Noise) -> Iterator[Update]:
        """One update of the fake score, then one of the student, each on classes that stay and on forgotten ones."""
        if "label" not in batch.cond:
            raise InputError("ScoreForgetting needs conditions with a label")
        stay = {**batch.cond, "label": m.classes(batch.cond["label"], noise.fold("remain"))}
        gone = {**batch.cond, "label": m.classes.forgotten(noise.fold("forget"))}
        other = {**batch.cond, "label": self.overriding(m, noise.fold("override"))}
        own = noise.fold("forgotten")
        with torch.no_grad():
            made = self.generate(m, noise, "fake", stay)
            lost = self.generate(m, own, "fake", gone) if self.fake_forgetting else None

        def remaining() -> dict[str, Tensor]:
            loss = self.denoising(m, made, stay, noise.fold("fake"))
            return {"loss": loss, "remain": loss.detach()}

        def forgetting() -> dict[str, Tensor]:
            assert lost is not None
            loss = self.denoising(m, lost, gone, own.fold("fake"))
            return {"loss": self.fake_forgetting * loss, "forget": loss.detach()}

        yield Update.of("fake", remaining) if lost is None else Update.of("fake", remaining, forgetting)

        def kept(some: slice = WHOLE) -> dict[str, Tensor]:
            cond, part = take(stay, some), noise[some]
            return self.matching(m, self.generate(m, part, "student", cond), cond, cond, part.fold("student"))

        def forgotten(some: slice = WHOLE) -> dict[str, Tensor]:
            losses = self.forget_losses(m, take(gone, some), take(other, some), own[some])
            return {"loss": self.forgetting * losses["loss"], "fisher_forget": losses["fisher"]}

        terms = (kept, forgotten) if self.forgetting else (kept,)
        parts = [part for term in terms for part in self.portions(term, noise)]
        yield Update("student", lambda: added([term() for term in terms]), tuple(parts))

    def forget_losses(self, m: Models, gone: Cond, other: Cond, noise: Noise) -> dict[str, Tensor]:
        """SiD's loss where student and fake score are told ``gone`` and the teacher ``other``."""
        return self.matching(m, self.generate(m, noise, "student", gone), gone, other, noise.fold("student"))

    def overriding(self, m: Models, noise: Noise) -> Tensor:
        """(B,) the classes that the teacher is told in the place of the forgotten ones."""
        if self.override is None:
            drawn: Tensor = m.classes.staying(noise)
            return drawn
        return torch.full_like(noise.seeds, self.override)


class Staying(nn.Module):
    """Which classes stay and which go, with their frequencies, on the device of the run."""

    edges: Tensor
    gone: Tensor

    def __init__(self, frequencies: Sequence[float], forget: Sequence[int]) -> None:
        super().__init__()
        kept = [0.0 if k in forget else float(f) for k, f in enumerate(frequencies)]
        edges = torch.tensor(kept, dtype=torch.float64).cumsum(0)
        self.register_buffer("edges", (edges / edges[-1]).float())
        self.register_buffer("gone", torch.tensor(sorted(forget), dtype=torch.int64))

    def forward(self, labels: Tensor, noise: Noise) -> Tensor:
        """``labels`` (B,) int64 with those that go replaced by drawn ones that stay."""
        gone = self.gone.to(labels.device)
        return torch.where((labels[:, None] == gone).any(1), self.staying(noise), labels)

    def staying(self, noise: Noise) -> Tensor:
        """(B,) int64: a class that stays, by its frequency."""
        # The first class whose edge is beyond the place: classes of frequency 0 have no room of their own.
        return torch.searchsorted(self.edges.to(noise.seeds.device), noise.uniform((), "label"), right=True)

    def forgotten(self, noise: Noise) -> Tensor:
        """(B,) int64: one of the classes that go, all alike."""
        gone = self.gone.to(noise.seeds.device)
        return gone[noise.integers(0, len(gone), (), "label")]
