"""--dry-run: what a run would cost. A rehearsal trains for some steps, and its clock and its files say it."""

import gc
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import PartialState

from ..config import ENDLESS, read_json, to_steps
from ..config.progress import say
from ..report.samples import SAMPLE_BYTES
from ..runtime.checkpoint import keeps_best, newest
from ..runtime.memory import OutOfMemory
from ..runtime.processes import broadcast
from ..runtime.stream import BatchPlan, plan_batch
from .clock import Cadence, Clock, peak_memory_gigabytes
from .config import StepsConfig, TrainConfig
from .continuing import continue_as
from .rehearsal import Train, call, rehearsal_config, short_stages, temporary_folder
from .rehearsed_caches import enter_run, estimate_quality, rehearse_caches
from .run_mode import RunMode
from .session import cadences_of, left_out, remarks_on
from .stages import StageConfig, StagedConfig, plan_stages

# Steps of a stage: those that are not counted, all that are taken, and those between two readings of the clock.
WARMUP, STEPS, LOG_EVERY = 2, 12, 4
ENOUGH_SECONDS = 2.0  # where the steps took less, more of them are taken
FIT_STEPS = 2


class Planned(NamedTuple):
    """A stage of the run as the config has it: from step `first` of the run, or where the run goes on in it, to `end`."""

    name: str
    batch_plan: BatchPlan
    first: int
    end: int
    cadences: dict[str, Cadence]


def planned_stages(cfg: TrainConfig, num_images: int, world: int, begun: int) -> Iterator[Planned]:
    """What is left of a run after the step `begun`."""
    if isinstance(cfg, StagedConfig):
        for stage in plan_stages(cfg, num_images, rank=0, world=world):
            if stage.end > begun:
                cadences = cadences_of(cfg, stage.resolve, stage.first, stage.end)
                name = f"stage {stage.number} of {len(cfg.stages)}"
                yield Planned(name, stage.batch_plan, max(begun, stage.first), stage.end, cadences)
        return
    assert isinstance(cfg, StepsConfig)
    resolve = partial(to_steps, batch_size=cfg.batch_size, num_images=num_images)
    end = resolve(cfg.steps) if cfg.steps is not None else ENDLESS
    plan = plan_batch(cfg.batch_size, cfg.micro_batch_size, rank=0, world=world)
    yield Planned("", plan, begun, end, cadences_of(cfg, resolve, 0, end))


@dataclass
class Measured:
    """A stage: its length, how often the run does what in it, and what a step, a preview with its log line, a checkpoint and
    measuring the quality of samples take."""

    name: str
    batch_plan: BatchPlan
    steps: int
    previews: int
    saves: int
    step_seconds: float = 0.0
    preview_seconds: float = 0.0
    save_seconds: float = 0.0
    exports: int = 0
    snapshots: int = 0  # for post-hoc averages
    qualities: int = 0
    quality_seconds: float = 0.0


def count_of(stage: Planned) -> Measured:
    """A stage with how often it does what."""
    steps = stage.end - stage.first

    def times(word: str) -> int:
        return 1 if steps >= ENDLESS else stage.cadences[word].count(stage.first, stage.end)

    every = {word: cadence.every for word, cadence in stage.cadences.items()}
    exports = steps // every["export"] if every["export"] is not None and steps < ENDLESS else 0
    counts = {"exports": exports, "snapshots": times("snapshot") if every["snapshot"] is not None else 0}
    counts["qualities"] = times("quality") if every["quality"] is not None else 0
    return Measured(stage.name, stage.batch_plan, steps, times("preview"), times("save"), **counts)


@dataclass
class Costs:
    """What a rehearsal has found out: its stages, seconds before the first step, sizes in bytes, facts of the data."""

    stages: list[Measured]
    ahead_seconds: float = 0.0
    checkpoint_bytes: int = 0
    weights_bytes: int = 0
    preview_bytes: int = 0
    images: int = 0
    remarks: Sequence[str] = ()
    parameters: int = 0


