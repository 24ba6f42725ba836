"""What every training loop keeps besides its networks: where it goes on, what is due, the log, the checkpoint, the end."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..config import ENDLESS, Span, UserError, dump
from ..config.packages import is_installed
from ..data import ImageSet, PointSet
from ..data.names import class_remarks
from ..report.samples import find_samples
from ..runtime import checkpoint
from ..runtime.checkpoint import Documents, Tensors, keeps_best, step_folder
from ..runtime.failures import Outcome, warn_on_failure
from ..runtime.precision import explain_precision, has_bf16_units, recorded_precision
from ..runtime.processes import Heartbeats, broadcast
from ..runtime.stopping import StepGate, StopRequest
from ..runtime.stream import BatchPlan
from ..runtime.trackers import finish_trackers, for_each_tracker, log_images, start_trackers
from .clock import Cadence, Clock
from .config import TrainConfig
from .continuing import MARK, describe
from .cooldown import Cooldown
from .run_directory import RunDirectory, check_ranks
from .run_mode import RESTART, RunMode
from .state import Meter, TrainState
from .uploads import uploads_of

if TYPE_CHECKING:
    from accelerate import Accelerator


def cadences_of(cfg: TrainConfig, resolve: Callable[[int | Span], int], first_step: int, end: int) -> dict[str, Cadence]:
    """When log, preview, save, export, quality and snapshot are due in a stage from `first_step` to `end`."""
    steps = {word: resolve(length) if length is not None else None for word, length in cfg.cadences.items()}
    early = {"preview": range(first_step, end)}
    return {word: Cadence(word, every, early=early.get(word, range(0))) for word, every in steps.items()}


def remarks_on(cfg: TrainConfig, facts: dict[str, Any]) -> list[str]:
    """What a person has to know of the data before the run trains on it."""
    source = facts.get("source") or {}
    remarks = [*facts.get("remarks", ()), *(f"source: {remark}" for remark in source.get("remarks", ()))]
    return remarks + (class_remarks(facts["class_names"], facts["images"]) if cfg.uses_classes else [])


def left_out(facts: dict[str, Any]) -> str:
    """How many files of the data were left out, and why."""
    return ", ".join(f"{n} {reason}" for reason, n in facts["skipped"].items()) or "none"


class Session:
    """A run from its first line to its last. The script owns data, networks and what a step computes.

    `facts` is what travels with the weights. A session opens the run directory and, where that holds a checkpoint, puts
    `train_state` back to it: then `step` is its step and `progress` its progress.json. The loop is left after the step
    `stop_at`, as a kill would end it: only what is due is saved.
    """

    heart: Heartbeats | None = None

    def __init__(
        self,
        cfg: TrainConfig,
        accelerator: "Accelerator",
        run_dir: Path,
        train_state: TrainState,
        facts: dict[str, Any],
        total_steps: int,
        run_mode: RunMode,
        stop_at: int | None,
    ) -> None:
        self.cfg, self.accelerator, self.train_state, self.facts = cfg, accelerator, train_state, facts
        self.run_mode, self.stop_at = run_mode, ENDLESS if stop_at is None else stop_at
        check_ranks(facts)
        self.run = RunDirectory(run_dir, writes=accelerator.is_main_process, quiet=run_mode.quiet)
        run_mode.closing.push(self._give_up)
        self.step, self.progress, self._kept_precision = 0, {}, None
        self._resume(total_steps)
        if cfg.mixed_precision == "auto":  # data.json holds what it was for this run, on whichever machine it goes on
            self.facts = {**self.facts, "mixed_precision": self._kept_precision or accelerator.mixed_precision}
        self.best: dict[str, Any] | None = self.progress.get("best")

    def _resume(self, total_steps: int) -> None:
        resumed = broadcast(self.run.newest_checkpoint() if self.run.writes else None)
        if resumed is not None:
            if not resumed.is_dir():
                advice = ", or set bucket" if self.cfg.bucket is None else "; the bucket does not have it yet"
                raise UserError(
                    f"{resumed} is on the first machine and not on this one: put the run on a file system that all see{advice}"
                )
            self.run.hold_config(self.cfg, resumed)  # first: it names the key, where weights that do not fit name tensors
            self.progress = self.run.adopt_progress(resumed, self.facts, classes=self.cfg.uses_classes)
            self.step, self._kept_precision = self.progress["step"], recorded_precision(resumed)
            self.train_state.load(resumed)
        self.cooldown = Cooldown(self.cfg, total_steps, self.progress)
        self._origins: list[dict[str, Any]] = self.progress.get("continued", [])
        self.continued = bool(self._origins) and self._origins[-1]["step"] == self.step
        if self._origins:
            self.facts = {**self.facts, "continued": self._origins}
        if self.continued and self.step >= self.total_steps:
            raise UserError(
                f"{self._origins[-1]['run']} has {self.step} steps, and this config asks for {self.total_steps}: there is "
                "nothing to go on to; set more steps"
            )

    def _give_up(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Give the directory up, however the training ends; where it ends on an error, status.json says so."""
        if error is not None and self.run.has_begun:
            with suppress(OSError):  # of a disk that is full: the error itself says it
                self.run.write_status("failed", self.step, self.total_steps)
        if hasattr(self, "clock"):  # or it would go on to say how far the run is
            self.clock.close()
        self.run.close()

    def place(self, batch_plan: BatchPlan) -> BatchPlan:
        """The plan of a stage, moved to where its images stand in the stream of a run that went on from one with other batches
        or stages."""
        ahead = self._origins[-1]["images_ahead"] if self._origins else 0
        return batch_plan._replace(images_before=batch_plan.images_before + ahead)

    @property
    def total_steps(self) -> int:
        """The steps of the run, as far as is known: `stop` may make them less."""
        return self.cooldown.total

    @property
    def is_fresh(self) -> bool:
        """Whether nothing was done yet in this directory."""
        return self.step == 0 or self.continued

    @property
    def is_finished(self) -> bool:
        """Whether the run had come to its end before."""
        return self.step >= self.total_steps and checkpoint.verify_checkpoint(self.run.final) is None

    def begin(
        self,
        train_set: ImageSet | PointSet,
        held_out: ImageSet | PointSet | None,
        plans: Sequence[BatchPlan],
        warnings: Sequence[str],
    ) -> None:
        """Once the networks are prepared: open all that is written during the training, and say what will happen, with the
        `warnings`. `plans` are those of the stages from the one on in which the run is."""
        total_images = plans[-1].images_at(self.total_steps)
        accelerator, cfg, facts, run_mode = self.accelerator, self.cfg, self.facts, self.run_mode
        if accelerator.scaler is not None and "scaler" in self.progress:
            accelerator.scaler.load_state_dict(self.progress["scaler"])
        self.meter = Meter(accelerator, self.progress.get("meter"))
        stop = StopRequest(cfg.stop_signal, run_mode.on_kill)
        run_mode.closing.callback(stop.close)
        self.gate = StepGate(accelerator, stop, every_minutes=cfg.checkpoint.every_minutes, patience=cfg.max_nonfinite_steps)
        self.gate.saved_step = self.step if self.progress else None
        self.run.begin(self.step, cfg, facts, train_set, held_out)
        if self.run.writes:
            (self.run.path / MARK).unlink(missing_ok=True)
        if self.run.writes:
            run_mode.uploads = run_mode.uploads or uploads_of(cfg, self.run.path)
            for uploads in run_mode.uploads:
                uploads.say = self.run.say
                if self.step:  # this checkpoint may be here and not there
                    uploads.wake(self.step)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":  # over gloo the error itself says who is lost
            self.heart = Heartbeats(accelerator.process_index, accelerator.num_processes)
        start_trackers(accelerator, cfg.log.project, self.run.path, cfg, self.step, self.run.warn)
        run_mode.leave_phases()
        endless = self.total_steps == ENDLESS
        length = "without end" if endless else f"of {self.total_steps} = {total_images / facts['images']:.1f} epochs"
        length += f", with the cooldown from step {self.cooldown.start}" * (self.cooldown.start is not None and not endless)
        self.run.say(
            (f"{self.run.path} goes on {describe(self._origins[-1])}\n" if self.continued else "")
            + f"{cfg.name}: {facts['images']} images in {len(facts['class_names']) or 'no'} classes "
            f"({facts['held_out_images']} held out; left out: {left_out(facts)}), "
            f"{self.train_state.num_parameters / 1e6:.2f} M parameters\n"
            f"{'going on' if self.step else 'starting'} at step {self.step} {length}. "
            "Interrupt at will: the same command goes on"
        )
        for line in [*self._warnings(), *warnings]:
            self.run.say(f"warning: {line}")
        if cfg.mixed_precision == "auto":
            goes_on = self._kept_precision is not None
            self.run.say(explain_precision(facts["mixed_precision"], accelerator.device, cfg.dtype, goes_on=goes_on))
        for remark in remarks_on(cfg, facts):
            self.run.say(remark)
        shown, tell = accelerator.is_main_process and not run_mode.quiet, self._tell if run_mode.quiet else None
        self.clock = Clock(self.step, plans[0].images_at(self.step), None if endless else total_images, shown=shown, tell=tell)
        run_mode.clock, run_mode.facts, run_mode.train_state = self.clock, facts, self.train_state

    def _warnings(self) -> list[str]:
        """What of this machine a person may want to change: trackers that are not installed, bf16 without units for it."""
        accelerator, lines = self.accelerator, list[str]()
        if missing := [tracker for tracker in self.cfg.log.trackers if not is_installed(tracker)]:
            names, are = " and ".join(missing), "is" if len(missing) == 1 else "are"
            how = f"pip install {' '.join(missing)}"
            lines += [f"log.trackers asks for {names}, which {are} not installed: {how}; the run goes on without"]
        explicit = self.cfg.mixed_precision != "auto"
        if explicit and accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" and not has_bf16_units():
            slow = "this processor has no units for bf16, so float32 is faster here"
            lines += [f"{slow}: start a run with --set mixed_precision=no"]
        return lines

    def _tell(self, what: str, at_once: bool) -> None:
        self.run_mode.enter_phase(what if at_once else f"{self._stage}, {what}", at_once=at_once)

    def enter_stage(
        self,
        batch_plan: BatchPlan,
        resolve: Callable[[int | Span], int],
        *,
        end: int,
        name: str = "",
        key: str = "micro_batch_size",
    ) -> None:
        """Begin, or go on with, a stage up to step `end`, or the whole run: its batches, and what is due how often in it; `key`
        of the config sets its micro-batch."""
        self.batch_plan, self._end, self._stage = batch_plan, end, name.partition(":")[0] or "training"
        self._cadences = cadences_of(self.cfg, resolve, batch_plan.first_step, end)
        due = ", ".join(str(cadence) for cadence in self._cadences.values() if cadence.every is not None)
        plan = f"{batch_plan.world} x {self.accelerator.device.type} x {batch_plan.accumulation} x {batch_plan.micro}"
        self.run.say(f"{name}a step is {batch_plan.batch} images = {plan}\n{due} steps")
        self.run_mode.set_batch(batch_plan.batch, batch_plan.micro, key)
        if self.run_mode.quiet:
            count = min(end, self.stop_at) - self.step
            self._tell(f"{self._stage}, {count} step{'s' * (count != 1)}", True)

    # ------------------------------------------------------------------------------------------ in a step

    def take_finite_step(self) -> int | None:
        """The number of the last step, once, if its gradients were finite on all processes, so that its weights enter the EMA;
        else None. The answer has been on its way since `end_step`, so it is asked for as late as can be."""
        return self.gate.read()

    def end_step(self, finite: Tensor) -> None:
        """Count one more step; `finite` () bool on the device says whether its gradients were."""
        self.step += 1
        self.gate.send(self.step, finite)
        self.clock.tick(self.batch_plan.batch)
        if self.step == self.progress.get("step", 0) + 1:  # by now all that a person looks at first is there
            self.run.write_status("running", self.step, self.total_steps)
            self.run.report(now=True)
            if self.step == 1 or self.continued:
                first = [path for path in sorted(self.run.path.glob("*.png")) if path != self.run.loss_curves]
                self._track({f"first_images/{path.stem}": path for path in first}, self.step - 1, may_leave=False)

    # ------------------------------------------------------------------------------------------ now and then

    def is_anything_due(self) -> bool:
        """Whether there is more to do after this step than to take the next one."""
        if self.step >= min(self._end, self.stop_at) or self.step == self.cooldown.start:
            return True
        if any(cadence(self.step) for cadence in self._cadences.values()):
            return True
        return self.gate.save or self.gate.stop or self.gate.stop_is_local

    @property
    def _at_end(self) -> bool:
        return self.step >= self._end

    def is_due(self, word: str) -> bool:
        """Whether log, preview, held_out, quality, snapshot, save or export is due: all but the last at the end of a stage,
        too; held_out with each preview, and save where the cooldown begins."""
        cadence = self._cadences[word]
        if (word == "held_out" and self.is_due("preview")) or (word == "save" and self.step == self.cooldown.start):
            return True
        if word in ("quality", "snapshot", "export") and cadence.every is None:
            return False
        return cadence(self.step) or (self._at_end and word != "export")

    @property
    def decides(self) -> bool:
        """Whether the preview of this step may decide what is kept and where the run goes on. The early ones are only to be
        looked at, so that a run that began before there were any goes on as one that had them."""
        return self._at_end or any(self._cadences[word].regular(self.step) for word in ("preview", "held_out"))

    @property
    def should_stop(self) -> bool:
        """Whether the loop is to be left before its end."""
        return self.step >= self.stop_at or (self.gate.stop and self.step < self.total_steps)

    def collect_log(self, **values: Any) -> dict[str, float]:
        """The losses' means since the last line of the log, these values and the speed, where a line is due."""
        if not self.is_due("log"):
            return {}
        numbers = {name: float(value) for name, value in values.items()}
        return self.meter.read() | numbers | self.clock.read(self.facts["images"])

    def note_if_best(self, name: str, value: float, measured: str = "") -> bool:
        """Remember `value` if it is the lowest of this name so far, of those that were `measured` in the same way; gives
        whether it is."""
        known = self.best if self.best is not None and self.best.get("measured", "") == measured else {}
        if not value < known.get(name, float("inf")):  # nor is NaN
            return False
        self.best = {"step": self.step, name: value, "measured": measured, "kept": keeps_best(self.cfg)}
        return True

    def note_best(self, values: dict[str, float]) -> bool:
        """Remember this step if it is the best so far: by the distance of samples where that is measured, else by the loss on
        held-out images. Gives whether its checkpoint is to be kept."""
        name, measured, quality = "held_out_loss", "", self.cfg.quality
        if quality is not None:
            name, measured = "frechet_distance", f"{quality.num_samples} samples in {quality.features}"
        elif not self.decides:
            return False
        return name in values and self.note_if_best(name, values[name], measured) and keeps_best(self.cfg)

    def watch(self, held_out_loss: float) -> None:
        """Where `stop` asks for this measurement, begin the cooldown if the loss is no longer falling: on all ranks, since the
        first one's value decides."""
        if self._cadences["held_out"].regular(self.step) and (why := self.cooldown.watch(self.step, broadcast(held_out_loss))):
            self._end = self.total_steps
            self.clock.set_total(self.batch_plan.images_at(self.total_steps))
            self.run.say(why)

    def drawing(self, what: str) -> AbstractContextManager[Outcome]:
        """Around the drawing of `what`, which is only to be looked at: where it fails, the run says so and goes on."""
        return warn_on_failure(what, self.run.warn)

    def report(self, values: dict[str, float]) -> None:
        """A line of metrics.jsonl, of the trackers, and for the person; after a preview, and now and then, the report."""
        if values:
            self.run.log(self.step, values)
            for_each_tracker(self.accelerator, self.run.warn, lambda: self.accelerator.log(values, step=self.step))
            self.run.say_progress(self.clock, self.step, self.total_steps, values)
        if self.is_due("preview"):
            sheets = find_samples(self.run.samples).get(self.step, {})
            self._track({f"preview/{name}".rstrip("/"): path for name, path in sheets.items()}, self.step)
        self.run.report(now=self.is_due("preview"))
        self.clock.leave()

    def _track(self, images: dict[str, Path], step: int, *, may_leave: bool = True) -> None:
        """Show image files of the run, {name: file}, in its trackers; those that may not leave this machine not in wandb."""
        if self.accelerator.trackers:
            log_images(self.accelerator, images, step, self.run.warn, may_leave=may_leave)

    def save(self, *, keep: bool = False, **more_progress: Any) -> bool:
        """Write a checkpoint where one is due or to `keep`, or where a stop or the clock asks for it; gives whether it did.
        `more_progress` goes into its progress.json. Before it, write the snapshot for post-hoc averages, where that is due."""
        if self.is_due("snapshot"):
            averages, images = self.train_state.averages(keep=self.run.writes), self.batch_plan.images_at(self.step)
            self._write(step_folder(self.run.path / "ema", self.step), averages, images=images)
        is_wanted = keep or self.is_due("save") or self.gate.save or self.gate.stop
        if not is_wanted or self.gate.skipped_in_a_row:  # a run gone bad must not rotate out good ones
            return False
        self.clock.enter("saving a checkpoint")
        state = {"step": self.step, "meter": self.meter.saved(), "best": self.best, "skipped_in_a_row": 0, **more_progress}
        state |= self.cooldown.to_save(self.step)
        if self._origins:
            state["continued"] = self._origins
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        tensors = self.train_state.tensors(keep=self.run.writes)
        if self.run.writes:
            pinned = {step for uploads in self.run_mode.uploads for step in uploads.pinned}
            self.run.save(tensors, self._documents(state), self.cfg.checkpoint, pinned)
            for uploads in self.run_mode.uploads:
                uploads.wake(self.step)
        self.gate.saved(self.step)
        self.clock.leave()
        return True

    def _documents(self, progress: dict[str, Any]) -> dict[str, Any]:
        return {"progress": progress, "config": dump(self.cfg), "data": self.facts}

    def _write(self, folder: Path, tensors: Tensors, documents: Documents | None = None, **progress: Any) -> None:
        if self.run.writes:
            documents = {**self._documents({"step": self.step, **progress}), **(documents or {})}
            checkpoint.write_folder(folder, tensors, documents)

    def export(self, folder: Path, name: str) -> None:
        """The EMA weights of now, with their config, as one `.pt` file."""
        weights = self.train_state.weights(keep=self.run.writes)
        if self.run.writes:
            checkpoint.export(folder / name, weights, dump(self.cfg), self.facts, self.step)

    # ------------------------------------------------------------------------------------------ the end

    def end_stopped(self) -> int:
        """The last words of a run that is left before its end: 1 where a stop was asked for, 0 where `stop_at` is reached."""
        place, saved = f"stopped at step {self.step}", self.gate.saved_step
        why = "whose gradients were not finite, so it was not saved" if self.gate.stop else "as it was asked to"
        message = f"{place}, {why}; there is no checkpoint yet: the same command starts anew"
        if saved == self.step:
            message = f"{place} and saved; to go on, run the same command again"
        elif saved is not None:
            message = f"{place}, {why}; the last checkpoint is of step {saved}, from which the same command goes on"
        self._close("stopped", message)
        return 1 if self.gate.stop else 0

    def write_final(self, *, files: tuple[Tensors, Documents] = ({}, {}), **progress: Any) -> None:
        """Leave `final/` (`progress` beside the step, and more `files`): before anything that is only to be looked at."""
        weights = self.train_state.weights(keep=self.run.writes)
        self._write(self.run.final, {"ema": weights, **files[0]}, files[1], **progress)

    def end_finished(self, message: str, curves: dict[str, list[str]]) -> int:
        """Leave loss.png with panels of `curves`, and a last word; `final/` is there."""
        if self.run.writes:
            self.run.draw_curves(curves)
            points = sorted((self.run.path / "points").glob("*.png"))
            charts = {"loss": self.run.loss_curves, **{f"points/{path.stem}": path for path in points}}
            self._track({f"charts/{name}": path for name, path in charts.items()}, self.step)
        self._close("finished", message)
        return 0

    def roll_back(self, step: int | None, **progress: Any) -> int:
        """Make the checkpoint of `step`, with this in its progress, the newest, and give everything up; gives RESTART, or 1
        where a stop was asked for."""
        if self.run.writes and step is not None:
            gone_to = checkpoint.roll_back(self.run.checkpoints, step, progress)
            for uploads in self.run_mode.uploads:
                uploads.wake(gone_to, went_back=True)
                uploads.say = print  # until the run is open again
        if self.gate.stop:
            self.run.say("stopped after going back; to go on, run the same command again")
        self._close()
        return 1 if self.gate.stop else RESTART

    def _close(self, state: str | None = None, message: str = "") -> None:
        """Give everything up, in processes that may train again; of a run that ends, in this `state` and with this message."""
        self.clock.close()
        if self.heart is not None:
            self.heart.close()
        if state is not None:
            self.run.write_status(state, self.step, self.total_steps)
            self.run.say(message)
            self.run.report(now=True)
        self.run.close()
        finish_trackers(self.accelerator, self.run.warn)
        self.accelerator.free_memory()
        self.accelerator.wait_for_everyone()
