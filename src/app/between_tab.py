"""The tab Between: an animation from one image to another, of two seeds or of the visitor, as interpolate.py draws it."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from .. import figures
from ..config import UserError
from ..runs.opened import Opened
from ..runtime.failures import explain_out_of_memory, warn_on_failure
from ..sampling import SamplerConfig, build_sampler
from ..sampling.config import sampler_words
from ..sampling.edit import at_size, encode_images, no_start
from ..sampling.files import SINGLE, read_pixels
from ..sampling.paths import inverted, plan_frames, write_frames
from ..sampling.plan import command_line
from ..sampling.sampler import random_labels
from .asking import join_classes, whole
from .controls import (
    QUEUE,
    Page,
    ResultFields,
    RunFields,
    SamplerFields,
    in_one_line,
    list_classes,
    read_sampler,
    refuse_other_files,
    seed_field,
    show_job,
    stop_button,
)
from .device import Device
from .drawing import Result, Show, pack

FPS, BATCH = 24, 8
MOST_BETWEEN = 96


class Way(NamedTuple):
    """The arguments of interpolate.py that the page knows: the seeds of both ends, or two files, which are inverted."""

    run: str
    spec: SamplerConfig
    seeds: tuple[int, int]
    classes: str | None
    between: int
    loop: bool
    images: tuple[str, ...] = ()

    @property
    def words(self) -> list[str]:
        """As the script takes them."""
        key_words = ["--pictures", *self.images] if self.images else ["--seeds", "/".join(map(str, self.seeds))]
        words = [self.run, *key_words, "--frames-between", str(self.between), "--batch-size", str(BATCH)]
        words += ["--classes", self.classes] if self.classes is not None else []
        return [*words, *(["--loop"] if self.loop else []), *sampler_words(self.spec)]


def draw_between(device: Device, way: Way, folder: Path, show: Show) -> Result:
    """Draw the frames into the folder, and an animation of them."""
    with explain_out_of_memory(BATCH, BATCH, key="--batch-size"):
        opened = device.open(way.run)
        if not isinstance(opened, Opened) or opened.condition is not None:
            raise UserError(f"{way.run} does not draw images from noise or a source alone; choose another run")
        opened = at_size(opened, None, way.images[0] if way.images else None)
        sampler = build_sampler(opened, way.spec, source=no_start if way.images and not opened.gaussian else None)
        labels = None
        if way.classes is not None:
            labels = opened.labels(way.classes, 2)
        elif opened.num_classes is not None and way.images:
            labels = [opened.no_class() or 0] * 2
        elif opened.num_classes is not None:
            labels = [random_labels(seed, [0], opened.num_classes)[0] for seed in way.seeds]
        if way.images:
            show(None)
            sampler.check_invertible()
            starts = inverted(sampler, encode_images(opened, way.images), labels, batch_size=BATCH)
        else:
            starts = torch.cat([sampler.start(seed, [0]) for seed in way.seeds])
        places = plan_frames(2, way.between, loop=way.loop)

        def watch(paths: list[Path]) -> None:
            (image,) = read_pixels(paths[-1:])
            show((figures.to_image(image), f"{len(paths)} of {len(places)} frames"))

        options = {"seed": 0 if way.images else way.seeds[0], "batch_size": BATCH, "device": device.device, "ranks": SINGLE}
        paths = write_frames(opened, sampler, starts, labels, places, folder / "frames", **options, watch=watch)
    pattern, files = folder / "frames" / "frame_%05d.png", [folder / "animation.gif"]
    figures.gif(paths, pattern, files[0], fps=FPS)
    with warn_on_failure("animation.mp4", lambda *_: None):
        figures.mp4(pattern, folder / "animation.mp4", fps=FPS)
        files.append(folder / "animation.mp4")
    few = [paths[i] for i in np.linspace(0, len(paths) - 1, 9).round().astype(int)]
    strip = figures.grid(figures.on_white(read_pixels(few)), columns=9, zoom=1)
    figures.save(strip, folder / "strip.png")
    files += [folder / "strip.png", pack(folder, paths)]
    words = f"{len(paths)} frames of {opened.path} (step {opened.step}), {sampler.calls()} network calls each"
    return Result(files[0], files, words)


def read_way(
    page: Page,
    run: str | None,
    checkpoint: str | None,
    first: Any,
    second: Any,
    classes: list[str] | None,
    between: Any,
    loop: bool,
    images: Sequence[str | None],
    *sampler: Any,
) -> Way:
    """What the fields of the tab ask for. `images` are the files of the visitor, both or none."""
    path, names = page.places.place(run, checkpoint), page.facts(run).class_names
    if len(classes or []) > 2:
        raise UserError("choose one class, or two: that of the first image and that of the last")
    seeds = whole(first, "first seed", 0, 2**53 - 1), whole(second, "second seed", 0, 2**53 - 1)
    frames, given = whole(between, "frames", 1, MOST_BETWEEN), tuple(image for image in images if image)
    if len(given) == 1:
        raise UserError("give two images, or none: the seeds count then")
    return Way(path, read_sampler(page, *sampler), seeds, join_classes(classes or [], names), frames, bool(loop), given)


def copy_images(way: Way, folder: Path) -> tuple[Way, list[Path]]:
    """The same with the names that its images have for the command, and the files of those names in the folder."""
    names = [f"{name}{Path(image).suffix}" for name, image in zip(("first", "second"), way.images, strict=False)]
    return way._replace(images=tuple(names)), [
        Path(shutil.copyfile(image, folder / name)) for name, image in zip(names, way.images, strict=True)
    ]


def build_between_tab(page: Page) -> None:
    """The fields of the tab, and what its buttons do."""
    import gradio as gr

    with gr.Row():
        with gr.Column(min_width=320):
            fields = RunFields.build(page, page.unconditional)
            with gr.Row():
                first, second = seed_field("First seed"), seed_field("Second seed", 1)
            classes = gr.Dropdown(
                [], multiselect=True, max_choices=2, label="Classes of both ends", info="none chosen: those of the seeds"
            )
            with gr.Accordion("Two images in place of the seeds", open=False), gr.Row():
                options = {"type": "filepath", "sources": ["upload", "clipboard"], "height": 200, "min_width": 140}
                images = [gr.Image(label=f"{end} image", **options) for end in ("First", "Second")]
                for image in images:
                    refuse_other_files(image)
            with gr.Row():
                between = gr.Number(24, label="Frames", precision=0, minimum=1, maximum=MOST_BETWEEN, min_width=90)
                loop = gr.Checkbox(True, label="And back again", min_width=120)
            sampler = SamplerFields.build(page)
            with gr.Row():
                draw = gr.Button("Animate", variant="primary", min_width=120, elem_id="between-button")
                stop = stop_button()
        with gr.Column(min_width=320):
            results = ResultFields.build("between", "Animation", kind="moving")

    @in_one_line
    def handle(*values: Any) -> Iterator[list[Any]]:
        *others, first_image, second_image = values
        way = read_way(page, *others[:7], (first_image, second_image), *others[7:])
        yield results.begin
        device = ["--device", page.device_word] if page.device_word is not None else []
        with page.job_folder() as folder:
            short, files = copy_images(way, folder)

            def job(show: Show) -> Result:
                result = draw_between(page.device, way, folder / "way", show)
                return result._replace(files=[*result.files, *files])

            yield from show_job(page.stream(job), command_line("interpolate.py", [*short.words, *device]))

    inputs = [*fields, first, second, classes, between, loop, *sampler, *images]
    event = draw.click(handle, inputs, list(results), api_name="between", **QUEUE)
    stop.click(None, cancels=[event], queue=False)
    page.on_run(fields.run, lambda name: list_classes(page, name), classes)
