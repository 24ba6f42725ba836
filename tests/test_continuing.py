"""--continue-as: a new run that keeps all of an old one's state, under another config; and what is refused."""

import hashlib
import importlib
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from src.config import load
from src.runtime.checkpoint import newest, read_tensors, verify_checkpoint
from src.training import dry_run, uploads
from src.training.changed_config import cannot_change, images_seen
from src.training.rehearsal import compare_checkpoints
from tests.conftest import ROOT, launch, metrics, one_line, refused, run_in_process

CONSTANT = ("optimizer.schedule.kind=constant", "checkpoint.every=1000", "preview.quality=null", "preview.num_samples=1")
SCRIPT, SMOKE = "ddpm_accelerate", ROOT / "configs/smoke/ddpm.json"


def words(run: Path, *changes: str, config: Path = SMOKE) -> list[str]:
    return ["-cfg", str(config), "--run-dir", str(run), *(word for change in changes for word in ("--set", change))]


def train(run: Path, *changes: str, script: str = SCRIPT, config: Path = SMOKE, new: str | None = None) -> str:
    arguments = ["--continue-as", new] if new is not None else []
    done = run_in_process(f"{script}.py", *words(run, *changes, config=config), *arguments)
    assert done.status == 0, done.all
    return done.out


def content(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def last(run: Path) -> Path:
    checkpoint, passed = newest(run / "checkpoints")
    assert checkpoint is not None and not passed
    return checkpoint


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`old`, of 6 steps at a constant rate, and `long`, the same of 9; read only."""
    folder = tmp_path_factory.mktemp("continuing")
    for name, steps in (("old", 6), ("long", 9)):
        train(folder / name, f"steps={steps}", *CONSTANT)
    return folder


@pytest.fixture
def old(runs: Path, tmp_path: Path) -> Path:
    shutil.copytree(runs / "old", tmp_path / "old")
    return tmp_path / "old"


def test_a_longer_run_is_to_the_bit_what_the_plain_one_is(runs: Path, old: Path) -> None:
    before = content(old)
    out = train(old, "steps=9", *CONSTANT, new="new")
    new = old.with_name("new")
    assert f"{new} goes on from {old} at step 6, with another steps (6 -> 9)" in out and "going on at step 6 of 9" in out
    assert content(old) == before and verify_checkpoint(new / "final") is None
    differences, count = compare_checkpoints(last(new), last(runs / "long"))
    assert count > 100 and [line for line in differences if "best" not in line] == ["progress.json: continued differs"]
    assert {"step": 6, "run": str(old), "images_ahead": 0, "changed": {"steps": [6, 9]}} == json.loads(
        (new / "data.json").read_text()
    )["continued"][0]
    for place in (last(new), new / "final"):
        assert json.loads((place / "data.json").read_text())["continued"][0]["run"] == str(old)
    assert "continued from" in (new / "report.html").read_text() and f"goes on from {old}" in (new / "log.txt").read_text()
    assert [line["step"] for line in metrics(new)] == [line["step"] for line in metrics(old)] + [9]
    assert (new / "contact_sheet.png").exists() and not list(new.glob(".continuing"))
    assert sorted(path.name for path in old.parent.iterdir()) == ["new", "old"]

    out = train(old, "steps=9", *CONSTANT, new="new")  # the same command again
    assert f"{new} is finished (9 steps)" in out
    out = train(new, "steps=10", *CONSTANT, new="third")
    origins = json.loads((old.with_name("third") / "data.json").read_text())["continued"]
    assert [(entry["run"], entry["step"]) for entry in origins] == [(str(old), 6), (str(new), 9)]


def test_another_rate_schedule_and_average_hold_from_there_on(old: Path) -> None:
    changes = ["steps=8", *CONSTANT[1:], "optimizer.lr=5e-4", "optimizer.betas=[0.8, 0.99]", "ema.half_life_images=50"]
    changes += [
        "noise.candidates=2",
        "optimizer.schedule.kind=linear",
        "label_dropout=0.3",
        'times={"kind": "logit_normal"}',
        "log.every=1",
    ]
    train(old, *changes, new="new")
    new = old.with_name("new")
    rates = {line["step"]: line["lr"] for line in metrics(new) if "lr" in line}
    assert rates[7] == pytest.approx(5e-4 * (1 - 6 / 8)) and rates[8] == pytest.approx(5e-4 * (1 - 7 / 8))
    states = [read_tensors(last(run), "optimizer") for run in (old, new)]
    key = next(key for key in states[0] if key.endswith("/step"))
    assert (float(states[0][key]), float(states[1][key])) == (6, 8), "moments went on"
    changed_keys = json.loads((new / "data.json").read_text())["continued"][0]["changed"]
    assert changed_keys["optimizer.lr"] == [1e-3, 5e-4] and changed_keys["optimizer.betas"] == [[0.9, 0.999], [0.8, 0.99]]
    assert json.loads((last(new) / "config.json").read_text())["optimizer"]["lr"] == 5e-4


def test_interrupted_before_its_first_checkpoint_the_same_command_works(
    old: Path, runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ddpm_accelerate

    original = ddpm_accelerate.update

    def broken(*_: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(ddpm_accelerate, "update", broken)
    with pytest.raises(KeyboardInterrupt):
        train(old, "steps=9", *CONSTANT, new="new")
    new = old.with_name("new")
    assert last(new).name == "step_00000006"
    monkeypatch.setattr(ddpm_accelerate, "update", original)
    train(old, "steps=9", *CONSTANT, new="new")
    assert [
        line for line in compare_checkpoints(last(new), last(runs / "long"))[0] if "tensor" in line or ":" not in line
    ] == []


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        (["steps=9", "model.base_channels=32"], "has another model.base_channels"),
        (["steps=9", "process.target=v"], "has another process.target"),
        (["steps=9", "seed=3"], "has another seed"),
        (["steps=9", "balance_classes=true"], "has another balance_classes"),
        (["steps=9", "optimizer.muon={}"], "has another optimizer.muon"),
        (["steps=9", 'ema.snapshot_every={"steps": 3}'], "has another ema.snapshot_every"),
        (["steps=9", 'times={"kind": "second_moment"}'], "has another times"),
        (["steps=9", "data.count=64"], "has another data.count"),
        (["steps=6"], "has 6 steps, and this config asks for 6: there is nothing to go on to; set more steps"),
        (["steps=4"], "has 6 steps, and this config asks for 4"),
    ],
)
def test_what_is_refused(changes: list[str], expected: str, old: Path) -> None:
    before = content(old)
    message = refused(SCRIPT, *words(old, *CONSTANT, *changes), "--continue-as", "new")
    assert expected in message and str(old) in message
    assert content(old) == before and [path.name for path in old.parent.iterdir()] == ["old"], "nothing is left"


def test_names_and_places_that_are_refused(old: Path, tmp_path: Path) -> None:
    fine = words(old, "steps=9", *CONSTANT)
    assert "is the old run itself" in refused(SCRIPT, *fine, "--continue-as", "old")
    for name in ("..", "", ".", "%d", "a\nb", "x" * 300):
        assert "a run's name has up to 200 letters" in refused(SCRIPT, *fine, f"--continue-as={name}")
    assert "two things" in refused(SCRIPT, *fine, "--continue-as", "new", "--verify-resume")
    nothing = refused(SCRIPT, *words(tmp_path / "none", "steps=9"), "--continue-as", "new")
    assert "none has no checkpoint to go on from" in nothing and "--run-dir" in nothing
    shutil.copytree(old, tmp_path / "another")
    assert "another is there already, and does not go on from" in refused(SCRIPT, *fine, "--continue-as", "another")
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "letter.txt").write_text("dear")
    assert "mine is there already" in refused(SCRIPT, *fine, "--continue-as", "mine")
    assert (tmp_path / "mine" / "letter.txt").read_text() == "dear"
    (last(old) / "ema.safetensors").write_bytes(b"")
    assert "ema.safetensors has 0 bytes" in refused(SCRIPT, *fine, "--continue-as", "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["another", "mine", "old"]


def test_other_data_is_refused_when_it_is_looked_at(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of which the config says nothing: files may change behind it."""
    from src.runs import densities

    original = densities.describe_data
    monkeypatch.setattr(densities, "describe_data", lambda *sets: original(*sets) | {"fingerprint": "another"})
    message = refused(SCRIPT, *words(old, "steps=9", *CONSTANT), "--continue-as", "new")
    assert f"{old} was trained on" in message and "other images" in message and "new" not in message.split("(now")[0]
    assert [path.name for path in old.parent.iterdir()] == ["old"]


def test_a_plain_resume_names_the_ways_on(old: Path) -> None:
    for change in ("optimizer.lr=5e-4", "optimizer.schedule.kind=linear"):
        message = refused(SCRIPT, *words(old, *CONSTANT, change, "steps=6"))
        assert "was started with another optimizer." in message and "--continue-as NAME" in message and "init_from" in message
    message = refused(SCRIPT, *words(old, *CONSTANT[1:], "steps=9", "optimizer.schedule.kind=cosine"))
    assert "steps" in message and "--continue-as NAME" in message
    message = refused(SCRIPT, *words(old, *CONSTANT, "seed=3", "steps=6"))
    assert "another seed" in message and "init_from" in message and "--continue-as" not in message


def test_a_dry_run_says_what_is_left(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dry_run, "ENOUGH_SECONDS", 0.0)
    done = run_in_process(f"{SCRIPT}.py", *words(old, "steps=26", *CONSTANT), "--continue-as", "new", "--dry-run")
    assert done.status == 0 and "steps        20 of 16 images" in done.out, done.all
    assert [path.name for path in old.parent.iterdir()] == ["old"]
    assert "has another seed" in refused(SCRIPT, *words(old, "seed=2", *CONSTANT), "--continue-as", "new", "--dry-run")


def stages(*lengths: int, weight: float = 0.1, **options: Any) -> str:
    stage_list = [{"steps": steps, "adversarial": {"weight": weight}, **options} for steps in lengths]
    return f"stages={json.dumps(stage_list)}"


@pytest.mark.soak
def test_stages_go_on(tmp_path: Path) -> None:
    vae: dict[str, Any] = {"script": "train_vae", "config": ROOT / "configs/smoke/vae.json"}
    same = ("optimizer.schedule.kind=constant", "preview.num_measured=4", "preview.every=2", "guard.rollback=true")
    train(tmp_path / "old", stages(3, 2), *same, **vae)
    train(tmp_path / "long", stages(3, 4), *same, **vae)
    train(tmp_path / "old", stages(3, 4), *same, **vae, new="new")
    assert json.loads((last(tmp_path / "new") / "progress.json").read_text())["guard"]["stage"] == 2
    states = [read_tensors(last(tmp_path / name), "discriminator") for name in ("new", "long")]
    assert all(torch.equal(states[0][key], states[1][key]) for key in states[1])
    other = (stages(4, 2, 1, batch_size=4, weight=0.2), *same, "micro_batch_size=null", "discriminator_optimizer.lr=1e-5")
    out = train(tmp_path / "old", *other, **vae, new="smaller")
    assert "stages" in out and "stage 2 of 3: steps 4 to 6" in out and "a step is 4 images" in out
    last_metrics = metrics(tmp_path / "smaller")[-1]
    assert (last_metrics["step"], round(last_metrics["epoch"] * 114)) == (7, 5 * 16 + 2 * 4), (
        "five steps of 16 images, and two of 4"
    )


def test_the_images_seen_by_stages() -> None:
    two = 'stages=[{"steps": {"epochs": 1}, "batch_size": null}, {"steps": 3, "batch_size": 2}]'
    vae, small = importlib.import_module("train_vae").Config, ["batch_size=4", "micro_batch_size=null"]
    cfg = load(ROOT / "configs/smoke/vae.json", vae, [two, *small])
    assert [images_seen(cfg, step, 10) for step in (0, 2, 3, 4, 6, 9)] == [0, 8, 12, 14, 18, 24]
    assert images_seen(load(SMOKE, importlib.import_module(SCRIPT).Config, small), 5, 10) == 20


def test_another_batch_takes_the_next_images(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place in the stream is counted in images, through two changes and a stop."""
    from src.training import inputs

    starts, original = list[int](), inputs.stream

    def watched(*args: Any, start_step: int, **options: Any) -> Any:
        starts.append(args[1].plan.positions(start_step, 0).start)
        return original(*args, start_step=start_step, **options)

    monkeypatch.setattr(inputs, "stream", watched)
    smaller = (*CONSTANT, "batch_size=8")
    train(old, "steps=8", *smaller, new="new")
    train(old.with_name("new"), "steps=9", *smaller)  # a plain longer run of it
    train(old.with_name("new"), "steps=10", *CONSTANT, "batch_size=32", new="third")
    assert starts == [6 * 16, 6 * 16 + 2 * 8, 6 * 16 + 3 * 8]
    images = metrics(old.with_name("third"))[-1]["epoch"] * json.loads((old / "data.json").read_text())["images"]
    assert round(images) == 6 * 16 + 3 * 8 + 32
    origins = json.loads((last(old.with_name("third")) / "progress.json").read_text())["continued"]
    assert [entry["images_ahead"] for entry in origins] == [6 * 8, 6 * 16 + 3 * 8 - 9 * 32]


def test_what_of_two_configs_cannot_change() -> None:
    before = {
        "optimizer": {"muon": {"momentum": 0.9}},
        "ema": {"snapshot_every": 5},
        "times": {"kind": "second_moment", "history": 3},
    }
    after = {
        "optimizer": {"muon": {"momentum": 0.8}},
        "ema": {"snapshot_every": 7},
        "times": {"kind": "second_moment", "history": 4},
    }
    keys = ["optimizer.muon.momentum", "ema.snapshot_every", "times.history", "optimizers", "image.flip"]
    assert cannot_change(before, after, keys) == ["optimizers", "image.flip", "times.history"]
    assert cannot_change({}, {"optimizer": {"muon": {}}}, ["optimizer.muon"]) == ["optimizer.muon"]


def test_a_bucket_gives_the_new_run_or_else_the_old_one(old: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = list[tuple[str, bool]]()
    monkeypatch.setattr(uploads, "bring_back", lambda url, run, cfg=None: starts.append((run.name, cfg is not None)))
    cfg = load(SMOKE, importlib.import_module(SCRIPT).Config, ["bucket=gs://xyz"])
    uploads.bring(cfg, old.with_name("new"), old=old)
    assert starts == [("new", True), ("old", False)], "the old one may have another config"
    starts.clear()
    uploads.bring(cfg, old, old=old.with_name("before"))
    assert starts == [("old", True)], "it has begun"


def test_every_script_takes_it() -> None:
    for script in ("train_vae", "train_ldm", "ddpm_accelerate", "train_iadb", "train_classifier"):
        assert "--continue-as" in run_in_process(f"{script}.py", "--help").out


def test_latents_pairs_and_snapshots_come_along_without_being_copied(old: Path) -> None:
    """What lies beside the checkpoints of a run and belongs to them."""
    for name in (
        "latents/16px_x",
        "pairs/x",
        "autoencoder",
        "ema/step_00000004",
        "ema/step_00000099",
        "latents/16px_y.partial",
    ):
        (old / name).mkdir(parents=True)
        (old / name / "manifest.json").write_text("{}")
    train(old, "steps=7", *CONSTANT, new="new")
    new = old.with_name("new")
    assert [path.name for path in (new / "ema").iterdir()] == ["step_00000004"]
    assert (new / "latents" / "16px_x" / "manifest.json").samefile(old / "latents" / "16px_x" / "manifest.json")
    assert (new / "pairs" / "x" / "manifest.json").exists() and (new / "autoencoder" / "manifest.json").exists()
    assert not (new / "latents" / "16px_y.partial").exists()


@pytest.mark.soak
def test_it_goes_on_with_two_processes(old: Path, runs: Path) -> None:
    done = launch("ddpm_accelerate.py", *words(old, "steps=9", *CONSTANT), "--continue-as", "new", processes=2)
    assert done.status == 0 and "= 2 x cpu" in done.out, done.all
    differences = compare_checkpoints(last(old.with_name("new")), last(runs / "long"))[0]
    assert [line for line in differences if not line.startswith("progress.json")] == []
    done = launch("ddpm_accelerate.py", *words(old, "seed=9", *CONSTANT), "--continue-as", "more", processes=2)
    assert done.status != 0 and done.err.count("has another seed") == 1 and not old.with_name("more").exists()


def test_the_message_is_one_line(old: Path) -> None:
    done = run_in_process(f"{SCRIPT}.py", *words(old, "seed=9", *CONSTANT), "--continue-as", "new")
    assert one_line(done).startswith("error: --continue-as keeps network, data and their order")
