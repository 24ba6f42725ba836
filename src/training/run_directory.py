"""A run directory: who owns it, what it says, where it goes on."""

import json
import math
import os
import re
import socket
import time
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from .. import figures
from ..config import ENDLESS, UserError, differences, dump, prefix_errors, progress, read_json, validate
from ..data import ImageSet, PointSet
from ..data.facts import skipped_files
from ..data.formats import READ_BEFORE
from ..data.latents import describe_differences, same_latents
from ..data.names import join_names, normal_form, same_names
from ..report.report import Reporter
from ..report.run_files import read_lines
from ..runtime.checkpoint import CheckpointConfig, Tensors, newest, retain, set_aside, spared_steps, step_folder, write_folder
from ..runtime.failures import warn_on_failure
from ..runtime.precision import recorded_precision
from ..storage.locks import take_lock
from .changed_config import at, in_cooldown, ways_on
from .clock import Clock
from .config import TrainConfig


def check_ranks(facts: dict[str, Any]) -> None:
    """A UserError on every rank where one of them sees other images or classes than the first: another copy of the data, or
    another file system."""
    from accelerate.utils import gather_object

    compared = [facts["fingerprint"], facts["class_names"], facts["counts"], at(facts, "source.fingerprint")]
    (first, count), *others = gather_object([(compared, facts["images"])])
    for rank, (compared, images) in enumerate(others, 1):
        if compared != first:
            what = "classes" if compared[1] != first[1] else "images"
            how = classes_differ(first[1], compared[1]) if what == "classes" else f"{count} images on rank 0, {images} there"
            raise UserError(
                f"rank {rank} sees other {what} of the data than rank 0 ({how}); put the data where all machines see the same, "
                "or copy it anew"
            )


def classes_differ(before: Sequence[str], now: Sequence[str]) -> str:
    """In words, how two lists of classes differ, or nothing where they are the same."""
    if same_names(before, now):
        return ""
    gone = [name for name in before if normal_form(name) not in map(normal_form, now)]
    new = [name for name in now if normal_form(name) not in map(normal_form, before)]
    parts = [f"{join_names(names)} {word}" for names, word in ((gone, "missing"), (new, "new")) if names]
    return ", ".join(parts) or f"the same ones in another order: {join_names(now, 10)}, where it was {join_names(before, 10)}"


def _other_endings(before: dict[str, Any], now: dict[str, Any]) -> str:
    """A hint for a run whose folder holds other images than it was started with: which files were not read before."""
    old = before.get("endings") or {}
    counts = {ending: count - old.get(ending, 0) for ending, count in now["endings"].items() if ending not in READ_BEFORE}
    words = ", ".join(f"{count} {ending}" for ending, count in counts.items() if count > 0)
    advice = "files are among them, which were not read when the run was started: move them out of the folder to go on"
    return f"; {words} {advice}" if words else ""


