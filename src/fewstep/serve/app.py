"""The page itself, on gradio, and the server that hands it to this machine's browsers and to nobody else."""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable
from typing import Any

from fewstep.errors import InputError
from fewstep.serve.request import OWN, UPLOADED, Request, read_table, solver_names
from fewstep.serve.served import Served
from fewstep.serve.view import error_html, panels_html, paths_html, style

ANY = "any"
PROMPT = "a photo of a red fox in the snow"
# Up to this side a picture is cheap enough to begin with several.
CHEAP = 64
# Requests that wait; more are told that the queue is full.
WAITING = 32

HEAD = """<div class="fs-head"><h1>The same seeds, side by side</h1><p>Every generator starts from the same noise
and the same condition. Choose what to compare, press Generate, and look at the pictures, the number of evaluations and
the time.</p></div>"""

# The page may use what this server sends, and the browser refuses it everything else.
POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; font-src 'self' data:; connect-src 'self'; "
    "worker-src 'self' blob:; object-src 'none'; base-uri 'self'; frame-ancestors 'self'"
)


def default_request(served: Served) -> Request:
    """What the page shows before anybody has typed."""
    cheap = all(g.codec is None and max(g.denoiser.shape[1:]) <= CHEAP for g in served.generators.values())
    return Request(
        generators=tuple(served.generators)[: served.limits.panels],
        count=min(8 if cheap else 2, served.limits.pictures),
        prompt=PROMPT[: served.limits.prompt] if served.reads_prompts else "",
        steps=min(8, served.limits.steps),
    )


def request_of(*values: Any) -> Request:
    """The request that the page's inputs are, in the order of :func:`_inputs`; checked by :class:`Served`.

    Raises:
        InputError: an empty or garbled number.
    """
    generators, label, prompt, seed, count, samplers, steps, guidance, negative, table = values
    try:
        chosen = None if label in (None, ANY) else int(label)
    except (TypeError, ValueError):
        raise InputError(f"there is no class {label!r}: choose one from the list") from None
    if guidance is None:
        raise InputError("the guidance is empty: give a number, 1 for none")
    return Request(
        generators=tuple(generators or ()),
        samplers=tuple(samplers or ()),
        count=_number(count),
        seed=_number(seed),
        label=chosen,
        prompt=prompt or "",
        negative=negative or "",
        guidance=guidance,
        steps=_number(steps),
        table=table,
    )


def _number(value: Any) -> Any:
    """What a browser calls a whole number, as Python's; anything else is left for the check."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


class Answers:
    """What the page's buttons do: inputs to HTML, with every mistake of a visitor told in place of the pictures."""

    def __init__(self, served: Served) -> None:
        self.served = served
        self._first: tuple[Request, str] | None = None

    def generate(self, *values: Any) -> str:
        """The panels. What the page begins with is kept, because every visitor asks for it."""
        try:
            request = request_of(*values)
            if self._first is not None and self._first[0] == request:
                return self._first[1]
            made = self.served.make(request)
        except InputError as error:
            return error_html(" ".join(str(error).split()))
        shown = panels_html(made, request)
        if request == default_request(self.served) and not any(panel.error for panel in made):
            self._first = (request, shown)
        return shown

    def follow(self, number: Any, *values: Any) -> str:
        """The trajectories of one picture, which the page counts from 1."""
        try:
            if number is None:
                raise InputError("the number of the picture is empty: give a whole number from 1")
            request, number = request_of(*values), _number(number)
            if not isinstance(number, int) or not 1 <= number <= request.count:
                raise InputError(f"the number of the picture must be from 1 to {request.count}, got {number}")
            return paths_html(self.served.follow(request, number - 1), number - 1)
        except InputError as error:
            return error_html(" ".join(str(error).split()))

    def uploaded(self, data: bytes | None, samplers: list[str]) -> tuple[list[str], str]:
        """The samplers with or without the uploaded one, and what is to be said of the file."""
        others = [name for name in samplers or [] if name != UPLOADED]
        if data is None:
            return others or [OWN], ""
        try:
            table = read_table(data, self.served.limits)
        except InputError as error:
            return others or [OWN], error_html(" ".join(str(error).split()), "The file was not taken.")
        return [*others, UPLOADED], f"{table.nfe} evaluations from noise level {table.start:.4g}; now press Generate."


def page(served: Served) -> Any:
    """The page as gradio's Blocks.

    Raises:
        InputError: gradio is not installed.
    """
    gr, answers, first = _gradio(), Answers(served), default_request(served)
    with gr.Blocks(
        title="fewstep: the same seeds, side by side",
        analytics_enabled=False,
        fill_width=True,
        delete_cache=(3600, 3600),
    ) as made:
        gr.HTML(HEAD, apply_default_css=False)
        with gr.Row(equal_height=False):
            with gr.Column(scale=1, min_width=300):
                fields, again, button, note = _inputs(gr, served, first)
            with gr.Column(scale=3, min_width=300), gr.Tabs():
                with gr.Tab("Pictures"):
                    pictures = gr.HTML("Making the first pictures ...", apply_default_css=False, elem_id="pictures")
                with gr.Tab("Trajectory"):
                    with gr.Row():
                        number = gr.Number(
                            1, precision=0, label="Picture (from 1)", min_width=140, scale=0, elem_id="number"
                        )
                        follow = gr.Button("Show how it came about", min_width=240, scale=0, elem_id="follow")
                    paths = gr.HTML(apply_default_css=False, elem_id="paths")
        # One group: a network answers one request at a time, and times are not those of two.
        alone: dict[str, Any] = {"concurrency_limit": 1, "concurrency_id": "network", "api_visibility": "private"}
        made.load(answers.generate, fields, pictures, **alone)
        button.click(answers.generate, fields, pictures, **alone)
        seed, samplers, table = fields[3], fields[5], fields[9]
        again.click(_next_seed, seed, seed, queue=False, show_progress="hidden", api_visibility="private").then(
            answers.generate, fields, pictures, **alone
        )
        follow.click(answers.follow, [number, *fields], paths, **alone)
        table.change(answers.uploaded, [table, samplers], [samplers, note], queue=False, api_visibility="private")
    return made.queue(max_size=WAITING)


