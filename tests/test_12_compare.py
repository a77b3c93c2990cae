"""Comparing generators: the same seeds for all rows, differences with honest intervals, a verdict, and its page."""

from __future__ import annotations

import json
import re
import shlex
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from fewstep.cli import main
from fewstep.core.generator import Generator
from fewstep.core.stored import save_sampler
from fewstep.data import load_data
from fewstep.errors import InputError
from fewstep.grid import grid
from fewstep.measure import Moments, Statistics, Target, digits_extractor, evaluate, frechet_error
from fewstep.measure.frechet import jackknife
from fewstep.report.compare import Blocks, Entry
from fewstep.report.compare_page import Comparison, render
from fewstep.report.shards import Shards, pictures_of
from fewstep.report.verdict import difference, verdict_of
from fewstep.solve.dpmpp import dpmpp
from fewstep.train import untrained

FEW = "--n 40 --batch 16"


@pytest.fixture(scope="session")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two generators of digits: one without fixed steps, and one whose card says that it was distilled to two."""
    folder, data = tmp_path_factory.mktemp("compare"), load_data("digits")
    teacher = untrained(data, "resmlp", width=16, embedding=8, blocks=1)
    student = untrained(data, "resmlp", width=24, embedding=8, blocks=1)
    # An untrained network gives the same grey for every noise.
    for made in (teacher, student):
        torch.manual_seed(0)
        with torch.no_grad():
            for p in made.network.parameters():
                p.add_(0.1 * torch.randn_like(p))
    D = student.denoiser
    student = student.with_sampler(dpmpp(grid("karras", 2, D.sigma_min, D.sigma_max), 1))
    student.card["method"] = "SiD"
    return teacher.save(folder / "teacher"), student.save(folder / "student")


pytestmark = pytest.mark.usefixtures("apart")


def cli(line: str) -> None:
    main(shlex.split(line))


def numbers(folder: str) -> dict:
    return json.loads((Path(folder) / "compare.json").read_text())


def check_equal(a: str, b: str) -> None:
    """The same rows but for time; distances to the root of the rounding of singular covariances of few pictures."""
    for one, two in zip(numbers(a)["rows"], numbers(b)["rows"], strict=True):
        assert [one["fd"], *one["blocks"]] == pytest.approx([two["fd"], *two["blocks"]], rel=1e-7)
        assert one["scores"] == pytest.approx(two["scores"], rel=1e-7)
        for key in ("model", "sampler", "how", "nfe", "parameters", "fingerprint", "facts"):
            assert one[key] == two[key], key


@dataclass
class Made:
    """A row by hand."""

    label: str
    fd: float
    seconds: float
    nfe: int = 1
    blocks: list[float] = field(default_factory=list)


def rows_with(distances: list[float], seconds: list[float], spread: float = 0.01) -> list[Made]:
    """Rows whose differences have a known standard error: the blocks of row i deviate by i times a fixed pattern."""
    pattern = torch.tensor([1.0, -1.0] * 5, dtype=torch.float64)
    return [
        Made(f"row {i}", d, s, blocks=(d + i * spread * pattern).tolist())
        for i, (d, s) in enumerate(zip(distances, seconds, strict=True))
    ]


def test_the_interval_is_the_jackknife_with_students_factor() -> None:
    best, other = rows_with([1.0, 1.5], [1.0, 1.0])
    d = difference(other, best)
    error = (9 * 0.01**2) ** 0.5
    assert d.error == pytest.approx(error) and d.value == pytest.approx(0.5)
    assert d.high - d.value == pytest.approx(2.2621571628 * error) and d.p < 1e-3
    same = difference(best, best)
    assert (same.value, same.error, same.p) == (0, 0, 1)


def test_equal_generators_are_called_different_about_as_often_as_stated() -> None:
    """100 pairs of equal truth: 5 are expected, and both 0 and 15 would be a broken test of significance."""
    draw, target = torch.Generator().manual_seed(0), Target(torch.zeros(3).double(), torch.eye(3).double())
    wrong = 0
    for _ in range(100):
        pair = []
        common = torch.randn(200, 3, generator=draw)
        for name in "ab":
            features = 1.2 * (0.8 * common + 0.6 * torch.randn(200, 3, generator=draw))
            blocks = Blocks(3)
            blocks.add(features, torch.arange(200))
            fd, without = blocks.distances(target)
            pair.append(Made(name, fd, 1.0, blocks=without))
        wrong += difference(*pair).p < 0.05
    assert 1 <= wrong <= 12


def test_rounding_is_no_difference() -> None:
    best, other = rows_with([171.0, 171.0 + 3e-14], [2.0, 1.0], spread=0.0)
    assert verdict_of([best, other], n=40).ship == 1


def test_pairing_by_seed_narrows_the_interval() -> None:
    draw, target = torch.Generator().manual_seed(1), Target(torch.zeros(3).double(), torch.eye(3).double())
    common = torch.randn(400, 3, generator=draw)

    def row(features: torch.Tensor) -> Made:
        blocks = Blocks(3)
        blocks.add(features, torch.arange(400))
        fd, without = blocks.distances(target)
        return Made("", fd, 1.0, blocks=without)

    a, b = row(1.3 * common), row(1.3 * common + 0.1 * torch.randn(400, 3, generator=draw))
    apart = row(1.3 * torch.randn(400, 3, generator=draw))
    assert difference(b, a).error < 0.5 * difference(apart, a).error


def test_blocks_agree_with_the_measures() -> None:
    data, extractor = load_data("digits"), digits_extractor()
    images = data.take(torch.arange(0, 400)).x + 0.1
    features, blocks = extractor(images.clamp(-1, 1)), Blocks(64)
    for ids in torch.arange(400).split(37):
        blocks.add(features[ids], ids)
    target = Target.of(Moments.of(extractor(data.take(torch.arange(len(data))).x)))
    fd, without = blocks.distances(target)
    assert fd == pytest.approx(evaluate(images.clamp(-1, 1), data, metrics=["fd"])["fd@400"], rel=1e-10)
    error = jackknife(torch.tensor(without, dtype=torch.float64))
    assert error == pytest.approx(frechet_error(features, Moments.of(features), target), rel=1e-8)


def test_the_fastest_that_is_not_shown_to_be_worse_is_used() -> None:
    v = verdict_of(rows_with([1.0, 1.02, 1.5], [9.0, 3.0, 1.0]), n=1000)
    assert (v.best, v.ship, v.equal) == (0, 1, [0, 1])
    assert [v.standing(i) for i in range(3)] == ["best score", "use this", "worse"]
    text = " ".join([v.headline, *v.reasons])
    assert "Use row 1" in v.headline and "3 times as fast" in text and "row 2" in text
    assert "at most 0.0" in text and "not very" not in text


def test_a_wide_interval_is_called_unsure() -> None:
    v = verdict_of(rows_with([1.0, 1.1], [9.0, 3.0], spread=0.3), n=50)
    assert v.ship == 1 and "How sure: not very" in " ".join(v.reasons)


def test_a_tolerance_buys_speed() -> None:
    rows = rows_with([1.0, 1.2], [9.0, 3.0])
    assert verdict_of(rows, n=1000).ship == 0
    assert verdict_of(rows, n=1000, tolerance=0.2).ship == 1
    with pytest.raises(InputError, match="tolerance -1"):
        verdict_of(rows, n=1000, tolerance=-1)


def test_the_front_is_what_nothing_beats() -> None:
    v = verdict_of(rows_with([3.0, 2.0, 2.5, 1.0], [1.0, 2.0, 3.0, 4.0]), n=1000)
    assert v.front == [0, 1, 3]
    with pytest.raises(InputError, match="1 rows"):
        verdict_of(rows_with([1.0], [1.0]), n=10)


def test_shards_hold_the_generators_own_pictures(pair: tuple[Path, Path], tmp_path: Path) -> None:
    made = Generator.load(pair[1])
    expected = made.sample(30, seed=5)
    assert torch.equal(pictures_of(made, made.sampler, torch.arange(30), seed=5), expected)
    shards = Shards(tmp_path / "shards", 30, 5, 8)
    # As two processes would, one after the other.
    assert [shards.fill(made, made.sampler, rank=r, world=2) for r in (0, 1)] == [2, 2]
    assert shards.missing() == [] and torch.allclose(torch.cat(list(shards)), expected, atol=1e-5)
    before = torch.cat(list(shards))
    shards.place(1).unlink()
    shards.fill(made, made.sampler)
    assert torch.equal(torch.cat(list(shards)), before)


def test_compare_measures_each_row_at_the_same_seeds(
    pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    cli(f"compare {pair[0]} {pair[1]} --nfe 1,3 {FEW} --out both")
    body, said = numbers("both"), capsys.readouterr().out
    assert [(r["model"], r["nfe"]) for r in body["rows"]] == [
        *(("teacher", 1), ("teacher", 3), ("teacher", 35)),
        ("student", 2),
    ]
    student, data = Generator.load(pair[1]), load_data("digits")
    scores = evaluate(student.sample(40, seed=1, batch=16), data)
    row = body["rows"][3]
    assert row["fd"] == pytest.approx(scores["fd@40"], rel=1e-7)
    assert row["scores"]["recall@40"] == scores["recall@40"] and "accuracy@40" in row["scores"]
    assert row["parameters"] == sum(p.numel() for p in student.network.parameters()) and row["seconds"] > 0
    assert body["verdict"]["headline"] in " ".join(said.split()) and body["rows"][body["verdict"]["best"]]["fd"] == min(
        r["fd"] for r in body["rows"]
    )
    assert not list(Path("both").rglob("shard-*"))
    # The command on the page gives the same numbers again.
    cli(" ".join(body["command"].split()[1:]) + " --out again")
    check_equal("again", "both")


def test_a_killed_comparison_goes_on_to_the_same_numbers(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    line = f"compare {pair[0]} {pair[1]} --nfe 1 --no-own {FEW}"
    cli(f"{line} --out whole")
    from fewstep.report import shards

    real, calls = shards.save_tensors, []

    def killed(path: Path, tensors: dict) -> None:
        calls.append(path)
        if len(calls) == 5:
            raise KeyboardInterrupt
        real(path, tensors)

    monkeypatch.setattr(shards, "save_tensors", killed)
    with pytest.raises(SystemExit):
        cli(f"{line} --out part")
    assert len(list(Path("part").rglob("row.json"))) == 1 and not Path("part/compare.json").exists()
    left = len(calls)
    cli(f"{line} --out part --resume")
    # Three shards make a row, one of the second row's was there.
    assert len(calls) - left == 2
    check_equal("part", "whole")


def test_a_table_and_calibrated_rows(pair: tuple[Path, Path]) -> None:
    made = Generator.load(pair[0])
    table = replace(dpmpp(grid("karras", 2, 0.01, 70.0), 2), name="mine")
    save_sampler(table, Path("mine.json"))
    cli(f"compare {pair[0]} --nfe 2 --sampler calibrated --table mine.json --no-own --n 20 --batch 20 --out run")
    assert [(r["sampler"], r["nfe"]) for r in numbers("run")["rows"]] == [("calibrated", 2), ("mine", 2)]
    report = json.loads(Path("run/samplers/teacher-2.json").read_text())["meta"]["calibration"]
    assert report["fingerprint"] == made.fingerprint()


def test_statistics_as_the_reference(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    data, extractor = load_data("digits"), digits_extractor()
    Statistics.of(Moments.of(extractor(data.take(torch.arange(len(data))).x)), extractor, "digits").save("real.npz")
    cli(f"compare {pair[0]} {pair[1]} --nfe 1 --no-own {FEW} --data real.npz --out stats")
    cli(f"compare {pair[0]} {pair[1]} --nfe 1 --no-own {FEW} --metrics fd --out data")
    for a, b in zip(numbers("stats")["rows"], numbers("data")["rows"], strict=True):
        assert a["fd"] == pytest.approx(b["fd"], rel=1e-7) and set(a["scores"]) == {"accuracy@40"}
    with pytest.raises(SystemExit):
        cli(f"compare {pair[0]} {pair[1]} {FEW} --data real.npz --extractor pixel --out no")
    assert "choose the extractor that it was made with (digits)" in capsys.readouterr().err
    assert not Path("no").exists()


BAD = {
    "{t} {s} --nfe 0": "at least 1 evaluation",
    "{t} {s} --nfe 1,x": "whole numbers separated by commas",
    "{t} {t}": "given twice",
    "{t} {t}/": "given twice",
    "{s}": "only one row",
    "{t} {s} --nfe 2 --sampler heun --no-own": "has no row",
    "{t} {s} --sampler nothing": "unknown sampler 'nothing'",
    "{t} {s} --n 19": "at least 20 pictures",
    "{t} {s} --batch 0": "--batch must be at least 1",
    "{t} {s} --tolerance -1": "share of the best score",
    "{t} {s} --data stacked-digits": "makes pictures of (1, 8, 8)",
    "{t} {s} --metrics fd,nothing": "unknown metric 'nothing'",
    "{t} {s} --metrics modes": "modes",
    "{t} {s} --resume": "--resume needs --out",
    "{t} missing": "missing",
}


@pytest.mark.parametrize("line", BAD)
def test_bad_input_is_one_line(line: str, pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli("compare " + line.format(t=pair[0], s=pair[1]))
    said = capsys.readouterr().err
    assert stop.value.code == 2 and BAD[line] in said and said.count("\n") == 1
    assert not Path("runs").exists()


def test_the_folder_of_another_comparison(pair: tuple[Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    line = f"compare {pair[0]} {pair[1]} --nfe 1 --no-own --n 20 --batch 20 --metrics fd --out run"
    cli(line)
    for more, expected in (
        ("", "already holds files"),
        (" --seed 3 --resume", "arguments.seed was 1 and is 3"),
    ):
        with pytest.raises(SystemExit):
            cli(line + more)
        assert expected in capsys.readouterr().err
    other = Generator.load(pair[0])
    with torch.no_grad():
        next(other.network.parameters()).add_(1.0)
    kept = (pair[0] / "student.safetensors").read_bytes()
    try:
        other.save(pair[0])
        with pytest.raises(SystemExit):
            cli(f"{line} --resume")
        assert "of another state" in capsys.readouterr().err
    finally:
        (pair[0] / "student.safetensors").write_bytes(kept)


class Parsed(HTMLParser):
    """Ids, references and what a page would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.fetched: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for key, value in attrs:
            if key == "id":
                self.ids.append(value or "")
            if key in ("src", "href") and not (value or "").startswith(("#", "data:")):
                self.fetched.append(value or "")
        assert tag != "script"


