"""configs/accelerate, launched: two processes on a CPU, and FSDP there, where it takes a nudge (tests/fsdp_on_cpu.py)."""

import random
import sys
from pathlib import Path

import pytest
import torch
from accelerate.commands.config.config_args import ClusterConfig
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from src.runtime.checkpoint import newest
from tests import kills
from tests.conftest import ROOT, SMOKE, Finished, launch, metrics, refused, run_here
from tests.kills import settings

FILES = ROOT / "configs" / "accelerate"
FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}
FSDP["FSDP_TRANSFORMER_CLS_TO_WRAP"] = "Block,ResidualBlock"
# With eight held-out images the second process has none to measure, and runs along.
EXACT = settings(dtype="float64", held_out=0.05, steps=8, log__every=2, checkpoint__every=4, preview__every=4)
IN_PROCESS = ("ddpm_accelerate", "-cfg", SMOKE, *EXACT)
DIFFUSION = ("ddpm_accelerate.py", *IN_PROCESS[1:])


def accelerate(name: str, *arguments: str | Path) -> Finished:
    """`accelerate launch` of two processes on a CPU with a launch file."""
    launcher = ["-m", "accelerate.commands.launch", "--config_file", FILES / f"{name}.yaml"]
    launcher += ["--num_processes", "2", "--main_process_port", "0"]
    return launch(*launcher, *arguments, timeout=900, ACCELERATE_USE_CPU="true", CUDA_VISIBLE_DEVICES="")


def with_fsdp(run: Path, *arguments: str | Path) -> Finished:
    done = accelerate("fsdp", "tests/fsdp_on_cpu.py", *arguments, "--run-dir", run)
    assert done.status == 0 and "= 2 x cpu x 1 x 8" in done.out and "Warning" not in done.err, done.all
    return done


def ends_near(one: Path, other: Path, tolerance: float) -> None:
    checkpoints = [newest(run / "checkpoints")[0] for run in (one, other)]
    assert checkpoints[0] is not None and checkpoints[1] is not None and checkpoints[0].name == checkpoints[1].name
    for name in ("model", "ema", "optimizer"):
        left, right = (load_file(end / f"{name}.safetensors") for end in checkpoints)
        assert left.keys() == right.keys()
        for key, value in left.items():
            torch.testing.assert_close(right[key], value, rtol=0, atol=tolerance)


