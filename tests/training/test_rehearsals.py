"""What --dry-run and --verify-resume say: of a run that is as it should be, and of one that is not."""

import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import ddpm_accelerate
import train_vae
from src.config import UserError, load
from src.runtime.checkpoint import write_folder
from src.runtime.stream import plan_batch
from src.training.autoencoder_stages import plan_stages
from src.training.clock import Activity, Cadence, Clock
from src.training.dry_run import Costs, MeasuredStage, fitting, largest, planned_stages, rows_of, what_fits
from src.training.entry import run_training
from src.training.rehearsal import Rehearsal, compare_checkpoints, rehearsal_config
from src.training.run_mode import RunMode
from tests.conftest import ROOT, launch, run_in_process

EVERY = {"preview": 100, "save": 100, "export": 300, "quality": None, "snapshot": 500}
PLAN = plan_batch(16, 8, rank=0, world=1)


def config_of(**checkpoint: Any) -> Any:
    """What `rows_of` reads of a config."""
    return SimpleNamespace(checkpoint=SimpleNamespace(**{"keep": 3, "keep_best": False, "every_minutes": None, **checkpoint}))


def stage_of(name: str, steps: int, every: dict[str, int | None], *seconds: float) -> MeasuredStage:
    """A stage whose step, preview and checkpoint take so many `seconds`."""
    cadences = {word: Cadence(word, every.get(word)) for word in EVERY}
    return MeasuredStage(name, PLAN, 0, steps, cadences, *seconds)


def rows(cfg: Any, costs: Costs, tmp_path: Path) -> dict[str, str]:
    return dict(rows_of(cfg, costs, tmp_path / "run", 1.5))


def test_costs_are_steps_previews_checkpoints_and_what_comes_before(tmp_path: Path) -> None:
    first = stage_of("stage 1", 1000, {"preview": 100, "save": 200}, 0.02, 0.6, 0.4)
    second = stage_of("stage 2", 100, {}, 0.1, 0.2, 0.2)
    costs = Costs(
        [first, second], ahead_seconds=5.6, checkpoint_bytes=10**6, weights_bytes=2 * 10**5, preview_bytes=10**5, images=100
    )
    values = rows(config_of(), costs, tmp_path)
    assert values["time"] == "44 s", "5.6 s + 20 + 6 + 2, and 10 + 0.2 + 0.2"
    assert values["disk"].startswith("5.8 MB: 3 checkpoints of 1.0 MB (one more"), "and 1.1 MB of previews, 1.5 on the page"
    assert values["memory"] == "1.50 GB"
    assert values["images/s"] == "160.0" and values["stage 2"] == "100 of 16 images = 16.0 epochs"
    assert rows(config_of(every_minutes=0.016), costs, tmp_path)["time"] == "52 s", "20 by the clock, and 10, not 5 and 1"
    assert rows(config_of(keep=1, keep_best=True), costs, tmp_path)["disk"].startswith("4.8 MB: 2 checkpoints")


def test_costs_have_the_exports_which_a_rehearsal_does_not_write(tmp_path: Path) -> None:
    stage = stage_of("", 1000, EVERY)
    assert [stage.count(word) for word in ("export", "snapshot", "quality", "preview")] == [3, 2, 0, 10]
    disk = rows(config_of(), Costs([stage], checkpoint_bytes=10**6, weights_bytes=2 * 10**5, images=100), tmp_path)["disk"]
    assert disk.startswith("4.2 MB: 3 checkpoints")
    assert disk.endswith("previews, report, 3 exports of 0.2 MB, 2 snapshots for post-hoc averages of 0.2 MB")
    cfg = load("configs/landscape64_ddpm.json", ddpm_accelerate.Config)
    assert cfg.export_every is not None, "or there would be none to count"
    short = rehearsal_config(cfg)
    assert short.export_every is None and short.bucket is None and short.log.trackers == ()
    assert short.steps == cfg.steps and short.optimizer == cfg.optimizer, "so that the learning rates are the run's"


def test_the_clock_of_a_rehearsal_says_what_a_step_takes_without_previews() -> None:
    clock = Clock(0, 0, 64, shown=False)
    clock.readings.clear()
    clock.readings.extend([(0, 10.0), (4, 30.0), (8, 38.0), (12, 46.0), (16, 99.0)])
    clock.activities.extend(
        [Activity(8, "a preview", 4.0), Activity(12, "a preview", 3.0), Activity(12, "saving a checkpoint", 2.0)]
    )
    stage = stage_of("", 12, {})
    stage.measure(clock, 0, 12)
    assert (stage.step_seconds, stage.preview_seconds, stage.save_seconds) == (1.5, 4.0, 2.0)
    clock.close()


