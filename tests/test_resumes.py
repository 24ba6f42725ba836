"""Every shipped config goes on to the bit after a kill: a set of them that has every value here, all of them in `make soak`."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

import ddpm_accelerate
import train_iadb
from src.config import UserError, dump, load, progress, read_json, validate
from src.models.pretrained import import_torchvision
from src.runtime.checkpoint import read_tensors, write_folder
from src.training.rehearsal import compare_checkpoints
from src.training.run_directory import changes
from tests import kills, resumes
from tests.conftest import ROOT, launch, metrics, refused, run_here


def chosen() -> list[resumes.Job]:
    """Jobs that together have every value: in turn that which adds most for its cost."""
    left, jobs = resumes.to_cover(), list[resumes.Job]()
    while left:
        best = max(resumes.jobs(), key=lambda job: len(left & job.values) / job.cost)
        if not left & best.values:
            break  # test_every_value_is_covered says what is left
        jobs.append(best)
        left -= best.values
    return [job for job in jobs if resumes.to_cover() - set().union(*(other.values for other in jobs if other is not job))]


JOBS = {job.name: job for job in resumes.jobs()}
SHORT = [job.name for job in chosen()]


def test_every_value_is_covered() -> None:
    covered = set().union(*(job.values for job in resumes.jobs()))
    missing = resumes.to_cover() - covered
    assert not missing, f"no test of resuming has these; add a variant to tests/resumes.py: {sorted(missing)}"
    every = {value for script in resumes.SCRIPTS.values() for value in resumes.possible(script.Config)}
    for value in resumes.EXEMPT:
        assert any(resumes.is_exempt(known) for known in every if known.field == value.field or value.field == "*"), value


@pytest.mark.parametrize("path", resumes.CONFIGS, ids=lambda path: f"{path.parent.name}_{path.stem}")
def test_a_small_config_keeps_what_the_shipped_one_names(path: Path) -> None:
    """Each optimizer, schedule, bottleneck, time sampler, option of the EMA and loss is still in it."""
    job = resumes.small(path)
    shipped = validate(resumes.SCRIPTS[job.script].Config, json.loads(path.read_text()))
    lost = {value for value in resumes.values_of(shipped) - job.values if not resumes.is_exempt(value)}
    assert not lost
    for key in ("optimizer", "discriminator_optimizer", "ema", "times"):
        if hasattr(shipped, key):
            before, after = (dump(getattr(cfg, key)) for cfg in (shipped, job.cfg))
            for lengths in ("warmup", "milestones"):
                before.get("schedule", {}).pop(lengths, None)
                after.get("schedule", {}).pop(lengths, None)
            assert before == after, key


@pytest.fixture(scope="session")
def random_weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of VGG16's convolutions, as torchvision's file has them."""
    torchvision = import_torchvision()
    torch.manual_seed(0)
    features = torchvision.models.vgg16(weights=None).features.state_dict()
    path = tmp_path_factory.mktemp("weights") / "vgg16.pth"
    torch.save({f"features.{name}": value for name, value in features.items()}, path)
    return path


@pytest.fixture(scope="session")
def autoencoders(tmp_path_factory: pytest.TempPathFactory) -> Callable[[resumes.Job], Path]:
    """A small autoencoder with the number of channels that a job's images have, as a run or as a folder of diffusers."""
    folder, weight_folders = tmp_path_factory.mktemp("autoencoders"), dict[str, Path]()

    def of_run(channels: int) -> Path:
        run, config = folder / f"run_{channels}", folder / f"run_{channels}.json"
        stages = [{"steps": 1, "adversarial": {"weight": 0.1}}]
        job = resumes.small(ROOT / "configs/smoke/vae.json", {"stages": stages, "image.channels": channels})
        config.write_text(json.dumps(job.raw))
        run_here("train_vae", "-cfg", config, "--run-dir", run)
        return run

    def of_diffusers() -> Path:
        import_torchvision()  # which diffusers imports
        from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

        torch.manual_seed(0)
        blocks = {"down_block_types": ("DownEncoderBlock2D",) * 2, "up_block_types": ("UpDecoderBlock2D",) * 2}
        network = AutoencoderKL(block_out_channels=(8, 16), latent_channels=4, norm_num_groups=4, **blocks)
        network.save_pretrained(folder / "diffusers")
        return folder / "diffusers"

    def find(job: resumes.Job) -> Path:
        hub = job.name == "cats512_latent_iadb"
        name = "diffusers" if hub else f"run_{job.cfg.image.channels}"
        if name not in weight_folders:
            weight_folders[name] = of_diffusers() if hub else of_run(job.cfg.image.channels)
        return weight_folders[name]

    return find


