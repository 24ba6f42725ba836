"""The tab Points: a density that the visitor draws becomes moving points; and so do the points of a run."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import figures
from ..config import UserError, validate
from ..diffusion import ProcessConfig, build_process, invertible_solvers
from ..diffusion.mixture import mixture_estimate
from ..runs.opened import Opened
from ..sampling import Sampler, SamplerConfig, build_sampler
from ..sampling.files import write_animation
from ..sampling.paths import move_points
from ..sampling.plan import DrawRequest, command_line
from ..sampling.sampler import random_labels
from ..storage.files import numpy_bytes, write_whole
from .asking import whole
from .controls import QUEUE, Page, ResultFields, in_one_line, seed_field, show_job, solver_field, stop_button
from .device import Device
from .drawing import Result, Show
from .edit_tab import paint_of

DRAWING = "my drawing"
CELLS, EXTENT = 64, 2.0  # of the drawing, whose longer side is 4 wide, as that of the source `density`
FPS, MOST_POINTS = 24, 20_000
BLEND = {"schedule": {"kind": "blend"}, "target": "x0"}
TRAIN = ["-cfg", "configs/points2d_iadb.json", "--set", "source.source=gaussian", "--set", "data.source=density"]


def drawing_of(editor: Mapping[str, Any] | None) -> np.ndarray:
    """What the visitor has drawn, (CELLS, CELLS) of shares that sum to 1, the top row first. A UserError where nothing is."""
    from PIL import Image

    layers = editor["layers"] if editor is not None else []
    painted = paint_of(layers, layers[0].size) if layers else np.zeros((1, 1), dtype=bool)
    if not painted.any():
        raise UserError("draw something first: the points go where you draw")
    grey = Image.fromarray((painted * 255).astype(np.uint8)).resize((CELLS, CELLS), Image.Resampling.BOX)
    density = np.asarray(grey, dtype=np.float64)
    return density / density.sum()


class DrawnDensity:
    """In place of a network: the exact estimate of x0 where the data is a drawing, each cell of which is a small Gaussian."""

    def __init__(self, density: np.ndarray) -> None:
        rows, columns = np.nonzero(density)
        x, y = columns + 0.5 - CELLS / 2, CELLS / 2 - rows - 0.5
        self.means = torch.from_numpy(np.stack([x, y], axis=1) * (2 * EXTENT / CELLS)).float()
        self.weights = torch.from_numpy(density[rows, columns]).float()
        self.std = EXTENT / CELLS  # half a cell

    def __call__(self, x: Tensor, time: Tensor) -> Tensor:
        """x (B, 2) at 1000 t (B,) of the blend -> E[x0 | x] (B, 2)."""
        t = (time / 1000)[:, None].to(x)
        parts = zip(x.split(1024), t.split(1024), strict=True)  # so that little memory is needed
        means, weights = self.means.to(x), self.weights.to(x)
        return torch.cat([mixture_estimate(part, 1 - at, at, means, weights, self.std) for part, at in parts])


def drawn_sampler(density: np.ndarray, spec: SamplerConfig) -> Sampler:
    """The sampler of a drawing, from noise, by the same solvers as any run."""
    process = build_process(validate(ProcessConfig, BLEND))
    return Sampler(DrawnDensity(density), process, spec, shape=(2,), num_classes=None)


def animate(device: Device, sampler: Sampler, count: int, seed: int, labels: Tensor | None, folder: Path, show: Show) -> Result:
    """Move the points, and write an animation of them into the folder: it lingers at its end."""
    way = move_points(sampler, seed, count, labels, device=device.device).numpy()
    steps, sheets = len(way) - 1, list[Any]()
    for i, points in enumerate(way):
        sheets.append(figures.scatter(points, size=384, title=f"step {i:0{len(str(steps))}d} of {steps}"))
        show((sheets[-1], f"{count} points, step {i} of {steps}") if i % max(1, steps // 12) == 0 else None)
    write_animation(folder / "frames" / "frame_%03d.png", [*sheets, *[sheets[-1]] * FPS], folder / "points.gif", fps=FPS)
    figures.save(sheets[-1], folder / "points.png")
    write_whole(folder / "points.npz", numpy_bytes(np.savez, source=way[0], data=way[-1]))
    files = [folder / "points.gif", folder / "points.png", folder / "points.npz"]
    return Result(files[0], files, f"{count} points, {sampler.calls()} calls")


def move_drawing(
    device: Device, density: np.ndarray, spec: SamplerConfig, count: int, seed: int, folder: Path, show: Show
) -> Result:
    """The points of a drawing, and the drawing as a file that train_iadb.py learns from."""
    from PIL import Image

    result = animate(device, drawn_sampler(density, spec), count, seed, None, folder, show)
    Image.fromarray((255 * density / density.max()).round().astype(np.uint8)).save(folder / "drawing.png")
    words = f"{result.words} of the exact answer; the command trains a network that learns it"
    return result._replace(files=[*result.files, folder / "drawing.png"], words=words)


def move_run(device: Device, request: DrawRequest, folder: Path, show: Show) -> Result:
    """The points of a run."""
    run = device.open(request.run)
    if isinstance(run, Opened):
        raise UserError(f"{request.run} draws images: go to the tab Draw")
    count, labels = request.num_samples or 1, None
    if run.num_classes is not None:
        labels = torch.tensor(random_labels(request.seed, range(count), run.num_classes), device=device.device)
    return animate(device, build_sampler(run, request.spec), count, request.seed, labels, folder, show)


def build_points_tab(page: Page) -> None:
    """The fields of the tab, and what its buttons do."""
    import gradio as gr

    def names() -> list[str]:
        return [DRAWING, *(name for name in page.places.names() if page.places.facts(name).kind == "points")]

    with gr.Row():
        with gr.Column(min_width=320):
            editor = gr.Sketchpad(
                type="pil",
                label="Your drawing",
                brush=gr.Brush(default_size=20, colors=["#2f6fc4"], color_mode="fixed"),
                layers=False,
                transforms=(),
                buttons=[],
                canvas_size=(384, 384),
                fixed_canvas=True,
                height=440,
                elem_id="points-drawing",
            )
            source = page.run_list(names, label="Points of", value=DRAWING)
            with gr.Row():
                count = gr.Number(3000, label="Points", precision=0, minimum=10, maximum=MOST_POINTS, min_width=90)
                seed = seed_field()
            with gr.Row():
                solver = solver_field(invertible_solvers(), "euler")
                steps = gr.Number(30, label="Steps", precision=0, minimum=1, maximum=200, min_width=90)
            with gr.Row():
                move = gr.Button("Move", variant="primary", min_width=120, elem_id="points-button")
                stop = stop_button()
        with gr.Column(min_width=320):
            results = ResultFields.build("points", "Moving points")

    @in_one_line
    def handle(drawing: Any, name: str | None, count: Any, seed: Any, solver: str, steps: Any) -> Iterator[list[Any]]:
        spec = validate(SamplerConfig, {"solver": solver, "steps": whole(steps, "steps", 1, 200)}, origin="settings")
        number, at = whole(count, "points", 10, MOST_POINTS), whole(seed, "seed", 0, 2**53 - 1)
        with page.job_folder() as folder:
            if name == DRAWING:
                density = drawing_of(drawing)
                command = command_line("train_iadb.py", [*TRAIN, "--set", "data.path=drawing.png", "--run-dir", "runs/drawing"])

                def move_them(show: Show) -> Result:
                    return move_drawing(page.device, density, spec, number, at, folder, show)
            else:
                request = DrawRequest(run=page.places.place(name), spec=spec, num_samples=number, seed=at, frames=True)
                command = request.command(page.device_word)

                def move_them(show: Show) -> Result:
                    return move_run(page.device, request, folder, show)

            yield results.begin
            yield from show_job(page.stream(move_them), command)

    event = move.click(handle, [editor, source, count, seed, solver, steps], list(results), api_name="points", **QUEUE)
    stop.click(None, cancels=[event], queue=False)
