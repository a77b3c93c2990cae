"""Adaptive collaboration of a student and its teacher: who makes which picture, what it costs, and the cut-off."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from fewstep.cli.collaborate import Collaborate
from fewstep.core.cond import Cond
from fewstep.core.exact import Mixture
from fewstep.core.generator import Generator
from fewstep.errors import InputError
from fewstep.grid.karras import karras
from fewstep.guide import guided
from fewstep.measure import digits_extractor
from fewstep.solve.collaboration import (
    Collaboration,
    confidence_oracle,
    ending,
    label_oracle,
    oracle_of,
)
from fewstep.solve.consistency import consistency
from fewstep.solve.dpmpp import dpmpp
from fewstep.solve.euler import euler
from fewstep.solve.heun import heun
from tiny_runs import tiny

LOW, TOP = 0.01, 20.0
FINE = karras(6, LOW, TOP)


def brightness(pictures: Tensor, cond: Cond) -> Tensor:
    return pictures.flatten(1).mean(1)


def pair(steps: int = 2) -> tuple[Generator, Generator]:
    """A student of few Euler steps and a teacher of Heun's on the same network."""
    made = tiny()
    return (
        made.with_sampler(euler(karras(steps, LOW, TOP))),
        made.with_sampler(heun(karras(6, LOW, TOP))),
    )


def test_each_picture_comes_from_who_the_oracle_says() -> None:
    student, teacher = pair()
    alone, theirs = (g.sample(40, seed=5, progress=False) for g in (student, teacher))
    cut = float(brightness(alone, {}).median())
    found = Collaboration(student, teacher, brightness, cut, mode="regenerate").sample(40, seed=5)
    assert torch.equal(found.refined, brightness(alone, {}) < cut) and 10 < int(found.refined.sum()) < 30
    assert float((found.pictures[~found.refined] - alone[~found.refined]).abs().max()) < 1e-5
    assert float((found.pictures[found.refined] - theirs[found.refined]).abs().max()) < 1e-5
    assert float((found.scores - brightness(alone, {})).abs().max()) < 1e-6


@pytest.mark.parametrize("mode", ["refine", "regenerate"])
def test_the_result_does_not_depend_on_the_batch(mode: str) -> None:
    student, teacher = pair()
    made = Collaboration.calibrated(student, teacher, brightness, share=0.4, n=64, mode=mode, batch=64)
    other = Collaboration.calibrated(student, teacher, brightness, share=0.4, n=64, mode=mode, batch=7)
    assert made.cutoff == pytest.approx(other.cutoff, abs=1e-6)
    whole = made.sample(30, seed=2)
    for batch in (1, 7, 30):
        part = made.sample(30, seed=2, batch=batch)
        assert torch.equal(part.refined, whole.refined) and part.nfe == pytest.approx(whole.nfe)
        assert float((part.pictures - whole.pictures).abs().max()) < 1e-5
    first = made.sample(11, seed=2)
    assert float((first.pictures - whole.pictures[:11]).abs().max()) < 1e-5
    assert float((made.sample(11, seed=3).pictures - first.pictures).abs().max()) > 0.1


def test_evaluations_are_counted_at_the_network() -> None:
    student, teacher = pair()
    for share, mode, scale, each in ((0.0, "refine", 1, 0), (1.0, "regenerate", 1, 11), (1.0, "regenerate", 3.0, 22)):
        made = Collaboration.calibrated(student, guided(teacher, scale), brightness, share=share, mode=mode)
        found = made.sample(10)
        assert (found.share, found.student_nfe, found.teacher_nfe) == (share, 2, each)
        assert found.nfe == 2 + share * each
    half = Collaboration.calibrated(student, guided(teacher, 3.0), brightness, share=0.5, rollback=0.5, n=400)
    assert half.refiner is not None
    found = half.sample(200, seed=9)
    # Guidance is two evaluations of the network for each of the denoiser.
    assert found.teacher_nfe == 2 * half.refiner.nfe and found.nfe == 2 + found.share * found.teacher_nfe
    assert 0.35 < found.share < 0.65 and found.facts()["nfe"] == found.nfe


