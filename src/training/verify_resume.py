"""--verify-resume: does a run that goes on from a checkpoint take the steps that it would have taken?"""

import os
import shutil
from contextlib import closing
from pathlib import Path

import torch

from ..config import UserError, read_json
from ..runtime.checkpoint import Tensors, read_tensors, step_folder, verify_checkpoint
from .config import TrainConfig
from .rehearsal import Rehearsal, rehearsal_config, short_stages
from .run_mode import Train


def verify_resume(train: Train, cfg: TrainConfig, run_dir: Path) -> int:
    """Take a step, save, load into fresh objects, and take the next step both ways: are the two to the bit the same?

    An autoencoder takes two steps of each stage, and is loaded in the first and in the last. Status 1 where they differ.
    """
    from accelerate import PartialState

    stages, is_first = short_stages(cfg, 2), os.environ.get("RANK", "0") == "0"
    short, last = rehearsal_config(cfg, save_every=1, stages=stages, deterministic=True), 2 * max(1, len(stages))
    differences, saved_steps = list[str](), ""
    with closing(Rehearsal(train, run_dir, "verify-resume: ")) as rehearsal:
        if rehearsal.train(short, "whole", last)[0]:
            return 1
        for step in sorted({1, last - 1}):
            whole, resumed = (rehearsal.folder / name / "checkpoints" for name in ("whole", f"from_{step}"))
            if not step_folder(whole, step + 1).exists():
                raise UserError(f"no step {step + 1} was saved: the run is shorter, or its loss is not finite")
            if is_first:
                shutil.copytree(step_folder(whole, step), step_folder(resumed, step))
            PartialState().wait_for_everyone()
            if rehearsal.train(short, resumed.parent.name, step + 1)[0]:
                return 1
            if is_first:
                lines, count = compare_checkpoints(step_folder(whole, step + 1), step_folder(resumed, step + 1))
                differences += [f"step {step + 1}: {line}" for line in lines]
                saved_steps += f"saved and loaded after step {step}: step {step + 1} both ways, {count} tensors; "
    if is_first:
        verdict = f"{len(differences)} DIFFER: what a step does depends on something that no checkpoint holds"
        print(*differences, f"{cfg.name}: {saved_steps}{verdict if differences else 'bit-equal'}", sep="\n")
    return 1 if differences else 0


def compare_tensors(one: Tensors, other: Tensors) -> list[str]:
    """A line for each tensor in which two states, {part: {name: tensor}}, are not the same to the bit."""
    lines = list[str]()
    for part in sorted(one.keys() | other.keys()):
        left, right = one.get(part, {}), other.get(part, {})
        for key in sorted(left.keys() | right.keys()):
            if key not in left or key not in right or left[key].shape != right[key].shape:
                lines.append(f"{part}: {key} is not in both")
            elif not torch.equal(left[key], right[key]):
                most = float((left[key].double() - right[key].double()).abs().max())
                lines.append(f"{part}: {key} differs by up to {most:.3g}")
    return lines


def compare_checkpoints(one: Path, other: Path) -> tuple[list[str], int]:
    """A line for each tensor and each entry of progress.json in which two checkpoints differ; how many tensors there are.

    The meter is let be: what is only logged is summed in another order by several processes.
    """
    for folder in (one, other):
        if (reason := verify_checkpoint(folder)) is not None:
            return [f"{folder.name}: {reason}"], 0
    lines, count = list[str](), 0
    for name in sorted({path.stem for folder in (one, other) for path in folder.glob("*.safetensors")}):
        left, right = (read_tensors(folder, name, finite=False) for folder in (one, other))
        count += len(left)
        lines += compare_tensors({name: left}, {name: right})
    before, after = (read_json(folder / "progress.json") for folder in (one, other))
    keys = sorted((before.keys() | after.keys()) - {"meter"})
    return lines + [f"progress.json: {key} differs" for key in keys if before.get(key) != after.get(key)], count
