"""Directional derivatives against differences and reverse mode; views of denoisers in other paths' coordinates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fewstep.core.denoiser import Precond, edm
from fewstep.core.exact import bimodal
from fewstep.core.path import DDPM, FLOW, TRIG, VP
from fewstep.errors import InputError
from fewstep.guide import CFG
from fewstep.loss.tangent import directional, tamed
from fewstep.models import ResMLP, ResMLPConfig, UNet, UNetConfig
from fewstep.models.consistency import anchored
from fewstep.models.extended import extended
from fewstep.models.trigflow import LogVariance, View, smooth, trigflow

SHAPE = (1, 8, 8)


def moved(net: nn.Module, size: float = 0.1) -> Any:
    g = torch.Generator().manual_seed(1)
    for p in net.parameters():
        p.data += size * torch.randn(p.shape, generator=g)
    return net


def mlp(**more: Any) -> Any:
    torch.manual_seed(0)
    return moved(ResMLP(ResMLPConfig(SHAPE, 3, width=16, embedding=8, blocks=1, **more)))


def unet(**more: Any) -> Any:
    torch.manual_seed(0)
    return moved(UNet(UNetConfig(SHAPE, 3, channels=8, multipliers=(1, 2), blocks=1, attention=(4,), **more)), 0.05)


def denoisers(net: Callable[[], Any] = mlp) -> dict[str, Precond]:
    kinds: list[tuple[str, Any, Any]] = [
        ("vp noise", VP, "noise"),
        ("vp v", VP, "v"),
        ("ddpm noise", DDPM, "noise"),
        ("flow velocity", FLOW, "velocity"),
        ("shifted flow", FLOW(shift=3.0), "velocity"),
        ("flow x0", FLOW, "x0"),
    ]
    made = {name: Precond(net(), SHAPE, path=path, predicts=kind) for name, path, kind in kinds}
    return {"edm": edm(net(), SHAPE, sigma_data=0.4)} | made


def points(n: int = 4, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    g = torch.Generator().manual_seed(2)
    x = torch.randn(n, *SHAPE, generator=g, dtype=dtype)
    return x, torch.linspace(0.2, 1.3, n, dtype=torch.float64), {"label": torch.arange(n) % 3}


def gap(a: Tensor, b: Tensor) -> float:
    return float((a - b).detach().abs().max())


# ---- directional derivatives


@pytest.mark.parametrize("net", [mlp, unet])
@pytest.mark.parametrize("name", ["edm", "vp v", "flow velocity", "ddpm noise"])
def test_the_derivative_is_that_of_reverse_mode_and_of_differences(net: Any, name: str) -> None:
    D = denoisers(net)[name].double()
    x, t, cond = points()
    v, speed = torch.randn_like(x), t.cos() * t.sin()
    v = v * speed.reshape(-1, 1, 1, 1)

    def f(x: Tensor, u: Tensor) -> Tensor:
        # The network is told its time in float32, which hides differences that are too small.
        return trigflow(D)(x, u, cond)

    value, slope = directional(f, (x, t), (v, speed))
    assert gap(value, f(x, t)) < 1e-12 and not slope.requires_grad
    probe = torch.randn_like(x)
    a, b = x.clone().requires_grad_(True), t.clone().requires_grad_(True)
    gx, gt = torch.autograd.grad((probe * f(a, b)).sum(), [a, b])
    assert float((probe * slope).sum()) == pytest.approx(float((gx * v).sum() + (gt * speed).sum()), rel=1e-5)
    # Where the time does not move, rounding of the time does not matter, and differences are exact to their order.
    _, still = directional(f, (x, t), (v, torch.zeros_like(t)))
    value, coarse = directional(f, (x, t), (v, torch.zeros_like(t)), "difference")
    assert gap(still, coarse) < 1e-6 * (1 + float(still.abs().max())) and gap(value, f(x, t)) < 1e-12
    if name == "ddpm noise":
        # Told an index of 0 to 999, this network varies within a difference's reach.
        return
    single = [p.float() for p in (x, t, v, speed)]
    _, far = directional(f, single[:2], single[2:], "difference")
    assert gap(slope.float(), far) < 0.02 * float(slope.abs().max())


def test_the_cheap_layers_have_torchs_own_derivatives() -> None:
    torch.manual_seed(0)
    layers: list[tuple[Callable[[Tensor], Tensor], tuple[int, ...]]] = [
        (nn.Conv2d(4, 6, 3, padding=1, stride=2).double(), (2, 4, 8, 8)),
        (nn.Conv2d(4, 6, 3, groups=2, bias=False).double(), (2, 4, 8, 8)),
        (nn.Conv1d(4, 6, 3).double(), (2, 4, 9)),
        (moved(nn.GroupNorm(2, 4).double()), (3, 4, 5, 5)),
        (nn.GroupNorm(4, 4, affine=False).double(), (3, 4, 5)),
        (nn.Linear(5, 3).double(), (2, 7, 5)),
        (lambda x: nn.functional.group_norm(x * x, num_groups=2), (2, 4, 3)),
        (lambda x: nn.functional.linear(x, torch.ones(3, 5, dtype=x.dtype) * x.mean()), (2, 5)),
    ]
    for layer, shape in layers:
        x, v = torch.randn(shape, dtype=torch.float64), torch.randn(shape, dtype=torch.float64)
        value, slope = directional(layer, (x,), (v,))
        want = torch.func.jvp(layer, (x,), (v,))
        assert gap(value, want[0]) < 1e-12 and gap(slope, want[1]) < 1e-11, layer


def test_dropout_is_the_same_in_every_pass_and_after() -> None:
    D = edm(mlp(dropout=0.5), SHAPE).train()
    x, t, cond = points(dtype=torch.float32)
    view = trigflow(D)

    def f(x: Tensor, u: Tensor) -> Tensor:
        return view(x, u, cond)

    for mode in ("forward", "difference"):
        torch.manual_seed(5)
        value, slope = directional(f, (x, t), (torch.ones_like(x), torch.zeros_like(t)), mode)
        after = f(x, t)
        assert torch.equal(value, after.detach()) and after.requires_grad, mode
        torch.manual_seed(6)
        assert gap(value, f(x, t)) > 1e-3 and float(slope.abs().max()) < 100, mode


class Stubborn(torch.autograd.Function):
    """An operation without a forward derivative."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x * x

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> Tensor:
        return g


