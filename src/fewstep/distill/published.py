"""What the papers trained with, in one place, and how that is carried over to a network and a data set of another size.

A learning rate that suits 55 million parameters is too small for one million, and a budget of 400 million pictures is
no use on 1797 digits. :func:`scaled` and :func:`suggested` do the carrying over; ``PUBLISHED`` holds the papers' own
numbers, one row for each method, and ``SMALL`` what small networks need instead. A new method adds a row; one without a
row keeps its own defaults.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import reduce
from typing import Any, NamedTuple

from fewstep.core.denoiser import Precond, module_of
from fewstep.core.generator import Generator
from fewstep.errors import InputError

# Above this Adam is unstable on the networks that anybody distils, however small: see :func:`scaled`.
HIGHEST = 1e-3
CIFAR10, IMAGENET = 50_000, 1_281_167


@dataclass(frozen=True)
class Published:
    """One published training.

    Attributes:
        lr: peak learning rate, by the field of the method that holds the optimizer.
        parameters: of the published student.
        batch: pictures per iteration; None where no source says.
        iterations: of the training; of all stages together where there are several; None where no source says.
        source: where the numbers stand: paper, table or configuration.
        data: pictures in the training set; None for a method that uses none.
        lora: whether LoRA layers were trained; their rates are no guide for whole networks, and are not carried over.
    """

    lr: Mapping[str, float]
    parameters: float
    batch: int | None
    iterations: int | None
    source: str
    data: int | None = CIFAR10
    lora: bool = False

    @property
    def images(self) -> int | None:
        """Pictures that the published training saw; None where no source says."""
        return None if self.batch is None or self.iterations is None else self.batch * self.iterations


PUBLISHED: dict[str, Published] = {
    # 8192 to 1 steps: 11 stages of 50k iterations and two of 100k. The network counts about 60 M parameters.
    "progressive": Published({"optim": 1e-4}, 60e6, 128, 750_000, "arXiv 2202.00512, CIFAR-10"),
    "cd": Published({"optim": 4e-4}, 56e6, 512, 800_000, "arXiv 2303.01469, table 3, CIFAR-10"),
    "ct": Published({"optim": 1e-4}, 56e6, 1024, 400_000, "arXiv 2310.14189, CIFAR-10"),
    "ect": Published({"optim": 1e-4}, 55.7e6, 128, 200_000, "arXiv 2406.14548, run_ecm.sh, CIFAR-10"),
    "sfd": Published({"optim": 5e-5}, 55.7e6, 128, 1_563, "arXiv 2409.19681, CIFAR-10, 200k trajectories", None),
    "sfd-v": Published({"optim": 5e-5}, 55.7e6, 128, 6_250, "arXiv 2409.19681, CIFAR-10, 800k trajectories", None),
    "sfd-one": Published(
        {"first_optim": 5e-5, "optim": 5e-4}, 55.7e6, 128, 17_188, "arXiv 2409.19681, CIFAR-10, both stages", None
    ),
    # Released commands for ImageNet-64; the network is EDM's ADM.
    "ctm": Published({"optim": 4e-4}, 296e6, 1440, None, "arXiv 2310.02279, released commands, ImageNet-64", IMAGENET),
    "scm": Published({"optim": 1e-4}, 55.7e6, 512, 400_000, "arXiv 2410.11081, CIFAR-10"),
    "mean-flow": Published({"optim": 6e-4}, 55e6, 1024, 800_000, "arXiv 2505.13447, CIFAR-10"),
    "tdd": Published({"optim": 1e-6}, 2.6e9, 512, 100_000, "arXiv 2409.01347, rank 64 on SDXL", None, True),
    "icd": Published(
        {"optim": 8e-6, "encoder": 8e-6}, 860e6, 512, 6_000, "arXiv 2406.14539, rank 64 on SD 1.5", None, True
    ),
    "get": Published({"optim": 1e-4}, 8.6e6, 128, 800_000, "arXiv 2401.08639, CIFAR-10, the smallest", None),
    "reflow": Published({"optim": 2e-4}, 60e6, 128, None, "arXiv 2209.03003, released code, CIFAR-10", None),
    "slimflow": Published({"optim": 2e-4}, 15.7e6, 128, None, "arXiv 2407.12718, released configurations", None),
    "scflow": Published({"optim": 2e-5, "critic": 1e-4}, 128e6, 32, None, "arXiv 2412.16906, CelebA", None),
    "sana-sprint": Published({"optim": 2e-6, "heads": 2e-6}, 0.6e9, 512, 20_000, "SANA-Sprint's configuration", None),
    "flash-diffusion": Published(
        {"optim": 1e-5, "critic": 1e-5}, 860e6, 4, 20_000, "arXiv 2406.02347, SD 1.5", None, True
    ),
    "codi": Published({"optim": 8e-6}, 361e6, None, 200_000, "arXiv 2310.01407, released code", None),
    "dmd2": Published({"student": 2e-6, "fake": 2e-6}, 296e6, 280, 200_000, "arXiv 2405.14867, ImageNet-64", IMAGENET),
    "f-distill": Published(
        {"student": 2e-6, "fake": 2e-6}, 296e6, 512, 600_000, "arXiv 2502.15681, ImageNet-64", IMAGENET
    ),
    # Of ResShift's network.
    "tad-sr": Published({"student": 5e-5}, 118.6e6, 64, 30_000, "TAD-SR's released configuration", None),
    # Its fake score is LoRA of rank 64, at 1e-3.
    "swiftbrush": Published({"student": 1e-6}, 866e6, None, None, "arXiv 2312.05239, SD 2.1", None),
    "sida": Published(
        {"student": 1e-5, "fake": 1e-5}, 55.7e6, 256, 1_171_875, "arXiv 2410.14919, CIFAR-10, 300M pictures", CIFAR10
    ),
    "disback": Published(
        {"student": 5e-7, "fake": 5e-7, "degrade": 5e-7}, 2.6e9, None, 93_000, "arXiv 2408.15991, SDXL scripts", None
    ),
    "sid": Published(
        {"student": 1e-5, "fake": 1e-5}, 55.7e6, 256, 1_953_125, "arXiv 2404.04057, CIFAR-10, 500M pictures", None
    ),
}


# Below this many parameters SMALL holds; it was found at 0.4 to 2.7 million.
SMALL_BELOW = 10e6
# Two players of a million parameters, in runs of hundreds of updates: the published rates and five updates of the fake
# score for each of the student leave it where it began (digits, U-Net, 333 iterations: FD 3.7 in one step, against .28
# with these). Without momentum the two do not overshoot.
_GAME: dict[str, Any] = {
    "ratio": 1,
    **{f"{role}.{key}": value for role in ("student", "fake") for key, value in
       (("lr", 3e-4), ("betas", (0.0, 0.999)), ("weight_decay", 0.0), ("clip", 10.0))},
}  # fmt: skip
SMALL: dict[str, Mapping[str, Any]] = {
    **dict.fromkeys(("vsd", "swiftbrush", "snoopi", "sdxs", "dmd", "dmd2", "f-distill", "disback", "emd"), _GAME),
    "msd": {f"inner.{path}": value for path, value in _GAME.items()},
}


def name_of(method: Any) -> str | None:
    """The name on the command line of a method; None for one that has none."""
    # Not at the top, because a list of methods needs all their files.
    from fewstep.distill.front import METHODS

    return next((name for name, kind in METHODS.items() if kind is type(method)), None)


def parameters_of(teacher: Generator) -> int:
    """How many numbers the teacher's network trains.

    Raises:
        InputError: a denoiser without a network.
    """
    module = module_of(teacher.denoiser)
    if not isinstance(module, Precond):
        raise InputError(f"{type(teacher.denoiser).__name__} has no network, so that its size is not known")
    return sum(p.numel() for p in module.parameters())


def leaves(method: Any) -> dict[str, Any]:
    """The settings of a method by their flags without dashes: ``student.lr`` is the ``lr`` in its ``student``."""
    found: dict[str, Any] = {}
    for f in fields(method):
        value = getattr(method, f.name)
        found |= {f"{f.name}.{k}": v for k, v in leaves(value).items()} if is_dataclass(value) else {f.name: value}
    return found


def changed(method: Any, path: str, value: Any) -> Any:
    """The method with one of its :func:`leaves` changed."""
    head, _, rest = path.partition(".")
    return replace(method, **{head: changed(getattr(method, head), rest, value) if rest else value})


def small(method: Any) -> Any:
    """The method with the settings of ``SMALL``, whatever the network."""
    known, found = leaves(method), SMALL.get(name_of(method) or "", {})
    return reduce(lambda made, path: changed(made, path, found[path]), [p for p in found if p in known], method)


def scaled(method: Any, teacher: Generator, *, fixed: Sequence[str] = (), published: bool = False) -> Any:
    """The method with the published learning rates, carried over to the size of the teacher's network.

    ``lr * sqrt(P_published / P_own)``, at most 1e-3, and for networks below 10 million parameters the settings of
    ``SMALL`` before it. Every such setting is set, but for those in ``fixed`` (by :func:`leaves`, such as
    ``student.lr``); with ``published`` the rates are the paper's own. A method without a row in either, or whose row is
    of LoRA layers, is returned as it is.

    The rule is Adam's: a step moves every weight by about lr, and a layer's output by about lr times its width, which
    is the root of the number of parameters (1 / width for hidden layers, arXiv 2203.03466). The rates that the digits
    benchmarks use, with 0.7 M parameters, are up to 3.4 times the rule's, as their budgets are short: progressive
    distillation 1e-3 (rule 9.3e-4; 3e-4 was worse at 1, 2 and 4 steps, see docs/cards/progressive.md), SFD 1e-3
    (4.5e-4), SiD 3e-4 (8.9e-5). For CD the rule gives 3.6e-3, where 1e-3 was no better than 3e-4 at two and
    four evaluations in short runs: hence the ceiling.

    Raises:
        InputError: a setting in ``fixed`` that the method has not, or a teacher without a network.
    """
    known = leaves(method)
    wrong = [path for path in fixed if path not in known]
    if wrong:
        raise InputError(f"{type(method).__name__} has no setting {wrong[0]!r}, only {', '.join(known)}")
    found: dict[str, Any] = {}
    name = name_of(method) or ""
    row = PUBLISHED.get(name)
    if row is not None and (published or not row.lora):
        factor = 1.0 if published else math.sqrt(row.parameters / parameters_of(teacher))
        found = {f"{k}.lr": lr if published else _rounded(min(HIGHEST, lr * factor)) for k, lr in row.lr.items()}
    if name in SMALL and not published and parameters_of(teacher) < SMALL_BELOW:
        found |= SMALL[name]
    for path, value in found.items():
        if path in known and path not in fixed:
            method = changed(method, path, value)
    return method


def told(before: Any, after: Any, teacher: Generator) -> str | None:
    """One line on what :func:`scaled` set; None where it set nothing."""
    old, new = leaves(before), leaves(after)
    found = {path: value for path, value in new.items() if old[path] != value}
    if not found:
        return None
    row = PUBLISHED.get(name_of(after) or "")
    rates = {f"{name}.lr": lr for name, lr in row.lr.items()} if row else {}
    shown = [
        f"--{path.replace('_', '-')} {_flag(value)}" + (f" (published {rates[path]:g})" if path in rates else "")
        for path, value in found.items()
    ]
    size = f"{parameters_of(teacher) / 1e6:.2g} M parameters"
    size += f", published {row.parameters / 1e6:.3g} M" if row else ""
    return f"settings for {size}: {', '.join(shown)}; give them, or --published, to choose"


def _flag(value: Any) -> str:
    """The value as it is given on the command line."""
    if isinstance(value, tuple):
        return " ".join(map(_flag, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


class Suggestion(NamedTuple):
    """How long a paper's training would be here: pictures, and iterations at the published batch."""

    images: int
    iterations: int


def suggested(name: str, teacher: Generator, examples: int | None = None) -> Suggestion | None:
    """The published budget, carried over to this teacher and to ``examples`` pictures of data; None without a row.

    The smaller of two: the published pictures in proportion to the parameters, and as many passes over the data as the
    paper made. It is an upper estimate: the students of 0.7 M parameters in docs/cards reached their teacher's quality
    with a third to a tenth of it.

    Raises:
        InputError: a teacher without a network, or no examples.
    """
    if examples is not None and examples < 1:
        raise InputError(f"a budget for {examples} pictures of data: expected at least 1")
    row = PUBLISHED.get(name)
    if row is None or row.images is None or row.batch is None:
        return None
    images = row.images * min(1.0, parameters_of(teacher) / row.parameters)
    if examples is not None and row.data is not None:
        images = min(images, row.images * examples / row.data)
    return Suggestion(math.ceil(images), math.ceil(images / row.batch))


def _rounded(rate: float) -> float:
    """Two digits, so that a command with the rate in it can be read and repeats the run."""
    return float(f"{rate:.2g}")