def test_what_is_left_of_a_run_with_stages() -> None:
    cfg = load("configs/smoke/vae.json", train_vae.Config)
    stages = list(planned_stages(cfg, 114, 1, {"step": 12}))
    assert [(stage.name, stage.first, stage.end) for stage in stages] == [
        ("stage 2 of 4", 12, 18),
        ("stage 3 of 4", 18, 26),
        ("stage 4 of 4", 26, 30),
    ]


def test_of_a_run_that_stop_shortened_as_much_is_left_as_it_decided() -> None:
    changes = ["steps=100", 'optimizer.schedule={"kind":"wsd","cooldown":0.5}', 'stop={"kind":"held_out","every":1}']
    cfg = load("configs/smoke/ddpm.json", ddpm_accelerate.Config, changes)
    saved = {"requested": 100, "total": 16, "start": 8, "before": 8}
    (stage,) = planned_stages(cfg, 114, 1, {"step": 9, "cooldown": saved})
    assert (stage.first, stage.end) == (9, 16)
    (stage,) = planned_stages(cfg, 114, 1, {})
    assert (stage.first, stage.end) == (0, 100)


def test_costs_warn_of_a_disk_that_is_too_small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    costs = Costs([stage_of("", 10, {}, 1)], checkpoint_bytes=10**9, images=100)
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=15 * 10**8))
    assert "1.0 GB: 1 checkpoints of 1.0 GB" in rows(config_of(), costs, tmp_path)["disk"]
    assert "ONLY 1.5 GB ARE FREE" in rows(config_of(), costs, tmp_path)["disk"]


@pytest.mark.parametrize("limit", range(14))
def test_the_largest_micro_batch_that_fits(limit: int) -> None:
    tried = list[int]()

    def fits(size: int) -> bool:
        tried.append(size)
        return size <= limit

    sizes = [1, 2, 3, 4, 6, 12]
    assert largest(sizes, fits) == max((size for size in sizes if size <= limit), default=None)
    assert len(tried) <= 3 and len(set(tried)) == len(tried), "each try takes seconds"


def test_micro_batches_are_tried_on_the_script_itself(tmp_path: Path) -> None:
    """It steps with so many images, leaves no trace, and runs out of memory above six."""
    cfg, sizes = load("configs/smoke/ddpm.json", ddpm_accelerate.Config, ["batch_size=24", "bucket=gs://x"]), list[int]()

    def train(cfg: Any, run_dir: Path, run_mode: RunMode, stop_at: int | None) -> int:
        assert not run_dir.exists() and run_mode.quiet and stop_at == 2 and cfg.bucket is None and cfg.log.trackers == ()
        run_dir.mkdir(parents=True)
        sizes.append(cfg.micro_batch_size)
        if cfg.micro_batch_size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0

    limit = 6
    assert what_fits(Rehearsal(train, tmp_path / "x", ""), cfg) == ["micro_batch_size up to 6"] and len(sizes) <= 4
    limit = 24
    assert what_fits(Rehearsal(train, tmp_path / "x", ""), cfg) == ["micro_batch_size up to 24 = batch_size"]
    limit = 0
    assert what_fits(Rehearsal(train, tmp_path / "x", ""), cfg)[0].startswith(
        "no micro_batch_size: out of memory with one image"
    )


def test_micro_batches_hold_whole_groups_of_a_contrast(tmp_path: Path) -> None:
    cfg, sizes = load("configs/smoke/ddpm.json", ddpm_accelerate.Config, ["process.loss.contrast.group=4"]), list[int]()

    def train(cfg: Any, _: Path, run_mode: RunMode, stop_at: int | None) -> int:
        sizes.append(cfg.micro_batch_size)
        if cfg.micro_batch_size > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0

    limit = 8
    assert what_fits(Rehearsal(train, tmp_path / "x", ""), cfg) == ["micro_batch_size up to 8"]
    assert all(size % 4 == 0 for size in sizes)
    limit = 3
    assert "out of memory with 4 images" in what_fits(Rehearsal(train, tmp_path / "x", ""), cfg)[0]


def test_micro_batches_of_each_stage_are_tried(tmp_path: Path) -> None:
    """Those of 16 px and the last one, of 24, whose batch is its own: the memory is full at so many pixels."""
    cfg, sizes = load("configs/smoke/vae.json", train_vae.Config), list[int]()

    def train(cfg: Any, _: Path, run_mode: RunMode, stop_at: int | None) -> int:
        (stage,) = plan_stages(cfg, 114, rank=0, world=1)
        assert stage.config.adversarial is None or stage.adversary_from == stage.first
        sizes.append(stage.image.size)
        if stage.batch_plan.micro * stage.image.size**2 > limit:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return 0

    limit = 9 * 16**2
    lines = what_fits(Rehearsal(train, tmp_path / "x", ""), cfg)
    assert lines == [*(f"stages.{i}.micro_batch_size up to 8" for i in range(3)), "stages.3.micro_batch_size up to 4"]
    assert sizes[0] == 16 and 0 < sizes.count(24) <= 3
    limit = 24**2 - 1
    assert [line[:28] for line in what_fits(Rehearsal(train, tmp_path / "x", ""), cfg)[2:]] == [
        "stages.2.micro_batch_size up",
        "no stages.3.micro_batch_size",
    ]


