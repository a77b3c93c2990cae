"""Tables as files, slices and programs, and the loop that runs them."""

from __future__ import annotations

import json
import math
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fewstep import FLOW, InputError, Mixture, Noise, Step, Tableau, sample, trajectory
from fewstep.core.tableau import Builder
from fewstep.grid import karras, logsnr
from fewstep.solve import dpmpp2m, dpmpp3m, euler, heun, ipndm3, ipndm4

GRID = karras(6, 0.05, 12.0)


def problem() -> Mixture:
    generator = torch.Generator().manual_seed(8)
    return Mixture(torch.randn(3, 5, generator=generator, dtype=torch.float64), 0.4, [1, 2, 3])


def start(n: int = 7) -> Tensor:
    return 12.0 * torch.randn(n, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def by_hand(D: Any, x: Tensor, table: Tableau, noise: Noise | None = None) -> Tensor:
    """The definition of a table, with nothing forgotten and nothing in place."""
    y, d, eps = [x], [], []
    for k in range(table.rows):
        s = float(table.sigmas[k])
        d.append(None if math.isnan(s) else D(y[k], s))
        eps.append(None if noise is None else noise.normal(x.shape[1:], "step", k, dtype=x.dtype))
        total = torch.zeros_like(x)
        for key, material in (("P", y), ("W", d), ("Z", eps)):
            for j, w in enumerate(getattr(table, key)[k].tolist()):
                if w != 0:
                    total = total + w * material[k - j]  # type: ignore[operator]
        y.append(total)
    return y[-1]


def stochastic() -> Tableau:
    """Points, outputs and noises from two rows back, and one row that makes no call."""
    table = Builder(12.0)
    table.row(12.0, 4.0, {0: 0.3}, {0: 0.7}, {0: 0.5})
    table.row(4.0, 2.0, {1: 0.5, 0: 0.01}, {1: 0.4, 0: 0.1}, {1: 0.2})
    table.row(None, 2.0, {2: 1.0}, {1: 0.05}, {0: 0.125, 2: -0.25})
    table.row(2.0, 0.0, {3: 0.1}, {3: 0.9}, {2: 0.125})
    return table.build("hand-made", note="two rows back")


ALL = {
    "euler": euler(GRID),
    "heun": heun(GRID),
    "heun-flow": heun(GRID, frame=FLOW),
    "dpmpp2m": dpmpp2m(GRID),
    "dpmpp3m": dpmpp3m(GRID),
    "ipndm4": ipndm4(GRID),
    "hand-made": stochastic(),
}
every_table = pytest.mark.parametrize("table", ALL.values(), ids=ALL.keys())


# ---- files

numbers = st.floats(-1e12, 1e12, allow_subnormal=True)


def same(a: Tableau, b: Tableau) -> bool:
    bits = [
        torch.equal(getattr(a, k).view(torch.int64), getattr(b, k).view(torch.int64)) for k in ("levels", "P", "W", "Z")
    ]
    return all(bits) and torch.equal(a.sigmas.nan_to_num(-1.0), b.sigmas.nan_to_num(-1.0))


@every_table
def test_json_keeps_every_bit(table: Tableau) -> None:
    again = Tableau.from_json(table.to_json())
    assert same(again, table)
    assert (again.name, dict(again.meta), again.nfe) == (
        table.name,
        json.loads(json.dumps(dict(table.meta))),
        table.nfe,
    )
    assert "NaN" not in table.to_json()


@settings(max_examples=60, deadline=None)
@given(weights=st.lists(numbers, min_size=4, max_size=4), level=st.floats(1e-300, 1e300))
def test_json_keeps_any_finite_number(weights: list[float], level: float) -> None:
    table = Tableau([level], [level, 0.0], [weights[:1]], [weights[1:2]], [weights[2:3]], "x", {"w": weights[3]})  # type: ignore[arg-type]
    again = Tableau.from_json(table.to_json())
    assert same(again, table)
    assert again.meta["w"] == weights[3]


def broken(**changes: Any) -> str:
    body = json.loads(heun(karras(2, 0.1, 10.0)).to_json())
    body.update(changes)
    return json.dumps({k: v for k, v in body.items() if v is not ...})


REFUSED: dict[str, tuple[str, str]] = {
    "not JSON": ("{'levels': 1", "not JSON"),
    "empty": ("", "not JSON"),
    "a list": ("[1, 2]", "expected an object with format"),
    "another format": ('{"format": "pickle"}', "expected an object with format"),
    "no format": ("{}", "expected an object with format"),
    "a missing key": ('{"format": "fewstep-tableau/1", "name": "x"}', "missing.*'P'"),
    "an unknown key": (broken(extra=1), "unknown.*'extra'"),
    "a ragged table": (broken(P=[[1.0, 0.0], [1.0], [1.0, 0.0]]), "rectangular lists of numbers"),
    "text in a table": (broken(W=[["a", 0.0]] * 3), "rectangular lists of numbers"),
    "null in a table": (broken(W=[[None, 0.0]] * 3), "rectangular lists of numbers"),
    "meta that is no object": (broken(meta=5), "meta must be an object, got int"),
    "a number beyond floats": (broken().replace("10.0", "9" * 400), "rectangular lists of numbers"),
    "endless brackets": ("[" * 100_000, "not JSON"),
    "a flat table": (broken(P=[1.0, 1.0, 1.0]), r"P must be \(3, H\)"),
    "a short table": (broken(W=[[1.0, 0.0]]), r"W must be \(3, H\)"),
    "short levels": (broken(levels=[10.0, 0.1]), r"levels must be \(4,\)"),
    "no rows": (broken(sigmas=[], levels=[1.0], P=[], W=[], Z=[]), "K >= 1"),
    "a sigma of 0": (broken(sigmas=[10.0, 0.0, 0.1]), "sigmas must be positive"),
    "a negative level": (broken(levels=[10.0, 0.1, -0.1, 0.0]), "levels must be finite and >= 0"),
    "nan in a table": (broken(P=[[math.nan, 0.0], [1.0, 0.0], [0.0, 0.0]]), "P holds nan or inf in row 0"),
    "inf in a table": (broken(Z=[[0.0], [0.0], [math.inf]]), "Z holds nan or inf in row 2"),
    "an infinite level": (broken(levels=[math.inf, 0.1, 0.1, 0.0]), "levels must be finite"),
    "an infinite sigma": (broken(sigmas=[math.inf, 0.1, 0.1]), "sigmas must be positive"),
    "an output of a silent row": (broken(sigmas=[10.0, None, 0.1]), "weighs the output of row 1, which has none"),
    "history before the start": (broken(P=[[1.0, 0.5], [1.0, 0.0], [1.0, 0.0]]), "row 0 needs the point of row -1"),
    "noise before the start": (broken(Z=[[0.0, 1.0]] * 3), "row 0 needs the noise of row -1"),
}


@pytest.mark.parametrize(("text", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_a_bad_file_is_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Tableau.from_json(text)


# ---- slices


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("table", [ALL["euler"], ALL["heun"], ALL["heun-flow"]], ids=["euler", "heun", "heun-flow"])
def test_parts_of_a_single_step_solver_compose(table: Tableau, dtype: torch.dtype) -> None:
    x = start().to(dtype)
    whole = sample(problem(), x, table)
    for cut in range(2, table.rows, 2):
        middle = sample(problem(), x, table[:cut])
        assert table[cut:].start == float(table.levels[cut])
        assert torch.equal(sample(problem(), middle, table[cut:]), whole)
        assert table[:cut].nfe + table[cut:].nfe == table.nfe


@pytest.mark.parametrize("name", ["dpmpp2m", "dpmpp3m", "ipndm4", "hand-made"])
def test_a_part_that_needs_earlier_rows_is_refused(name: str) -> None:
    with pytest.raises(InputError, match=r"row 0 needs the (point|denoiser output|noise) of row -1, before the start"):
        ALL[name][1:]
    assert ALL[name][:2].rows == 2


def test_bad_slices_are_refused() -> None:
    table = ALL["euler"]
    for bad in (slice(2, 2), slice(5, 1), slice(99, None)):
        with pytest.raises(InputError, match="empty"):
            table[bad]
    for strange in (2, slice(0, 4, 2)):
        with pytest.raises(InputError, match="sliced by rows"):
            table[strange]  # type: ignore[index]


# ---- the loop


@every_table
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_sample_is_the_definition(table: Tableau, dtype: torch.dtype) -> None:
    x, noise = start().to(dtype), Noise.of(3, 7)
    found = sample(problem(), x, table, noise=noise)
    wanted = by_hand(problem(), x, table, noise)
    assert found.dtype == dtype
    assert float((found - wanted).abs().max()) < (1e-12 if dtype == torch.float64 else 1e-4)
    assert torch.equal(x, start().to(dtype))
    assert torch.equal(table(problem(), x, noise=noise), found)


@every_table
def test_trajectory_is_sample(table: Tableau) -> None:
    x, noise = start(), Noise.of(3, 7)
    seen: list[Step] = []
    end = sample(problem(), x, table, noise=noise, on_step=seen.append)
    steps = list(trajectory(problem(), x, table, noise=noise))
    assert [s.k for s in steps] == list(range(table.rows + 1)) == [s.k for s in seen]
    assert [s.level for s in steps] == table.levels.tolist()
    assert torch.equal(steps[0].point, x)
    assert torch.equal(steps[-1].point, end)
    assert steps[-1].denoised is None
    for s, other in zip(steps, seen, strict=True):
        assert torch.equal(s.point, other.point)
        sigma = math.nan if s.k == table.rows else float(table.sigmas[s.k])
        if math.isnan(sigma):
            assert s.denoised is None
        else:
            assert s.denoised is not None
            assert torch.equal(s.denoised, problem()(s.point, sigma))


def test_trajectory_leaves_the_grad_mode_of_its_caller_alone() -> None:
    for step in trajectory(problem(), start().requires_grad_(), ALL["heun"]):
        assert torch.is_grad_enabled()
        assert step.k == 0 or not step.point.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_the_state_is_float32_or_wider(dtype: torch.dtype) -> None:
    kinds: set[torch.dtype] = set()

    def D(x: Tensor, sigma: Any, cond: Any = None) -> Tensor:
        kinds.add(x.dtype)
        return problem()(x, sigma).to(dtype)

    wide = torch.float64 if dtype == torch.float64 else torch.float32
    out = sample(D, start().to(dtype), ALL["dpmpp2m"])  # type: ignore[arg-type]
    assert out.dtype == wide
    assert kinds == {wide}


def test_the_denoiser_gets_the_condition_and_its_level() -> None:
    seen: list[tuple[float, Any]] = []

    def D(x: Tensor, sigma: Any, cond: Any = None) -> Tensor:
        seen.append((float(sigma), cond))
        return x * 0

    cond = {"label": torch.arange(7)}
    sample(D, start(), stochastic(), cond, noise=Noise.of(0, 7))  # type: ignore[arg-type]
    assert [s for s, _ in seen] == [12.0, 4.0, 2.0]
    assert all(c is cond for _, c in seen)


def test_gradients_through_every_step() -> None:
    x = start(3)
    for table in (ALL["heun"], ALL["ipndm4"], ALL["dpmpp3m"]):
        inside = x.clone().requires_grad_()
        out = sample(problem(), inside, table, grad=True)
        direction = torch.randn(out.shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
        (slope,) = torch.autograd.grad((out * direction).sum(), inside)
        step = 1e-4
        for i, j in ((0, 0), (1, 3), (2, 4)):
            bump = torch.zeros_like(x)
            bump[i, j] = step
            up, down = (sample(problem(), x + s * bump, table) for s in (1, -1))
            wanted = float(((up - down) * direction).sum()) / (2 * step)
            assert float(slope[i, j]) == pytest.approx(wanted, rel=1e-5, abs=1e-8)
        assert float(slope.abs().max()) > 1e-3
        plain = sample(problem(), inside, table)
        assert not plain.requires_grad
        assert float((plain - out.detach()).abs().max()) < 1e-12
        with torch.no_grad():
            assert not sample(problem(), inside, table, grad=True).requires_grad


# ---- memory


class Census:
    """A denoiser that counts which of the sampler's own tensors are alive whenever it has made an output."""

    def __init__(self) -> None:
        self.known: list[weakref.ref[Tensor]] = []
        self.most = 0

    def see(self, tensor: Tensor) -> None:
        if all(ref() is not tensor for ref in self.known):
            self.known.append(weakref.ref(tensor))

    def count(self) -> None:
        self.known = [ref for ref in self.known if ref() is not None]
        self.most = max(self.most, len(self.known))

    def __call__(self, x: Tensor, sigma: Any, cond: Any = None) -> Tensor:
        out = x * 0.5
        self.see(x)
        self.see(out)
        self.count()
        return out

    def on_step(self, step: Step) -> None:
        self.see(step.point)
        self.count()


MEMORY: list[tuple[Callable[[Tensor], Tableau], int]] = [
    (euler, 2),
    (heun, 4),
    (dpmpp2m, 3),
    (dpmpp3m, 4),
    (ipndm3, 6),
    (ipndm4, 8),
]


@pytest.mark.parametrize(("solver", "live"), MEMORY, ids=[s.__name__ for s, _ in MEMORY])
@pytest.mark.parametrize("rows", [20, 1000])
def test_no_more_tensors_live_than_the_table_says(solver: Callable[[Tensor], Tableau], live: int, rows: int) -> None:
    table = solver(logsnr(rows, 0.01, 10.0))
    assert table.live == live
    for run in (sample, trajectory):
        census = Census()
        # The start belongs to the caller, and is here kept alive to the end.
        x = torch.zeros(2, 3)
        if run is sample:
            sample(census, x, table, on_step=census.on_step)  # type: ignore[arg-type]
        else:
            for step in trajectory(census, x, table):  # type: ignore[arg-type]
                census.on_step(step)
                del step
        assert live <= census.most <= live + 1, "one more than the table says: the start, which the caller holds"
        # Without the start: a census that begins at the tenth call.
        late = Census()
        calls = 0

        def D(x: Tensor, sigma: Any, cond: Any = None, late: Census = late) -> Tensor:
            nonlocal calls
            calls += 1
            if calls == 10:
                late.known, late.most = [], 0
            return late(x, sigma)

        sample(D, torch.zeros(2, 3), table)  # type: ignore[arg-type]
        assert late.most == live


# ---- noise


def ancestral(a: float, b: float) -> Tableau:
    """One step of DDPM: the posterior of x at level b given x at level a and x0 = D."""
    table = Builder(a)
    table.row(a, b, {0: (b / a) ** 2}, {0: 1 - (b / a) ** 2}, {0: b * math.sqrt(a**2 - b**2) / a})
    return table.build("ddpm")


def test_an_ancestral_row_has_the_posterior_mean_and_variance() -> None:
    a, b, n = 3.0, 1.2, 20_000
    D = Mixture(torch.tensor([[0.3, -0.5]]), 0.49)
    x = torch.tensor([[2.0, -1.0]], dtype=torch.float64).expand(n, 2)
    table = ancestral(a, b)
    assert table.noisy
    out = sample(D, x, table, noise=Noise.of(5, n))
    mean = (b / a) ** 2 * x[0] + (1 - (b / a) ** 2) * D(x[:1], a)[0]
    variance = b**2 * (a**2 - b**2) / a**2
    assert float((out.mean(0) - mean).abs().max()) < 5 * math.sqrt(variance / n)
    assert float((out.var(0) / variance - 1).abs().max()) < 5 * math.sqrt(2 / n)
    assert abs(float(torch.corrcoef(out.T)[0, 1])) < 5 / math.sqrt(n)


def test_each_sample_has_its_own_noise() -> None:
    x, noise, table = start(), Noise.of(5, 7), stochastic()
    whole = sample(problem(), x, table, noise=noise)
    part = sample(problem(), x[2:5], table, noise=noise[2:5])
    assert float((part - whole[2:5]).abs().max()) < 1e-12
    assert float((sample(problem(), x, table, noise=Noise.of(6, 7)) - whole).abs().max()) > 0.01


def test_a_noise_can_be_used_again_by_a_later_row() -> None:
    table = Builder(1.0)
    table.row(None, 1.0, {0: 1.0}, {}, {0: 2.0})
    table.row(None, 1.0, {1: 1.0}, {}, {1: 3.0})
    table.row(None, 1.0, {2: 1.0}, {}, {0: -2.0, 1: -3.0})
    whole = table.build("there and back")
    assert whole.nfe == 0
    x, noise = start(), Noise.of(9, 7)
    seen = list(trajectory(problem(), x, whole, noise=noise))
    assert float((seen[-1].point - x).abs().max()) < 1e-12
    for k, factor in ((0, 2.0), (1, 3.0)):
        gap = seen[k + 1].point - seen[k].point - factor * noise.normal((5,), "step", k, dtype=torch.float64)
        assert float(gap.abs().max()) < 1e-12


def test_missing_or_other_noise_is_refused() -> None:
    with pytest.raises(InputError, match=r"'ddpm' adds noise: pass noise=Noise.of\(seed, 7\)"):
        sample(problem(), start(), ancestral(12.0, 1.0))
    with pytest.raises(InputError, match="8 sources for 7 samples"):
        sample(problem(), start(), ancestral(12.0, 1.0), noise=Noise.of(0, 8))
    assert not replace(ancestral(12.0, 1.0), Z=torch.zeros(1, 1)).noisy