def read_clock(stage: Measured, clock: Clock, first: int, last: int) -> None:
    """Put into `stage` what the clock of a rehearsal says of its steps from `first` to `last`."""
    readings = [(step, at) for step, at in clock.readings if first <= step <= last]
    counted = [reading for reading in readings if reading[0] >= first + WARMUP]
    (start, began), (end, ended) = (counted if len(counted) > 1 else readings)[0], readings[-1]
    between = sum(done.seconds for done in clock.activities if start <= done.step < end)
    stage.step_seconds = max(0.0, ended - began - between) / max(1, end - start)
    stage.preview_seconds, stage.save_seconds = (
        max((done.seconds for done in clock.activities if done.what == what and first < done.step <= last), default=0.0)
        for what in ("a preview", "saving a checkpoint")
    )


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def rehearse(
    train: Train, cfg: TrainConfig, run_dir: Path, folder: Path, steps: int, run_mode: RunMode, old: Path | None
) -> tuple[int, Costs | None]:
    """Train for so many steps of each stage in `folder`: the exit status, and on the first process what it has cost."""
    began, run = time.monotonic(), folder / "run"
    changes: dict[str, Any] = {"log": replace(cfg.log, trackers=(), every=LOG_EVERY)}
    begun = num_images = 0
    if old is not None and (start := newest(old / "checkpoints")[0]) is not None:
        begun, num_images = read_json(start / "progress.json")["step"], read_json(start / "data.json")["images"]
    if isinstance(cfg, StagedConfig):
        changes["stages"], last_steps = _shorten(cfg, steps, begun, num_images)
    else:
        last_steps = [LOG_EVERY * -(-(begun + steps) // LOG_EVERY)]
        changes["preview"] = replace(rehearsal_config(cfg).preview, every=last_steps[0])
        changes["checkpoint"] = replace(cfg.checkpoint, every=last_steps[0], every_minutes=None)
    short = rehearsal_config(cfg, **changes)
    if old is not None:
        continue_as(short, old, run)
    of_caches, cache_seconds = rehearse_caches(short, run_dir, folder, run, run_mode)
    status = call(train, replace(short, **of_caches), enter_run(folder, run), run_mode, last_steps[-1])
    clock = run_mode.clock
    if status or clock is None or not PartialState().is_main_process:
        return status, None
    stages, facts = list[Measured](), run_mode.facts
    planned = planned_stages(cfg, facts["images"], PartialState().num_processes, begun)
    for stage, first, last in zip(planned, [begun, *last_steps], last_steps, strict=False):
        stages.append(count_of(stage))
        read_clock(stages[-1], clock, first, last)
    last_checkpoint, _ = newest(run / "checkpoints")
    costs = Costs(stages, clock.readings[0][1] - began + cache_seconds, images=facts["images"])
    costs.remarks = [*([f"left out: {left_out(facts)}"] if facts["skipped"] else []), *remarks_on(cfg, facts)]
    costs.parameters = run_mode.train_state.num_parameters if run_mode.train_state is not None else 0
    run_mode.train_state = None  # its memory is given back
    costs.preview_bytes = _bytes_in(run / "samples") // max(1, len(stages))
    if last_checkpoint is not None:
        costs.checkpoint_bytes = _bytes_in(last_checkpoint)
        costs.weights_bytes = (last_checkpoint / "ema.safetensors").stat().st_size
        quality_seconds = estimate_quality(cfg, run, run_mode)
        for stage in stages:
            stage.quality_seconds = quality_seconds
    return status, costs


def _shorten(cfg: StagedConfig, steps: int, begun: int, num_images: int) -> tuple[tuple[StageConfig, ...], list[int]]:
    """The stages of so many steps each, that in which a run goes on after `begun` of so many more; and where they end, but for
    those that are over. A run that is over stays as it is."""
    if not begun:
        return short_stages(cfg, steps), [steps * (i + 1) for i in range(len(cfg.stages))]
    stages, last_steps = list(cfg.stages), list[int]()
    for i, stage in enumerate(plan_stages(cfg, num_images, rank=0, world=1)):
        if stage.end > begun:
            before = begun - stage.first if begun > stage.first else 0
            stages[i] = replace(short_stages(cfg, before + steps)[i])
            last_steps.append((last_steps[-1] if last_steps else stage.first + before) + steps)
    return tuple(stages), last_steps or [begun + 1]


def dry_run(train: Train, cfg: TrainConfig, run_dir: Path, old: Path | None = None) -> int:
    """Say what a run costs: speed, memory, time to the end, disk; on one GPU also the largest micro-batch that fits. Of one
    that goes on from an `old` one, what is left of it."""
    searches = torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) == 1
    with temporary_folder(run_dir) as (folder, remove):
        costs = None
        try:
            status, costs = rehearse(train, cfg, run_dir, folder, STEPS, _quiet(remove), old)
            if status == 0 and (more_steps := broadcast(_more_steps(costs))):
                shutil.rmtree(folder, ignore_errors=True)
                status, better = rehearse(train, cfg, run_dir, folder, more_steps, _quiet(remove, says=False), old)
                costs = _with_steps_of(costs, better)
        except OutOfMemory as error:
            if not searches:
                raise
            print(f"out of memory at {error.key} {error.micro}; looking for one that fits", flush=True)
            status = 2
        if status == 0 and costs is not None:
            device = PartialState().device or torch.device("cpu")
            print(f"{cfg.name}, a dry run: nothing was written")
            for row, value in rows_of(cfg, costs, run_dir, peak_memory_gigabytes(device), device.type):
                print(f"  {row:<12} {value}")
            for line in _warnings(folder / "run" / "log.txt"):
                print(f"  {'warning':<12} {line}")
        if status != 1:  # nobody asked for a stop
            for line in fitting(train, cfg, folder, remove):
                print(f"  {'fits':<12} {line}")
    return status


def _quiet(remove: Callable[[], None], *, says: bool = True) -> RunMode:
    return RunMode(quiet=True, says_at_once=says, job="dry run: ", on_kill=remove)


def _more_steps(costs: Costs | None) -> int:
    """How many steps of each stage a second rehearsal takes, where those of the first were too short to be measured; else 0."""
    if costs is None:
        return 0
    slowest = max(stage.step_seconds for stage in costs.stages)
    few = min(stage.steps for stage in costs.stages) <= STEPS
    return 0 if few or slowest * STEPS >= ENOUGH_SECONDS else min(400, STEPS + int(ENOUGH_SECONDS / max(slowest, 1e-4)))


def _with_steps_of(costs: Costs | None, better: Costs | None) -> Costs | None:
    if costs is not None and better is not None:
        for stage, measured in zip(costs.stages, better.stages, strict=True):
            stage.step_seconds = measured.step_seconds
    return costs


def _warnings(log: Path) -> list[str]:
    """What the rehearsed run has warned of in its log.txt."""
    lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
    texts = (line.partition("warning: ")[2] for line in lines if " warning: " in line[:30])
    return list(dict.fromkeys(texts))


def fitting(train: Train, cfg: TrainConfig, folder: Path, remove: Callable[[], None]) -> list[str]:
    """What is said of the largest micro-batch: on one GPU each that fits, on several where it is looked for."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not torch.cuda.is_available() or os.environ.get("RANK", "0") != "0":
        return []
    if world == "1":
        return what_fits(train, cfg, folder, remove)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return ["not looked for with FSDP, where it grows with the number of cards: try a larger micro_batch_size"]
    return [f"not looked for on {world} processes: --dry-run on one GPU says it, for each of these too"]


def what_fits(train: Train, cfg: TrainConfig, folder: Path, remove: Callable[[], None] = lambda: None) -> list[str]:
    """In words, by the key that sets it, the largest micro-batch with which two steps do not run out of memory; of an
    autoencoder that of each stage."""
    of_caches, _ = rehearse_caches(cfg, folder / "no run", folder, folder / "run", _quiet(remove))

    def is_possible(micro: int, **changes: Any) -> bool:
        gc.collect()
        torch.cuda.empty_cache()
        shutil.rmtree(folder / "run", ignore_errors=True)
        one = {"batch_size": micro, "micro_batch_size": micro, "compile": False, **changes, **of_caches}
        try:
            short = rehearsal_config(cfg, **one)
            return call(train, short, enter_run(folder, folder / "run"), _quiet(remove, says=False), FIT_STEPS) == 0
        except OutOfMemory:
            return False

    if not isinstance(cfg, StagedConfig):
        return [_search("micro_batch_size", cfg.batch_size, is_possible)]
    lines, tanh = list[str](), False
    for i, stage in enumerate(short_stages(cfg, FIT_STEPS + 1)):
        tanh |= stage.tanh
        one_stage = replace(stage, batch_size=None, micro_batch_size=None, tanh=tanh)  # so that no earlier one takes its time
        batch = stage.batch_size or cfg.batch_size
        lines.append(_search(f"stages.{i}.micro_batch_size", batch, partial(is_possible, stages=(one_stage,))))
    return lines


def _search(key: str, batch: int, is_possible: Callable[[int], bool]) -> str:

    def is_said_and_possible(size: int) -> bool:
        say(f"dry run: does {key} {size} fit?")
        return is_possible(size)

    size = largest([size for size in range(1, batch + 1) if batch % size == 0], is_said_and_possible)
    if size is None:
        return f"no {key}: out of memory with one image; try a smaller image.size or model.base_channels"
    return f"{key} up to {size}" + (" = batch_size" if size == batch else "")


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending `sizes` that fits, where what is smaller than one that fits does too."""
    low, high = -1, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low] if low >= 0 else None


