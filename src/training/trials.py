"""What a training script's command line asks for: to train, to say what training would cost, or to prove that it resumes."""

import argparse
import gc
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState

from ..config import ENDLESS, UserError, read_json
from ..config.progress import Phases, say
from ..report.report import SAMPLE_BYTES
from ..runtime.checkpoint import keeps_best, newest, read_tensors, step_folder, verify_checkpoint
from ..runtime.failures import is_lost_rank
from ..runtime.launch import undetermined
from ..runtime.memory import OutOfMemory, explain_out_of_memory
from ..runtime.processes import silent_ranks
from ..runtime.stream import BatchPlan
from .clock import Cadence, peak_memory_gigabytes
from .continuing import MARK, continue_as, directory_of
from .uploads import Uploads, bring

RESTART = -1  # instead of an exit status: the script starts its training again, from the newest checkpoint
DRY_WARMUP, DRY_STEPS, DRY_SECONDS = 2, 8, 6.0
FIT_STEPS = 2
LOOKS = {"preview": "a preview", "quality": "measuring samples"}


@dataclass
class Measured:
    """A stage in a dry run: its length, and what a step, a preview with its log line, and a checkpoint took of it."""

    name: str
    split: BatchPlan
    steps: int
    previews: int
    saves: int
    step_seconds: float = 0.0
    preview_seconds: float = 0.0
    save_seconds: float = 0.0
    exports: int = 0
    snapshots: int = 0  # for post-hoc averages
    measured: int = 0  # times that the quality of samples is measured, and what one takes
    measured_seconds: float = 0.0


