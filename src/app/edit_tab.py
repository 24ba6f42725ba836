"""The tab Edit: what a run makes of an image of the visitor: it changes it, fills it in, gives it colours, makes it larger."""

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..config import UserError
from ..sampling.plan import DrawRequest
from .asking import divisible, join_classes, whole
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
from .drawing import Result, draw_images

if TYPE_CHECKING:
    from PIL import Image

HINTS = {
    None: "This run draws from noise. Paint over the part that it shall draw anew; or leave the image as it is, and choose "
    "how much of it changes.",
    "mask": "This run fills in what is hidden. Paint over the part that it shall fill in.",
    "low": "This run makes images larger: give it a small image, or one that is made small first.",
    "grey": "This run gives colours to grey images.",
    "edges": "This run draws from the edges of an image.",
    "paired": "This run turns one kind of image into another: give it one of the first kind, or, where it learned from "
    "halves of images, one with both halves.",
}


def save_image(editor: Mapping[str, Any] | None, folder: Path) -> tuple[Path, Path | None]:
    """image.png of what the editor shows, and mask.png, white where the visitor has painted; None where nothing is painted. A
    UserError where there is no image."""
    from PIL import Image

    background = editor["background"] if editor is not None else None
    if background is None:
        raise UserError("give an image first: drop a file on the field, or paste one")
    folder.mkdir(parents=True, exist_ok=True)
    plain = Image.new("RGBA", background.size, "white")
    plain.alpha_composite(background.convert("RGBA"))
    plain.convert("RGB").save(folder / "image.png")
    assert editor is not None
    painted = paint_of(editor["layers"], background.size)
    if not painted.any():
        return folder / "image.png", None
    Image.fromarray((painted * 255).astype(np.uint8)).save(folder / "mask.png")
    return folder / "image.png", folder / "mask.png"


def paint_of(layers: "list[Image.Image]", size: tuple[int, int]) -> np.ndarray:
    """Where the layers of the editor are painted: (height, width) of booleans, for a size of (width, height)."""
    from PIL import Image

    painted = np.zeros(size[::-1], dtype=bool)
    for layer in layers:
        alpha = layer.convert("RGBA").getchannel("A")
        painted |= np.asarray(alpha if alpha.size == size else alpha.resize(size, Image.Resampling.NEAREST)) > 127
    return painted


def read_edit(
    page: Page,
    folder: Path,
    editor: Mapping[str, Any] | None,
    run: str | None,
    checkpoint: str | None,
    strength: Any,
    resamplings: Any,
    by_image: Any,
    classes: list[str] | None,
    count: Any,
    seed: Any,
    *sampler: Any,
) -> DrawRequest:
    """What the fields of the tab ask for; the image and the mask become files of the folder. `strength` is the share of the
    steps that an unpainted image is drawn by; what is painted over is drawn by all of them."""
    path, facts = page.places.place(run, checkpoint), page.facts(run)
    words, spec = join_classes(classes or [], facts.class_names), read_sampler(page, *sampler)
    image, mask = save_image(editor, folder)
    number = divisible(whole(count, "images", 1, 16), words, facts.class_names)
    is_imported = facts.config.get("low_resolution") is not None
    request = DrawRequest(
        run=path,
        spec=spec,
        num_samples=None if is_imported else number,
        batch_size=min(16, number),
        classes=words,
        seed=whole(seed, "seed", 0, 2**53 - 1),
        mask=str(mask) if mask is not None else None,
    )
    if facts.condition is not None:
        if facts.condition != "mask":
            request = dataclasses.replace(request, mask=None)
        return dataclasses.replace(request, condition=str(image), condition_guidance=float(by_image))
    steps = whole(spec.steps, "steps", 1, 10_000)
    if mask is not None:
        return dataclasses.replace(request, image=str(image), resamplings=whole(resamplings, "resamplings", 1, 20))
    start_at = min(steps - 1, round((1 - float(strength)) * steps))
    if start_at == 0:
        raise UserError("of so few steps none can be left out: take more steps, or paint over what is to be drawn anew")
    return dataclasses.replace(request, image=str(image), start_at=start_at)


def named(request: DrawRequest) -> DrawRequest:
    """The same with the names of its files alone, which the visitor saves beside the command."""
    files = {key: getattr(request, key) for key in ("image", "mask", "condition")}
    return dataclasses.replace(request, **{key: Path(file).name for key, file in files.items() if file is not None})


def given_files(request: DrawRequest) -> list[Path]:
    """The files that the command of a request needs."""
    return [Path(file) for file in (request.image or request.condition, request.mask) if file is not None]


def build_edit_tab(page: Page) -> None:
    """The fields of the tab, and what its buttons do."""
    import gradio as gr

    with gr.Row():
        with gr.Column(min_width=320):
            editor = gr.ImageEditor(
                type="pil",
                label="Image",
                sources=["upload", "clipboard"],
                brush=gr.Brush(default_size=24, colors=["#ff3b30"], color_mode="fixed"),
                layers=False,
                transforms=(),
                buttons=[],
                height=380,
                canvas_size=(512, 512),
                elem_id="edit-image",
            )
            refuse_other_files(editor)
            fields = RunFields.build(page, lambda: page.names("images"))
            hint = gr.Markdown("", elem_classes="line")
            strength = gr.Slider(0.05, 0.95, 0.6, step=0.05, label="How much of an unpainted image changes")
            with gr.Row():
                resamplings = gr.Number(1, label="Resamplings of a fill", precision=0, minimum=1, maximum=20, min_width=120)
                by_image = gr.Slider(0, 5, 1, step=0.1, label="Guidance by the image", min_width=160)
            classes = gr.Dropdown([], multiselect=True, label="Classes", info="none chosen: as they come", visible=False)
            with gr.Row():
                count = gr.Number(4, label="Images", precision=0, minimum=1, maximum=16, min_width=90)
                seed = seed_field()
            sampler = SamplerFields.build(page)
            with gr.Row():
                draw = gr.Button("Draw from it", variant="primary", min_width=120, elem_id="edit-button")
                stop = stop_button()
        with gr.Column(min_width=320):
            results = ResultFields.build("edit", "Edited images")

    @in_one_line
    def handle(*values: Any) -> Iterator[list[Any]]:
        with page.job_folder() as folder:
            request = read_edit(page, folder, *values)
            yield results.begin

            def job(show: Any) -> Result:
                result = draw_images(page.device, request, folder / "images", show)
                return result._replace(files=[*result.files, *given_files(request)])

            yield from show_job(page.stream(job), named(request).command(page.device_word))

    inputs = [editor, *fields, strength, resamplings, by_image, classes, count, seed, *sampler]
    event = draw.click(handle, inputs, list(results), api_name="edit", **QUEUE)
    stop.click(None, cancels=[event], queue=False)

    def show_fields(name: str | None) -> list[Any]:
        condition = page.facts(name).condition
        is_given = condition is not None
        shown = [gr.update(visible=not is_given), gr.update(visible=not is_given), gr.update(visible=is_given)]
        return [HINTS.get(condition, HINTS[None]), *shown]

    page.on_run(fields.run, show_fields, [hint, strength, resamplings, by_image])
    page.on_run(fields.run, lambda name: list_classes(page, name), classes)