def test_an_operation_without_a_derivative_is_never_passed_over() -> None:
    x = torch.tensor([2.0, 3.0], dtype=torch.float64)
    with pytest.raises(InputError, match=r"cannot be differentiated forwards.*set tangent='difference'"):
        directional(Stubborn.apply, (x,), (torch.ones_like(x),))
    with pytest.warns(UserWarning, match="central differences stand in"):
        value, slope = directional(Stubborn.apply, (x,), (torch.ones_like(x),), "auto")
    assert torch.equal(value, x * x) and gap(slope, 2 * x) < 1e-8
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert gap(directional(torch.sin, (x,), (torch.ones_like(x),), "auto")[1], x.cos()) < 1e-12
    assert float(directional(lambda x: torch.ones(3), (x,), (torch.ones_like(x),))[1].abs().max()) == 0


def test_tangents_run_in_full_precision_under_autocast() -> None:
    D, (x, t, cond) = edm(mlp(), SHAPE), points(dtype=torch.float32)
    args = (lambda x, u: trigflow(D)(x, u, cond), (x, t), (x, t))
    plain = directional(*args)
    with torch.autocast("cpu", torch.bfloat16):
        cast = directional(*args)
    assert torch.equal(plain[0], cast[0]) and torch.equal(plain[1], cast[1])


def test_tamed_tangents_are_bounded_and_keep_their_direction() -> None:
    g = torch.randn(3, 2, 4, 4, dtype=torch.float64) * torch.tensor([1e-3, 1.0, 1e3]).reshape(3, 1, 1, 1)
    found, size = tamed(g), g.flatten(1).square().mean(1).sqrt()
    assert gap(found, g / (size + 0.1).reshape(3, 1, 1, 1)) < 1e-12
    assert float(found.flatten(1).square().mean(1).sqrt().max()) < 1
    # The size does not depend on the number of pixels.
    assert gap(tamed(g.repeat(1, 1, 2, 2))[:, :, :4, :4], found) < 1e-12
    assert torch.equal(tamed(g, "clip"), g.clamp(-1, 1)) and tamed(g, "none") is g


# ---- views


def test_the_view_of_a_mixture_is_its_flow() -> None:
    problem, d = bimodal(), 0.7
    x, h = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None], 1e-4
    for t in (0.2, 0.8, 1.4):
        at = torch.full((9,), t, dtype=torch.float64)
        xh = math.cos(t) * x * (1 + d * math.tan(t))
        ends = [
            math.cos(t + e) * problem.flow(xh / math.cos(t), d * math.tan(t), d * math.tan(t + e), 4) for e in (h, -h)
        ]
        slope = (ends[0] - ends[1]) / (2 * h)
        # A mixture wants its level to broadcast.
        view = trigflow(lambda y, s, c: problem(y, s[:, None]), d)
        assert gap(view(xh, at), slope) < 1e-6, t


