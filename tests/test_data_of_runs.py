"""What a run says of its data, and that it goes on with the same data alone: in time, and on all ranks."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import ddpm_accelerate
import train_classifier
import train_vae
from src.config import UserError, load, validate
from src.data import open_sources
from src.data.conditions import GreyCondition, LowCondition, channel_names
from src.data.sources import FolderSource
from src.models import build_model
from src.runs import opened, starting
from src.runs.opened import Run, open_trained
from src.training.run_directory import RunDirectory, check_ranks, classes_differ
from tests.conftest import ROOT, SMOKE, Finished, launch, one_line, randomise, run_in_process

SHORT = ("steps=1", "preview.every=1", "preview.num_samples=1", "preview.quality=null", "preview.sampler.steps=1", "held_out=0")


def images(root: Path, *names: str) -> Path:
    for i, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16), (i * 30 % 256, 90, 10)).save(root / name)
    return root


def train(run: Path, data: object, *arguments: str, dry: bool = False) -> Finished:
    changes = [*SHORT, f"data={json.dumps(data)}", "log.trackers=[]", "micro_batch_size=16", "preview.sheets=class", *arguments]
    words = [word for change in changes for word in ("--set", change)]
    return run_in_process("ddpm_accelerate.py", "-cfg", SMOKE, "--run-dir", run, *words, *(["--dry-run"] if dry else []))


def test_a_run_says_what_it_leaves_aside_and_goes_on_with_the_same_images_alone(tmp_path: Path) -> None:
    data = images(tmp_path / "data", *(f"images/{i}.png" for i in range(8)))
    for i in range(3):
        (data / "images" / f"IMG_{i}.CR3").write_bytes(b"raw")
    (data / "labels").mkdir()
    (data / "labels" / "0.txt").write_text("0 1 1")
    spec = {"source": "folder", "path": str(data)}
    done = train(tmp_path / "run", spec)
    assert done.status == 0, done.all
    first = done.out[: done.out.index("a step is")]
    assert "8 images in no classes (0 held out; left out: 3 .cr3 (to read them: pip install rawpy))" in first
    assert first.count("the folders labels beside the images are left aside") == 1
    dry = train(tmp_path / "dry", spec, dry=True)
    assert "left out: 3 .cr3" in dry.out and "folders labels beside" in dry.out and not (tmp_path / "dry").exists()
    skipped = json.loads((tmp_path / "run" / "skipped.json").read_text())
    assert skipped == [{"name": f"images/IMG_{i}.CR3", "reason": ".cr3 (to read them: pip install rawpy)"} for i in range(3)]

    images(data, "images/new.avif")
    done = train(tmp_path / "run", spec)
    message = one_line(done)
    assert "was trained on 8 other images (now 9); bring them back" in message
    assert "1 .avif files are among them, which were not read when the run was started: move them out of the folder" in message
    (data / "images" / "new.avif").rename(tmp_path / "new.avif")
    images(data, "images/new.png")
    assert "were not read" not in one_line(train(tmp_path / "run", spec, "steps=2"))


def test_one_class_and_captions_as_classes_are_remarked_on(tmp_path: Path) -> None:
    names = [f"a cat that sits on the {i}th of many mats, {'and purrs, ' * 40}".rstrip() for i in range(6)]
    rows = "".join(f"{i}.png\t{name}\n" for i, name in enumerate(names))
    data = images(tmp_path / "data", *(f"{i}.png" for i in range(6)))
    (tmp_path / "captions.tsv").write_text(f"file\tcaption\n{rows}")
    table = {"file": str(tmp_path / "captions.tsv"), "label_column": "caption"}
    done = train(tmp_path / "run", {"source": "folder", "path": str(data), "labels": table})
    assert done.status == 0, done.all
    assert "there are 6 classes for 6 images" in done.out
    sheets = sorted((tmp_path / "run" / "samples").rglob("*.png"))
    assert len(sheets) == 6 and all(len(os.fsencode(sheet.name)) < 150 for sheet in sheets)
    assert open_trained(tmp_path / "run", "cpu").labels(names[2], 1) == [2]  # pyright: ignore[reportArgumentType]
    (tmp_path / "captions.tsv").write_text("file\tcaption\n" + "".join(f"{i}.png\tcat\n" for i in range(6)))
    done = train(tmp_path / "one", {"source": "folder", "path": str(data), "labels": table})
    assert "all images with a class have the same one, 'cat'" in done.out


# ---------------------------------------------------------------------------------------------- classes on resume


def facts(*names: str, fingerprint: str = "f", **changes: object) -> dict[str, Any]:
    counts = dict.fromkeys(names, 5)
    known = {"class_names": list(names), "counts": counts, "images": 5 * len(names), "fingerprint": fingerprint, "endings": {}}
    return known | changes


def adopt(tmp_path: Path, before: dict[str, Any], now: dict[str, Any], **options: bool) -> str:
    for name, document in (("data", before), ("progress", {"step": 7})):
        (tmp_path / f"{name}.json").write_text(json.dumps(document))
    run = RunDirectory(tmp_path / "run", writes=False)
    try:
        assert run.adopt_progress(tmp_path, now, **options) == {"step": 7}
    except UserError as error:
        return str(error)
    return ""


def test_classes_are_compared_on_resume(tmp_path: Path) -> None:
    before = facts("1", "001", "b")
    message = adopt(tmp_path, before, facts("001", "1", "b"))
    assert "was trained on other classes (the same ones in another order: 001, 1, b, where it was 1, 001, b)" in message
    assert "(b missing, c new)" in adopt(tmp_path, before, facts("1", "001", "c"))
    assert adopt(tmp_path, before, facts("1", "001", "b")) == ""
    assert adopt(tmp_path, facts("caf\u00e9"), facts("cafe\u0301")) == "", "macOS wrote the name"
    assert adopt(tmp_path, before, facts("001", "1", "b"), classes=False) == "", "an autoencoder has no classes"
    message = adopt(tmp_path, before, facts("1", "001", "c", fingerprint="g"))
    assert "15 other images (now 15)" in message and "its classes differ, too: b missing, c new" in message
    message = adopt(tmp_path, facts("caf\u00e9"), facts("cafe\u0301", fingerprint="g"))
    assert "in another Unicode form" in message
    assert "as many as before, so names or sizes" in adopt(tmp_path, before, facts("1", "001", "b", fingerprint="g"))
    del before["endings"]  # of a run that an earlier version started
    assert adopt(tmp_path, before, facts("1", "001", "b")) == ""
    now = facts("1", "001", "b", fingerprint="g", endings={".png": 13, ".webp": 1, ".jp2": 1})
    assert "1 .jp2 files are among them" in adopt(tmp_path, before, now)


def test_who_learns_classes() -> None:
    smoke = load(ROOT / SMOKE, ddpm_accelerate.Config)
    assert smoke.uses_classes
    assert not load(ROOT / SMOKE, ddpm_accelerate.Config, ["class_conditional=false"]).uses_classes
    assert load(ROOT / SMOKE, ddpm_accelerate.Config, ["class_conditional=false", "balance_classes=true"]).uses_classes
    assert not load(ROOT / "configs/smoke/vae.json", train_vae.Config).uses_classes
    assert load(ROOT / "configs/smoke/classifier.json", train_classifier.Config).uses_classes


# ---------------------------------------------------------------------------------------------- classes of two runs

NFC, NFD = ("cafz", "caf\u00e9", "tea"), ("cafe\u0301", "cafz", "tea")  # each as it is sorted


def test_data_in_another_spelling_gets_the_labels_of_the_run(tmp_path: Path) -> None:
    data = open_sources(
        validate(FolderSource, {"source": "folder", "path": str(images(tmp_path, *(f"{n}/0.png" for n in NFD)))})
    )
    assert data.class_names == NFD and data.labels.tolist() == [0, 1, 2]
    run: Any = SimpleNamespace(num_classes=3, class_names=NFC, path="runs/x")
    Run.check_classes(run, data)
    assert data.class_names == NFC and data.labels.tolist() == [1, 0, 2]
    run.class_names = ("cafz", "coffee", "tea")
    with pytest.raises(UserError, match="the data has other classes"):
        Run.check_classes(run, data)


def test_a_run_starts_from_the_classes_of_another_spelling(monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load(ROOT / SMOKE, ddpm_accelerate.Config)
    before, after, other = (randomise(build_model(cfg.model, (3, 16, 16), 3)) for _ in range(3))
    monkeypatch.setattr(starting, "open_run", lambda *_: SimpleNamespace(network=before, class_names=NFC, step=7))
    rows = before.get_parameter("label_embedding.weight").detach().clone()
    with torch.no_grad():
        after.get_parameter("label_embedding.weight").zero_()
        other.get_parameter("label_embedding.weight").zero_()
    assert "its classes are others" not in starting.start_from("x", NFD, after)
    assert torch.equal(after.get_parameter("label_embedding.weight"), rows[[1, 0, 2, 3]])
    assert "its classes are others" in starting.start_from("x", ("cafz", "coffee", "tea"), other)
    assert not other.get_parameter("label_embedding.weight").any()


@pytest.mark.parametrize("patch", [1, 2])
def test_a_run_starts_from_a_run_with_another_condition(patch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Channels that both have keep their weights; new ones are 0, so nothing changes whatever they hold."""
    cfg = load(ROOT / SMOKE, ddpm_accelerate.Config)
    model, x, t = replace(cfg.model, patch=patch), torch.randn(2, 3, 16, 16), torch.tensor([3.0, 40.0])
    grey = [*channel_names(GreyCondition(kind="grey"), 3)]
    noisy = channel_names(LowCondition(kind="low", size=8, noise=0.5), 3)
    low, imported = channel_names(LowCondition(kind="low", size=8), 3), channel_names(LowCondition(kind="low", size=8), 3)[:-1]

    def network_of(names: list[str]) -> Any:
        return randomise(build_model(model, (3, 16, 16), condition_channels=len(names))).eval()

    def started(before: list[str], now: list[str]) -> tuple[Any, Any, str]:
        old, new = network_of(before), network_of(now)
        run = object.__new__(opened.Opened)
        facts = {"network": old, "class_names": (), "step": 7, "shape": (3, 16, 16)}
        for name, value in facts.items():
            object.__setattr__(run, name, value)
        monkeypatch.setattr(opened.Opened, "condition_names", before)
        monkeypatch.setattr(starting, "open_run", lambda *_: run)
        return old, new, starting.start_from("x", (), new, condition=now)

    condition = torch.randn(2, 3, 16, 16)
    old, new, notice = started([], noisy)
    assert notice.endswith("its input has zeros for 5 new channels of the condition")
    torch.testing.assert_close(new(x, t, condition=torch.randn(2, 5, 16, 16)), old(x, t), rtol=0, atol=1e-6)
    old, new, notice = started(imported, noisy)
    assert "zeros for 2 new channels" in notice and "left out" not in notice
    extended = torch.cat([condition, torch.randn(2, 2, 16, 16)], dim=1)
    torch.testing.assert_close(new(x, t, condition=extended), old(x, t, condition=condition), rtol=0, atol=1e-6)
    old, new, notice = started(noisy, low)
    assert "zeros" not in notice and "1 channels of its condition are left out" in notice
    without, flag = torch.cat([condition, torch.zeros(2, 1, 16, 16)], dim=1), torch.ones(2, 1, 16, 16)
    torch.testing.assert_close(
        new(x, t, condition=torch.cat([condition, flag], dim=1)), old(x, t, condition=torch.cat([without, flag], dim=1)),
        rtol=0, atol=1e-5,
    )  # fmt: skip
    old, new, notice = started(grey, [])
    assert "2 channels of its condition are left out" in notice
    torch.testing.assert_close(new(x, t), old(x, t, condition=torch.zeros(2, 2, 16, 16)), rtol=0, atol=1e-6)
    old, new, notice = started(low, low)
    assert "condition" not in notice and torch.equal(new.stem.weight, old.stem.weight)


