"""What a training script's command line asks for: to train, to say what training would cost, or to prove that it resumes."""

import argparse
import os
import shutil
import signal
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import PartialState
from accelerate.state import AcceleratorState

from ..config import UserError
from ..config.progress import Phases
from ..runtime.checkpoint import newest
from .config import TrainConfig
from .continuing import MARK, continue_as, directory_of
from .dry_run import dry_run
from .rehearsal import Train, call
from .run_mode import RunMode
from .uploads import Uploads, bring
from .verify_resume import verify_resume


def run_training(train: Train, cfg: TrainConfig, args: argparse.Namespace) -> int:
    """Do what `args` of config.training_arguments ask for: train(cfg, run directory, RunMode, None), or a rehearsal of it."""
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


def train_here(
    train: Callable[..., int], cfg: TrainConfig, run_dir: str | Path, stop_at: int | None = None, **given: Any
) -> int:
    """A run from Python: `train` of a script with what is `given` from there; 0 where it has finished, 1 where it was stopped.
    Afterwards signals are the caller's again, and so, of one process, is accelerate's state."""
    names = ("SIGTERM", "SIGINT", "SIGUSR1", f"SIG{cfg.stop_signal}")
    before = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None)) is not None}
    run_dir = Path(run_dir)
    try:
        if cfg.bucket is not None:
            for line in bring(cfg, run_dir, trial=False):
                print(line, flush=True)
        return _run(partial(train, **given), cfg, run_dir, stop_at=stop_at)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if PartialState._shared_state and PartialState().num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)


def _run(train: Train, cfg: TrainConfig, run_dir: Path, old: Path | None = None, stop_at: int | None = None) -> int:
    run_mode, is_whole = RunMode(), True
    try:
        if old is not None:
            continue_as(cfg, old, run_dir)
        status = call(train, cfg, run_dir, run_mode, stop_at)
        if PartialState._shared_state:
            PartialState().destroy_process_group()
        if status == 0 and run_mode.uploads is None and cfg.bucket is not None and os.environ.get("RANK", "0") == "0":
            run_mode.uploads = Uploads(cfg.bucket, run_dir, cfg.checkpoint.keep)  # it was finished: did all arrive then?
            if (checkpoint := newest(run_dir / "checkpoints")[0]) is not None:
                run_mode.uploads.wake(int(checkpoint.name.removeprefix("step_")))
    except UserError as error:
        if old is None or not (run_dir / MARK).exists():
            raise
        if os.environ.get("RANK", "0") == "0":  # refused before it began: nothing is left of it
            shutil.rmtree(run_dir, ignore_errors=True)
        raise UserError(str(error).replace(str(run_dir), str(old))) from None  # what was read is the old run's
    finally:
        if run_mode.uploads is not None:
            run_mode.uploads.say = partial(print, flush=True)
            run_mode.uploads.say(f"putting what is left into {cfg.bucket}")
            phases = Phases("", at_once=False)
            phases.enter(f"putting what is left into {cfg.bucket}")
            is_whole = run_mode.uploads.close()
            phases.close()
    return status if is_whole else status or 1  # so that `launch && shutdown` does not lose the end of the run
