"""Derivatives along a direction, without a graph, and the tangents of continuous-time consistency models."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

from fewstep.errors import InputError, unknown

Mode = Literal["forward", "difference", "auto"]
Tamed = Literal["norm", "clip", "none"]
MODES, TAMED = ("forward", "difference", "auto"), ("norm", "clip", "none")
Function = Callable[..., Tensor]
# Affine in their first argument; weight and bias come next.
AFFINE = (F.linear, F.conv1d, F.conv2d, F.conv3d)


def directional(
    f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor], mode: Mode = "forward"
) -> tuple[Tensor, Tensor]:
    """``f(*primals)`` and its derivative along ``tangents``: ``sum_k df/dp_k . v_k``, both shaped like the output.

    ``primals`` and ``tangents`` are floating tensors, pairwise of one shape and dtype. ``f`` returns one tensor.
    Nothing is kept for a backward pass, so the memory is about twice that of a forward pass. Autocast is off inside,
    because a derivative in half precision is noise.

    * ``forward``: forward-mode differentiation, exact up to rounding, between two and three times the cost of ``f``.
      Attention runs as plain matrix products, because no fused kernel has such a derivative.
    * ``difference``: the central difference at ``e = eps^(1/3)`` of the coarsest primal's dtype, three calls of ``f``;
      the error is of order ``e^2``, about 1e-5 in float32 where ``f`` changes little over a unit of the tangents.
    * ``auto``: ``forward``, or with a warning that gives the reason ``difference``, where an operation has no forward
      derivative.

    Every call of ``f`` sees the same state of torch's generators, and leaves them as they were found. A gradient pass
    that follows therefore draws the same dropout masks.

    Raises:
        InputError: an unknown mode, primals and tangents that do not match, or with ``forward`` an operation without
            a forward derivative.
    """
    _check(primals, tangents, mode)
    with torch.no_grad(), _full_precision(primals[0]):
        if mode == "difference":
            return _difference(f, primals, tangents)
        try:
            return _forward(f, primals, tangents)
        except NotImplementedError as error:
            reason = str(error).split(". ")[0].strip()
            if mode == "forward":
                raise InputError(
                    f"the network cannot be differentiated forwards: {reason}; set tangent='difference'"
                ) from error
            warnings.warn(f"central differences stand in for the forward derivative: {reason}", stacklevel=2)
            return _difference(f, primals, tangents)


def _check(primals: Sequence[Tensor], tangents: Sequence[Tensor], mode: str) -> None:
    if mode not in MODES:
        raise unknown("mode of differentiation", mode, MODES)
    if not primals or len(primals) != len(tangents):
        raise InputError(f"{len(primals)} primals need as many tangents, at least one, got {len(tangents)}")
    for k, (p, v) in enumerate(zip(primals, tangents, strict=True)):
        if p.shape != v.shape or p.dtype != v.dtype or not p.is_floating_point():
            raise InputError(
                f"tangent {k} is {v.dtype} {tuple(v.shape)}, expected a floating dtype and that of its primal, "
                f"{p.dtype} {tuple(p.shape)}"
            )


@contextlib.contextmanager
def _full_precision(like: Tensor) -> Iterator[None]:
    with torch.autocast(like.device.type, enabled=False), sdpa_kernel(SDPBackend.MATH):
        yield


@contextlib.contextmanager
def _same_draws(like: Tensor) -> Iterator[None]:
    with torch.random.fork_rng([like.device] if like.is_cuda else []):
        yield


def _forward(f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    with _same_draws(primals[0]), forward_ad.dual_level(), _Cheap():
        out = f(*[forward_ad.make_dual(p.detach(), v.detach()) for p, v in zip(primals, tangents, strict=True)])
        value, slope = forward_ad.unpack_dual(out)
        return value.detach(), torch.zeros_like(value) if slope is None else slope.detach()


class _Cheap(TorchFunctionMode):
    """Forward derivatives of what has one in some of its inputs alone, where torch's own cost more.

    Torch's convolution convolves a third time, with the weights' derivative of zeros; its group norm is made of some
    twenty elementwise operations, its multiply-add of four. Its sums and products make a derivative of zeros for every
    operand without one, numbers too, and the size of the result with those is found by Python code that takes longer
    than the operation on a small picture.
    """

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in CHEAP and len(args) == CHEAP[func][1] and not kwargs:
            found = CHEAP[func][0](*args)
            if found is not None:
                return found
        if func in AFFINE or func is F.group_norm:
            tensors = [*args, *kwargs.values()]
            slopes = [forward_ad.unpack_dual(t).tangent if isinstance(t, Tensor) else None for t in tensors]
            # Only where the input alone has a derivative, and is passed as torch's own layers pass it.
            if slopes and args and slopes[0] is not None and all(s is None for s in slopes[1:]):
                made = _group_norm if func is F.group_norm else _affine
                return made(func, forward_ad.unpack_dual(args[0]).primal, slopes[0], *args[1:], **kwargs)
        return func(*args, **kwargs)


def _affine(func: Any, x: Tensor, v: Tensor, weight: Tensor, bias: Tensor | None = None, *args: Any, **kw: Any) -> Any:
    return forward_ad.make_dual(func(x, weight, bias, *args, **kw), func(v, weight, None, *args, **kw))


def _group_norm(
    func: Any,
    x: Tensor,
    v: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Any:
    x, size = x.contiguous(), (len(x), x.shape[1], x[0, 0].numel(), num_groups)
    value, mean, rstd = torch.native_group_norm(x, weight, bias, *size, eps)
    # The derivative of the normalisation itself is a symmetric matrix, so that the kernel of its backward pass, which
    # is one operation, is that of its forward derivative too.
    backward = torch.ops.aten.native_group_norm_backward
    slope = backward(v.contiguous(), x, mean, rstd, None, *size, [True, False, False])[0]
    if weight is not None:
        slope.mul_(weight.reshape(-1, *[1] * (x.ndim - 2)))
    return forward_ad.make_dual(value, slope)


def _halves(x: Any) -> tuple[Any, Tensor | None]:
    """A value and its derivative, None for numbers and for what has none."""
    return forward_ad.unpack_dual(x) if isinstance(x, Tensor) else (x, None)


def _dual(value: Tensor, slope: Tensor) -> Tensor:
    return forward_ad.make_dual(value, slope.to(value.dtype).expand(value.shape))


def _add(a: Any, b: Any) -> Tensor | None:
    (x, dx), (y, dy) = _halves(a), _halves(b)
    slope = dy if dx is None else dx
    return None if slope is None or (dx is not None and dy is not None) else _dual(x + y, slope)


def _sub(a: Any, b: Any) -> Tensor | None:
    (x, dx), (y, dy) = _halves(a), _halves(b)
    if dx is not None:
        return None if dy is not None else _dual(x - y, dx)
    return None if dy is None else _dual(x - y, -dy)


def _mul(a: Any, b: Any) -> Tensor | None:
    (x, dx), (y, dy) = _halves(a), _halves(b)
    if dx is not None:
        return None if dy is not None else forward_ad.make_dual(x * y, dx * y)
    return None if dy is None else forward_ad.make_dual(x * y, x * dy)


def _div(a: Any, b: Any) -> Tensor | None:
    (x, dx), (y, dy) = _halves(a), _halves(b)
    if dx is not None:
        return None if dy is not None else forward_ad.make_dual(x / y, dx / y)
    if dy is None:
        return None
    value = x / y
    return forward_ad.make_dual(value, -value * dy / y)


def _addcmul(shift: Tensor, x: Tensor, scale: Tensor) -> Tensor | None:
    """``shift + x scale``, whose derivative is two operations of the same kind."""
    (s, ds), (y, dy), (f, df) = (_halves(t) for t in (shift, x, scale))
    if ds is None or dy is None or df is None:
        return None
    return forward_ad.make_dual(torch.addcmul(s, y, f), torch.addcmul(ds, dy, f).addcmul_(y, df))


def _attention(query: Tensor, key: Tensor, value: Tensor) -> Tensor | None:
    """Attention without a mask, with the derivative of its softmax ``p (ds - sum p ds)``."""
    (q, dq), (k, dk), (v, dv) = (_halves(t) for t in (query, key, value))
    if dq is None or dk is None or dv is None or q.dtype not in (torch.float32, torch.float64):
        return None
    scale, columns = q.shape[-1] ** -0.5, k.transpose(-2, -1)
    p = (q @ columns).mul_(scale).softmax(-1)
    dp = (dq @ columns).add_(q @ dk.transpose(-2, -1)).mul_(scale).mul_(p)
    dp = torch.addcmul(dp, p, dp.sum(-1, keepdim=True), value=-1)
    return forward_ad.make_dual(p @ v, (dp @ v).add_(p @ dv))


# What :class:`_Cheap` does itself, and the number of arguments it does it with; None leaves the rest to torch.
CHEAP: dict[Any, tuple[Callable[..., Tensor | None], int]] = {
    torch.addcmul: (_addcmul, 3),
    F.scaled_dot_product_attention: (_attention, 3),
    **dict.fromkeys((torch.add, torch.Tensor.add), (_add, 2)),
    **dict.fromkeys((torch.sub, torch.Tensor.sub), (_sub, 2)),
    **dict.fromkeys((torch.mul, torch.Tensor.mul), (_mul, 2)),
    **dict.fromkeys((torch.div, torch.Tensor.div), (_div, 2)),
    torch.Tensor.__rsub__: (lambda x, a: _sub(a, x), 2),
    torch.Tensor.__rtruediv__: (lambda x, a: _div(a, x), 2),
}


def _difference(f: Function, primals: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    e = max(torch.finfo(p.dtype).eps for p in primals) ** (1 / 3)
    ends = []
    for sign in (0.0, 1.0, -1.0):
        with _same_draws(primals[0]):
            ends.append(f(*[p.detach() + sign * e * v.detach() for p, v in zip(primals, tangents, strict=True)]))
    value, above, below = ends
    return value, (above - below) / (2 * e)


def tamed(g: Tensor, how: Tamed = "norm", c: float = 0.1) -> Tensor:
    """A tangent of bounded size, per sample (arXiv 2410.11081, section 4.2): shaped like ``g`` (B, ...).

    ``norm`` is ``g / (|g| + c)`` with the root mean square over the sample for ``|g|``, so that ``c`` > 0 does not
    depend on the size of the picture; ``clip`` holds every entry within [-1, 1]; ``none`` is ``g`` itself.

    Raises:
        InputError: an unknown way.
    """
    if how not in TAMED:
        raise unknown("way to tame a tangent", how, TAMED)
    if how == "clip":
        return g.clamp(-1, 1)
    if how == "none":
        return g
    size = g.flatten(1).square().mean(1).sqrt()
    return g / (size + c).reshape(-1, *[1] * (g.ndim - 1))
