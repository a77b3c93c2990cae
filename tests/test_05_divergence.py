"""Divergences by quadrature against closed forms, and the benchmark that measures students with them."""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from fewstep import Mixture
from fewstep.errors import InputError
from fewstep.measure.divergence import (
    axes_of,
    divergences,
    integrated,
    log_density,
    mode_shares,
    smoothed,
)
from fewstep.models.frozen import frozen, network_under

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
H = 0.04


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, ModuleType]]:
    """The programs as modules, importable as when they run as scripts."""
    sys.path.insert(0, str(BENCHMARKS))
    threads = torch.get_num_threads()
    names = ("tasks", "divergences")
    yield {name: importlib.import_module(name) for name in names}
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCHMARKS))
    for name in names:
        sys.modules.pop(name, None)


def gaussian(mean: list[float], variance: list[float]) -> Mixture:
    return Mixture(torch.tensor([mean]), torch.tensor([variance]))


def two(weights: tuple[float, float]) -> Mixture:
    """Two modes that are forty deviations apart, as pictures of one row and two pixels."""
    return Mixture(torch.tensor([[-1.0, 0.0], [1.0, 0.0]])[:, None, None], 0.05**2, weights)


def kl(p: Mixture, q: Mixture, h: float) -> float:
    """Of two Gaussians, both smoothed."""
    v, w = p.variances + h**2, q.variances + h**2
    return float(0.5 * (v / w + (p.means - q.means) ** 2 / w - 1 + (w / v).log()).sum())


def exact(p: Mixture, q: Mixture, h: float, **options: Any) -> Any:
    """The divergences of two known laws, both smoothed."""
    axes = axes_of(p.draw(20_000).flatten(1), q, h)
    places = torch.stack(torch.meshgrid(*axes, indexing="ij"), -1).flatten(0, -2)
    cell = math.prod(float(a[1] - a[0]) for a in axes)
    return integrated(log_density(p, places, h).exp(), log_density(q, places, h), cell, **options)


