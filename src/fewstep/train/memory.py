"""What a run will need of memory, told before it starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

from fewstep.core.denoiser import Precond, rewrapped
from fewstep.core.fit import Data
from fewstep.core.generator import Generator
from fewstep.core.memory import MemoryEstimate, estimate, hollow
from fewstep.core.options import FitOptions
from fewstep.core.role import Method
from fewstep.errors import InputError
from fewstep.models.checkpointing import checkpointed
from fewstep.models.frozen import network_under
from fewstep.models.lora import LoRA
from fewstep.train.roles import roles_of
from fewstep.train.run import offload_of


def estimate_memory(
    method: Method,
    teacher: Generator,
    data: Data | None = None,
    options: FitOptions | None = None,
    *,
    lora: LoRA | None = None,
    lora_roles: Sequence[str] | None = None,
) -> MemoryEstimate:
    """Bytes that one process of :func:`fewstep.distill.distill` needs with these arguments, without spending them.

    Weights, optimizers and averages are exact; activations come from one step of the method on tensors without
    contents. Nothing is written, and the teacher is left as it is. ``data`` None is for methods that need none.

    Raises:
        InputError: a method that reads values of tensors, offloading that would move nothing, or what
            :func:`fewstep.train.roles.roles_of` refuses.
    """
    from fewstep.data.conditions import ConditionsOnly

    if method.needs_data and data is None:
        raise InputError(f"{type(method).__name__} learns from data and got none: pass data, e.g. --data digits")
    chosen = options or FitOptions()
    # Refused as the run would refuse it, before anything is spent.
    offload_of(chosen, lora)
    empty: Any = rewrapped(teacher.denoiser, cast(Precond, hollow(network_under(teacher.denoiser))))
    roles = roles_of(method, replace(teacher, denoiser=empty), lora, lora_roles)
    source = ConditionsOnly(teacher.conds) if data is None else data
    return estimate(method, roles, source, chosen, around=checkpointed if chosen.checkpointing else None)
