"""How a training script's `train` is started: from the command line, to train, to say what training would cost or to prove that
it resumes; and from Python."""

import argparse
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import replace
from functools import partial, wraps
from pathlib import Path
from typing import Any

from ..config import UserError
from ..config.progress import Phases, say
from ..data import GIVEN
from ..runtime.checkpoint import newest
from .config import TrainConfig
from .continuing import MARK, continue_as, directory_of
from .dry_run import dry_run
from .given import Given
from .rehearsal import verify_resume
from .run_mode import RunMode, Train, call
from .uploads import bring, uploads_of


def run_training(train: Train, cfg: TrainConfig, args: argparse.Namespace) -> int:
    """Do what `args` of config.training_arguments ask for: train(cfg, run directory, RunMode, None), or a rehearsal of it."""
    run_dir, old = Path(args.run_dir or f"runs/{cfg.name}"), None
    name = getattr(args, "continue_as", None)
    other = "--dry-run" if args.dry_run else "--continue-as" if name is not None else None
    if args.verify_resume and other is not None:
        raise UserError(f"{other} and --verify-resume are two things; give one of them")
    if name is not None:
        run_dir, old = directory_of(name, run_dir), run_dir
    bring(cfg, run_dir, trial=args.dry_run or args.verify_resume, old=old)
    if args.dry_run:
        return dry_run(train, cfg, run_dir, old)
    if args.verify_resume:
        return verify_resume(train, cfg, run_dir)
    return _run(train, cfg, run_dir, old)


def _run(train: Train, cfg: TrainConfig, run_dir: Path, old: Path | None = None, stop_at: int | None = None) -> int:
    from accelerate import PartialState

    run_mode, is_whole, is_first = RunMode(), True, os.environ.get("RANK", "0") == "0"
    try:
        if old is not None:
            continue_as(cfg, old, run_dir)
        status = call(train, cfg, run_dir, run_mode, stop_at)
        if PartialState._shared_state:
            PartialState().destroy_process_group()
        if status == 0 and not run_mode.uploads and is_first:
            run_mode.uploads = uploads_of(cfg, run_dir)  # it was finished: did all arrive then?
            if run_mode.uploads and (checkpoint := newest(run_dir / "checkpoints")[0]) is not None:
                for uploads in run_mode.uploads:
                    uploads.wake(int(checkpoint.name.removeprefix("step_")))
    except UserError as error:
        if old is None or not (run_dir / MARK).exists():
            raise
        if is_first:  # refused before it began: nothing is left of it
            shutil.rmtree(run_dir, ignore_errors=True)
        raise UserError(str(error).replace(str(run_dir), str(old))) from None  # what was read is the old run's
    finally:
        for uploads in run_mode.uploads:
            uploads.say = say
            uploads.begin_close()
        for uploads in run_mode.uploads:
            with closing(Phases("", at_once=True)) as phases:
                phases.enter(f"putting what is left into {uploads.where}")
                is_whole &= uploads.close()
    return status if is_whole else status or 1  # so that `launch && shutdown` does not lose the end of the run


@contextmanager
def keep_signals() -> Iterator[None]:
    """Afterwards the signals that ask a run to stop are handled as they were before."""
    names = ("SIGTERM", "SIGINT", "SIGUSR1", "SIGUSR2", "SIGHUP")
    before = {number: signal.getsignal(number) for name in names if (number := getattr(signal, name, None)) is not None}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def train_here(train: Train, cfg: TrainConfig, run_dir: Path, stop_at: int | None = None) -> int:
    """A run from Python: 0 where it has finished, 1 where it was stopped. Afterwards signals are the caller's again, and so, of
    one process, is accelerate's state."""
    from accelerate import PartialState
    from accelerate.state import AcceleratorState

    try:
        with keep_signals():
            bring(cfg, run_dir)
            return _run(train, cfg, run_dir, stop_at=stop_at)
    finally:
        if PartialState._shared_state and PartialState().num_processes == 1:
            AcceleratorState._reset_state(reset_partial_state=True)


def from_python(train: Callable[[Any, Path, RunMode, int | None, Given], int]):
    """Decorator of a script's `train`: it can be called from Python, too, as train(cfg, run_dir, network=..., dataset=...), of
    which either may be left out; docs/python.md says what they are. It gives 0 where the run has finished, 1 where it was
    stopped."""

    @wraps(train)
    def called(
        cfg: Any,
        run_dir: Path | str,
        run_mode: RunMode | None = None,
        stop_at: int | None = None,
        *,
        network: Any = None,
        dataset: Any = None,
    ) -> int:
        if not isinstance(cfg, TrainConfig):
            kind = type(cfg).__name__
            raise UserError(f"the config is a {kind}; hand in what load(FILE, Config) gives, as docs/python.md says")
        if run_mode is None:
            return train_here(partial(called, network=network, dataset=dataset), cfg, Path(run_dir), stop_at)
        run_cfg = cfg if dataset is None else replace(cfg, data=GIVEN)  # so that the run's config.json says the truth
        return train(run_cfg, Path(run_dir), run_mode, stop_at, Given(network, dataset))

    return called