PAIRS = {
    "one value": (gaussian([0.1], [0.02]), gaussian([-0.1], [0.03])),
    "two values": (gaussian([0.1, -0.1], [0.03, 0.02]), gaussian([0.0, 0.0], [0.02, 0.03])),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_the_quadrature_is_the_closed_form_of_gaussians(pair: str) -> None:
    p, q = PAIRS[pair]
    found = exact(p, q, H, floor=1e-12)
    assert found.reverse_kl == pytest.approx(kl(p, q, H), abs=2e-4)
    assert found.forward_kl == pytest.approx(kl(q, p, H), abs=2e-4)
    assert exact(p, p, H).reverse_kl == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("pair", PAIRS)
def test_draws_measure_what_the_laws_themselves_do(pair: str) -> None:
    p, q = PAIRS[pair]
    found, wanted = divergences(p.draw(200_000, seed=3), q, bandwidth=H), exact(p, q, H)
    assert found.reverse_kl == pytest.approx(wanted.reverse_kl, abs=0.01)
    assert found.forward_kl == pytest.approx(wanted.forward_kl, abs=0.02)
    assert found.jensen_shannon == pytest.approx(wanted.jensen_shannon, abs=0.002)


def test_draws_of_a_mixture_measure_its_distance_from_another() -> None:
    p, q = two((0.3, 0.7)), two((0.6, 0.4))
    found = divergences(p.draw(200_000, seed=4), q, bandwidth=0.02)
    assert found.reverse_kl == pytest.approx(0.3 * math.log(0.5) + 0.7 * math.log(1.75), abs=0.004)
    assert found.forward_kl == pytest.approx(0.6 * math.log(2) + 0.4 * math.log(4 / 7), abs=0.004)


def test_the_bias_of_equal_laws_is_the_stated_one_and_falls_with_the_draws(programs: dict[str, ModuleType]) -> None:
    law = programs["tasks"].ring()
    stated = {n: 8 * (1 + 0.05**2 / H**2) ** 2 / (2 * n) for n in (20_000, 200_000)}
    for n, bias in stated.items():
        found = divergences(law.draw(n, seed=5), law, bandwidth=H)
        assert 0.5 * bias < found.reverse_kl < 1.5 * bias
        assert 0.5 * bias < found.forward_kl < 1.5 * bias
        assert 0 < found.jensen_shannon < bias


def test_a_missing_mode_costs_its_weight_times_the_logarithm_of_the_floor() -> None:
    law = two((0.25, 0.75))
    samples = Mixture(law.means[1:], law.variances[1:]).draw(100_000, seed=6)
    for floor in (1e-6, 1e-3):
        found = divergences(samples, law, bandwidth=0.02, floor=floor)
        assert found.reverse_kl == pytest.approx(-math.log(0.75), abs=0.002)
        assert found.forward_kl == pytest.approx(-0.25 * math.log(floor) + 0.75 * math.log(0.75), abs=0.003)
        wanted = -0.5 * math.log(0.875) + 0.125 * math.log(2) + 0.375 * math.log(0.75 / 0.875)
        assert found.jensen_shannon == pytest.approx(wanted, abs=0.002)


def test_mass_between_modes_costs_in_reverse_what_the_law_says_of_it() -> None:
    law = two((0.5, 0.5))
    samples = law.draw(20_000, seed=7)
    # Nearer to one mode, so that the logarithm of the law is a parabola there.
    samples[:1000] = torch.tensor([0.5, 0.3])
    reverse = divergences(samples, law, bandwidth=0.02).reverse_kl
    # A twentieth of the samples in one place is a Gaussian as wide as the kernel.
    log_p = math.log(0.05 / (2 * math.pi * 0.02**2)) - 1
    log_q = float(log_density(law, torch.tensor([[0.5, 0.3]]), 0.02)) - 0.02**2 / (0.05**2 + 0.02**2)
    assert reverse == pytest.approx(0.95 * math.log(0.95) + 0.05 * (log_p - log_q), abs=0.008)
    assert divergences(samples, law, bandwidth=0.02).forward_kl < 0.1 < 2 < reverse


def test_counting_in_cells_does_not_widen_the_density() -> None:
    h = 0.03
    points = gaussian([0.2, -0.3], [h**2, h**2]).draw(200_000, seed=8)
    axes = axes_of(points, gaussian([0.0, 0.0], [0.01, 0.01]), h)
    density = smoothed(points, axes, h)
    cell = float(axes[0][1] - axes[0][0]) * float(axes[1][1] - axes[1][0])
    assert float(density.sum()) * cell == pytest.approx(1, abs=1e-9)
    for value, axis in enumerate(axes):
        weights = density.sum(1 - value) * cell
        mean = float((weights * axis).sum())
        spread = float((weights * (axis - mean) ** 2).sum())
        # Without the correction the variance would be larger by h^2 / 24.
        assert abs(spread - float(points[:, value].var()) - h**2) < 0.004 * h**2
        assert mean == pytest.approx(float(points[:, value].mean()), abs=1e-4)


def test_shares_of_modes() -> None:
    law = Mixture(torch.tensor([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]]), torch.tensor([[0.01, 0.04]]), [0.5, 0.49, 0.01])
    # Two deviations from the first in either value; 2.9 and 3.1 from the second; between all.
    points = torch.tensor([[0.2, 0.0], [0.0, 0.4], [1.0, 0.58], [1.0, 0.62], [0.5, 0.0]])
    found = mode_shares(points.repeat(20, 1), law)
    assert found.shares == pytest.approx((0.4, 0.2, 0.0)) and found.modes == 2
    assert found.between == pytest.approx(0.4)
    own = mode_shares(law.draw(200_000, seed=9), law)
    assert own.between == pytest.approx(math.exp(-4.5), abs=0.001) and own.modes == 3
    # Half a percent of the samples is enough for a mode of one.
    few = torch.cat([torch.zeros(199, 2), torch.tensor([[0.0, 2.0]])])
    assert mode_shares(few, law).modes == 2