@dataclass
class Attempt:
    """One call of a script's `train`. `run` is for real; the others are trials, in a folder that is thrown away.

    `dry_run` takes steps of each stage until their speed is known, one preview and one checkpoint; `fit` takes two steps of
    each; `verify` takes the run's own steps up to `last`, with a checkpoint after each.
    """

    kind: Literal["run", "dry_run", "fit", "verify"] = "run"
    last: int = ENDLESS
    stages: list[Measured] = field(default_factory=list)
    ahead_seconds: float = 0.0
    checkpoint_bytes: int = 0
    weights_bytes: int = 0
    preview_bytes: int = 0
    images: int = 0
    remarks: list[str] = field(default_factory=list)
    parameters: int = 0
    uploads: Uploads | None = None
    warnings: list[str] = field(default_factory=list)  # about the data: said once the run begins
    held: ExitStack = field(default_factory=ExitStack)  # what is given up however the training ends
    trying: Callable[[int, int, str], None] = lambda *_: None
    leaving: Callable[[], object] = lambda: None  # what is still done where a second signal ends the process at once
    _mark: float = field(default_factory=time.monotonic)
    _phases: Phases | None = None

    @property
    def trial(self) -> bool:
        return self.kind != "run"

    def enters(self, what: str, *, at_once: bool = True) -> None:
        """Say that this is being done now, in a trial at once, and every half minute as long as it takes; on the first rank."""
        if os.environ.get("RANK", "0") != "0":
            return
        if self._phases is None:
            job = {"run": "", "verify": "verify-resume: "}.get(self.kind, "dry run: ")
            self._phases = Phases(job, at_once=self.kind in ("dry_run", "verify"))
            self.held.callback(self.leave_phases)
        self._phases.enter(what, at_once=at_once)

    def leave_phases(self) -> None:
        """From now on the run's clock says how far it is, or it is over."""
        if self._phases is not None:
            self._phases.close()
        self._phases = None

    def ahead(self, seconds: float) -> None:
        """There is so much to do before the first step that a dry run only did a part of (caches)."""
        self.ahead_seconds += seconds

    @contextmanager
    def partly(self, share: float) -> Generator[None]:
        """Around such a share of measuring the quality of samples, which a dry run does not do in full."""
        self.stages[-1].preview_seconds = self.lap()
        yield
        self.stages[-1].measured_seconds = self.lap() / share

    def lap(self, device: torch.device | None = None) -> float:
        """Seconds since the last lap, when the device is done."""
        if device is not None and device.type == "cuda":
            torch.cuda.synchronize(device)
        before, self._mark = self._mark, time.monotonic()
        return self._mark - before

    def enter(
        self, name: str, split: BatchPlan, steps: int, cadences: dict[str, Cadence], key: str, first_step: int | None = None
    ) -> None:
        """A stage begins, or goes on at `first_step`, for so many steps; `key` of the config sets its micro-batch."""
        self.trying(split.batch, split.micro, key)
        if not self.stages:
            self.ahead_seconds += self.lap()

        end = (first_step if first_step is not None else split.first_step) + steps

        def times(word: str) -> int:
            return 1 if steps >= ENDLESS else cadences[word].count(end - steps, end)

        every = cadences["export"].every
        exports = steps // every if every is not None and steps < ENDLESS else 0
        snapshots = times("snapshot") if cadences["snapshot"].every is not None else 0
        measured = times("quality") if cadences["quality"].every is not None else 0
        counted = {"exports": exports, "snapshots": snapshots, "measured": measured}
        self.stages.append(Measured(name, split, steps, times("preview"), times("save"), **counted))
        if self.trial:
            self.enters(f"{name or 'training'}, the first steps of {steps if steps < ENDLESS else 'many'}")

    def counted(self, done: int, device: torch.device) -> None:
        """So many steps of the stage are done: the first ones warm up."""
        if self.trial:
            stage, enough = self.stages[-1], {"dry_run": DRY_STEPS, "fit": FIT_STEPS}.get(self.kind, ENDLESS)
            of = f"of {min(stage.steps, enough)}" + (" or more" if self.kind == "dry_run" and stage.steps > enough else "")
            self.enters(f"{stage.name or 'training'}, step {done + 1} {of}", at_once=False)
        if self.kind == "dry_run" and done == min(DRY_WARMUP, self.stages[-1].steps - 1):
            self.lap(device)

    def next_step(self, step: int, end: int) -> int:
        """Where the loop goes on: a stage that is known well enough is left."""
        return end if self.kind in ("dry_run", "fit") else step

    def due(self, done: int, *, asked: bool, device: torch.device) -> bool:
        """Whether the loop looks up: `asked` says that the time for measuring is over."""
        if self.kind == "verify":
            return True
        stage = self.stages[-1]
        over = done >= min(FIT_STEPS if self.kind == "fit" else DRY_STEPS, stage.steps)
        if self.kind == "dry_run":
            over = (over and asked) or done >= stage.steps
            if over:
                stage.step_seconds = self.lap(device) / max(1, done - min(DRY_WARMUP, stage.steps - 1))
        return over

    def wants(self, word: str) -> bool:
        """What is done then: log, preview and save in a dry run."""
        if self.kind == "dry_run" and word in LOOKS:
            self.enters(LOOKS[word])
        return word == "save" if self.kind == "verify" else self.kind == "dry_run" and word not in ("export", "snapshot")

    @contextmanager
    def saving(self, checkpoint: Path, samples: Path) -> Generator[None]:
        """Around a checkpoint; what came before it was the preview."""
        if self.kind != "dry_run":
            yield
            return
        stage = self.stages[-1]
        stage.preview_seconds += self.lap()
        self.enters("a checkpoint")
        yield
        stage.save_seconds = self.lap()
        self.checkpoint_bytes = max(self.checkpoint_bytes, _bytes_in(checkpoint))
        if (checkpoint / "ema.safetensors").exists():  # on the first rank
            self.weights_bytes = (checkpoint / "ema.safetensors").stat().st_size
        self.preview_bytes = max(self.preview_bytes, _bytes_in(samples) // len(self.stages))


def _bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


Train = Callable[[Any, Path, Attempt], int]


def run_training(train: Train, cfg: Any, args: argparse.Namespace) -> int:
    """What `args` of config.training_arguments ask for: train(cfg, run directory, attempt), or trials of it."""
    run_dir, old = Path(args.run_dir or f"runs/{cfg.name}"), None
    if args.dry_run and args.verify_resume:
        raise UserError("--dry-run and --verify-resume are two things; give one of them")
    name = getattr(args, "continue_as", None)
    if name is not None and args.verify_resume:
        raise UserError("--continue-as and --verify-resume are two things; give one of them")
    if name is not None:
        run_dir, old = directory_of(name, run_dir), run_dir
    if cfg.bucket is not None:
        for line in bring(cfg, run_dir, trial=args.dry_run or args.verify_resume, old=old):
            print(line, flush=True)
    if args.dry_run:
        return dry_run(train, cfg, run_dir, old)
    if args.verify_resume:
        return verify_resume(train, cfg, run_dir)
    return _run(train, cfg, run_dir, old)


def train_here(train: Callable[..., int], cfg: Any, run_dir: str | Path, **given: Any) -> int:
    """A run from Python: `train` of a script with what is `given` from there; 0 where it has finished, 1 where it was stopped.
    Afterwards signals are the caller's again, and so, of one process, is accelerate's state."""
    names = ("SIGTERM", "SIGINT", "SIGUSR1", f"SIG{cfg.stop_signal}")
    before = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None)) is not None}
    run_dir = Path(run_dir)
    try:
        if cfg.bucket is not None:
            for line in bring(cfg, run_dir, trial=False):
                print(line, flush=True)
        return _run(partial(train, **given), cfg, run_dir)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if PartialState._shared_state and PartialState().num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)


