"""Start on this machine's devices, after holding environment and launcher against the config; DDP and accumulation."""

import ctypes
import json
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field
from torch import nn

from ..config import UserError, config, resumable_field
from ..config.packages import is_installed
from .precision import kept_precision, native_precision, precision_for
from .processes import broadcast, process_state
from .sharding import plugin_for

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


@config
class MachineConfig:
    """How a run uses its machine.

    `mixed_precision` auto is bf16 where the first process's device has units for it, else no; a run that goes on keeps it.
    `dtype` float64 is for proofs. `deterministic` makes a GPU repeat itself to the bit. `cpu_threads` fixes the threads of
    a process on a CPU, so that one process and two agree there to the bit. `workers` processes decode images ahead.
    A collective that waits longer than `timeout_minutes` ends the run. Each checkpoint goes into the `bucket` (gs://NAME[/PREFIX])
    beside the training, and a run that has none here is brought back from there. `stop_signal` (a scheduler's warning;
    torchrun passes it on with `--signals_to_handle SIGTERM,SIGINT,SIGUSR1`) is handled as SIGTERM, and so is USR1 in any case.
    """

    mixed_precision: Literal["no", "bf16", "fp16", "auto"] = "no"
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


def _refuse(*mistakes: tuple[object, str]) -> None:
    for is_made, message in mistakes:
        if is_made:
            raise UserError(message)


def check_arithmetic(machine: MachineConfig | None) -> None:
    """A UserError where the environment would change what a run computes: the variable, its value, what the config says."""
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


def check_launcher(*, fsdp: bool = False) -> None:
    """A UserError where variables of a launcher contradict each other, or ask for an engine: FSDP is for `fsdp` alone."""
    world = os.environ.get("WORLD_SIZE")
    names = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
    engines = {name: os.environ.get(f"ACCELERATE_USE_{name}", "").strip().lower() for name in names}
    engine = next((name for name, value in engines.items() if value not in _OFF and not (fsdp and name == "FSDP")), None)
    _refuse(
        (world is not None and not world.isdecimal(), f"WORLD_SIZE is {world!r}, not a number; a launcher sets it: unset it"),
        (
            os.environ.get("MASTER_ADDR") and world is None,
            "the launcher set MASTER_ADDR but no WORLD_SIZE, so only one process runs (`accelerate launch --cpu "
            f"--num_processes 2` does this); start two on a CPU with: {TWO_ON_A_CPU}",
        ),
        (
            world not in (None, "0", "1") and "RANK" not in os.environ,
            f"WORLD_SIZE is {world} but RANK is not set; use a launcher (accelerate launch, torchrun), or unset it",
        ),
        (
            engines["FSDP"] not in ("true", *_OFF),
            f"ACCELERATE_USE_FSDP is {engines['FSDP']!r}, which accelerate does not take; write true, or unset it",
        ),
        (engine, f"the launcher asks for {engine}, which this script does not support; launch with plain DDP"),
    )


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


def decide_precision(machine: MachineConfig, *runs: Path) -> str:
    """no, bf16 or fp16, the same on all processes: what `mixed_precision` says, where auto is what the first of the `runs` that
    has a checkpoint was trained in, else what suits the first process's device. A UserError where the launcher asks for another
    one."""
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower() or "no"
    _refuse(
        (
            launched not in ("no", machine.mixed_precision),
            f"the launcher asks for mixed_precision {launched} and the config for {machine.mixed_precision}; leave it out of "
            "the launch, the config decides",
        ),
    )
    if machine.mixed_precision != "auto":
        return precision_for(machine.mixed_precision)
    from accelerate.utils import parse_flag_from_env

    check_launcher(fsdp=True)
    with explain_environment():
        timeout = timedelta(minutes=machine.timeout_minutes)
        state = process_state(cpu=parse_flag_from_env("ACCELERATE_USE_CPU"), timeout=timeout)
    check_world(state.num_processes)
    decided = None
    if state.is_main_process:
        of_run = next((precision for run in runs if (precision := kept_precision(run)) is not None), None)
        decided = precision_for(of_run or native_precision(state.device or torch.device("cpu"), machine.dtype))
    return broadcast(decided or "")


def keep_freed_memory() -> bool:
    """Make glibc keep what one step frees for the next; gives whether it does, which is False without glibc and where
    MALLOC_TRIM_THRESHOLD_ is set. By default glibc gives large blocks back to the system and asks for them anew, which costs a
    CPU a tenth of a step."""
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    # the largest that this version of glibc takes
    return bool(mallopt(trim, 1 << 30)) and any(mallopt(mmap, 1 << size) for size in (30, 25))


