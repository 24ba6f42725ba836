"""That these devices train correctly: each computes right, together they compute what one does, and a resumed step is the same.

Every process runs the stages in the same order. A stage gives each rank's Verdict; the worst of them is the row.
"""

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..config import validate
from ..config.sizes import describe_size
from ..diffusion import Process, ProcessConfig, build_process
from ..models import Backbone, UNetConfig, build_model
from ..runtime.launch import MachineConfig, accumulating, decide_precision, start, warm_up_ddp
from ..runtime.precision import native_precision
from ..runtime.processes import broadcast
from ..runtime.seeds import generator, normal, uniforms
from ..runtime.stream import BatchPlan, plan_batch
from ..training.config import TrainConfig
from . import own_script
from .health import GB, Row, Verdict, failure, verdict_on
from .needs import count_parameters
from .own_script import BROKEN, OwnScript, gather

if TYPE_CHECKING:
    from accelerate import Accelerator

ONE_PROCESS = Verdict("skip", "one process: not tested")
MICRO, PARTS = 2, 2  # a process takes two micro-batches of two
SMALL = {"base_channels": 16, "channel_mult": [1, 2], "blocks": 1, "attention": ["none", "full"], "norm_groups": 8}
UNREACHED = (
    "the processes do not reach each other. On GPUs: NCCL_DEBUG=INFO says where it hangs; try NCCL_P2P_DISABLE=1, "
    "NCCL_SHM_DISABLE=1, then NCCL_IB_DISABLE=1. Between machines: open the port of MASTER_ADDR in the firewall, and name the "
    "network: NCCL_SOCKET_IFNAME=eth0 (GLOO_SOCKET_IFNAME on CPUs)"
)


@dataclass(frozen=True)
class Subject:
    """The network that the proof trains, and on what: `words` say which it is."""

    model: Backbone
    process: Process
    shape: tuple[int, int, int]
    machine: MachineConfig
    words: str


def subject(cfg: Any | None) -> Subject:
    """The config's network where it is on pixels and quick, else a small one, both without dropout.

    float64 on a CPU where no precision is asked for, else float32; bf16 as the config says (fp16 scales its loss as it goes: it
    is tried as arithmetic alone).
    """
    cuda = torch.cuda.is_available()
    precision = "bf16" if getattr(cfg, "mixed_precision", "no") == "bf16" and (not cuda or _has_bf16()) else "no"
    dtype = "float32" if cuda or torch.backends.mps.is_available() or precision != "no" else "float64"
    machine = MachineConfig(mixed_precision=precision, dtype=dtype, deterministic=True)
    words = "bf16" if precision == "bf16" else dtype
    process = build_process(validate(ProcessConfig, {"schedule": {"kind": "cosine", "steps": 100}, "target": "v"}))
    plain = Subject(validate(UNetConfig, SMALL), process, (3, 16, 16), machine, f"a small U-Net in {words}")
    image, model = getattr(cfg, "image", None), getattr(cfg, "model", None)
    if cfg is None:
        return plain
    if image is None or not isinstance(model, Backbone) or getattr(cfg, "autoencoder", None) is not None:
        return replace(plain, words=f"{plain.words} (the config's is none on pixels)")
    count, size = count_parameters(cfg)[0], max(image.sides)
    if count > (150e6 if cuda else 1e6) or size > (128 if cuda else 32):
        return replace(plain, words=f"{plain.words} (the config's has {count / 1e6:.0f} M parameters at {size} px: slow)")
    model = replace(model, dropout=0.0) if hasattr(model, "dropout") else model
    words = f"the config's network ({count / 1e6:.2f} M parameters, {describe_size(image.size)}, no dropout) in {words}"
    return Subject(model, build_process(cfg.process), image.shape, machine, words)


@dataclass
class Bench:
    """A subject on the devices: what the stages share. `taken` bytes of the GPU were so before any stage filled its caches."""

    accelerator: "Accelerator"
    subject: Subject
    split: BatchPlan
    began: float
    script: OwnScript
    cfg: Any = None
    taken: int = 0

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    @property
    def dtype(self) -> torch.dtype:
        return getattr(torch, self.subject.machine.dtype)

    def network(self) -> nn.Module:
        """Always the same; no parameter is zero, or its part of the network would not be seen."""
        torch.manual_seed(0)
        learned, rng = self.subject.process.variance == "learned", torch.Generator().manual_seed(1)
        network = build_model(self.subject.model, self.subject.shape, None, learned=learned)
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.02)
        return network.to(self.device, self.dtype)

    def batch(self, step: int) -> tuple[Tensor, Tensor, Tensor]:
        """x0, noise and times of a step's whole batch, drawn on the CPU: the same on every rank."""
        shape, cpu = (self.split.batch, *self.subject.shape), torch.device("cpu")
        x0 = normal(shape, "doctor", "x0", step, device=cpu, dtype=torch.float64).tanh()
        eps = normal(shape, "doctor", "noise", step, device=cpu, dtype=torch.float64)
        times = self.subject.process.draw_times(uniforms(generator("doctor", step), self.split.batch))
        return x0.to(self.device, self.dtype), eps.to(self.device, self.dtype), times

    def loss(self, network: Any, batch: tuple[Tensor, Tensor, Tensor], part: slice = slice(None)) -> Tensor:
        """The sum of the losses of a `part` of a batch."""
        x0, eps, t = batch
        return self.subject.process.losses(network, x0[part], eps[part], t[part]).loss.sum()


