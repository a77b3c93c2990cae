"""From a description in a file to a network: names in a table, nothing imported or executed from the file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any, TypeVar

from torch import nn

from fewstep.errors import InputError, unknown

N = TypeVar("N", bound=type[nn.Module])
NETWORKS: dict[str, tuple[type[nn.Module], type]] = {}


def network(kind: str, config: type) -> Callable[[N], N]:
    """Class decorator: ``build_network({"kind": kind, **fields})`` makes ``cls(config(**fields))``."""

    def add(cls: N) -> N:
        NETWORKS[kind] = (cls, config)
        return cls

    return add


def describe_network(net: nn.Module) -> dict[str, Any]:
    """JSON-able: what :func:`build_network` makes this network from, with fresh weights.

    Raises:
        InputError: a network that is not in the table.
    """
    for kind, (cls, _) in NETWORKS.items():
        if type(net) is cls:
            return {"kind": kind, **asdict(net.config)}  # type: ignore[call-overload]
    raise InputError(f"{type(net).__name__} cannot be saved: only {', '.join(sorted(NETWORKS))} have a description")


def build_network(description: Mapping[str, Any]) -> nn.Module:
    """The described network with fresh weights.

    Raises:
        InputError: an unknown kind, or fields it does not have.
    """
    fields = {k: tuple(v) if isinstance(v, list) else v for k, v in description.items()}
    kind = str(fields.pop("kind", None))
    if kind not in NETWORKS:
        raise unknown("network", kind, NETWORKS)
    cls, config = NETWORKS[kind]
    try:
        return cls(config(**fields))
    except (TypeError, ZeroDivisionError) as error:
        raise InputError(f"network {kind!r} cannot be built from {fields}: {error}") from None
