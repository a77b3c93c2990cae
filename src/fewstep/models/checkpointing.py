"""Gradient checkpointing (arXiv 1604.06174): a block keeps its input and runs again when its gradient is asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from fewstep.errors import InputError


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The blocks of a network of ours: the outermost modules in its lists, unless a diffusers network is in there."""
    found: list[nn.Module] = []

    def look(module: nn.Module) -> None:
        for child in module.children():
            if isinstance(child, nn.ModuleList | nn.ModuleDict):
                found.extend(child.children())
            elif not _is_stock(child):
                look(child)

    if not _is_stock(network):
        look(network)
    return found


def _is_stock(module: nn.Module) -> bool:
    """Whether it is a network of diffusers, which knows how to checkpoint itself."""
    return callable(getattr(module, "enable_gradient_checkpointing", None))


@contextlib.contextmanager
def checkpointed(networks: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, every block of these networks is checkpointed wherever gradients are recorded.

    Networks of diffusers do it themselves; of ours, everything in a list of modules is a block. Frozen networks belong
    in here too, because losses send gradients through them to their input. Gradients are the same; each block costs one
    forward pass more.

    Raises:
        InputError: none of the networks has blocks, or a diffusers class cannot checkpoint.
    """
    undo: list[Callable[[], Any]] = []
    given = list(networks)
    try:
        for network in given:
            undo += _switch_on(network)
        if given and not undo:
            names = ", ".join(sorted({type(n).__name__ for n in given}))
            raise InputError(f"nothing to checkpoint: {names} has no lists of blocks: leave checkpointing off")
        yield
    finally:
        for back in reversed(undo):
            back()


def _switch_on(network: nn.Module) -> list[Callable[[], Any]]:
    undo: list[Callable[[], Any]] = []
    stock: list[Any] = [m for m in network.modules() if _is_stock(m)]
    for model in stock:
        if getattr(model, "is_gradient_checkpointing", False):
            continue
        try:
            model.enable_gradient_checkpointing(_stock_checkpoint)
        except ValueError as error:
            raise InputError(f"{type(model).__name__} cannot checkpoint: {error}: leave checkpointing off") from None
        undo.append(model.disable_gradient_checkpointing)
    for block in blocks_of(network):
        own = block.__dict__.get("forward")
        block.forward = _wrapped(block.forward)
        undo.append(lambda block=block, own=own: _put_back(block, own))  # type: ignore[misc]
    return undo


def _stock_checkpoint(module: Any, *args: Any) -> Any:
    # The forward of some networks passes a block, of others a bound function; both are called the same way.
    return checkpoint(module, *args, use_reentrant=False)


def _wrapped(forward: Callable[..., Any]) -> Callable[..., Any]:
    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    return run


def _put_back(block: nn.Module, own: Any) -> None:
    if own is None:
        del block.forward
    else:
        block.forward = own
