"""The tab Compare: the same seeds in several runs or checkpoints, with other scales of guidance and numbers of steps."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

from ..config import UserError
from ..sampling.plan import DrawRequest
from .asking import divisible, join_classes, whole
from .controls import QUEUE, Page, ResultFields, in_one_line, read_sampler, seed_field, show_job, solver_field, stop_button
from .drawing import MOST_STEPS, compare_images

MOST_PANELS = 36


def parse_sweep(text: str | None, name: str, low: float, high: float) -> list[float]:
    """`1, 2, 4` as numbers; a UserError for other text, and outside of `low` to `high`."""
    words = [word for word in re.split(r"[,;\s]+", (text or "").strip()) if word]
    try:
        numbers = [float(word) for word in words]
    except ValueError:
        numbers = []
    if not numbers or not all(low <= number <= high for number in numbers):
        raise UserError(f"{name}: give numbers from {low:g} to {high:g} with commas between them, such as 1, 2, 4")
    return list(dict.fromkeys(numbers))


def read_panels(
    page: Page,
    runs: Sequence[str],
    classes: str | None,
    count: Any,
    seed: Any,
    solver: str,
    steps: str | None,
    guidance: str | None,
) -> tuple[list[list[DrawRequest]], list[list[str]]]:
    """What is drawn, and the title of each panel: a row for each of the runs and numbers of steps, in it the scales of
    guidance. A UserError where there are too many."""
    if not runs:
        raise UserError("choose a run or a checkpoint, or several")
    scales = parse_sweep(guidance, "guidance", 0, 20)
    lengths = [whole(number, "steps", 1, MOST_STEPS) for number in parse_sweep(steps, "steps", 1, MOST_STEPS)]
    if len(runs) * len(scales) * len(lengths) > MOST_PANELS:
        raise UserError(f"these are {len(runs) * len(scales) * len(lengths)} panels; at most {MOST_PANELS} fit, so give less")
    requests, titles = list[list[DrawRequest]](), list[list[str]]()
    number, at = whole(count, "images", 1, 16), whole(seed, "seed", 0, 2**53 - 1)
    for word in runs:
        name, _, checkpoint = word.partition(" @ ")
        path, names = page.places.place(name, checkpoint or None), page.facts(name).class_names
        chosen = [part.strip() for part in (classes or "").split(",") if part.strip()]
        dealt = join_classes(chosen, names)
        images = divisible(number, dealt, names)
        for length in lengths:
            row = [read_sampler(page, solver, length, "even", scale, None) for scale in scales]
            about = {"classes": dealt, "seed": at, "num_samples": images, "batch_size": min(16, images)}
            requests.append([DrawRequest(run=path, spec=spec, **about) for spec in row])
            titles.append([f"{path}, {length} steps, guidance {scale:g}" for scale in scales])
    return requests, titles


def list_weights(page: Page) -> list[str]:
    """All that can be compared: each run, and `RUN @ CHECKPOINT` for what else it has."""
    words = list[str]()
    for name in page.unconditional():
        words += [name, *(f"{name} @ {checkpoint}" for checkpoint in page.places.checkpoints(name)[1:])]
    return words


def build_compare_tab(page: Page) -> None:
    """The fields of the tab, and what its buttons do."""
    import gradio as gr

    now = list_weights(page)
    runs = page.run_list(
        lambda: list_weights(page), label="Runs and checkpoints", multiselect=True, value=now[:1], elem_id="compare-runs"
    )
    with gr.Row():
        count = gr.Number(4, label="Images of each", precision=0, minimum=1, maximum=16, min_width=90)
        seed = seed_field()
        classes = gr.Textbox(label="Classes", placeholder="as they come; or names with commas", min_width=160)
        solver = solver_field()
    with gr.Row():
        steps = gr.Textbox("25", label="Steps", info="several: 5, 10, 25", min_width=120)
        guidance = gr.Textbox("1", label="Guidance", info="several: 1, 2, 4", min_width=120)
    with gr.Row():
        compare = gr.Button("Compare", variant="primary", min_width=120, elem_id="compare-button")
        stop = stop_button()
    results = ResultFields.build("compare", "Compared images", lines=4)

    @in_one_line
    def handle(*values: Any) -> Iterator[list[Any]]:
        requests, titles = read_panels(page, *values)
        yield results.begin
        commands = "\n".join(request.command(page.device_word) for row in requests for request in row)
        with page.job_folder() as folder:
            job = page.stream(lambda show: compare_images(page.device, requests, titles, folder, show))
            yield from show_job(job, commands)

    inputs = [runs, classes, count, seed, solver, steps, guidance]
    event = compare.click(handle, inputs, list(results), api_name="compare", **QUEUE)
    stop.click(None, cancels=[event], queue=False)
