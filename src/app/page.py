"""The page: its tabs, its look, and the server that it is on."""

import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from ..config import UserError
from ..config.packages import needed
from ..config.progress import say
from ..report.report import NAME as REPORT
from .between_tab import build_between_tab
from .cards import is_inside, read_cards, render_cards
from .compare_tab import build_compare_tab
from .controls import Page
from .device import Device
from .draw_tab import build_draw_tab
from .edit_tab import build_edit_tab
from .places import Places
from .points_tab import build_points_tab

MOST_UPLOAD = "50mb"
EVERY_SECONDS = 4.0  # between two looks at the files of the runs
STYLE = """
:root { --soft: light-dark(#5d626b, #a3a8b1); --edge: light-dark(#dedbd5, #3d424a);
  --line-0: light-dark(#2f6fc4, #6fa8f5); --line-1: light-dark(#c05a12, #f09a5b); color-scheme: light; }
:root:has(body.dark) { color-scheme: dark; }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 250px), 1fr)); gap: 14px; }
.card { border: 1px solid var(--edge); border-radius: 10px; padding: 12px; overflow: hidden; }
.card img, .card .no-preview { width: 100%; height: 220px; object-fit: contain; image-rendering: pixelated; margin: 0; }
.card .no-preview { display: grid; place-items: center; color: var(--soft); border: 1px dashed var(--edge); }
.card h3 { margin: 10px 0 2px; font-weight: 600; overflow-wrap: anywhere; }
.card p { margin: 2px 0; color: var(--soft); }
.card .running::before { content: "\\25CF  "; color: light-dark(#1d7d3f, #5fd08a); }
.card dl { margin: 6px 0; display: grid; gap: 1px; }
.card dl div { display: flex; justify-content: space-between; gap: 8px; }
.card dt { color: var(--soft); } .card dd { margin: 0; font-variant-numeric: tabular-nums; }
.card svg { width: 100%; height: auto; } .card svg text { fill: var(--soft); font: 12px system-ui, sans-serif !important; }
.card a { text-decoration: underline; padding: 0 !important; }
.legend i { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin: 0 5px 0 10px; }
.moving img { object-fit: contain; width: 100%; height: 320px !important; image-rendering: pixelated; }
.for-readers { position: absolute; width: 1px; height: 1px; overflow: hidden; clip-path: inset(50%); white-space: nowrap; }
.line p { color: var(--soft); }
"""


def build_page(page: Page) -> Any:
    """The page as gradio's Blocks."""
    import gradio as gr

    tabs: dict[str, Callable[[Page], None]] = {
        "Draw": build_draw_tab,
        "Compare": build_compare_tab,
        "Between": build_between_tab,
        "Edit": build_edit_tab,
        "Points": build_points_tab,
    }
    with gr.Blocks(title="Atelier", analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as blocks:
        gr.Markdown("# Atelier")
        with gr.Tabs():
            with gr.Tab("Runs", id="runs"):
                gallery = gr.HTML("<p>The page looks at the runs.</p>", elem_id="gallery")  # `refresh` fills it
            for name, build in tabs.items():
                with gr.Tab(name, id=name.lower()):
                    build(page)
        known = gr.State(("", ()))
        timer = gr.Timer(EVERY_SECONDS)

        def refresh(state: tuple[str, tuple[str, ...]]) -> list[Any]:
            """The gallery and the lists of runs, where they have changed."""
            html, names = render_cards(read_cards(page.places)), tuple(page.places.names())
            if (html, names) == tuple(state):
                return [gr.skip()] * (2 + len(page.lists))
            is_new = names != tuple(state[1])
            lists = [gr.update(choices=list_names()) if is_new else gr.skip() for _, list_names in page.lists]
            return [html, (html, names), *lists]

        targets = [gallery, known, *(component for component, _ in page.lists)]
        timer.tick(refresh, known, targets, show_progress="hidden", concurrency_limit=4)
        blocks.load(refresh, known, targets, show_progress="hidden")
        for update, inputs, outputs in page.loads:
            blocks.load(update, inputs, outputs, show_progress="hidden")
    return blocks


def check_port(host: str, port: int) -> None:
    """A UserError where another program listens there, or the port or the host cannot be used."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise UserError(f"port {port} of {host} cannot be used ({error.strerror}); give another --port") from None


@contextmanager
def serve(
    places: Places,
    device: torch.device,
    *,
    host: str | None = None,
    port: int | None = None,
    share: bool = False,
    auth: tuple[str, str] | None = None,
    device_word: str | None = None,
    browser: bool = False,
) -> Iterator[Any]:
    """The page on a server, as gradio's Blocks, until the block ends. It listens on the loopback where neither `host` nor
    GRADIO_SERVER_NAME says another address. A UserError where the port is in use."""
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for key in ("NO_PROXY", "no_proxy"):  # gradio asks its own server, which no proxy reaches
        os.environ[key] = ",".join(filter(None, [os.environ.get(key), "localhost", "127.0.0.1"]))
    address = host or os.environ.get("GRADIO_SERVER_NAME") or "127.0.0.1"
    if port is not None:
        check_port(address, port)
    with needed("the page (app.py)", "gradio"):
        from gradio.exceptions import ServerFailedToStartError
        from gradio.themes import Default

    with tempfile.TemporaryDirectory(prefix="atelier_app_", ignore_cleanup_errors=True) as folder:
        os.environ["GRADIO_TEMP_DIR"] = str(Path(folder) / "uploads")
        blocks = build_page(Page(places, Device(device), Path(folder), device_word))
        blocks.queue(default_concurrency_limit=1, max_size=64)
        try:
            app, local, public = blocks.launch(
                server_name=address,
                server_port=port,
                share=share,
                auth=auth,
                inbrowser=browser,
                prevent_thread_lock=True,
                show_error=False,
                quiet=True,
                max_file_size=MOST_UPLOAD,
                footer_links=[],
                theme=Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
                css=STYLE,
                ssr_mode=False,
            )
        except (OSError, ValueError, ServerFailedToStartError) as error:
            raise UserError(f"the page cannot be served: {error}") from None
        add_reports(app, places)
        say(f"the page is at {local}; Ctrl-C ends it")
        if share:
            say(
                f"and for everybody at {public}"
                if public
                else "warning: Gradio's server gave no public address; is it reached?"
            )
        try:
            yield blocks
        finally:
            blocks.close(verbose=False)


def add_reports(app: Any, places: Places) -> None:
    """Let the server give the report of each run at report/NAME, to those who may see the page. What a report's script does
    cannot touch the page."""
    from fastapi import Request
    from fastapi.responses import FileResponse, PlainTextResponse
    from starlette.routing import Route

    async def report(request: Request) -> Any:
        cookies = [request.cookies.get(f"access-token{kind}-{app.cookie_id}") for kind in ("", "-unsecure")]
        if app.auth is not None and not any(cookie in app.tokens for cookie in cookies):
            return PlainTextResponse("log in first", status_code=401)
        name = request.path_params["name"]
        path = Path(name) / REPORT
        if not places.has(name) or not path.is_file() or not is_inside(Path(name), path):
            return PlainTextResponse("there is no report of such a run", status_code=404)
        headers = {"Content-Security-Policy": "sandbox allow-scripts", "Cache-Control": "no-cache"}
        return FileResponse(path, media_type="text/html", headers=headers)

    app.router.routes.insert(0, Route("/report/{name:path}", report))
