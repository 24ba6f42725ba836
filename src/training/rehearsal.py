"""A rehearsal of a run: its own `train` for a few steps, with a changed config, in a temporary folder that is removed; and
--verify-resume, which asks whether a run that goes on from a checkpoint takes the steps that it would have taken."""

import os
import shutil
import socket
from contextlib import closing, suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch

from ..config import UserError, read_json
from ..data import GaussianSource
from ..runs.autoencoder import autoencoder_for
from ..runs.folders import read_weights
from ..runs.latents import write_sample_cache
from ..runs.opened import count_classes
from ..runtime.checkpoint import Tensors, read_tensors, step_folder, verify_checkpoint
from ..runtime.launch import decide_precision, start
from ..storage.files import link_file
from .autoencoder_stages import StageConfig, StagedConfig
from .config import BlendConfig, LatentConfig, PairsConfig, TrainConfig
from .inputs import open_coupling
from .pairs import PairMaker, write_sample_pairs
from .run_mode import RunMode, Train, call

NEVER = 10**12  # steps


def rehearsal_config(
    cfg: TrainConfig, *, log_every: int = NEVER, preview_every: int = NEVER, save_every: int = NEVER, **changes: Any
) -> Any:
    """The config without what leaves traces or takes long: trackers, bucket, hub, exports, rollbacks, and previews and
    checkpoints but the last. `changes` come on top; a key that the config does not have is left out."""
    preview = replace(cfg.preview, every=preview_every)
    if cfg.quality is not None:
        preview = replace(preview, quality=replace(cfg.quality, every=NEVER))
    plain: dict[str, Any] = {
        "bucket": None,
        "hub": None,
        "export_every": None,
        "preview": preview,
        "checkpoint": replace(cfg.checkpoint, every=save_every, every_minutes=None, keep=99),
        "log": replace(cfg.log, trackers=(), every=log_every),
        "ema": cfg.ema if cfg.ema.snapshot_every is None else replace(cfg.ema, snapshot_every=NEVER),
    }
    keys = {field.name for field in fields(cfg)}
    if "guard" in keys:
        plain["guard"] = replace(cfg.guard, rollback=False)  # pyright: ignore[reportAttributeAccessIssue]
    return replace(cfg, **{key: value for key, value in (plain | changes).items() if key in keys})


def short_stages(cfg: TrainConfig, steps: int) -> tuple[StageConfig, ...]:
    """The stages, of so many steps each, with the adversary in all of them; none of a config without stages."""
    return tuple(
        replace(stage, steps=steps, adversarial=stage.adversarial and replace(stage.adversarial, start_step=None))
        for stage in (cfg.stages if isinstance(cfg, StagedConfig) else ())
    )


