"""The tab Draw: images from a run, shown while they are denoised."""

from collections.abc import Iterator
from typing import Any

from ..sampling.plan import DrawRequest
from .asking import MOST_IMAGES, divisible, join_classes, whole
from .controls import (
    QUEUE,
    Page,
    ResultFields,
    RunFields,
    SamplerFields,
    count_field,
    in_one_line,
    list_classes,
    read_sampler,
    seed_field,
    show_job,
    stop_button,
)
from .drawing import draw_images


def read_request(
    page: Page,
    run: str | None,
    checkpoint: str | None,
    classes: list[str] | None,
    shares: str | None,
    count: Any,
    seed: Any,
    size: str | None,
    frames: bool,
    then: str | None,
    *sampler: Any,
) -> DrawRequest:
    """What the fields of the tab ask for. Images are dealt to the classes in equal blocks, so there may be a few more than
    asked for."""
    path, names = page.places.place(run, checkpoint), page.facts(run).class_names
    words = join_classes(classes or [], names, shares)
    number = divisible(whole(count, "images", 1, MOST_IMAGES), words, names)
    return DrawRequest(
        run=path,
        spec=read_sampler(page, *sampler),
        num_samples=number,
        batch_size=min(16, number),
        classes=words,
        size=size.strip() if size and size.strip() else None,
        seed=whole(seed, "seed", 0, 2**53 - 1),
        frames=bool(frames),
        then=page.places.place(then) if then else None,
    )


def build_draw_tab(page: Page) -> None:
    """The fields of the tab, and what its buttons do."""
    import gradio as gr

    with gr.Row():
        with gr.Column(min_width=320):
            fields = RunFields.build(page, page.unconditional)
            classes = gr.Dropdown([], multiselect=True, label="Classes", info="none chosen: as they come", visible=False)
            shares = gr.Textbox(label="Shares of the classes", placeholder="2/1: twice as many of the first", visible=False)
            with gr.Row():
                count, seed = count_field(), seed_field()
                size = gr.Textbox(label="Size", placeholder="that of the run", min_width=90)
            sampler = SamplerFields.build(page)
            with gr.Row():
                frames = gr.Checkbox(True, label="GIF of the denoising", min_width=120)
                then = page.run_list(
                    lambda: [name for name in page.names("images") if page.places.facts(name).condition == "low"],
                    label="Then make larger with",
                    may_be_empty=True,
                    min_width=160,
                )
            with gr.Row():
                draw = gr.Button("Draw", variant="primary", min_width=120, elem_id="draw-button")
                stop = stop_button()
        with gr.Column(min_width=320):
            results = ResultFields.build("draw", "Drawn images")

    @in_one_line
    def handle(*values: Any) -> Iterator[list[Any]]:
        request = read_request(page, *values)
        yield results.begin
        with page.job_folder() as folder:
            job = page.stream(lambda show: draw_images(page.device, request, folder / "images", show))
            yield from show_job(job, request.command(page.device_word))

    inputs = [*fields, classes, shares, count, seed, size, frames, then, *sampler]
    event = draw.click(handle, inputs, list(results), api_name="draw", **QUEUE)
    stop.click(None, cancels=[event], queue=False)
    page.on_run(fields.run, lambda name: list_classes(page, name), classes)
    classes.change(
        lambda chosen: gr.update(visible=len(chosen or []) > 1), classes, shares, show_progress="hidden", queue=False
    )