def start(
    machine: MachineConfig, *, trackers: tuple[str, ...] = (), folder: Path = Path("."), fp16: bool = True, fsdp: bool = False
) -> "Accelerator":
    """The Accelerator, after holding the launcher against the config: each contradiction is a UserError. `fp16` False refuses
    that precision, whose loss scale two optimisers cannot share; `fsdp` False refuses FSDP."""
    from accelerate import Accelerator
    from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs, ProjectConfiguration

    check_launcher(fsdp=fsdp)
    check_arithmetic(machine)
    trackers = tuple(tracker for tracker in trackers if is_installed(tracker))  # the session says which are not
    precision = decide_precision(machine, folder)
    plugin = plugin_for(precision)
    where = "go on with this run where there is bf16" if machine.mixed_precision == "auto" else "use bf16 or no"
    _refuse(
        (
            precision == "fp16" and (plugin is not None or not fp16),
            "mixed_precision fp16 (or bf16 on a GPU that has none) is not for "
            f"{'two optimisers' if plugin is None else 'FSDP'}; {where}",
        ),
        (
            precision == "fp16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()),
            "mixed_precision fp16 needs a GPU; use no or bf16 on a CPU",
        ),
        (machine.dtype == "float64" and precision != "no", "dtype float64 goes with mixed_precision no"),
    )
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = False  # products are exact, whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says
    if machine.cpu_threads is not None:
        torch.set_num_threads(machine.cpu_threads)
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # torch has nothing in its place yet
    with explain_environment():
        accelerator = Accelerator(
            gradient_accumulation_steps=1,
            mixed_precision=precision,
            fsdp_plugin=plugin,
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(minutes=machine.timeout_minutes)),
                DistributedDataParallelKwargs(broadcast_buffers=False),  # buffers are the same on all ranks
            ],
        )
    check_world(accelerator.num_processes)
    if plugin is not None and not accelerator.is_fsdp2:
        raise UserError(
            f"the launcher asks for FSDP and accelerate did not turn it on ({accelerator.num_processes} process(es) on "
            f"{accelerator.device.type}): it takes GPUs, a launched process each; launch without FSDP here"
        )
    if machine.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True)
    if accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = not machine.deterministic
    return accelerator


def start_sampling(device: str | None = None) -> tuple["PartialState", torch.device]:
    """The processes, and the device of this one (`device` where it is given), without a training setup."""
    check_launcher()
    check_arithmetic(None)
    keep_freed_memory()
    torch.backends.cuda.matmul.allow_tf32 = False  # products are exact, whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says
    on_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    try:
        with explain_environment():
            state = process_state(cpu=on_cpu)
        check_world(state.num_processes)
        default = torch.device(state.device or "cpu")
        chosen = torch.device(device) if device is not None else default
        if chosen.type == default.type and chosen.index is None:
            chosen = default  # each process has another GPU
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return state, chosen


def compile_network(network: nn.Module, num_shapes: int, say: Callable[[str], None]) -> None:
    """Let torch compile the network at its first calls: one graph for each of so many shapes of images."""
    if num_shapes > 1:
        import torch._dynamo.config as dynamo

        dynamo.recompile_limit = max(dynamo.recompile_limit, 2 * num_shapes)
        dynamo.accumulated_recompile_limit = max(dynamo.accumulated_recompile_limit, 16 * num_shapes)
        say(f"compile makes a graph for each of {num_shapes} sizes of images, minutes each, when its first batch comes")
    network.compile(dynamic=False if num_shapes > 1 else None)


def warm_up_ddp(accelerator: "Accelerator", network: torch.nn.Module, *inputs: torch.Tensor | None) -> None:
    """Run one forward and backward whose gradients are thrown away. DDP orders its sums anew after its first backward, which
    changes their rounding from three ranks on; so this happens before the first step that counts."""
    if accelerator.num_processes < 3 or accelerator.is_fsdp2:
        return
    output = network(*inputs)
    accelerator.backward((output[0] if isinstance(output, tuple) else output).square().mean() * 0)
    network.zero_grad(set_to_none=True)


def undetermined(error: BaseException | None) -> str | None:
    """The operation that torch cannot repeat to the bit on this device, where that is the error."""
    matched = re.match(r"(.+?) does not have a deterministic implementation", str(error))
    return matched[1] if matched is not None else None


def accumulating(
    accelerator: "Accelerator", model: torch.nn.Module | torch.nn.ModuleList, part: int, parts: int
) -> AbstractContextManager[Any]:
    """Around the backward of micro-batch `part`: only the last one of a step averages gradients over the ranks. With FSDP each
    does, for until then every card would hold the gradients whole. Of a list each module was prepared by itself."""
    if part == parts - 1 or accelerator.is_fsdp2:
        return nullcontext()
    stack = ExitStack()
    for module in model if isinstance(model, torch.nn.ModuleList) else [model]:
        stack.enter_context(accelerator.no_sync(module))
    return stack