def test_the_cutoff_is_the_percentile_of_another_set_of_pictures() -> None:
    student, teacher = pair()
    cuts = []
    for share in (0.2, 0.5, 0.8):
        made = Collaboration.calibrated(student, teacher, brightness, share=share, n=300, seed=4)
        cuts.append(made.cutoff)
        assert abs(made.sample(300, seed=4).share - share) < 0.11
    assert cuts == sorted(cuts)
    own = brightness(student.sample(300, seed=4, progress=False), {}).double().quantile(0.5)
    assert abs(float(own) - cuts[1]) > 1e-9, "the calibration has pictures of its own"
    no, all_ = (Collaboration.calibrated(student, teacher, brightness, share=s) for s in (0, 1))
    assert no.sample(5).share == 0 and all_.sample(5).share == 1


def test_refinement_of_an_exact_problem_has_the_exact_law() -> None:
    problem = Mixture(torch.full((1, 1, 1, 1), 0.2), 0.04, sigma_min=LOW, sigma_max=TOP)
    teacher = Generator(problem, heun(karras(24, LOW, TOP)))
    # A student that collapsed to the mean's neighbourhood: one step of Euler.
    student = teacher.with_sampler(euler(torch.tensor([TOP, 0.0])))
    for rollback in (0.5, 0.75):
        made = Collaboration.calibrated(student, teacher, brightness, share=1.0, rollback=rollback)
        found = made.sample(4000, seed=1)
        assert made.refiner is not None
        s, v = made.refiner.start, 0.04
        spread = found.pictures.double().std()
        # The result is linear in the student's picture and in the noise; the student's spread is next to nothing.
        gain = (v / (v + s * s)) ** 0.5
        start = student.sample(4000, seed=1, progress=False).double().std()
        want = gain * (float(start) ** 2 + s * s) ** 0.5
        assert float(spread) == pytest.approx(want, rel=0.05), rollback
    alone = student.sample(4000, seed=1, progress=False).double().std()
    assert float(alone) < 0.05 < 0.15 < float(spread), "the teacher gives back the spread that the student lost"


def test_a_noisy_sampler_of_the_student_keeps_its_noise() -> None:
    student, teacher = pair()
    student = student.with_sampler(consistency(torch.tensor([TOP, 1.0, 0.0])))
    found = Collaboration.calibrated(student, teacher, brightness, share=0.5, n=100).sample(20, seed=6)
    alone = student.sample(20, seed=6, progress=False)
    assert float((found.pictures - alone)[~found.refined].abs().max()) < 1e-5


def test_the_end_of_a_sampler_begins_where_no_row_looks_back() -> None:
    table = heun(karras(6, LOW, TOP))
    for rollback in (0.1, 0.3, 0.5, 0.7, 1.0):
        part = ending(table, rollback)
        assert abs(part.rows - table.rows * rollback) <= 1.5 and part.end == 0
        assert part.start in table.levels.tolist()
    assert ending(table, 1.0).rows == table.rows > ending(table, 0.99).rows
    with pytest.raises(InputError, match="cannot start in its middle"):
        ending(dpmpp(karras(6, LOW, TOP), 3), 0.5)