LAW = two((0.5, 0.5))
GOOD = LAW.draw(10)
NAN = GOOD.clone()
NAN[3] = math.nan
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: divergences(GOOD[..., :1], LAW, bandwidth=H), "samples are (10, 1, 1, 1), expected (N, ...) of 2 values"),
    (lambda: divergences(GOOD[:0], LAW, bandwidth=H), "with N > 0"),
    (lambda: divergences(NAN, LAW, bandwidth=H), "1 of 10 samples are not finite, the first is number 3"),
    (lambda: divergences(GOOD, LAW, bandwidth=0.0), "bandwidth > 0 and 0 < floor < 1, got 0.0 and 1e-06"),
    (lambda: divergences(GOOD, LAW, bandwidth=H, floor=1.0), "got 0.04 and 1.0"),
    (lambda: divergences(GOOD, LAW, bandwidth=1e-4), "take a larger bandwidth"),
    (lambda: divergences(1e6 * GOOD, LAW, bandwidth=H), "leave out samples far away"),
    (lambda: divergences(torch.zeros(5, 3), gaussian([0.0] * 3, [1.0] * 3), bandwidth=H), "the law has 3 values"),
    (lambda: mode_shares(GOOD, LAW, reach=0.0), "reach > 0 standard deviations, got 0.0"),
    (lambda: mode_shares(torch.zeros(5), LAW), "samples are (5,)"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError) as error:
        call()
    assert message in str(error.value)


def test_the_tasks_score_their_own_draws_well(programs: dict[str, ModuleType]) -> None:
    tasks = programs["tasks"]
    for name, law, modes in (("ring", tasks.ring(), 8), ("grid25", tasks.grid25(), 25)):
        how = tasks.task(name)
        assert how.load().shape == (1, 1, 2) and float(law.means.abs().max()) + 3 * 0.05 < 1
        found = how.score(law.draw(2000, seed=10), 3)
        assert found["modes"] == modes and found["energy"] < 0.003 and found["mode_kl"] < 0.02
        assert found["precision"] == pytest.approx(0.989, abs=0.008)
        one = how.score(law.means[:1].expand(2000, 1, 1, 2), 3)
        assert one["modes"] == 1 and one["energy"] > 0.1
        assert one["mode_kl"] == pytest.approx(math.log(modes))


def test_the_wrong_ring_is_wrong_in_two_modes(programs: dict[str, ModuleType]) -> None:
    wrong, right = programs["divergences"].wrong_ring(), programs["tasks"].ring()
    apart = torch.cdist(right.means.flatten(1), wrong.means.flatten(1)).amin(1)
    assert len(wrong.means) == 7 and int((apart < 1e-9).sum()) == 6
    # One is three of its deviations away, and nothing is nearer to the missing one than its neighbours.
    assert sorted(apart.tolist())[-2:] == pytest.approx([0.15, 2 * 0.7 * math.sin(math.pi / 8)])


def flags_of(programs: dict[str, ModuleType], folder: Path, **changed: Any) -> Any:
    made = programs["divergences"].Flags(
        iterations=2, batch=8, width=16, start_steps=2, samples=500, seeds=(0,), out=folder / "out",
        results=folder, page=folder / "page.md",
    )  # fmt: skip
    return replace(made, **changed)


