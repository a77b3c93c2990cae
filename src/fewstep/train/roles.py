"""Which roles of a method train LoRA layers on the teacher's weights, and which train copies of their own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from torch import nn

from fewstep.core.denoiser import rewrapped
from fewstep.core.generator import Generator
from fewstep.core.role import Method, Role
from fewstep.errors import InputError, unknown
from fewstep.models.frozen import network_under
from fewstep.models.lora import Adapted, LoRA, share


def roles_of(
    method: Method, start: Generator, lora: LoRA | None = None, names: Sequence[str] | None = None
) -> dict[str, Role]:
    """The method's roles; with ``lora``, those that copy the teacher become adapters on its weights.

    ``names`` lists the roles that do; None is every trained one that is a copy of the teacher. Roles that are not
    listed train full copies.

    Raises:
        InputError: names without ``lora``, unknown or frozen roles, or a teacher that LoRA cannot adapt. A listed role
            that is no copy of the teacher is refused when it starts.
    """
    if lora is None:
        if names is not None:
            raise InputError(f"lora_roles {list(names)} need lora: pass LoRA(rank=...), or --lora RANK")
        return method.roles(start)
    full = method.roles(start)
    trained = [name for name, role in full.items() if role.optim is not None]
    for name in names or ():
        if name not in trained:
            raise unknown("role for LoRA", name, trained)
    if names is not None and not names:
        raise InputError(f"lora_roles are empty: name some of {', '.join(trained)}, or leave lora out")
    backbone = rewrapped(start.denoiser, share(network_under(start.denoiser), lora))
    shared = method.roles(replace(start, denoiser=backbone))
    out = {name: shared[name] if names is None or name in names else role for name, role in full.items()}
    # The teacher must be the backbone itself, or its weights would stand in memory twice.
    out |= {name: shared[name] for name, role in full.items() if role.optim is None}
    for name in names or ():
        out[name] = replace(out[name], start=_checked(name, out[name].start))
    return out


def _checked(name: str, start: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def made() -> nn.Module:
        network = start()
        if not isinstance(network, Adapted):
            raise InputError(f"role {name!r} is no copy of the teacher: leave it out of the LoRA roles")
        return network

    return made
