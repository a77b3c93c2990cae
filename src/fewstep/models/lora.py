"""LoRA (arXiv 2106.09685) on one backbone: teacher, fake score and student hold the same weights in memory.

A module tree is cheap and its tensors are not. :func:`share` therefore copies the tree alone: every copy of the result
is a tree of its own, with LoRA layers of its own by peft, over the very same weights. Nothing is switched on or off, so
several of them can take part in one loss, and a checkpointed block recomputes with the layers that it ran with.
"""

from __future__ import annotations

import copy
import math
import re
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from numbers import Real
from typing import Any, cast

import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Precond
from fewstep.core.noise import whole
from fewstep.errors import InputError

ADAPTER = "default"
# What the networks of diffusers call the projections of their attention; the last four are of joint attention.
ATTENTION = (
    *("to_q", "to_k", "to_v", "to_out.0"),
    *("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"),
)


@dataclass(frozen=True)
class LoRA:
    """``W + (alpha / rank) B A`` in place of ``W``, with B and A of ``rank`` rows and columns.

    Attributes:
        rank: of the update, at least 1.
        alpha: its scale is alpha / rank; None is alpha = rank, that is scale 1.
        targets: names of layers, each the whole or the last part of a layer's dotted name, or one regular expression
            that matches whole names. None is what LoRA training of a network of diffusers usually adapts, the
            attention projections of one that is not known, in ours every linear and convolution layer of the blocks.
        dropout: of the layer's input on its way through A, in training.
    """

    rank: int = 64
    alpha: float | None = None
    targets: tuple[str, ...] | str | None = None
    dropout: float = 0.0

    def __post_init__(self) -> None:
        object.__setattr__(self, "rank", whole("LoRA's rank", self.rank))
        for name, value in (("alpha", 1.0 if self.alpha is None else self.alpha), ("dropout", self.dropout)):
            if isinstance(value, bool) or not isinstance(value, Real):
                raise InputError(f"LoRA's {name} must be a number, got {value!r}")
        if self.rank < 1 or not 0 <= self.dropout < 1 or not (self.alpha is None or 0 < self.alpha < math.inf):
            raise InputError(f"LoRA needs rank >= 1, finite alpha > 0 and 0 <= dropout < 1, got {self}")
        if isinstance(self.targets, str):
            try:
                re.compile(self.targets)
            except re.error as error:
                raise InputError(f"LoRA targets {self.targets!r} are no regular expression: {error}") from None
        elif self.targets is not None:
            names: tuple[Any, ...] = tuple(self.targets) if isinstance(self.targets, Iterable) else (self.targets,)
            if not all(isinstance(name, str) for name in names):
                raise InputError(
                    f"LoRA targets must be names of layers, or one regular expression, got {self.targets!r}"
                )
            object.__setattr__(self, "targets", names)
            if not self.targets:
                raise InputError("LoRA targets are empty: name layers, or pass None for the network's default")

    @property
    def scale(self) -> float:
        """``alpha / rank``."""
        return (self.rank if self.alpha is None else self.alpha) / self.rank


