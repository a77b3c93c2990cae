"""``fewstep serve``: the functions behind the page, the server, and the page in a real browser."""

from __future__ import annotations

import base64
import io
import json
import re
import shlex
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fewstep.cli import main
from fewstep.cli.base import check_fits
from fewstep.core.generator import Generator
from fewstep.core.solver import build
from fewstep.core.tableau import Tableau
from fewstep.errors import InputError
from fewstep.grid import grid
from fewstep.serve import OWN, UPLOADED, Limits, Request, Served, read_table
from fewstep.serve.app import ANY, Answers, default_request, listen, request_of
from fewstep.serve.request import names_of, solver_names, spread
from fewstep.serve.view import duration, error_html, panels_html, paths_html
from served import few, two
from tiny_runs import tiny


@pytest.fixture(scope="module")
def served() -> Served:
    return two()


def table_for(made: Generator, steps: int = 2, **meta: Any) -> str:
    D = made.denoiser
    table = build("dpmpp2m", grid("karras", steps, D.sigma_min, D.sigma_max))
    return replace(table, meta={**table.meta, **meta}).to_json()


ASK = Request(("teacher",), count=3, seed=5)


# The functions behind the page


def test_a_panel_holds_what_the_generator_makes(served: Served) -> None:
    made = served.generators["teacher"]
    (panel,) = served.make(replace(ASK, label=1))
    expected = made.sample(3, {"label": torch.ones(3, dtype=torch.int64)}, seed=5)
    assert panel.pictures is not None and torch.equal(panel.pictures, expected)
    assert (panel.generator, panel.nfe, panel.error) == ("teacher", 3, "") and panel.seconds > 0
    assert panel.distance is None


def test_pictures_depend_on_the_request_alone(served: Served) -> None:
    def made(**change: Any) -> torch.Tensor:
        (panel,) = served.make(replace(ASK, **change))
        assert panel.pictures is not None
        return panel.pictures

    first = made()
    assert torch.equal(first, made())
    assert (first[:2] - made(count=2)).abs().max() < 1e-5
    assert (first[:2] - made(seed=6)[:2]).abs().max() > 0.01
    assert (made(label=0) - made(label=2)).abs().max() > 1e-4
    assert (made(label=0) - made(label=0, guidance=3.0)).abs().max() > 1e-4


def test_requests_at_once_are_not_mixed(served: Served) -> None:
    asks = [replace(ASK, seed=i, samplers=(OWN, "euler_ancestral"), steps=4) for i in range(6)]
    alone = [served.make(ask) for ask in asks]
    with ThreadPoolExecutor(6) as pool:
        together = list(pool.map(served.make, asks))
    for a, b in zip(alone, together, strict=True):
        for x, y in zip(a, b, strict=True):
            assert x.pictures is not None and y.pictures is not None and torch.equal(x.pictures, y.pictures)


def test_panels_are_generators_by_samplers(served: Served) -> None:
    ask = replace(ASK, generators=("plain", "teacher"), samplers=(OWN, "dpmpp2m", "heun"), steps=4, guidance=2.0)
    panels = served.make(ask)
    assert [(p.generator, p.nfe) for p in panels] == [
        ("plain", 2), ("plain", 4), ("plain", 7), ("teacher", 3), ("teacher", 4), ("teacher", 7)
    ]  # fmt: skip
    assert "no conditions" in panels[0].notes[0] and "two passes" in panels[3].notes[0]
    first, other = panels[0].pictures, panels[4].pictures
    assert first is not None and other is not None and panels[4].distance is not None
    assert panels[4].distance == pytest.approx(float(np.sqrt(np.mean((np.asarray(other - first)) ** 2))), rel=1e-5)


def test_an_uploaded_tableau_runs_where_it_fits(served: Served) -> None:
    made = served.generators["teacher"]
    text = table_for(made, calibration={"fingerprint": made.fingerprint(), "guidance": 1.0})
    ask = replace(ASK, generators=("teacher",), samplers=(OWN, UPLOADED), table=text)
    own, panel = served.make(ask)
    assert panel.nfe == 2 and panel.pictures is not None and own.nfe == 3
    assert torch.equal(panel.pictures, made.sample(3, seed=5, sampler=Tableau.from_json(text)))
    own, panel = served.make(replace(ask, guidance=2.0))
    assert own.pictures is not None and panel.pictures is None and "another generator or guidance" in panel.error
    forced = Served(served.generators, fits=None)
    assert forced.make(replace(ask, guidance=2.0))[1].pictures is not None
    garbled = replace(ask, table=table_for(made, calibration={"fingerprint": "0" * 16, "guidance": "much"}))
    assert "garbled" in served.make(garbled)[1].error


