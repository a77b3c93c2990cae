"""The benchmark programs: their loops compute what our tables do, their tables are complete, and they run."""

from __future__ import annotations

import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fewstep import Mixture, Noise, sample
from fewstep.core.exact import bimodal
from fewstep.errors import InputError
from fewstep.grid import GRIDS, karras
from fewstep.solve import SOLVERS, build

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def programs() -> Iterator[dict[str, ModuleType]]:
    """The programs as modules, importable as when they run as scripts."""
    sys.path.insert(0, str(BENCHMARKS))
    threads = torch.get_num_threads()
    names = ("loops", "overhead", "solvers")
    yield {name: importlib.import_module(name) for name in names}
    torch.set_num_threads(threads)
    sys.path.remove(str(BENCHMARKS))
    for name in (*names, "exact"):
        sys.modules.pop(name, None)


@pytest.fixture
def problem() -> Mixture:
    return bimodal()


def test_every_plain_loop_computes_what_the_table_does(programs: dict[str, ModuleType], problem: Mixture) -> None:
    grid = karras(7, 0.002, 80.0, to_zero=False)
    x = torch.linspace(-90.0, 90.0, 12, dtype=torch.float64)[:, None]
    compared = set()
    for solver, (name, options) in programs["overhead"].OURS.items():
        table = build(name, grid, **options)
        noise = Noise.of(3, len(x))
        step = iter(range(table.rows))
        loops = programs["loops"].plain(
            solver,
            grid.tolist(),
            lambda x, noise=noise, step=step: noise.normal((1,), "step", next(step), dtype=x.dtype),
        )
        if "loop" not in loops:
            continue
        wanted = sample(problem, x, table, noise=noise)
        found = loops["loop"](problem, x)
        assert float((found - wanted).abs().max()) < 1e-11 * float(wanted.abs().max()), solver
        compared.add(solver)
        if "loop0d" in loops:
            rounded = loops["loop0d"](problem, x)
            assert float((rounded - wanted).abs().max()) < 1e-4 * float(wanted.abs().max()), solver
    assert compared == set(programs["overhead"].OURS) - {"unipc2", "unipc3"}


def test_overhead_runs_and_its_numbers_are_consistent(programs: dict[str, ModuleType], tmp_path: Path) -> None:
    overhead = programs["overhead"]
    overhead.main(
        overhead.Overhead(steps=(2, 3), solvers=("euler", "heun"), evaluations=2, least=1, compile="", results=tmp_path)
    )
    body = json.loads((tmp_path / "overhead.json").read_text())
    rows = {(r["solver"], r["steps"], r["name"]): r for r in body["rows"]}
    assert rows["heun", 3, "fewstep"]["evaluations"] == rows["heun", 3, "loop"]["evaluations"] == 6
    assert rows["euler", 2, "fewstep"]["evaluations"] == 2
    for ratio in body["ratios"]:
        own = rows[ratio["solver"], ratio["steps"], "fewstep"]["us_min"]
        peers = [r["us_min"] for key, r in rows.items() if key[:2] == (ratio["solver"], ratio["steps"])]
        assert ratio["ratio"] == pytest.approx(own / min(t for t in peers if t != own), abs=1e-3)
        assert (ratio in body["slower_than_fastest_peer"]) == (ratio["ratio"] > 1)
    assert len(body["ratios"]) == 4
    assert body["live_tensors_of_1000_ancestral_steps"] <= 3


def test_a_peer_that_fails_is_named_with_its_reason(
    programs: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(solver: str, t: list[float]) -> dict[str, object]:
        return {"loop": lambda D, x: x / 0.0}

    monkeypatch.setattr(programs["overhead"], "plain", broken)
    missing: dict[str, str] = {}
    found = programs["overhead"].contenders("euler", 2, missing)
    assert "loop" not in [c.name for c in found]
    assert "not finite" in missing["euler: loop"]


def test_every_solver_is_scored_or_left_out_with_a_reason(programs: dict[str, ModuleType]) -> None:
    solvers = programs["solvers"]
    scored = {case.solver for case in solvers.cases().values()}
    assert scored | set(solvers.LEFT_OUT) >= set(SOLVERS)
    assert not scored & set(solvers.LEFT_OUT) - {"dpmpp"}
    grids = set(solvers.GRID_OPTIONS) | {"exponential", "polyexponential", "discrete"}
    assert grids >= set(GRIDS)


def test_no_two_cases_are_the_same_table(programs: dict[str, ModuleType]) -> None:
    solvers = programs["solvers"]
    seen: dict[tuple[object, ...], str] = {}
    for name, case in solvers.cases().items():
        table = case.table(lambda steps, to_zero: karras(steps, 0.002, 80.0, to_zero=to_zero), 12, False)
        assert table is not None and table.nfe == 12 and not table.noisy, name
        # Rounded, because two formulas for the same weight differ in the last digits.
        key = tuple(round(float(v), 9) for t in (table.P, table.W) for v in t[:, : t.any(0).sum()].flatten())
        assert key not in seen, f"{name} is {seen[key]}"
        seen[key] = name


def test_scores_agree_with_the_stored_scores_of_published_code(programs: dict[str, ModuleType], tmp_path: Path) -> None:
    solvers = programs["solvers"]
    chosen = ("euler", "heun", "ipndm3", "dpmpp2m-falling", "unipc3-bh1-noise-falling", "dpm-fast")
    solvers.main(solvers.Solvers(nfes=(4,), cases=chosen, truth_steps=60, results=tmp_path))
    body = json.loads((tmp_path / "solvers.json").read_text())
    told = body["agreement_with_peers"]
    assert told["cells"] >= 20
    assert told["others"] == []
    best = {r["name"]: r for r in body["best_fixed"]}
    assert set(best) == set(chosen)
    assert body["best_peer"]["4"]["fixed"]["rmse"] == pytest.approx(0.126978)
    known = json.loads((BENCHMARKS / "results" / "solvers.json").read_text())
    stored = {r["name"]: r["rmse"] for r in known["best_fixed"] if r["nfe"] == 4}
    for name, row in best.items():
        assert row["rmse"] == pytest.approx(stored[name], rel=1e-3), name


def test_unknown_names_are_refused(programs: dict[str, ModuleType], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="ipndm9"):
        programs["solvers"].main(programs["solvers"].Solvers(cases=("ipndm9",), results=tmp_path))
    with pytest.raises(InputError, match="ipndm9"):
        programs["overhead"].main(programs["overhead"].Overhead(solvers=("ipndm9",), results=tmp_path))
    assert not list(tmp_path.iterdir())
