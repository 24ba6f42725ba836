"""Caches (latents, pairs) and the quality of samples in a rehearsal: one block or batch says what all would take."""

import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

from ..data import GaussianSource, ImageSet, PointSet
from ..evaluation.quality import quality_seconds
from ..runs.autoencoder import Autoencoder, autoencoder_for
from ..runs.densities import Density, ImageDensity
from ..runs.folders import read_weights
from ..runs.latents import write_sample_cache
from ..runs.opened import count_classes, open_run
from ..runtime.launch import start
from ..sampling.sampler import build_sampler
from .config import LatentConfig, PathPreviewConfig, PreviewConfig, TrainConfig
from .inputs import open_coupling
from .pairs import BlendConfig, PairMaker, PairsConfig, write_sample_pairs
from .rehearsal import caches_in, link_tree
from .run_mode import RunMode


def rehearse_caches(
    cfg: TrainConfig, run_dir: Path, folder: Path, run: Path, run_mode: RunMode
) -> tuple[dict[str, Any], float]:
    """Make the caches that a rehearsal in `folder`/... trains on: links of those that the run in `run_dir` would find, else of
    one block. Gives what changes in the config, so that they are used, and the seconds that making all of them would take."""
    if not isinstance(cfg, LatentConfig) or (cfg.autoencoder is None and getattr(cfg, "pairs", None) is None):
        return {}, 0.0
    accelerator = start(cfg, trackers=(), folder=run, fsdp=not isinstance(cfg, BlendConfig))
    run_mode.enter_phase("looking at the data")
    caches, changes, seconds = caches_in(folder), dict[str, Any](), 0.0
    writes = accelerator.is_local_main_process
    if writes:
        shutil.rmtree(caches, ignore_errors=True)
    source = cfg.source if isinstance(cfg, BlendConfig) else GaussianSource(source="gaussian")
    coupling = open_coupling(cfg.data, source, cfg.held_out, cfg.image)
    if cfg.autoencoder is not None:
        autoencoder = autoencoder_for(cfg.autoencoder, run, accelerator.device)
        changes["latents"] = str(caches / "latents")
        places = coupling.cache_folders(autoencoder, changes["latents"], run)
        known_folders = zip(*(coupling.cache_folders(autoencoder, cfg.latents, place) for place in (run, run_dir)), strict=True)
        densities = [density for density in (coupling.data, coupling.source) if density is not None]
        for density, place, known in zip(densities, places, known_folders, strict=True):
            whole = next((path for path in known if path.exists()), None)
            if whole is not None and writes:
                link_cache(whole, place)
            elif whole is None:
                run_mode.enter_phase("encoding the first images")
                seconds += _encode_sample(cfg, autoencoder, density, place, writes)
        accelerator.wait_for_everyone()
        if getattr(cfg, "pairs", None) is not None:
            options = {"batch_size": cfg.encode_batch_size, "workers": cfg.workers}
            coupling = coupling.encoded(autoencoder, accelerator, changes["latents"], run, **options)
    if isinstance(cfg, BlendConfig) and cfg.pairs is not None:
        num_classes = count_classes(cfg.class_conditional, coupling.data.train.class_names)
        maker = PairMaker(cfg.pairs, coupling, num_classes, run_dir, accelerator.device)
        if not maker.folder.exists():
            run_mode.enter_phase("making the first pairs")
            spec = PairsConfig(run=cfg.pairs) if isinstance(cfg.pairs, str) else cfg.pairs
            # a folder of weights has no place for pairs, so the rehearsal looks for them in its own folder
            changes["pairs"] = replace(spec, run=str(read_weights(Path(spec.run)).folder))
            if writes:
                seconds += write_sample_pairs(maker, caches / "pairs" / maker.name)
        elif writes and maker.folder.parent.parent == run_dir:
            link_tree(maker.folder, caches / "pairs" / maker.name)
        accelerator.wait_for_everyone()
    return changes, seconds / accelerator.num_processes


def link_cache(cache: Path, place: Path) -> None:
    """The same cache at another place: links of its blocks, and a manifest of its own, which a run may write anew."""
    link_tree(cache, place)
    if (cache / "manifest.json").exists():
        (place / "manifest.json").unlink()
        shutil.copy2(cache / "manifest.json", place / "manifest.json")


def _encode_sample(cfg: LatentConfig, autoencoder: Autoencoder, density: Density, place: Path, writes: bool) -> float:
    assert isinstance(density, ImageDensity) and isinstance(density.train, ImageSet)
    assert not isinstance(density.held_out, PointSet)
    if not writes:
        return 0.0
    options = {"batch_size": cfg.encode_batch_size, "workers": cfg.workers}
    return write_sample_cache(autoencoder, density.train, density.held_out, density.image, place, **options)


def enter_run(folder: Path, run: Path) -> Path:
    """The run directory `run` of a rehearsal in `folder`, with the pairs that were made for it."""
    pairs = caches_in(folder) / "pairs"
    if pairs.is_dir() and os.environ.get("LOCAL_RANK", "0") == "0":
        link_tree(pairs, run / "pairs")
    return run


def estimate_quality(cfg: TrainConfig, run: Path, run_mode: RunMode) -> float:
    """The seconds that measuring the quality of samples takes once, judged by one batch of the rehearsed run `run`; 0 where the
    config does not ask for it. The first process alone calls it."""
    if cfg.quality is None or not isinstance(cfg.preview, PreviewConfig | PathPreviewConfig):
        return 0.0
    run_mode.enter_phase("measuring samples")
    state = PartialState()
    device = torch.device(state.device or "cpu")
    opened = open_run(run, device)
    spec = cfg.preview.sampler if isinstance(cfg.preview, PreviewConfig) else cfg.preview.most_calls
    sampler = build_sampler(opened, spec.without_guidance(opened.num_classes is None))
    options = {"device": device, "processes": state.num_processes}
    return quality_seconds(cfg.quality, sampler, cfg.preview.batch_size, opened.num_classes, **options)
