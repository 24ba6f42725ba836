"""Starting on the devices there are, and noticing what the launcher did not say."""

import ctypes
import hashlib
import itertools
import json
import os
import re
import signal
import socket
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import FrameType
from typing import Any, Literal, TypeVar

import torch
from accelerate import Accelerator, PartialState
from accelerate.utils import (
    DistributedDataParallelKwargs,
    InitProcessGroupKwargs,
    ProjectConfiguration,
    broadcast_object_list,
    gather_object,
)
from pydantic import Field

from ..config import UserError, config, dump, resumable_field
from ..config.packages import is_installed
from ..storage.blocks import Ranks
from .looks import Warn, is_out_of_memory, only_looked_at
from .sharding import plugin_for

T = TypeVar("T")
TWO_ON_A_CPU = "ACCELERATE_USE_CPU=true python -m torch.distributed.run --standalone --nproc-per-node 2 SCRIPT ..."


@config
class MachineConfig:
    """How a run uses its machine.

    `dtype` float64 is for proofs. `deterministic` makes a GPU repeat itself to the bit. `cpu_threads` fixes the threads of
    a process on a CPU, which is what makes one process and two agree there to the bit. `workers` decode pictures ahead.
    A collective that waits longer than `timeout_minutes` ends the run. Each checkpoint goes into the `bucket` (gs://NAME[/PREFIX])
    beside the training, and where the run's newest is there it is brought back. `stop_signal` (a scheduler's warning;
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


_OFF = ("", "0", "no", "false", "off", "n", "f")
# What accelerate and torch read from the environment and what would change a result (a launcher puts the file of `accelerate
# config` there): the values that change nothing, and what decides instead.
_REFUSED = {
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (
        ("", "1"),
        "the config derives it from batch_size and micro_batch_size",
    ),
    "ACCELERATE_DYNAMO_BACKEND": (_OFF, "the config decides with `compile`"),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_OFF, "the config knows plain DDP and FSDP alone"),
    "ACCELERATE_DOWNCAST_BF16": (_OFF, "the config decides with mixed_precision and dtype"),
    "ONEDNN_DEFAULT_FPMATH_MODE": (("", "strict"), "the config decides with mixed_precision"),
    "DNNL_DEFAULT_FPMATH_MODE": (("", "strict"), "the config decides with mixed_precision"),
    "NVIDIA_TF32_OVERRIDE": (("",), "the config decides with mixed_precision"),
    "PYTORCH_MPS_FAST_MATH": (_OFF, "the config decides with mixed_precision"),
    "PYTORCH_TUNABLEOP_ENABLED": (_OFF, "it chooses kernels by the clock, and a run must not depend on that"),
}


def _check_arithmetic(machine: "MachineConfig | None") -> None:
    """A UserError where the environment would change what a run computes: it names the variable, its value and what the config
    says."""
    for name, (neutral, why) in _REFUSED.items():
        value = os.environ.get(name, "")
        if value.strip().lower() in neutral or (machine is None and name.startswith("ACCELERATE_")):
            continue  # accelerate's own are about training
        says = {
            "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": ("batch_size", "micro_batch_size"),
            "ACCELERATE_DYNAMO_BACKEND": ("compile",),
        }.get(name, ("mixed_precision", "dtype"))
        known = [f"{key} {json.dumps(getattr(machine, key))}" for key in says if hasattr(machine, key)]
        config_says = f" (here {', '.join(known)})" if known else ""
        raise UserError(
            f"the environment or the launcher sets {name} to {value}, and {why}{config_says}; unset it, and leave it out of "
            "the launch and of `accelerate config`'s file"
        )
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    if machine is not None and machine.deterministic and workspace not in (":4096:8", ":16:8"):
        raise UserError(f"CUBLAS_WORKSPACE_CONFIG is {workspace}, and deterministic true needs :4096:8 or :16:8; unset it")


def _multiply_exactly() -> None:
    """Products of matrices in float32 are not rounded to TF32, whatever TORCH_ALLOW_TF32_CUBLAS_OVERRIDE says."""
    torch.backends.cuda.matmul.allow_tf32 = False


def _check_environment(*, fsdp: bool = False) -> None:
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
        asked = environment.get(f"ACCELERATE_USE_{engine}", "").strip().lower()
        if engine == "FSDP" and asked not in ("true", *_OFF):
            raise UserError(f"ACCELERATE_USE_FSDP is {asked!r}, which accelerate does not take; write true, or unset it")
        if asked not in _OFF and not (fsdp and engine == "FSDP"):
            raise UserError(f"the launcher asks for {engine}, which this script does not support; launch with plain DDP")


@contextmanager
def _environment_is_readable() -> Iterator[None]:
    """Around the start of accelerate: what it cannot make of the environment's variables is a UserError that names them."""
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


