"""What the tabs share: the fields of a sampler and a run, and errors as one line on the page. gradio is imported when the page
is built."""

import functools
import shutil
import sys
import tempfile
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from ..config import UserError, validate
from ..diffusion import SOLVERS, SPACINGS
from ..runtime.failures import OutOfMemory, reason_of
from ..sampling import SamplerConfig
from .asking import MOST_IMAGES, whole
from .device import Device, Stopped, stream
from .drawing import MOST_STEPS
from .places import NEWEST, Facts, Places, kind_of_run

QUEUE = {"concurrency_limit": 1, "concurrency_id": "device", "show_progress": "minimal"}  # of events that draw


def explain(error: Exception) -> str:
    """An error as one line for the visitor; what no visitor can mend is printed in full where the page was started."""
    if isinstance(error, OutOfMemory):
        return "the device has too little memory for that: ask for fewer images, or for a smaller size"
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, FileNotFoundError):
        return f"{error.filename or 'a file'} is gone: was the run moved or removed? Choose another"
    traceback.print_exception(error, file=sys.stderr)
    return f"that failed ({reason_of(error)}); the terminal where app.py runs says more"


def in_one_line(handler: Callable[..., Iterator[Any]]) -> Callable[..., Iterator[Any]]:
    """The same handler of an event, a generator; its errors become one line on the page."""

    @functools.wraps(handler)
    def wrapped(*args: Any) -> Iterator[Any]:
        import gradio as gr

        try:
            yield from handler(*args)
        except Stopped:
            return
        except gr.Error:
            raise
        except Exception as error:
            raise gr.Error(explain(error), print_exception=False) from None

    return wrapped


@dataclass
class Page:
    """What all tabs know: the runs, the device, the folder of the files that are drawn, the name of the device where the
    commands have to say it, the fields that list runs (component, function that gives its names, now), and what is done when
    the page is opened, (function, inputs, outputs)."""

    places: Places
    device: Device
    folder: Path
    device_word: str | None = None
    lists: list[tuple[Any, Callable[[], list[str]]]] = field(default_factory=list)
    loads: list[tuple[Callable[..., Any], Any, Any]] = field(default_factory=list)

    def names(self, *kinds: str) -> list[str]:
        """The names of the runs of these kinds; those whose kind only opening tells are among them."""
        return [name for name in self.places.names() if self.places.facts(name).kind in (*kinds, "export", "hub")]

    def unconditional(self) -> list[str]:
        """The names of the runs of images that need no image to draw from; the others belong to the tab Edit."""
        return [name for name in self.names("images") if self.places.facts(name).condition is None]

    def facts(self, name: str | None) -> Facts:
        """The facts of a run of the page; of an export, or a run of the hub, those that opening it tells."""
        facts = self.places.facts(name)
        run = self.device.peek(name) if name is not None and facts.kind in ("export", "hub") else None
        if run is None:
            return facts
        return Facts(run.config, run.class_names if run.num_classes is not None else (), kind_of_run(run.config))

    def run_list(self, names: Callable[[], list[str]], *, may_be_empty: bool = False, **options: Any) -> Any:
        """A field that lists runs, which grows as new ones appear. It takes any text, so that a run that is gone has a line."""
        import gradio as gr

        now = names()
        value = None if may_be_empty or not now else now[0]
        field_ = gr.Dropdown(choices=now, value=options.pop("value", value), allow_custom_value=True, **options)
        self.lists.append((field_, names))
        return field_

    def on_run(self, run: Any, update: Callable[[str | None], Any], target: Any) -> None:
        """Give the field `target` the update of the run that is chosen, also when the page is opened."""
        run.change(update, run, target, show_progress="hidden", queue=False)
        self.loads.append((update, run, target))

    @contextmanager
    def job_folder(self) -> Iterator[Path]:
        """A folder for the files of one job. It is removed a minute after the job: the page has its copies then."""
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield folder
        finally:
            timer = threading.Timer(60, shutil.rmtree, [folder], {"ignore_errors": True})
            timer.daemon = True
            timer.start()

    def stream(self, job: Callable[[Callable[[Any], None]], Any]) -> Iterator[Any]:
        """What a job shows, and its result, as `device.stream` gives them."""
        return stream(self.device, job)


class SamplerFields(NamedTuple):
    """The fields of how images are drawn, in the order in which `read_sampler` takes them."""

    solver: Any
    steps: Any
    spacing: Any
    guidance: Any
    guide_with: Any

    @staticmethod
    def build(page: Page) -> "SamplerFields":
        import gradio as gr

        with gr.Row():
            solver = solver_field()
            steps = gr.Number(25, label="Steps", precision=0, minimum=1, maximum=MOST_STEPS, min_width=90)
            spacing = gr.Dropdown(list(SPACINGS), value="even", label="Spacing of the steps", min_width=120)
        with gr.Row():
            guidance = gr.Slider(0, 10, 1, step=0.1, label="Guidance (1 is none)", min_width=220)
            guide = page.run_list(
                lambda: page.names("images"),
                label="Autoguidance by",
                info="a smaller or less trained run, or the width of an average of this one; empty: by the class",
                may_be_empty=True,
                min_width=220,
            )
        return SamplerFields(solver, steps, spacing, guidance, guide)