def _run(train: Train, cfg: Any, run_dir: Path, old: Path | None = None) -> int:
    attempt, whole = Attempt(), True
    try:
        if old is not None:
            continue_as(cfg, old, run_dir)
        status = _take(train, cfg, run_dir, attempt)
        if status == 0 and attempt.uploads is None and cfg.bucket is not None and os.environ.get("RANK", "0") == "0":
            attempt.uploads = Uploads(cfg.bucket, run_dir, cfg.checkpoint.keep)  # it was finished: did all arrive then?
            if (found := newest(run_dir / "checkpoints")[0]) is not None:
                attempt.uploads.wake(int(found.name.removeprefix("step_")))
    except UserError as error:
        if old is None or not (run_dir / MARK).exists():
            raise
        if os.environ.get("RANK", "0") == "0":  # refused before it began: nothing is left of it
            shutil.rmtree(run_dir, ignore_errors=True)
        raise UserError(str(error).replace(str(run_dir), str(old))) from None  # what was read is the old run's
    finally:
        if attempt.uploads is not None:
            attempt.uploads.say = partial(print, flush=True)
            attempt.uploads.say(f"putting what is left into {cfg.bucket}")
            phases = Phases("", at_once=False)
            phases.enter(f"putting what is left into {cfg.bucket}")
            whole = attempt.uploads.close()
            phases.close()
    return status if whole else status or 1  # so that `launch && shutdown` does not lose the end of the run


def _take(train: Train, cfg: Any, run_dir: Path, attempt: Attempt) -> int:
    try:
        with attempt.held, explain_out_of_memory(cfg.batch_size, cfg.micro_batch_size) as attempt.trying:
            while (status := train(cfg, run_dir, attempt)) == RESTART:
                pass
    except RuntimeError as error:
        if (missing := undetermined(error)) is not None:
            told = f"deterministic: torch has no {missing} that repeats itself to the bit on this device"
            raise UserError(f"{told}; --set deterministic=false, or train without what asks for it") from error
        if not is_lost_rank(error):
            raise
        rank = os.environ.get("RANK", "0")
        print(
            f"error on rank {rank}: {silent_ranks()}, so this one cannot go on ({str(error).splitlines()[0][:200]}); what was "
            "saved is whole: run the same command again",
            file=sys.stderr,
            flush=True,
        )
        return 1
    return status


@contextmanager
def _thrown_away(run_dir: Path) -> Generator[tuple[Path, Callable[[], None]]]:
    """A hidden folder beside `run_dir`, of the same file system, that is gone afterwards; on the first rank. And what removes
    it, for a process that ends at once."""
    folder = run_dir.with_name(f".{run_dir.name}.trial")
    first = os.environ.get("RANK", "0") == "0"  # nothing is started yet
    new = [parent for parent in folder.parents if not parent.exists()]

    def remove() -> None:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
            for parent in new:
                with suppress(OSError):
                    parent.rmdir()

    try:
        if first:
            shutil.rmtree(folder, ignore_errors=True)
        yield folder, remove
    finally:
        remove()


