"""How much memory a run needs, before it: one real step on tensors that have sizes and no contents."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fewstep.core import distributed
from fewstep.core.cond import Batch
from fewstep.core.fit import Data, _Loop
from fewstep.core.options import FitOptions
from fewstep.core.role import Method, Models, Role
from fewstep.errors import InputError

# Smaller tensors are computed for real: tables and weights of samplers, which methods read numbers from.
SMALL = 4096


@dataclass(frozen=True)
class RoleMemory:
    """Bytes that one role keeps.

    Attributes:
        weights: of its parameters and buffers; those it shares with a role before it count there.
        gradients: at their most, in the role's own update.
        optimizer: both moments of Adam.
        ema: of the running averages.
    """

    weights: int
    gradients: int
    optimizer: int
    ema: int


@dataclass(frozen=True)
class MemoryEstimate:
    """What one process needs at the worst moment of a step, in bytes.

    Attributes:
        roles: by name.
        activations: what is held beside the roles at that moment: what backward passes keep, copies in bfloat16,
            noise, data, and what an operation needs while it runs and torch allocates.
        gradients: of the role that is being updated then, as far as they are there.
        total: weights, optimizers, averages, activations and gradients. Not in it: the context of an accelerator's
            driver, workspaces of its kernels, and what its allocator holds back, such as fragments.
        offloaded: weights of frozen roles that stay in host memory; they are not in the total.
    """

    roles: dict[str, RoleMemory]
    activations: int
    gradients: int
    total: int
    offloaded: int = 0

    def table(self) -> Any:
        """A table for rich to print."""
        from rich.table import Table

        made = Table("role", *("weights", "gradients", "optimizer", "EMA"), title="Memory of one process")
        for column in made.columns[1:]:
            column.justify = "right"
        for name, role in self.roles.items():
            made.add_row(name, *(human(n) for n in (role.weights, role.gradients, role.optimizer, role.ema)))
        made.add_section()
        if self.offloaded:
            made.add_row("in host memory instead", human(self.offloaded))
        made.add_row("activations and gradients at the peak", human(self.activations + self.gradients))
        made.add_row("total at the peak", human(self.total))
        return made


def human(count: int) -> str:
    """Bytes in binary units: ``"1.50 GiB"``."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.2f} {unit}"
    return f"{count} B"


class Live(TorchDispatchMode):
    """Counts the bytes of tensors that are alive: now, and at most.

    With ``fake`` large new tensors are made without contents. A storage counts once, however many tensors view it.
    """

    def __init__(self, fake: FakeTensorMode | None = None) -> None:
        super().__init__()
        self.fake = fake
        self.now = self.peak = self.gradients_at_peak = self._gradients = 0
        self._known: dict[int, bool] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Runs the operation and counts what it made."""
        kwargs = kwargs or {}
        if self.fake is not None and _is_large_factory(func, args):
            with self.fake:
                out = func(*args, **kwargs)
        else:
            out = func(*args, **kwargs)
        self.add(t for t in tree_leaves(out) if isinstance(t, Tensor))
        return out

    def add(self, tensors: Iterable[Tensor], *, gradients: bool = False) -> None:
        """Counts tensors from here on; as ``gradients`` they are told apart."""
        for t in tensors:
            storage = t.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key in self._known:
                if gradients and not self._known[key]:
                    self._known[key] = True
                    self._gradients += size
                continue
            self._known[key] = gradients
            self.now += size
            self._gradients += size * gradients
            weakref.finalize(storage, self._forget, key, size)
        if self.now > self.peak:
            self.peak, self.gradients_at_peak = self.now, self._gradients

    def _forget(self, key: int, size: int) -> None:
        if key in self._known:
            self.now -= size
            self._gradients -= size * self._known.pop(key)

    def restart(self) -> None:
        """The peak from here on."""
        self.peak, self.gradients_at_peak = self.now, self._gradients


def _is_large_factory(func: Any, args: Any) -> bool:
    """Whether an operation would fill a large tensor from no tensor: sizes and ends are its arguments."""
    # Looked at one by one first: this runs before every operation.
    if any(isinstance(a, Tensor) for a in args) or any(isinstance(a, Tensor) for a in tree_leaves(args)):
        return False
    name = func._schema.name.removeprefix("aten::")
    numbers = [a for a in tree_leaves(args) if isinstance(a, int | float) and not isinstance(a, bool)]
    if name == "arange":
        return bool(numbers) and max(abs(n) for n in numbers) >= SMALL
    size = args[0] if args and isinstance(args[0], list | tuple) else []
    count = 1
    for n in size:
        count *= int(n)
    return bool(size) and count >= SMALL


class _DryLoop(_Loop):
    """The training loop without what reads values."""

    def note(self, name: str, bad: Tensor, i: int, loss: Tensor) -> None:
        """Nothing is counted: there are no values to be finite."""


def hollow(module: nn.Module) -> nn.Module:
    """A copy of the module tree whose tensors are on the meta device: it has shapes and no memory."""
    memo: dict[int, Any] = {}
    for t in [*module.parameters(), *module.buffers()]:
        if isinstance(t, nn.Parameter):
            memo[id(t)] = nn.Parameter(t.detach().to("meta"), requires_grad=t.requires_grad)
        elif t.numel() >= SMALL:
            memo[id(t)] = t.to("meta")
    return copy.deepcopy(module, memo)


def estimate(
    method: Method,
    roles: Mapping[str, Role],
    data: Data,
    options: FitOptions,
    *,
    around: Callable[[Iterable[nn.Module]], AbstractContextManager[Any]] | None = None,
) -> MemoryEstimate:
    """What one process of a run needs.

    ``roles`` start as :func:`hollow` networks or as copies of such; ``around`` is what training would enter with its
    networks, such as checkpointing. The optimizers are filled, and one step is counted. It runs as on a CPU, whatever
    ``options.device`` is; a tensor has the same size elsewhere, but kernels may want other workspaces.

    Raises:
        InputError: the method reads values of tensors, which are not there.
    """
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    offload = options.offload
    with torch.random.fork_rng(devices=[]):
        networks = {name: role.start().eval() for name, role in roles.items()}
    averages = {key: copy.deepcopy(networks[name]) for name, role in roles.items() for key in role.averages(name)}
    memo: dict[int, Tensor] = {}
    for module in [*networks.values(), *averages.values()]:
        _fill(module, fake, memo)
        module.requires_grad_(False)
    models = Models(roles, networks, averages)
    dry = replace(options, device="cpu", offload=False)
    loop, live = _DryLoop(method, models, data, dry, None), Live(fake)
    away = {n for n, role in roles.items() if role.optim is None} if offload else set()
    counted = _weights(networks)
    live.add(t for n, m in networks.items() if n not in away for t in _all(m))
    live.add(t for m in averages.values() for t in _all(m))
    hooks = [
        p.register_post_accumulate_grad_hook(lambda p: live.add([p.grad], gradients=True))
        for name in loop.optimizers
        for p in _opened(networks[name])
    ]
    try:
        with ExitStack() as stack:
            stack.enter_context(nullcontext() if around is None else around(networks.values()))
            stack.enter_context(live)
            _start(loop.optimizers.values())
            live.restart()
            loop.advance(0, 0.0, _parts(data, options, fake))
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        raise InputError(
            f"{type(method).__name__} reads values of tensors ({error}), so its memory can only be measured by a run"
        ) from None
    finally:
        for hook in hooks:
            hook.remove()
    found, kept = {}, 0
    for name, network in networks.items():
        size = sum(p.numel() * p.element_size() for p in network.parameters())
        optimizer, own = loop.optimizers.get(name), [averages[key] for key in roles[name].averages(name)]
        moments = 0 if optimizer is None else _moments(optimizer)
        ema = sum(t.numel() * t.element_size() for average in own for t in _visible(average))
        found[name] = RoleMemory(counted[name], 0 if optimizer is None else size, moments, ema)
        kept += (0 if name in away else counted[name]) + moments + ema
    activations = live.peak - kept - live.gradients_at_peak
    return MemoryEstimate(
        found, activations, live.gradients_at_peak, live.peak, sum(counted[name] for name in sorted(away))
    )


def _start(optimizers: Iterable[torch.optim.Optimizer]) -> None:
    """Makes the moments: they are there from the first step on, and so in the peak of all but that."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                p.grad = torch.zeros_like(p)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def _all(module: nn.Module) -> list[Tensor]:
    """Every tensor of the tree, whatever the module says of itself."""
    return [t for m in module.modules() for t in (*m._parameters.values(), *m._buffers.values()) if t is not None]