# ---------------------------------------------------------------------------------------------- ranks


def test_ranks_that_see_other_data_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    others: list[Any] = []
    monkeypatch.setattr("accelerate.utils.gather_object", lambda gathered: [*gathered, *others])
    own_facts = facts("1", "001")
    check_ranks(own_facts)

    def gathered_part(other: dict[str, Any]) -> tuple[Any, int]:
        caught = list[Any]()
        with monkeypatch.context() as patch:
            patch.setattr("accelerate.utils.gather_object", lambda one: caught.append(one[0]) or one)
            check_ranks(other)
        return caught[0]

    others[:] = [gathered_part(own_facts), gathered_part(facts("001", "1"))]
    with pytest.raises(UserError, match=r"rank 2 sees other classes .* than rank 0 \(the same ones in another order"):
        check_ranks(own_facts)
    others[:] = [gathered_part(facts("1", "001", fingerprint="g", images=9))]
    with pytest.raises(UserError, match=r"rank 1 sees other images .* \(10 images on rank 0, 9 there\)"):
        check_ranks(own_facts)
    others[:] = [gathered_part(own_facts | {"source": {"fingerprint": "s"}})]
    with pytest.raises(UserError, match="rank 1 sees other images"):
        check_ranks(own_facts)
    assert classes_differ(["a"], ["a"]) == ""