def _without_traces(cfg: Any, **changes: Any) -> Any:
    """The config of a trial: no trackers, nothing uploaded."""
    own = {key.name for key in fields(cfg)}
    changes = {"bucket": None, "log": replace(cfg.log, trackers=()), **changes}
    return replace(cfg, **{key: value for key, value in changes.items() if key in own})


# ---------------------------------------------------------------------------------------------- what it would cost


def dry_run(train: Train, cfg: Any, run_dir: Path, old: Path | None = None) -> int:
    """Say what a run costs: speed, memory, time to the end, disk; on one GPU also the largest micro-batch that fits. Of one
    that goes on from an `old` one, what is left of it."""
    alone = torch.cuda.is_available() and int(os.environ.get("WORLD_SIZE", "1")) == 1
    spec = replace(cfg.checkpoint, every_minutes=DRY_SECONDS / 60)
    with _thrown_away(run_dir) as (folder, remove):
        attempt = Attempt("dry_run", leaving=remove)
        try:
            if old is not None:
                continue_as(cfg, old, folder)
            status = _take(train, _without_traces(cfg, checkpoint=spec), folder, attempt)
        except OutOfMemory as error:
            if not alone:
                raise
            print(f"out of memory at {error.key} {error.micro}; looking for one that fits", flush=True)
            status = 2
        if status == 0 and PartialState().is_main_process:
            device = PartialState().device or torch.device("cpu")
            print(f"{cfg.name}, a dry run: nothing was written")
            for row, value in costs(cfg, attempt, run_dir, peak_memory_gigabytes(device), device.type):
                print(f"  {row:<12} {value}")
            for line in attempt.warnings:
                print(f"  {'warning':<12} {line}")
        if status != 1:  # nobody asked for a stop
            for told in fitting(train, cfg, folder):
                print(f"  {'fits':<12} {told}")
    return status


def fitting(train: Train, cfg: Any, folder: Path) -> list[str]:
    """What is said of the largest micro-batch: on one GPU each that fits, on several where it is looked for."""
    world = os.environ.get("WORLD_SIZE", "1")
    if not torch.cuda.is_available() or os.environ.get("RANK", "0") != "0":
        return []
    if world == "1":
        return what_fits(train, cfg, folder)
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true":
        return ["not looked for with FSDP, where it grows with the number of cards: try a larger micro_batch_size"]
    return [f"not looked for on {world} processes: --dry-run on one GPU says it, for each of these too"]


def what_fits(train: Train, cfg: Any, folder: Path) -> list[str]:
    """In words, by the key that sets it, the largest micro-batch with which two steps do not run out of memory; of an
    autoencoder that of each stage."""
    if not hasattr(cfg, "stages"):
        return [_search("micro_batch_size", cfg.batch_size, partial(_steps_fit, train, cfg, folder))]
    return [
        _search(f"stages.{i}.micro_batch_size", stage.batch_size or cfg.batch_size, partial(_stage_fits, train, cfg, folder, i))
        for i, stage in enumerate(cfg.stages)
    ]


def _search(key: str, batch: int, fits: Callable[[int], bool]) -> str:

    def said(size: int) -> bool:
        say(f"dry run: does {key} {size} fit?")
        return fits(size)

    found = largest([size for size in range(1, batch + 1) if batch % size == 0], said)
    if found is None:
        return f"no {key}: out of memory with one picture; try a smaller image.size or model.base_channels"
    return f"{key} up to {found}" + (" = batch_size" if found == batch else "")


def _steps_fit(train: Train, cfg: Any, folder: Path, micro: int, *, last: int = ENDLESS, **changes: Any) -> bool:
    gc.collect()
    torch.cuda.empty_cache()
    shutil.rmtree(folder, ignore_errors=True)
    one = {"batch_size": micro, "micro_batch_size": micro, "compile": False, **changes}
    attempt = Attempt("fit", last=last, leaving=partial(shutil.rmtree, folder, ignore_errors=True))
    try:
        return _take(train, _without_traces(cfg, **one), folder, attempt) == 0
    except OutOfMemory:
        return False