def _visible(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _opened(module: nn.Module) -> list[nn.Parameter]:
    """The parameters, in a state where hooks on their gradients can be set."""
    module.requires_grad_(True)
    return list(module.parameters())


def _weights(networks: Mapping[str, nn.Module]) -> dict[str, int]:
    """Bytes of every network's tensors; a tensor counts where it is met first."""
    seen: set[int] = set()
    out = {}
    for name, network in networks.items():
        new = {id(t): t for t in _all(network) if id(t) not in seen}
        seen |= new.keys()
        out[name] = sum(t.numel() * t.element_size() for t in new.values())
    return out


def _moments(optimizer: torch.optim.Optimizer) -> int:
    return sum(
        t.numel() * t.element_size()
        for state in optimizer.state.values()
        for t in state.values()
        if isinstance(t, Tensor)
    )


def _fill(module: nn.Module, fake: FakeTensorMode, memo: dict[int, Tensor]) -> None:
    """Puts fake tensors in place of all parameters, and of the buffers that have no contents."""

    def hold(t: Tensor) -> Tensor:
        if id(t) not in memo:
            with fake:
                made = torch.empty(t.shape, dtype=t.dtype, device="cpu")
            held = nn.Parameter(made, requires_grad=False) if isinstance(t, nn.Parameter) else made
            # What is held is met again where two roles share a module. The original stays alive, so that its number is
            # not given to another.
            memo[id(t)] = memo[id(held)] = held
            memo[-id(t)] = t
        return memo[id(t)]

    for m in module.modules():
        for name, p in m._parameters.items():
            if p is not None:
                m._parameters[name] = hold(p)  # type: ignore[assignment]
        for name, b in m._buffers.items():
            if b is not None and b.is_meta:
                m._buffers[name] = hold(b)


def _parts(data: Data, options: FitOptions, fake: FakeTensorMode) -> list[tuple[Batch, Tensor]]:
    """Micro-batches with the shapes of the data's, made of one example."""
    count = options.batch // (options.micro * distributed.world())
    one = data.take(torch.zeros(1, dtype=torch.int64))

    def many(t: Tensor) -> Tensor:
        if t.numel() * count < SMALL:
            return t.expand(count, *t.shape[1:]).clone()
        with fake:
            return torch.empty(count, *t.shape[1:], dtype=t.dtype)

    made = []
    for part in range(options.micro):
        x, noise = (None if t is None else many(t) for t in (one.x, one.noise))
        batch = Batch(x, {k: many(v) for k, v in one.cond.items()}, noise)
        made.append((batch, torch.arange(part * count, (part + 1) * count)))
    return made
