"""The deterministic solvers beyond Euler, Heun and DPM-Solver++ multistep: recurrences, orders, identities, limits."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep import FLOW, TRIG, VP, CountingDenoiser, InputError, Mixture, Tableau, sample
from fewstep.core.path import EDM, VPPath
from fewstep.core.solver import build, lagrange_integrals, phi
from fewstep.grid import karras, logsnr
from fewstep.solve.deis import deis
from fewstep.solve.dpm import dpm1, dpm2, dpm3, dpm_multistep, dpm_single, fast_orders
from fewstep.solve.dpmpp import dpmpp, dpmpp2m
from fewstep.solve.dpmpp_single import dpmpp2s, dpmpp3s
from fewstep.solve.euler import euler
from fewstep.solve.ipndm import ipndm, ipndm_v
from fewstep.solve.lms import lms
from fewstep.solve.res import res, res_multistep
from fewstep.solve.unipc import unipc
from recurrences import adams, dpm, dpm_pp, exponential, exponential_adams, noise_multistep, uni, vp_time

START, END = 10.0, 0.05
TO_ZERO = torch.tensor([12.0, 9.0, 5.0, 3.2, 1.7, 1.2, 0.5, 0.2, 0.0], dtype=torch.float64)
TO_MIN = TO_ZERO[:-1]
Solver = Callable[[Tensor], Tableau]


@cache
def problem() -> Mixture:
    generator = torch.Generator().manual_seed(5)
    means = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    return Mixture(means, 0.3 + torch.rand(5, 4, generator=generator, dtype=torch.float64), [1, 2, 3, 2, 1])


@cache
def start() -> Tensor:
    return START * torch.randn(24, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def noisy(order: int, **options: Any) -> tuple[Solver, Callable[..., Tensor], dict[str, Any]]:
    own = {"variant": options.get("variant", "bh2"), "noise": options.get("predict") == "noise"}
    own |= {"falling": options.get("lower_order_final", False), "uncorrected": options.get("disable_corrector", ())}
    if options.get("corrector") is False:
        own["uncorrected"] = range(99)
    return partial(unipc, order=order, **options), uni, {"top": order, **own}


PUBLISHED: dict[str, tuple[Solver, Callable[..., Tensor], dict[str, Any]]] = {
    "dpm1": (dpm1, dpm, {"top": 1}),
    "dpm2": (dpm2, dpm, {"top": 2, "r": [0.5]}),
    "dpm2-r": (partial(dpm2, r=0.3), dpm, {"top": 2, "r": [0.3]}),
    "dpm2-taylor": (partial(dpm2, r=0.7, taylor=True), dpm, {"top": 2, "r": [0.7], "taylor": True}),
    "dpm3": (dpm3, dpm, {"top": 3, "r": [1 / 3, 2 / 3]}),
    "dpm3-r": (partial(dpm3, r1=0.2, r2=0.8), dpm, {"top": 3, "r": [0.2, 0.8]}),
    "dpm-2m": (partial(dpm_multistep, order=2), noise_multistep, {"top": 2}),
    "dpm-3m": (partial(dpm_multistep, order=3), noise_multistep, {"top": 3}),
    "dpm-2m-exact": (partial(dpm_multistep, order=2, exact=True), noise_multistep, {"top": 2, "full": True}),
    "dpm-3m-exact": (partial(dpm_multistep, order=3, exact=True), noise_multistep, {"top": 3, "full": True}),
    "dpmpp2s": (dpmpp2s, dpm_pp, {"r": [0.5]}),
    "dpmpp2s-r": (partial(dpmpp2s, r=0.8), dpm_pp, {"r": [0.8]}),
    "dpmpp2s-taylor": (partial(dpmpp2s, r=0.4, taylor=True), dpm_pp, {"r": [0.4], "taylor": True}),
    "dpmpp3s": (dpmpp3s, dpm_pp, {"r": [1 / 3, 2 / 3]}),
    "dpmpp3s-r": (partial(dpmpp3s, r1=0.5, r2=1.0), dpm_pp, {"r": [0.5, 1.0]}),
    "res-3": (partial(res, order=3), exponential, {"c2": 0.5, "c3": 1.0}),
    "res-3-c": (partial(res, order=3, c2=0.3, c3=0.6), exponential, {"c2": 0.3, "c3": 0.6}),
    "lms-2": (partial(lms, order=2), adams, {"top": 2, "to_zero": 4}),
    "lms-4": (partial(lms, order=4), adams, {"top": 4, "to_zero": 4}),
    "deis-t2": (partial(deis, order=2), adams, {"top": 2, "time": vp_time}),
    "deis-t4": (partial(deis, order=4), adams, {"top": 4, "time": vp_time}),
    "deis-t3-vp": (partial(deis, frame=VP(9.0, 0.2)), adams, {"top": 3, "time": VPPath(9.0, 0.2).at}),
    "deis-t3-flow": (partial(deis, frame=FLOW), adams, {"top": 3, "time": lambda s: s / (1 + s)}),
    "deis-t3-trig": (partial(deis, frame=TRIG), adams, {"top": 3, "time": math.atan}),
    "deis-rho3": (partial(deis, basis="rho"), adams, {"top": 3}),
    "deis-lambda4": (partial(deis, order=4, basis="lambda"), adams, {"top": 4, "time": math.log}),
    **{f"res-{n}m": (partial(res_multistep, order=n), exponential_adams, {"top": n}) for n in (1, 2, 3, 4)},
    **{f"unipc-{n}": noisy(n, predict="x0") for n in (1, 2, 3, 4)},
    **{f"unipc-{n}-bh1": noisy(n, variant="bh1") for n in (1, 2, 3)},
    **{f"unipc-{n}-noise": noisy(n, predict="noise") for n in (1, 2, 3, 4)},
    "unipc-2-bh1-noise": noisy(2, variant="bh1", predict="noise"),
    "unipc-3-falling": noisy(3, lower_order_final=True),
    "unipc-3-noise-falling": noisy(3, lower_order_final=True, predict="noise"),
    "unip-3": noisy(3, corrector=False),
    "unipc-3-some": noisy(3, disable_corrector=(0,)),
}


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("ends", ["zero", "min"])
def test_every_solver_is_its_published_recurrence(name: str, ends: str) -> None:
    solver, recurrence, options = PUBLISHED[name]
    sigmas = TO_ZERO if ends == "zero" else TO_MIN
    x = float(sigmas[0]) * start() / START
    wanted = recurrence(problem(), x, sigmas.tolist(), **options)
    found = sample(problem(), x, solver(sigmas))
    assert float((found - wanted).abs().max()) < 1e-12 * max(1.0, float(wanted.abs().max()))


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("top", [80.0, 1e8])
def test_every_row_carries_data_and_noise_to_its_level(name: str, top: float) -> None:
    """Of x = m + sigma n and D = m: the weights must add up to 1 for m and to the next level for n."""
    table = PUBLISHED[name][0](karras(9, 0.02, top))
    for k in range(table.rows):
        P, W = table.P[k], table.W[k]
        assert abs(float(P.sum() + W.sum()) - 1) <= 1e-14 * float(1 + P.abs().sum() + W.abs().sum())
        levels = table.levels[: k + 1].flip(0)[: len(P)]
        noise = P[: len(levels)] * levels
        assert abs(float(noise.sum() - table.levels[k + 1])) <= 1e-14 * float(noise.abs().sum())


@pytest.mark.parametrize("name", PUBLISHED)
def test_float32_from_pure_noise_stays_finite(name: str) -> None:
    table = PUBLISHED[name][0](karras(9, 0.02, 1e8))
    found = sample(problem(), (1e7 * start()).float(), table)
    assert found.dtype == torch.float32
    assert found.isfinite().all()


@pytest.mark.parametrize("name", PUBLISHED)
@pytest.mark.parametrize("steps", [1, 2, 7])
@pytest.mark.parametrize("to_zero", [True, False])
def test_counted_evaluations(name: str, steps: int, to_zero: bool) -> None:
    solver, recurrence, options = PUBLISHED[name]
    table = solver(karras(steps, 0.02, 20.0, to_zero=to_zero))
    counted = CountingDenoiser(problem())
    sample(counted, 2 * start(), table)
    stages = {dpm: options.get("top"), dpm_pp: 1 + len(options.get("r", ())), exponential: 3}.get(recurrence, 1)
    assert stages is not None
    assert counted.nfe == table.nfe == stages * steps - (stages - 1 if to_zero else 0)


# ---- orders


def eased(steps: int) -> Tensor:
    """Steps even in log sigma after three growing ones, which make the low orders of a multistep start harmless."""
    whole = math.log(START / END)
    first = torch.tensor([(whole / steps) ** power for power in (3, 2, 1.5)], dtype=torch.float64).cumsum(0)
    rest = torch.linspace(float(first[-1]), whole, steps + 1, dtype=torch.float64)
    return START * (-torch.cat([first.new_zeros(1), first[:-1], rest])).exp()


@cache
def truth() -> Tensor:
    return problem().flow(start(), START, END, 800)


def order(solver: Solver, steps: int) -> float:
    errors = [float((sample(problem(), start(), solver(eased(n))) - truth()).abs().max()) for n in (steps, 2 * steps)]
    return math.log2(errors[0] / errors[1])


ORDERS: dict[str, tuple[Solver, int]] = {
    "dpm1": (dpm1, 1),
    "dpm2": (dpm2, 2),
    "dpm2-r": (partial(dpm2, r=0.3), 2),
    "dpm2-taylor": (partial(dpm2, r=0.8, taylor=True), 2),
    "dpm3": (dpm3, 3),
    "dpm3-r1": (partial(dpm3, r1=0.5), 3),
    "dpm3-r2": (partial(dpm3, r2=0.9), 2),
    "dpm-2m": (partial(dpm_multistep, order=2), 2),
    "dpm-2m-exact": (partial(dpm_multistep, order=2, exact=True), 2),
    "dpm-3m": (partial(dpm_multistep, order=3), 2),
    "dpm-3m-exact": (partial(dpm_multistep, order=3, exact=True), 3),
    "dpmpp2s": (dpmpp2s, 2),
    "dpmpp2s-taylor": (partial(dpmpp2s, r=0.7, taylor=True), 2),
    "dpmpp3s": (dpmpp3s, 3),
    "dpmpp3s-r1": (partial(dpmpp3s, r1=0.5), 3),
    "dpmpp3s-r2": (partial(dpmpp3s, r2=1.0), 2),
    "res-2": (partial(res, order=2), 2),
    "res-3": (partial(res, order=3), 3),
    "res-3-c": (partial(res, order=3, c2=0.3, c3=0.8), 3),
    **{f"res-{n}m": (partial(res_multistep, order=n), n) for n in (1, 2, 3, 4)},
    **{f"lms-{n}": (partial(lms, order=n), n) for n in (1, 2, 3, 4)},
    **{f"ipndm_v-{n}": (partial(ipndm_v, order=n), n) for n in (3, 4)},
    **{f"deis-t{n}": (partial(deis, order=n), n) for n in (2, 3, 4)},
    **{f"deis-lambda{n}": (partial(deis, order=n, basis="lambda"), n) for n in (2, 3, 4)},
    "deis-flow3": (partial(deis, frame=FLOW), 3),
    **{f"unipc-{n}-{p}": (partial(unipc, order=n, predict=p), n + 1) for n in (1, 2, 3, 4) for p in ("x0", "noise")},
    **{f"unipc-{n}-bh1": (partial(unipc, order=n, variant="bh1"), n + 1) for n in (1, 2)},
    **{f"unip-{n}": (partial(unipc, order=n, corrector=False), n) for n in (1, 2, 3, 4)},
}


@pytest.mark.parametrize("name", ORDERS)
def test_measured_order(name: str) -> None:
    solver, stated = ORDERS[name]
    # The tiny first steps of a method of order 5 reach rounding on finer grids.
    assert order(solver, {1: 64, 2: 72, 5: 96}.get(stated, 128)) == pytest.approx(stated, abs=0.15)


def test_a_table_measures_the_order_of_its_solver() -> None:
    assert dpmpp3s(TO_MIN).order() == pytest.approx(3, abs=0.15)
    assert res(TO_MIN, 3, c2=0.4).order(FLOW) == pytest.approx(3, abs=0.15)


# ---- the same method under two names


def same(one: Tableau, other: Tableau, first: int = 0, tolerance: float = 1e-12) -> bool:
    """Whether two tables have the same weights from row ``first`` on, relative to the largest of their kind."""
    assert torch.equal(one.levels, other.levels)
    assert torch.equal(one.sigmas, other.sigmas)
    for key in ("P", "W"):
        a, b = (getattr(t, key)[first:] for t in (one, other))
        width = max(a.shape[1], b.shape[1])
        a, b = (torch.nn.functional.pad(t, (0, width - t.shape[1])) for t in (a, b))
        if float((a - b).abs().max()) > tolerance * float(a.abs().max()):
            return False
    return True


UNCORRECTED: Solver = partial(unipc, corrector=False)
IDENTITIES: dict[str, tuple[Solver, Solver, int]] = {
    # name: (solver, solver, the first row from which they agree)
    **{
        f"{name} is euler": (solver, euler, 0)
        for name, solver in {
            "dpm1": dpm1,
            "lms 1": partial(lms, order=1),
            "deis 1": partial(deis, order=1),
            "res 1m": partial(res_multistep, order=1),
            "dpm_multistep 1": partial(dpm_multistep, order=1),
            "dpm_single 1": partial(dpm_single, orders=1),
            "unip 1": partial(UNCORRECTED, order=1),
            "unip 1 noise": partial(UNCORRECTED, order=1, predict="noise"),
        }.items()
    },
    "dpm_single 2 is dpm2": (partial(dpm_single, orders=2), dpm2, 0),
    "dpm_single 3 is dpm3": (dpm_single, dpm3, 0),
    "res 2 is 2S taylor": (partial(res, c2=0.3), partial(dpmpp2s, r=0.3, taylor=True), 0),
    "res 3 is 3S": (partial(res, order=3, c2=1 / 3, c3=2 / 3), dpmpp3s, 0),
    "res 2m is exact 2M": (res_multistep, partial(dpmpp, exact=True), 0),
    "res 3m is exact 3M": (partial(res_multistep, order=3), partial(dpmpp, order=3, exact=True), 0),
    "unip 2 is 2M": (partial(UNCORRECTED, order=2), dpmpp2m, 0),
    "unip 2 falling is 2M": (partial(UNCORRECTED, lower_order_final=True), partial(dpmpp2m, lower_order_final=True), 0),
    "unip 2 noise is DPM 2M": (partial(UNCORRECTED, predict="noise"), dpm_multistep, 0),
    "unip 3 is exact 3M": (partial(UNCORRECTED, order=3), partial(dpmpp, order=3, exact=True), 2),
    "unip 4 is res 4m": (partial(UNCORRECTED, order=4), partial(res_multistep, order=4), 3),
    "unip 3 noise": (partial(UNCORRECTED, order=3, predict="noise"), partial(deis, basis="lambda"), 2),
    "bh1 is bh2 at 3": (partial(unipc, order=3), partial(unipc, order=3, variant="bh1"), 3),
    "bh1 is bh2 at 4": (partial(unipc, order=4), partial(unipc, order=4, variant="bh1"), 3),
    "no corrector anywhere": (UNCORRECTED, partial(unipc, disable_corrector=range(7)), 0),
    "lambdaAB is exact DPM 3M": (partial(deis, basis="lambda"), partial(dpm_multistep, order=3, exact=True), 0),
    "rhoAB is LMS": (partial(deis, order=4, basis="rho"), lms, 0),
    "tAB in sigma is LMS": (partial(deis, order=4, frame=EDM), lms, 0),
    "iPNDM_v is LMS": (ipndm_v, lms, 0),
    "iPNDM_v 2 as published": (partial(ipndm_v, order=2, compat="diff-sampler"), partial(lms, order=2), 0),
}


@pytest.mark.parametrize("name", IDENTITIES)
def test_the_same_method_under_two_names(name: str) -> None:
    one, other, first = IDENTITIES[name]
    assert same(one(TO_MIN), other(TO_MIN), first)
    assert first == 0 or not same(one(TO_MIN), other(TO_MIN))


def test_the_variants_of_unipc_differ_where_a_weight_is_fixed() -> None:
    for top in (1, 2):
        assert not same(unipc(TO_MIN, top), unipc(TO_MIN, top, variant="bh1"), 3, 1e-3)


@pytest.mark.parametrize("top", [1, 2, 3, 4])
def test_adams_weights_of_equal_steps(top: int) -> None:
    even = torch.linspace(10.0, 2.0, 9, dtype=torch.float64)
    assert same(lms(even, top), ipndm(even, top))
    assert top == 1 or not same(lms(TO_MIN, top), ipndm(TO_MIN, top), tolerance=1e-3)


@pytest.mark.parametrize(
    ("levels", "order", "weights"),
    [([1.7, 0.8, 0.3, 0.0], 3, [1.78, -1.04, 0.27]), ([5.0, 4.0, 3.0, 2.0, 1.0], 4, [2.375, -2.708, 1.792, -0.458])],
)
def test_published_weights_of_variable_ipndm(levels: list[float], order: int, weights: list[float]) -> None:
    grid = torch.tensor(levels, dtype=torch.float64)
    table = ipndm_v(grid, order, compat="diff-sampler")
    step = float(grid[-1] - grid[-2])
    found = [-float(table.W[-1, j]) * levels[-2 - j] / step for j in range(order)]
    assert found == pytest.approx(weights, abs=6e-3 if order == 3 else 6e-4)
    exact = lagrange_integrals(grid[-1 - order : -1].flip(0), levels[-2], levels[-1]) / step
    assert exact.tolist() == pytest.approx(
        [1.45, -0.53, 0.083] if order == 3 else [55 / 24, -59 / 24, 37 / 24, -9 / 24], abs=5e-3
    )


def test_dpm_fast() -> None:
    wanted = {1: (1,), 2: (2,), 3: (2, 1), 4: (3, 1), 5: (3, 2), 6: (3, 2, 1), 10: (3, 3, 3, 1), 12: (3, 3, 3, 2, 1)}
    for nfe, orders in wanted.items():
        assert fast_orders(nfe) == orders
        table = dpm_single(logsnr(len(orders), END, START, to_zero=False), orders)
        assert table.nfe == nfe
    stored = json.loads(table.to_json())["meta"]
    assert same(table, build(stored["solver"], logsnr(5, END, START, to_zero=False), **stored["options"]))


@pytest.mark.parametrize("z", [-25.0, -3.0, -1.0001, -0.9999, -1e-3, 1e-9, 0.5, 1.0, 20.0])
def test_phi_functions(z: float) -> None:
    """phi_k(z) is the integral over [0, 1] of e^((1 - t) z) t^(k-1) / (k-1)!."""
    at, weights = np.polynomial.legendre.leggauss(60)
    t = 0.5 + 0.5 * at
    assert phi(0, z) == pytest.approx(math.exp(z), rel=1e-14)
    for k in (1, 2, 3, 4, 5):
        wanted = float((0.5 * weights * np.exp((1 - t) * z) * t ** (k - 1)).sum()) / math.factorial(k - 1)
        assert phi(k, z) == pytest.approx(wanted, rel=1e-12)


@pytest.mark.parametrize("nodes", [[3.0], [1.0, 2.0, 4.5], [1.0, 1e2, 1e5, 1e8]])
def test_lagrange_integrals(nodes: list[float]) -> None:
    """Exact for every power that the nodes determine, also on levels that lie decades apart."""
    found = lagrange_integrals(torch.tensor(nodes, dtype=torch.float64), nodes[0], 0.02)
    for power in range(len(nodes)):
        wanted = (0.02 ** (power + 1) - nodes[0] ** (power + 1)) / (power + 1)
        terms = [float(w) * n**power for w, n in zip(found, nodes, strict=True)]
        assert sum(terms) == pytest.approx(wanted, abs=1e-13 * sum(map(abs, terms)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dpm2(TO_MIN, r=0.0), "0 < r <= 1"),
        (lambda: dpm3(TO_MIN, r1=0.7), "0 < r1 < r2"),
        (lambda: dpm3(TO_MIN, r2=1.5), "0 < r2 <= 1"),
        (lambda: dpm_single(TO_MIN, (3, 2)), "each of its 7 steps"),
        (lambda: dpm_single(TO_MIN, 4), "order of 1, 2 or 3"),
        (lambda: fast_orders(0), ">= 1, got 0"),
        (lambda: dpm_multistep(TO_MIN, 4), "orders 1, 2 and 3"),
        (lambda: dpmpp2s(TO_MIN, r=2), "0 < r <= 1"),
        (lambda: dpmpp3s(TO_MIN, r1=0.0), "0 < r1 < r2"),
        (lambda: res(TO_MIN, 4), "orders 2 and 3"),
        (lambda: res(TO_MIN, c2=0.0), "0 < c2 <= 1"),
        (lambda: res(TO_MIN, 3, c2=2 / 3), "other than 2/3"),
        (lambda: res(TO_MIN, 3, c2=1.0), "other than 2/3 and c3"),
        (lambda: res_multistep(TO_MIN, 5), "orders 1, 2, 3 and 4"),
        (lambda: deis(TO_MIN, 0), "orders 1, 2, 3 and 4"),
        (lambda: deis(TO_MIN, basis="lamda"), "did you mean 'lambda'"),
        (lambda: deis(TO_MIN, basis="rho", frame=FLOW), "basis='t' only"),
        (lambda: deis(TO_MIN, sigma_min=2.0, sigma_max=1.0), "0 < sigma_min < sigma_max"),
        (lambda: lms(TO_MIN, 5), "orders 1, 2, 3 and 4"),
        (lambda: ipndm_v(TO_MIN, 5), "orders 1, 2, 3 and 4"),
        (lambda: ipndm_v(TO_MIN, compat="diffusers"), "compat of ipndm_v"),
        (lambda: unipc(TO_MIN, 5), "orders 1, 2, 3 and 4"),
        (lambda: unipc(TO_MIN, variant="bh3"), "did you mean"),
        (lambda: unipc(TO_MIN, predict="eps"), "prediction of unipc"),
        (lambda: unipc(TO_MIN, disable_corrector=(1, 7)), r"steps 0 to 6 .* got \[7\]"),
        (lambda: unipc(TO_MIN[:1]), "at least two levels"),
    ],
)
def test_bad_calls(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