def _next_seed(seed: Any) -> Any:
    return seed + 1 if isinstance(seed, int | float) else 0


def _inputs(gr: Any, served: Served, first: Request) -> tuple[list[Any], Any, Any, Any]:
    """The inputs in the order of :func:`request_of`, two buttons, and the line under the upload."""
    names, top = list(served.generators), served.limits
    generators = gr.CheckboxGroup(
        names, value=list(first.generators), label="Generators", visible=len(names) > 1, elem_id="generators"
    )
    prompt = gr.Textbox(
        first.prompt, label="Prompt", lines=2, max_length=top.prompt, visible=served.reads_prompts, elem_id="prompt"
    )
    classes = [("drawn by the seed", ANY), *((name, str(i)) for i, name in enumerate(served.classes))]
    label = gr.Dropdown(classes, value=ANY, label="Class", visible=len(classes) > 1, elem_id="label")
    seed = gr.Number(first.seed, precision=0, label="Seed", elem_id="seed")
    count = gr.Slider(1, top.pictures, first.count, step=1, label="Pictures", elem_id="count")
    with gr.Row():
        button = gr.Button("Generate", variant="primary", min_width=110, elem_id="generate")
        again = gr.Button("Next seed", min_width=110, elem_id="again")
    with gr.Accordion("Samplers, steps, guidance", open=False, elem_id="more"):
        samplers = gr.Dropdown(
            [OWN, UPLOADED, *solver_names()],
            value=list(first.samplers),
            multiselect=True,
            label="Samplers",
            info="Each makes a panel for each generator.",
            elem_id="samplers",
        )
        steps = gr.Slider(
            1, top.steps, first.steps, step=1, label="Steps", info="Of samplers chosen by name.", elem_id="steps"
        )
        guidance = gr.Number(
            first.guidance,
            label="Guidance",
            info="1 leaves every generator as it is.",
            visible=served.guidable,
            elem_id="guidance",
        )
        negative = gr.Textbox(
            "", label="Negative prompt", max_length=top.prompt, visible=served.reads_prompts, elem_id="negative"
        )
        table = gr.File(
            label="Tableau (tableau.json of fewstep calibrate)",
            file_types=[".json"],
            type="binary",
            height=120,
            elem_id="table",
        )
        note = gr.HTML(apply_default_css=False, elem_id="note")
    return [generators, label, prompt, seed, count, samplers, steps, guidance, negative, table], again, button, note


def _gradio() -> Any:
    """The library, told to report nothing, before it is imported."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    try:
        import gradio
    except ImportError as error:
        raise InputError(f"{error.name or 'gradio'} is not installed: pip install 'fewstep[web]'") from None
    return gradio


class _Guarded:
    """An application whose every answer carries the policy."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def tell(message: Any) -> None:
            if message["type"] == "http.response.start":
                said = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message = {**message, "headers": [*message.get("headers", []), *said]}
            await send(message)

        await self.app(scope, receive, tell)


def application(served: Served) -> Any:
    """The page as an ASGI application.

    Raises:
        InputError: gradio is not installed.
    """
    gr = _gradio()
    from fastapi import FastAPI

    whole = gr.mount_gradio_app(
        # No page that describes the interface: its scripts would come from elsewhere.
        FastAPI(docs_url=None, redoc_url=None, openapi_url=None),
        page(served),
        path="/",
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=style(),
        footer_links=[],
        run_history=False,
        show_error=False,
        max_file_size=served.limits.upload,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        enable_monitoring=False,
    )
    return _Guarded(whole)


def listen(host: str, port: int) -> socket.socket:
    """A socket that holds the address, or any free port for 0.

    Raises:
        InputError: the port is taken or out of range, or the host is not this machine's.
    """
    if not 0 <= port <= 65535:
        raise InputError(f"--port must be from 0 to 65535, got {port}")
    held = None
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        held = socket.socket(family, kind, protocol)
        held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        held.bind(address)
    except (OSError, UnicodeError) as error:
        if held is not None:
            held.close()
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"cannot listen on {host} port {port}: {reason}: pass another --port or --host") from None
    return held


def serve(
    served: Served,
    *,
    host: str = "127.0.0.1",
    port: int = 7860,
    say: Callable[[str], None] = print,
    started: Callable[[Any], None] | None = None,
) -> None:
    """Serves the page until it is interrupted; ``say`` hears the address once it is held.

    ``started`` gets uvicorn's server, whose ``should_exit`` ends it from another thread.

    Raises:
        InputError: gradio is not installed, or the address cannot be had.
    """
    app = application(served)
    import uvicorn

    held = listen(host, port)
    try:
        name = f"[{host}]" if ":" in host else host
        say(f"http://{name}:{held.getsockname()[1]}")
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="on"))
        if started is not None:
            started(server)
        server.run(sockets=[held])
    finally:
        held.close()
