"""The page: one file, nothing from outside, everything escaped, parts that are missing left out."""

from __future__ import annotations

import base64
import io
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from PIL import Image
from rich.console import Console

from fewstep.errors import InputError
from fewstep.grid import karras
from fewstep.report import plots, table
from fewstep.report.page import render, write_page
from fewstep.report.results import Results, Row, Trajectories
from fewstep.report.svg import inline_svg
from fewstep.solve import euler

HOSTILE = (
    """</svg></style><script>alert(1)</script>"'><img src=x onerror=alert(2)> $\\frac{ $x $ & \x00\x1b[1m [bold]"""
)
VOID = {"meta", "img", "br", "link", "input", "hr"}


class Reader(HTMLParser):
    """Collects tags and attributes, and checks that every element is closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def read(page: str) -> Reader:
    reader = Reader()
    reader.feed(page)
    reader.close()
    assert not reader.open
    return reader


def row(name: str, group: str, nfe: int, fd: float, rmse: float | None = 0.1, n: int = 16, side: int = 8) -> Row:
    tableau = euler(karras(nfe, 0.002, 80.0)) if group == "solver" else None
    metrics = {"fd@2000": fd, "recall@500": 0.9 - fd / 10, "strange": 1.0}
    pictures = torch.rand(n, 1, side, side) * 2 - 1
    return Row(
        name, group, nfe, metrics, rmse, nfe * 0.1, 100, f"fewstep evaluate {name} --nfe {nfe}", pictures, tableau
    )  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def results() -> Results:
    rows = [row("teacher", "teacher", 35, 0.35, 0.002)]
    rows += [row(name, "solver", k, 2 / k + i, 0.5 / k) for i, name in enumerate(("euler", "dpmpp-2m")) for k in (3, 4)]
    rows += [row("calibrated", "calibrated", 3, 0.36, 0.05, n=20), row("SiD", "student", 1, 0.31, None)]
    levels = [80.0, 1.0, 0.0]
    start = torch.randn(6, 64) * 80
    paths = [
        Trajectories(n, levels, torch.stack([start, torch.randn(6, 64), torch.randn(6, 64)]))
        for n in ("teacher", "euler")
    ]
    curve = [
        {"step": i, "images": i, "seconds": 1.0, "skipped": 0, "fake/loss": 1 / i, "net/loss": -i} for i in range(1, 50)
    ]
    return Results(
        "Digits in one step",
        ["One evaluation is enough.", "Calibration needs three."],
        "1797 digits",
        rows,
        {"fd@2000": 0.0823},
        {"SiD": curve},
        paths,
        {"machine": "2 cores", "seed": "0"},
        [("fd below 0.4 at 3", "0.36", True), ("fd below 0.3 at 1", "0.31", False)],
    )


@pytest.fixture(scope="module")
def written(results: Results, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_page(results, tmp_path_factory.mktemp("report") / "new" / "page.html")


@pytest.fixture(scope="module")
def page(written: Path) -> str:
    return written.read_text()


def test_one_file_that_needs_nothing_else(page: str, written: Path) -> None:
    assert [p.name for p in written.parent.iterdir()] == ["page.html"]
    assert "://" not in page and "@import" not in page
    for tag, attributes in read(page).tags:
        assert tag not in {"script", "link", "iframe", "object", "embed"}
        for key, value in attributes.items():
            assert not key.startswith("on")
            if key in {"src", "href", "xlink:href"}:
                assert (value or "").startswith(("data:image/png;base64,", "#"))
    assert len(page) < 1_000_000


def test_ids_are_unique_and_every_reference_hits_one(page: str) -> None:
    tags = read(page).tags
    ids = [a["id"] for _, a in tags if "id" in a]
    assert len(ids) == len(set(ids))
    wanted = re.findall(r"url\(#([^)]+)\)", page) + [
        str(a["href"])[1:] for _, a in tags if str(a.get("href")).startswith("#")
    ]
    assert len(wanted) > 20 and set(wanted) <= set(ids)


def test_says_everything_in_order(page: str, results: Results) -> None:
    text = " ".join(read(page).text)
    for r in results.rows:
        assert f"<code>{r.command}</code>" in page
    for part in (*results.summary, *results.facts, *results.facts.values(), "0.0823", "1797 digits"):
        assert part in text
    for (asked, reached, met), verdict in zip(results.targets, ("✓ met", "✗ missed"), strict=True):
        assert re.search(rf"{asked}</th><td>{reached}</td><td><span[^>]*>{verdict}<", page) and met == verdict.endswith(
            " met"
        )
    assert re.findall(r"<h2 id=\"(\w+)\"", page) == [
        *("targets", "quality", "pictures", "rows", "training", "paths", "tableaux", "facts", "commands")
    ]
    assert page.index(results.summary[0]) < page.index("1 of 2 met") < page.index('<h2 id="quality"')


def test_figures_have_words_and_no_fixed_ink(page: str) -> None:
    tags = read(page).tags
    figures = [a for tag, a in tags if tag == "svg"]
    assert len(figures) == 2 + 1 + 1 + 4
    assert all(a["role"] == "img" and len(a["aria-label"] or "") > 20 for a in figures)
    assert "euler at 3: 0.667" in (figures[0]["aria-label"] or "")
    assert all(a.get("alt") for tag, a in tags if tag == "img")
    assert plots.INK in page and not re.search(rf"<(text|path|use|g)[^>]*{plots.INK}", page)


def test_best_of_equal_nfe_is_bold(page: str, results: Results) -> None:
    three = dict(table.grouped(results.rows))["3 evaluations"]
    by_key = {c.key: c for c in table.columns(results)}
    assert [r.name for r in three] == ["euler", "dpmpp-2m", "calibrated"]
    assert table.best(three, by_key["fd@2000"]) == 0.36 and "<b>0.360</b>" in page
    assert table.best(three, by_key["recall@500"]) == pytest.approx(0.9 - 0.036)
    assert table.best(three, by_key["strange"]) is None and "n = 500" in page
    assert table.best(results.rows[:1], by_key["fd@2000"]) is None


def test_sheets_hold_the_same_seeds(page: str, results: Results) -> None:
    sheets = [a for tag, a in read(page).tags if tag == "img"]
    assert len(sheets) == len(results.rows)
    images = [Image.open(io.BytesIO(base64.b64decode(str(a["src"]).partition(",")[2]))) for a in sheets]
    assert {image.size for image in images} == {(4 * 9 + 1, 4 * 9 + 1)}
    assert all(str(a["alt"]).startswith("16 pictures") for a in sheets)
    assert "image-rendering: pixelated" in page
    first = torch.tensor(list(images[0].convert("L").crop((1, 1, 9, 9)).tobytes())).reshape(8, 8)
    assert (first - (results.rows[0].pictures[0, 0] + 1) * 127.5).abs().max() <= 0.51


def test_large_pictures_are_shrunk_and_fewer() -> None:
    page = render(Results("t", [], "d", [row(f"s{i}", "student", 1, 0.3, side=256) for i in range(12)]))
    sizes = {(a["width"], a["height"]) for tag, a in read(page).tags if tag == "img"}
    assert sizes == {(str(3 * 65 + 1), str(3 * 65 + 1))} and "shrunk to 64 pixels" in page
    assert len(page) < 3_000_000


def test_hostile_names_stay_text(results: Results) -> None:
    bad = [row(HOSTILE, "solver", 3, 0.5), row(HOSTILE + "2", "student", 1, 0.4)]
    bad[0] = Row(
        **{**vars(bad[0]), "tableau": euler(karras(3, 0.002, 80.0))[0:3], "metrics": {HOSTILE: 1.0, "fd@<i>": 2.0}}
    )
    object.__setattr__(bad[0].tableau, "name", HOSTILE)
    paths = [Trajectories(HOSTILE, t.levels, t.points) for t in results.trajectories]
    curve = [{"step": i, HOSTILE + "/loss": 1.0 + i} for i in range(5)]
    found = Results(HOSTILE, [HOSTILE], HOSTILE, bad, {HOSTILE: 1.0}, {HOSTILE: curve}, paths, {HOSTILE: HOSTILE}, [])
    found.targets = [(HOSTILE, HOSTILE, True)]
    page = render(found)
    tags = read(page).tags
    assert {"script", "i"}.isdisjoint(tag for tag, _ in tags)
    assert all(not key.startswith("on") for _, a in tags for key in a)
    assert all(str(a["src"]).startswith("data:") for tag, a in tags if tag == "img")
    Console(file=io.StringIO(), width=200).print(plots.terminal_table(found))


def test_minimal_results(tmp_path: Path) -> None:
    only = Row("teacher", "teacher", 18, {"fd@100": 1.0}, None, 0.0, 0, "", torch.zeros(1, 3, 4, 4))
    page = render(Results("t", [], "d", [only]))
    assert re.findall(r"<h2 id=\"(\w+)\"", page) == ["quality", "pictures", "rows"]
    assert "None" not in page and "nan" not in page and read(page)
    nothing = render(Results("t", [], "d", []))
    assert "<h2" not in nothing and read(nothing)


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_non_finite_values_leave_their_cell_out(bad: float, results: Results) -> None:
    rows = [row("a", "student", 3, bad, bad), row("b", "student", 3, 0.5, bad), row("c", "student", 3, 0.6, 0.0)]
    rows[0].pictures[0] = bad
    curve = [{"step": 1, "a/loss": bad}, {"step": 2, "a/loss": 1.0}, {"step": 3, "a/loss": 2.0}]
    broken = Trajectories("a", [1.0, 0.0], torch.full((2, 3, 4), bad))
    page = render(Results("t", [], "d", rows, {"fd@2000": bad}, {"a": curve}, [broken]))
    text = " ".join(read(page).text)
    assert "nan" not in text and not re.search(r"\binf\b", text) and "<b>0.500</b>" in page
    assert 'id="paths"' not in page and 'id="training"' in page
    assert read(render(Results("t", [], "d", rows[:1])))


def test_a_place_that_cannot_be_written(results: Results, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        write_page(Results("t", [], "d", []), tmp_path / "file" / "page.html")


def test_styles_belong_to_names(results: Results) -> None:
    looks = plots.styles(results)
    assert looks["teacher"].colour == plots.INK and len(set(looks.values())) == 5
    many = Results("t", [], "d", [row(f"s{i}", "student", 1, 0.3) for i in range(50)])
    many.trajectories = [Trajectories("s3, 4 evaluations", [1.0], torch.zeros(1, 1, 1))]
    many.trajectories.append(Trajectories("converged", [1.0], torch.zeros(1, 1, 1)))
    many.curves = {"S3": []}
    looks = plots.styles(many)
    assert looks.pop("converged").colour == plots.INK and looks["S3"] == looks["s3, 4 evaluations"] == looks["s3"]
    assert len(set(looks.values())) == 50


def test_colours_read_on_white_and_on_black() -> None:
    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark = luminance("#14171b")
    for colour in plots.PALETTE:
        assert 1.05 / (luminance(colour) + 0.05) >= 3 and (luminance(colour) + 0.05) / (dark + 0.05) >= 3


def test_axis_labels_every_nfe_that_occurs(results: Results) -> None:
    figure = plots.quality_figure(results)
    assert figure is not None
    axis = figure.axes[0]
    assert axis.get_xscale() == "log"
    labels = [t.get_text() for t in axis.get_xticklabels()]
    assert {"1", "3", "4", "35"} <= set(labels) and all(label.isdigit() for label in labels)
    assert {round(float(line.get_ydata()[0]), 4) for line in axis.lines[:2]} == {0.35, 0.0823}  # type: ignore[index,arg-type]
    rmse = plots.rmse_figure(results)
    assert rmse is not None and rmse.axes[0].get_yscale() == "log" and "SiD" not in str(inline_svg(rmse, "x", "y"))


def test_smoothing_starts_without_bias() -> None:
    assert plots.smooth([2.0] * 5, 10) == pytest.approx([2.0] * 5)
    assert plots.smooth([1.0, 0.0], 3) == pytest.approx([1.0, 1 / 3])


def test_plane_holds_the_two_widest_directions() -> None:
    levels = [3.0, 0.0]
    basis = torch.linalg.qr(torch.randn(40, 3, dtype=torch.float64)).Q.T
    flat = torch.randn(2, 4, 3, dtype=torch.float64) * torch.tensor([5.0, 2.0, 0.0])
    points = flat @ basis
    spread = (points[-1] - points[-1].mean(0)).square().mean().sqrt()
    planes, shares, s = plots.principal_plane([Trajectories("a", levels, points)], samples=4)
    assert s == pytest.approx(float(spread)) and sum(shares) == pytest.approx(1.0)
    scaled = (flat / (torch.tensor(levels).double() ** 2 + s**2).sqrt()[:, None, None]).flatten(0, 1)
    assert torch.allclose(
        torch.cdist(planes[0].flatten(0, 1), planes[0].flatten(0, 1)), torch.cdist(scaled, scaled), atol=1e-6
    )
    one, _, _ = plots.principal_plane([Trajectories("a", [1.0], torch.zeros(1, 1, 3))])
    assert one[0].tolist() == [[[0.0, 0.0]]]


def test_numbers() -> None:
    shown = [
        table.show(v) for v in (None, math.nan, 0.0, 0.35, 12.0, 123.4, 999.9, 12345.6, 0.000394, -0.00002, 0.9996)
    ]
    assert shown == ["", "", "0.00", "0.350", "12.0", "123", "1,000", "12,346", "3.9e-4", "-2.0e-5", "1.00"]


def test_terminal_table(results: Results) -> None:
    held = io.StringIO()
    Console(file=held, width=120).print(plots.terminal_table(results))
    text = held.getvalue()
    assert "…" not in text and all(r.name in text for r in results.rows) and "0.0823" in text and "@2000" in text
