"""Students for several numbers of steps, and the papers' numbers carried over to other sizes."""

from __future__ import annotations

import dataclasses
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from fewstep.core.generator import Generator
from fewstep.core.role import Optim
from fewstep.core.stored import load_sampler
from fewstep.core.tableau import Tableau
from fewstep.data import Images
from fewstep.distill import CD, DMD2, METHODS, MSD, SFD, MeanFlow, Progressive, SFDv, SiD, distill
from fewstep.distill.published import HIGHEST, PUBLISHED, SMALL, leaves, parameters_of, scaled, small, suggested, told
from fewstep.distill.several import SAMPLERS, check_steps, distill_steps
from fewstep.errors import InputError
from fewstep.models.frozen import network_under
from tiny_runs import Stop, StopsAfter, bits, differing, furthest, tiny, tiny_data

# A coarse eps, because Adam turns the rounding of a gradient near zero into a step of full size.
STEADY = Optim(lr=2e-3, eps=1e-4, clip=1.0)
QUICK: dict[str, Any] = {"batch": 8, "log_every": 2, "save_every": 3, "progress": False}


def sampled(made: Generator, **options: Any) -> torch.Tensor:
    return made.sample(4, seed=3, progress=False, **options)


def test_a_method_of_any_steps_trains_once_and_leaves_a_sampler_for_each(tmp_path: Path) -> None:
    method = CD(optim=STEADY)
    found = distill_steps(tiny(), method, tiny_data(), steps=(4, 1, 2), out=tmp_path / "run", budget=4, **QUICK)
    assert list(found) == [1, 2, 4] and [made.sampler.nfe for made in found.values()] == [1, 2, 4]
    assert sorted(p.name for p in (tmp_path / "run" / SAMPLERS).iterdir()) == ["1.json", "2.json", "4.json"]
    opened = Generator.load(tmp_path / "run")
    assert opened.sampler.nfe == 4
    for count, made in found.items():
        table = load_sampler(tmp_path / "run" / SAMPLERS / f"{count}.json")
        assert torch.equal(sampled(opened, sampler=table), sampled(made))
    alone = distill(tiny(), replace(method, steps=2), tiny_data(), out=tmp_path / "two", budget=4, **QUICK)
    assert torch.equal(sampled(alone), sampled(found[2]))


def test_progressive_distillation_runs_once_and_its_stages_are_the_students(tmp_path: Path) -> None:
    method = Progressive(start_steps=8, optim=STEADY)
    found = distill_steps(tiny(), method, tiny_data(), steps=(1, 2, 4), out=tmp_path / "run", budget=6, **QUICK)
    assert [made.sampler.nfe for made in found.values()] == [1, 2, 4]
    for count, made in found.items():
        assert torch.equal(sampled(Generator.load(tmp_path / "run" / str(count))), sampled(made))
    alone = distill(tiny(), replace(method, steps=1), tiny_data(), out=tmp_path / "one", budget=6, **QUICK)
    assert torch.equal(sampled(alone), sampled(found[1])) and not torch.equal(sampled(found[2]), sampled(found[1]))
    assert sorted(p.name for p in (tmp_path / "run" / "stages").iterdir()) == ["0001", "0002", "0004"]


def test_any_other_method_trains_a_student_for_each(tmp_path: Path) -> None:
    method = SFD(between=1, optim=STEADY)
    found = distill_steps(tiny(), method, steps=(1, 2), out=tmp_path / "run", budget=3, **QUICK)
    for count, made in found.items():
        assert made.sampler.nfe == count
        assert torch.equal(sampled(Generator.load(tmp_path / "run" / str(count))), sampled(made))
        alone = distill(tiny(), replace(method, steps=count), out=tmp_path / f"{count}", budget=3, **QUICK)
        assert torch.equal(sampled(alone), sampled(made))