@pytest.mark.parametrize("name", denoisers())
@pytest.mark.parametrize("path", [TRIG(0.4), FLOW], ids=["trig", "flow"])
def test_a_view_is_the_denoiser_in_other_coordinates(name: str, path: Any) -> None:
    D = denoisers()[name]
    x, _, cond = points()
    for u in (0.01, 0.3, 0.95):
        at = torch.full((4,), u, dtype=torch.float64)
        c = path.coeffs(at[0])
        view, sigma = View(D, path), path.sigma(at)
        v = view(x, at, cond)
        direct = D(x / c.a, sigma, cond)
        noise = (x / c.a - direct) / sigma[0]
        assert gap(v, c.da * direct + c.db * noise) < 1e-5 * (1 + float(v.detach().abs().max())), (name, u)
        assert gap(view.x0(x, v, at), direct) < 1e-5 * (1 + float(direct.detach().abs().max()))
        guided = CFG(D, 1.0)
        assert gap(View(guided, path)(x, at, cond), v) < 1e-4 * (1 + float(v.detach().abs().max()))


def test_edm_and_flow_networks_are_taken_as_they_are() -> None:
    made = denoisers()
    for name, path, sign in (("edm", TRIG(0.4), -0.4), ("flow velocity", FLOW, 1.0)):
        for u in (1e-4, 0.02, 0.5, 0.99):
            p, q, scale, _ = View(made[name], path).weights(torch.tensor([u], dtype=torch.float64))
            # sigma_data F_trig is -sigma_data F_edm, and a flow network's own output is the velocity.
            assert abs(float(p)) < 1e-10 and float(q) == pytest.approx(sign, abs=1e-10)
            assert float(scale) == pytest.approx(1 / 0.4 if name == "edm" else 1.0, rel=1e-10)


@pytest.mark.parametrize("name", [n for n in denoisers() if n != "flow x0"])
def test_the_denoiser_of_a_view_is_the_identity_at_0_and_nothing_grows_there(name: str) -> None:
    D = denoisers()[name]
    x, _, cond = points(dtype=torch.float32)
    for t in (1e-2, 1e-3, 1e-4):
        at = torch.full((4,), t, dtype=torch.float64)
        v = trigflow(D)(x, at, cond)
        assert float(v.detach().abs().max()) < 20 and gap(trigflow(D).x0(x, v, at), x) < 21 * t


def test_an_anchored_x0_network_is_the_identity_at_its_lowest_level() -> None:
    D = denoisers()["flow x0"]
    student, (x, _, cond) = anchored(D, 0.002), points()
    view = trigflow(student)
    at = torch.full((4,), math.atan(0.002 / view.path.scale), dtype=torch.float64)  # type: ignore[attr-defined]
    xh = at[0].cos() * x
    assert gap(view.x0(xh, view(xh, at, cond), at), x) < 1e-9


def test_pure_noise_of_a_flow_model_is_a_level_like_others() -> None:
    D = Precond(mlp(), SHAPE, path=FLOW, predicts="velocity", sigma_min=1e-3, sigma_max=1e8)
    x, _, cond = points(dtype=torch.float32)
    at = torch.full((4,), math.atan(1e8 / 0.5), dtype=torch.float64)
    v = trigflow(D)(0.5 * x, at, cond)
    ones = torch.ones(4)
    # At pure noise dx_t/dt is -x0, and x0 is the network's input less its velocity.
    assert gap(v, D.net(x, ones, cond) - x) < 1e-5


def test_extended_networks_and_the_variance_are_differentiable_too() -> None:
    D = extended(edm(mlp(), SHAPE), "until")
    moved(D.net.terms)  # type: ignore[arg-type]
    x, t, cond = points()
    told = {**cond, "until": t / 2}
    _, slope = directional(lambda x, u: View(D, FLOW)(x, u, told), (x, t * 0.5), (x, t))
    assert float(slope.abs().max()) > 0 and bool(slope.isfinite().all())
    variance = LogVariance()
    assert torch.equal(variance(t), torch.zeros(4)) and variance(torch.tensor([1e-3, 1e30])).shape == (2,)


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: directional(torch.sin, (torch.ones(2),), (torch.ones(2),), "reverse"), "unknown mode of differentiation"),  # type: ignore[arg-type]
    (lambda: directional(torch.sin, (), ()), "at least one, got 0"),
    (lambda: directional(torch.sin, (torch.ones(2),), (torch.ones(3),)), r"tangent 0 is torch.float32 \(3,\)"),
    (lambda: directional(torch.sin, (torch.ones(2).long(),), (torch.ones(2).long(),)), "expected a floating dtype"),
    (lambda: tamed(torch.ones(2, 2), "l1"), "unknown way to tame a tangent 'l1'"),  # type: ignore[arg-type]
    (lambda: trigflow(denoisers()["edm"], 0.0), "finite sigma_data > 0, got 0"),
    (
        lambda: smooth(Precond(mlp(), SHAPE, path=DDPM, predicts="noise", time="nearest")),
        "make its Precond with time='",
    ),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)
