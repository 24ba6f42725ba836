"""--dry-run: what a run would cost. A rehearsal trains for some steps, and its clock and its files say it."""

import gc
import os
import shutil
import time
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from ..config import ENDLESS, read_json, to_steps
from ..config.progress import duration, say
from ..evaluation.quality import quality_seconds
from ..report.samples import SAMPLE_BYTES
from ..runs.opened import open_run
from ..runtime.checkpoint import count_spared, newest
from ..runtime.failures import OutOfMemory
from ..runtime.processes import broadcast
from ..runtime.stream import BatchPlan, plan_batch
from ..sampling.sampler import build_sampler
from ..storage.files import size
from .autoencoder_stages import StageConfig, StagedConfig, plan_stages
from .clock import Cadence, Clock, peak_memory_gigabytes
from .config import DiffusionConfig, PathPreviewConfig, PreviewConfig, StepsConfig, TrainConfig
from .continuing import continue_as, start_of
from .cooldown import Cooldown
from .rehearsal import NEVER, Rehearsal, rehearsal_config, short_stages
from .run_mode import Train
from .session import cadences_of, left_out, remarks_on

# Steps of a stage: those that are not counted, all that are taken, and those between two readings of the clock.
WARMUP, STEPS, LOG_EVERY = 2, 12, 4
ENOUGH_SECONDS = 2.0  # where the steps took less, more of them are taken
FIT_STEPS = 2


@dataclass
class MeasuredStage:
    """A stage of the run as the config has it, from step `first` of the run, or where the run goes on in it, to `end`; and the
    seconds that a step, a preview with its log line, and a checkpoint take."""

    name: str
    batch_plan: BatchPlan
    first: int
    end: int
    cadences: dict[str, Cadence]
    step_seconds: float = 0.0
    preview_seconds: float = 0.0
    save_seconds: float = 0.0

    @property
    def steps(self) -> int:
        return self.end - self.first

    def count(self, word: str) -> int:
        """How often the run does this in the stage."""
        cadence, only_asked = self.cadences[word], word in ("export", "quality", "snapshot")
        if (only_asked and cadence.every is None) or (word == "export" and self.steps >= ENDLESS):
            return 0
        if word == "export":  # not at the end
            return self.steps // (cadence.every or 1)
        return 1 if self.steps >= ENDLESS else cadence.count(self.first, self.end)

    def measure(self, clock: Clock, first: int, last: int) -> None:
        """Note what the clock of a rehearsal says of its steps from `first` to `last`."""
        readings = [(step, at) for step, at in clock.readings if first <= step <= last]
        counted = [reading for reading in readings if reading[0] >= first + WARMUP]
        (start, began), (end, ended) = (counted if len(counted) > 1 else readings)[0], readings[-1]
        between = sum(done.seconds for done in clock.activities if start <= done.step < end)
        self.step_seconds = max(0.0, ended - began - between) / max(1, end - start)
        self.preview_seconds, self.save_seconds = (
            max((done.seconds for done in clock.activities if done.what == what and first < done.step <= last), default=0.0)
            for what in ("a preview", "saving a checkpoint")
        )


@dataclass
class Costs:
    """What a rehearsal on a `device` has measured: its stages, seconds before the first step and for the quality of samples,
    sizes in bytes, facts of the data."""

    stages: list[MeasuredStage]
    device: torch.device = torch.device("cpu")
    ahead_seconds: float = 0.0
    checkpoint_bytes: int = 0
    weights_bytes: int = 0
    preview_bytes: int = 0
    quality_seconds: float = 0.0
    images: int = 0
    remarks: Sequence[str] = ()
    parameters: int = 0
    precision: str | None = None


def planned_stages(cfg: TrainConfig, num_images: int, world: int, progress: Mapping[str, Any]) -> Iterator[MeasuredStage]:
    """What is left of a run after the checkpoint with this progress.json, which is empty where it has none."""
    begun = progress.get("step", 0)
    if isinstance(cfg, StagedConfig):
        for stage in plan_stages(cfg, num_images, rank=0, world=world):
            if stage.end > begun:
                cadences = cadences_of(cfg, stage.resolve, stage.first, stage.end)
                name = f"stage {stage.number} of {len(cfg.stages)}"
                yield MeasuredStage(name, stage.batch_plan, max(begun, stage.first), stage.end, cadences)
        return
    assert isinstance(cfg, StepsConfig)
    resolve = partial(to_steps, batch_size=cfg.batch_size, num_images=num_images)
    end = Cooldown(cfg, resolve(cfg.steps) if cfg.steps is not None else ENDLESS, progress).total
    plan = plan_batch(cfg.batch_size, cfg.micro_batch_size, rank=0, world=world)
    yield MeasuredStage("", plan, begun, end, cadences_of(cfg, resolve, 0, end))


