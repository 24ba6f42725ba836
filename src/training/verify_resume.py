"""--verify-resume: does a run that goes on from a checkpoint take the steps that it would have taken?"""

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..config import UserError, read_json
from ..runtime.checkpoint import read_tensors, step_folder, verify_checkpoint
from .config import TrainConfig
from .rehearsal import Train, call, rehearsal_config, short_stages, temporary_folder
from .rehearsed_caches import enter_run, rehearse_caches
from .run_mode import RunMode
from .stages import StagedConfig


def verify_resume(train: Train, cfg: TrainConfig, run_dir: Path) -> int:
    """Take a step, save, load into fresh objects, and take the next step both ways: are the two to the bit the same?

    An autoencoder takes two steps of each stage, and is loaded in the first and in the last. Status 1 where they differ.
    """
    last = 2 * len(cfg.stages) if isinstance(cfg, StagedConfig) else 2
    changes: dict[str, Any] = {"deterministic": True}
    changes["checkpoint"] = replace(cfg.checkpoint, every=1, every_minutes=None, keep=99)
    if isinstance(cfg, StagedConfig):
        changes["stages"] = short_stages(cfg, 2)
    short = rehearsal_config(cfg, **changes)
    differences, saved_steps = list[str](), ""
    with temporary_folder(run_dir) as (folder, remove):

        def run_mode() -> RunMode:
            return RunMode(quiet=True, job="verify-resume: ", on_kill=remove)

        first_mode = run_mode()
        of_caches, _ = rehearse_caches(short, run_dir, folder, folder / "whole", first_mode)
        short = replace(short, **of_caches)
        if call(train, short, enter_run(folder, folder / "whole"), first_mode, last):
            return 1
        state = PartialState()
        for step in sorted({1, last - 1}):
            resumed_run = enter_run(folder, folder / f"from_{step}")
            if not step_folder(folder / "whole" / "checkpoints", step + 1).exists():
                raise UserError(f"no step {step + 1} was saved: the run is shorter, or its loss is not finite")
            if state.is_main_process:
                shutil.copytree(
                    step_folder(folder / "whole" / "checkpoints", step), step_folder(resumed_run / "checkpoints", step)
                )
            state.wait_for_everyone()
            if call(train, short, resumed_run, run_mode(), step + 1):
                return 1
            if state.is_main_process:
                pair = [step_folder(run / "checkpoints", step + 1) for run in (folder / "whole", resumed_run)]
                lines, count = compare_checkpoints(*pair)
                differences += [f"step {step + 1}: {line}" for line in lines]
                saved_steps += f"saved and loaded after step {step}: step {step + 1} both ways, {count} tensors; "
    for line in differences:
        print(line)
    if state.is_main_process:
        verdict = f"{len(differences)} DIFFER: what a step does depends on something that no checkpoint holds"
        print(f"{cfg.name}: {saved_steps}{verdict if differences else 'bit-equal'}")
    return 1 if differences else 0


def compare_checkpoints(one: Path, other: Path) -> tuple[list[str], int]:
    """A line for each tensor and each entry of progress.json in which two checkpoints differ; how many tensors there are.

    The meter is let be: what is only logged is summed in another order by several processes.
    """
    for folder in (one, other):
        reason = verify_checkpoint(folder)
        if reason is not None:
            return [f"{folder.name}: {reason}"], 0
    lines, count = list[str](), 0
    for name in sorted({path.stem for folder in (one, other) for path in folder.glob("*.safetensors")}):
        left, right = read_tensors(one, name, finite=False), read_tensors(other, name, finite=False)
        count += len(left)
        for key in sorted(left.keys() | right.keys()):
            if key not in left or key not in right or left[key].shape != right[key].shape:
                lines.append(f"{name}: {key} is not in both")
            elif not torch.equal(left[key], right[key]):
                most = float((left[key].double() - right[key].double()).abs().max())
                lines.append(f"{name}: {key} differs by up to {most:.3g}")
    left, right = read_json(one / "progress.json"), read_json(other / "progress.json")
    keys = sorted((left.keys() | right.keys()) - {"meter"})
    lines += [f"progress.json: {key} differs" for key in keys if left.get(key) != right.get(key)]
    return lines, count
