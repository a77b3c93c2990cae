"""Adaptive collaboration of a student and its teacher (arXiv 2312.10835): the teacher sees only what the student fails.

The student makes every picture, an oracle scores it, and those below a cut-off go to the teacher: they are noised again
and denoised from there (refinement), or made anew (regeneration). The cut-off is a percentile of the scores of
a calibration set, so that it is known before the first picture, and each picture depends on its own seed alone.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from fewstep.core.cond import Cond, take
from fewstep.core.denoiser import CountingDenoiser, Denoiser, Wrapper, rewrapped
from fewstep.core.generator import Generator, Prompts
from fewstep.core.noise import Noise, Seed, whole
from fewstep.core.sample import Sampler
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError, unknown
from fewstep.measure.features import Classifier, digits_extractor

Oracle = Callable[[Tensor, Cond], Tensor]
"""Scores (B,) of pictures (B, C, H, W) in [-1, 1] and their conditions; higher is better."""
Mode = Literal["refine", "regenerate"]


@dataclass(frozen=True)
class Collaborated:
    """Pictures, and what they cost.

    Attributes:
        pictures: (n, C, H, W) in [-1, 1], on the CPU.
        scores: (n,) the oracle's scores of the student's pictures, float64 on the CPU.
        refined: (n,) bool, which ones the teacher made or refined.
        student_nfe: evaluations of the student's network for a picture.
        teacher_nfe: evaluations of the teacher's network for a picture that it got; guidance counts both branches.
    """

    pictures: Tensor
    scores: Tensor
    refined: Tensor
    student_nfe: float
    teacher_nfe: float

    @property
    def share(self) -> float:
        """The share of the pictures that the teacher got."""
        return float(self.refined.double().mean())

    @property
    def nfe(self) -> float:
        """Network evaluations for a picture, on average; the oracle's own are not in it."""
        return self.student_nfe + self.share * self.teacher_nfe

    def facts(self) -> dict[str, Any]:
        """JSON-able: counts and costs."""
        return {
            "images": len(self.pictures),
            "share": self.share,
            "nfe": self.nfe,
            "student_nfe": self.student_nfe,
            "teacher_nfe": self.teacher_nfe,
            "mean_score": float(self.scores.mean()),
        }


