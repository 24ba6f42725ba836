"""A rehearsal of a run: its own `train` for a few steps, with a changed config, in a temporary folder that is removed."""

import os
import shutil
import socket
import sys
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..config import UserError
from ..runtime.failures import explain_out_of_memory, is_lost_rank
from ..runtime.launch import undetermined
from ..runtime.processes import silent_ranks
from ..storage.files import link_file
from .config import TrainConfig
from .run_mode import RESTART, RunMode
from .stages import StageConfig, StagedConfig

Train = Callable[[Any, Path, RunMode, int | None], int]  # (config, run directory, how to run, stop_at) -> exit status
NEVER = 10**12  # steps


def call(train: Train, cfg: TrainConfig, run_dir: Path, run_mode: RunMode, stop_at: int | None = None) -> int:
    """Train, again after each rollback, and close all that was opened; errors that a person can mend are said in words."""
    try:
        with run_mode.closing, explain_out_of_memory(cfg.batch_size, cfg.micro_batch_size) as run_mode.set_batch:
            while (status := train(cfg, run_dir, run_mode, stop_at)) == RESTART:
                pass
    except RuntimeError as error:
        if (missing := undetermined(error)) is not None:
            reason = f"deterministic: torch has no {missing} that repeats itself to the bit on this device"
            raise UserError(f"{reason}; --set deterministic=false, or train without what asks for it") from error
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
def temporary_folder(run_dir: Path) -> Generator[tuple[Path, Callable[[], None]]]:
    """A hidden folder beside `run_dir`, on the same file system, that is removed afterwards; and what removes it, for a process
    that ends at once. The first process does it; on other machines the first one removes their own caches."""
    folder = run_dir.with_name(f".{run_dir.name}.trial")
    is_first, is_first_here = (os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))
    new = [parent for parent in folder.parents if not parent.exists()]

    def remove() -> None:
        if is_first or is_first_here:
            shutil.rmtree(folder if is_first else caches_in(folder), ignore_errors=True)
            for parent in (folder, *new):
                with suppress(OSError):
                    parent.rmdir()

    try:
        if is_first:
            shutil.rmtree(folder, ignore_errors=True)
        yield folder, remove
    finally:
        remove()


def caches_in(folder: Path) -> Path:
    """Where a machine keeps the caches of its rehearsal."""
    return folder / f"caches-{socket.gethostname()}"


def rehearsal_config(cfg: TrainConfig, **changes: Any) -> Any:
    """The config without what leaves traces or takes long: trackers, bucket, exports, previews and checkpoints but the last,
    rollbacks. `changes` come on top; a key that the config does not have is left out."""
    keys = {field.name for field in fields(cfg)}
    preview = replace(cfg.preview, every=NEVER)
    if cfg.quality is not None:
        preview = replace(preview, quality=replace(cfg.quality, every=NEVER))
    plain: dict[str, Any] = {
        "bucket": None,
        "export_every": None,
        "preview": preview,
        "checkpoint": replace(cfg.checkpoint, every=NEVER, every_minutes=None, keep=99),
        "log": replace(cfg.log, trackers=(), every=NEVER),
    }
    if cfg.ema.snapshot_every is not None:
        plain["ema"] = replace(cfg.ema, snapshot_every=NEVER)
    if "guard" in keys:
        plain["guard"] = replace(cfg.guard, rollback=False)  # pyright: ignore[reportAttributeAccessIssue]
    plain |= changes
    return replace(cfg, **{key: value for key, value in plain.items() if key in keys})


def short_stages(cfg: StagedConfig, steps: int) -> tuple[StageConfig, ...]:
    """The stages, of so many steps each, with the adversary in all of them."""
    return tuple(
        replace(stage, steps=steps, adversarial=stage.adversarial and replace(stage.adversarial, start_step=None))
        for stage in cfg.stages
    )


def link_tree(source: Path, target: Path) -> None:
    """A second name for each file of a folder."""
    shutil.copytree(source, target, copy_function=link_file, dirs_exist_ok=True)