def test_the_exact_teacher_answers_and_its_network_is_copied(programs: dict[str, ModuleType], tmp_path: Path) -> None:
    bench = programs["divergences"]
    start = bench.started(flags_of(programs, tmp_path), "wrong-ring")
    law, D = bench.PROBLEMS["wrong-ring"].teacher, start.denoiser
    x, sigma = torch.randn(6, 1, 1, 2, generator=torch.Generator().manual_seed(0)).requires_grad_(), torch.rand(6) + 0.1
    teacher = frozen(D)
    assert torch.equal(teacher(x, sigma), law(x, sigma)) and teacher(x, sigma).dtype == x.dtype
    assert not torch.equal(network_under(D)(x, sigma), law(x, sigma))
    (slope,) = torch.autograd.grad(teacher(x, sigma).sum(), x)
    assert float(slope.abs().max()) > 0
    students = bench.method_of(flags_of(programs, tmp_path), bench.CASES["vsd"]).roles(start)
    made = students["student"].start()
    assert torch.equal(made(x, sigma), network_under(D)(x, sigma))
    right = replace(start, denoiser=bench.ExactTeacher(network_under(D), bench.RING))
    assert start.fingerprint() != right.fingerprint()


def test_the_benchmark_runs_once_and_keeps_what_it_measured(programs: dict[str, ModuleType], tmp_path: Path) -> None:
    bench = programs["divergences"]
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bench.MARK}old\n{bench.MARK}after\n")
    flags = flags_of(programs, tmp_path, problems=("wrong-ring",), cases=("dmd2, gan 0", "dmd2, gan 0.3"))
    bench.main(flags)
    body = json.loads((tmp_path / "divergences.json").read_text())
    assert [(r["name"], r["seed"], r["iterations"]) for r in body["rows"]] == [
        ("dmd2, gan 0", 0, 2),
        ("dmd2, gan 0.3", 0, 2),
    ]
    for row in body["rows"]:
        assert len(row["shares"]) == 8 and len(row["teacher_shares"]) == 7
        assert 0 <= row["jensen_shannon"] <= math.log(2) and row["forward_kl"] <= -math.log(1e-6)
        assert sum(row["shares"]) == pytest.approx(1 - row["between"], abs=1e-3)
    assert body["rows"][0]["reverse_kl"] != body["rows"][1]["reverse_kl"]
    assert [c["less"] for c in body["claims"]] == ["dmd2, gan 0.3"]
    assert body["floor"]["grid25"]["jensen_shannon"] < 0.002
    written = page.read_text()
    assert written.startswith("before\n") and written.endswith("after\n") and "old" not in written
    assert "## wrong-ring" in written and "## grid25" not in written
    assert (tmp_path / "img" / "divergences.png").read_bytes()[1:4] == b"PNG"
    bench.main(replace(flags, cases=("dmd2, gan 0",)))
    assert json.loads((tmp_path / "divergences.json").read_text())["rows"] == body["rows"]


def test_claims_hold_only_where_the_seeds_agree(programs: dict[str, ModuleType]) -> None:
    def rows(emd: Tensor, vsd: Tensor) -> list[dict[str, Any]]:
        named = {"emd": emd, "vsd": vsd}
        return [
            {"problem": "ring", "name": name, "seed": i, "forward_kl": float(v), "between": 0.0, "jensen_shannon": 0.0}
            for name, values in named.items()
            for i, v in enumerate(values)
        ]

    def told(emd: list[float], vsd: list[float]) -> str:
        found = programs["divergences"].claims(rows(torch.tensor(emd), torch.tensor(vsd)))
        (one,) = [c for c in found if c["in"] == "forward_kl"]
        return str(one["it"])

    assert told([1.0, 2.0], [3.0, 4.0]) == "holds"
    assert told([3.0, 4.0], [1.0, 2.0]) == "fails"
    assert told([1.0, 4.0], [2.0, 3.0]) == "open"


def test_unknown_names_are_refused(programs: dict[str, ModuleType], tmp_path: Path) -> None:
    for changed, message in (({"problems": ("rings",)}, "problem 'rings'"), ({"cases": ("vds",)}, "case 'vds'")):
        with pytest.raises(InputError, match=message):
            programs["divergences"].main(flags_of(programs, tmp_path, **changed))
