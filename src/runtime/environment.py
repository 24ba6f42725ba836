"""What the environment and the launcher say, held against the config: each contradiction is one line."""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from pydantic import Field

from ..config import UserError, config, resumable_field


@config
class MachineConfig:
    """How a run uses its machine.

    `dtype` float64 is for proofs. `deterministic` makes a GPU repeat itself to the bit. `cpu_threads` fixes the threads of
    a process on a CPU, so that one process and two agree there to the bit. `workers` processes decode images ahead.
    A collective that waits longer than `timeout_minutes` ends the run. Each checkpoint goes into the `bucket` (gs://NAME[/PREFIX])
    beside the training, and a run that has none here is brought back from there. `stop_signal` (a scheduler's warning;
    torchrun passes it on with `--signals_to_handle SIGTERM,SIGINT,SIGUSR1`) is handled as SIGTERM, and so is USR1 in any case.
    """

    mixed_precision: Literal["no", "bf16", "fp16"] = "no"
    dtype: Literal["float32", "float64"] = "float32"
    deterministic: bool = False
    cpu_threads: int | None = Field(None, gt=0)
    workers: int = resumable_field(4, ge=0)
    timeout_minutes: float = resumable_field(10.0, gt=0)
    bucket: str | None = resumable_field(None, pattern="^gs://")
    stop_signal: Literal["USR1", "USR2", "HUP"] = resumable_field("USR1")


TWO_ON_A_CPU = "ACCELERATE_USE_CPU=true python -m torch.distributed.run --standalone --nproc-per-node 2 SCRIPT ..."
_OFF = ("", "0", "no", "false", "off", "n", "f")
_PRECISION, _KEYS = "the config decides with mixed_precision", ("mixed_precision", "dtype")
_BATCH = ("batch_size", "micro_batch_size")
# What accelerate and torch read from the environment and what would change a result (a launcher puts the file of `accelerate
# config` there): the values that change nothing, what decides instead, and the keys of the config that say so.
_REFUSED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("", "1"), f"the config derives it from {' and '.join(_BATCH)}", _BATCH),
    "ACCELERATE_DYNAMO_BACKEND": (_OFF, "the config decides with `compile`", ("compile",)),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_OFF, "the config knows plain DDP and FSDP alone", _KEYS),
    "ACCELERATE_DOWNCAST_BF16": (_OFF, f"{_PRECISION} and dtype", _KEYS),
    "ONEDNN_DEFAULT_FPMATH_MODE": (("", "strict"), _PRECISION, _KEYS),
    "DNNL_DEFAULT_FPMATH_MODE": (("", "strict"), _PRECISION, _KEYS),
    "NVIDIA_TF32_OVERRIDE": (("",), _PRECISION, _KEYS),
    "PYTORCH_MPS_FAST_MATH": (_OFF, _PRECISION, _KEYS),
    "PYTORCH_TUNABLEOP_ENABLED": (_OFF, "it chooses kernels by the clock, and a run must not depend on that", _KEYS),
}


def check_arithmetic(machine: MachineConfig | None) -> None:
    """A UserError where the environment would change what a run computes; it names the variable, its value and what the config
    says."""
    for name, (neutral, why, keys) in _REFUSED.items():
        value = os.environ.get(name, "")
        if value.strip().lower() in neutral or (machine is None and name.startswith("ACCELERATE_")):
            continue  # accelerate's own variables are about training
        known = [f"{key} {json.dumps(getattr(machine, key))}" for key in keys if hasattr(machine, key)]
        config_says = f" (here {', '.join(known)})" if known else ""
        raise UserError(
            f"the environment or the launcher sets {name} to {value}, and {why}{config_says}; unset it, and leave it out of "
            "the launch and of `accelerate config`'s file"
        )
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if machine is not None and machine.deterministic and workspace not in (":4096:8", ":16:8"):
        raise UserError(f"CUBLAS_WORKSPACE_CONFIG is {workspace}, and deterministic true needs :4096:8 or :16:8; unset it")


def multiply_exactly() -> None:
    """Products of matrices in float32 are not rounded to TF32, whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says."""
    torch.backends.cuda.matmul.allow_tf32 = False


def check_launcher(*, fsdp: bool = False) -> None:
    """A UserError for variables of a launcher that contradict each other, or ask for what a script has not: FSDP only with
    `fsdp`."""
    environment = os.environ
    world = environment.get("WORLD_SIZE")
    if world is not None and not world.isdecimal():
        raise UserError(f"WORLD_SIZE is {world!r}, not a number; a launcher sets it: unset it")
    if environment.get("MASTER_ADDR") and world is None:
        raise UserError(
            "the launcher set MASTER_ADDR but no WORLD_SIZE, so only one process runs (`accelerate launch --cpu "
            f"--num_processes 2` does this); start two on a CPU with: {TWO_ON_A_CPU}"
        )
    if world is not None and int(world) > 1 and "RANK" not in environment:
        raise UserError(f"WORLD_SIZE is {world} but RANK is not set; use a launcher (accelerate launch, torchrun), or unset it")
    for engine in ("FSDP", "DEEPSPEED", "MEGATRON_LM"):
        value = environment.get(f"ACCELERATE_USE_{engine}", "").strip().lower()
        if engine == "FSDP" and value not in ("true", *_OFF):
            raise UserError(f"ACCELERATE_USE_FSDP is {value!r}, which accelerate does not take; write true, or unset it")
        if value not in _OFF and not (fsdp and engine == "FSDP"):
            raise UserError(f"the launcher asks for {engine}, which this script does not support; launch with plain DDP")


@contextmanager
def explain_environment() -> Iterator[None]:
    """Around the start of accelerate: where it cannot use the environment's variables, a UserError names them."""
    try:
        yield
    except (ValueError, ImportError) as error:
        words = ("ACCELERATE_", "FSDP_", "PARALLELISM_")
        launched = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
        names = sorted(name for name in os.environ if name.startswith(words) or name in launched)
        if isinstance(error, UserError) or not names:
            raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"accelerate cannot start with what the environment or the launcher sets ({reason}); unset what is wrong of "
            f"{', '.join(names)}"
        ) from None


def check_world(count: int) -> None:
    """A UserError where accelerate runs with another number of processes than the launcher started."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != count:
        raise UserError(f"WORLD_SIZE is {world} but accelerate sees {count} process(es); on a CPU start with: {TWO_ON_A_CPU}")
