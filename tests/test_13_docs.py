"""The site: every code block of every page runs, generated pages say what the code says, and mkdocs builds it strictly.

A page's blocks run in order, Python in one namespace, ``fewstep`` commands through the command line's own entry, in a
folder where the names that the page uses lead to tiny models. What is made smaller is in ``TINY`` and ``smaller``; what
cannot run here is in ``NOT_RUN``, with the reason, and is parsed all the same.
"""

from __future__ import annotations

import ast
import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest

import fewstep
from docs_shop import Shop
from fewstep import InputError
from fewstep.cli import main, parse, run
from fewstep.distill import METHODS

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
LINK = re.compile(r"\]\(([^)#\s:]+)(?:#[^)]*)?\)")
# The results that benchmarks write into a page themselves.
OWN = ("divergences",)
FENCE = re.compile(r"^( *)```(\w*)[^\n]*\n(.*?)^ *```\s*$", re.MULTILINE | re.DOTALL)

# The commands that need what is not here. Each is parsed, so that a flag that is gone is found.
WEIGHTS = "needs the published Inception weights, 90 MB"
NOT_RUN = {
    "fewstep evaluate pictures/ --data real/": WEIGHTS,
    "fewstep evaluate samples.npz --data cifar10-32x32.npz": WEIGHTS,
    "fewstep evaluate edm-cifar10-32x32-cond-vp.pkl --n 50000": WEIGHTS,
}
# Python that needs files which are published, and what tells the network's size from their names.
NOT_RUN_PYTHON = {
    'teacher = load_guided("256x256_diffusion.pt")': "needs released checkpoints of 2 GB; tests/test_07_openai.py",
}
# Budgets and sizes in Python; commands have theirs in ``smaller``.
TINY = (
    (r'budget="[^"]*"', 'budget="2 steps"'),
    (r'device="cuda"', 'device="cpu"'),
    (r"batch=\d{2,}", "batch=8"),
    (r"\.sample\(\d{3,}", ".sample(96"),
    (r"out=\.\.\.", 'out="made"'),
    # the proof in another process is that of tests/test_07_export.py
    (r'\.to_diffusers\("student"\)', '.to_diffusers("student", overwrite=True, check=False)'),
    (r'(base_model="[^"]*")\)', r"\1, overwrite=True, check=False)"),
)


@dataclass(frozen=True)
class Block:
    """A piece of a page that runs: a command line, or Python."""

    line: int
    kind: str
    text: str


def pieces(text: str) -> Iterator[tuple[int, str, str]]:
    """Fenced and indented blocks with their line and language; indented ones end at an empty line."""
    plain = text
    for found in FENCE.finditer(text):
        margin = len(found[1])
        yield text[: found.start()].count("\n") + 2, found[2], "\n".join(x[margin:] for x in found[3].splitlines())
        plain = plain.replace(found[0], "\n" * found[0].count("\n"))
    for found in re.finditer(r"(?:^ {4}(?! *[|*-]).*\n)+", plain, re.MULTILINE):
        body = "\n".join(x[4:] for x in found[0].splitlines())
        if code_of(body):
            yield plain[: found.start()].count("\n") + 1, "", body


def code_of(body: str) -> str:
    """The Python in an indented block, where all of it that is no command line is Python and no formula."""
    rest = "\n".join(x for x in body.splitlines() if not x.startswith(("fewstep ", "python ")))
    try:
        tree = ast.parse(rest)
    except SyntaxError:
        return "fewstep" if re.search("^fewstep ", body, re.MULTILINE) else ""
    code = (ast.Import, ast.ImportFrom, ast.Call)
    return body if any(isinstance(node, code) for node in ast.walk(tree)) or "fewstep " in body else ""


def blocks(page: Path) -> list[Block]:
    """Everything on a page that runs, in its order."""
    found = []
    for line, language, body in sorted(pieces(page.read_text())):
        joined = body.replace("\\\n", " ")
        commands = [x for x in joined.splitlines() if x.startswith("fewstep ")]
        found += [Block(line, "shell", x) for x in commands]
        if language == "python":
            found.append(Block(line, "python", body))
        elif not language:
            rest = "\n".join(x for x in body.splitlines() if not x.startswith(("fewstep ", "python ")))
            if code_of(body) == body and rest.strip():
                found.append(Block(line, "python", rest))
    return found


PAGES = [p for p in sorted(DOCS.rglob("*.md")) if blocks(p)]