@pytest.fixture
def write_job(
    tmp_path: Path, autoencoders: Callable[[resumes.Job], Path], request: pytest.FixtureRequest
) -> Callable[[resumes.Job], Path]:
    """Writes a job's config where a script can read it, with the files that it names."""

    def write(job: resumes.Job) -> Path:
        raw = json.loads(json.dumps(job.raw))
        if raw.get("autoencoder") == resumes.AUTOENCODER:
            raw["autoencoder"] = str(autoencoders(job))
        if raw.get("perceptual", {}).get("weights") == resumes.WEIGHTS:
            raw["perceptual"]["weights"] = str(request.getfixturevalue("random_weights"))
        if "export_every" in raw:
            raw["export_dir"] = str(tmp_path / "exports")
        path = tmp_path / f"{job.name}.json"
        path.write_text(json.dumps(raw))
        return path

    return write


@pytest.mark.parametrize("name", SHORT)
def test_a_kill_changes_no_bit(
    name: str, tmp_path: Path, write_job: Callable[[resumes.Job], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is left after a kill between two checkpoints is the first of them and lines of the log that are too new."""
    job = JOBS[name]
    monkeypatch.setattr(train_iadb, "write_points", lambda *_, **__: None)  # seconds of drawing after the last step
    config, whole, resumed = write_job(job), tmp_path / "whole", tmp_path / "again"
    run_here(job.script, "-cfg", config, "--run-dir", whole)
    last = metrics(whole)[-1]["step"]
    step = max(1, last // 2 - 1)
    kills.go_back(whole, resumed, step)
    run_here(job.script, "-cfg", config, "--run-dir", resumed)
    assert f"going on at step {step} of {last} " in (resumed / "log.txt").read_text()
    assert [line["step"] for line in metrics(resumed)] == [line["step"] for line in metrics(whole)]
    kills.same_end(whole, resumed)
    checkpoints = [run / "checkpoints" / f"step_{last:08d}" for run in (whole, resumed)]
    assert compare_checkpoints(*checkpoints)[0] == []
    first = read_json(whole / "checkpoints" / f"step_{step:08d}" / "progress.json")["step"]
    assert first == step and compare_checkpoints(checkpoints[0].with_name(f"step_{step:08d}"), checkpoints[1])[0], (
        "the weights moved"
    )


@pytest.mark.soak
@pytest.mark.parametrize("processes", [1, 2])
@pytest.mark.parametrize("name", JOBS)
def test_kills_of_every_config(name: str, processes: int, tmp_path: Path, write_job: Callable[[resumes.Job], Path]) -> None:
    """Real kills of real processes, until one of them has hit; both numbers of processes come to one process's end."""
    job = JOBS[name]
    if processes == 2 and name not in SHORT:
        pytest.skip("on two processes the chosen ones are killed")
    config, whole, run = write_job(job), tmp_path / "whole", tmp_path / "run"
    arguments = kills.Job(f"{job.script}.py", str(config))
    assert launch(*arguments.arguments(whole)).status == 0
    rng = random.Random(name)
    while kills.start_and_kill(run, processes, rng, inside_save=False, job=arguments) == "ended":
        kills.same_end(whole, run)
        shutil.rmtree(run)
    done = launch(*arguments.arguments(run), processes=processes)
    assert done.status == 0, done.all
    kills.same_end(whole, run)


@pytest.mark.parametrize("script", resumes.SCRIPTS)
def test_a_run_of_an_older_version_goes_on(script: str, tmp_path: Path) -> None:
    """With the losses of the run that was not killed, as closely as another kind of processor rounds."""
    old, run = ROOT / "tests" / "old_runs" / script, tmp_path / "run"
    shutil.copytree(old / "run", run)
    run_here(script, "-cfg", old / "config.json", "--run-dir", run)
    assert "going on at step 4 of 6 " in (run / "log.txt").read_text()
    assert read_json(run / "status.json")["state"] == "finished"
    whole = {line["step"]: line for line in map(json.loads, (old / "whole.jsonl").read_text().splitlines())}
    now = {line["step"]: line for line in metrics(run)}
    assert now.keys() == whole.keys() == {1, 2, 3, 4, 5, 6}
    for step in (5, 6):
        for name in ("loss", "grad_norm", "lr"):
            assert now[step][name] == pytest.approx(whole[step][name], rel=1e-3), (step, name)


@pytest.mark.parametrize("script", resumes.SCRIPTS)
def test_an_old_config_lacks_new_keys_and_has_old_names(script: str, tmp_path: Path) -> None:
    """Keys that are newer than a run have their defaults in it; what really differs is still refused by its name."""
    old, run = ROOT / "tests" / "old_runs" / script, tmp_path / "run"
    shutil.copytree(old / "run", run)
    folder = run / "checkpoints" / "step_00000004"
    documents = {path.stem: read_json(path) for path in folder.glob("*.json") if path.name != "MANIFEST.json"}
    tensors = {path.stem: read_tensors(folder, path.stem) for path in folder.glob("*.safetensors")}
    for key in ("max_nonfinite_steps", "deterministic", "dtype"):  # as if they were new
        del documents["config"][key]
    del documents["config"]["optimizer"]["eps"]
    write_folder(folder, tensors, documents)
    settings = resumes.SCRIPTS[script].Config
    assert changes(load(old / "config.json", settings), documents["config"]) == ([], [])
    for assignment, key in (("optimizer.eps=1e-6", "optimizer.eps"), ("dtype=float64", "dtype")):
        message = refused(script, "-cfg", old / "config.json", "--run-dir", run, "--set", assignment)
        assert f"was started with another {key}" in message
    documents["config"]["of_a_later_version"] = 1
    with pytest.raises(
        UserError, match="this version cannot read the config that the run was started with.*of_a_later_version"
    ):
        changes(load(old / "config.json", settings), documents["config"])


@pytest.mark.parametrize("error", [RuntimeError("a bug"), UserError("a mistake")])
def test_a_run_that_ends_on_an_error_says_that_it_failed(
    error: Exception, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And goes on with the same command; a mistake before the first step leaves the status as it was."""
    old, run = ROOT / "tests" / "old_runs" / "ddpm_accelerate", tmp_path / "run"
    shutil.copytree(old / "run", run)
    monkeypatch.setattr(progress, "_pulses", [])
    arguments = ("-cfg", old / "config.json", "--run-dir", run)
    with monkeypatch.context() as patch:
        patch.setattr(ddpm_accelerate, "clip_gradients", Mock(side_effect=error))
        with pytest.raises(type(error), match=str(error)):
            run_here("ddpm_accelerate", *arguments)
    status = read_json(run / "status.json")
    assert (status["state"], status["step"]) == ("failed", 4) and not progress._pulses, "nothing goes on to tell of it"
    refused("ddpm_accelerate", *arguments, "--set", "optimizer.eps=1e-6")
    assert not progress._pulses
    assert read_json(run / "status.json") == status
    run_here("ddpm_accelerate", *arguments)
    assert read_json(run / "status.json")["state"] == "finished"
