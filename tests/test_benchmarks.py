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
    names = ("loops", "overhead", "solvers", "tasks", "methods", "passes", "steps")
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


def test_methods_are_measured_piecemeal_and_claims_run_both_sides(
    programs: dict[str, ModuleType], tmp_path: Path
) -> None:
    methods = programs["methods"]
    quick = {"task": "ring", "teacher_steps": 20, "iterations": 3, "batch": 16, "samples": 200, "nfes": (1, 2)}
    flags = {**quick, "out": tmp_path / "teacher", "results": tmp_path}
    methods.main(methods.Flags(methods=("cd",), **flags))
    methods.main(methods.Flags(methods=("sfd",), claims=("cd-target",), **flags))
    body = json.loads((tmp_path / "methods-ring.json").read_text())
    rows = [(r["name"], r["nfe"]) for r in body["rows"]]
    # One side of the claim is the default, and shares the method's row.
    claim = body["claims"]["cd-target"]
    (other,) = {claim["with"], claim["without"]} - {"cd"}
    assert other.startswith("cd, target=")
    own = [(name, nfe) for name in ("sfd", "cd", other) for nfe in (1, 2)]
    assert rows[:3] == [("teacher", 35), ("calibrated", 1), ("calibrated", 2)] and sorted(rows[3:]) == sorted(own)
    by_name = {r["name"]: r for r in body["rows"]}
    assert by_name["cd"]["images"] == 3 * 16 and by_name["sfd"]["images"] == 2 * 3 * 16
    assert by_name[claim["with"]]["settings"]["target"] == "ema" and by_name["cd"]["peak_bytes"] > 0
    assert by_name[claim["without"]]["settings"]["target"] == "self"


def test_every_claim_and_task_can_be_made(programs: dict[str, ModuleType]) -> None:
    from fewstep.distill import METHODS
    from tiny_runs import tiny

    teacher = tiny()
    for key, claim in programs["methods"].CLAIMS.items():
        made = [side.made(teacher) for side in (claim.true, claim.false)]
        assert made[0] != made[1] and type(made[0]) is METHODS[claim.true.method], key
    assert set(programs["tasks"].TASKS) == {
        "digits",
        "stacked-digits",
        "cifar8",
        "cifar32",
        "ring",
        "grid25",
        "sr-digits",
    }


def test_scores_of_the_ring_know_its_law_from_others(programs: dict[str, ModuleType]) -> None:
    tasks = programs["tasks"]
    law = tasks.ring()
    same = tasks.ring_score(law.draw(2000, seed=1).float(), 0)
    assert abs(same["energy"]) < 0.01 and same["modes"] == 8 and same["mode_kl"] < 0.01
    # Of a Gaussian in two dimensions, 1 - exp(-9/2) lies within three deviations.
    assert same["precision"] == pytest.approx(0.9889, abs=0.01)
    one = tasks.ring_score(law.means[:1].expand(500, -1, -1, -1).float(), 0)
    assert one["modes"] == 1 and one["mode_kl"] == pytest.approx(2.0794, abs=1e-3) and one["energy"] > 0.2


def test_the_passes_of_a_step_are_those_of_its_equations(programs: dict[str, ModuleType], tmp_path: Path) -> None:
    steps = programs["steps"]
    steps.main(steps.Flags(methods=("cd", "sid"), sizes=("small",), repeats=1, results=tmp_path))
    rows = {r["method"]: r for r in json.loads((tmp_path / "steps.json").read_text())["rows"]}
    # The teacher's two for Heun, the target, and the student.
    assert rows["cd"]["calls"] == {"F": 3, "F+B(weights)": 1}
    # Pictures for the fake score, its own pass; the student's, and both scores of it.
    assert rows["sid"]["calls"] == {"F": 1, "F+B(weights)": 2, "F+B(input)": 2}
    assert all(r["step_ms"] > 0 and r["passes_ms"] > 0 and r["peak_bytes"] > 0 for r in rows.values())


@pytest.mark.parametrize("through", ["functorch", "dual"])
def test_forward_derivatives_and_features_are_recorded_and_replayed(
    programs: dict[str, ModuleType], through: str
) -> None:
    from torch.autograd import forward_ad

    steps = programs["steps"]
    config, _ = steps.SIZES["small"]
    D = next(iter(steps.teachers(config))).network.requires_grad_(False)
    x, calls = torch.randn(2, *config.shape), []
    with steps.recording(calls, []), torch.no_grad():
        if through == "functorch":
            torch.func.jvp(lambda x: D(x, 1.0, {}), (x,), (torch.ones_like(x),))
        else:
            with forward_ad.dual_level():
                D(forward_ad.make_dual(x, torch.ones_like(x)), 1.0, {})
    leaf = x.clone().requires_grad_()
    with steps.recording(calls, []):
        D.features(leaf, 1.0, {}, ("bottleneck",))[1]["bottleneck"].sum().backward()
    assert [call.kind for call in calls] == ["JVP", "F+B(input)"]
    assert torch.equal(calls[0].leaves[0], x) and calls[1].name == "features"
    for call in calls:
        steps.replay(call)


def test_unknown_tasks_methods_and_claims_are_refused(programs: dict[str, ModuleType], tmp_path: Path) -> None:
    methods, steps = programs["methods"], programs["steps"]
    for flags, message in (
        ({"task": "ring2"}, "ring2"),
        ({"methods": ("cdd",)}, "cdd"),
        ({"claims": ("cd-goal",)}, "cd-goal"),
        ({"task": "cifar8"}, "needs --data"),
        ({"task": "sr-digits"}, "super_resolution.py"),
    ):
        with pytest.raises(InputError, match=message):
            methods.main(methods.Flags(**flags, results=tmp_path, out=tmp_path / "teacher"))
    with pytest.raises(InputError, match="huge"):
        steps.main(steps.Flags(sizes=("huge",), results=tmp_path))
    assert not list(tmp_path.iterdir())
