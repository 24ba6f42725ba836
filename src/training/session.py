"""What every training loop keeps besides its networks: where it goes on, what is due, the log, the checkpoint, the end."""

from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from torch import Tensor

from ..config import ENDLESS, Span, UserError, dump
from ..config.packages import is_installed
from ..data import ImageSet, PointSet
from ..data.names import class_remarks
from ..runtime import checkpoint
from ..runtime.checkpoint import Documents, Tensors, keeps_best, step_folder
from ..runtime.failures import Outcome, finish_trackers, for_each_tracker, warn_on_failure
from ..runtime.launch import has_bf16_units, start_trackers
from ..runtime.processes import Heartbeats, broadcast
from ..runtime.stopping import StepGate, StopRequest
from ..runtime.stream import BatchPlan
from .clock import Cadence, Clock
from .continuing import MARK, describe
from .run import RunDirectory, check_ranks, uses_classes
from .state import Meter, TrainState
from .trials import LOOKS, RESTART, Attempt
from .uploads import Uploads


class Session:
    """A run from its first line to its last. The script owns data, networks and what a step computes.

    `cfg` is a training config, `facts` what travels with the weights. Opens the run directory and, where it holds a
    checkpoint, puts `trained` back to it: then `step` is its step and `progress` its progress.json.
    """

    split: BatchPlan
    meter: Meter
    gate: StepGate
    clock: Clock
    heart: Heartbeats | None = None

    def __init__(
        self,
        cfg: Any,
        accelerator: Accelerator,
        run_dir: Path,
        trained: TrainState,
        facts: dict[str, Any],
        *,
        total_steps: int,
        attempt: Attempt,
    ) -> None:
        self.cfg, self.accelerator, self.trained, self.facts = cfg, accelerator, trained, facts
        self.total_steps, self.attempt = total_steps, attempt
        check_ranks(facts)
        self.run = RunDirectory(run_dir, writes=accelerator.is_main_process, quiet=attempt.trial)
        self._begun = False
        attempt.held.push(self._give_up)
        self.step, self.progress = 0, {}
        self._resume()
        self.best: dict[str, Any] | None = self.progress.get("best")
        self._cadences: dict[str, Cadence] = {}
        self._began, self._first, self._end = self.step, 0, total_steps

    def _resume(self) -> None:
        resumed = broadcast(self.run.newest_checkpoint() if self.run.writes else None)
        if resumed is not None:
            if not resumed.is_dir():
                more = ", or set bucket" if self.cfg.bucket is None else "; the bucket does not have it yet"
                raise UserError(
                    f"{resumed} is on the first machine and not on this one: put the run on a file system that all see{more}"
                )
            self.run.hold_config(self.cfg, resumed)  # first: it names the key, where weights that do not fit name tensors
            self.progress = self.run.adopt_progress(resumed, self.facts, classes=uses_classes(self.cfg))
            self.step = self.progress["step"]
            self.trained.load(resumed)
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
        """However the training ends, the directory is given up; where it ends on an error, its status says so."""
        if error is not None and self._begun and self.run.is_open and not self.attempt.trial:
            with suppress(OSError):  # of a disk that is full: the error itself says it
                self.run.write_status("failed", self.step, self.total_steps)
        if hasattr(self, "clock"):  # or it would go on to say how far the run is
            self.clock.close()
        self.run.close()

    def place(self, split: BatchPlan) -> BatchPlan:
        """Where the images of a stage stand in the stream of a run that went on from one with other batches or stages."""
        ahead = self._origins[-1]["images_ahead"] if self._origins else 0
        return split._replace(images_before=split.images_before + ahead)

    @property
    def fresh(self) -> bool:
        """Whether nothing was done yet in this directory."""
        return self.step == 0 or self.continued

    @property
    def finished(self) -> bool:
        """Whether the run had come to its end before."""
        return self.step >= self.total_steps and checkpoint.verify_checkpoint(self.run.final) is None

    def begin(
        self,
        train_set: ImageSet | PointSet,
        held_out: ImageSet | PointSet | None,
        *,
        total_images: int,
        images: int,
    ) -> None:
        """Once the networks are prepared: say what will happen and open all that is written while it does. Of
        `total_images`, `images` are behind."""
        accelerator, cfg = self.accelerator, self.cfg
        if accelerator.scaler is not None and "scaler" in self.progress:
            accelerator.scaler.load_state_dict(self.progress["scaler"])
        self.meter = Meter(accelerator, self.progress.get("meter"))
        minutes = cfg.checkpoint.every_minutes
        stop = StopRequest(cfg.stop_signal, self.attempt.leaving)
        self.attempt.held.callback(stop.close)
        self.gate = StepGate(accelerator, stop, every_minutes=minutes, patience=cfg.max_nonfinite_steps)
        self.gate.skipped_in_a_row = self.progress.get("skipped_in_a_row", 0)
        self.gate.saved_step = self.step if self.progress else None
        self.run.begin(self.step, cfg, self.facts, train_set, held_out)
        self._begun = True
        if self.run.writes:
            (self.run.path / MARK).unlink(missing_ok=True)
        if self.continued:
            self.run.say(f"{self.run.path} goes on {describe(self._origins[-1])}")
        if cfg.bucket is not None and self.run.writes:
            self.attempt.uploads = self.attempt.uploads or Uploads(cfg.bucket, self.run.path, cfg.checkpoint.keep)
            self.attempt.uploads.say = self.run.say
            if self.step:  # it may have been saved here and not have arrived there
                self.attempt.uploads.wake(self.step)
        if accelerator.num_processes > 1 and accelerator.device.type == "cuda":  # over gloo the error itself says who is lost
            self.heart = Heartbeats(accelerator.process_index, accelerator.num_processes)
        if missing := [tracker for tracker in cfg.log.trackers if not is_installed(tracker)]:
            names, are = " and ".join(missing), "is" if len(missing) == 1 else "are"
            how = f"pip install {' '.join(missing)}"
            self.run.say(f"warning: log.trackers asks for {names}, which {are} not installed: {how}; the run goes on without")
        start_trackers(accelerator, cfg.log.project, self.run.path, cfg, self.step, self.run.warn)
        facts = self.facts
        self.attempt.images, self.attempt.parameters = facts["images"], self.trained.num_parameters
        endless, epochs = self.total_steps == ENDLESS, total_images / facts["images"]
        skipped = ", ".join(f"{n} {reason}" for reason, n in facts["skipped"].items()) or "none"
        self.run.say(
            f"{cfg.name}: {facts['images']} pictures in {len(facts['class_names']) or 'no'} classes "
            f"({facts['held_out_images']} held out; left out: {skipped}), {self.trained.num_parameters / 1e6:.2f} M "
            "parameters\n"
            f"{f'going on at step {self.step}' if self.step else 'starting at step 0'} "
            f"{'without end' if endless else f'of {self.total_steps} = {epochs:.1f} epochs'}. "
            "Interrupt at will: the same command goes on"
        )
        slow = accelerator.device.type == "cpu" and accelerator.mixed_precision == "bf16" and not has_bf16_units()
        if slow:
            line = "this processor has no units for bf16, so float32 is faster here: start a run with --set mixed_precision=no"
            self.attempt.warnings = [*self.attempt.warnings, line]
        for line in self.attempt.warnings:
            self.run.say(f"warning: {line}")
        self.attempt.leave_phases()
        remarks = self._remarks()
        for remark in remarks:
            self.run.say(remark)
        self.attempt.remarks = [*([f"left out: {skipped}"] if facts["skipped"] else []), *remarks]
        self.clock = Clock(
            self.step, images, None if endless else total_images, shown=accelerator.is_main_process and not self.attempt.trial
        )

    def _remarks(self) -> list[str]:
        """What a person has to know of the data before it is trained on."""
        source = self.facts.get("source") or {}
        remarks = [*self.facts.get("remarks", ()), *(f"source: {remark}" for remark in source.get("remarks", ()))]
        if uses_classes(self.cfg):
            remarks += class_remarks(self.facts["class_names"], self.facts["images"])
        return remarks

    def enter(
        self,
        split: BatchPlan,
        resolve: Callable[[int | Span], int],
        *,
        end: int,
        name: str = "",
        key: str = "micro_batch_size",
    ) -> None:
        """A stage up to step `end`, or the whole run: its batches, and what is due how often in it; `key` of the config sets
        its micro-batch."""
        cfg, self.split, self._end = self.cfg, split, end
        self._first = max(split.first_step, self.step)
        lengths = {"log": cfg.log.every, "preview": cfg.preview.every, "save": cfg.checkpoint.every}
        lengths["export"] = getattr(cfg, "export_every", None)
        quality = getattr(cfg.preview, "quality", None)
        lengths["quality"] = quality.every if quality is not None else None
        lengths["snapshot"] = cfg.ema.snapshot_every
        self._cadences = {
            word: Cadence(
                word,
                resolve(length) if length is not None else None,
                early=range(split.first_step, end if word == "preview" else split.first_step),
            )
            for word, length in lengths.items()
        }
        told = ", ".join(str(due) for due in self._cadences.values() if due.every is not None)
        here = f"{split.world} x {self.accelerator.device.type} x {split.accumulation} x {split.micro}"
        self.run.say(f"{name}a step is {split.batch} images = {here}\n{told} steps")
        self.attempt.enter(name.partition(":")[0], split, end - self._first, self._cadences, key, self._first)

    # ------------------------------------------------------------------------------------------ in a step

    def settle(self) -> None:
        """By now it is known whether the step before was finite: then its weights enter the EMA."""
        counted = self.gate.read()
        if counted is not None:
            self.trained.ema.update(self.trained.network, self.split.images_at(counted), self.split.batch)

    def count(self, finite: Tensor) -> None:
        """One more step is done; `finite` () bool on the device: its gradients were."""
        self.step += 1
        self.gate.send(self.step, finite)
        self.clock.tick(self.split.batch)
        if self.step == self._began + 1 and not self.attempt.trial:  # by now all that a person looks at first is there
            self.run.write_status("running", self.step, self.total_steps)
            self.run.report(now=True)
        self.attempt.counted(self.step - self._first, self.accelerator.device)

    # ------------------------------------------------------------------------------------------ now and then

    @property
    def due(self) -> bool:
        """Whether anything is: then the device is waited for."""
        if self.attempt.trial:
            device = self.accelerator.device
            some = self.attempt.due(self.step - self._first, asked=self.gate.save, device=device) or self.gate.stop
        else:
            some = self._ending or self.gate.stop or self.gate.save or any(due(self.step) for due in self._cadences.values())
        if some or self.gate.stop_is_local:
            self.settle()
        return some or self.gate.stop

    @property
    def _ending(self) -> bool:
        return self.step >= self._end

    def now(self, word: str) -> bool:
        """Whether log, preview, quality, snapshot, save or export is due: all but the last at the end of a stage, too."""
        due = self._cadences[word]
        if word in ("quality", "snapshot") and due.every is None:
            return False
        if self.attempt.trial:
            return not self.gate.stop and self.attempt.wants(word)
        now = due(self.step) or (self._ending and word != "export")
        if now and word in LOOKS:
            self.clock.enter(LOOKS[word])
        return now

    @property
    def decides(self) -> bool:
        """Whether a preview of now may decide what is kept and where the run goes on. The early ones are only to be looked
        at, so that a run that began before there were any goes on as one that had them."""
        return self.attempt.trial or self._ending or self._cadences["preview"].regular(self.step)

    def logged(self, **values: Any) -> dict[str, float]:
        """The losses' means, these values and the speed, where a line is due."""
        if not self.now("log"):
            return {}
        told = {name: float(value) for name, value in values.items()}
        return self.meter.read() | told | self.clock.read(self.facts["images"])

    def better(self, name: str, value: float, measured: str = "") -> bool:
        """Whether `value` is the lowest of this name so far, of those that were `measured` in the same way; it is then
        remembered."""
        known = self.best if self.best is not None and self.best.get("measured", "") == measured else {}
        if not value < known.get(name, float("inf")):  # nor is NaN
            return False
        self.best = {"step": self.step, name: value, "measured": measured, "kept": keeps_best(self.cfg)}
        return True

    def best_of(self, values: dict[str, float]) -> bool:
        """Whether the checkpoint of now is the best so far and to be kept: by the distance of samples where that is measured,
        else by the loss on held-out pictures."""
        quality = self.cfg.preview.quality
        name, measured = "held_out_loss", ""
        if quality is not None:
            name, measured = "frechet_distance", f"{quality.num_samples} samples in {quality.features}"
        if quality is None and not self.decides:
            return False
        return name in values and self.better(name, values[name], measured) and keeps_best(self.cfg)

    def look(self, what: str) -> AbstractContextManager[Outcome]:
        """Around the drawing of `what`, which is only to be looked at: where it fails, the run says so and goes on."""
        return warn_on_failure(what, self.run.warn)

    def report(self, values: dict[str, float]) -> None:
        """A line of metrics.jsonl, of the trackers, and for the person; after a preview, and now and then, the report."""
        if values:
            self.run.log(self.step, values)
            for_each_tracker(self.accelerator, self.run.warn, lambda: self.accelerator.log(values, step=self.step))
            self.run.say_progress(self.clock, self.step, self.total_steps, values)
        self.run.report(now=self.now("preview"))

    def save(self, *, keep: bool = False, **more: Any) -> bool:
        """A checkpoint, where one is due, or a stop or the clock asks for it; `more` goes into its progress. Before it what
        post-hoc averages are made of, where that is due."""
        if self.now("snapshot"):
            self._snapshot()
        if not (keep or self.now("save") or self.gate.save or self.gate.stop) or (self.attempt.trial and self.gate.stop):
            return False
        self.clock.enter("saving a checkpoint")
        with self.attempt.saving(step_folder(self.run.checkpoints, self.step), self.run.samples):
            return self._save(more)

    def leaves(self) -> bool:
        """Whether the loop is left before its end. A trial leaves each stage once it has seen enough of it."""
        if not self.attempt.trial:
            return self.gate.stop and self.step < self.total_steps
        self.step = self.attempt.next_step(self.step, self._end)
        return self.gate.stop or self.step >= min(self.total_steps, self.attempt.last)

    def _save(self, more: dict[str, Any]) -> bool:
        if self.gate.skipped_in_a_row:  # a run gone bad must not rotate out good ones
            return False
        state = {"step": self.step, "meter": self.meter.saved(), "best": self.best, "skipped_in_a_row": 0, **more}
        if self._origins:
            state["continued"] = self._origins
        if self.accelerator.scaler is not None:
            state["scaler"] = self.accelerator.scaler.state_dict()
        tensors = self.trained.tensors(keep=self.run.writes)
        if self.run.writes:
            uploads = self.attempt.uploads
            pinned = uploads.pinned if uploads is not None else set[int]()
            self.run.save(tensors, self.documents(state), self.cfg.checkpoint, pinned)
            if uploads is not None:
                uploads.wake(self.step)
        self.gate.saved(self.step)
        return True

    def _snapshot(self) -> None:
        averages = self.trained.averages(keep=self.run.writes)
        if self.run.writes:
            progress = {"step": self.step, "images": self.split.images_at(self.step)}
            checkpoint.write_folder(step_folder(self.run.path / "ema", self.step), averages, self.documents(progress))

    def documents(self, progress: dict[str, Any]) -> dict[str, Any]:
        return {"progress": progress, "config": dump(self.cfg), "data": self.facts}

    def export(self, folder: Path, name: str) -> None:
        """The EMA weights of now, with their config, as one `.pt` file."""
        weights = self.trained.weights(keep=self.run.writes)
        if self.run.writes:
            checkpoint.export(folder / name, weights, dump(self.cfg), self.facts, self.step)

    # ------------------------------------------------------------------------------------------ the end

    def end_stopped(self) -> int:
        if self.attempt.trial:
            self._leave()
            return 1 if self.gate.stop else 0
        saved = self.gate.saved_step
        if saved == self.step:
            message = f"stopped at step {self.step} and saved; to go on, run the same command again"
        else:  # a step whose gradients are not finite is not saved
            there = f"the last checkpoint is of step {saved}" if saved is not None else "there is no checkpoint yet"
            message = f"stopped at step {self.step}, whose gradients were not finite, so it was not saved; {there}"
            message += ", from which the same command goes on" if saved is not None else ": the same command starts anew"
        return self._end_run("stopped", message, 1)

    def write_final(self, *, progress: dict[str, Any] | None = None, more: tuple[Tensors, Documents] = ({}, {})) -> None:
        """Leave `final/` (`progress` beside the step, and `more` files): before anything that is only to be looked at."""
        weights = self.trained.weights(keep=self.run.writes)
        if self.run.writes:
            documents = {**self.documents({"step": self.step, **(progress or {})}), **more[1]}
            checkpoint.write_folder(self.run.final, {"ema": weights, **more[0]}, documents)

    def end_finished(self, message: str, curves: dict[str, list[str]]) -> int:
        """Leave loss.png with panels of `curves`, and a last word; `final/` is there."""
        if self.run.writes:
            self.run.draw_curves(curves)
        return self._end_run("finished", message, 0)

    def roll_back(self, step: int | None, **progress: Any) -> int:
        """Make the checkpoint of `step`, with this in its progress, the newest, and give everything up; gives AGAIN, or 1 where
        a stop was asked for."""
        if self.run.writes and step is not None:
            gone_to = checkpoint.roll_back(self.run.checkpoints, step, progress)
            if self.attempt.uploads is not None:
                self.attempt.uploads.wake(gone_to, went_back=True)
                self.attempt.uploads.say = print  # until the run is open again
        if self.gate.stop:
            self.run.say("stopped after going back; to go on, run the same command again")
        self._leave()
        return 1 if self.gate.stop else RESTART

    def _leave(self) -> None:
        """Give everything up, in a process that goes on."""
        self.clock.close()
        self._rest()
        self.run.close()
        finish_trackers(self.accelerator, self.run.warn)
        self.accelerator.free_memory()
        self.accelerator.wait_for_everyone()

    def _rest(self) -> None:
        if self.heart is not None:
            self.heart.close()

    def _end_run(self, state: str, message: str, status: int) -> int:
        self.clock.close()
        self._rest()
        self.run.finish(state, self.step, self.total_steps, message)
        finish_trackers(self.accelerator, self.run.warn)
        self.accelerator.end_training()
        return status
