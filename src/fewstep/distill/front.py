"""The front door of distillation, and the table of its methods."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fewstep.core.fit import Data
from fewstep.core.generator import Generator
from fewstep.core.options import Budget
from fewstep.core.role import Method
from fewstep.data.conditions import ConditionsOnly
from fewstep.distill.consistency import CD
from fewstep.distill.consistency_training import CT, ECT
from fewstep.distill.progressive import Progressive
from fewstep.distill.sfd import SFD
from fewstep.distill.sid import SiD
from fewstep.errors import InputError
from fewstep.train.run import train

METHODS: dict[str, type[Any]] = {"progressive": Progressive, "cd": CD, "ct": CT, "ect": ECT, "sfd": SFD, "sid": SiD}


def distill(
    teacher: Generator,
    method: Method,
    data: Data | None = None,
    *,
    out: str | Path,
    budget: str | int | Budget,
    **options: Any,
) -> Generator:
    """Distils ``teacher`` with ``method`` and returns the student, which ``out`` then holds.

    ``options`` are those of :func:`fewstep.train.run.train`: seed, batch, micro, bf16, device, resume, overwrite,
    lora, lora_roles, checkpointing, offload ...

    Raises:
        InputError: data missing where the method learns from data, or given where it learns from none.
        NonFiniteError: training diverged.
    """
    name = type(method).__name__
    if method.needs_data and data is None:
        raise InputError(f"{name} learns from data and got none: pass data, e.g. --data digits")
    if not method.needs_data and data is not None:
        raise InputError(f"{name} is data-free and would ignore the data: leave it out")
    run: Any = getattr(method, "run", None)
    if run is not None:
        # A method of several stages trains each of them itself.
        student: Generator = run(teacher, data, out=out, budget=budget, **options)
        return student
    source = ConditionsOnly(teacher.conds) if data is None else data
    return train(teacher, method, source, out=out, budget=budget, **options)
