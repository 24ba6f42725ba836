"""Images smaller than what is trained at: packed sets of them are refused, others counted, said, and left out where asked."""

import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from src.config import UserError, load, validate
from src.data import ImageSet, check_images, open_sources
from src.data.facts import count_small, describe_small, refuse_small_packs
from src.data.packing import pack
from src.data.scan import cache_folder
from src.data.sources import DatasetsSource, DigitsSource, FolderSource, PackedSource, ShapesSource
from tests.conftest import ROOT, refused, run_in_process

SIDES = [(40, 30), (64, 200), (90, 64), (20, 300), (100, 100)]  # shorter: 30, 64, 64, 20, 100


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "photos").mkdir()
    for i, side in enumerate(SIDES):
        Image.new("RGB", side, (40 * i, 90, 90)).save(tmp_path / "photos" / f"{i}.png")
    return tmp_path / "photos"


def folder(path: Path, **scan: Any) -> ImageSet:
    return open_sources(validate(FolderSource, {"source": "folder", "path": str(path), "scan": scan}))


def test_sides_are_known_and_remembered(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert folder(photos).sides.tolist() == [list(side) for side in SIDES]
    monkeypatch.setattr("src.data.scan.examine", lambda *_: pytest.fail("a file is read again"))
    assert folder(photos).sides.tolist() == [list(side) for side in SIDES]
    few = folder(photos, min_side=64, max_broken_fraction=0.0)
    assert few.names == ["1.png", "2.png", "4.png"] and few.sides.min() == 64
    assert few.parts[0].report.reasons == {"smaller than min_side": 2}
    with pytest.raises(UserError, match="no readable image is left.*smaller than min_side"):
        folder(photos, min_side=101)


def test_a_memory_without_sides_is_not_believed(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ATELIER_CACHE", str(tmp_path / "cache"))
    folder(photos)
    for path in (cache_folder() / "scans").glob("*.json"):
        path.write_text(json.dumps({name: fact[:3] for name, fact in json.loads(path.read_text()).items()}))
    assert folder(photos).sides.tolist() == [list(side) for side in SIDES]


def test_another_reader_looks_again_at_what_could_not_be_read(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (photos / "odd.png").write_bytes(b"of a format to come")
    assert folder(photos, max_broken_fraction=1.0).parts[0].report.reasons == {"not an image": 1}
    sizes: list[int] = []

    def recording_examine(_source: object, size: int, _spec: object) -> str:
        sizes.append(size)
        return "broken"

    monkeypatch.setattr("src.data.scan.examine", recording_examine)
    assert len(folder(photos, max_broken_fraction=1.0)) == 5 and not sizes
    monkeypatch.setattr("src.data.scan.reader", lambda: "a later Pillow")
    folder(photos, max_broken_fraction=1.0)
    assert sizes == [19]


def test_rows_of_datasets_have_sides_too(photos: Path, tmp_path: Path) -> None:
    import datasets

    paths = [str(photos / f"{i}.png") for i in range(len(SIDES))]
    rows = datasets.Dataset.from_dict({"image": [*paths, None]}).cast_column("image", datasets.Image())
    rows.save_to_disk(str(tmp_path / "rows"))
    image_set = open_sources(DatasetsSource(source="datasets", name=str(tmp_path / "rows"), scan=_scan(0.5)))
    assert image_set.sides.tolist() == [list(side) for side in SIDES]
    image_set = open_sources(DatasetsSource(source="datasets", name=str(tmp_path / "rows"), scan=_scan(0.5, min_side=65)))
    assert len(image_set) == 1


def _scan(broken: float, **options: Any) -> Any:
    return validate(FolderSource, {"source": "folder", "path": "x", "scan": {"max_broken_fraction": broken, **options}}).scan


def test_small_images_are_counted(photos: Path) -> None:
    image_set = folder(photos)
    assert count_small(64, image_set) == (2, 5, 20) and count_small(20, image_set) == (0, 5, 20)
    (line,) = describe_small({"image.size": 64, "stages.1.image_size": 20}, image_set)
    assert line.startswith("2 of 5 images are enlarged: their shorter side is below image.size 64 (the smallest: 20 px)")
    assert "--set data.scan.min_side=64" in line
    assert describe_small({"image.size": 64}, folder(photos, min_side=64)) == []


def test_what_is_small_by_nature_is_not_told_of() -> None:
    for source in (DigitsSource(source="digits"), ShapesSource(source="shapes", count=4, size=8)):
        assert describe_small({"image.size": 512}, open_sources(source)) == []


def test_a_packed_set_must_be_as_large_as_every_stage(photos: Path, tmp_path: Path) -> None:
    pack(folder(photos), tmp_path / "packed", size=32, channels=3)
    packed = open_sources(PackedSource(source="packed", path=str(tmp_path / "packed")))
    refuse_small_packs({"image.size": 32}, packed, None)
    with pytest.raises(UserError, match=r"packed holds images of 32 px, and stages\.3\.image_size is 64.*--size 64, or set"):
        refuse_small_packs({"image.size": 32, "stages.3.image_size": 64}, packed)
    with pytest.raises(UserError, match="holds images of 32 px"):
        refuse_small_packs({"image.size": 64}, folder(photos), packed)


@pytest.mark.parametrize("name", ["wikiart256_vae", "landscape256_vae"])
def test_every_stage_of_a_shipped_autoencoder_is_looked_at(name: str, photos: Path, tmp_path: Path) -> None:
    import train_vae

    pack(folder(photos), tmp_path / "packed", size=256, channels=3)
    cfg = load(ROOT / "configs" / f"{name}.json", train_vae.Config, ["data.source=packed", f"data.path={tmp_path}/packed"])
    packed = open_sources(cfg.data)
    with pytest.raises(UserError, match=r"stages\.3\.image_size is 512"):
        check_images(cfg, tmp_path / "run", packed)
    (tmp_path / "run" / "checkpoints" / "step_00000010").mkdir(parents=True)  # a run that began goes on, and is told
    (line,) = check_images(cfg, tmp_path / "run", packed)
    assert "5 of 5 images are enlarged" in line


def test_a_run_refuses_before_it_writes(photos: Path, tmp_path: Path) -> None:
    pack(folder(photos), tmp_path / "packed", size=8, channels=3)
    for script, config in (("train_vae", "vae"), ("ddpm_accelerate", "ddpm"), ("train_iadb", "iadb")):
        line = refused(
            script, "-cfg", f"configs/smoke/{config}.json", "--run-dir", tmp_path / "run", "--set", "data.source=packed",
            "--set", f"data.path={tmp_path}/packed", "--set", "held_out=0",
        )  # fmt: skip
        assert "holds images of 8 px" in line and not (tmp_path / "run").exists()


def test_check_and_pack_say_it(photos: Path, tmp_path: Path) -> None:
    out = run_in_process("prepare_data.py", "check", photos, "--size", "64").out
    assert "shorter sides of 20 to 100 px, half of them below 64" in out
    assert "warning: 2 of 5 images are enlarged" in out and "below --size 64" in out
    findings = json.loads(run_in_process("prepare_data.py", "check", photos, "--size", "64", "--json").out)
    assert findings["shorter_side"] == {"smallest": 20, "median": 64, "largest": 100} and findings["smaller"] == {"64": 2}
    assert json.loads(run_in_process("prepare_data.py", "check", photos, "--min-side", "64", "--json").out)["pictures"] == 3
    config = tmp_path / "config.json"
    raw = {"data": {"source": "folder", "path": str(photos)}, "image": {"size": 32}, "stages": [{}, {"image_size": 70}]}
    config.write_text(json.dumps(raw))
    out = run_in_process("prepare_data.py", "check", config).out
    assert "2 of 5 images are enlarged: their shorter side is below image.size 32" in out
    assert "4 of 5 images are enlarged: their shorter side is below stages.1.image_size 70" in out
    out = run_in_process("prepare_data.py", "pack", photos, "--size", "64", "--out", tmp_path / "packed").out
    assert "warning: 2 of 5 images are enlarged" in out and "--min-side 64" in out
    out = run_in_process("prepare_data.py", "pack", photos, "--size", "64", "--min-side", "64", "--out", tmp_path / "good").out
    assert "warning" not in out and "packed 3" in out