def _check_world(seen: int) -> None:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world != seen:
        raise UserError(f"WORLD_SIZE is {world} but accelerate sees {seen} process(es); on a CPU start with: {TWO_ON_A_CPU}")


def keep_freed_memory() -> bool:
    """Have glibc keep what one step frees for the next, where the environment does not say how (MALLOC_TRIM_THRESHOLD_). By
    default it gives large blocks back to the system and asks for them anew, which costs a CPU a tenth of a step. Whether it
    is done: elsewhere than with glibc nothing is."""
    trim, mmap = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is None or "MALLOC_TRIM_THRESHOLD_" in os.environ:
        return False
    # the largest that this version of glibc takes
    return bool(mallopt(trim, 1 << 30)) and any(mallopt(mmap, 1 << size) for size in (30, 25))


def has_bf16_units() -> bool:
    """Whether this processor multiplies in bf16; without units for it bf16 is slower than float32. True where torch does not
    say."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(value for name, value in known.items() if "bf16" in name) or not any("bf16" in name for name in known)


def precision_for(wanted: str) -> str:
    """bf16, or fp16 on a GPU that has no bf16."""
    if wanted == "bf16" and torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False):
        return "fp16"
    return wanted


def start(
    machine: MachineConfig,
    *,
    trackers: tuple[str, ...] = (),
    folder: Path = Path("."),
    fp16: bool = True,
    fsdp: bool = False,
) -> Accelerator:
    """The Accelerator, after holding the launcher against the config: each contradiction is a UserError. Without `fp16` so is
    that precision, whose loss scale two optimisers cannot share; and FSDP without `fsdp`."""
    _check_environment(fsdp=fsdp)
    _check_arithmetic(machine)
    trackers = tuple(tracker for tracker in trackers if is_installed(tracker))  # the session says which are not
    asked = os.environ.get("ACCELERATE_MIXED_PRECISION", "").strip().lower() or "no"
    if asked not in ("no", machine.mixed_precision):
        raise UserError(
            f"the launcher asks for mixed_precision {asked} and the config for {machine.mixed_precision}; "
            "leave it out of the launch, the config decides"
        )
    keep_freed_memory()
    _multiply_exactly()
    if machine.cpu_threads is not None:
        torch.set_num_threads(machine.cpu_threads)
    precision = precision_for(machine.mixed_precision)
    plugin = plugin_for(precision)
    if precision == "fp16" and plugin is not None:
        raise UserError("mixed_precision fp16 (or bf16 on a GPU that has none) is not for FSDP; use bf16 or no")
    if precision == "fp16" and not fp16:
        raise UserError("mixed_precision fp16 (or bf16 on a GPU that has none) is not for two optimisers; use bf16 or no")
    if precision == "fp16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise UserError("mixed_precision fp16 needs a GPU; use no or bf16 on a CPU")
    if machine.dtype == "float64" and precision != "no":
        raise UserError("dtype float64 goes with mixed_precision no")
    warnings.filterwarnings("ignore", message="`broadcast_buffers` is deprecated")  # torch has nothing in its place yet
    with _environment_is_readable():
        accelerator = Accelerator(
            gradient_accumulation_steps=1,
            mixed_precision=precision,
            fsdp_plugin=plugin,
            log_with=list(trackers) or None,
            project_config=ProjectConfiguration(project_dir=str(folder), logging_dir=str(folder / "tensorboard")),
            kwargs_handlers=[
                InitProcessGroupKwargs(timeout=timedelta(minutes=machine.timeout_minutes)),
                DistributedDataParallelKwargs(broadcast_buffers=False),  # what is done to them makes them the same everywhere
            ],
        )
    _check_world(accelerator.num_processes)
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


def start_sampling(device: str | None = None) -> tuple[PartialState, torch.device]:
    """The processes that there are and this one's device (`device`, where one is asked for), without a training setup."""
    _check_environment()
    _check_arithmetic(None)
    keep_freed_memory()
    _multiply_exactly()
    on_cpu = device == "cpu" or os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes")
    try:
        with _environment_is_readable():
            state = PartialState(cpu=on_cpu)
        _check_world(state.num_processes)
        own = torch.device(state.device or "cpu")
        chosen = torch.device(device) if device is not None else own
        if chosen.type == own.type and chosen.index is None:
            chosen = own  # of several, each process has its own
        torch.empty(1, device=chosen)
    except (RuntimeError, AssertionError) as error:
        raise UserError(f"--device {device} cannot be used here: {str(error).splitlines()[0]}") from None
    return state, chosen