def test_several_processes_say_where_the_micro_batch_is_looked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = load("configs/smoke/ddpm.json", ddpm_accelerate.Config)
    lines = partial(fitting, Rehearsal(lambda *_: 0, tmp_path / "x", ""), cfg)
    assert lines() == [], "no GPU, no search"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert lines() == ["micro_batch_size up to 16 = batch_size"]
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert lines() == ["not looked for on 8 processes: --dry-run on one GPU says it, for each of these too"]
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    assert "FSDP" in lines()[0] and "one GPU" not in lines()[0]
    monkeypatch.setenv("RANK", "1")
    assert lines() == [], "one of them speaks"


def test_checkpoints_are_compared_to_the_bit(tmp_path: Path) -> None:
    state = {"model": {"a": torch.arange(4.0), "b": torch.zeros(2)}, "ema": {"a": torch.ones(3)}}
    progress = {"step": 2, "meter": {"loss": 1.0}, "best": None}

    def write(name: str, tensors: Any, progress: Any) -> Path:
        write_folder(tmp_path / name, tensors, {"progress": progress})
        return tmp_path / name

    one = write("one", state, progress)
    assert compare_checkpoints(one, write("same", state, {**progress, "meter": {"loss": 1.1}})) == ([], 3)
    close = {**state, "model": {**state["model"], "b": torch.tensor([0.0, 1e-45])}}
    assert compare_checkpoints(one, write("close", close, progress))[0] == ["model: b differs by up to 1.4e-45"]
    fewer = {**state, "model": {"a": torch.arange(4.0)}}
    lines, _ = compare_checkpoints(one, write("fewer", fewer, {**progress, "best": {"step": 1}}))
    assert lines == ["model: b is not in both", "progress.json: best differs"]
    damaged = write("damaged", state, progress)
    (damaged / "ema.safetensors").write_bytes(b"")
    assert "ema.safetensors has 0 bytes" in compare_checkpoints(one, damaged)[0][0]


@pytest.mark.soak
def test_a_run_that_resumes_and_one_that_draws_what_no_checkpoint_holds(tmp_path: Path) -> None:
    words = ("-cfg", "configs/smoke/ddpm.json", "--run-dir", tmp_path / "runs" / "x", "--set", "model.dropout=0.1")
    done = launch("ddpm_accelerate.py", *words, "--verify-resume", processes=2)
    assert done.status == 0 and "step 2 both ways" in done.out and "bit-equal" in done.out, done.all
    assert not (tmp_path / "runs").exists(), "nothing is left"
    text, seeding = (
        (ROOT / "ddpm_accelerate.py").read_text(),
        'torch.manual_seed(torch_seed(cfg.seed, "dropout", step, micro_batch.position))',
    )
    assert text.count(seeding) == 1
    (tmp_path / "changed.py").write_text(text.replace(seeding, "pass"))
    done = launch(tmp_path / "changed.py", *words, "--verify-resume", PYTHONPATH=str(ROOT))
    assert done.status == 1 and "step 2: model: " in done.out and "DIFFER: what a step does depends on" in done.out, done.all


def test_every_stage_of_an_autoencoder_is_resumed(tmp_path: Path) -> None:
    done = run_in_process("train_vae.py", "-cfg", "configs/smoke/vae.json", "--run-dir", tmp_path / "x", "--verify-resume")
    assert done.status == 0 and "step 2 both ways" in done.out and "step 8 both ways" in done.out, done.all
    assert "bit-equal" in done.out and not list(tmp_path.iterdir())
    done = run_in_process("train_vae.py", "-cfg", "configs/smoke/vae.json", "--verify-resume", "--dry-run")
    assert done.status == 2 and "give one of them" in done.err


def test_a_step_that_cannot_be_repeated_is_the_configs_mistake(tmp_path: Path) -> None:
    """As the backward of max-pooling on a GPU, in a run that is to be deterministic."""
    cfg = load("configs/smoke/ddpm.json", ddpm_accelerate.Config)

    def train(*_: Any) -> int:
        torch.use_deterministic_algorithms(True)
        try:
            torch.zeros(2).put_(torch.tensor([1]), torch.ones(1))
        finally:
            torch.use_deterministic_algorithms(False)
        return 0

    with pytest.raises(UserError, match="deterministic: torch has no put_ that repeats itself .*--set deterministic=false"):
        run_training(train, cfg, SimpleNamespace(run_dir=tmp_path, dry_run=False, verify_resume=False))  # pyright: ignore[reportArgumentType]