def read_sampler(page: Page, solver: str, steps: Any, spacing: str, guidance: Any, guide_with: str | None) -> SamplerConfig:
    """The sampler that the fields ask for; a UserError says what does not fit."""
    keys = {
        "solver": solver,
        "steps": whole(steps, "steps", 1, MOST_STEPS),
        "spacing": spacing,
        "guidance": float(guidance),
        "guide_with": page.places.guide(guide_with),
    }
    return validate(SamplerConfig, keys, origin="settings")


class RunFields(NamedTuple):
    """The fields of a run: its name, and which of its weights."""

    run: Any
    checkpoint: Any

    @staticmethod
    def build(page: Page, names: Callable[[], list[str]]) -> "RunFields":
        import gradio as gr

        with gr.Row():
            run = page.run_list(names, label="Run", min_width=240, scale=2)
            checkpoint = gr.Dropdown([NEWEST], value=NEWEST, label="Weights", min_width=160)

        def list_checkpoints(name: str | None) -> Any:
            return gr.update(choices=page.places.checkpoints(name), value=NEWEST)

        page.on_run(run, list_checkpoints, checkpoint)
        return RunFields(run, checkpoint)


def list_classes(page: Page, name: str | None) -> Any:
    """An update of the field of classes for a run: hidden where the run has none."""
    import gradio as gr

    names = page.facts(name).class_names
    return gr.update(choices=list(names), value=[], visible=bool(names))


def count_field(default: int = 16) -> Any:
    """The field of the number of images."""
    import gradio as gr

    return gr.Number(default, label="Images", precision=0, minimum=1, maximum=MOST_IMAGES, min_width=90)


def seed_field(label: str = "Seed", default: int = 0) -> Any:
    """The field of a seed."""
    import gradio as gr

    return gr.Number(default, label=label, precision=0, minimum=0, maximum=2**53 - 1, min_width=90)


def solver_field(names: Sequence[str] = tuple(SOLVERS), default: str = "ddim") -> Any:
    """The field of a solver."""
    import gradio as gr

    return gr.Dropdown(list(names), value=default, label="Solver", min_width=120)


class ResultFields(NamedTuple):
    """Where a tab shows what it draws: the image, a line of what happens, the files, and the command."""

    image: Any
    line: Any
    files: Any
    command: Any

    @staticmethod
    def build(tab: str, name: str, *, lines: int = 2, kind: str = "still") -> "ResultFields":
        import gradio as gr

        options = {"format": "png", "buttons": ["download", "fullscreen"], "elem_classes": kind}
        image = gr.Image(label=name, show_label=False, interactive=False, alt_text=name, **options)
        line = gr.Markdown("", elem_classes="line", elem_id=f"{tab}-line")
        files = gr.Files(label="Download", visible=False, interactive=False)
        command = gr.Textbox(
            label="The same from the command line", lines=lines, buttons=["copy"], interactive=False, visible=False
        )
        return ResultFields(image, line, files, command)

    @property
    def begin(self) -> list[Any]:
        """What the fields become when a job begins."""
        import gradio as gr

        return [gr.skip(), "waiting for the device", gr.update(visible=False), gr.update(visible=False)]


def show_job(messages: Iterator[Any], command: str) -> Iterator[list[Any]]:
    """What a tab's results become while a job goes on, and when it is done."""
    import gradio as gr

    from .drawing import Result

    for message in messages:
        if isinstance(message, Result):
            files = gr.update(value=list(map(str, message.files)), visible=True)
            yield [str(message.sheet), message.words, files, gr.update(value=command, visible=True)]
        else:
            image, line = message
            yield [image, line, gr.skip(), gr.skip()]


def stop_button() -> Any:
    """The button that ends a job of its tab."""
    import gradio as gr

    return gr.Button("Stop", variant="stop", min_width=80)


def refuse_other_files(field_: Any) -> None:
    """Let a field of images say in one line that a file is no image."""
    import gradio as gr

    convert = field_.preprocess

    def preprocess(payload: Any) -> Any:
        try:
            return convert(payload)
        except Exception as error:  # whatever a file makes of its decoder
            reason = str(error).partition("<")[0].partition("'/")[0].strip() or type(error).__name__
            raise gr.Error(f"that file is no image that can be read ({reason})", print_exception=False) from None

    field_.preprocess = preprocess
