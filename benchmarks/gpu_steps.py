"""Training steps on a GPU, one option after the other, for benchmarks/gpu.py: diffusion on pixels, on latents, autoencoder.

A step is the bare loop of benchmarks/speed.py: networks, losses, clipping, optimizer and EMA of a shipped config at its batch
size, on data that is there already. Its operations are counted by torch.utils.flop_counter in the plain float32 step. What is
compiled are the networks, in bf16 and channels_last; an autoencoder's script has no `compile`, so those rows are what it would
be worth.
"""

import gc
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch._functorch.config as functorch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import ddpm_accelerate
import train_ldm
import train_vae
from benchmarks.common import ROOT, machine, wait
from benchmarks.speed import BareDiffusion, BareStage, script_device
from benchmarks.unet import PEAK
from src.config import load
from src.models.layers import channels_last
from src.storage.files import as_json, write_whole

WARMUP = 3  # steps that are not counted
Row = dict[str, Any]


class Way(NamedTuple):
    """How the networks of a step are run."""

    bf16: bool = False
    last: bool = False
    compiled: bool = False
    graphs: bool = False


WAYS = {
    "float32": Way(),
    "float32, channels_last": Way(last=True),
    "bf16": Way(bf16=True),
    "bf16, channels_last": Way(bf16=True, last=True),
    "bf16, channels_last, compile": Way(bf16=True, last=True, compiled=True),
    "bf16, channels_last, compile, CUDA graphs": Way(bf16=True, last=True, compiled=True, graphs=True),
}


@dataclass(frozen=True)
class Subject:
    """A training whose step is measured: the configs, and the latents' autoencoder."""

    name: str
    script: Any
    config: str
    classes: int | None = None
    autoencoder: str | None = None


LARGE = (
    Subject("pixels", ddpm_accelerate, "clothing64_ddpm", 10),
    Subject("latents", train_ldm, "own128_ldm", 10, "own128_vae"),
    Subject("autoencoder", train_vae, "own128_vae"),
)
SMALL = (  # for trying it out on a CPU
    Subject("pixels", ddpm_accelerate, "digits_ddpm", 10),
    Subject("latents", train_ldm, "digits_ldm", 10, "digits_vae"),
    Subject("autoencoder", train_vae, "digits_vae"),
)


def build_loop(subject: Subject, overrides: list[str]) -> BareDiffusion | BareStage:
    """The bare loop of a subject in float32 and channels_last, as its script has it. An autoencoder is in its last stage."""
    cfg = load(ROOT / "configs" / f"{subject.config}.json", subject.script.Config, overrides)
    if subject.script is train_vae:
        return BareStage(cfg, len(cfg.stages) - 1)
    shape = cfg.image.shape
    if subject.autoencoder is not None:
        vae = load(ROOT / "configs" / f"{subject.autoencoder}.json", train_vae.Config)
        shape = vae.model.latent_shape(vae.image.size)
    return BareDiffusion(cfg, shape, subject.classes)


def networks_of(loop: BareDiffusion | BareStage) -> list[nn.Module]:
    """Those that are trained, and the frozen one of a perceptual loss."""
    if isinstance(loop, BareDiffusion):
        return [loop.network]
    return [network for network in (loop.network, loop.discriminator, loop.perceptual) if network is not None]


def set_way(loop: BareDiffusion | BareStage, way: Way, device: torch.device, backend: str) -> Callable[[], object]:
    """A training step of the loop in a way. Its networks run in bf16 as accelerate makes them, and give float32."""
    from accelerate.utils import convert_outputs_to_fp32

    for network in networks_of(loop):
        if way.last:
            channels_last(network)
        else:
            network.to(memory_format=torch.contiguous_format)  # pyright: ignore[reportCallIssue]
        if way.bf16:
            network.forward = convert_outputs_to_fp32(torch.autocast(device.type, torch.bfloat16)(network.forward))
        if way.compiled:
            network.compile(backend=backend, **({"mode": "reduce-overhead"} if way.graphs else {}))
    if isinstance(loop, BareDiffusion) and not way.last:
        loop.x0 = loop.x0.contiguous()

    def step() -> None:
        if way.graphs:
            torch.compiler.cudagraph_mark_step_begin()
        loop.step()

    return step


def operations_of(step: Callable[[], object]) -> float:
    """How many floating-point operations a step takes."""
    counter = FlopCounterMode(display=False)
    with counter:
        step()
    return counter.get_total_flops()


def measure(step: Callable[[], object], device: torch.device, seconds: float, group: int = 4) -> Row:
    """The median seconds of a step in about so many seconds, in groups, after the first steps; what those took; the memory."""
    cuda, began = device.type == "cuda", time.perf_counter()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    for _ in range(min(WARMUP, group)):
        step()
    wait(device)
    first = time.perf_counter() - began
    spent, began = list[float](), time.perf_counter()
    while not spent or time.perf_counter() - began < seconds:
        before = time.perf_counter()
        for _ in range(group):
            step()
        wait(device)
        spent.append((time.perf_counter() - before) / group)
    memory = {"memory_gigabytes": torch.cuda.max_memory_allocated() / 1e9} if cuda else {}
    return {"step_seconds": statistics.median(spent), "first_steps_seconds": first, **memory}