def smaller(argv: list[str]) -> list[str]:
    """The same command with little to do, on the processor, and without the Hub."""
    command, argv = argv[0], list(argv)
    count = 200 if "--by-class" in argv else 96
    most = {
        "--n": count,
        "--batch": 16,
        "--trajectories": 8,
        "--samples": 8,
        "--label": 2,
        "--width": 16,
        "--processes": 1,
    }
    for k, word in enumerate(argv):
        if word in most:
            argv[k + 1] = str(min(most[word], int(argv[k + 1])))
        if word == "--device":
            argv[k + 1] = "cpu"
        if word == "--budget":
            argv[k + 1] = "5s" if command == "calibrate" else "2 steps"
    if "--push" in argv:
        at = argv.index("--push")
        del argv[at : at + 2]
    if "-h" in argv or "--help" in argv:
        return argv
    if command in ("train", "distill") and "--dry-run" not in argv:
        missing = {"--check-every": "0", "--batch": "8", "--budget": "2 steps"}
        argv += [word for pair in missing.items() if pair[0] not in argv for word in pair]
    if command in ("evaluate", "compare", "collaborate") and "--n" not in argv:
        argv += ["--n", str(count)]
    if command == "export":
        argv += ["--no-check", "--overwrite"]
    return argv


def left_out(block: Block) -> bool:
    """Whether the block needs what is not here."""
    known = NOT_RUN if block.kind == "shell" else NOT_RUN_PYTHON
    return any(block.text.startswith(start) for start in known)


def smaller_text(block: Block) -> str:
    """Python with tiny budgets; commands as they stand."""
    text = block.text
    for pattern, instead in TINY if block.kind == "python" else ():
        text = re.sub(pattern, instead, text)
    return text


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        fit = fewstep.calibrate
        for place in ("fewstep.calibrate", "fewstep.cli.calibrate.calibrate"):
            patch.setattr(place, lambda D, **options: fit(D, **options | short(options)))
        # The page itself has tests of its own; here it is enough that everything is opened before it.
        patch.setattr("fewstep.cli.serve.serve", lambda served, **_: None)
        yield Shop(tmp_path_factory.mktemp("shop"))


def short(options: dict[str, Any]) -> dict[str, Any]:
    """What keeps a fit short; most of it is for the fit by least squares alone."""
    plain = options.get("method", "least-squares") == "least-squares"
    return {"trajectories": 8} | ({"searches": 1, "refinements": 0} if plain else {})


def words(line: str) -> list[str]:
    """A command's words without ``fewstep``, its comment, and the brackets around what is optional."""
    return shlex.split(re.sub(r"[\[\]]", "", line.partition("  # ")[0]))[1:]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(DOCS)))