def test_the_packaged_oracles() -> None:
    reader = digits_extractor()
    x = torch.rand(6, 1, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    logs = reader.classify(x)
    assert torch.equal(confidence_oracle(reader)(x, {}), logs.amax(1))
    label = torch.tensor([0, 3, 9, -1, 5, -1])
    score = label_oracle(reader)(x, {"label": label})
    want = torch.where(label < 0, logs.amax(1), logs[torch.arange(6), label.clamp(min=0)])
    assert torch.equal(score, want) and torch.equal(label_oracle(reader)(x, {}), logs.amax(1))
    assert oracle_of("confidence", (3, 8, 8))(x.reshape(2, 3, 8, 8), {}).shape == (2,)
    with pytest.raises(InputError, match="knows no labels of stacked-digits"):
        oracle_of("label", (3, 8, 8))(x.reshape(2, 3, 8, 8), {"label": label[:2]})


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student, teacher = pair()
    student.save(tmp_path / "s")
    teacher.save(tmp_path / "t")
    flags = Collaborate(
        str(tmp_path / "s"),
        str(tmp_path / "t"),
        share=0.5,
        n=12,
        calibration=50,
        oracle="test_02_collaboration:brightness",
        out=tmp_path / "run",
    )
    flags.run()
    assert "12 pictures" in capsys.readouterr().err
    arrays = np.load(tmp_path / "run" / "samples.npz")
    direct = Collaboration.calibrated(student, teacher, brightness, share=0.5, n=50).sample(12)
    assert float(np.abs(arrays["arr_0"] - direct.pictures.numpy()).max()) < 1e-5
    assert arrays["refined"].tolist() == direct.refined.tolist()
    log = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert log["share"] == direct.share and log["nfe"] == pytest.approx(direct.nfe)
    for wrong, said in (
        (replace(flags, oracle="nowhere:f"), "--oracle nowhere:f was not found"),
        (replace(flags, oracle="label"), r"oracle 'label' reads digits"),
        (replace(flags, n=0), "--n and --batch must be at least 1"),
        (replace(flags, share=1.5), r"in \[0, 1\], got 1.5"),
    ):
        with pytest.raises(InputError, match=said):
            replace(wrong, out=tmp_path / "never").run()
    assert not (tmp_path / "never").exists()


def build(**changes: object) -> Collaboration:
    student, teacher = pair()
    return Collaboration(**({"student": student, "teacher": teacher, "oracle": brightness, "cutoff": 0.0} | changes))  # type: ignore[arg-type]


def nan_scores(pictures: Tensor, cond: Cond) -> Tensor:
    return torch.full((len(pictures),), torch.nan)


BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: build(mode="replace"), "unknown mode of collaboration 'replace'"),
    (lambda: build(cutoff=float("nan")), "must be a number, got nan"),
    (lambda: build(rollback=0.0), r"in \(0, 1\]: 0.0"),
    (lambda: build(teacher=Generator(Mixture(torch.zeros(1, 2), 1.0), heun(FINE))), "must share one space"),
    (lambda: build(teacher=replace(pair()[1], conds=None)), "one of them is unconditional"),
    (lambda: build(teacher=pair()[1].with_sampler(dpmpp(FINE, 3))), "pass a refiner, or use mode 'regenerate'"),
    (lambda: build(oracle=nan_scores).sample(3), "one finite score for each of 3 pictures"),
    (lambda: build(oracle=lambda p, c: p).sample(3), r"got \(3, 1, 4, 4\)"),
    (lambda: build().sample(0), "n must be at least 1, got 0"),
    (lambda: build().sample(2, {"label": torch.tensor([0, 7])}), "label 7 is out of range"),
    (lambda: Collaboration.calibrated(*pair(), brightness, share=-0.1), r"must be in \[0, 1\], got -0.1"),
    (lambda: oracle_of("taste", (1, 8, 8)), "unknown oracle 'taste'"),
    (lambda: oracle_of("label", (3, 32, 32)), "pass a function of your own"),
]


@pytest.mark.parametrize(("make", "said"), BAD)
def test_bad_input_is_named(make: Callable[[], object], said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        make()
    assert "\n" not in str(error.value)


def test_conditions_are_followed() -> None:
    student, teacher = pair()
    label = torch.tensor([0, 1, 2, 2, 1, 0])
    found = Collaboration.calibrated(student, teacher, brightness, share=1.0, mode="regenerate").sample(
        6, {"label": label}, seed=3, batch=4
    )
    want = teacher.sample(6, {"label": label}, seed=3, progress=False)
    assert float((found.pictures - want).abs().max()) < 1e-5
