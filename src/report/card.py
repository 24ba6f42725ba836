"""The card of a run on the hub, made of its files, and the push of both."""

import html
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..config.sizes import describe_size, sides_of
from ..data.names import printable
from ..runs.opened import GAUSSIAN
from ..runs.sharing import SharedRun, share_run
from ..storage.hub import Pushed, push_files
from .run_files import KINDS, Kind, finite_or_none, read_lines
from .samples import find_samples

PREVIEWS = "previews"  # the folder of sheets on the hub: what lies in it is replaced with each push
SHEETS, CLASSES = 12, 60  # at most so many are shown
TAGS = {"stages": "autoencoder", "classifier": "image-classification", "source": "flow-matching"}
TAGS |= {"autoencoder": "latent-diffusion", "process": "diffusion"}  # by the key of the kind
MEASURED = re.compile(r"evaluation_(?!sweep_|class_)\w+|frechet_\w+|held_out_[a-z_]+")


def push_run(path: str | Path, name: str, *, private: bool = False, shown: bool = True) -> Pushed:
    """Push the EMA weights of a run, a checkpoint or a final folder to OWNER/NAME[@BRANCH] of the hub, with what opens them,
    previews and a card. Its progress is `shown`, or not. A UserError where there are no whole weights, or the hub does not
    take them."""
    run = share_run(path)
    step, sheets = find_previews(run)
    card = make_card(run, name, step, sheets)
    files = {**run.files, **{preview_name(run, file): file for file in sheets.values()}}
    message = f"{run.config['name']}, step {run.step}"
    return push_files(name, files, card, message=message, private=private, replaced=[PREVIEWS], shown=shown)


def draws_from_noise(config: Mapping[str, Any]) -> bool:
    """Whether a run of this config draws images from noise alone: then no image of its data is on its previews."""
    is_other = "process" not in config or config.get("image") is None
    from_images = config.get("condition") is not None or config.get("low_resolution") is not None
    paired = config.get("pairs") is not None or config.get("coupling", "random") != "random"
    return not (is_other or from_images or paired) and config.get("source", GAUSSIAN) == GAUSSIAN


def find_previews(run: SharedRun) -> tuple[int, dict[str, Path]]:
    """(step, {class, or "" for a sheet of all: file}) of the newest previews that show no image of the data, up to the step of
    the weights."""
    if not draws_from_noise(run.config):
        return 0, {}
    steps = {step: sheets for step, sheets in find_samples(run.directory / "samples").items() if step <= run.step}
    step = max(steps, default=0)
    return step, dict(list(steps.get(step, {}).items())[:SHEETS])


def preview_name(run: SharedRun, file: Path) -> str:
    """The name of a preview on the hub."""
    return f"{PREVIEWS}/{file.relative_to(run.directory / 'samples').as_posix()}"


def make_card(run: SharedRun, name: str, preview_step: int, sheets: Mapping[str, Path]) -> str:
    """The Markdown of the card of a run that is called `name` on the hub: what it is, how to draw with it, what it learned
    from, what was measured. The licence is left to fill in."""
    import jinja2

    config, facts, is_ours = run.config, run.facts, draws_from_noise(run.config)
    classes, network = _class_names(config, facts), config.get("model", {}).get("kind", "unet")
    things = "images" if config.get("image") is not None else "points"
    convertible = is_ours and network == "unet"
    few = "num_samples=4, seed=0" + (", classes=[0]" if classes else "")
    text = (Path(__file__).parent / "card.md").read_text(encoding="utf-8")
    template = jinja2.Template(text, trim_blocks=True, undefined=jinja2.StrictUndefined)
    return template.render(
        name=name,
        title=printable(config["name"]),
        tag=TAGS[_kind(config).key],
        pipeline="unconditional-image-generation" if is_ours else "",
        what=_describe(config, run.step, classes, things),
        previews=[(_escaped(label), preview_name(run, file).replace(" ", "%20")) for label, file in sheets.items()],
        preview_step=preview_step,
        can_draw="process" in config,
        commands=_commands(config, name, bool(classes)),
        in_python=few if is_ours else "",
        for_diffusers=f"python convert.py to-diffusers {name} --out FOLDER" if convertible or "stages" in config else "",
        data=_describe_data(facts, things),
        things=things,
        starts_from_drawing=(facts.get("source") or {}).get("density") is not None,
        classes=", ".join(_escaped(label) for label in classes[:CLASSES])
        + (f" and {len(classes) - CLASSES} more" if len(classes) > CLASSES else ""),
        numbers=_numbers(read_lines(run.directory / "metrics.jsonl"), run.step),
        millions=f"{_count_parameters(run.files['ema.safetensors']) / 1e6:.2f}",
        autoencoder="autoencoder.safetensors" in run.files,
    )