def test_every_block_of_a_page_runs(
    page: Path, shop: Shop, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name, parts = str(page.relative_to(DOCS)), blocks(page)
    if {"hf", "sd"} & needs(parts):
        pytest.importorskip("diffusers")
    shop.furnish(name, "\n".join(smaller_text(b) for b in parts if not left_out(b)), tmp_path)
    monkeypatch.chdir(tmp_path)
    space: dict[str, Any] = {"__name__": "page", **shop.names(name)}
    for block in parts:
        where = f"{name}:{block.line}"
        if left_out(block):
            continue
        if block.kind == "python":
            code = "\n" * (block.line - 1) + smaller_text(block)
            exec(compile(code, str(page), "exec"), space)
            continue
        try:
            main(smaller(words(block.text)))
        except SystemExit as stop:
            assert not stop.code, f"{where}: {block.text}\n{capsys.readouterr().err[-800:]}"


def needs(parts: list[Block]) -> set[str]:
    """Whether a page's blocks open pipelines of diffusers."""
    text = "\n".join(b.text for b in parts)
    return {key for key, sign in {"sd": "stable-diffusion", "hf": "diffusers"}.items() if sign in text}


@pytest.mark.parametrize("start", NOT_RUN)
def test_what_is_not_run_is_there_and_has_flags_that_exist(start: str) -> None:
    found = [b for page in PAGES for b in blocks(page) if b.text.startswith(start)]
    assert len(found) == 1
    command, *rest = words(found[0].text)
    kind = getattr(importlib.import_module(f"fewstep.cli.{command}"), command.capitalize())
    assert parse(kind, command, rest, None).data


def test_what_is_not_run_in_python_is_there_and_names_what_exists() -> None:
    for start in NOT_RUN_PYTHON:
        found = [b.text for page in PAGES for b in blocks(page) if b.text.startswith(start)]
        assert len(found) == 1
    module = importlib.import_module("fewstep.sources.openai")
    assert {"load_guided", "load_consistency"} <= set(vars(module))


TEXT = """# A page

    loss = w d(f(x), y)      a formula

```bash
# a comment
fewstep sample runs/a --n 4 \\
    --seed 1    # remark
ls runs
```

* a list

  ```python
  x = 1
  ```

    y = f(x)
"""


def test_blocks_are_found(tmp_path: Path) -> None:
    (tmp_path / "page.md").write_text(TEXT)
    found = blocks(tmp_path / "page.md")
    assert [(b.line, b.kind) for b in found] == [(6, "shell"), (15, "python"), (18, "python")]
    assert words(found[0].text) == ["sample", "runs/a", "--n", "4", "--seed", "1"]
    assert [b.text for b in found[1:]] == ["x = 1", "y = f(x)"]


def test_a_page_with_a_wrong_command_fails() -> None:
    with pytest.raises(InputError, match=r"unknown|nrecognized"):
        run(smaller(words("fewstep sample runs/teacher --no-such-flag 3")))


@pytest.fixture(scope="module")
def site_pages() -> Iterator[Any]:
    """The scripts of docs/, imported as mkdocs imports them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(DOCS))
        yield importlib.import_module("pages")


def test_the_page_of_methods_has_every_method_with_its_settings(site_pages: Any) -> None:
    known = site_pages.sections((DOCS / "methods.md").read_text())
    assert list(known) == list(METHODS), "run `make docs`: docs/methods.md is older than the methods"
    for name, method in METHODS.items():
        told = re.findall(r"^\| `(\w+)` \|", known[name], re.MULTILINE)
        assert sorted(told) == sorted(f.name for f in fields(method)), (
            f"run `make docs`: the settings of {name} have changed"
        )


def test_a_methods_page_has_numbers_and_its_card(site_pages: Any) -> None:
    made = site_pages.generated()
    text = made["methods/cd.md"]()
    body = json.loads((ROOT / "benchmarks" / "results" / "methods-digits.json").read_text())
    fd = next(r["fd"] for r in body["rows"] if r["name"] == "cd" and r["nfe"] == 1)
    assert text.startswith("# cd\n") and f"{sum(fd) / len(fd):.3f}" in text.partition("## Measured beside")[2]
    card = (DOCS / "cards" / "consistency.md").read_text()
    assert "## Consistency models" in text and card.splitlines()[2] in text
    assert "](../cards/perceptual.md)" in text and "](perceptual.md)" not in text
    for path in [p for p in made if p.startswith("methods/")]:
        lost = [x for x in LINK.findall(made[path]()) if not exists(path, x, made)]
        assert not lost, f"{path} links to {lost}"


def exists(path: str, link: str, made: dict[str, Any]) -> bool:
    """Whether a link of a page that is made leads to a page of the site."""
    to = os.path.normpath(Path(path).parent / link.partition("#")[0])
    return (DOCS / to).exists() or to in made


def test_the_reference_has_every_public_name_once(site_pages: Any) -> None:
    made = {path: make() for path, make in site_pages.generated().items() if path.startswith("api/")}
    assert list(made) == [f"api/{package}.md" for package in site_pages.PACKAGES]
    directives = re.findall(r"^::: (\S+)", "\n".join(made.values()), re.MULTILINE)
    assert len(directives) == len(set(directives)) > 150
    for package in site_pages.PACKAGES:
        text = made[f"api/{package}.md"]
        lost = [n for n in site_pages.public(package) if not re.search(rf"\.{n}\n|`{n}`", text)]
        assert not lost, f"the page of {package} lacks {lost}"
        assert f"| `{package}` | {site_pages.PACKAGES[package]}" in (DOCS / "api" / "index.md").read_text()


def test_further_measurements_are_those_of_the_files(site_pages: Any) -> None:
    measurements = importlib.import_module("measurements")
    assert (DOCS / "measurements.md").read_text() == measurements.page(), "run `make docs`"
    shown = "\n".join(p.read_text() for p in DOCS.glob("*.py"))
    files = [p.stem for p in (ROOT / "benchmarks" / "results").glob("*.json")]
    kinds = {name: name.partition("-")[0] for name in files}
    assert not [
        n for n, kind in kinds.items() if n not in measurements.SECTIONS and kind not in shown and kind not in OWN
    ]


def test_pictures_of_concepts_are_small_and_shown() -> None:
    text = "\n".join(p.read_text() for p in (DOCS / "concepts").glob("*.md"))
    made = sorted((DOCS / "img").glob("concept-*.png"))
    assert len(made) == 6
    for path in made:
        assert path.stat().st_size < 120_000 and f"(../img/{path.name})" in text


def test_the_site_builds_strictly_and_fetches_nothing(tmp_path: Path) -> None:
    pytest.importorskip("mkdocs", reason="mkdocs is not installed: pip install -e '.[docs]'")
    pytest.importorskip("material", reason="mkdocs-material is not installed: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-q", "-f", str(ROOT / "mkdocs.yml")]
    done = subprocess.run([*command, "-d", str(tmp_path)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {"index.html", "quickstart.html", "measurements.html"} <= {p.name for p in tmp_path.glob("*.html")}
    assert len(list((tmp_path / "methods").glob("*.html"))) == len(METHODS)
    for path in tmp_path.rglob("*.html"):
        fetched = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?(https?:[^\">]+)", path.read_text())
        fetched += re.findall(r"<link[^>]* rel=\"?stylesheet\"?[^>]* href=\"?(https?:[^\">]+)", path.read_text())
        assert not fetched, f"{path.name} fetches {fetched}"
    assert 'href="fewstep.grid.html"' in (tmp_path / "api" / "index.html").read_text()
    assert ":func:<" not in (tmp_path / "api" / "fewstep.html").read_text()
