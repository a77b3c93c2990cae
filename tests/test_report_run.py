"""The page of a run: finished, in progress, stopped, resumed, damaged; and that it changes nothing of training."""

from __future__ import annotations

import json
import math
import re
import shutil
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from conftest import WAIT
from fewstep.cli import main
from fewstep.core.options import Budget, FitOptions, Report
from fewstep.core.role import Ema, Optim
from fewstep.core.state import Run
from fewstep.distill import VSD
from fewstep.errors import CollapseError, InputError
from fewstep.report.run_page import BYTES, Live, follow, write_run_page
from fewstep.report.run_plots import MOST, Chart, Curve, draw, limits, log_steps, short, steps_of, thin
from fewstep.report.run_view import clock, flat, read_run, size, span
from fewstep.train.health import across, spread
from fewstep.train.monitor import SHEETS, Monitor, machine, read_monitor, sheets
from tiny_runs import STEADY, Stop, bits, differing, log_of, run, tiny

METHOD = VSD(student=STEADY, fake=STEADY, ema=Ema(rate=0.5))
WILD = VSD(student=Optim(lr=1.0), fake=Optim(lr=1.0), ema=Ema(rate=0.5))
NOW = 1_800_000_000.0


def go(out: Path, method: Any = METHOD, **options: Any) -> Any:
    return run("VSD", out, method=method, **({"budget": 12, "check_every": 2, "micro": 1} | options))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run that was watched and wrote its page; not to be changed."""
    out = tmp_path_factory.mktemp("runs") / "finished"
    go(out, page=True)
    return out


def made(folder: Path, count: int = 30, *, budget: float = 1000, **more: Any) -> Path:
    """A run folder in progress, written by hand: ``count`` reports every 20 steps, 2 s apart, the last just now."""
    folder.mkdir(parents=True, exist_ok=True)
    options = {"budget": {"amount": budget, "unit": "steps"}, "batch": 8}
    recipe = {"method": "SiD", "settings": {"alpha": 1.2, "student": {"lr": 1e-4}}, "options": options}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    lines, monitor = [], [{"at": NOW - 2 * count, "step": 0, "event": "started"}]
    for k in range(1, count + 1):
        loss = 2 * math.exp(-k / 10) + 0.01 * math.sin(7 * k)
        entry = {"step": 20 * k, "images": 160 * k, "seconds": 2.0 * k, "skipped": 0}
        lines.append({**entry, "student/loss": loss, "student/grad_norm": 1.0, **more})
        told = {"at": NOW - 2 * (count - k), "step": 20 * k, "rates": {"student": 1e-4}, "memory": 5e8, "cores": 1.5}
        monitor.append(told)
    (folder / "log.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "monitor.jsonl").write_text("".join(json.dumps(line) + "\n" for line in monitor))
    return folder


def page_of(folder: Path, **more: Any) -> str:
    return write_run_page(folder, folder.parent / "page.html", **({"now": NOW + 1} | more)).read_text()


def heading(text: str) -> str:
    found = re.search(r"<h1>(.*?)</h1>", text, re.S)
    assert found is not None
    return found[1].strip()


# ---- quality


def test_the_energy_distance_is_that_of_the_laws() -> None:
    g = torch.Generator().manual_seed(0)

    def energy(x: torch.Tensor, y: torch.Tensor) -> float:
        return 2 * across(x, y) - spread(x)["distance"] - spread(y)["distance"]

    def drawn(shift: float = 0.0) -> torch.Tensor:
        return torch.randn(64, 1, 1, 1, generator=g) + shift

    same, apart = ([energy(drawn(), drawn(shift)) for _ in range(200)] for shift in (0.0, 1.0))
    assert abs(sum(same)) / 200 < 0.01
    # Two normal laws of deviation 1 that are 1 apart: 2 E|N(1, 2)| - 2 E|N(0, 2)|.
    known = 2 * (2 / math.pi**0.5 * math.exp(-1 / 4) + math.erf(1 / 2)) - 4 / math.pi**0.5
    assert sum(apart) / 200 == pytest.approx(known, abs=0.03)


def test_quality_is_logged_with_every_look(finished: Path) -> None:
    entries = read_run(finished).entries
    assert entries[0]["step"] == 0 and all(math.isfinite(e["health/energy"]) for e in entries)
    assert "Quality of the samples" in (finished / "run.html").read_text()


# ---- charts


def test_axes_have_round_numbers() -> None:
    assert steps_of(0, 1) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert steps_of(3, 47, 4) == [10, 20, 30, 40]
    assert log_steps(0.9, 1100) == [1, 10, 100, 1000]
    assert log_steps(0.2, 0.6) == pytest.approx([0.2, 0.3, 0.4, 0.5, 0.6])
    assert 3 <= len(log_steps(1e-9, 1e9)) <= 7 and len(log_steps(1.0, 1.2)) >= 2
    told = {0: "0", 0.25: "0.25", 500: "500", 20_000: "20k", 1_500_000: "1.5M", 2.5e-4: "2.5e-4", -3e-5: "-3e-5"}
    assert {value: short(value) for value in told} == told


def test_thinning_keeps_spikes_and_ends() -> None:
    points = [(float(k), 0.0) for k in range(10_000)]
    points[4321] = (4321.0, 9.0)
    kept = thin(points)
    assert len(kept) <= MOST + 2 and (4321.0, 9.0) in kept and kept[0][0] == 0 and kept[-1] == points[-1]
    assert kept == sorted(kept) and thin(points[:9]) == points[:9]


def test_scales_suit_the_values() -> None:
    line = Curve("a", [(0.0, 1.0), (1.0, 100.0)], "red")
    assert limits([line], log=None, zero=False)[2] and not limits([line], log=False, zero=False)[2]
    assert not limits([Curve("a", [(0, 0.0), (1, 100.0)], "red")], log=None, zero=False)[2]
    assert limits([line], log=False, zero=True)[0] == 0
    # One spike among raw values does not press the rest flat, but an average is never cut.
    raw = [(float(k), 1.0 + 0.1 * (k % 3)) for k in range(400)] + [(400.0, 1e6)]
    assert limits([Curve("a", [(0.0, 1.0)], "red", raw)], log=None, zero=False)[1] < 2
    low, high, _ = limits([Curve("a", [(0.0, 3.0)], "red")], log=None, zero=False)
    assert low < 3 < high


def test_lines_are_where_their_values_are() -> None:
    svg = str(draw(Chart("T <b>", [Curve("a", [(0.0, 0.0), (50.0, 5.0), (100.0, 10.0)], "red")], zero=True)))
    path = re.search(r'<path d="M([^"]*)" fill="none" class="curve"', svg)
    assert path is not None and "<b>" not in svg
    (x0, y0), (x1, y1), (x2, y2) = (map(float, pair.split()) for pair in path[1].split("L"))
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y2 < y0
    assert "NaN" not in svg and "id=" not in svg


def test_numbers_read_well() -> None:
    times = (3.21, 45, 480, 7500, 3 * 86400 + 4 * 3600)
    assert [span(s) for s in times] == ["3.2 s", "45 s", "8 min", "2 h 5 min", "3 d 4 h"]
    assert (size(3.5e8), size(2.5e9)) == ("350 MB", "2.50 GB")
    assert re.fullmatch(r"\d\d:\d\d", clock(NOW, NOW)) and len(clock(NOW - 5 * 86400, NOW)) > 5
    assert flat({"a": {"b": 1e-5, "c": None}, "d": (1, 2), "e": True}) == {"a.b": "1e-05", "d": "1, 2", "e": "yes"}


# ---- pages


def test_the_page_of_a_finished_run(finished: Path) -> None:
    text = (finished / "run.html").read_text()
    assert heading(text).startswith("Finished.") and "100 %" in text
    for part in ("Samples over time", "Variety of the samples", "Fake score&#39;s loss", "Direction by noise level"):
        assert part in text
    for part in ("Loss of student", "Loss of fake", "Gradient norm", "Learning rate", "Images per second", "Memory"):
        assert part in text
    # Nothing is fetched and nothing runs.
    assert "<script" not in text and "http" not in text.replace("http-equiv", "") and "default-src 'none'" in text
    sources = re.findall(r'src="([^"]{30})', text)
    assert sources and all(source.startswith("data:image/png;base64,") for source in sources)
    assert len(text) < 2e6
    told = json.loads((finished / "run.js").read_text().removeprefix("fewstepRun(").removesuffix(");\n"))
    assert told["live"] is False and "Finished." in told["html"] and told["title"].startswith("Finished")


def test_the_page_of_a_run_in_progress(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    text = page_of(folder)
    assert heading(text).startswith("Running.") and "60 %" in text and "<title>60% SiD in run</title>" in text
    # 400 of 1000 steps are left at 10 a second.
    assert read_run(folder).left() == pytest.approx(40.0) and "40 s<small>done at about" in text
    assert "80.0 img/s" in text and "500 MB" in text and "1.5 cores" in text
    assert "Nobody has looked at the samples." in text and "Samples over time" not in text
    # Long after its last word nobody takes it for running.
    late = page_of(folder, now=NOW + 3600)
    assert heading(late) == "Not finished, and silent for 60 min. No trouble so far."
    assert "<title>Silent: SiD in run</title>" in late and "Time left" in text and "Time left" not in late


def test_time_left_follows_the_recent_pace_and_the_budget(tmp_path: Path) -> None:
    folder = made(tmp_path / "run")
    slow = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for k, entry in enumerate(slow):
        entry["seconds"] = 2.0 * min(k + 1, 15) + 20.0 * max(0, k - 14)
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in slow))
    assert read_run(folder).left() == pytest.approx(400.0)
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["options"]["budget"] = {"amount": 500.0, "unit": "seconds"}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    assert read_run(folder).left() == pytest.approx(500 - 330) and read_run(folder).progress() == pytest.approx(0.66)


def test_a_run_that_has_said_nothing_yet(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", 0)
    assert "There is no report yet." in page_of(folder) and read_run(folder).left() is None
    # Before there was a monitor nobody wrote down when.
    (folder / "monitor.jsonl").unlink()
    assert "No time was written down" in page_of(folder)
    (folder / "log.jsonl").unlink()
    assert heading(page_of(folder)).startswith("Not finished, and silent.")


def test_a_last_line_that_was_cut_is_left_out(tmp_path: Path, finished: Path) -> None:
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("log.jsonl", "monitor.jsonl"):
        with (folder / name).open("a") as file:
            file.write('{"step": 14, "seco')
    assert len(read_run(folder).log) == len(read_run(finished).log) and heading(page_of(folder)).startswith("Finished.")
    (folder / "log.jsonl").write_text('{"steps": 1}\n')
    with pytest.raises(InputError, match="expected objects with a step"):
        write_run_page(folder)


def test_bad_news_comes_first(tmp_path: Path) -> None:
    ill = {"health/variance": 0.01, "collapsed": "samples have become <alike>"}
    text = page_of(made(tmp_path / "ill", 3, **ill))
    assert heading(text) == "Running. Something is wrong." and "become &lt;alike&gt;" in text and "mark ill" in text
    assert "<alike>" not in text
    lost = page_of(made(tmp_path / "lost", 3, **{"student/loss": None}))
    assert "Not finite in the newest report: student/loss" in lost and "Something is wrong." in heading(lost)
    skipped = page_of(made(tmp_path / "skipped", 3, skipped=2, **{"health/variance": 0.5, "health/nearest": 0.5}))
    assert heading(skipped) == "Running. Worth a look." and "2 updates skipped" in skipped
    good = page_of(made(tmp_path / "good", 3, **{"health/variance": 0.5, "health/nearest": 0.5}))
    assert heading(good) == "Running. Healthy."
    # The same samples are no news at the start, and worth a look at the end.
    blur = {"health/variance": 0.01, "health/nearest": 0.05}
    assert heading(page_of(made(tmp_path / "early", 3, **blur))) == "Running. No trouble so far."
    assert heading(page_of(made(tmp_path / "late", 45, **blur))) == "Running. Worth a look."


def test_gradients_that_grow_are_told(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", 40)
    entries = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    for k, entry in enumerate(entries):
        entry["student/grad_norm"] = 1.0 if k < 25 else 10.0
    (folder / "log.jsonl").write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    assert "The gradient of student has grown 10-fold" in page_of(folder)


def test_quality_is_drawn_where_it_was_measured(tmp_path: Path) -> None:
    text = page_of(made(tmp_path / "run", 5, **{"quality/fd": 3.25}))
    assert ">fd</h3>" in text and "<b>3.25</b>" in text


def test_a_run_without_looks_shows_its_sample_pictures(tmp_path: Path) -> None:
    go(tmp_path / "run", check_every=0, grid_every=4)
    text = page_of(tmp_path / "run")
    assert "Pictures of --grid-every" in text and "Step 12" in text and "Reference</strong>" not in text
    assert sheets(tmp_path / "run") == [] and "Variety of the samples" not in text


def test_a_page_stays_small(tmp_path: Path) -> None:
    folder = made(tmp_path / "run", 3000, budget=60_000, **{f"student/part{k}": 1.0 for k in range(5)})
    noise = torch.randint(0, 256, (300, 300, 3), dtype=torch.uint8)
    (folder / "looks").mkdir()
    for k in range(SHEETS):
        Image.fromarray(noise.numpy()).save(folder / "looks" / f"{20 * k:08d}.png")
    text = page_of(folder)
    shown = [int(step.replace(",", "")) for step in re.findall(r"<strong>Step ([\d,]+)</strong>", text)]
    assert len(text) < BYTES + 400_000 and shown[0] == 460 and shown == sorted(shown, reverse=True)
    assert "Start</strong>" in text and "24 sheets are kept" in text


def test_stages_are_listed_and_the_newest_is_shown(tmp_path: Path) -> None:
    parent = made(tmp_path / "run", 1)
    old, new = made(parent / "stages" / "0004", 50), made(parent / "stages" / "0002", 10)
    (old / "fewstep.json").write_text("{}")
    (old / "run.html").write_text("")
    text = page_of(parent)
    assert f'href="run/stages/{old.name}/run.html">0004</a>' in text and ">Finished<" in text
    assert f"20 % of {new.name}" in text and heading(text).startswith("Running.")
    assert "<title>20% SiD in run</title>" in text
    # A run that only leads its stages has no monitor of its own, and is finished when its student is there.
    (parent / "monitor.jsonl").unlink()
    assert heading(page_of(parent)).startswith("Running.")
    (parent / "fewstep.json").write_text("{}")
    assert heading(page_of(parent)).startswith("Finished.")


# ---- training


def test_training_ends_in_the_same_bits_with_and_without_the_page(tmp_path: Path, finished: Path) -> None:
    go(tmp_path / "plain")
    assert differing(bits(tmp_path / "plain"), bits(finished)) == []
    assert log_of(tmp_path / "plain") == log_of(finished)
    assert not (tmp_path / "plain" / "run.html").exists() and not (tmp_path / "plain" / "run.js").exists()
    lines = read_monitor(tmp_path / "plain")
    assert [line.get("event") for line in lines] == ["started", *[None] * 6, "finished"]
    assert [line["step"] for line in lines] == [0, 2, 4, 6, 8, 10, 12, 12]
    # Warmed up in two steps and on the way down a cosine.
    rates = [line["rates"]["student"] for line in lines[1:-1]]
    assert rates == sorted(rates, reverse=True) and rates[-1] == 0 and lines[1]["memory"] > 1e7


def test_a_run_that_was_cut_and_resumed(tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "run"
    with pytest.raises(Stop):
        go(out, page=True, stop=10)
    assert heading((out / "run.html").read_text()).startswith("Stopped before the end.")
    assert read_monitor(out)[-1] == {**read_monitor(out)[-1], "event": "stopped", "why": "Stop"}
    with (out / "monitor.jsonl").open("a") as file:
        file.write('{"at": 1')
    # Without the page: what it is made from is written all the same.
    go(out, resume=True)
    assert differing(bits(out), bits(finished)) == [] and log_of(out) == log_of(finished)
    events = [line["event"] for line in read_monitor(out) if "event" in line]
    assert events == ["started", "stopped", "resumed", "finished"]
    assert [p.name for p in sheets(out)] == [p.name for p in sheets(finished)]
    for sheet in sheets(out):
        assert sheet.read_bytes() == (finished / "looks" / sheet.name).read_bytes()
    text = page_of(out)
    assert heading(text).startswith("Finished.") and "<title>resumed</title>" in text


def test_a_collapse_is_on_the_page(tmp_path: Path) -> None:
    with pytest.raises(CollapseError) as error:
        go(tmp_path, WILD, page=True)
    text = (tmp_path / "run.html").read_text()
    assert heading(text) == "Stopped before the end. Something is wrong." and " collapsed<br>" in text
    assert str(error.value).split(":")[0] in text
    with pytest.raises(CollapseError, match="after 3 rollbacks"):
        go(tmp_path / "back", WILD, on_collapse="rollback", save_every=2)
    back = page_of(tmp_path / "back")
    assert back.count("Rolled back from step") == 3 and "learning rates times 0.125" in back


def test_sheets_are_spread_over_the_budget(tmp_path: Path) -> None:
    kept = Run(tmp_path)
    (tmp_path / "log.jsonl").touch()
    made_by, options = tiny(), FitOptions(Budget(10_000))
    with Monitor(kept, options) as monitor:
        monitor.begin(0, {})
        for step in range(0, 10_001, 20):
            done, ill = step == 10_000, step == 5_020
            monitor.look(torch.zeros(64, 1, 4, 4), made_by, Report(step, 0, 0.0, step / 1e4, {}, 0, done), ill=ill)
        monitor.look(torch.full((64, 1, 4, 4), math.nan), made_by, Report(7, 0, 0.0, 0.9, {}, 0, True))
    steps = [int(p.stem) for p in sheets(tmp_path)]
    assert len(steps) == SHEETS + 2 and {0, 5_020, 10_000} <= set(steps) and 7 not in steps
    with Image.open(sheets(tmp_path)[0]) as image:
        assert image.size == (168, 168)
    # Another process than the first writes nothing.
    with Monitor(Run(tmp_path / "other"), options, on=False) as monitor:
        monitor.begin(0, {})
        monitor.look(torch.zeros(64, 1, 4, 4), made_by, Report(0, 0, 0.0, 0.0, {}, 0, False))
        monitor.report(Report(0, 0, 0.0, 0.0, {}, 0, False))
    assert not (tmp_path / "other").exists()


def test_what_the_machine_says() -> None:
    found = machine("cpu")
    assert found["memory"] > 5e7 and "device_memory" not in found
    before, ballast = found["memory"], torch.ones(30_000_000)
    assert machine("cpu")["memory"] - before > 0.8 * 4 * len(ballast)


# ---- the command line


def test_the_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    folder = made(tmp_path / "run")
    main(["show", "run", "--page"])
    assert "run/run.html" in capsys.readouterr().err and "SiD in run" in (folder / "run.html").read_text()
    # Its earlier name, and another place.
    main(["show", "run", "--health", "--out", "there/other.html"])
    assert "SiD in run" in (tmp_path / "there" / "other.html").read_text()
    capsys.readouterr()
    for words, said in (
        (["--page", "--geometry"], "pass one of them"),
        (["--page", "--out", "a.png"], "must end in .html"),
        (["--follow"], "pass --page"),
    ):
        with pytest.raises(SystemExit) as stop:
            main(["show", "run", *words])
        err = capsys.readouterr().err
        assert stop.value.code == 2 and said in err and len(err.strip().splitlines()) == 1
    with pytest.raises(SystemExit):
        main(["show", str(tmp_path), "--page"])
    assert "recipe.json" in capsys.readouterr().err


def test_distill_writes_its_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    tiny().save(tmp_path / "teacher")
    flags = "distill sid --teacher teacher --budget 4 --batch 8 --log-every 2 --check-every 2 --out run --page"
    main(flags.split(" "))
    assert "open run/run.html" in capsys.readouterr().out
    text = (tmp_path / "run" / "run.html").read_text()
    assert heading(text).startswith("Finished.") and "teacher (fingerprint" in text
    assert "fewstep distill --recipe run/recipe.json" in text
    # A page is no part of what is repeated.
    assert "page" not in json.loads((tmp_path / "run" / "recipe.json").read_text())["arguments"]["run_flags"]


def test_following_ends_with_the_run(tmp_path: Path) -> None:
    folder, said = made(tmp_path / "run"), []
    with (folder / "monitor.jsonl").open("a") as file:
        file.write(json.dumps({"at": time.time(), "step": 600}) + "\n")
    thread = threading.Thread(target=follow, args=(folder,), kwargs={"pause": 0.02, "say": said.append})
    thread.start()
    try:
        waits = 0
        while not said and waits < 3000:
            waits += 1
            time.sleep(0.02)
        assert said == [str(folder / "run.html")] and "<script>" in (folder / "run.html").read_text()
    finally:
        with (folder / "monitor.jsonl").open("a") as file:
            file.write(json.dumps({"at": time.time(), "step": 600, "event": "stopped", "why": "enough"}) + "\n")
        thread.join(120)
    assert not thread.is_alive()
    text = (folder / "run.html").read_text()
    assert heading(text) == "Stopped before the end." and "<script" not in text and "enough" in text


def test_updates_wait_for_their_share_of_the_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks: Iterator[float] = iter([100.0, 103.0, 104.0, 105.0, 106.0, 155.9, 156.0, 156.5])
    monkeypatch.setattr("fewstep.report.run_page.time.monotonic", lambda: next(ticks))
    live = Live(made(tmp_path / "run"), share=0.02)
    # The first update loads what drawing needs; the second took a second, a fiftieth of the wait after it.
    assert [live.update(), live.update(), live.update(), live.update()] == [True, False, True, False]
    assert live.update() is True and live.next == pytest.approx(156.5 + 25)


# ---- in a browser


def test_an_open_page_follows_the_run(browser: Any, tmp_path: Path, finished: Path) -> None:
    folder = made(tmp_path / "a run", 20)
    shutil.copytree(finished / "looks", folder / "looks")
    live = Live(folder)
    assert live.update()
    tab = browser.new_context(viewport={"width": 390, "height": 600}).new_page()
    tab.set_default_timeout(WAIT)
    wrong: list[str] = []
    tab.on("pageerror", lambda error: wrong.append(str(error)))
    tab.on("console", lambda message: wrong.append(message.text))
    tab.goto((folder / "run.html").as_uri())
    tab.wait_for_selector("text=40 %")
    assert "SiD in a run" in tab.title() and tab.evaluate("document.documentElement.scrollWidth") <= 390
    # The reader has scrolled and opened something.
    tab.locator("summary").first.click()
    tab.evaluate("window.scrollTo(0, 700); document.getElementById('strip').scrollLeft = 120")
    # Meanwhile the run goes on.
    made(folder, 35)
    live.next = 0.0
    assert live.update()
    tab.wait_for_selector("text=70 %")
    assert tab.evaluate("window.scrollY") == 700 and tab.evaluate("document.getElementById('strip').scrollLeft") == 120
    assert tab.locator("details[open]").count() == 1
    seen = "all => all.every(one => one.complete && one.naturalWidth > 0)"
    assert tab.locator("#strip img").evaluate_all(seen) and tab.locator("#strip img").count() > 2
    with (folder / "monitor.jsonl").open("a") as file:
        file.write(json.dumps({"at": NOW, "step": 700, "event": "finished"}) + "\n")
    (folder / "fewstep.json").write_text("{}")
    live.end()
    tab.wait_for_selector("h1:has-text('Finished.')")
    # An ended page asks no more.
    (folder / "run.js").write_text("document.title = 'asked again';")
    tab.wait_for_timeout(5000)
    assert tab.title().startswith("Finished: SiD") and wrong == []


def test_a_finished_page_asks_for_nothing(browser: Any, finished: Path) -> None:
    for width, scheme, paper in ((1280, "light", "rgb(255, 255, 255)"), (390, "dark", "rgb(20, 23, 27)")):
        tab = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme).new_page()
        tab.set_default_timeout(WAIT)
        asked: list[str] = []
        tab.on("request", lambda request, asked=asked: asked.append(request.url))
        tab.goto((finished / "run.html").as_uri())
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == paper
        assert [url for url in asked if not url.startswith("data:")] == [(finished / "run.html").as_uri()]
        assert tab.locator("svg.chart").count() >= 8
        tab.context.close()