def _class_names(config: Mapping[str, Any], facts: Mapping[str, Any]) -> Sequence[str]:
    """The classes that it was taught; none where it has none."""
    teaches = "classifier" in config or ("process" in config and config.get("class_conditional") is not False)
    return facts.get("class_names") or [] if teaches else []


def _kind(config: Mapping[str, Any]) -> Kind:
    return next(kind for kind in KINDS if kind.key in config)


def _describe(config: Mapping[str, Any], step: int, classes: Sequence[str], things: str) -> str:
    """What the run is, in a sentence or two."""
    title, image, process = _kind(config).title, config.get("image"), config.get("process")
    words = title[0].upper() + title[1:]
    if image is not None:
        colours = "RGB" if image.get("channels", 3) == 3 else "grey"
        words += f", {colours} images of {describe_size(sides_of(image['size']))}"
    words += f", {len(classes)} classes" if classes else ""
    if process is not None:
        kind = config["model"].get("kind", "unet")
        network = {"unet": "U-Net", "mlp": "MLP"}.get(kind, kind)
        words += f". The network, a {network}, predicts {process['target']} on the schedule {process['schedule']['kind']}"
    batch = config.get("batch_size")
    return f"{words}. It was trained for {step} steps" + (f" of {batch} {things}." if isinstance(batch, int) else ".")


def _commands(config: Mapping[str, Any], name: str, has_classes: bool) -> list[str]:
    if "stages" in config:
        return [f"python train_ldm.py -cfg CONFIG.json --set autoencoder={name}", f"python evaluate.py {name} --data FOLDER"]
    if "classifier" in config:
        return [f"python sample.py DIFFUSION_RUN --guidance-method classifier --guidance 2 --classifier {name}"]
    words = " --num-samples 16" + (" --classes 0" if has_classes else "")
    if config.get("low_resolution") is not None:
        words = " --low FOLDER"
    elif config.get("condition") is not None:
        words = " --condition FOLDER"
    elif config.get("image") is None:
        words = ""
    return [f"python sample.py {name}{words}"]


def _describe_data(facts: Mapping[str, Any], things: str) -> str:
    if "images" not in facts:
        return "The weights were imported, and nothing is known of what they learned from."
    held_out = facts.get("held_out_images")
    return f"{facts['images']:,} {things}" + (f"; {held_out:,} more were held out, to measure with." if held_out else ".")


def _numbers(lines: Sequence[Mapping[str, Any]], last_step: int) -> list[tuple[str, int, str]]:
    """(what, step, value) of what was measured last of each kind, up to the step of the weights."""
    latest = dict[str, tuple[int, float]]()
    for line in lines:
        for key, value in line.items():
            number = finite_or_none(value)
            if number is not None and MEASURED.fullmatch(key) and line["step"] <= last_step:
                latest[key] = line["step"], number
    return [
        (key.removeprefix("evaluation_").replace("_", " "), step, f"{value:.4g}")
        for key, (step, value) in sorted(latest.items())
    ]


def _count_parameters(weights: Path | bytes) -> int:
    """The number of values in a file of weights, which is not read for it."""
    from safetensors import safe_open

    assert isinstance(weights, Path)
    with safe_open(weights, "numpy") as file:
        return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118


def _escaped(label: str) -> str:
    """A name of a class as Markdown shows it."""
    return re.sub(r"([\\`*_\[\]|!#])", r"\\\1", html.escape(printable(label)))