def page_of(name: str = "teacher") -> str:
    entries = []
    for row in rows_with([1.0, 1.02, 1.5], [9.0, 3.0, 1.0]):
        entries.append(
            Entry(
                model=name,
                sampler=row.label,
                how="by hand",
                nfe=4,
                seconds=row.seconds,
                batch=8,
                parameters=12_345,
                memory=None,
                fingerprint=None,
                fd=row.fd,
                blocks=row.blocks,
                scores={"recall@100": 0.5},
                errors={"recall@100": 0.01},
                facts={},
                pictures=torch.zeros(3, 1, 8, 8),
            )
        )
    verdict = verdict_of(entries, n=100)
    return render(Comparison(entries, verdict, "100 pictures", 100, "fewstep compare a b", ["1", "2", "3"]))


def test_the_page_is_one_file_with_the_verdict_first() -> None:
    text = page_of()
    parsed = Parsed(text)
    assert parsed.fetched == [] and len(parsed.ids) == len(set(parsed.ids))
    assert set(re.findall(r'(?:href="|url\()#([\w-]+)', text)) <= set(parsed.ids)
    shown = re.sub(r"<style>.*?</style>|<[^>]*>", " ", text, flags=re.S)
    order = ["Use teacher with row 1", "Quality against time", "The same noise", "All numbers", "fewstep compare a b"]
    places = [shown.index(part, shown.index("Verdict")) for part in order]
    assert places == sorted(places)
    assert "+0.0200" in shown and "12.3 k" in shown and text.count("data:image/png") == 3


def test_hostile_names_stay_text() -> None:
    text = page_of("<script>alert(1)</script>")
    assert "<script" not in text and "&lt;script&gt;" in text