def start_trackers(accelerator: Accelerator, project: str, run_dir: Path, settings: Any, step: int, warn: Warn) -> None:
    """Open the trackers, named as the run, going on at `step`; the run does without one that does not open."""
    if not accelerator.log_with:
        return

    def flatten(value: Any, path: str = "") -> Iterator[tuple[str, Any]]:
        if isinstance(value, dict):
            for key, below in value.items():
                yield from flatten(below, f"{path}.{key}" if path else key)
        else:
            yield path, value if isinstance(value, bool | int | float | str) else str(value)

    told = dict(flatten(dump(settings)))
    more = {
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
        with only_looked_at(str(getattr(tracker, "value", tracker)), warn):
            accelerator.init_trackers(project, config=told, init_kwargs=more)
            opened += accelerator.trackers
    accelerator.log_with, accelerator.trackers = wanted, opened


def warm_up_ddp(accelerator: Accelerator, network: torch.nn.Module, *inputs: torch.Tensor) -> None:
    """DDP orders its sums anew after its first backward; from three ranks on that changes their rounding. So one is thrown
    away before the first step that counts."""
    if accelerator.num_processes < 3 or accelerator.is_fsdp2:
        return
    made = network(*inputs)
    accelerator.backward((made[0] if isinstance(made, tuple) else made).square().mean() * 0)
    network.zero_grad(set_to_none=True)


def broadcast(chosen: T) -> T:
    """What the first rank chose or found, on all ranks."""
    box = [chosen]
    broadcast_object_list(box)
    return box[0]


def silent_ranks(patience_seconds: float = 5.0) -> str:
    """After a collective failed: who no longer answers, in words. Those who still live all ask at about the same time; where
    a launcher is about to end them all, it does."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    state = torch.distributed
    if not state.is_initialized():
        return "another process is gone"
    try:
        store = state.distributed_c10d._get_default_store()
        store.set(f"atelier/alive/{state.get_rank()}", "yes")
        time.sleep(patience_seconds)
        silent = [rank for rank in range(state.get_world_size()) if not store.check([f"atelier/alive/{rank}"])]
    except RuntimeError:  # the store is gone, and it is on the first machine
        return f"rank 0 and its machine ({os.environ.get('MASTER_ADDR', 'the first')}) no longer answer"
    if not silent:
        return "a collective failed between ranks that live"
    ranks = f"rank {silent[0]}" if len(silent) == 1 else f"ranks {' and '.join(map(str, silent))}"
    return f"{ranks} of {state.get_world_size()} no longer answer{'s' if len(silent) == 1 else ''}"


class Heartbeats:
    """Every rank's sign of life, in the store over which they met, and a line about who gives none any more.

    Over NCCL torch ends a process that waits too long, with a report that does not say for whom. This ends nothing.
    """

    def __init__(self, rank: int, world: int, *, seconds: float = 5.0, patience: int = 6) -> None:
        self.rank, self.world, self.seconds, self.patience = rank, world, seconds, patience
        # A connection of its own: on the other one a wait keeps everybody waiting.
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        self._store = torch.distributed.TCPStore(address, port, is_master=False)  # pyright: ignore[reportPrivateImportUsage]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        """This rank is done: the others miss it no more."""
        self._over.set()
        self._thread.join(5)

    def _key(self, rank: int) -> str:
        return f"atelier/beat/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}/{rank}"

    def _watch(self) -> None:
        last, missed = dict[int, bytes](), dict.fromkeys(range(self.world), 0)
        try:
            for beat in itertools.count():
                ended = self._over.wait(self.seconds)
                self._store.set(self._key(self.rank), "over" if ended else str(beat))
                if ended:
                    return
                for rank in missed:
                    here = self._store.get(self._key(rank)) if self._store.check([self._key(rank)]) else b""
                    missed[rank] = missed[rank] + 1 if here == last.get(rank) and here not in (b"", b"over") else 0
                    last[rank] = here
                silent = [str(rank) for rank in missed if missed[rank] == self.patience]
                if silent and self.rank == min(rank for rank in missed if missed[rank] < self.patience):
                    self._say(f"rank {' and '.join(silent)} of {self.world} gave no sign of life for", self.patience)
        except RuntimeError:  # the store is on the first machine
            if not self._over.is_set():
                self._say(f"rank 0's machine ({os.environ['MASTER_ADDR']}) does not answer for", 1)

    def _say(self, what: str, beats: int) -> None:
        print(f"warning on rank {self.rank}: {what} {beats * self.seconds:g} s", file=sys.stderr, flush=True)


def undetermined(error: BaseException | None) -> str | None:
    """What torch has no way to repeat to the bit on this device, where that is the error."""
    found = re.match(r"(.+?) does not have a deterministic implementation", str(error))
    return found[1] if found is not None else None


class StopRequest:
    """SIGTERM, Ctrl-C, USR1 (which cluster/slurm.sh sends) and `warning` ask for a stop; the second of the same kind ends the
    process at once, after `leaving()`.

    (A launcher passes Ctrl-C on as SIGTERM: one of each is still one request.) Python calls a handler between two of its own
    instructions, and inside a step one instruction of torch's may take minutes. So the signals are also written into a pipe,
    at once, and a thread, which runs beside torch, reads them there. (A pair of sockets is what Windows takes, too.)
    """

    def __init__(self, warning: str = "USR1", leaving: Callable[[], object] = lambda: None) -> None:
        self.asked = False
        self._leaving, self._seen, self._read = leaving, set[int](), set[int]()
        reading, writing = socket.socketpair()
        writing.setblocking(False)
        self._writing = writing.detach()
        self._before = signal.set_wakeup_fd(self._writing, warn_on_full_buffer=False)
        names = ("SIGTERM", "SIGINT", "SIGUSR1", f"SIG{warning}")
        self._numbers = {int(getattr(signal, name)) for name in names if hasattr(signal, name)}  # Windows has fewer
        threading.Thread(target=self._watch, args=(reading.detach(),), name="stop", daemon=True).start()
        for number in self._numbers:
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        self.asked = True
        self._count(number, self._seen)

    def _watch(self, reading: int) -> None:
        with socket.socket(fileno=reading) as pipe:
            while signals := pipe.recv(64):
                for number in signals:
                    if number in self._numbers:
                        if not self._read:
                            print("stopping after this step; once more ends at once", file=sys.stderr, flush=True)
                        self.asked = True
                        self._count(number, self._read)

    def _count(self, number: int, seen: set[int]) -> None:
        if number in seen:
            self._leaving()
            os._exit(1)
        seen.add(number)

    def close(self) -> None:
        """Signals are no longer read: the thread ends. The handlers stay until somebody sets others."""
        if self._writing < 0:
            return
        now = signal.set_wakeup_fd(self._before)
        if now != self._writing:  # somebody has set another one since
            signal.set_wakeup_fd(now)
        with socket.socket(fileno=self._writing) as writing:
            writing.shutdown(socket.SHUT_RDWR)  # loader workers may hold a copy
        self._writing = -1


class StepGate:
    """One small asynchronous collective a step: were the gradients finite, is a stop asked, is a save due?

    `send` starts it, `settle` reads it, usually one step later, so that no step waits for the device.
    """

    def __init__(self, accelerator: Accelerator, stop: StopRequest, *, every_minutes: float | None, patience: int) -> None:
        self.device, self.distributed = accelerator.device, accelerator.num_processes > 1
        self.main = accelerator.is_main_process
        self.request, self.every_minutes = stop, every_minutes
        # Under fp16 the loss scale starts high, and each halving of it is a step that does not count.
        self.patience = patience if accelerator.scaler is None else patience + 30
        self.stop = self.save = False
        self.skipped_in_a_row = 0
        self.saved_step: int | None = None  # of the last checkpoint
        self._saved_at = time.monotonic()
        self._pending: tuple[Any, Any, torch.Tensor, int] | None = None

    def send(self, step: int, finite: torch.Tensor) -> None:
        """`finite` () bool on the device: whether step `step`, counted from 1, had finite gradients here."""
        due = self.main and self.every_minutes is not None and time.monotonic() - self._saved_at > 60 * self.every_minutes
        flags = torch.zeros(3, device=self.device)
        flags[0] = ~finite
        if self.request.asked:
            flags[1] = 1
        if due:
            flags[2] = 1
        work = torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX, async_op=True) if self.distributed else None
        event = None
        if self.device.type == "cuda":
            if work is not None:
                work.wait()  # the stream waits, not the host
            host = torch.empty(3, pin_memory=True)
            host.copy_(flags, non_blocking=True)
            event, flags = torch.cuda.Event(), host
            event.record()
        self._pending = (work, event, flags, step)

    def settle(self) -> int | None:
        """The number of the step that was sent last, if it counts: None if it was read before, or was not finite and so
        changed nothing. A UserError after `patience` such steps in a row."""
        if self._pending is None:
            return None
        work, event, flags, step = self._pending
        self._pending = None
        if event is not None:
            event.synchronize()
        elif work is not None:
            work.wait()
        bad, stop, save = (value > 0 for value in flags.tolist())
        self.stop |= stop
        self.save |= save
        if not bad:
            self.skipped_in_a_row = 0
            return step
        self.skipped_in_a_row += 1
        if self.skipped_in_a_row >= self.patience:
            again = "lower optimizer.lr or set optimizer.clip"
            told = f"there is no checkpoint yet: {again}, and run it again"
            if self.saved_step is not None:
                told = f"the last checkpoint is of step {self.saved_step}, from before: {again}, in a new --run-dir or after "
                told += "removing this one"
            raise UserError(f"step {step}: the loss or its gradient is not finite, the {self.patience}th time in a row; {told}")
        return None

    @property
    def asked_here(self) -> bool:
        """Whether a stop is asked that no other process has to hear of: then the step that is done is the last one."""
        return self.request.asked and not self.distributed

    def saved(self, step: int | None = None) -> None:
        """The checkpoint of `step` is written."""
        self.save, self.saved_step = False, step
        self._saved_at = time.monotonic()


def accumulating(accelerator: Accelerator, model: torch.nn.Module, part: int, parts: int) -> AbstractContextManager[Any]:
    """Gradients of micro-batch `part` of a step: averaged over the ranks in the last one alone. With FSDP in each: until then
    every card would hold them whole."""
    return accelerator.no_sync(model) if part < parts - 1 and not accelerator.is_fsdp2 else nullcontext()


@contextmanager
def explain_out_of_memory(
    batch: int, micro: int | None = None, *, key: str = "micro_batch_size"
) -> Iterator[Callable[[int, int, str], None]]:
    """An out-of-memory error as a UserError that says which micro-batch to try: the largest that fits into half of it and
    divides `batch` on the processes that there are.

    Gives a function to call with another batch, micro-batch and key where these change on the way.
    """
    tried = (batch, micro, key)

    def change(batch: int, micro: int, key: str) -> None:
        nonlocal tried
        tried = (batch, micro, key)

    try:
        yield change
    except (MemoryError, RuntimeError, OSError) as error:
        if is_out_of_memory(error):
            raise OutOfMemory(*tried) from error
        raise


class OutOfMemory(UserError):
    """Too large a micro-batch, and which one to try."""

    def __init__(self, batch: int, micro: int | None, key: str) -> None:
        self.key, self.micro = key, micro or batch // int(os.environ.get("WORLD_SIZE", "1"))
        super().__init__(_smaller(batch, self.micro, key))


def _smaller(batch: int, micro: int, key: str) -> str:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    smaller = [size for size in range(1, micro // 2 + 1) if batch % (size * world) == 0 or key.startswith("--")]
    if not smaller:
        return f"out of memory at {key} {micro}; try a smaller image.size or model.base_channels"
    advice = f"{key} {smaller[-1]}" if key.startswith("--") else f"--set {key}={smaller[-1]} and, if previews are large, "
    advice += "" if key.startswith("--") else "a smaller preview.batch_size"
    return f"out of memory at {key} {micro}; try {advice}"


def same_on_all(fingerprint: str) -> None:
    """A UserError where the processes were handed different data sets."""
    if len(set(gather_object([fingerprint]))) > 1:
        raise UserError("the processes were handed different data sets: make it the same on each, with a fixed seed")


def ranks_of(state: Any) -> Ranks:
    """All processes of an Accelerator or a PartialState."""
    return Ranks(state.process_index, state.num_processes, state.wait_for_everyone)


def ranks_here() -> Ranks:
    """Those of this machine, for what each machine keeps for itself; all of all machines wait together."""
    state = PartialState()
    world = int(os.environ.get("LOCAL_WORLD_SIZE", state.num_processes)) if state.num_processes > 1 else 1
    return Ranks(state.local_process_index, world, state.wait_for_everyone)
