"""Previews on the page: spread over time and classes, made smaller where they are large, each encoded once."""

from pathlib import Path

import numpy as np
from PIL import Image

from src.report import samples
from src.report.report import make_report
from src.report.samples import find_samples, load_image, load_other_images, load_samples, spread
from tests.report.pages import Page, page_of, sheet


def test_many_previews_are_spread_over_time(run: Path) -> None:
    assert spread(40, 40) == list(range(40)) and spread(0, 40) == []
    assert spread(41, 40) == list(range(0, 41, 2)) and spread(42, 40) == [*range(0, 41, 2), 41]
    for count in range(1, 400):
        assert len(spread(count, 40)) <= 41 and spread(count, 40)[-1] == count - 1
    for step in range(1, 101):
        sheet(run / "samples" / f"step_{step:08d}.png", step, (4, 4))
    page = page_of(run)
    assert page.images == [f"step {step}" for step in (*range(1, 101, 4), 100)]
    assert "26 of 100 previews" in page.text()
    (slider,) = page.all("input")
    assert slider["max"] == slider["value"] == "25"


def test_a_sheet_for_each_class(run: Path) -> None:
    for step in (10, 20):
        for name in ("cat_10", "cat_9", "dog"):
            sheet(run / "samples" / f"step_{step:08d}" / f"sample_{name}_4x4.png")
    assert list(find_samples(run / "samples")[20]) == ["cat_10", "cat_9", "dog"]
    page = page_of(run)
    assert page.images == [f"{name} at step {step}" for step in (10, 20) for name in ("cat_9", "cat_10", "dog")]
    assert [option["value"] for option in page.all("option")] == ["all", "cat_9", "cat_10", "dog"]


def test_large_images_are_made_smaller_and_encoded_once(run: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (900, 900, 3), dtype=np.uint8)
    (run / "samples").mkdir()
    Image.fromarray(noise).save(run / "samples" / "step_00000010.png")
    few = Image.fromarray(noise[:, :, 0] // 64 * 64).convert("RGB")
    few.save(run / "contact_sheet.png", compress_level=0)
    samples.encode.cache_clear()
    first = make_report(run)
    assert len(first) < 700_000 and "1 images made smaller" in Page(first).text()
    by_name = {image["alt"]: str(image["src"]) for image in Page(first).all("img")}
    assert by_name["step 10"].startswith("data:image/jpeg") and by_name["contact_sheet.png"].startswith("data:image/")
    assert samples.encode.cache_info().misses == 2
    sheet(run / "samples" / "step_00000020.png")
    assert Page(make_report(run)).images[:2] == ["step 10", "step 20"]
    assert samples.encode.cache_info().misses == 3, "only what is new"


def test_images_of_a_page(tmp_path: Path) -> None:
    sheet(tmp_path / "contact_sheet.png", size=(900, 40))
    (tmp_path / "a.png").write_bytes(b"no image")
    contact_sheet, broken = load_other_images(tmp_path)
    assert broken is None and contact_sheet is not None and contact_sheet.name == "contact_sheet.png"
    loaded = load_image(tmp_path / "contact_sheet.png", 100_000, "cat", "cat at step 1")
    assert loaded is not None and loaded[:2] == ("cat", "cat at step 1") and loaded[3:] == (900, 40, False)
    sheet(tmp_path / "samples" / "step_00000010.png")
    (tmp_path / "samples" / "step_00000020.png").write_bytes(b"no image")
    previews = load_samples(tmp_path / "samples")
    assert [step for step, _ in previews.frames] == [10] and previews.names == [""] and previews.unreadable == 1
    assert previews.notes == ["1 of 2 previews"]