# ---------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize(
    ("name", "kind", "machines", "processes"),
    [
        ("gpu1", DistributedType.NO, 1, 1),
        ("gpu8", DistributedType.MULTI_GPU, 1, 8),
        ("nodes2", DistributedType.MULTI_GPU, 2, 16),
        ("cpu2", DistributedType.MULTI_GPU, 1, 2),
        ("fsdp", DistributedType.FSDP, 1, 8),
    ],
)
def test_launch_files_are_accelerates(name: str, kind: DistributedType, machines: int, processes: int) -> None:
    loaded = ClusterConfig.from_yaml_file(str(FILES / f"{name}.yaml"))  # which refuses keys that it does not know
    assert (loaded.distributed_type, loaded.num_machines, loaded.num_processes) == (kind, machines, processes)
    assert loaded.mixed_precision is None and not loaded.use_cpu, "the run's config decides"
    text = (FILES / f"{name}.yaml").read_text()
    assert "gradient_accumulation" not in text and f"--config_file configs/accelerate/{name}.yaml" in text
    if name == "nodes2":
        assert loaded.main_process_ip is None and "--machine_rank 0 --main_process_ip HOST" in text
    if name == "fsdp":
        wanted = {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP", "reshard_after_forward": True}
        wanted |= {"transformer_layer_cls_to_wrap": "Block,ResidualBlock", "state_dict_type": "FULL_STATE_DICT"}
        assert wanted.items() <= {key.removeprefix("fsdp_"): value for key, value in loaded.fsdp_config.items()}.items()
        assert not loaded.fsdp_config["fsdp_offload_params"] and not loaded.fsdp_config["fsdp_cpu_ram_efficient_loading"]
    assert {path.stem for path in FILES.iterdir()} == {"gpu1", "gpu8", "nodes2", "cpu2", "fsdp"}


def test_two_processes_on_a_cpu_by_accelerate_launch(tmp_path: Path) -> None:
    quick = settings(steps=2, preview__every=None, preview__num_samples=2, checkpoint__every=None)
    run = tmp_path / "run"
    command = Path(sys.executable).parent / "accelerate"  # as a user types it
    launcher = [command, "launch", "--config_file", FILES / "cpu2.yaml", "--main_process_port", "0"]
    done = launch(*launcher, "ddpm_accelerate.py", "-cfg", SMOKE, *quick, "--run-dir", run, ACCELERATE_USE_CPU="true")
    assert done.status == 0 and "= 2 x cpu x 1 x 8" in done.out, done.all


# ---------------------------------------------------------------------------------------------- refused


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({}, "asks for FSDP and accelerate did not turn it on (1 process(es) on"),
        ({"FSDP_VERSION": "1"}, "the launcher's fsdp_version is 1; set fsdp_version: 2"),
        ({"FSDP_AUTO_WRAP_POLICY": "SIZE_BASED_WRAP"}, "set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP"),
        ({"FSDP_TRANSFORMER_CLS_TO_WRAP": ""}, "fsdp_transformer_layer_cls_to_wrap is not set; set "),
        ({"FSDP_OFFLOAD_PARAMS": "true"}, "set fsdp_offload_params: false"),
        ({"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "(use model.gradient_checkpointing, which"),
    ],
    ids=str,
)
def test_fsdp_that_cannot_be(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, changed: dict, message: str) -> None:
    for name, value in (FSDP | changed).items():
        monkeypatch.setenv(name, value)
    for script, config in (("ddpm_accelerate", SMOKE), ("train_ldm", "configs/smoke/ldm.json")):
        assert message in refused(script, "-cfg", config, "--run-dir", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_fsdp_in_fp16(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in FSDP.items():
        monkeypatch.setenv(name, value)
    fp16 = settings(mixed_precision="fp16", dtype="float32")
    assert "is not for FSDP; use bf16 or no" in refused(*IN_PROCESS, *fp16, "--run-dir", tmp_path / "run")


@pytest.mark.parametrize("name", ["vae", "iadb", "classifier"])
def test_fsdp_is_for_the_two_that_grow(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    message = refused(f"train_{name}", "-cfg", f"configs/smoke/{name}.json", "--run-dir", tmp_path / "run")
    assert "asks for FSDP, which this script does not support" in message and not (tmp_path / "run").exists()


def test_fsdp_that_accelerate_does_not_turn_on(tmp_path: Path) -> None:
    done = accelerate("fsdp", *DIFFUSION, "--run-dir", tmp_path / "run")
    assert done.status != 0 and not (tmp_path / "run").exists()
    message = "error: the launcher asks for FSDP and accelerate did not turn it on (2 process(es) on cpu)"
    assert done.err.count(message) == 1, done.err


# ---------------------------------------------------------------------------------------------- trained


@pytest.fixture(scope="module")
def one_process_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("alone") / "run"
    run_here(*IN_PROCESS, "--run-dir", run)
    return run


@pytest.fixture(scope="module")
def in_parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = tmp_path_factory.mktemp("parts") / "run"
    with_fsdp(run, *DIFFUSION)
    return run


def test_fsdp_on_two_processes_trains_what_one_trains(one_process_run: Path, in_parts: Path) -> None:
    ends_near(one_process_run, in_parts, 1e-12)
    for left, right in zip(metrics(one_process_run), metrics(in_parts), strict=True):
        for name in {"loss", "grad_norm", "held_out_loss"} & {*left, *right}:
            assert left[name] == pytest.approx(right[name], rel=1e-6)
    assert "held_out_loss" in metrics(in_parts)[-1] and "ema.safetensors" in {p.name for p in (in_parts / "final").iterdir()}
    sheets = [(run / "samples" / "step_00000008.png").read_bytes() for run in (one_process_run, in_parts)]
    assert sheets[0] == sheets[1], "previews of the same EMA"


def test_fsdp_goes_on_to_the_bit(in_parts: Path, tmp_path: Path) -> None:
    kills.go_back(in_parts, tmp_path / "run", 4)
    assert "going on at step 4 of 8" in with_fsdp(tmp_path / "run", *DIFFUSION).out
    kills.same_end(in_parts, tmp_path / "run")


def test_one_process_goes_on_where_fsdp_was(one_process_run: Path, in_parts: Path, tmp_path: Path) -> None:
    kills.go_back(in_parts, tmp_path / "run", 4)
    run_here(*IN_PROCESS, "--run-dir", tmp_path / "run")
    assert "going on at step 4 of 8" in (tmp_path / "run" / "log.txt").read_text()
    ends_near(one_process_run, tmp_path / "run", 1e-12)


@pytest.mark.soak
def test_latents_with_fsdp_in_bf16(vae_run: Path, ldm_run: Path, tmp_path: Path) -> None:
    """What is kept stays float32, and the losses are those of one process in float32, to rounding."""
    given = settings(autoencoder=str(vae_run), mixed_precision="bf16", steps=30)
    with_fsdp(tmp_path / "run", "train_ldm.py", "-cfg", "configs/smoke/ldm.json", *given)
    measured, wanted = metrics(tmp_path / "run"), metrics(ldm_run)
    for name in ("loss", "held_out_loss"):
        assert measured[-1][name] == pytest.approx(wanted[-1][name], rel=0.02), name
    for name in ("model", "ema", "optimizer"):
        tensors = load_file(tmp_path / "run" / "checkpoints" / "step_00000030" / f"{name}.safetensors")
        assert {value.dtype for value in tensors.values()} == {torch.float32}


# ---------------------------------------------------------------------------------------------- soak


class InParts(kills.Job):
    def arguments(self, run: Path, *extra: str) -> list[str]:
        return ["tests/fsdp_on_cpu.py", *super().arguments(run, *extra)]


@pytest.mark.soak
def test_kills_with_fsdp(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name, value in (FSDP | {"CUDA_VISIBLE_DEVICES": ""}).items():
        monkeypatch.setenv(name, value)
    job, rng = InParts(kills.PIXELS.script, kills.PIXELS.config, kills.PIXELS.extra), random.Random(0)
    assert launch(*job.arguments(tmp_path / "whole"), processes=2).status == 0
    killed = [kills.start_and_kill(tmp_path / "run", 2, rng, inside_save=i % 2 == 0, job=job) for i in range(6)]
    assert "inside" in killed and launch(*job.arguments(tmp_path / "run"), processes=2).status == 0
    kills.same_end(tmp_path / "whole", tmp_path / "run")


@pytest.mark.soak
def test_fsdp_goes_on_where_plain_runs_were(one_process_run: Path, tmp_path: Path) -> None:
    kills.go_back(one_process_run, tmp_path / "one", 4)
    assert "going on at step 4 of 8" in with_fsdp(tmp_path / "one", *DIFFUSION).out
    ends_near(one_process_run, tmp_path / "one", 1e-12)
    done = accelerate("cpu2", *DIFFUSION, "--run-dir", tmp_path / "two")
    assert done.status == 0 and "= 2 x cpu x 1 x 8" in done.out, done.all
    kills.go_back(tmp_path / "two", tmp_path / "in_parts", 4)
    with_fsdp(tmp_path / "in_parts", *DIFFUSION)
    ends_near(one_process_run, tmp_path / "in_parts", 1e-12)


@pytest.mark.soak
@pytest.mark.parametrize("changes", [{"compile": True}, {"model__gradient_checkpointing": True}], ids=str)
def test_fsdp_with_what_saves_time_and_memory(tmp_path: Path, changes: dict) -> None:
    same = settings(model__dropout=0.0)  # a compiled network draws it in another way, on one process too
    run_here(*IN_PROCESS, *same, "--run-dir", tmp_path / "alone")
    with_fsdp(tmp_path / "run", *DIFFUSION, *same, *settings(**changes))
    ends_near(tmp_path / "alone", tmp_path / "run", 1e-9)


@pytest.mark.soak
def test_fsdp_in_trials(tmp_path: Path) -> None:
    for trial, expected in (("--verify-resume", "tensors; bit-equal"), ("--dry-run", "a dry run: nothing was written")):
        done = accelerate("fsdp", "tests/fsdp_on_cpu.py", *DIFFUSION, trial, "--run-dir", tmp_path / "run")
        assert done.status == 0 and expected in done.out and not list(tmp_path.iterdir()), done.all