@dataclass(frozen=True)
class Collaboration:
    """A student, its teacher, and when the second is asked.

    Attributes:
        student: makes every picture.
        teacher: with guidance or without; its sampler is how it makes pictures.
        oracle: scores the student's pictures, decoded.
        cutoff: a picture that scores less goes to the teacher; see :meth:`calibrated`.
        mode: refine (noise the student's result and let the teacher go on), or regenerate from pure noise.
        rollback: of refinement, the share of the rows of the teacher's sampler that are run again, in (0, 1].
        refiner: what refinement runs in place of the end of the teacher's sampler; it may start at any level.

    Raises:
        InputError: generators that do not go together, an unknown mode, or a sampler that cannot start in its middle.
    """

    student: Generator
    teacher: Generator
    oracle: Oracle
    cutoff: float
    mode: Mode = "refine"
    rollback: float = 0.5
    refiner: Sampler | None = None

    def __post_init__(self) -> None:
        if self.mode not in ("refine", "regenerate"):
            raise unknown("mode of collaboration", self.mode, ("refine", "regenerate"))
        if math.isnan(self.cutoff):
            raise InputError("the cut-off of a collaboration must be a number, got nan: see Collaboration.calibrated")
        ours, theirs = tuple(self.student.denoiser.shape), tuple(self.teacher.denoiser.shape)
        if ours != theirs or (self.student.codec is None) != (self.teacher.codec is None):
            raise InputError(f"student and teacher must share one space: they make {ours} and {theirs}")
        if (self.student.conds is None) != (self.teacher.conds is None):
            raise InputError("student and teacher must both have conditions or neither: one of them is unconditional")
        if self.student.device != self.teacher.device:
            raise InputError(f"the student is on {self.student.device}, the teacher on {self.teacher.device}: move one")
        if self.mode == "refine" and self.refiner is None:
            object.__setattr__(self, "refiner", ending(self.teacher.sampler, self.rollback))

    @classmethod
    def calibrated(
        cls,
        student: Generator,
        teacher: Generator,
        oracle: Oracle,
        *,
        share: float,
        n: int = 1000,
        cond: Cond | Prompts | None = None,
        seed: Seed = 0,
        batch: int = 256,
        **options: Any,
    ) -> Collaboration:
        """With the cut-off below which the share ``share`` of ``n`` pictures of the student scores.

        ``cond`` are the conditions of those pictures, drawn without any. Their noise is never that of
        :meth:`sample`, whatever its seed. ``options`` are the fields of the class.

        Raises:
            InputError: a share outside [0, 1], n < 1, or scores that are not finite.
        """
        if not 0 <= share <= 1:
            raise InputError(f"the share of pictures that the teacher gets must be in [0, 1], got {share}")
        # Checked first, because the calibration takes a while.
        made = cls(student, teacher, oracle, math.inf if share == 1 else -math.inf, **options)
        if share in (0, 1):
            return made
        noise = Noise.of(seed, _positive("n", n), student.device).fold("calibration")
        conds = student.conditions(cond, noise)
        parts = [
            made._student(student.denoiser, noise[i : i + batch], take(conds, slice(i, i + batch)))[2]
            for i in range(0, len(noise), _positive("batch", batch))
        ]
        return replace(made, cutoff=float(torch.cat(parts).quantile(share)))

    @torch.no_grad()
    def sample(self, n: int, cond: Cond | Prompts | None = None, *, seed: Seed = 0, batch: int = 256) -> Collaborated:
        """``n`` pictures; those that the teacher does not get are ``student.sample(n, cond, seed=seed)``'s.

        Regenerated ones are ``teacher.sample(n, cond, seed=seed)``'s. Picture i is a function of (seed, i) alone. The
        teacher works on whole batches of what it gets.

        Raises:
            InputError: see :meth:`fewstep.core.generator.Generator.sample`, or scores that are no (B,) numbers.
        """
        student, teacher = counted(self.student), counted(self.teacher)
        noise, batch = Noise.of(seed, _positive("n", n), self.student.device), _positive("batch", batch)
        conds = self.student.conditions(cond, noise)
        if self.teacher.conds is not None:
            self.teacher.conds.check(conds)
        pictures, scores, starts = [], [], []
        for i in range(0, n, batch):
            own = noise[i : i + batch]
            x, shown, score = self._student(student.denoiser, own, take(conds, slice(i, i + batch)))
            pictures.append(shown.cpu())
            scores.append(score)
            # Only the failures are kept as the sampler left them.
            starts.append(x.index_select(0, (score < self.cutoff).nonzero()[:, 0]))
        made, found, left = torch.cat(pictures), torch.cat(scores), torch.cat(starts)
        failed = (found < self.cutoff).nonzero()[:, 0]
        for i in range(0, len(failed), batch):
            ids = failed[i : i + batch]
            again = self._teacher(teacher.denoiser, left[i : i + batch], noise[ids], take(conds, ids))
            made[ids.cpu()] = again.cpu()
        seen = max(1, len(failed))
        return Collaborated(
            made, found.cpu(), (found < self.cutoff).cpu(), student.calls.images / n, teacher.calls.images / seen
        )

    def _student(self, D: Denoiser, noise: Noise, cond: Cond) -> tuple[Tensor, Tensor, Tensor]:
        """The sampler's result, the picture, and its score (B,) float64."""
        use = self.student.sampler
        with torch.no_grad():
            x = self.student.start_std() * noise.normal(D.shape, "start")
            x = use(D, x, cond, noise=noise.fold("sampler"))
            shown = _finite(self.student.decode(x, use.end).float()).clamp(-1, 1)
            score = self.oracle(shown, cond)
        if score.shape != (len(x),) or not bool(score.isfinite().all()):
            raise InputError(
                f"an oracle returns one finite score for each of {len(x)} pictures, got {tuple(score.shape)}"
            )
        return x, shown, score.double()

    def _teacher(self, D: Denoiser, x: Tensor, noise: Noise, cond: Cond) -> Tensor:
        """The pictures of the teacher, refined from the student's results ``x`` or made anew."""
        if self.mode == "regenerate":
            use = self.teacher.sampler
            start = self.teacher.start_std(use) * noise.normal(D.shape, "start")
            x = use(D, start, cond, noise=noise.fold("sampler"))
        else:
            assert self.refiner is not None
            use, end = self.refiner, self.student.sampler.end
            added = math.sqrt(max(0.0, (use.start - end) * (use.start + end)))
            x = x + added * noise.normal(D.shape, "refine", dtype=x.dtype)
            x = use(D, x, cond, noise=noise.fold("refiner"))
        return _finite(self.teacher.decode(x, use.end).float()).clamp(-1, 1)


