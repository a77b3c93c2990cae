"""The passes of networks within a step: recorded with what was differentiated, and made again by themselves."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

from fewstep.core.denoiser import Precond
from fewstep.core.memory import Live
from fewstep.loss.tangent import directional


@dataclass
class Call:
    """One recorded pass of a network.

    Attributes:
        module: that was called.
        name: its method, forward or features.
        leaves: its inputs, flat and detached.
        form: what the leaves were.
        inputs: which of them had a gradient.
        weights: whether its weights had one.
        tangents: of the inputs, where the pass carried forward-mode derivatives.
        gradients: that came back, by the place of the output.
    """

    module: nn.Module
    name: str
    leaves: list[Any]
    form: Any
    inputs: tuple[int, ...]
    weights: bool
    tangents: dict[int, Tensor]
    gradients: dict[int, Tensor] = field(default_factory=dict)

    @property
    def kind(self) -> str:
        """F, F+B to the weights, the input or both, or JVP."""
        if self.tangents:
            return "JVP"
        if not self.gradients:
            return "F"
        return "F+B" + ("(weights)" if self.weights else "") + ("(input)" if self.inputs else "")

    def run(self, leaves: list[Any]) -> list[Any]:
        """The pass on other leaves; its outputs, flat."""
        args, kwargs = tree_unflatten(leaves, self.form)
        return tree_leaves(getattr(self.module, self.name)(*args, **kwargs))

    def opened(self) -> list[Any]:
        """The leaves as they are, those that had a gradient ready for one."""
        return [a.clone().requires_grad_() if i in self.inputs else a for i, a in enumerate(self.leaves)]


@contextmanager
def recording(calls: list[Call], others: list[nn.Module]) -> Iterator[None]:
    """Collects the outermost passes of every denoiser, and of the kinds of ``others``, in order."""
    depth = 0
    places = [(Precond, name) for name in ("forward", "features", "activations")]
    places += [(kind, "forward") for kind in {type(m) for m in others}]
    originals: list[tuple[type, str, Callable[..., Any]]] = [(k, n, getattr(k, n)) for k, n in places]

    def wrap(original: Callable[..., Any], name: str) -> Callable[..., Any]:
        def passes(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
            nonlocal depth
            if depth:
                return original(self, *args, **kwargs)
            call, depth = call_of(self, name, args, kwargs), depth + 1
            try:
                made = original(self, *args, **kwargs)
            finally:
                depth -= 1
            calls.append(call)
            for i, out in enumerate(tree_leaves(made)):
                if isinstance(out, Tensor) and out.requires_grad and not call.tangents:
                    out.register_hook(lambda g, i=i: call.gradients.__setitem__(i, g.detach().clone()))
            return made

        return passes

    for kind, name, original in originals:
        setattr(kind, name, wrap(original, name))
    try:
        yield
    finally:
        for kind, name, original in originals:
            setattr(kind, name, original)


def call_of(module: nn.Module, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Call:
    """What is known of a pass before it: the inputs as plain tensors, and what of them is differentiated."""
    leaves, form = tree_flatten((args, kwargs))
    tangents: dict[int, Tensor] = {}
    plain: list[Any] = []
    inputs: list[int] = []
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor):
            plain.append(leaf)
            continue
        value, dual = unwrapped(leaf)
        plain.append(value)
        if dual and value.is_floating_point():
            tangents[i] = torch.ones_like(value)
        elif leaf.requires_grad and torch.is_grad_enabled():
            inputs.append(i)
    weights = torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters())
    return Call(module, name, plain, form, tuple(inputs), weights, tangents)


def unwrapped(x: Tensor) -> tuple[Tensor, bool]:
    """The numbers of a tensor within forward-mode differentiation of either kind, and whether it is within one."""
    dual = False
    while torch._C._functorch.is_functorch_wrapped_tensor(x):
        x, dual = torch._C._functorch.get_unwrapped(x), True
    if forward_ad._current_level >= 0:
        value, tangent = forward_ad.unpack_dual(x)
        x, dual = value, dual or tangent is not None
    return x.detach().clone(), dual


def replay(call: Call) -> None:
    """The bare pass: what the equations need of the network, and nothing else."""
    if call.tangents:
        places = tuple(call.tangents)

        def of(*moved: Tensor) -> Tensor:
            leaves = list(call.leaves)
            for i, value in zip(places, moved, strict=True):
                leaves[i] = value
            return next(out for out in call.run(leaves) if isinstance(out, Tensor))

        directional(of, [call.leaves[i] for i in places], list(call.tangents.values()))
        return
    if not call.gradients:
        with torch.no_grad():
            call.run(call.leaves)
        return
    call.module.requires_grad_(call.weights)
    outs = call.run(call.opened())
    torch.autograd.backward([outs[i] for i in call.gradients], list(call.gradients.values()))
    for p in call.module.parameters():
        p.grad = None
    call.module.requires_grad_(False)


def activations(call: Call) -> int:
    """Bytes of a pass at their most: what it keeps for its backward pass and what it needs while it runs."""
    call.module.requires_grad_(call.weights)
    live, leaves = Live(), call.opened()
    live.add(call.module.parameters())
    live.add(a for a in leaves if isinstance(a, Tensor))
    before = live.now
    with live:
        call.run(leaves)
    call.module.requires_grad_(False)
    return live.peak - before