def peak_rate(device: torch.device) -> float | None:
    """The card's dense bf16 operations a second, as its maker says; None of one that is not in the list."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((rate for card, rate in PEAK.items() if card in name), None)


def product_rate(device: torch.device, side: int) -> float:
    """The operations a second of a bf16 product of two square matrices, which a card comes nearest to its peak with."""
    a = torch.randn(side, side, device=device, dtype=torch.bfloat16)
    return 2 * side**3 / measure(lambda: a @ a, device, 0.5)["step_seconds"]


def measure_steps(file: Path, deadline: float, *, small: bool = False, seconds: float = 1.0) -> dict[str, Any]:
    """The table, written into `file` after each row, until `deadline` (of time.monotonic). The ways without a compiler come
    first, then those with one, subject by subject, since CUDA graphs take the code that is compiled by then. A row that fails
    says why, one that has no time left says so, and one that a kill ends stays `running`."""
    subjects, overrides = (SMALL, ["batch_size=2"]) if small else (LARGE, [])
    backend = "eager" if small else "inductor"
    device = script_device()
    torch.backends.cudnn.benchmark, torch.backends.cuda.matmul.allow_tf32 = device.type == "cuda", False  # as the scripts do
    table: dict[str, Any] = {"machine": machine(), "peak": peak_rate(device), "rows": []}
    table["product"] = product_rate(device, 256 if small else 8192)
    operations = dict[str, float]()
    jobs = [(title, subject) for title, way in WAYS.items() if not way.compiled for subject in subjects]
    jobs += [(title, subject) for subject in subjects for title, way in WAYS.items() if way.compiled]
    for title, subject in jobs:
        row: Row = {"subject": subject.name, "config": subject.config, "way": title, "state": "running"}
        table["rows"].append(row)
        write_whole(file, as_json(table))
        row |= _measure_row(subject, WAYS[title], device, operations, deadline, (overrides, backend, seconds))
        write_whole(file, as_json(table))
    return table


def _measure_row(
    subject: Subject,
    way: Way,
    device: torch.device,
    operations: dict[str, float],
    deadline: float,
    how: tuple[list[str], str, float],
) -> Row:
    overrides, backend, seconds = how
    needed = seconds * (15 if way.graphs else 30 if way.compiled else 4)
    if way.graphs and device.type != "cuda":
        return {"state": "skipped: it needs a GPU"}
    if deadline - time.monotonic() < needed:
        return {"state": f"skipped: it takes {needed:.0f} s, and there is less time left"}
    try:
        torch.manual_seed(0)
        loop = build_loop(subject, overrides)
        step, batch = set_way(loop, way, device, backend), loop.cfg.batch_size
        if subject.name not in operations and not way.compiled:
            operations[subject.name] = operations_of(step)
        # the adaptive weight of an autoencoder goes back through a graph more than once
        with functorch.patch(donated_buffer=False):
            measured = measure(step, device, seconds, 4 if seconds else 1)
        rate = operations.get(subject.name, 0.0) / measured["step_seconds"]
        peak = peak_rate(device)
        speed = {"images_per_second": batch / measured["step_seconds"], "operations_per_second": rate}
        share = {"share_of_peak": rate / peak} if peak is not None else {}
        return {"state": "done", "batch": batch, "operations": operations.get(subject.name), **measured, **speed, **share}
    except Exception as error:  # such as no memory, or no compiler
        return {"state": f"failed: {type(error).__name__}: {' '.join(str(error).split())[:300]}"}
    finally:
        loop = step = None
        torch._dynamo.reset()
        gc.collect()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def table_of(steps: dict[str, Any]) -> str:
    """The table in Markdown."""
    lines = [f"A bf16 product of large matrices reaches {steps['product'] / 1e12:.3g} TFLOP/s here"]
    if steps["peak"] is not None:
        lines[0] += f", of the card's {steps['peak'] / 1e12:.0f}"
    head = "| | | step | images/s | TFLOP/s | of the bf16 peak | against float32 | memory | first steps |"
    lines += ["", head, "|" + " --- |" * 9]
    plain = {row["subject"]: row for row in steps["rows"] if row["way"] == "float32"}
    for row in sorted(steps["rows"], key=lambda row: [subject.name for subject in LARGE].index(row["subject"])):
        title = f"| {row['subject']} (`{row['config']}`) | {row['way']} |"
        if row["state"] != "done":
            lines.append(f"{title} {row['state']} | | | | | | |")
            continue
        seconds = row["step_seconds"]
        factor = plain.get(row["subject"], {}).get("step_seconds", float("nan")) / seconds
        share = f"{row['share_of_peak']:.1%}" if "share_of_peak" in row else ""
        memory = f"{row['memory_gigabytes']:.1f} GB" if "memory_gigabytes" in row else ""
        cells = [f"{seconds * 1e3:.1f} ms", f"{row['images_per_second']:.0f}", f"{row['operations_per_second'] / 1e12:.3g}"]
        cells += [share, f"{factor:.2f}", memory, f"{row['first_steps_seconds']:.1f} s"]
        lines.append(f"{title} {' | '.join(cells)} |")
    return "\n".join(lines)