def rows_of(cfg: TrainConfig, costs: Costs, run_dir: Path, memory: float, device: str) -> list[tuple[str, str]]:
    """What a dry run says, in rows: data, parameters, each stage, memory (GB), disk under the rules by which checkpoints are
    kept, time to the end."""
    rows = [("data", line) for line in (f"{costs.images} images", *costs.remarks)]
    rows += [("parameters", f"{costs.parameters / 1e6:.2f} M")]
    seconds, one, saved, preview_bytes = costs.ahead_seconds, costs.checkpoint_bytes, 0, 0
    for stage in costs.stages:
        images, plan, minutes = stage.steps * stage.batch_plan.batch, stage.batch_plan, cfg.checkpoint.every_minutes
        by_clock = int(stage.steps * stage.step_seconds / 60 / minutes) if minutes is not None else 0
        saves = max(stage.saves, by_clock)
        length = f"{stage.steps} of {plan.batch} images = {images / costs.images:.1f} epochs"
        rows += [(stage.name or "steps", length if stage.steps < ENDLESS else f"without end, of {plan.batch} images")]
        rows += [("one step", f"{plan.world} x {device} x {plan.accumulation} x {plan.micro} images")]
        rows += [("images/s", f"{plan.batch / max(stage.step_seconds, 1e-9):.1f}")]
        times = f"{stage.preview_seconds:.1f} s, a checkpoint {stage.save_seconds:.1f} s"
        rows += [("preview", times if stage.steps >= ENDLESS else f"{times}: {stage.previews} and {saves} of them")]
        if stage.qualities:
            rows += [("quality", f"{stage.quality_seconds:.1f} s: {stage.qualities} of them")]
        seconds += stage.steps * stage.step_seconds + stage.previews * stage.preview_seconds + saves * stage.save_seconds
        seconds += stage.qualities * stage.quality_seconds
        saved, preview_bytes = saved + saves, preview_bytes + stage.previews * costs.preview_bytes
    saved, exports = min(saved, cfg.checkpoint.keep + keeps_best(cfg)), sum(stage.exports for stage in costs.stages)
    snapshots = sum(stage.snapshots for stage in costs.stages)  # of two averages in half precision
    on_page = min(preview_bytes, SAMPLE_BYTES) * 4 // 3  # in base64
    needed = saved * one + (exports + snapshots + 1) * costs.weights_bytes + preview_bytes + on_page
    free_bytes = shutil.disk_usage(next(parent for parent in run_dir.resolve().parents if parent.exists())).free
    checkpoints = f"{saved} checkpoints of {_size(one)} (one more while it is written)"
    disk = f"{_size(needed)}: {checkpoints}, final weights, previews, report"
    for count, what in ((exports, "exports"), (snapshots, "snapshots for post-hoc averages")):
        disk += f", {count} {what} of {_size(costs.weights_bytes)}" if count else ""
    if needed + one > free_bytes:
        disk += f"; ONLY {_size(free_bytes)} ARE FREE: make room, or lower checkpoint.keep"
    rows += [("memory", f"{memory:.2f} GB"), ("disk", disk)]
    if costs.stages[-1].steps < ENDLESS:
        rows += [("time", _duration(seconds))]
    return rows


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min" if seconds > 90 else f"{seconds:.0f} s"
