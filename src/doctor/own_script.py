"""The proof with the config's own script: it trains a shrunk config on all processes together, on one alone, and again from a
checkpoint."""

import contextlib
import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from ..config import UserError, dump
from ..runtime.checkpoint import newest, read_tensors, step_folder, verify_checkpoint
from ..runtime.launch import MachineConfig, undetermined
from ..runtime.processes import broadcast
from ..training.config import TrainConfig
from ..training.run_mode import RunMode, Train, call
from .health import Verdict
from .shrunk import shrink, steps_of

BROKEN = "do not train on these devices together: try fewer (--processes), NCCL_P2P_DISABLE=1, another torch or driver"
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


class OwnScript:
    """`train` of the script of a config, with a shrunk config, in `folder`, which is the first process's on all of them."""

    def __init__(self, cfg: TrainConfig, folder: Path, machine: MachineConfig, batch_size: int, micro_batch_size: int) -> None:
        module = sys.modules[type(cfg).__module__]
        self.train: Train = module.train
        self.path, self.folder = Path(str(module.__file__)), folder
        machine = replace(machine, cpu_threads=1, deterministic=True)
        self.cfg = shrink(cfg, folder, machine, batch_size, micro_batch_size)
        self.steps = steps_of(self.cfg)
        self.name = f"{self.path.name}, shrunk, in {'bf16' if machine.mixed_precision == 'bf16' else machine.dtype}"

        self.state: dict[str, dict[str, Tensor]] | None = None  # what `after_steps` has found
        self.undetermined: str | None = None  # what torch has no deterministic way for on this device

    def run(self, name: str) -> dict[str, dict[str, Tensor]] | None:
        """Train to the last step in the run directory `name` on all processes: weights, moments and EMA as this process has
        them in the end, or None where the last step is not saved, since a loss is not finite."""
        run_mode, folder = RunMode(quiet=True, says_at_once=False), self.folder / name
        with _as_before():
            try:
                status = call(self.train, self.cfg, folder, run_mode, self.steps)
            except UserError as error:
                if self.undetermined is not None or (missing := undetermined(error.__cause__)) is None:
                    raise
                self.undetermined, self.cfg = missing, replace(self.cfg, deterministic=False)
                torch.use_deterministic_algorithms(False)
                return self.run(f"{name} as well as can be")
            if status:
                raise UserError("the training was stopped; run it again")
        assert run_mode.train_state is not None
        tensors = run_mode.train_state.tensors()
        is_saved = broadcast(verify_checkpoint(step_folder(folder / "checkpoints", self.steps)) is None)
        return tensors if is_saved else None

    def run_alone(self) -> dict[str, Tensor]:
        """Train with one process, which the script starts as a person would: its weights in the end."""
        path, run = self.folder / "alone.json", self.folder / "alone"
        path.write_text(json.dumps(dump(self.cfg)), encoding="utf-8")
        words = [sys.executable, str(self.path), "-cfg", str(path), "--run-dir", str(run)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no word why"]
            raise UserError(f"{self.path.name} fails on one process: {lines[-1][:300]}")
        return read_tensors(step_folder(run / "checkpoints", self.steps), "model")

    def copy_checkpoint(self, source: str, target: str) -> None:
        """Make the checkpoint before the last step of the run `source` the only one of the run `target`."""
        folder = step_folder(self.folder / source / "checkpoints", self.steps - 1)
        shutil.copytree(folder, self.folder / target / "checkpoints" / folder.name)

    def read_problem(self, name: str) -> str | None:
        """Why the newest checkpoint of a run cannot be read here."""
        checkpoint, passed = newest(self.folder / name / "checkpoints")
        return None if checkpoint is not None and not passed else "; ".join(passed) or "it is not here"


@contextlib.contextmanager
def _as_before() -> Iterator[None]:
    """Nothing is printed; in the end signals, threads and the choice of algorithms are as they were."""
    names = ("SIGTERM", "SIGINT", "SIGUSR1")
    handlers = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None)) is not None}
    threads, exact = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(exact, warn_only=warn_only)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def digest(state: dict[str, dict[str, Tensor]]) -> str:
    """A hash of weights, moments and EMA."""
    total = hashlib.sha256()
    for tensors in state.values():
        for name in sorted(tensors):
            total.update(name.encode() + tensors[name].contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return total.hexdigest()[:16]


def relative_difference(weights: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The norm of the difference of all weights, relative to the norm of the reference's."""
    if weights.keys() != reference.keys():
        return float("inf")
    difference = sum(float((weights[key].double() - value.double()).square().sum()) for key, value in reference.items())
    return (difference / sum(float(value.double().square().sum()) for value in reference.values())) ** 0.5


def after_steps(script: OwnScript, accelerator: Accelerator) -> Verdict:
    """Ten steps of the script; then weights, moments and EMA are the same on all ranks, to the bit, and one process's too."""
    state = script.state = script.run("several")
    if state is None:
        return Verdict("fail", f"the loss is not finite after {script.steps} steps", BROKEN)
    if accelerator.num_processes == 1:
        return Verdict("skip", f"one process: not tested; {script.steps} steps are taken, the loss stays finite")
    digests = gather_object([digest(state)])
    others = [rank for rank, value in enumerate(digests) if value != digests[0]]
    if others:
        words = f"after {script.steps} steps rank {', '.join(map(str, others))} has other weights than rank 0"
        return Verdict("fail", words, BROKEN)
    worst = relative_difference(state["model"], script.run_alone()) if accelerator.is_main_process else 0.0
    allowed = 1e-9 if script.cfg.dtype == "float64" else 1e-2
    words = f"the same weights and moments on all {len(digests)} ranks, to the bit (hash {digests[0][:8]}); they are one "
    words += f"process's to {worst:.1e} ({allowed:g} allowed), {script.name}"
    return Verdict("pass" if worst <= allowed else "fail", words, "" if worst <= allowed else BROKEN)


def resumed(script: OwnScript, accelerator: Accelerator) -> Verdict:
    """The last step, from memory and from a checkpoint that all ranks read back into new objects: the same to the bit."""
    if script.state is None:
        return Verdict("skip", "not reached")
    if script.undetermined is not None:
        return Verdict("skip", f"not tested: there is no deterministic {script.undetermined} here")
    if accelerator.is_main_process:
        script.copy_checkpoint("several", "again")
    accelerator.wait_for_everyone()
    reason = script.read_problem("again")
    if any(gather_object([reason]) if accelerator.num_processes > 1 else [reason]):
        advice = "is --run-dir on a file system that all machines see?"
        return Verdict("fail", f"the checkpoint cannot be read: {reason or 'on another rank'}", advice)
    resumed_state = script.run("again") or {}
    other = [
        f"{part} {name}"
        for part, tensors in script.state.items()
        for name, value in tensors.items()
        if name not in resumed_state.get(part, {}) or not torch.equal(value, resumed_state[part][name])
    ]
    if other:
        advice = "a run that is killed does not go on as it was: is the disk sound, is this torch known to be?"
        return Verdict("fail", f"{len(other)} tensors are others after going on from a checkpoint: {other[0]} ...", advice)
    mover = "AdamW" if script.cfg.optimizer.muon is None else "Muon and AdamW"
    same = f"step {script.steps} from a checkpoint is the uninterrupted one, to the bit"
    return Verdict("pass", f"{same}, {script.name}, moved by {mover}")