class Rehearsal:
    """Trains in run directories in `folder`, a hidden one beside `run_dir` on the same file system; its lines begin with `job`.

    Where the config's precision is auto, it is `precision`, that of the run where there is one, known after the first training.
    Its caches (latents, pairs) are links of those that the run would find, else of one block; `cache_seconds` is what making
    all of them would take. `close` removes the folder.
    """

    def __init__(self, train: Train, run_dir: Path, job: str) -> None:
        self._train, self._run_dir, self._job = train, run_dir, job
        self.folder = run_dir.with_name(f".{run_dir.name}.trial")
        self.cache_seconds = 0.0
        self.precision: str | None = None
        self._caches = self.folder / f"caches-{socket.gethostname()}"  # each machine has its own
        self._of_caches: dict[str, Any] | None = None  # what changes in the config, so that they are used
        self._new = [self.folder, *(parent for parent in self.folder.parents if not parent.exists())]
        if os.environ.get("RANK", "0") == "0":
            shutil.rmtree(self.folder, ignore_errors=True)

    def close(self) -> None:
        """Remove the folder: the first process does it; on other machines the first one removes their own caches."""
        is_first, is_first_here = (os.environ.get(name, "0") == "0" for name in ("RANK", "LOCAL_RANK"))
        if is_first or is_first_here:
            shutil.rmtree(self.folder if is_first else self._caches, ignore_errors=True)
            for parent in self._new:
                with suppress(OSError):
                    parent.rmdir()

    def train(self, cfg: TrainConfig, name: str, stop_at: int, *, says: bool = True) -> tuple[int, RunMode]:
        """Train in the run directory `folder`/`name` up to the step `stop_at`, saying at once what is done where it `says` so:
        the exit status, and the run mode. A process that ends at once removes the folder, too."""
        run, run_mode = self.folder / name, RunMode(quiet=True, says_at_once=says, job=self._job, on_kill=self.close)
        if cfg.mixed_precision == "auto":  # decided once, since all trainings of a process are in one precision
            self.precision = self.precision or decide_precision(cfg, run, self._run_dir)
            cfg = replace(cfg, mixed_precision=self.precision)
        if self._of_caches is None:
            self._of_caches = self._make_caches(cfg, run, run_mode)
        pairs = self._caches / "pairs"
        if pairs.is_dir() and os.environ.get("LOCAL_RANK", "0") == "0":
            _link_tree(pairs, run / "pairs")
        return call(self._train, replace(cfg, **self._of_caches), run, run_mode, stop_at), run_mode

    def _make_caches(self, cfg: TrainConfig, run: Path, run_mode: RunMode) -> dict[str, Any]:
        if not isinstance(cfg, LatentConfig) or (cfg.autoencoder is None and getattr(cfg, "pairs", None) is None):
            return {}
        accelerator = start(cfg, trackers=(), folder=run, fsdp=not isinstance(cfg, BlendConfig))
        run_mode.enter_phase("looking at the data")
        changes, seconds, writes = dict[str, Any](), 0.0, accelerator.is_local_main_process
        if writes:
            shutil.rmtree(self._caches, ignore_errors=True)
        source = cfg.source if isinstance(cfg, BlendConfig) else GaussianSource(source="gaussian")
        autoencoder = autoencoder_for(cfg.autoencoder, run, accelerator.device) if cfg.autoencoder is not None else None
        factor = cfg.model.factor * (autoencoder.factor if autoencoder is not None else 1)
        options: dict[str, Any] = {"factor": factor, "condition": cfg.condition}
        options["paired"] = isinstance(cfg, BlendConfig) and cfg.coupling == "paired"
        coupling = open_coupling(cfg.data, source, cfg.held_out, cfg.image, **options)
        if autoencoder is not None:
            changes["latents"] = str(self._caches / "latents")
            options: dict[str, Any] = {"batch_size": cfg.encode_batch_size, "workers": cfg.workers}
            where = ((changes["latents"], run), (cfg.latents, run), (cfg.latents, self._run_dir))
            folders = [coupling.cache_folders(autoencoder, latents, at) for latents, at in where]
            densities: list[Any] = [density for density in (coupling.data, coupling.source) if density is not None]  # of images
            for density, place, *known in zip(densities, *folders, strict=True):
                whole = next((path for path in known if path.exists()), None)
                if whole is None:
                    run_mode.enter_phase("encoding the first images")
                    seconds += write_sample_cache(autoencoder, density, place, **options) if writes else 0.0
                elif writes:
                    link_cache(whole, place)
            accelerator.wait_for_everyone()
            if getattr(cfg, "pairs", None) is not None:
                coupling = coupling.encoded(replace(cfg, latents=changes["latents"]), autoencoder, accelerator, run)
        if isinstance(cfg, BlendConfig) and cfg.pairs is not None:
            num_classes = count_classes(cfg.class_conditional, coupling.data.train.class_names)
            maker = PairMaker(cfg.pairs, coupling, num_classes, self._run_dir, accelerator.device)
            place = self._caches / "pairs" / maker.name
            if not maker.folder.exists():
                run_mode.enter_phase("making the first pairs")
                spec = PairsConfig(run=cfg.pairs) if isinstance(cfg.pairs, str) else cfg.pairs
                # a folder of weights has no place for pairs, so the rehearsal looks for them in its own folder
                changes["pairs"] = replace(spec, run=str(read_weights(Path(spec.run)).folder))
                seconds += write_sample_pairs(maker, place) if writes else 0.0
            elif writes and maker.folder.parent.parent == self._run_dir:
                _link_tree(maker.folder, place)
            accelerator.wait_for_everyone()
        self.cache_seconds = seconds / accelerator.num_processes
        return changes


def _link_tree(source: Path, target: Path) -> None:
    shutil.copytree(source, target, copy_function=link_file, dirs_exist_ok=True)


def link_cache(cache: Path, place: Path) -> None:
    """The same cache at another place: links of its blocks, and a manifest of its own, which a run may write anew."""
    _link_tree(cache, place)
    if (cache / "manifest.json").exists():
        (place / "manifest.json").unlink()
        shutil.copy2(cache / "manifest.json", place / "manifest.json")


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