def _stage_fits(train: Train, cfg: Any, folder: Path, number: int, micro: int) -> bool:
    """After the stages before it, which take a picture at a time: what they leave behind takes memory too."""
    stages = [replace(stage, batch_size=1, micro_batch_size=1) for stage in _short_stages(cfg, FIT_STEPS)]
    stages[number] = replace(stages[number], batch_size=micro, micro_batch_size=micro)
    return _steps_fit(train, cfg, folder, micro, last=FIT_STEPS * (number + 1), stages=tuple(stages))


def _short_stages(cfg: Any, steps: int) -> tuple[Any, ...]:
    """The stages of an autoencoder's config, of so many steps, the adversary in all of each."""
    return tuple(
        replace(stage, steps=steps, adversarial=stage.adversarial and replace(stage.adversarial, start_step=None))
        for stage in cfg.stages
    )


def largest(sizes: Sequence[int], fits: Callable[[int], bool]) -> int | None:
    """The largest of ascending `sizes` that fits, where what is smaller than one that fits does too."""
    low, high = -1, len(sizes)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(sizes[middle]) else (low, middle)
    return sizes[low] if low >= 0 else None


def costs(cfg: Any, attempt: Attempt, run_dir: Path, memory: float, device: str) -> list[tuple[str, str]]:
    """What a dry run found out, in rows: data, parameters, each stage, memory (GB), disk under the rules by which
    checkpoints are kept, time to the end."""
    rows = [("data", line) for line in (f"{attempt.images} pictures", *attempt.remarks)]
    rows += [("parameters", f"{attempt.parameters / 1e6:.2f} M")]
    seconds, one, kept, pictures = attempt.ahead_seconds, attempt.checkpoint_bytes, 0, 0
    for stage in attempt.stages:
        images, split, minutes = stage.steps * stage.split.batch, stage.split, cfg.checkpoint.every_minutes
        by_clock = int(stage.steps * stage.step_seconds / 60 / minutes) if minutes is not None else 0
        saves = max(stage.saves, by_clock)
        told = f"{stage.steps} of {split.batch} images = {images / attempt.images:.1f} epochs"
        rows += [(stage.name or "steps", told if stage.steps < ENDLESS else f"without end, of {split.batch} images")]
        rows += [("one step", f"{split.world} x {device} x {split.accumulation} x {split.micro} images")]
        rows += [("images/s", f"{split.batch / max(stage.step_seconds, 1e-9):.1f}")]
        more = f"{stage.preview_seconds:.1f} s, a checkpoint {stage.save_seconds:.1f} s"
        rows += [("preview", more if stage.steps >= ENDLESS else f"{more}: {stage.previews} and {saves} of them")]
        if stage.measured:
            rows += [("quality", f"{stage.measured_seconds:.1f} s: {stage.measured} of them")]
        seconds += stage.steps * stage.step_seconds + stage.previews * stage.preview_seconds + saves * stage.save_seconds
        seconds += stage.measured * stage.measured_seconds
        kept, pictures = kept + saves, pictures + stage.previews * attempt.preview_bytes
    kept, exports = min(kept, cfg.checkpoint.keep + keeps_best(cfg)), sum(stage.exports for stage in attempt.stages)
    snapshots = sum(stage.snapshots for stage in attempt.stages)  # of two averages in half precision
    shown = min(pictures, SAMPLE_BYTES) * 4 // 3  # in base64, on the page
    needed = kept * one + (exports + snapshots + 1) * attempt.weights_bytes + pictures + shown
    free = shutil.disk_usage(_existing(run_dir)).free
    told = (
        f"{_size(needed)}: {kept} checkpoints of {_size(one)} (one more while it is written), final weights, previews, report"
    )
    for count, what in ((exports, "exports"), (snapshots, "snapshots for post-hoc averages")):
        told += f", {count} {what} of {_size(attempt.weights_bytes)}" if count else ""
    advice = f"; ONLY {_size(free)} ARE FREE: make room, or lower checkpoint.keep" if needed + one > free else ""
    rows += [("memory", f"{memory:.2f} GB"), ("disk", told + advice)]
    if attempt.stages[-1].steps < ENDLESS:
        rows += [("time", _duration(seconds))]
    return rows


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e9 else f"{count / 1e6:.1f} MB"