def test_two_processes_with_other_data(tmp_path: Path) -> None:
    """Each process stands in a folder of its own, where `data` is another."""
    images(tmp_path / "0", *(f"data/{name}/{i}.png" for name in "ab" for i in range(4)))
    images(tmp_path / "1", *(f"data/{name}/{i}.png" for name in "ac" for i in range(4)))
    script = tmp_path / "apart.py"
    lines = [
        "import os, runpy, sys",
        f"sys.path.insert(0, {str(ROOT)!r})",
        f"os.chdir(os.path.join({str(tmp_path)!r}, os.environ['RANK']))",
        "sys.argv[0] = 'ddpm_accelerate.py'",
        f"runpy.run_path({str(ROOT / 'ddpm_accelerate.py')!r}, run_name='__main__')",
    ]
    script.write_text("\n".join(lines))
    data = json.dumps({"source": "folder", "path": "data"})
    words = ["--set", f"data={data}", "--set", "preview.quality=null", "--set", "held_out=0"]
    done = launch(script, "-cfg", ROOT / SMOKE, "--run-dir", tmp_path / "run", *words, processes=2)
    assert "rank 1 sees other classes of the data than rank 0 (b missing, c new)" in done.err, done.all
    assert done.status != 0 and not (tmp_path / "run").exists() and "Traceback (most recent" not in done.out
