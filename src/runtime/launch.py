"""Start on the devices of this machine, after holding the launcher against the config; trackers, DDP and accumulation."""

import ctypes
import hashlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..config import UserError, dump
from ..config.packages import is_installed
from .environment import MachineConfig, check_arithmetic, check_launcher, check_world, explain_environment, multiply_exactly
from .failures import Warn, warn_on_failure
from .processes import process_state
from .sharding import plugin_for

if TYPE_CHECKING:
    from accelerate import Accelerator, PartialState


def has_bf16_units() -> bool:
    """Whether this processor has units for bf16, without which bf16 is slower than float32. True where torch does not say."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(value for name, value in known.items() if "bf16" in name) or not any("bf16" in name for name in known)


def precision_for(wanted: str) -> str:
    """bf16, or fp16 on a GPU that has no bf16."""
    if wanted == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return wanted


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
    launched = os.environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower() or "no"
    if launched not in ("no", machine.mixed_precision):
        raise UserError(
            f"the launcher asks for mixed_precision {launched} and the config for {machine.mixed_precision}; "
            "leave it out of the launch, the config decides"
        )
    keep_freed_memory()
    multiply_exactly()
    if machine.cpu_threads is not None:
        torch.set_num_threads(machine.cpu_threads)
    precision = precision_for(machine.mixed_precision)
    plugin = plugin_for(precision)
    if precision == "fp16" and (plugin is not None or not fp16):
        what = "FSDP" if plugin is not None else "two optimisers"
        raise UserError(f"mixed_precision fp16 (or bf16 on a GPU that has none) is not for {what}; use bf16 or no")
    if precision == "fp16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise UserError("mixed_precision fp16 needs a GPU; use no or bf16 on a CPU")
    if machine.dtype == "float64" and precision != "no":
        raise UserError("dtype float64 goes with mixed_precision no")
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
        torch.backends.cudnn.benchmark = False
    elif accelerator.device.type == "cuda":
        torch.backends.cudnn.benchmark = True
    return accelerator


def start_sampling(device: str | None = None) -> tuple["PartialState", torch.device]:
    """The processes, and the device of this one (`device` where it is given), without a training setup."""
    check_launcher()
    check_arithmetic(None)
    keep_freed_memory()
    multiply_exactly()
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


def start_trackers(accelerator: "Accelerator", project: str, run_dir: Path, settings: Any, step: int, warn: Warn) -> None:
    """Open the trackers under the run's name, to go on at `step`; a tracker that fails to open is left out."""
    if not accelerator.log_with:
        return

    def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, below in value.items():
                yield from flatten(below, f"{path}.{key}" if path else key)
        else:
            yield path, value if isinstance(value, bool | int | float | str) else str(value)

    config = dict(flatten(dump(settings)))
    options = {
        "tensorboard": {"purge_step": step + 1},
        "wandb": {
            "name": run_dir.name,
            "id": hashlib.sha256(os.fsencode(run_dir.resolve())).hexdigest()[:16],  # the same run when it goes on
            "resume": "allow",
        },
    }
    wanted, opened = accelerator.log_with, []
    for tracker in wanted:
        accelerator.log_with, accelerator.trackers = [tracker], []
        with warn_on_failure(str(getattr(tracker, "value", tracker)), warn):
            accelerator.init_trackers(project, config=config, init_kwargs=options)
            opened += accelerator.trackers
    accelerator.log_with, accelerator.trackers = wanted, opened


def warm_up_ddp(accelerator: "Accelerator", network: torch.nn.Module, *inputs: torch.Tensor) -> None:
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


def accumulating(accelerator: "Accelerator", model: torch.nn.Module, part: int, parts: int) -> AbstractContextManager[Any]:
    """Around the backward of micro-batch `part`: only the last one of a step averages gradients over the ranks. With FSDP each
    does, for until then every card would hold the gradients whole."""
    return accelerator.no_sync(model) if part < parts - 1 and not accelerator.is_fsdp2 else nullcontext()


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