def targets_of(net: nn.Module, lora: LoRA) -> tuple[str, ...]:
    """The dotted names within ``net`` of the layers that ``lora`` adapts, in the network's order.

    Raises:
        InputError: none match, or a name does.
    """
    layers = [name for name, m in net.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    if isinstance(lora.targets, str):
        found = [name for name in layers if re.fullmatch(lora.targets, name)]
        missing: list[str] = [] if found else [lora.targets]
    elif lora.targets is not None:
        found = [name for name in layers if any(_ends(name, t) for t in lora.targets)]
        missing = [t for t in lora.targets if not any(_ends(name, t) for name in layers)]
    else:
        usual = _usual(net)
        found = [name for name in layers if any(_ends(name, t) for t in usual)] or _of_blocks(net, layers)
        missing = [] if found else ["linear or convolution layers"]
    if missing:
        some = ", ".join(layers[:: max(1, len(layers) // 5)][:5]) or "no linear or convolution layer"
        raise InputError(f"{type(net).__name__} has no {', '.join(missing)} for LoRA to adapt: it has {some}, ...")
    return tuple(found)


def _ends(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def _usual(net: nn.Module) -> tuple[str, ...]:
    """The layers that are adapted in networks of this kind, by the ends of their names."""
    from fewstep.models.diffusers import FAMILIES

    known = [FAMILIES[type(m).__name__] for m in net.modules() if type(m).__name__ in FAMILIES]
    return known[0].lora_targets if known else ATTENTION


def _of_blocks(net: nn.Module, layers: list[str]) -> list[str]:
    """Layers inside the network's lists of blocks; all of them where it has no lists."""
    lists = {f"{name}." for name, m in net.named_modules() if name and isinstance(m, nn.ModuleList | nn.ModuleDict)}
    return [name for name in layers if any(name.startswith(own) for own in lists)] or layers


class Shared(Precond):
    """A denoiser whose copies are adapters: ``copy.deepcopy(shared)`` is an :class:`Adapted` with fresh LoRA layers.

    As a module it is the plain network, with all of its weights: the teacher. Made by :func:`share`.
    """

    lora: LoRA

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        """A new adapter. Its A is drawn from torch's generator, its B is 0: it is the identity at first."""
        return _adapt(self, self.lora, targets_of(self.net, self.lora))


class Adapted(Precond):
    """A denoiser with LoRA layers on weights that it shares; as a module it holds the LoRA tensors alone.

    ``parameters``, ``state_dict`` and what is built on them see names such as
    ``net.decoder.0.conv1.lora_A.default.weight``. A deep copy has the same values and the same backbone, as averages
    need it. :func:`merge` makes a plain denoiser of it.
    """

    lora: LoRA
    targets: tuple[str, ...]

    @property
    def plain(self) -> Precond:
        """The denoiser without the LoRA layers, on the shared weights."""
        return cast(Precond, self.__dict__["_plain"][0])

    def layers(self) -> dict[str, Any]:
        """The LoRA layers of peft, by their names within ``net``."""
        return {name: self.net.get_submodule(name) for name in self.targets}

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """Those of the LoRA layers."""
        for name, p in super().named_parameters(prefix, recurse, remove_duplicate):
            if _own(name):
                yield name, p

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """None: buffers belong to the backbone."""
        return iter(())

    def state_dict(self, *args: Any, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:
        """The LoRA tensors, by name."""
        full = super().state_dict(prefix=prefix, keep_vars=keep_vars)
        out = OrderedDict() if destination is None else destination
        out.update({name: t for name, t in full.items() if _own(name)})
        return out

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Puts back what :meth:`state_dict` took.

        Raises:
            RuntimeError: names differ, and ``strict``.
        """
        wrong = sorted(self.state_dict().keys() ^ state_dict.keys())
        if strict and wrong:
            raise RuntimeError(f"these LoRA tensors are on one side only: {', '.join(wrong[:3])}")
        return super().load_state_dict({k: v for k, v in state_dict.items() if _own(k)}, strict=False, assign=assign)

    def describe(self) -> dict[str, Any]:
        """Refused, because no file could be opened from it.

        Raises:
            InputError: always.
        """
        raise InputError("a LoRA view of a denoiser is saved by save_lora, or merged: save merge(view) instead")

    def __deepcopy__(self, memo: dict[int, Any]) -> Adapted:
        """The same LoRA values on the same backbone."""
        memo[id(self.plain)] = self.plain
        kept = {name: t for name, t in _tensors(self) if not _own(name)}
        return cast(Adapted, _clone(self, type(self), {id(t): t for t in kept.values()} | memo))


def _own(name: str) -> bool:
    return any(part.startswith("lora_") for part in name.split("."))


def _tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and buffer, whatever the module says of itself."""
    yield from nn.Module.named_parameters(module)
    yield from nn.Module.named_buffers(module)


def _clone(module: nn.Module, cls: type[nn.Module], memo: dict[int, Any]) -> nn.Module:
    """A deep copy of the tree as another class; what ``memo`` holds is shared."""
    made = cls.__new__(cls)
    memo[id(module)] = made
    made.__dict__ = copy.deepcopy(module.__dict__, memo)
    return made


@lru_cache(maxsize=64)
def _mixed(role: Any, plain: Any) -> type[Precond]:
    """``plain`` that behaves as ``role``, so that a subclass keeps its own preconditioning."""
    return type(f"{role.__name__}{plain.__name__}", (role, plain), {"_plain_class": plain})


def _plain_class(module: Precond) -> Any:
    return getattr(type(module), "_plain_class", type(module))


def tree(denoiser: nn.Module) -> nn.Module:
    """A copy of the module tree over the same tensors: hooks and replaced layers of one leave the other alone."""
    return _clone(denoiser, type(denoiser), {id(t): t for _, t in _tensors(denoiser)})


def share(denoiser: nn.Module, lora: LoRA) -> Shared:
    """The same denoiser on the same weights, whose copies are LoRA adapters; freezes the weights.

    Raises:
        InputError: peft is missing, it is no Precond, nothing matches the targets, or it keeps batch statistics, which
            training would change under the teacher.
    """
    if not isinstance(denoiser, Precond) or isinstance(denoiser, Adapted):
        raise InputError(f"LoRA needs a plain Precond with its own weights, got a {type(denoiser).__name__}")
    _peft()
    targets_of(denoiser.net, lora)
    for name, m in denoiser.named_modules():
        if getattr(m, "track_running_stats", False):
            raise InputError(f"{name} keeps batch statistics, which cannot be shared: train a full copy, without LoRA")
    cls = _mixed(Shared, _plain_class(denoiser))
    made = cast(Shared, _clone(denoiser, cls, {id(t): t for _, t in _tensors(denoiser)}))
    made.lora = lora
    return cast(Shared, made.requires_grad_(False))


def adapter(denoiser: nn.Module, lora: LoRA) -> Adapted:
    """One adapter on ``denoiser``'s weights, the identity at first; see :func:`share` for what is refused."""
    return copy.deepcopy(share(denoiser, lora))  # type: ignore[return-value]


def _peft() -> Any:
    try:
        import peft
    except ImportError:
        raise InputError("peft is not installed: pip install 'fewstep[hf]'") from None
    return peft


def _adapt(shared: Precond, lora: LoRA, targets: tuple[str, ...]) -> Adapted:
    peft = _peft()
    plain = _plain_class(shared)
    memo = {id(t): t for _, t in _tensors(shared)}
    made = cast(Adapted, _clone(shared, _mixed(Adapted, plain), dict(memo)))
    config = peft.LoraConfig(
        r=lora.rank,
        lora_alpha=lora.scale * lora.rank,
        # Whole names: a list would be matched from the right, and could find more than was meant.
        target_modules="|".join(re.escape(name) for name in targets),
        lora_dropout=lora.dropout,
        init_lora_weights=True,
    )
    peft.inject_adapter_in_model(config, made.net, ADAPTER)
    made.__dict__.pop("lora", None)
    made.lora, made.targets = lora, targets
    made.__dict__["_plain"] = (_clone(shared, plain, dict(memo)),)
    for name, p in made.named_parameters():
        # Small updates vanish in half precision; peft computes in the dtype of A and gives back that of the layer.
        p.data = p.data if p.dtype == torch.float64 else p.data.float()
        p.requires_grad_(False)
        assert _own(name)
    return made.train(shared.training)


def merge(view: Adapted) -> Precond:
    """A plain denoiser with ``W + scale B A`` for weights; the view and its backbone stay as they are."""
    merged = _clone(view.plain, type(view.plain), {})
    return _add(cast(Precond, merged), view, 1.0).train(view.training)


def unmerge(merged: Precond, view: Adapted) -> Precond:
    """The inverse of :func:`merge`, as another copy, up to the rounding of the weights."""
    return _add(cast(Precond, _clone(merged, type(merged), {})), view, -1.0)


@torch.no_grad()
def _add(plain: Precond, view: Adapted, factor: float) -> Precond:
    for name, layer in view.layers().items():
        weight = cast(Tensor, plain.net.get_submodule(name).weight)
        delta = layer.get_delta_weight(ADAPTER)
        weight.data = (weight.to(torch.float64) + factor * delta.to(weight.device, torch.float64)).to(weight.dtype)
    return plain.requires_grad_(False)