# ---------------------------------------------------------------------------------------------- the devices


def _has_bf16() -> bool:
    return torch.cuda.is_bf16_supported(including_emulation=False)


def first_collective(bench: Bench) -> Verdict:
    world = bench.split.world
    if world == 1:
        return ONE_PROCESS
    ones = torch.ones(1, device=bench.device)
    dist.all_reduce(ones)
    seconds = time.monotonic() - bench.began
    if ones.item() != world:
        return Verdict("fail", f"the sum of {world} ones is {ones.item():g}", BROKEN)
    words = f"{dist.get_backend()}, {world} processes have met and summed after {seconds:.2g} s"
    return verdict_on(seconds <= 30, words, "slow to start: NCCL_DEBUG=INFO says over which network", "warn")


def all_reduce(bench: Bench) -> Verdict:
    """Sums that are known, and how fast; the bus's bandwidth is 2 (N - 1) / N times the bytes in a second."""
    world, cuda = bench.split.world, bench.device.type == "cuda"
    if world == 1:
        return ONE_PROCESS
    count = 2**26 if cuda else 2**22
    values = torch.empty(count, device=bench.device)
    pattern, seconds = torch.arange(count, device=bench.device) % 64, []  # sums that float32 holds
    for _ in range(4):
        values.copy_(pattern * (bench.split.rank + 1))
        bench.accelerator.wait_for_everyone()
        began = time.monotonic()
        dist.all_reduce(values)
        if cuda:
            torch.cuda.synchronize()
        seconds.append(time.monotonic() - began)
    if not torch.equal(values, (pattern * (world * (world + 1) // 2)).to(values.dtype)):
        return Verdict("fail", f"the sum of {4 * count / 1e6:.0f} MB over {world} processes is wrong", BROKEN)
    size = 4 * count * 2 * (world - 1) / world
    speed = size / min(seconds[1:]) / GB
    milliseconds = 0.8 * (world - 1) / world / speed * 1000
    words = f"{speed:.2g} GB/s on the bus: the gradients of 100 M parameters take {milliseconds:.0f} ms a step"
    advice = "slow: nvidia-smi topo -m says how the GPUs are joined; larger micro-batches wait less often"
    return verdict_on(speed >= 2 or not cuda, words, advice, "warn")


def devices(bench: Bench) -> Verdict:
    if bench.device.type != "cuda":
        cards = list(Path("/dev").glob("nvidia[0-9]*"))
        if cards:
            why = "this torch is built without CUDA" if torch.version.cuda is None else "torch cannot use them"
            advice = "install torch for CUDA (pytorch.org), or a driver that fits: nvidia-smi; is CUDA_VISIBLE_DEVICES empty?"
            return Verdict("fail", f"there are {len(cards)} GPUs, but {why}", advice)
        name = bench.device.type if bench.device.type != "cpu" else f"CPU with {os.cpu_count()} cores"
        return Verdict("pass", f"{bench.split.world} x {name}, {torch.get_num_threads()} threads a process")
    card = torch.cuda.get_device_properties(bench.device)
    cards = gather(f"{card.name}, {card.total_memory / GB:.0f} GB")
    words = ", ".join(f"{cards.count(kind)} x {kind}" for kind in sorted(set(cards)))
    if len(set(cards)) > 1:
        advice = "they are not alike: a step takes as long as on the slowest, and the smallest fills first"
        return Verdict("warn", words, advice)
    taken = f"; {bench.taken / GB:.1f} GB of one are taken" if bench.taken > 0.1 * card.total_memory else ""
    return verdict_on(not taken, f"{words}{taken}", "nvidia-smi says by whom; end that", "warn")


def half(bench: Bench) -> Verdict:
    """A product and a convolution in bf16 (fp16 where the GPU has no bf16) against float32."""
    cuda, precision = bench.device.type == "cuda", getattr(bench.cfg, "mixed_precision", "no")
    if precision == "fp16" and bench.device.type == "cpu":
        return Verdict("fail", "mixed_precision fp16 needs a GPU", "--set mixed_precision=no (or bf16)")
    kind = torch.float16 if cuda and not _has_bf16() else torch.bfloat16
    rng = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 256, generator=rng).to(bench.device, kind) for _ in range(2))
    image, weight = (torch.randn(shape, generator=rng).to(bench.device, kind) for shape in ((4, 16, 32, 32), (32, 16, 3, 3)))
    pairs = [(a @ b, a.float() @ b.float())]
    pairs += [(nn.functional.conv2d(image, weight), nn.functional.conv2d(image.float(), weight.float()))]
    worst = float(torch.stack([(low.float() - high).norm() / high.norm() for low, high in pairs]).max())  # NaN stays NaN
    words = f"a product and a convolution are within {worst:.1e} of float32 (1e-2 allowed)"
    is_auto = precision == "auto"
    words += f"; mixed_precision auto is {native_precision(bench.device, bench.cfg.dtype)} here" if is_auto else ""
    if not worst < 1e-2:
        return Verdict("fail", words, "train with mixed_precision no; another torch or driver may mend it")
    if kind == torch.float16 and not is_auto:
        advice = "a config with bf16 trains in fp16 here; train_vae.py needs mixed_precision no, or auto"
        return Verdict("warn", f"this GPU has no bf16; in fp16 {words}", advice)
    return Verdict("pass", words)


def arithmetic(bench: Bench) -> Verdict:
    """Gradients of a small network in float32 on this device against the CPU's in float64."""
    gradients_by_device = []
    small_bench = replace(bench, subject=replace(subject(None), machine=MachineConfig()), split=BatchPlan(4, 4, 1, 0, 1))
    for device, dtype in ((bench.device, torch.float32), (torch.device("cpu"), torch.float64)):
        network = small_bench.network().to(device, dtype)
        x0, eps, t = small_bench.batch(0)
        small_bench.loss(network, (x0.to(device, dtype), eps.to(device, dtype), t)).backward()
        gradients_by_device.append(gradients_of(network))
    worst = _difference(*gradients_by_device)
    words = f"gradients in float32 are within {worst:.1e} of the CPU's in float64 (1e-3 allowed)"
    advice = "this device computes wrong: leave it out (CUDA_VISIBLE_DEVICES), or give the machine back"
    return verdict_on(worst < 1e-3, words, advice)


# ---------------------------------------------------------------------------------------------- together as alone


def gradients_of(network: nn.Module) -> dict[str, Tensor]:
    """On the CPU, in float64."""
    return {
        name: parameter.grad.detach().cpu().double()
        for name, parameter in network.named_parameters()
        if parameter.grad is not None
    }


def _difference(gradients: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The largest difference of any parameter's gradient, relative to the largest entry of that gradient (but to no less than
    a thousandth of the largest of all: what should be zero is rounding)."""
    if gradients.keys() != reference.keys():
        return float("inf")
    largest = max(float(value.abs().max()) for value in reference.values())
    each = [
        (gradients[name] - value).abs().max() / max(float(value.abs().max()), 1e-3 * largest)
        for name, value in reference.items()
    ]
    return float(torch.stack(each).max())  # NaN stays NaN


def gradients(bench: Bench) -> Verdict:
    """A batch's on all processes, as the training scripts have them, against those that one process finds, micro-batch by
    micro-batch, without the others. (Of one process: the micro-batches' against the whole batch's.)"""
    accelerator, split, batch = bench.accelerator, bench.split, bench.batch(0)
    network, network_alone = bench.network(), bench.network()
    model = accelerator.prepare(network)
    blank = torch.zeros((1, *bench.subject.shape), device=bench.device, dtype=bench.dtype)
    warm_up_ddp(accelerator, model, blank, torch.zeros(1, device=bench.device))
    for part in range(split.accumulation):
        with accumulating(accelerator, model, part, split.accumulation):
            accelerator.backward(bench.loss(model, batch, split.of_step(part)) * (split.world / split.batch))

    def call(*inputs: Any) -> Tensor:
        with accelerator.autocast():
            return network_alone(*inputs).to(bench.dtype)

    several = split.world > 1
    size = split.micro if several else split.batch
    for first in range(0, split.batch, size):
        loss = bench.loss(call, batch, slice(first, first + size))
        (loss * (split.world / split.batch)).backward()  # with another scale bf16 rounds to other numbers
    right = {name: value / split.world for name, value in gradients_of(network_alone).items()}
    worst, allowed = _difference(gradients_of(network), right), 1e-9 if bench.dtype == torch.float64 else 1e-4
    if several:
        words = f"{split.world} processes' equal one's to {worst:.1e} ({allowed:g} allowed), {bench.subject.words}"
        return verdict_on(worst <= allowed, words, BROKEN)
    if bench.subject.machine.mixed_precision == "bf16":
        allowed = 5e-2  # other shapes, so other roundings in bf16
    words = f"one process: not tested, but {split.accumulation} micro-batches add up to the batch's to {worst:.1e}"
    return Verdict("skip", words) if worst <= allowed else Verdict("fail", words, BROKEN)


def compiles(bench: Bench) -> Verdict:
    """torch.compile of a small network against the same without; last, since it may take long."""
    bad = "fail" if getattr(bench.cfg, "compile", False) else "warn"
    rng = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1)).to(bench.device)
    inputs = torch.randn(2, 3, 16, 16, generator=rng).to(bench.device)
    began = time.monotonic()
    try:
        worst = float((torch.compile(network)(inputs) - network(inputs)).abs().max().detach())
    except Exception as error:
        advice = "it needs a C++ compiler, on a GPU too: apt install g++; configs train without `compile`, only slower"
        return Verdict(bad, f"torch.compile: {failure(error).found}", advice)
    words = f"{time.monotonic() - began:.1f} s for a small network, within {worst:.1e} of the uncompiled"
    return verdict_on(worst < 1e-2, words, "leave `compile` out of configs on this machine", bad)


# ---------------------------------------------------------------------------------------------- all of it

STAGES: dict[str, Callable[[Bench], Verdict]] = {
    "first collective": first_collective,
    "all-reduce": all_reduce,
    "devices": devices,
    "bf16": half,
    "arithmetic": arithmetic,
    "gradients": gradients,
    "ten steps": lambda bench: own_script.after_steps(bench.script),
    "resume": lambda bench: own_script.resumed(bench.script),
    "compile": compiles,
}
ORDER = ("pass", "skip", "warn", "fail")


def worst_of(verdicts: list[Verdict]) -> Verdict:
    """That of the rank that fares worst, with its number where others fare better."""
    worst = max(range(len(verdicts)), key=lambda rank: ORDER.index(verdicts[rank].status))
    if len({verdict.status for verdict in verdicts}) == 1:
        return verdicts[0]
    return verdicts[worst]._replace(found=f"rank {worst}: {verdicts[worst].found}")


class Broken(RuntimeError):
    """A rank cannot go on, which a row says; the others wait for it in vain."""


def prove(cfg: Any, script_cfg: TrainConfig, folder: Path, report: Callable[[Row], None], *, seconds: float = 90.0) -> None:
    """Run the stages on this process, and on the others that it was started with; each row is reported as it is known.

    `cfg` is a training config or None; the script of `script_cfg` is what trains, in `folder` (rank 0's counts). A collective
    that takes longer than `seconds` ends it; Broken where a rank cannot go on.
    """
    with own_script.as_before():
        torch.backends.cudnn.allow_tf32 = False  # that of products is off where processes start
        began, minutes = time.monotonic(), seconds / 60
        is_auto = getattr(cfg, "mixed_precision", "no") == "auto"  # what that is, the first process says to all
        precision = decide_precision(replace(cfg, timeout_minutes=minutes)) if is_auto else None
        what = subject(replace(cfg, mixed_precision=precision) if is_auto else cfg)
        accelerator = start(replace(what.machine, timeout_minutes=minutes))
        torch.use_deterministic_algorithms(True, warn_only=True)  # what has no such way is no failure of the machine
        rank, world = accelerator.process_index, accelerator.num_processes
        split = plan_batch(MICRO * PARTS * world, MICRO, rank=rank, world=world)
        unused, total = torch.cuda.mem_get_info(accelerator.device) if accelerator.device.type == "cuda" else (0, 0)
        script = OwnScript(script_cfg, broadcast(folder) or folder, what.machine, split.batch, MICRO)
        bench = Bench(accelerator, what, split, began, script, cfg, total - unused)
        for name, stage in STAGES.items():
            if name != "compile" or rank == 0:  # nobody waits for that
                _run_stage(bench, name, stage, report)


def _run_stage(bench: Bench, name: str, stage: Callable[[Bench], Verdict], report: Callable[[Row], None]) -> None:
    began, rank, several, raised = time.monotonic(), bench.split.rank, bench.split.world > 1, None
    try:
        verdict = stage(bench)
        if name != "compile":
            verdict = worst_of(gather(verdict))
    except Exception as error:
        advice = "this is not foreseen: look up the message"
        if several and any(word in str(error) for word in ("imed out", "onnection", "NCCL", "gloo")):
            advice = UNREACHED
        if "out of memory" in str(error).lower():
            advice = "end what else runs on these devices (nvidia-smi)"
        verdict, raised = failure(error, advice), error
        if several:
            verdict = verdict._replace(found=f"rank {rank}: {verdict.found}")
    if rank == 0 or raised is not None:
        report(Row(name, *verdict, round(time.monotonic() - began, 2)))
    if several and raised is not None:
        raise Broken(name) from raised