GOOD = json.loads(table_for(few(tiny())))


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (b"\xff\xfe\x00", "not text"),
        (b"", "not a tableau"),
        (b"[" * 100_000, "not a tableau"),
        (b"1" * 5000, "garbled|not a tableau"),
        (json.dumps({"format": "other"}).encode(), "'other'"),
        (json.dumps({**GOOD, "W": [[1.0]]}).encode(), "W must be"),
        (json.dumps({**GOOD, "levels": [1e999, 1, 0]}).encode(), "finite"),
        (json.dumps({**GOOD, "meta": {"traced": "x"}}).encode(), "garbled"),
        (json.dumps({**GOOD, "meta": {"traced": {"start_std": "x"}}}).encode(), "garbled"),
        (json.dumps({**GOOD, "name": "x" * 2_000_000}).encode(), "at most 1,048,576"),
        (table_for(few(tiny()), steps=21).encode(), "21 evaluations in 21 rows"),
    ],
)
def test_what_is_no_tableau_is_refused(data: bytes, said: str) -> None:
    with pytest.raises(InputError, match=said) as error:
        read_table(data, Limits(steps=20))
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    assert read_table(json.dumps(GOOD).encode(), Limits(steps=2)).nfe == 2


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"generators": ()}, "no generator is chosen"),
        ({"generators": ("teachr",)}, "did you mean 'teacher'"),
        ({"generators": ("teacher", "teacher")}, "chosen twice"),
        ({"samplers": ()}, "no sampler is chosen"),
        ({"samplers": ("eulr",)}, "did you mean 'euler'"),
        ({"samplers": (OWN, *solver_names()[:8])}, "at most 8"),
        ({"samplers": (UPLOADED,)}, "no file is there"),
        ({"count": 7}, "from 1 to 6, got 7"),
        ({"count": 0}, "from 1 to 6, got 0"),
        ({"seed": None}, "the seed is empty"),
        ({"seed": -1}, "the seed must be from 0"),
        ({"seed": 1.5}, "the seed must be a whole number"),
        ({"steps": 21}, "from 1 to 20, got 21"),
        ({"prompt": "x" * 1001}, "at most 1000 letters, got 1001"),
    ],
)
def test_bad_requests_are_refused_before_anything_runs(change: dict[str, Any], said: str, served: Served) -> None:
    for act in (served.make, served.follow):
        with pytest.raises(InputError, match=said):
            act(replace(ASK, **change))


def test_what_one_generator_cannot_do_is_told_in_its_panel(served: Served) -> None:
    ask = replace(ASK, generators=("teacher", "plain"), label=3)
    refused, made = served.make(ask)
    assert refused.pictures is None and "label 3 is out of range" in refused.error
    assert made.pictures is not None and made.distance is None
    (refused,) = served.make(replace(ASK, guidance=-1.0))
    assert "scale >= 0" in refused.error
    assert "label 3 is out of range" in served.follow(ask)[0].error


def test_a_trajectory_ends_in_the_picture(served: Served) -> None:
    ask = replace(ASK, samplers=(OWN, "heun", "dpmpp2m_sde"), steps=12)
    panels, paths = served.make(ask), served.follow(ask, 2)
    assert [p.points for p in paths] == [4, 24, 13]
    for panel, path in zip(panels, paths, strict=True):
        assert panel.pictures is not None and not path.error
        assert (path.stages[-1].state - panel.pictures[2]).abs().max() < 1e-5
        assert len(path.stages) <= 8 and path.stages[-1].guess is None
        assert all(s.guess is not None and s.guess.shape == (1, 4, 4) for s in path.stages[:-1])
    made = served.generators["teacher"]
    assert paths[0].stages[0].level == pytest.approx(made.denoiser.sigma_max)
    with pytest.raises(InputError, match="from 0 to 2, got 3"):
        served.follow(ask, 3)


def test_a_latent_text_pipeline_is_served(tmp_path: Path) -> None:
    pytest.importorskip("diffusers")
    from fewstep.sources import load
    from tiny_models import folder_of, stable_diffusion

    made = load(folder_of(stable_diffusion(), tmp_path / "pipe"), steps=2)
    served = Served({"sd": made}, fits=check_fits)
    assert served.reads_prompts and served.guidable and served.classes == ()
    ask = replace(default_request(served), samplers=(OWN, "euler"), steps=2)
    assert ask.prompt and ask.count == 2
    own, euler = served.make(ask)
    assert own.pictures is not None and torch.equal(own.pictures, made.sample(2, ask.prompt, seed=0))
    assert euler.pictures is not None and own.pictures.shape[1] == 3
    other = served.make(replace(ask, prompt="blue cat", guidance=3.0, negative="red house"))[0].pictures
    assert other is not None and (other - own.pictures).abs().max() > 1e-3
    path = served.follow(ask, 1)[0]
    assert (path.stages[-1].state - own.pictures[1]).abs().max() < 1e-4
    assert path.stages[0].state.shape == own.pictures.shape[1:]


