"""What a cache notices: files overwritten by others of the same name and size, another decoder, times alone."""

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image

from src.config import UserError, validate
from src.data import ImageConfig, ImageSet, open_sources
from src.data.latents import same_latents
from src.data.packing import pack
from src.data.sources import FolderSource, PackedSource
from src.evaluation.results import real_features
from src.metrics.features import open_features
from src.models import VAE, VAEConfig
from src.runs.autoencoder import Autoencoder
from src.runs.densities import ImageDensity
from src.runs.latents import Latents, latents_of, write_sample_cache
from src.training.rehearsal import link_cache
from tests.conftest import randomise, refused, run_here
from tests.data.profiles import display_p3

IMAGE = ImageConfig(size=16)


def autoencoder() -> Autoencoder:
    network = randomise(VAE(VAEConfig(widths=(8, 16), blocks=1), 3)).eval().requires_grad_(False)
    return Autoencoder(network=network, path="somewhere", document={}, digest="d", channels=3, latent_channels=4, factor=2)


def bitmaps(folder: Path, seed: int, count: int = 12, side: int = 16, **save: Any) -> Path:
    """BMPs of noise: all of one size in bytes, whatever they show."""
    folder.mkdir(exist_ok=True)
    rng = np.random.default_rng(seed)
    for i in range(count):
        pixels = rng.integers(0, 256, (side, side, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.{'png' if save else 'bmp'}", **save)
    return folder


def opened(folder: Path) -> ImageSet:
    return open_sources(validate(FolderSource, {"source": "folder", "path": str(folder)}))


def encoded(folder: Path, cache: Path, **options: Any) -> Latents:
    return latents_of(
        autoencoder(), ImageDensity(opened(folder), None, IMAGE), cache, Accelerator(cpu=True), batch_size=4, **options
    )


def touch(folder: Path) -> None:
    for path in folder.iterdir():
        os.utime(path, ns=(10**18, 10**18))


def without_files(cache: Path) -> dict[str, Any]:
    """A cache as it was before files were remembered."""
    manifest = json.loads((cache / "manifest.json").read_text())
    known = manifest.pop("files")
    (cache / "manifest.json").write_text(json.dumps(manifest))
    for path in (cache / "train").glob("*.json"):
        facts = json.loads(path.read_text())
        facts.pop("content")
        path.write_text(json.dumps(facts))
    return known


@pytest.mark.parametrize("old", [False, True], ids=["of now", "of before"])
def test_a_latent_cache_of_overwritten_files_is_refused_by_name(tmp_path: Path, old: bool) -> None:
    folder, cache = bitmaps(tmp_path / "images", 0), tmp_path / "cache"
    before = opened(folder)
    encoded(folder, cache)
    if old:
        without_files(cache)
    bitmaps(folder, 1)
    assert opened(folder).fingerprint == before.fingerprint and opened(folder).state != before.state
    with pytest.raises(UserError, match=r"was made of other images .*remove it, or give another `latents`"):
        encoded(folder, cache)


def test_one_overwritten_file_is_enough(tmp_path: Path) -> None:
    folder, cache = bitmaps(tmp_path / "images", 0), tmp_path / "cache"
    encoded(folder, cache)
    facts = (folder / "3.bmp").stat()
    content = bytearray((folder / "3.bmp").read_bytes())
    content[-1] ^= 1
    (folder / "3.bmp").write_bytes(content)
    os.utime(folder / "3.bmp", ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    with pytest.raises(UserError, match="was made of other images"):
        encoded(folder, cache)


@pytest.mark.parametrize("old", [False, True], ids=["of now", "of before"])
def test_times_alone_stop_nothing_and_are_looked_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, old: bool) -> None:
    folder, cache = bitmaps(tmp_path / "images", 0), tmp_path / "cache"
    facts = encoded(folder, cache).facts
    assert "files" not in facts, "what a checkpoint keeps is as it was"
    if old:
        without_files(cache)
        os.utime(cache / "manifest.json", ns=(0, 0))
    touch(folder)
    assert encoded(folder, cache).facts == facts
    if not old:
        monkeypatch.setattr(ImageSet, "contents", lambda *_: pytest.fail("the contents were compared before"))
        assert encoded(folder, cache).facts == facts


def test_a_dry_run_does_not_write_to_a_cache(tmp_path: Path) -> None:
    """It goes on with links of its blocks and with a manifest of its own."""
    folder, cache = bitmaps(tmp_path / "images", 0), tmp_path / "cache"
    encoded(folder, cache)
    touch(folder)
    before = (cache / "manifest.json").read_bytes()
    link_cache(cache, tmp_path / "rehearsal")
    encoded(folder, tmp_path / "rehearsal")
    assert (tmp_path / "rehearsal" / "manifest.json").read_bytes() != before, "it says which files it was compared with"
    assert (cache / "manifest.json").read_bytes() == before


def test_a_cache_for_a_rehearsal_is_one_block_under_many_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("src.runs.latents.BLOCK", 4)
    monkeypatch.setattr("src.storage.blocks.BLOCK", 4)
    folder, cache = bitmaps(tmp_path / "images", 0), tmp_path / "cache"
    images = opened(folder)
    seconds = write_sample_cache(autoencoder(), ImageDensity(images, None, IMAGE), cache, batch_size=4, workers=0)
    latents = encoded(folder, cache)
    assert len(latents.train) == len(images) > 8 and seconds > 0
    blocks = sorted((cache / "train").glob("*.npy"))
    assert len({block.stat().st_ino for block in blocks[:-1]}) == 1 < len(blocks) - 1


def test_a_half_made_cache_of_overwritten_files_begins_anew(tmp_path: Path) -> None:
    folder, cache = bitmaps(tmp_path / "images", 0), tmp_path / "cache"
    encoded(folder, cache)
    stale = (cache / "train" / "block_00000.npy").read_bytes()
    manifest = json.loads((cache / "manifest.json").read_text())
    request = {k: v for k, v in manifest.items() if k not in ("counts", "mean", "std", "low", "high")}
    (cache / "manifest.json").unlink()
    (cache / "request.json").write_text(json.dumps(request))
    cache.rename(cache.with_name("cache.partial"))
    bitmaps(folder, 1)
    encoded(folder, cache)
    assert (cache / "train" / "block_00000.npy").read_bytes() != stale


def test_another_decoder_is_noticed_where_it_matters_and_stops_no_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plain, wide = bitmaps(tmp_path / "plain", 0), bitmaps(tmp_path / "wide", 0, icc_profile=display_p3())
    for folder in (plain, wide):
        encoded(folder, tmp_path / f"{folder.name}_cache")
        known = without_files(tmp_path / f"{folder.name}_cache")
        assert known["decoder"] == 2
        os.utime(tmp_path / f"{folder.name}_cache" / "manifest.json", ns=(2 * 10**18, 2 * 10**18))
    encoded(plain, tmp_path / "plain_cache")
    with pytest.raises(UserError, match="an earlier version of the decoder, and 12 of its images look different"):
        encoded(wide, tmp_path / "wide_cache")
    run, manifest = tmp_path / "run", json.loads((tmp_path / "wide_cache" / "manifest.json").read_text())
    run.mkdir()
    facts = {key: value for key, value in manifest.items() if key != "counts"}
    (run / "data.json").write_text(json.dumps({"latents": facts}))
    assert encoded(wide, tmp_path / "wide_cache", run_dir=run).facts == facts
    assert "the run goes on with it" in capsys.readouterr().out
    (run / "data.json").write_text(json.dumps({"latents": {**facts, "mean": [9.0] * 4}}))
    with pytest.raises(UserError, match="earlier version of the decoder"):
        encoded(wide, tmp_path / "wide_cache", run_dir=run)


def test_statistics_of_a_cache_that_is_made_again_agree_to_rounding() -> None:
    facts = {"pictures": "p", "mean": [0.5, 0.0], "std": [2.0, 1.0], "low": [-3.0, -3.0], "high": [3.0, 4.0]}
    assert same_latents(facts, facts) and same_latents(None, None) and not same_latents(None, facts)
    assert same_latents(facts, {**facts, "mean": [0.50001, 1e-6], "high": [3.0001, 4.0]})
    assert not same_latents(facts, {**facts, "mean": [0.51, 0.0]})
    assert not same_latents(facts, {**facts, "pictures": "q"})
    assert not same_latents(facts, {**facts, "std": [2.0]})


def test_features_of_overwritten_files_are_made_again(tmp_path: Path) -> None:
    folder, network = bitmaps(tmp_path / "images", 0), open_features("random")
    one = real_features(network, opened(folder), IMAGE)
    assert np.array_equal(real_features(network, opened(folder), IMAGE), one)
    bitmaps(folder, 1)
    assert np.abs(real_features(network, opened(folder), IMAGE) - one).max() > 1e-3


def test_a_packed_set_that_was_packed_again_is_another(tmp_path: Path) -> None:
    folder, out = bitmaps(tmp_path / "images", 0), tmp_path / "packed"

    def packed() -> ImageSet:
        return open_sources(PackedSource(source="packed", path=str(out)))

    pack(opened(folder), out, size=16, channels=3)
    one = packed()
    latents_of(autoencoder(), ImageDensity(one, None, IMAGE), tmp_path / "cache", Accelerator(cpu=True), batch_size=4)
    out.rename(tmp_path / "first")
    bitmaps(folder, 1)
    pack(opened(folder), out, size=16, channels=3)
    assert packed().fingerprint == one.fingerprint and packed().state != one.state
    with pytest.raises(UserError, match="was made of other images"):
        latents_of(autoencoder(), ImageDensity(packed(), None, IMAGE), tmp_path / "cache", Accelerator(cpu=True), batch_size=4)


def test_half_packed_images_that_were_overwritten_are_packed_anew(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder, out = bitmaps(tmp_path / "images", 0), tmp_path / "packed"
    monkeypatch.setattr("src.data.packing.BLOCK", 4)
    image_set, load = opened(folder), type(opened(folder).parts[0]).load

    def fail(self: Any, index: int, **options: Any) -> Any:
        if index == 6:
            raise OSError("killed")
        return load(self, index, **options)

    with monkeypatch.context() as patch:
        patch.setattr(type(image_set.parts[0]), "load", fail)
        with pytest.raises(UserError, match="packing into"):
            pack(image_set, out, size=16, channels=3)
    assert (tmp_path / "packed.partial" / "records.bin").stat().st_size == 4 * 40
    bitmaps(folder, 1)
    pack(opened(folder), out, size=16, channels=3)
    packed = open_sources(PackedSource(source="packed", path=str(out)))
    assert np.array_equal(packed.parts[0].load(0, channels=3), opened(folder).parts[0].load(0, channels=3))


def test_a_folder_of_another_machine_has_the_same_fingerprint(tmp_path: Path) -> None:
    one, other = bitmaps(tmp_path / "one", 0), bitmaps(tmp_path / "other", 0)
    touch(other)
    assert opened(one).fingerprint == opened(other).fingerprint and opened(one).state != opened(other).state


@pytest.fixture(autouse=True)
def single_thread() -> None:
    torch.set_num_threads(1)


def test_pairs_of_a_source_that_was_overwritten_are_refused(tmp_path: Path) -> None:
    source = bitmaps(tmp_path / "source", 0, side=12)
    quick = ["steps=1", "log.trackers=[]", "preview.num_samples=1", "preview.every=1", "held_out=0", "batch_size=4"]
    quick += ["micro_batch_size=4", "data.count=8", "source.source=folder", f"source.path={source}"]
    sets = [word for one in quick for word in ("--set", one)]
    run_here("train_iadb", "-cfg", "configs/smoke/iadb.json", "--run-dir", tmp_path / "base", *sets)
    pairs = json.dumps({"run": str(tmp_path / "base"), "count": 8, "sampler": {"solver": "euler", "steps": 1}})
    command = ["train_iadb", "-cfg", "configs/smoke/iadb.json", *sets, "--set", f"pairs={pairs}", "--run-dir"]
    run_here(*command, tmp_path / "one")
    touch(source)
    run_here(*command, tmp_path / "two")
    bitmaps(source, 1, side=12)
    assert "was made from other source images" in refused(*command, tmp_path / "three")
    assert "pairs" in json.loads((tmp_path / "two" / "data.json").read_text())
    warning = "warning: 12 of 20 images are enlarged: their shorter side is below image.size 16 (the smallest: 12 px)"
    assert warning in (tmp_path / "one" / "log.txt").read_text(), "of the source, too"