def append_metrics(folder: Path, step: int, values: dict[str, float]) -> None:
    """One line more for metrics.jsonl in `folder`; what is not finite is null there."""
    finite = {name: value if math.isfinite(value) else None for name, value in values.items()}
    with open(folder / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write(json.dumps({"step": step, **finite}) + "\n")


def changes(
    settings: TrainConfig, before: dict[str, Any], progress: Mapping[str, Any] | None = None
) -> tuple[list[str], list[str]]:
    """The keys that are not as in the config `before`, with which a run was started: harmless ones, and those with which it
    cannot go on. `before` may be of an older version: its old names are translated, and keys that it lacks have their defaults.
    `progress` is that of the run's checkpoint: until the cooldown begins, where the run ends changes no step that was taken.

    A UserError where today's version cannot read it.
    """
    with prefix_errors("this version cannot read the config that the run was started with"):
        before = dump(validate(type(settings), before, origin="its config"))
    new, lengths = dump(settings), list[str]()
    harmless, other = differences(type(settings), before, new)
    kinds = {settings.optimizer.schedule.kind, at(before, "optimizer.schedule.kind")}
    if kinds <= {"constant", "wsd"} and not in_cooldown(progress or {}):  # both are the same rate until the cooldown
        of_cooldown = [f"optimizer.schedule.{key}" for key in ("kind", "cooldown", "curve", "floor")]
        lengths = [key for key in other if key.split(".")[0] == "steps" or (key in of_cooldown and "stages" not in new)]
    if len(new.get("stages", ())) > len(before.get("stages", ())):
        lengths = ["stages"]  # more of them, after those that there were
    return [*harmless, *(key for key in other if key in lengths)], [key for key in other if key not in lengths]


class RunDirectory:
    """runs/NAME. `writes` is False on all ranks but the first: then it says and writes nothing. `quiet`, it says nothing.
    `has_begun` is set by `begin` where it writes, until `close`."""

    def __init__(self, path: Path, *, writes: bool, quiet: bool = False) -> None:
        self.path, self.writes, self._quiet, self._warned = path, writes, quiet, set[str]()
        self.checkpoints, self.samples, self.final = path / "checkpoints", path / "samples", path / "final"
        self.loss_curves = path / "loss.png"
        self._lock: IO[str] | None = None
        self._log: IO[str] | None = None
        self.has_begun = False
        self._reporter = Reporter(path, self.say) if writes and not quiet else None
        if writes:
            self._claim()
            self._log = open(path / "log.txt", "a", encoding="utf-8")  # noqa: SIM115

    def _claim(self) -> None:
        """Refuse a directory that a live process is writing. The kernel drops the claim when the process dies."""
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            self._lock = open(self.path / ".lock", "a+", encoding="utf-8")  # noqa: SIM115
        except OSError as error:
            raise UserError(f"the run directory {self.path} cannot be written: {error}") from None
        reason = ""
        try:
            if not take_lock(self._lock):
                self._lock.seek(0)
                owner = self._lock.read().strip() or "another process"
                reason = f"is in use by {owner}; wait for it, stop it, or give another --run-dir"
        except OSError as error:
            reason = f"cannot be locked ({error.strerror}), so two launches could write it; give a --run-dir on another disk"
        if reason:
            self.close()
            raise UserError(f"the run directory {self.path} {reason}")
        self._lock.truncate(0)
        self._lock.write(f"process {os.getpid()} on {socket.gethostname()}")
        self._lock.flush()

    def _note(self, message: str) -> None:
        if self._log is not None:
            with suppress(OSError):  # of a full disk: what is said is on the screen
                self._log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {message}\n")
                self._log.flush()

    def say(self, message: str) -> None:
        """A line for the person and for log.txt."""
        if self._log is not None:
            if not self._quiet:
                progress.say(message)
            self._note(message)

    def warn(self, what: str, reason: str) -> None:
        """Say once of each `what` that is only to be looked at that it failed: in a trial and after the end, too."""
        if self.writes and what not in self._warned:
            self._warned.add(what)
            message = f"warning: {what} failed ({reason}); the run goes on, and says this once"
            progress.say(message)
            self._note(message)

    def _write(self, name: str, text: str) -> None:
        if self.writes:
            staged = self.path / f".{name}.part"
            staged.write_text(text, encoding="utf-8")
            staged.replace(self.path / name)

    def _write_json(self, name: str, document: Any) -> None:
        self._write(name, json.dumps(document, indent=1) + "\n")

    def write_status(self, state: str, step: int, steps: int) -> None:
        """status.json: running, stopped, failed or finished, and how far."""
        place = {"step": step, "steps": steps if steps < ENDLESS else None}
        self._write_json("status.json", {"state": state, **place, "pid": os.getpid(), "time": round(time.time(), 1)})

    def _other_run(self, reason: str, advice: str, hint: str = "") -> UserError:
        return UserError(f"{self.path} was {reason}; {advice}, or give another --run-dir{hint}")

    def adopt_progress(self, resumed: Path, facts: dict[str, Any], *, classes: bool = True) -> dict[str, Any]:
        """progress.json of the checkpoint that the run goes on from. A UserError for other images than it was trained on and,
        where `classes` matter, for other classes."""
        before = read_json(resumed / "data.json")
        if at(before, "source.fingerprint") != at(facts, "source.fingerprint"):
            raise self._other_run("started from another source", "bring it back")
        if before.get("pairs") != facts.get("pairs"):
            raise self._other_run("trained on other pairs", "give the same `pairs`")
        named = classes_differ(before["class_names"], facts["class_names"])
        if before["fingerprint"] != facts["fingerprint"]:
            endings, also = _other_endings(before, facts), ""
            if named:
                also = f"; its classes differ, too: {named}"
            elif list(before["class_names"]) != list(facts["class_names"]):
                also = "; some names of classes are in another Unicode form, as a Mac writes them: give them their old names"
            elif before["images"] == facts["images"] and not endings:
                also = "; there are as many as before, so names or sizes in bytes have changed"
            counts = f"{before['images']} other images (now {facts['images']})"
            raise self._other_run(f"trained on {counts}", "bring them back", endings + also)
        if named and classes:
            raise self._other_run(f"trained on other classes ({named})", "give the data its old ones")
        if not same_latents(before.get("latents"), facts.get("latents")):
            reasons = describe_differences(before.get("latents") or {}, facts.get("latents") or {})
            reason = " and ".join(reasons) or "another cache, made anew"
            raise self._other_run(f"trained on latents of {reason}", "give it those")
        return read_json(resumed / "progress.json")

    def hold_config(self, settings: TrainConfig, resumed: Path) -> None:
        """Compare the config of a run that goes on with the one that it was started with. Harmless changes are said; any other
        is a UserError that names the keys."""
        before = read_json(resumed / "config.json")
        recorded = recorded_precision(resumed)  # None: auto, and nothing is decided yet
        if recorded is None or settings.mixed_precision in ("auto", recorded):  # the run keeps what it was begun with
            before["mixed_precision"] = settings.mixed_precision
        harmless, other = changes(settings, before, read_json(resumed / "progress.json"))
        if other:
            ways = ways_on(self.path, before, dump(settings), other, read_json(resumed / "progress.json"))
            raise self._other_run(f"started with another {', '.join(other)}", "change it back", ways)
        if harmless:
            self.say(f"changed since the checkpoint: {', '.join(harmless)}")

    def newest_checkpoint(self) -> Path | None:
        """The newest checkpoint whose bytes are whole; says which it passed over. Reads only."""
        checkpoint, passed = newest(self.checkpoints)
        for line in passed:
            self.say(line)
        if checkpoint is None and passed:
            raise UserError(
                f"no checkpoint of {self.path} is whole ({'; '.join(passed)}); remove them, in a bucket too, to start anew"
            )
        return checkpoint

    def begin(
        self,
        step: int,
        settings: TrainConfig,
        facts: dict[str, Any],
        train_set: ImageSet | PointSet,
        held_out: ImageSet | PointSet | None,
    ) -> None:
        """Write config.json, data.json and skipped.json (every file left out, with the reason); cut metrics.jsonl to `step`
        and go on writing there. Checkpoints that were passed over are set aside."""
        if not self.writes:
            return
        set_aside(self.checkpoints, step)
        self._write_json("config.json", dump(settings))
        self._write_json("data.json", facts)
        skipped = [{"name": name, "reason": why} for name, why in skipped_files(train_set, held_out)]
        self._write_json("skipped.json", skipped)
        lines = [line for line in read_lines(self.path / "metrics.jsonl") if line["step"] <= step]
        self._write("metrics.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        self.has_begun = True

    def log(self, step: int, values: dict[str, float]) -> None:
        """One line of metrics.jsonl; what is not finite is null there."""
        if self.has_begun:
            append_metrics(self.path, step, values)

    def say_progress(self, clock: Clock, step: int, steps: int, values: dict[str, float]) -> None:
        """The values on the progress bar, or, where there is none (no terminal), as a line."""
        clock.show(step, values)
        if self.writes:
            self.write_status("running", step, steps)
            line = f"step {step}{f'/{steps}' if steps < ENDLESS else ''} " + " ".join(
                f"{name} {value:.4g}" for name, value in values.items() if not re.search(r"latent_|loss_\d", name)
            )
            seldom = any(name.startswith(("held_out", "train_")) for name in values)
            (self._note if clock.bar_shown and not seldom else self.say)(line)

    def report(self, *, now: bool) -> None:
        """Write report.html: at once, or, not `now`, where the last one is old enough. A trial has none."""
        if self._reporter is not None:
            self._reporter.write(now=now)

    def save(self, tensors: Tensors, documents: dict[str, Any], spec: CheckpointConfig, pinned: Collection[int] = ()) -> None:
        """Write the checkpoint of documents["progress"]["step"], and remove those that need not be kept; `pinned` are."""
        step = documents["progress"]["step"]
        write_folder(step_folder(self.checkpoints, step), tensors, documents)
        retain(self.checkpoints, spec.keep, spared_steps(documents["progress"]) | {step, *pinned})

    def close(self, message: str | None = None) -> None:
        """Give the directory up, after a last word: another launch may have it."""
        if message is not None:
            self.say(message)
        for file in (self._log, self._lock):
            if file is not None:
                with suppress(OSError):  # of a full disk
                    file.close()
        self._log, self._lock, self.has_begun = None, None, False

    def draw_curves(self, panels: dict[str, list[str]]) -> None:
        """loss.png: values of metrics.jsonl over the steps, panel by panel; what was never logged is left out."""
        with warn_on_failure("loss.png", self.warn):
            lines = read_lines(self.path / "metrics.jsonl")
            curves: dict[str, dict[str, tuple[list[float], list[float]]]] = {}
            for panel, names in panels.items():
                for name in names:
                    if known := [line for line in lines if line.get(name) is not None]:
                        points = [line["step"] for line in known], [line[name] for line in known]
                        curves.setdefault(panel, {})[name] = points
            if curves:
                figures.curves(self.loss_curves, curves, xlabel="step", title=self.path.resolve().name, log={"loss"})