def _duration(seconds: float) -> str:
    return f"{seconds / 3600:.1f} h" if seconds > 5400 else f"{seconds / 60:.1f} min" if seconds > 90 else f"{seconds:.0f} s"


def _existing(path: Path) -> Path:
    return next(parent for parent in path.resolve().parents if parent.exists())


# ---------------------------------------------------------------------------------------------- does it resume


def verify_resume(train: Train, cfg: Any, run_dir: Path) -> int:
    """A step, a save, a load into fresh objects, the next step both ways: are the two to the bit the same?

    An autoencoder takes two steps of each stage, and is loaded in the first and in the last. Status 1 where they differ.
    """
    changes: dict[str, Any] = {"checkpoint": replace(cfg.checkpoint, keep=99), "deterministic": True}
    last = 2
    if hasattr(cfg, "stages"):
        changes["stages"] = _short_stages(cfg, 2)
        last = 2 * len(cfg.stages)
    spec = _without_traces(cfg, **changes)
    differences, told = list[str](), ""
    with _thrown_away(run_dir) as (folder, remove):
        if _take(train, spec, folder / "whole", Attempt("verify", last=last, leaving=remove)):
            return 1
        state = PartialState()
        for step in sorted({1, last - 1}):
            again = folder / f"from_{step}"
            if not step_folder(folder / "whole" / "checkpoints", step + 1).exists():
                raise UserError(f"no step {step + 1} was saved: the run is shorter, or its loss is not finite")
            if state.is_main_process:
                shutil.copytree(step_folder(folder / "whole" / "checkpoints", step), step_folder(again / "checkpoints", step))
            state.wait_for_everyone()
            if _take(train, spec, again, Attempt("verify", last=step + 1, leaving=remove)):
                return 1
            if state.is_main_process:
                ends = [step_folder(run / "checkpoints", step + 1) for run in (folder / "whole", again)]
                found, count = compare_checkpoints(*ends)
                differences += [f"step {step + 1}: {line}" for line in found]
                told += f"saved and loaded after step {step}: step {step + 1} both ways, {count} tensors; "
    for line in differences:
        print(line)
    if state.is_main_process:
        verdict = f"{len(differences)} DIFFER: what a step does depends on something that no checkpoint holds"
        print(f"{cfg.name}: {told}{verdict if differences else 'bit-equal'}")
    return 1 if differences else 0


def compare_checkpoints(one: Path, other: Path) -> tuple[list[str], int]:
    """A line for each tensor and each entry of progress.json in which two checkpoints differ; how many tensors there are.

    The meter is let be: what is only logged is summed in another order by several processes.
    """
    for folder in (one, other):
        reason = verify_checkpoint(folder)
        if reason is not None:
            return [f"{folder.name}: {reason}"], 0
    found, count = list[str](), 0
    for name in sorted({path.stem for folder in (one, other) for path in folder.glob("*.safetensors")}):
        left, right = read_tensors(one, name, finite=False), read_tensors(other, name, finite=False)
        count += len(left)
        for key in sorted(left.keys() | right.keys()):
            if key not in left or key not in right or left[key].shape != right[key].shape:
                found.append(f"{name}: {key} is not in both")
            elif not torch.equal(left[key], right[key]):
                most = float((left[key].double() - right[key].double()).abs().max())
                found.append(f"{name}: {key} differs by up to {most:.3g}")
    left, right = read_json(one / "progress.json"), read_json(other / "progress.json")
    keys = sorted((left.keys() | right.keys()) - {"meter"})
    found += [f"progress.json: {key} differs" for key in keys if left.get(key) != right.get(key)]
    return found, count
