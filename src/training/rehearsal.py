"""A rehearsal of a run: its own `train` for a few steps, with a changed config, in a temporary folder that is removed."""

import os
import shutil
import socket
from contextlib import suppress
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from ..data import GaussianSource, ImageSet, PointSet
from ..runs.autoencoder import autoencoder_for
from ..runs.densities import ImageDensity
from ..runs.folders import read_weights
from ..runs.latents import write_sample_cache
from ..runs.opened import count_classes
from ..runtime.launch import start
from ..storage.files import link_file
from .config import LatentConfig, TrainConfig
from .inputs import open_coupling
from .pairs import BlendConfig, PairMaker, PairsConfig, write_sample_pairs
from .run_mode import RunMode, Train, call
from .stages import StageConfig, StagedConfig

NEVER = 10**12  # steps


def rehearsal_config(
    cfg: TrainConfig, *, log_every: int = NEVER, preview_every: int = NEVER, save_every: int = NEVER, **changes: Any
) -> Any:
    """The config without what leaves traces or takes long: trackers, bucket, exports, rollbacks, and previews and checkpoints
    but the last. `changes` come on top; a key that the config does not have is left out."""
    preview = replace(cfg.preview, every=preview_every)
    if cfg.quality is not None:
        preview = replace(preview, quality=replace(cfg.quality, every=NEVER))
    plain: dict[str, Any] = {
        "bucket": None,
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

    Its caches (latents, pairs) are links of those that the run would find, else of one block; `cache_seconds` is what making
    all of them would take. `close` removes the folder.
    """

    def __init__(self, train: Train, run_dir: Path, job: str) -> None:
        self._train, self._run_dir, self._job = train, run_dir, job
        self.folder = run_dir.with_name(f".{run_dir.name}.trial")
        self.cache_seconds = 0.0
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
        coupling = open_coupling(cfg.data, source, cfg.held_out, cfg.image)
        if cfg.autoencoder is not None:
            autoencoder = autoencoder_for(cfg.autoencoder, run, accelerator.device)
            changes["latents"], options = str(self._caches / "latents"), {"batch_size": cfg.encode_batch_size}
            options["workers"] = cfg.workers
            places = coupling.cache_folders(autoencoder, changes["latents"], run)
            known = zip(*(coupling.cache_folders(autoencoder, cfg.latents, at) for at in (run, self._run_dir)), strict=True)
            densities = [density for density in (coupling.data, coupling.source) if density is not None]
            for density, place, folders in zip(densities, places, known, strict=True):
                whole = next((path for path in folders if path.exists()), None)
                if whole is not None and writes:
                    link_cache(whole, place)
                elif whole is None:
                    run_mode.enter_phase("encoding the first images")
                    assert isinstance(density, ImageDensity) and isinstance(density.train, ImageSet)
                    assert not isinstance(density.held_out, PointSet)
                    sets = density.train, density.held_out, density.image
                    seconds += write_sample_cache(autoencoder, *sets, place, **options) if writes else 0.0
            accelerator.wait_for_everyone()
            if getattr(cfg, "pairs", None) is not None:
                coupling = coupling.encoded(autoencoder, accelerator, changes["latents"], run, **options)
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
