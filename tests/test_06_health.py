"""Collapse: what is measured, what fires and what does not, stopping, rolling back; looking changes nothing."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.cli import main
from fewstep.core.options import Budget, FitOptions
from fewstep.core.role import Ema, Optim
from fewstep.core.state import Run
from fewstep.data.conditions import ConditionsOnly
from fewstep.distill import VSD
from fewstep.errors import CollapseError, InputError
from fewstep.report.plots import health_figures
from fewstep.train import EDMTraining
from fewstep.train.health import BANDS, Watch, bands, collapsed, history, spread
from fewstep.train.rollback import Watching, good_checkpoint, roll_back, rollbacks, write_facts
from fewstep.train.run import build_models
from tiny_runs import STEADY, Stop, bits, differing, log_of, run, tiny, tiny_data

GOOD = VSD(student=STEADY, fake=STEADY, ema=Ema(rate=0.5))
WILD = replace(GOOD, student=Optim(lr=1.0), fake=Optim(lr=1.0))


def go(out: Path, method: Any = WILD, **options: Any) -> Any:
    options = {"budget": 12, "check_every": 2, "micro": 1} | options
    return run("VSD", out, method=method, **options)


# ---- measures


def test_the_spread_of_samples() -> None:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(400, 1, 8, 8, generator=g)
    found = spread(x)
    assert abs(found["variance"] - 1) < 0.03 and abs(found["distance"] - 2**0.5) < 0.03
    assert 0.8 < found["nearest"] < found["distance"]
    same = spread(x[:1].expand(8, -1, -1, -1))
    assert max(same.values()) < 1e-12
    few = spread(x[:4].repeat(10, 1, 1, 1))
    assert few["variance"] > 0.3 and few["nearest"] == 0
    # Not lost in rounding far from zero, where inner products would be.
    near = spread(5 + 1e-3 * x)
    assert abs(near["distance"] / (1e-3 * found["distance"]) - 1) < 1e-2


START = {"variance": 1.0, "nearest": 0.9, "modes": 1.0}
BLUR = {"variance": 1e-5, "nearest": 1e-3}
HEALTHY = [
    ([{"variance": 0.6, "nearest": 0.4, "modes": 0.9}], START, 1.0),
    ([BLUR] * 20, BLUR, 0.4),
    ([BLUR] * 3, BLUR, 1.0),
    ([BLUR, {"variance": 0.01, "nearest": 0.02}, {"variance": 0.5, "nearest": 0.5}], BLUR, 1.0),
    ([{"variance": 15.0}], {"variance": 2.0}, 1.0),
    ([{}], {}, 1.0),
]
ILL = [
    ([{"variance": 0.05, "nearest": 0.9}], START, 0.1, "become alike: their variance"),
    ([{"variance": 0.9, "nearest": 0.1}], START, 0.1, "become alike: the distance to their nearest"),
    ([{"variance": 0.9, "nearest": 0.9, "modes": 0.1}], START, 0.1, "lost modes"),
    ([{"variance": 0.5, "nearest": 0.5}, BLUR], BLUR, 0.1, "become alike"),
    ([{"variance": 15.0}], START, 0.1, "blown up"),
    ([{"variance": None}], START, 0.1, "no longer finite"),
    ([BLUR] * 20, BLUR, 0.6, "still constant"),
]


@pytest.mark.parametrize(("looks", "start", "progress"), HEALTHY)
def test_what_is_no_collapse(looks: Any, start: Any, progress: float) -> None:
    assert collapsed(looks, start, progress) is None


@pytest.mark.parametrize(("looks", "start", "progress", "said"), ILL)
def test_what_is_a_collapse(looks: Any, start: Any, progress: float, said: str) -> None:
    assert said in str(collapsed(looks, start, progress))


def test_how_often_a_run_is_looked_at() -> None:
    models = build_models(GOOD.roles(tiny()), "cpu")
    options = FitOptions(Budget(2000), batch=256, log_every=20)
    assert Watching().steps(options, models, 1) == 20
    assert Watching().steps(options, models, 35) == 160
    assert Watching().steps(replace(options, budget=Budget(100)), models, 35) == 0
    assert Watching(every=0).steps(options, models, 1) == 0
    assert Watching(every=30).steps(options, models, 1) == 40
    assert Watching("rollback", 500).steps(replace(options, save_every=100), models, 1) == 100
    # What ships is no student: a teacher that is to get worse, or a decoder.
    models.roles["student"] = replace(models.roles["student"], ships=False)
    assert Watching().steps(options, models, 1) == 0


# ---- runs


def test_a_healthy_run_is_watched_and_not_changed(tmp_path: Path) -> None:
    plain, watched, cut = (tmp_path / name for name in ("plain", "watched", "cut"))
    go(plain, GOOD, check_every=0)
    go(watched, GOOD)
    assert differing(bits(plain), bits(watched)) == []
    log = log_of(watched)
    assert [e for e in log if "collapsed" in e] == [] and all(e["health/variance"] > 0 for e in log)
    assert [{k: v for k, v in e.items() if not k.startswith("health/")} for e in log] == log_of(plain)
    assert sum(k.startswith("health/direction@") for k in log[0]) == BANDS
    # Stopped between two checkpoints and resumed: the same bits, and the same looks.
    with pytest.raises(Stop):
        # One more, because the reference is taken from the data where there are any.
        go(cut, GOOD, stop=8)
    go(cut, GOOD, resume=True)
    assert differing(bits(watched), bits(cut)) == [] and log_of(cut) == log


@pytest.mark.parametrize("method", [WILD, EDMTraining(optim=Optim(lr=30.0), ema=Ema(rate=0.5))])
def test_a_bad_learning_rate_stops_the_run(method: Any, tmp_path: Path) -> None:
    with pytest.raises(CollapseError) as error:
        go(tmp_path, method)
    said = str(error.value)
    assert "\n" not in said and "training stopped at step" in said and "lower the learning rate" in said
    last = log_of(tmp_path)[-1]
    assert last["collapsed"] in said and f"step {last['step']}:" in said
    assert not (tmp_path / "fewstep.json").exists(), "a collapsed student does not ship"


def test_a_collapse_can_be_ignored(tmp_path: Path) -> None:
    with pytest.raises(CollapseError):
        go(tmp_path)
    made = go(tmp_path, on_collapse="ignore", resume=True)
    log = log_of(tmp_path)
    assert [e["step"] for e in log] == [2, 4, 6, 8, 10, 12] and any("collapsed" in e for e in log)
    assert made.card["trained"]["step"] == 12


def test_rolling_back_until_it_holds_or_gives_up(tmp_path: Path) -> None:
    with pytest.raises(CollapseError, match=r"after 3 rollbacks with learning rates at 0\.125"):
        go(tmp_path / "wild", on_collapse="rollback", save_every=2)
    assert [entry.rates for entry in rollbacks(Run(tmp_path / "wild"))] == [0.5, 0.25, 0.125]
    # A resumed run has not forgotten them.
    with pytest.raises(CollapseError, match="after 3 rollbacks"):
        go(tmp_path / "wild", on_collapse="rollback", save_every=2, resume=True)


def test_a_rollback_halves_the_rates_and_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    look, seen = Watch.look, []

    def ill_once(self: Watch, report: Any) -> dict[str, Any]:
        found = look(self, report)
        rates = self.models.roles["student"].optim.lr
        seen.append((report.step, rates))
        return found | ({"collapsed": "samples have become alike"} if report.step == 8 and rates == 2e-3 else {})

    monkeypatch.setattr(Watch, "look", ill_once)
    made = go(tmp_path, GOOD, on_collapse="rollback", save_every=2)
    assert seen == [(s, 2e-3) for s in (2, 4, 6, 8)] + [(s, 1e-3) for s in (8, 10, 12)]
    assert [e.get("rollbacks") for e in log_of(tmp_path)] == [None] * 3 + [1] * 3
    entry = {"collapsed": 8, "to": 6, "why": "samples have become alike", "rates": 0.5}
    assert made.card["rollbacks"] == [entry]
    assert json.loads((tmp_path / "health.json").read_text())["rollbacks"] == [entry]


def test_the_way_back_is_the_newest_checkpoint_that_was_found_good(tmp_path: Path) -> None:
    kept = Run(tmp_path, keep=9)
    for step in (3, 6, 9):
        kept.save(step, {"roles/a": {"w": torch.zeros(1)}}, {})
    for step in (4, 8, 12):
        kept.log({"step": step, "health/variance": 1.0} | ({"collapsed": "so"} if step == 12 else {}))
    write_facts(kept, {"fake_floor": 0.5}, [])
    assert good_checkpoint(kept, 12) == 6 and good_checkpoint(kept, 4) == 0
    roll_back(kept, 12, "so")
    assert [p.name for p in kept.checkpoints()] == ["00000003", "00000006"]
    assert [e["step"] for e in kept.read_log()] == [4]
    second = roll_back(kept, 6, "again")
    assert (second.to, second.rates, len(rollbacks(kept))) == (3, 0.25, 2)
    assert json.loads((tmp_path / "health.json").read_text())["fake_floor"] == 0.5


# ---- fake score


def test_the_floor_is_the_teachers_loss_and_directions_start_at_zero() -> None:
    teacher, options = tiny(), FitOptions(Budget(10), batch=8)
    models = build_models(GOOD.roles(teacher), "cpu")
    data = ConditionsOnly(teacher.conds)
    watch = Watch(GOOD, models, teacher, teacher, data, options)
    assert watch.reference == "64 samples of the teacher" and watch.floor > 0
    assert all(abs(value - 1) < 1e-5 for value in watch.start.values())
    report: Any = type("R", (), {"progress": 0.1})()
    told = watch.look(report)
    assert max(v for k, v in told.items() if k.startswith("health/direction@")) == 0
    # A fake score that says something else by 0.1 everywhere is that far away at every level.
    with torch.no_grad():
        for p in models.fake.parameters():
            p.add_(0.05)
    told = watch.look(report)
    assert min(v for k, v in told.items() if k.startswith("health/direction@")) > 0
    levels = bands(teacher.denoiser)
    assert len(levels) == BANDS and (levels.diff() < 0).all() and float(levels[0]) < teacher.denoiser.sigma_max
    other = Watch(
        EDMTraining(), build_models(EDMTraining().roles(teacher), "cpu"), teacher, teacher, tiny_data(), options
    )
    assert other.floor is None and other.reference == "48 pictures of the data"


# ---- command line


def test_bad_settings_are_refused(tmp_path: Path) -> None:
    for options, said in (
        ({"on_collapse": "explode"}, "unknown answer to a collapse 'explode'"),
        ({"check_every": -1}, "check_every must be at least 0"),
    ):
        with pytest.raises(InputError, match=said):
            go(tmp_path, GOOD, **options)
        assert not (tmp_path / "recipe.json").exists()


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    tiny().save(tmp_path / "teacher")
    flags = "distill vsd --teacher teacher --budget 12 --batch 8 --log-every 2 --check-every 2 --save-every 2"
    with pytest.raises(SystemExit) as stop:
        main(f"{flags} --student.lr 1 --fake.lr 1 --out run --ema.rate 0.5 --ema.power None".split(" "))
    err = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 3 and err[-1].startswith("fewstep: training stopped at step")
    main(["show", "run", "--health", "--out", "run.html"])
    page = (tmp_path / "run.html").read_text()
    assert "Variety of the samples" in page and "floor" in page and "collapsed" in page
    main(["show", "run"])
    assert "variance" in capsys.readouterr().out


def test_curves_are_drawn_from_a_log(tmp_path: Path) -> None:
    assert health_figures([{"step": 2, "student/loss": 1.0}, {"step": 4, "student/loss": 0.5}]) == []
    go(tmp_path, GOOD)
    entries = history(Run(tmp_path))
    assert entries[0]["step"] == 0 and "health/variance" in entries[0]
    assert [title for title, _, _ in health_figures(entries)] == [
        "Variety of the samples",
        "Fake score's loss and its floor",
        "Direction by noise level",
    ]
    more = [e | {"fake+heads/logit_real": 0.1, "fake+heads/logit_fake": -0.1} for e in entries]
    assert "Logits" in [title for title, _, _ in health_figures(more)]