def test_small_helpers() -> None:
    assert names_of(["runs/a/teacher", "runs/b/teacher/", "sid"]) == ["a/teacher", "b/teacher", "sid"]
    with pytest.raises(InputError, match="given twice"):
        names_of(["runs/a", "./runs/a/"])
    assert spread(5, 8) == [0, 1, 2, 3, 4] and spread(100, 3) == [0, 50, 99] and spread(4, 1) == [0]
    assert (duration(0.00123), duration(45.61)) == ("1.23 ms", "45.6 s")
    with pytest.raises(InputError, match="nothing to serve"):
        Served({}, fits=None)
    with pytest.raises(InputError, match="pictures must be at least 1"):
        Limits(pictures=0)


# What the page shows


def test_pictures_lie_in_the_html_bit_for_bit(served: Served) -> None:
    panels = served.make(ASK)
    shown = panels_html(panels, ASK)
    coded = re.findall(r'class="fs-small" src="data:image/png;base64,([^"]+)"', shown)
    assert len(coded) == 3 and panels[0].pictures is not None
    with Image.open(io.BytesIO(base64.b64decode(coded[1]))) as image:
        pixels = np.asarray(image)
    expected = ((panels[0].pictures[1, 0] + 1) * 127.5).round().numpy()
    assert pixels.shape == (4, 4, 3) and np.array_equal(pixels[..., 0], expected)
    assert not re.search(r"(src|href)=\"(?!data:)", shown)


def test_names_are_no_html(served: Served) -> None:
    evil = "<script>${1}{{2}}</script>"
    text = json.dumps({**GOOD, "name": evil})
    odd = Served({evil: served.generators["teacher"]}, fits=None)
    ask = Request((evil,), (UPLOADED,), count=1, table=text)
    for shown in (panels_html(odd.make(ask), ask), paths_html(odd.follow(ask), 0), error_html(evil)):
        assert "&lt;script&gt;" in shown and "<script" not in shown


def values(answers: Answers, **change: Any) -> list[Any]:
    """The page's inputs as they stand, in its order."""
    first = default_request(answers.served)
    held = {
        "generators": list(first.generators), "label": ANY, "prompt": "", "seed": 0, "count": first.count,
        "samplers": [OWN], "steps": first.steps, "guidance": 1, "negative": "", "table": None,
    }  # fmt: skip
    return list({**held, **change}.values())


def test_the_buttons_answer_in_html(served: Served) -> None:
    answers = Answers(served)
    assert request_of(*values(answers)) == default_request(served)
    first = answers.generate(*values(answers))
    assert first.count("<img") == 12 and answers.generate(*values(answers)) is first
    other = answers.generate(*values(answers, seed=1.0, label="2"))
    assert other.count("<img") == 12 and other != first
    assert answers.follow(2, *values(answers)).count("<tr>") == 6
    for change, said in [
        ({"seed": None}, "seed is empty"),
        ({"guidance": None}, "guidance is empty"),
        ({"generators": None}, "no generator is chosen"),
        ({"label": "nine"}, "no class"),
        ({"samplers": [UPLOADED], "table": b"{"}, "not a tableau"),
    ]:
        for shown in (answers.generate(*values(answers, **change)), answers.follow(1, *values(answers, **change))):
            assert 'role="alert"' in shown and said in shown and "Traceback" not in shown
    for number, said in [(0, "from 1 to 6, got 0"), (None, "is empty"), (1.5, "got 1.5")]:
        assert said in answers.follow(number, *values(answers))


def test_an_upload_is_read_at_once(served: Served) -> None:
    answers = Answers(served)
    names, note = answers.uploaded(json.dumps(GOOD).encode(), [OWN])
    assert names == [OWN, UPLOADED] and "2 evaluations" in note
    names, note = answers.uploaded(b"{}", names)
    assert names == [OWN] and 'role="alert"' in note
    assert answers.uploaded(None, [UPLOADED]) == ([OWN], "")


# The server and the command


def test_an_address_that_cannot_be_had_is_told() -> None:
    with listen("127.0.0.1", 0) as held:
        held.listen()
        port = held.getsockname()[1]
        with pytest.raises(InputError, match=f"port {port}: Address already in use: pass another --port"):
            listen("127.0.0.1", port)
    with pytest.raises(InputError, match="from 0 to 65535, got 70000"):
        listen("127.0.0.1", 70000)
    with pytest.raises(InputError, match=r"cannot listen on 203\.0\.113\.1"):
        listen("203.0.113.1", 0)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("serve", "nothing to serve: name at least one"),
        ("serve nowhere.pt", "nowhere.pt does not exist"),
        ("serve a ./a", "given twice"),
        ("serve a --pictures 0", "pictures must be at least 1"),
        ("serve a --port ten", "port"),
    ],
)
def test_bad_flags_are_one_line(line: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(line))
    told = capsys.readouterr().err
    assert stop.value.code == 2 and said in told.splitlines()[-1] and "Traceback" not in told


def test_a_missing_gradio_is_named(
    served: Served, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(sys.modules, "gradio", None)
    served.generators["teacher"].save(tmp_path / "gen")
    with pytest.raises(SystemExit) as stop:
        main(["serve", str(tmp_path / "gen"), "--port", "0"])
    assert stop.value.code == 2 and "pip install 'fewstep[web]'" in capsys.readouterr().err