@pytest.mark.parametrize(
    ("method", "stop"),
    [(CD(optim=STEADY), 4), (Progressive(start_steps=4, optim=STEADY), 4), (SFD(between=1, optim=STEADY), 7)],
    ids=["once", "stages", "each"],
)
def test_a_resumed_run_and_micro_batches(
    method: Any, stop: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = tiny_data() if method.needs_data else None
    options: dict[str, Any] = {"steps": (1, 2), "budget": 6, **QUICK, "micro": 2}
    one = distill_steps(tiny(), method, data, out=tmp_path / "one", **options)
    if data is None:
        # The data of a method without data are made within, once for every training: the second one stops.
        from fewstep.distill import front

        made = front.ConditionsOnly
        calls = iter((99, stop - 6))
        with monkeypatch.context() as patch, pytest.raises(Stop):
            patch.setattr(front, "ConditionsOnly", lambda conds: StopsAfter(made(conds), 2 * next(calls)))
            distill_steps(tiny(), method, None, out=tmp_path / "two", **options)
    else:
        with pytest.raises(Stop):
            distill_steps(tiny(), method, StopsAfter(data, 2 * stop), out=tmp_path / "two", **options)
    two = distill_steps(tiny(), method, data, out=tmp_path / "two", resume=True, **options)
    whole = distill_steps(tiny(), method, data, out=tmp_path / "whole", **{**options, "micro": 1})
    for count in (1, 2):
        a, b, c = (dict(made[count].denoiser.state_dict()) for made in (one, two, whole))
        assert not differing(a, b)
        assert furthest(a, c)[0] < 1e-4
    if (tmp_path / "one" / "checkpoints").is_dir():
        assert not differing(bits(tmp_path / "one"), bits(tmp_path / "two"))
    again = distill_steps(tiny(), method, data, out=tmp_path / "two", resume=True, **options)
    assert all(torch.equal(sampled(again[n]), sampled(one[n])) for n in (1, 2))


@pytest.mark.parametrize(
    ("method", "steps", "message"),
    [
        (SiD(), (1, 2), "SiD has no number of steps"),
        (CD(), (), "expected distinct whole numbers"),
        (CD(), (1, 1), "expected distinct whole numbers"),
        (CD(), (0, 1), "expected distinct whole numbers"),
        (CD(), (1, 2.0), "expected distinct whole numbers"),
        (CD(steps=2, middle=(1.0,)), (1, 2), "leave middle out"),
        (Progressive(start_steps=8), (1, 3), "no multiple"),
        (Progressive(start_steps=8), (2, 8), "passes 2, 4, and not 8"),
    ],
)
def test_bad_steps_are_refused_before_any_work(method: Any, steps: Any, message: str, tmp_path: Path) -> None:
    data = tiny_data() if method.needs_data else None
    with pytest.raises(InputError, match=message):
        distill_steps(tiny(), method, data, steps=steps, out=tmp_path / "run", budget=2, **QUICK)
    assert not (tmp_path / "run").exists()


def test_a_run_of_several_keeps_to_its_recipe(tmp_path: Path) -> None:
    method = SFD(between=1, optim=STEADY)
    distill_steps(tiny(), method, steps=(1, 2), out=tmp_path / "run", budget=2, **QUICK)
    for changed in ({"steps": (1, 3)}, {"budget": 3}, {"method": SFD(between=2, optim=STEADY)}):
        asked = {"method": method, "steps": (1, 2), "budget": 2, **changed}
        with pytest.raises(InputError, match="another recipe"):
            distill_steps(tiny(), asked.pop("method"), out=tmp_path / "run", resume=True, **asked, **QUICK)
    with pytest.raises(InputError, match="already holds files"):
        distill_steps(tiny(), method, steps=(1, 2), out=tmp_path / "run", budget=2, **QUICK)
    fresh = distill_steps(tiny(), method, steps=(2, 3), out=tmp_path / "run", budget=2, overwrite=True, **QUICK)
    assert list(fresh) == [2, 3] and not (tmp_path / "run" / "1").exists()


def test_steps_are_sorted_and_kept() -> None:
    assert check_steps(CD(), (4, 1)) == (1, 4)


@pytest.mark.parametrize("method", [SFDv(steps=4, between=0, counts=(1, 2, 4)), MeanFlow()], ids=["sfd-v", "mean-flow"])
def test_a_network_that_is_told_of_its_steps_is_told_of_the_right_ones(method: Any, tmp_path: Path) -> None:
    data = tiny_data() if method.needs_data else None
    found = distill_steps(tiny(), method, data, steps=(1, 2, 4), out=tmp_path / "run", budget=2, **QUICK)
    for count, made in found.items():
        own = replace(method, steps=count)
        expected = own.ships(network_under(made.denoiser))
        assert made.sampler.nfe == count and made.denoiser.describe() == expected.describe()  # type: ignore[attr-defined]
        again = Generator.load(tmp_path / "run" / str(count))
        assert torch.equal(again.sample(3, progress=False), made.sample(3, progress=False))
    told = {count: tuple(made.denoiser.values) for count, made in found.items()}  # type: ignore[attr-defined]
    assert len(set(told.values())) == 3


def test_pictures_that_the_teacher_cannot_take_are_refused_before_a_folder_is_made(tmp_path: Path) -> None:
    wide = Images("wide", torch.zeros(8, 3, 4, 4), torch.arange(8) % 3)
    bare = Images("bare", torch.zeros(8, 1, 4, 4))
    for data, said in ((wide, "the data hold (3, 4, 4) and the teacher takes (1, 4, 4)"), (bare, "have no labels")):
        with pytest.raises(InputError, match=re.escape(said)):
            distill(tiny(), CD(), data, out=tmp_path / "run", budget=2)
    assert not (tmp_path / "run").exists()


def test_every_published_row_names_optimizers_of_its_method() -> None:
    assert set(PUBLISHED) <= set(METHODS)
    for name, row in PUBLISHED.items():
        assert row.parameters > 1e6 and row.source and {f"{k}.lr" for k in row.lr} <= set(leaves(METHODS[name]())), name
        known = row.batch is not None and row.iterations is not None
        assert row.images == (row.batch * row.iterations if known else None)


def test_rates_follow_the_root_of_the_size_up_to_a_ceiling() -> None:
    teacher = tiny()
    own = parameters_of(teacher)
    assert own == sum(p.numel() for p in teacher.network.parameters())
    row = replace(PUBLISHED["sfd"], parameters=own * 4.0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(PUBLISHED, "sfd", row)
        assert scaled(SFD(), teacher).optim == replace(SFD().optim, lr=1e-4)
        patch.setitem(PUBLISHED, "sfd", replace(row, parameters=own / 4.0))
        assert scaled(SFD(), teacher).optim.lr == pytest.approx(2.5e-5)
        patch.setitem(PUBLISHED, "sfd", replace(row, parameters=own * 1e6))
        assert scaled(SFD(), teacher).optim.lr == HIGHEST
    kept = scaled(SiD(student=Optim(lr=3e-3)), teacher, fixed=("student.lr",))
    assert kept.student.lr == 3e-3 and kept.fake.lr != SiD().fake.lr
    papers = scaled(SiD(), teacher, published=True)
    assert (papers.student.lr, papers.fake.lr) == (1e-5, 1e-5)
    assert dataclasses.asdict(papers) | {"student": 0, "fake": 0} == dataclasses.asdict(SiD()) | {
        "student": 0,
        "fake": 0,
    }


def test_what_was_set_is_told_in_one_line() -> None:
    teacher = tiny()
    line = told(SiD(), scaled(SiD(), teacher), teacher)
    assert line is not None and "\n" not in line and "--student.lr" in line and "--published" in line
    assert told(SiD(), SiD(), teacher) is None


def test_small_networks_have_settings_of_their_own_unless_they_are_given() -> None:
    teacher, method = tiny(), DMD2()
    made = scaled(method, teacher)
    assert (made.ratio, made.student.lr, made.student.betas, made.fake.clip) == (1, 3e-4, (0.0, 0.999), 10.0)
    assert made == small(method) and made.gan == method.gan
    kept = scaled(method, teacher, fixed=("ratio", "fake.lr"))
    assert (kept.ratio, kept.fake.lr, kept.student.lr) == (5, method.fake.lr, 3e-4)
    assert scaled(method, teacher, published=True).ratio == 5
    inner = scaled(MSD(), teacher).inner
    assert (inner.ratio, inner.student.betas) == (1, (0.0, 0.999))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("fewstep.distill.published.SMALL_BELOW", parameters_of(teacher))
        assert scaled(method, teacher).ratio == 5
    line = told(method, made, teacher)
    assert line is not None and "--ratio 1" in line and "--student.betas 0 0.999" in line
    assert "--student.lr 0.0003 (published 2e-06)" in line
    for name, found in SMALL.items():
        assert set(found) <= set(leaves(METHODS[name]())), name


def test_a_method_without_a_row_keeps_its_rates() -> None:
    with pytest.MonkeyPatch.context() as patch:
        patch.delitem(PUBLISHED, "sfd")
        assert scaled(SFD(), tiny()) == SFD()
        assert suggested("sfd", tiny()) is None


def test_suggested_budgets_follow_the_smaller_of_passes_and_parameters() -> None:
    teacher, row = tiny(), PUBLISHED["cd"]
    share = parameters_of(teacher) / row.parameters
    few, many = suggested("cd", teacher, 1), suggested("cd", teacher, 10**9)
    assert few is not None and many is not None and row.data is not None
    assert few.images == math.ceil(row.images / row.data) and many.images == math.ceil(row.images * share)
    assert few.iterations == math.ceil(row.images / row.data / row.batch)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: scaled(SFD(), tiny(), fixed=("student",)), "no setting 'student', only steps"),
        (lambda: suggested("cd", tiny(), 0), "0 pictures of data"),
        (lambda: parameters_of(replace(tiny(), denoiser=lambda *a: None)), "no network"),
    ],
)
def test_bad_input_is_refused(call: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()


def test_shipped_samplers_are_tables(tmp_path: Path) -> None:
    found = distill_steps(tiny(), CD(optim=STEADY), tiny_data(), steps=(1, 2), out=tmp_path / "r", budget=1, **QUICK)
    assert all(isinstance(made.sampler, Tableau) for made in found.values())