def _shorten(cfg: TrainConfig, steps: int, begun: int, num_images: int) -> tuple[tuple[StageConfig, ...], list[int]]:
    """The stages of so many steps each, that in which a run goes on after `begun` of so many more; and where they end, but for
    those that are over. A run that is over stays as it is. Without stages, where the whole rehearsal ends."""
    if not isinstance(cfg, StagedConfig):
        return (), [LOG_EVERY * -(-(begun + steps) // LOG_EVERY)]
    if not begun:
        return short_stages(cfg, steps), [steps * (i + 1) for i in range(len(cfg.stages))]
    stages, last_steps = list(cfg.stages), list[int]()
    for i, stage in enumerate(plan_stages(cfg, num_images, rank=0, world=1)):
        if stage.end > begun:
            before = max(0, begun - stage.first)
            stages[i] = short_stages(cfg, before + steps)[i]
            last_steps.append((last_steps[-1] if last_steps else stage.first + before) + steps)
    return tuple(stages), last_steps or [begun + 1]


def rehearse(
    rehearsal: Rehearsal, cfg: TrainConfig, steps: int, old: Path | None, *, says: bool = True
) -> tuple[int, Costs | None]:
    """Train for so many steps of each stage: the exit status, and on the first process what it has cost."""
    began, run = time.monotonic(), rehearsal.folder / "run"
    progress, num_images = dict[str, Any](), 0
    if old is not None:
        start = start_of(cfg, old)
        progress, num_images = read_json(start / "progress.json"), read_json(start / "data.json")["images"]
    begun = progress.get("step", 0)
    stages, last_steps = _shorten(cfg, steps, begun, num_images)
    every = NEVER if stages else last_steps[0]
    short = rehearsal_config(cfg, log_every=LOG_EVERY, preview_every=every, save_every=every, stages=stages)
    if old is not None:
        continue_as(short, old, run)
    status, run_mode = rehearsal.train(short, "run", last_steps[-1], says=says)
    clock, facts, state = run_mode.clock, run_mode.facts, run_mode.train_state
    if status or clock is None or state is None or os.environ.get("RANK", "0") != "0":
        return status, None
    world, ahead_seconds = int(os.environ.get("WORLD_SIZE", "1")), clock.readings[0][1] - began + rehearsal.cache_seconds
    costs = Costs([], next(state.network.parameters()).device, ahead_seconds, images=facts["images"])
    planned = planned_stages(cfg, costs.images, world, progress)
    for stage, first, last in zip(planned, [begun, *last_steps], last_steps, strict=False):
        stage.measure(clock, first, last)
        costs.stages.append(stage)
    costs.remarks = [*([f"left out: {left_out(facts)}"] if facts["skipped"] else []), *remarks_on(cfg, facts)]
    costs.parameters, costs.precision = state.num_parameters, rehearsal.precision
    state = run_mode.train_state = None  # its memory is given back
    costs.preview_bytes = _bytes_in(run / "samples") // max(1, len(costs.stages))
    if (last_checkpoint := newest(run / "checkpoints")[0]) is not None:
        costs.checkpoint_bytes = _bytes_in(last_checkpoint)
        costs.weights_bytes = (last_checkpoint / "ema.safetensors").stat().st_size
        if cfg.quality is not None:
            run_mode.enter_phase("measuring samples")
            try:
                costs.quality_seconds = _estimate_quality(cfg, run, costs.device, world)
            finally:
                run_mode.leave_phases()
    return status, costs


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _estimate_quality(cfg: TrainConfig, run: Path, device: torch.device, world: int) -> float:
    """The seconds that measuring the quality of samples takes once, judged by one batch of the rehearsed run. The first process
    alone calls it."""
    assert cfg.quality is not None and isinstance(cfg.preview, PreviewConfig | PathPreviewConfig)
    opened = open_run(run, device)
    spec = cfg.preview.sampler if isinstance(cfg.preview, PreviewConfig) else cfg.preview.most_calls
    sampler = build_sampler(opened, spec.without_guidance(opened.num_classes is None))
    options = {"device": device, "processes": world}
    return quality_seconds(cfg.quality, sampler, cfg.preview.batch_size, opened.num_classes, **options)


def dry_run(train: Train, cfg: TrainConfig, run_dir: Path, old: Path | None = None) -> int:
    """Say what a run costs: speed, memory, time to the end, disk; on one GPU also the largest micro-batch that fits. Of one
    that goes on from an `old` one, what is left of it."""
    searches = torch.cuda.is_available() and os.environ.get("WORLD_SIZE", "1") == "1"
    with closing(Rehearsal(train, run_dir, "dry run: ")) as rehearsal:
        run, costs = rehearsal.folder / "run", None
        try:
            status, costs = rehearse(rehearsal, cfg, STEPS, old)
            if status == 0 and (more_steps := broadcast(_more_steps(costs))):
                shutil.rmtree(run, ignore_errors=True)
                status, better = rehearse(rehearsal, cfg, more_steps, old, says=False)
                for stage, measured in zip(costs.stages, better.stages, strict=True) if costs and better else ():
                    stage.step_seconds = measured.step_seconds
        except OutOfMemory as error:
            if not searches:
                raise
            print(f"out of memory at {error.key} {error.micro}; looking for one that fits", flush=True)
            status = 2
        if status == 0 and costs is not None:
            print(f"{cfg.name}, a dry run: nothing was written")
            lines = (run / "log.txt").read_text(encoding="utf-8").splitlines()
            warnings = [line.partition("warning: ")[2] for line in lines if " warning: " in line[:30]]
            rows = rows_of(cfg, costs, run_dir, peak_memory_gigabytes(costs.device))
            for name, value in [*rows, *(("warning", text) for text in dict.fromkeys(warnings))]:
                print(f"  {name:<12} {value}")
        if status != 1:  # nobody asked for a stop
            for line in fitting(rehearsal, cfg):
                print(f"  {'fits':<12} {line}")
    return status


def _more_steps(costs: Costs | None) -> int:
    """How many steps of each stage a second rehearsal takes, where those of the first were too short to be measured; else 0."""
    if costs is None:
        return 0
    slowest = max(stage.step_seconds for stage in costs.stages)
    few = min(stage.steps for stage in costs.stages) <= STEPS
    return 0 if few or slowest * STEPS >= ENOUGH_SECONDS else min(400, STEPS + int(ENOUGH_SECONDS / max(slowest, 1e-4)))


def fitting(rehearsal: Rehearsal, cfg: TrainConfig) -> list[str]:
    """What is said of the largest micro-batch: on one GPU each that fits, on several where it is looked for."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not torch.cuda.is_available() or os.environ.get("RANK", "0") != "0":
        return []
    if world == "1":
        return what_fits(rehearsal, cfg)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return ["not looked for with FSDP, where it grows with the number of cards: try a larger micro_batch_size"]
    return [f"not looked for on {world} processes: --dry-run on one GPU says it, for each of these too"]


def what_fits(rehearsal: Rehearsal, cfg: TrainConfig) -> list[str]:
    """In words, by the key that sets it, the largest micro-batch with which two steps do not run out of memory; of an
    autoencoder that of each stage."""
    contrast = cfg.process.loss.contrast if isinstance(cfg, DiffusionConfig) else None
    group = contrast.group if contrast is not None else 1  # a micro-batch holds whole groups

    def search(key: str, batch: int, **changes: Any) -> str:
        def is_possible(micro: int) -> bool:
            say(f"dry run: does {key} {micro} fit?")
            gc.collect()
            torch.cuda.empty_cache()
            shutil.rmtree(rehearsal.folder / "run", ignore_errors=True)
            one = rehearsal_config(cfg, batch_size=micro, micro_batch_size=micro, compile=False, **changes)
            try:
                return rehearsal.train(one, "run", FIT_STEPS, says=False)[0] == 0
            except OutOfMemory:
                return False

        sizes = [size for size in range(1, batch + 1) if batch % size == 0 and size % group == 0]
        micro = largest(sizes, is_possible)
        if micro is None:
            least = "one image" if group == 1 else f"{group} images"
            return f"no {key}: out of memory with {least}; try a smaller image.size or model.base_channels"
        return f"{key} up to {micro}" + (" = batch_size" if micro == batch else "")

    if not isinstance(cfg, StagedConfig):
        return [search("micro_batch_size", cfg.batch_size)]
    lines, tanh = list[str](), False
    for i, stage in enumerate(short_stages(cfg, FIT_STEPS + 1)):
        tanh |= stage.tanh
        one_stage = replace(stage, batch_size=None, micro_batch_size=None, tanh=tanh)  # so that no earlier one takes its time
        lines.append(search(f"stages.{i}.micro_batch_size", stage.batch_size or cfg.batch_size, stages=(one_stage,)))
    return lines


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending `sizes` that fits, where what is smaller than one that fits does too."""
    count = bisect_left(sizes, True, key=lambda size: not fits(size))
    return sizes[count - 1] if count else None


def rows_of(cfg: TrainConfig, costs: Costs, run_dir: Path, memory: float) -> list[tuple[str, str]]:
    """What a dry run says, in rows: data, parameters, each stage, memory (GB), disk under the rules by which checkpoints are
    kept, time to the end."""
    rows = [("data", line) for line in (f"{costs.images} images", *costs.remarks)]
    rows += [("parameters", f"{costs.parameters / 1e6:.2f} M")]
    if costs.precision is not None:
        rows += [("precision", f"mixed_precision auto is {costs.precision}")]
    seconds, counts, minutes = costs.ahead_seconds, Counter[str](), cfg.checkpoint.every_minutes
    for stage in costs.stages:
        plan, endless = stage.batch_plan, stage.steps >= ENDLESS
        count = Counter({word: stage.count(word) for word in ("preview", "save", "export", "quality", "snapshot")})
        if minutes is not None:
            count["save"] = max(count["save"], int(stage.steps * stage.step_seconds / 60 / minutes))
        counts += count
        length = f"{stage.steps} of {plan.batch} images = {stage.steps * plan.batch / costs.images:.1f} epochs"
        times = f"{stage.preview_seconds:.1f} s, a checkpoint {stage.save_seconds:.1f} s"
        rows += [
            (stage.name or "steps", f"without end, of {plan.batch} images" if endless else length),
            ("one step", f"{plan.world} x {costs.device.type} x {plan.accumulation} x {plan.micro} images"),
            ("images/s", f"{plan.batch / max(stage.step_seconds, 1e-9):.1f}"),
            ("preview", times if endless else f"{times}: {count['preview']} and {count['save']} of them"),
        ]
        if count["quality"]:
            rows += [("quality", f"{costs.quality_seconds:.1f} s: {count['quality']} of them")]
        seconds += stage.steps * stage.step_seconds + count["preview"] * stage.preview_seconds
        seconds += count["save"] * stage.save_seconds + count["quality"] * costs.quality_seconds
    saved, preview_bytes = min(counts["save"], cfg.checkpoint.keep + count_spared(cfg)), counts["preview"] * costs.preview_bytes
    on_page = min(preview_bytes, SAMPLE_BYTES) * 4 // 3  # in base64
    of_weights = counts["export"] + counts["snapshot"] + 1  # a snapshot has two averages in half precision
    one, needed = costs.checkpoint_bytes, of_weights * costs.weights_bytes + preview_bytes + on_page
    needed += saved * one
    free_bytes = shutil.disk_usage(next(parent for parent in run_dir.resolve().parents if parent.exists())).free
    disk = f"{size(needed)}: {saved} checkpoints of {size(one)} (one more while it is written), final weights, previews, report"
    for word, what in (("export", "exports"), ("snapshot", "snapshots for post-hoc averages")):
        disk += f", {counts[word]} {what} of {size(costs.weights_bytes)}" if counts[word] else ""
    if needed + one > free_bytes:
        disk += f"; ONLY {size(free_bytes)} ARE FREE: make room, or lower checkpoint.keep"
    rows += [("memory", f"{memory:.2f} GB"), ("disk", disk)]
    return rows if costs.stages[-1].steps >= ENDLESS else [*rows, ("time", duration(seconds))]
