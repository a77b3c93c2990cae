"""One thread per test process, and what several files need around their tests."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

torch.set_num_threads(1)

# Milliseconds that a browser may take for anything; a crowded machine is slow, and nothing here measures time.
WAIT = 240_000


@pytest.fixture
def apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The test in a folder of its own, without the reference cache of whoever runs it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FEWSTEP_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "200")


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """A headless Chromium of this machine."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the browser is driven by playwright")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    program = next((p for p in map(shutil.which, names) if p), None)
    if program is None:
        pytest.skip(f"no Chromium on this machine: none of {', '.join(names)} is on the PATH")
    with playwright.sync_playwright() as started:
        made = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"], timeout=WAIT)
        yield made
        made.close()