@dataclass(frozen=True)
class _Counted:
    denoiser: Denoiser
    calls: CountingDenoiser


def counted(generator: Generator) -> _Counted:
    """The denoiser of a generator whose network's evaluations are counted, below guidance and other wrappers."""
    D = generator.denoiser
    calls = CountingDenoiser(D.inner if isinstance(D, Wrapper) else D)
    return _Counted(rewrapped(D, calls), calls)


def ending(sampler: Sampler, rollback: float) -> Tableau:
    """The last rows of a table, the share ``rollback`` of them to within one, where no row looks back over the cut.

    Raises:
        InputError: a share outside (0, 1], no table, or one that looks back over such cuts, as multistep solvers do.
    """
    if not 0 < rollback <= 1:
        raise InputError(f"the rollback is the share of the teacher's sampler that is run again, in (0, 1]: {rollback}")
    name = getattr(sampler, "name", type(sampler).__name__)
    if isinstance(sampler, Tableau):
        wanted = sampler.rows - max(1, int(sampler.rows * rollback))
        # Row 0 is no cut: it would be the whole sampler, which only rollback 1 asks for.
        places = [k for k in (wanted, wanted + 1, wanted - 1) if min(1, wanted) <= k < sampler.rows]
        for k in places:
            try:
                return sampler[k:]
            except InputError:
                continue
    raise InputError(
        f"the teacher's sampler {name!r} cannot start in its middle, because its rows look back at earlier ones: give "
        "the teacher a single-step sampler such as heun, pass a refiner, or use mode 'regenerate'"
    )


def label_oracle(classifier: Classifier) -> Oracle:
    """The log-probability of the label, or of the likeliest class where a picture has none.

    Raises:
        InputError: when called, for pictures with several digits, whose label the classifier does not know.
    """
    likeliest = confidence_oracle(classifier)

    def score(pictures: Tensor, cond: Cond) -> Tensor:
        label = cond.get("label")
        if label is None:
            return likeliest(pictures, cond)
        logs = classifier.classify(pictures)
        if logs.ndim != 2:
            raise InputError(f"oracle 'label' knows no labels of {classifier.name}: use 'confidence'")
        own = logs.gather(1, label.to(logs.device).clamp(min=0)[:, None])[:, 0]
        return torch.where(label.to(logs.device) < 0, logs.amax(1), own)

    return score


def confidence_oracle(classifier: Classifier) -> Oracle:
    """The log-probability of the likeliest class, its mean over the channels where every channel is a digit."""
    return lambda pictures, cond: classifier.classify(pictures).amax(-1).reshape(len(pictures), -1).mean(1)


ORACLES: dict[str, Callable[[Classifier], Oracle]] = {"label": label_oracle, "confidence": confidence_oracle}


def oracle_of(name: str, shape: tuple[int, ...]) -> Oracle:
    """The packaged oracle ``name`` (label or confidence) for pictures of ``shape``; any function may stand in.

    Raises:
        InputError: an unknown name, or pictures that the packaged classifier cannot read.
    """
    if name not in ORACLES:
        raise unknown("oracle", name, ORACLES)
    kinds: dict[tuple[int, ...], int] = {(1, 8, 8): 1, (3, 8, 8): 3}
    channels = kinds.get(tuple(shape))
    if channels is None:
        raise InputError(
            f"oracle {name!r} reads digits, {' or '.join(map(str, kinds))}, and these pictures are {tuple(shape)}: "
            "pass a function of your own, such as a reward model"
        )
    return ORACLES[name](digits_extractor(channels=channels))


def _positive(what: str, value: Any) -> int:
    if whole(what, value) < 1:
        raise InputError(f"{what} must be at least 1, got {value}")
    return int(value)


def _finite(pictures: Tensor) -> Tensor:
    if not bool(pictures.isfinite().all()):
        raise InputError("a picture of the collaboration is not finite: look at student and teacher by themselves")
    return pictures
