"""The one training loop: it owns optimizers, freezing, precision, accumulation, averages and saving."""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from typing import Protocol

import torch
from torch import Tensor, nn

from fewstep.core import distributed
from fewstep.core.cond import Batch
from fewstep.core.noise import Noise
from fewstep.core.options import FitOptions, Report
from fewstep.core.role import Method, Models, Role, Update, added, named
from fewstep.core.state import Run, load_parameter_state, load_weights, parameter_state
from fewstep.errors import InputError, NonFiniteError


class Data(Protocol):
    """What the loop needs of data: ``take`` is a pure function of the numbers of the examples."""

    def __len__(self) -> int: ...

    def take(self, ids: Tensor) -> Batch:
        """The examples ``ids`` (B,) int64."""
        ...


def build_models(
    roles: Mapping[str, Role],
    device: str,
    seed: int = 0,
    *,
    offload: Callable[[nn.Module], nn.Module] | None = None,
) -> Models:
    """The networks of a method and their averages, frozen, in eval mode, on the device, the same on every process.

    Roles that start with random weights are a function of ``seed``. A role may be a network that the caller holds, such
    as the teacher: it is used as it is, not copied. ``offload`` takes a frozen network in place of the device; it
    stands outside the exchange between processes, so it must start the same on all of them.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int(Noise.of(seed, 1).fold("roles").seeds))
        networks = {name: role.start() for name, role in roles.items()}
    away = {name for name, role in roles.items() if role.optim is None} if offload is not None else set()
    for name, network in networks.items():
        if offload is not None and name in away:
            networks[name] = offload(network).requires_grad_(False).eval()
        else:
            distributed.broadcast(network.to(device).requires_grad_(False).eval())
    averages = {key: copy.deepcopy(networks[n]) for n, role in roles.items() for key in role.averages(n)}
    return Models(roles, networks, averages)


def example_order(seed: int, step: int, batch: int, size: int) -> Tensor:
    """The numbers of the ``batch`` examples of a step: every epoch is a permutation keyed by (seed, epoch)."""
    places = torch.arange(step * batch, (step + 1) * batch)
    epochs = places // size
    ids = torch.empty_like(places)
    for epoch in epochs.unique().tolist():
        here = epochs == epoch
        ids[here] = _permutation(seed, epoch, size)[places[here] % size]
    return ids


@lru_cache(maxsize=2)
def _permutation(seed: int, epoch: int, size: int) -> Tensor:
    """Kept for a while, because every step of an epoch reads it."""
    return Noise.of(seed, size).bits(1, "order", epoch)[:, 0].argsort()


def fit(
    method: Method, models: Models, data: Data, options: FitOptions, run: Run | None, *, start: int = 0
) -> Iterator[Report]:
    """Trains, yielding a report every ``log_every`` steps and at the end.

    ``start`` is the step of ``run``'s newest checkpoint to continue from; 0 starts anew. Everything random is a
    function of (seed, step, sample), so that a resumed run goes on bit for bit.

    Raises:
        NonFiniteError: ``patience`` non-finite updates in a row; names role, step and loss.
        InputError: the checkpoint does not fit the networks, or cannot be written.
    """
    loop = _Loop(method, models, data, options, run)
    seconds = loop.restore(start) if start else 0.0
    clock = time.monotonic() - seconds
    spent, step = options.budget.progress(start, start * options.batch, seconds), start
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(loop.load, step)
        while spent < 1:
            parts = waiting.result()
            waiting = pool.submit(loop.load, step + 1)
            loop.step(step, spent, parts)
            step += 1
            seconds = time.monotonic() - clock
            if options.budget.unit == "seconds":
                # Clocks differ between processes; when to stop must not.
                seconds = distributed.agree(seconds)
            spent = options.budget.progress(step, step * options.batch, seconds)
            done = spent >= 1
            # Reported first: what a kill in between leaves reported is reported again, but nothing is ever left out.
            if done or step % options.log_every == 0:
                yield Report(step, step * options.batch, seconds, min(spent, 1.0), *loop.read(), done)
            if done or (options.save_every and step % options.save_every == 0):
                loop.save(step, seconds)


class _Loop:
    """The state of a run and what is done to it in a step."""

    def __init__(self, method: Method, models: Models, data: Data, options: FitOptions, run: Run | None) -> None:
        self.method, self.m, self.data, self.options, self.run = method, models, data, options, run
        models.seed = options.seed
        self.optimizers: dict[str, torch.optim.Optimizer] = {}
        for name, role in models.roles.items():
            if role.optim is not None:
                o = role.optim
                # Fused Adam skips a step on the device when told of a non-finite gradient: no host sync.
                self.optimizers[name] = torch.optim.AdamW(
                    models.networks[name].parameters(), o.lr, o.betas, o.eps, o.weight_decay, fused=True
                )
        # Listed once: walking the modules in every step costs a small network a tenth of its time.
        self.parameters = {name: [*models.networks[name].parameters()] for name in self.optimizers}
        self.modules = {name: [*models.networks[name].modules()] for name in self.optimizers}
        self.averaged: dict[str, tuple[list[Tensor], list[Tensor]]] = {
            key: ([*average.parameters()], [*average.buffers()]) for key, average in models.averages.items()
        }
        self.updates = dict.fromkeys(self.optimizers, 0)
        self.health = {name: torch.zeros(4, device=options.device) for name in self.optimizers}
        self.sums: dict[str, list[Tensor]] = {}

    def load(self, step: int) -> list[tuple[Batch, Tensor]]:
        """The micro-batches of this process and the places of their examples in the whole batch."""
        size, ways = self.options.batch, distributed.world()
        ids = example_order(self.options.seed, step, size, len(self.data))
        places = torch.arange(size)[distributed.rank() :: ways]
        return [(self.data.take(ids[part]), part) for part in places.chunk(self.options.micro)]

    def step(self, i: int, progress: float, parts: list[tuple[Batch, Tensor]]) -> None:
        """One iteration of the method: its generators advance in lockstep over the micro-batches."""
        self.m.progress = progress
        device = self.options.device
        with torch.random.fork_rng([device] if torch.device(device).type == "cuda" else []):
            # For what cannot be keyed by sample, such as dropout.
            torch.manual_seed(int(Noise.of(self.options.seed, 1).fold("torch", i, distributed.rank()).seeds))
            self.advance(i, progress, parts)

    def advance(self, i: int, progress: float, parts: list[tuple[Batch, Tensor]]) -> None:
        """:meth:`step`, with torch's own generator seeded."""
        device = self.options.device
        generators = []
        for batch, places in parts:
            noise = Noise.of(self.options.seed, places, device).fold("fit", i)
            generators.append(self.method.step(self.m, batch.to(device), i, noise))
        while True:
            with self.autocast():
                updates = [next(g, None) for g in generators]
            ready = [u for u in updates if u is not None]
            if not ready:
                return
            if len(ready) < len(updates) or len({u.roles for u in ready}) > 1:
                raise RuntimeError(f"{type(self.method).__name__}.step yields differently on different micro-batches")
            self.update(i, progress, ready)

    def autocast(self) -> contextlib.AbstractContextManager[None]:
        """bfloat16 for the networks, when asked for."""
        if not self.options.bf16:
            return contextlib.nullcontext()
        return torch.autocast(torch.device(self.options.device).type, torch.bfloat16)

    def update(self, i: int, progress: float, updates: list[Update]) -> None:
        """One optimizer step: opens the roles, adds the gradients up, steps, averages, freezes again."""
        names = updates[0].roles
        unknown = [n for n in names if n not in self.optimizers]
        if unknown:
            raise RuntimeError(f"{type(self.method).__name__} updates {unknown}, which have no optimizer")
        for name in names:
            self.open(name, True)
        total: Tensor | float = 0.0
        for u in updates:
            losses = self.gradients(u, len(updates))
            total = total + losses["loss"] / len(updates)
            for key, value in losses.items():
                self.sums.setdefault(f"{'+'.join(names)}/{key}", []).append(value.float())
        assert isinstance(total, Tensor)
        for name in names:
            self.apply(name, i, progress, total)
            self.open(name, False)

    def gradients(self, update: Update, count: int) -> dict[str, Tensor]:
        """Adds the gradients of one of ``count`` micro-batches up, part by part; its losses, without a graph."""
        found: list[dict[str, Tensor]] = []
        for part in update.parts or (update.loss,):
            with self.autocast():
                losses = named(part())
            (losses["loss"] / count).backward()
            found.append({key: value.detach() for key, value in losses.items()})
            # The next part's graph must not stand beside what is left of this one.
            del losses
        return added(found)

    def open(self, name: str, trained: bool) -> None:
        """Puts a role in train mode with gradients, or in eval mode without."""
        for module in self.modules[name]:
            module.__dict__["training"] = trained
        for p in self.parameters[name]:
            p.requires_grad_(trained)

    def apply(self, name: str, i: int, progress: float, loss: Tensor) -> None:
        """Reduces, clips and applies one role's gradients, unless they are not finite; then moves its average."""
        optimizer, role, parameters = self.optimizers[name], self.m.roles[name], self.parameters[name]
        assert role.optim is not None
        distributed.average_gradients(parameters)
        used = [p for p in parameters if p.grad is not None]
        norm = torch.nn.utils.get_total_norm([p.grad for p in used if p.grad is not None])
        if role.optim.clip is not None:
            torch.nn.utils.clip_grads_with_norm_(used, role.optim.clip, norm)
        self.sums.setdefault(f"{name}/grad_norm", []).append(norm.detach().float())
        bad = (~torch.isfinite(norm + distributed.average(loss))).float()
        self.note(name, bad, i, loss)
        for group in optimizer.param_groups:
            group["lr"] = role.optim.rate(i, progress)
        optimizer.grad_scale, optimizer.found_inf = None, bad.to(torch.float32)  # type: ignore[attr-defined]
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for key, kind in role.averages(name).items():
            decay = kind.decay(self.updates[name], progress)
            kept, buffers = self.averaged[key]
            with torch.no_grad():
                torch._foreach_lerp_(kept, [*parameters], 1 - decay)
                for own, new in zip(buffers, self.m.networks[name].buffers(), strict=True):
                    own.copy_(new)
        self.updates[name] += 1

    def note(self, name: str, bad: Tensor, i: int, loss: Tensor) -> None:
        """Counts skipped updates on the device: all, in a row now, longest row, first step of the row."""
        skipped, streak, longest, first = self.health[name].unbind()
        streak = (streak + 1) * bad
        first = torch.where(streak == 1, torch.full_like(first, i), first)
        self.health[name] = torch.stack([skipped + bad, streak, torch.maximum(longest, streak), first])
        # Looking costs a host sync on an accelerator, where it waits for the next report.
        if self.options.device == "cpu" and longest + 1 >= self.options.patience:
            self.check(name, float(loss))

    def check(self, name: str, loss: float) -> None:
        """Raises NonFiniteError when a role has failed ``patience`` times in a row."""
        _, _, longest, first = self.health[name].tolist()
        if longest >= self.options.patience:
            raise NonFiniteError(
                f"training stopped: {int(longest)} non-finite updates of {name!r} in a row from step {int(first)} "
                f"(loss {loss:g}): lower the learning rate, clip gradients, or train in float32"
            )

    def read(self) -> tuple[dict[str, float], int]:
        """Means of the losses since the last report and the number of updates skipped so far."""
        means = {k: float(distributed.average(torch.stack(v).mean())) for k, v in self.sums.items()}
        self.sums.clear()
        for name in self.optimizers:
            self.check(name, means.get(f"{name}/loss", float("nan")))
        return means, int(sum(float(h[0]) for h in self.health.values()))

    def save(self, step: int, seconds: float) -> None:
        """A checkpoint of everything that was trained, by rank 0."""
        facts = {
            "seconds": seconds,
            "updates": self.updates,
            "health": {name: health.tolist() for name, health in self.health.items()},
            "sums": {key: distributed.average(torch.stack(values)).tolist() for key, values in self.sums.items()},
        }
        if self.run is not None and distributed.rank() == 0:
            groups = {}
            for name, optimizer in self.optimizers.items():
                network = self.m.networks[name]
                groups[f"roles/{name}"] = network.state_dict()
                groups[f"optim/{name}"] = parameter_state(network, optimizer)
                for key in self.m.roles[name].averages(name):
                    groups[_file_of(key)] = self.m.averages[key].state_dict()
            self.run.save(step, groups, facts)
        distributed.barrier()

    def restore(self, start: int) -> float:
        """Puts the newest checkpoint back; returns the seconds spent before it."""
        found = self.run.latest() if self.run is not None else None
        if found is None or found[0]["step"] != start or self.run is None:
            raise InputError(f"there is no checkpoint of step {start} to resume from")
        facts, groups = found
        place = self.run.checkpoints()[-1]
        kept = {key: _file_of(key) for name in self.optimizers for key in self.m.roles[name].averages(name)}
        files = [f"{group}/{name}" for name in self.optimizers for group in ("roles", "optim")]
        for needed in [*files, *kept.values()]:
            if needed not in groups:
                raise InputError(
                    f"{place} has no {needed}.safetensors: remove this checkpoint to resume from an older one"
                )
        for name, optimizer in self.optimizers.items():
            network: nn.Module = self.m.networks[name]
            load_weights(network, groups[f"roles/{name}"], place)
            load_parameter_state(network, optimizer, groups[f"optim/{name}"])
        for key, file in kept.items():
            load_weights(self.m.averages[key], groups[file], place)
        self.updates = {k: int(v) for k, v in facts["updates"].items()}
        self.health = {k: self.health[k].new_tensor(v) for k, v in facts["health"].items()}
        self.sums = {k: list(torch.tensor(v, device=self.options.device)) for k, v in facts["sums"].items()}
        return float(facts["seconds"])


def _file_of(average: str) -> str:
    """Where a checkpoint holds an average: averages of a role itself are ``roles/<role>.ema``."""
    return f"roles/{average}" if average.endswith(".target") else f"roles/{average}.ema"
