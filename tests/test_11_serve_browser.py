"""The page of ``fewstep serve`` in a real browser."""

from __future__ import annotations

import re
import socket
import threading
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from conftest import WAIT
from fewstep.serve import Request, Served
from fewstep.serve.app import default_request, serve
from fewstep.serve.view import panels_html
from served import two


@pytest.fixture(scope="module")
def served() -> Served:
    return two()


@pytest.fixture(scope="module")
def address(served: Served) -> Iterator[str]:
    """The page of ``served``, on a port of its own."""
    pytest.importorskip("gradio", reason="the page needs gradio: pip install 'fewstep[web]'")
    found: list[str] = []
    servers: list[Any] = []
    ready = threading.Event()

    def begun(server: Any) -> None:
        servers.append(server)
        ready.set()

    thread = threading.Thread(target=serve, args=(served,), kwargs={"port": 0, "say": found.append, "started": begun})
    thread.start()
    assert ready.wait(WAIT / 1000)
    yield found[0]
    servers[0].should_exit = True
    thread.join(60)
    assert not thread.is_alive()


def opened(browser: Any, address: str, asked: list[str]) -> Any:
    """A new visitor's page with its first pictures; ``asked`` collects the addresses that it asks for."""
    tab = browser.new_context(viewport={"width": 1280, "height": 900}).new_page()
    tab.set_default_timeout(WAIT)
    tab.on("request", lambda request: asked.append(request.url))
    tab.goto(address, wait_until="domcontentloaded")
    tab.wait_for_selector("#pictures img")
    return tab


def seen(tab: Any) -> list[str]:
    return tab.locator("#pictures img").evaluate_all("all => all.map(one => one.src)")


def ask(tab: Any, seed: int) -> None:
    tab.locator("#seed input").fill(str(seed))
    tab.locator("#seed input").press("Tab")
    tab.locator("#generate").click()


def settled(tab: Any, seed: int) -> list[str]:
    tab.wait_for_selector(f'#pictures .fs-panels[data-seed="{seed}"]')
    return seen(tab)


def sources(served: Served, request: Request) -> list[str]:
    """The pictures that the page must show."""
    return re.findall(r'src="([^"]+)"', panels_html(served.make(request), request))


def test_visitors_in_a_browser(browser: Any, address: str, served: Served) -> None:
    asked: list[str] = []
    first = default_request(served)
    one, two = opened(browser, address, asked), opened(browser, address, asked)
    # Pictures before anything is typed, of both generators.
    assert seen(one) == sources(served, first) and len(seen(one)) == 12
    # Two at once: each gets the pictures of their own seed.
    ask(one, 11)
    ask(two, 12)
    assert settled(two, 12) == sources(served, replace(first, seed=12))
    assert settled(one, 11) == sources(served, replace(first, seed=11))
    # One goes on to compare samplers with a file, after a file that is none.
    two.locator("#more button").first.click()
    chooser = two.locator("#table input[type=file]")
    chooser.set_input_files({"name": "bad.json", "mimeType": "application/json", "buffer": b'{"format": "<b>"}'})
    two.wait_for_selector("#note .fs-error")
    assert "not a tableau" in two.locator("#note").inner_text()
    assert "Traceback" not in two.content()
    # An emptied seed is told in place of the pictures.
    one.locator("#seed input").fill("")
    one.locator("#seed input").press("Tab")
    one.locator("#generate").click()
    one.wait_for_selector("#pictures .fs-error")
    assert "the seed is empty" in one.locator("#pictures").inner_text()
    # The way to a picture.
    two.get_by_role("tab", name="Trajectory").click()
    two.locator("#follow").click()
    two.wait_for_selector("#paths img")
    assert two.locator("#paths table").count() == 2
    elsewhere = [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert asked and not elsewhere


def test_other_addresses_are_not_listened_on(address: str) -> None:
    port = int(address.rsplit(":", 1)[1])
    with socket.socket() as other:
        assert other.connect_ex(("127.0.0.1", port)) == 0
    with socket.socket() as other:
        # Another address of the same machine, which a server for the whole network would answer on.
        assert other.connect_ex(("127.0.0.2", port)) != 0
