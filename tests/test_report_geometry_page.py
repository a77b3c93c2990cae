"""The geometry page and its command: whole, self-contained, and open about what it leaves out."""

from __future__ import annotations

import math
import re
import shlex
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fewstep.cli import main
from fewstep.core.generator import Generator
from fewstep.core.noise import Noise
from fewstep.core.solver import build
from fewstep.errors import InputError
from fewstep.grid.karras import karras
from fewstep.report import geometry
from fewstep.report.geometry import measure_geometry
from fewstep.report.geometry_page import curvature_figure, summary, write_geometry
from fewstep.report.svg import inline_svg
from fewstep.solve import AdaptiveDPM
from known_gaussians import LEVELS, exact_table, gaussian
from tiny_runs import tiny


class Page(HTMLParser):
    """Ids, references and whether all elements are closed."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.ids: list[str] = []
        self.links: list[str] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.ids += [v or "" for k, v in attrs if k == "id"]
        self.links += [v or "" for k, v in attrs if k in ("href", "src")]
        if tag not in ("meta", "br", "img"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


NO_TABLE, NOISY, FITTED = "not a table of weights", "adds noise", "Fitted: belongs to one grid"


@pytest.mark.parametrize(
    ("kind", "said", "unsaid"),
    [
        ("euler", ["measured order", "this step alone", "Denoiser", "worst single step"], [NO_TABLE, NOISY, FITTED]),
        ("heun", ["Stages inside a step are not shown", "this step alone"], [NO_TABLE, NOISY]),
        ("fitted", [FITTED, "this step alone"], ["measured order", NO_TABLE]),
        ("noisy", [NOISY, "relative error of the result's spread"], ["this step alone", "measured order", NO_TABLE]),
        ("adaptive", [NO_TABLE, "whole run so far"], ["this step alone", "measured order", "the result's spread"]),
        ("long", ["100 rows, which is too many"], ["The numbers", NO_TABLE]),
    ],
)
def test_the_page_is_whole_and_says_what_is_left_out(
    kind: str, said: list[str], unsaid: list[str], tmp_path: Path
) -> None:
    problem, grid = gaussian(0.05, 0.4, 1.5), karras(4, 0.02, 20.0)
    sampler = {
        "euler": build("euler", grid),
        "heun": build("heun", grid)[:],
        "fitted": exact_table(0.7, LEVELS[::6]),
        "noisy": build("euler_ancestral", grid),
        "adaptive": AdaptiveDPM(20.0, 0.02),
        "long": build("euler", karras(100, 0.02, 20.0))[:],
    }[kind]
    found = measure_geometry(problem, sampler, Noise.of(0, 8), {}, name="<b>name</b>")
    file = write_geometry(found, tmp_path / "p.html", title="A & B", facts={"Denoiser": "a <Gaussian>"})
    text = file.read_text()
    page = Page(text)
    assert not page.open and len(set(page.ids)) == len(page.ids)
    assert all(link.startswith("data:") or link[1:] in page.ids for link in page.links)
    assert "<b>name" not in text and "a &lt;Gaussian&gt;" in text and "<title>A &amp; B</title>" in text
    words = text.replace("&#39;", "'")
    assert all(s in words for s in said), [s for s in said if s not in words]
    assert not any(s in words for s in unsaid), [s for s in unsaid if s in words]
    assert not re.search(r"\bnan\b|\binf\b", re.sub(r"<svg.*?</svg>", "", text, flags=re.S))


def test_the_summary_states_the_measured_numbers() -> None:
    problem = gaussian(0.05, 0.4, 1.5)
    found = measure_geometry(problem, build("euler", karras(4, 0.02, 20.0)), Noise.of(0, 8), {}, name="euler")
    said = " ".join(summary(found))
    assert f"{float(found.total[-1].mean()):#.3g}".rstrip(".") in said and "4 evaluations" in said
    turned = math.degrees(float(geometry.turning(found.curves).mean(1).sum()))
    assert f"turns by {turned:.0f}" in said
    straight = measure_geometry(gaussian(0.3, 0.3), build("euler", karras(4, 0.02, 20.0)), Noise.of(0, 8), {})
    assert "turns by" not in " ".join(summary(straight))
    # Nothing to see is not an error.
    assert "<svg" in inline_svg(curvature_figure(straight), "bend", "straight")


def test_write_geometry_wants_html(tmp_path: Path) -> None:
    found = measure_geometry(gaussian(0.05, 1.5), build("euler", karras(3, 0.02, 20.0)), Noise.of(0, 8), {})
    with pytest.raises(InputError, match=r"must end in \.html"):
        write_geometry(found, tmp_path / "p.pdf", title="t")
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny().save(tmp_path_factory.mktemp("geometry") / "gen")


def test_show_geometry(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("t.json").write_text(build("euler", karras(2, 0.01, 50.0))[:].to_json())
    main(shlex.split(f"show {folder} --geometry --sampler t.json --force --samples 8 --seed 5"))
    text = Path("geometry.html").read_text()
    assert "2 evaluations" in text and Generator.load(folder).fingerprint() in text
    assert "--geometry --sampler t.json --force --samples 8 --seed 5 --out geometry.html" in text


def test_show_geometry_builds_named_samplers(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("fewstep.report.geometry_page.render", lambda measured, title, facts: facts["Sampler"])
    main(shlex.split(f"show {folder} --geometry --sampler dpmpp2m --steps 3 --samples 8 --out {tmp_path}/a/p.html"))
    assert (tmp_path / "a/p.html").read_text() == "dpmpp-2m, 3 evaluations, sigma 80 to 0"
    assert "8 trajectories, dpmpp-2m, 3 evaluations" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("show {place} --geometry", "--geometry needs the folder of a generator"),
        ("show {place}/none --geometry", "--geometry needs the folder of a generator"),
        ("show {gen} --geometry --samples 7", "--samples must be at least 8, got 7"),
        ("show {gen} --geometry --out page.png", "--out must end in .html"),
        ("show {gen} --geometry --sampler nobody", "nobody"),
        ("show {gen} --geometry --steps 3", "--steps needs a named --sampler"),
        ("show {gen} --sampler euler", "--sampler says how to measure: pass --geometry"),
        ("show {gen} --sigma-min 0.1", "--sigma-min says how to measure: pass --geometry"),
        ("show {gen} --samples 9", "--samples says how to measure: pass --geometry"),
    ],
)
def test_show_geometry_refuses_in_one_line(
    line: str, said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line.format(place=tmp_path, gen=folder)))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and said in told and told.count("\n") == 1
