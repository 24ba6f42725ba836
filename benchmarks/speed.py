#!/usr/bin/env python
"""Images a second in training and in sampling: against a bare loop around the same network, and against the peers.

  python benchmarks/speed.py [--rounds 8] [--threads 2] [--device cuda]

The loop: the real scripts' training (on a GPU where there is one), and between any two of their steps one of a bare loop
(network, loss, clipping, optimiser and EMA alone, on images that are there already). The peers: a training step (forward,
loss, backward, clipping, AdamW or its own Adam) and sampling (each project's own DDIM, in float32) of diffusers' UNet2DModel
and of denoising-diffusion-pytorch's Unet, each in its own default shape, narrowed, and of our race's network, made deeper until
it has as many parameters. So what is compared is what a number of parameters costs: in the same shape ours is hardly faster
(benchmarks/unet.py), as all sit in the same convolutions. On a CPU each trains in its own precision: the peers in float32, ours
in bf16 where the processor has units for it, as its config says (the peers' images/s in bf16 are shown, too). All is measured
in turns. On a GPU all run in bf16 and compiled. Last come the seconds from launch to the first step and the most memory, each
in a process of its own.
"""

import argparse
import contextlib
import io
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import torch
import torch.nn.functional as F
from accelerate import PartialState
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import ddpm_accelerate
import train_ldm
import train_vae
from benchmarks.common import ROOT, environment, goal, in_turns, installed, machine, wait
from src import losses
from src.config import load
from src.diffusion import build_process
from src.models import VAE, Discriminator, UNetConfig, build_model
from src.models.layers import channels_last
from src.models.pretrained import import_torchvision
from src.runs.autoencoder import Autoencoder
from src.runtime.precision import native_precision
from src.runtime.stream import MicroBatch, to_network
from src.sampling import Sampler, SamplerConfig
from src.training import inputs
from src.training.autoencoder_stages import StageConfig
from src.training.ema import EMA
from src.training.optimizer import build_optimizer
from src.training.run_mode import RunMode

CONFIGS = ROOT / "configs"
WARMUP = 3  # turns that are not counted
QUIET = [
    "held_out=0.0",
    "preview.every=null",
    "preview.num_samples=1",
    "checkpoint.every=null",
    "checkpoint.every_minutes=null",
]
QUIET += ["log.trackers=[]", "log.every=1000000"]


class Size(NamedTuple):
    """A pair of configs (NAME_vae.json, NAME_ldm.json), what is changed in both, and how many turns make a round."""

    name: str
    overrides: list[str]
    turns: int


SIZES = {
    "16 px (the demo's)": Size("digits", [], 4),
    "64 px (clothing64's, on drawn shapes)": Size("clothing64", ["data.source=shapes", "data.size=64", "data.count=512"], 1),
}


def run(train: Callable[..., int], cfg: Any) -> None:
    """A script's training in a folder that is thrown away, without a word."""
    silence = io.StringIO()
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(silence), contextlib.redirect_stderr(silence):
        status = train(cfg, Path(folder) / "run", RunMode())
    assert status == 0, silence.getvalue()


def script_device() -> torch.device:
    """Where the scripts train."""
    return PartialState().device or torch.device("cpu")


def random_autoencoder(cfg: train_vae.Config) -> Autoencoder:
    """The autoencoder of a config as it begins, in channels_last as where it is trained."""
    network = channels_last(VAE(cfg.model, cfg.image.channels)).to(script_device()).eval().requires_grad_(False)
    document = {"kind": "atelier"}
    return Autoencoder(network, "random", document, "random", cfg.image.channels, cfg.model.latent_channels, cfg.model.factor)


# ---------------------------------------------------------------------------------------------- against a bare loop


class BareDiffusion:
    """What a step of ddpm_accelerate.py or train_ldm.py must compute, on its device, and nothing else: no stream, gate, meter
    or log."""

    def __init__(self, cfg: Any, shape: tuple[int, ...], num_classes: int | None) -> None:
        self.cfg, self.process, device = cfg, build_process(cfg.process), script_device()
        self.network = build_model(cfg.model, shape, num_classes, learned=cfg.process.variance == "learned").to(device)
        self.optimizer, self.ema = build_optimizer(self.network, cfg.optimizer), EMA(self.network, cfg.ema)
        self.x0 = torch.randn(cfg.batch_size, *shape, device=device).to(memory_format=torch.channels_last)
        self.labels = torch.randint(0, num_classes, (cfg.batch_size,), device=device) if num_classes is not None else None

    def step(self) -> None:
        t = self.process.draw_times(torch.rand(len(self.x0), dtype=torch.float64))  # on the CPU, as the scripts have them
        condition = {"labels": self.labels} if self.labels is not None else {}
        self.process.losses(self.network, self.x0, torch.randn_like(self.x0), t, **condition).loss.mean().backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), self.cfg.optimizer.clip or float("inf"))
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.ema.update(self.network, 10_000, len(self.x0))


class BareStage:
    """The same of train_vae.py in stage `number` (from 0)."""

    def __init__(self, cfg: train_vae.Config, number: int) -> None:
        self.cfg, self.stage, device = cfg, cfg.stages[number], script_device()
        self.network = channels_last(VAE(cfg.model, cfg.image.channels)).to(device)
        self.network.tanh = tanh_in(cfg.stages, number)
        self.discriminator = channels_last(Discriminator(cfg.discriminator, cfg.image.channels)).to(device)
        self.perceptual = losses.Perceptual(cfg.perceptual).to(device) if self.stage.perceptual is not None else None
        self.optimizer = build_optimizer(self.network, cfg.optimizer)
        self.judge_optimizer = build_optimizer(self.discriminator, cfg.discriminator_optimizer)
        self.ema = EMA(self.network, cfg.ema)
        self.noise = torch.randn(cfg.batch_size, *cfg.model.latent_shape(cfg.image.size), device=device)
        shape = (cfg.batch_size, *cfg.image.sides, cfg.image.channels)
        self.images = to_network(torch.randint(0, 256, shape).byte(), device)

    def step(self) -> None:
        stage, term, images = self.stage, self.stage.adversarial, self.images
        assert term is not None and term.adaptive
        output = self.network(images, self.noise)
        loss = losses.reconstruction_loss(stage.reconstruction, output.images, images).mean()
        if stage.perceptual is not None and self.perceptual is not None:
            loss = loss + stage.perceptual.weight * self.perceptual(output.images, images).mean()
        self.discriminator.requires_grad_(False)
        verdict = losses.generator_loss(term.loss, self.discriminator(output.images)).mean()
        ours, theirs = (
            torch.autograd.grad(part, self.network.last.weight, retain_graph=True)[0].norm() for part in (loss, verdict)
        )
        loss = loss + term.weight * (ours / theirs.clamp(min=1e-12)).clamp(max=1e4) * verdict
        loss = loss + stage.kl_weight * losses.kl_divergence(output.mean, output.logvar).mean()
        loss.backward()

        self.discriminator.requires_grad_(True)
        real, fake = self.discriminator(torch.cat([images, output.images.detach()])).chunk(2)
        losses.discriminator_loss(term.loss, real, fake).mean().backward()

        for network, optimizer, spec in (
            (self.network, self.optimizer, self.cfg.optimizer),
            (self.discriminator, self.judge_optimizer, self.cfg.discriminator_optimizer),
        ):
            nn.utils.clip_grad_norm_(network.parameters(), spec.clip or float("inf"))
            optimizer.step()
            optimizer.zero_grad()
        self.ema.update(self.network, 10_000, len(images))


def tanh_in(stages: tuple[StageConfig, ...], number: int) -> bool:
    """Whether tanh is on in a stage: once on, it stays."""
    return any(stage.tanh for stage in stages[: number + 1])


def judged_stages(size: Size, steps: int) -> str:
    """The stages of a config, each of so many steps and judged from its first on, as an override."""
    stages = json.loads((CONFIGS / f"{size.name}_vae.json").read_text())["stages"]
    for stage in stages:
        stage["steps"] = steps
        stage["adversarial"].pop("start_step", None)
    return f"stages={json.dumps(stages)}"


def terms(stages: tuple[StageConfig, ...], number: int) -> str:
    """A stage in words."""
    stage = stages[number]
    names = [stage.reconstruction, "KL", "adaptive adversary", *(["perceptual"] if stage.perceptual is not None else [])]
    return " + ".join(names) + (", tanh" if tanh_in(stages, number) else "")


Turn = tuple[float, float]  # seconds of a step of the script, and of the bare loop


def with_a_bare_loop(script: Any, module: Any, stream: str, cfg: Any, bare: Callable[[int], Any]) -> list[list[Turn]]:
    """The turns of each stage of a script's training: before each of its batches (from the `stream` of a module) comes a step
    of `bare(stage)`."""
    open_stream, spent = getattr(module, stream), list[list[Turn]]()

    def batches(*args: Any, **options: Any) -> Generator[MicroBatch, None, None]:
        loop, turns = bare(len(spent)), list[Turn]()
        spent.append(turns)
        device = script_device()
        with contextlib.closing(open_stream(*args, **options)) as images_stream:
            while True:
                began = time.perf_counter()
                loop.step()
                wait(device)
                between = time.perf_counter()
                yield next(images_stream)  # and the script makes its step
                wait(device)
                turns.append((time.perf_counter() - between, between - began))

    with patch.object(module, stream, batches):
        run(script.train, cfg)
    return spent


class Compared(NamedTuple):
    """Images/s of a script's training and of the bare loop, and the median of their ratio, turn by turn."""

    title: str
    script: float
    bare: float
    ratio: float


def compared(title: str, turns: Sequence[Turn], batch: int) -> Compared:
    measured = turns[WARMUP:]
    script, bare = (batch / statistics.median(seconds) for seconds in zip(*measured, strict=True))
    return Compared(title, script, bare, statistics.median(bare / script for script, bare in measured))


def measure_loops(rounds: int) -> list[Compared]:
    """A pixel run, a latent run and the stages of an autoencoder: the demo's."""
    steps = 4 * rounds + WARMUP + 1
    timed, comparisons = [*QUIET, "preview.sampler.steps=1", f"steps={steps}"], list[Compared]()
    pixels = load(CONFIGS / "digits_ddpm.json", ddpm_accelerate.Config, timed)
    shape = pixels.image.shape
    (turns,) = with_a_bare_loop(ddpm_accelerate, inputs, "stream", pixels, lambda _: BareDiffusion(pixels, shape, 10))
    comparisons.append(compared("pixels (digits_ddpm)", turns, pixels.batch_size))

    stages = judged_stages(SIZES["16 px (the demo's)"], steps)
    vae = load(CONFIGS / "digits_vae.json", train_vae.Config, [*QUIET, "preview.num_measured=1", stages])
    latents = load(CONFIGS / "digits_ldm.json", train_ldm.Config, [*timed, "preview.sheets=one"])
    with patch.object(train_ldm, "autoencoder_for", lambda *_: random_autoencoder(vae)):
        inside = vae.model.latent_shape(vae.image.size)
        (turns,) = with_a_bare_loop(train_ldm, inputs, "latent_stream", latents, lambda _: BareDiffusion(latents, inside, 10))
    comparisons.append(compared("latents (digits_ldm)", turns, latents.batch_size))

    for i, turns in enumerate(with_a_bare_loop(train_vae, train_vae, "stream", vae, lambda number: BareStage(vae, number))):
        comparisons.append(compared(f"autoencoder (digits_vae), {i + 1}: {terms(vae.stages, i)}", turns, vae.batch_size))
    return comparisons


# ---------------------------------------------------------------------------------------------- against the peers


@dataclass
class Racer:
    """A project's network with its optimiser, whether it trains in bf16, and how it draws `count` images with `calls` network
    calls."""

    network: Any
    optimizer: torch.optim.Optimizer
    call: Callable[[Tensor, Tensor], Tensor]
    draw: Callable[[int, int], Tensor]
    bf16: bool = False

    def gigaflops(self, device: torch.device) -> float:
        """Billions of operations of a network call for one image."""
        counter = FlopCounterMode(display=False)
        with counter, torch.no_grad():
            self.call(torch.zeros(1, 3, 32, 32, device=device), torch.zeros(1, device=device, dtype=torch.long))
        return counter.get_total_flops() / 1e9

    @property
    def parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.network.parameters())


def recipe() -> ddpm_accelerate.Config:
    return load(CONFIGS / "cifar10_race.json", ddpm_accelerate.Config)


def our_shape(parameters: int) -> UNetConfig:
    """The race's network made for more parameters: twice as wide with every level, down to 2 px, where weights cost least; the
    width of the deepest level brings it nearest to so many parameters."""
    plain = recipe().model
    assert isinstance(plain, UNetConfig)

    def shape_of(deepest: int) -> UNetConfig:
        mult = (1.0, 2.0, 4.0, 8.0, deepest / 4)
        return replace(plain, base_channels=16, channel_mult=mult, attention=("none",) * len(mult), norm_groups=4)

    def count(deepest: int) -> int:
        with torch.device("meta"):
            network = build_model(shape_of(deepest), (3, 32, 32), None)
        return sum(parameter.numel() for parameter in network.parameters())

    return shape_of(min(range(32, 129), key=lambda deepest: abs(count(deepest) - parameters)))


def our_racer(parameters: int, device: torch.device) -> Racer:
    cfg = recipe()
    process, network = build_process(cfg.process), build_model(our_shape(parameters), (3, 32, 32), None).to(device)

    def draw(count: int, calls: int) -> Tensor:
        spec = SamplerConfig(solver="ddim", steps=calls)
        sampler = Sampler(network, process, spec, shape=(3, 32, 32), num_classes=None, clip_x0=(-1.0, 1.0))
        return sampler.draw(0, range(count), None, device=device)

    bf16 = native_precision(device) == "bf16" if cfg.mixed_precision == "auto" else cfg.mixed_precision == "bf16"
    optimizer = build_optimizer(network, replace(cfg.optimizer, muon=None))
    return Racer(network, optimizer, lambda x, t: network(x, t.float()), draw, bf16)


def diffusers_racer(device: torch.device, width: int = 32) -> Racer:
    """The shape of its unconditional training script with `width` channels instead of 128."""
    import_torchvision()
    from diffusers.models.unets.unet_2d import UNet2DModel
    from diffusers.schedulers.scheduling_ddim import DDIMScheduler

    down, up = ["DownBlock2D"] * 6, ["UpBlock2D"] * 6
    down[4], up[1] = "AttnDownBlock2D", "AttnUpBlock2D"
    network: Any = UNet2DModel(
        sample_size=32,
        layers_per_block=2,
        block_out_channels=tuple(width * mult for mult in (1, 1, 2, 2, 4, 4)),
        down_block_types=tuple(down),
        up_block_types=tuple(up),
    ).to(device)  # pyright: ignore[reportArgumentType]

    def draw(count: int, calls: int) -> Tensor:
        solver: Any = DDIMScheduler(num_train_timesteps=1000)
        solver.set_timesteps(calls)
        x = torch.randn(count, 3, 32, 32, device=device)
        for t in solver.timesteps:
            x = solver.step(network(x, t).sample, t, x).prev_sample
        return x

    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6)
    return Racer(network, optimizer, lambda x, t: network(x, t).sample, draw)


def ddp_racer(device: torch.device, dim: int = 24) -> Racer:
    """Its default shape with `dim` 24 instead of 64."""
    import_torchvision()
    from denoising_diffusion_pytorch import GaussianDiffusion, Unet  # pyright: ignore[reportMissingImports]

    network: Any = Unet(dim=dim, dim_mults=(1, 2, 4, 8), flash_attn=True).to(device)

    def draw(count: int, calls: int) -> Tensor:
        diffusion: Any = GaussianDiffusion(network, image_size=32, sampling_timesteps=calls).to(device)
        with contextlib.redirect_stderr(io.StringIO()):
            return diffusion.sample(batch_size=count)

    return Racer(network, torch.optim.Adam(network.parameters(), lr=1e-4, betas=(0.9, 0.99)), network, draw)


PEERS: dict[str, Callable[[torch.device], Racer]] = {"diffusers": diffusers_racer, "denoising-diffusion-pytorch": ddp_racer}
PACKAGES = {"diffusers": "diffusers", "denoising-diffusion-pytorch": "denoising-diffusion-pytorch"}


def training_step(racer: Racer, batch: int, device: torch.device) -> Callable[[], None]:
    x, noise = torch.randn(batch, 3, 32, 32, device=device), torch.randn(batch, 3, 32, 32, device=device)
    t = torch.randint(0, 1000, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=racer.bf16):
            loss = F.mse_loss(racer.call(x, t).float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(racer.network.parameters(), 1.0)
        racer.optimizer.step()
        racer.optimizer.zero_grad()
        wait(device)

    return step


def drawing(racer: Racer, count: int, calls: int, device: torch.device) -> Callable[[], None]:
    @torch.no_grad()
    def draw() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            racer.draw(count, calls)
        wait(device)

    return draw


def measure_peers(rounds: int, batch: int, device: torch.device) -> list[str]:
    """The rows of the table and, after them, the lines about the goals."""
    at_least, rows, goal_lines = 1.5 if device.type == "cuda" else 2.0, list[str](), list[str]()
    calls = 5  # of an image: fifty would cost ten times as much
    for peer, build in PEERS.items():
        if installed(PACKAGES[peer]) is None:
            rows.append(f"| {peer}: not installed (`pip install -e '.[bench]'`) |" + " |" * 8)
            continue
        theirs = build(device)
        ours = our_racer(theirs.parameters, device)
        cells = [peer, *(f"{racer.parameters / 1e6:.2f} M, {racer.gigaflops(device):.2f}" for racer in (theirs, ours))]
        if device.type == "cuda":
            theirs.bf16 = True
            for racer in (ours, theirs):
                racer.network.compile()
        too = {"its in bf16": replace(theirs, bf16=True)} if device.type == "cpu" else {}
        steps = {"its": theirs, **too, "ours": ours}
        training = in_turns({name: training_step(racer, batch, device) for name, racer in steps.items()}, rounds)
        samplers = {"its": drawing(theirs, batch, calls, device), "ours": drawing(ours, batch, calls, device)}
        sampling = in_turns(samplers, max(2, rounds // 2), warmup=1)
        for what, spent, images in (("training", training, batch), ("sampling", sampling, batch * calls / 50)):
            ratio = statistics.median(theirs_s / ours_s for theirs_s, ours_s in zip(spent["its"], spent["ours"], strict=True))
            cells += [f"{images / statistics.median(times):.3g}" for times in spent.values()] + [f"{ratio:.2f}"]
            goal_lines.append(goal(f"{what}, our images/s over those of {peer} at equal parameters", ratio, at_least))
        rows.append(f"| {' | '.join(cells)} |")
    return [*rows, "", *goal_lines]


# ---------------------------------------------------------------------------------------------- start and memory


def launched(command: list[str], metrics: Path) -> tuple[float, float]:
    """Seconds from the launch to the first line of metrics.jsonl, and the most memory of the process, in MB (where there is
    no /proc, 0)."""
    began, first, megabytes = time.perf_counter(), None, 0.0
    process = subprocess.Popen(command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while process.poll() is None:
        if first is None and metrics.exists() and metrics.stat().st_size:
            first = time.perf_counter() - began
        with contextlib.suppress(OSError, StopIteration):  # the peak so far; what wait() gives counts this process, too
            status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
            megabytes = int(next(line.split()[1] for line in status if line.startswith("VmHWM"))) * 1024 / 1e6
        time.sleep(0.02)
    assert process.returncode == 0 and first is not None, command
    return first, megabytes


def measure_starts() -> list[str]:
    """The demo's runs, three steps each."""
    rows, stages = [], judged_stages(SIZES["16 px (the demo's)"], 3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for title, script, config, options in (
            ("pixels", "ddpm_accelerate", "digits_ddpm", ["steps=3", "preview.sampler.steps=1"]),
            ("autoencoder", "train_vae", "digits_vae", [stages, "preview.num_measured=1"]),
            (
                "latents",
                "train_ldm",
                "digits_ldm",
                ["steps=3", "preview.sampler.steps=1", "preview.sheets=one", "autoencoder=vae"],
            ),
        ):
            out = folder / title
            sets = [*QUIET[:-1], "log.every=1", *(one.replace("=vae", f"={folder / 'autoencoder'}") for one in options)]
            words = [word for one in sets for word in ("--set", one)]
            command = [sys.executable, f"{script}.py", "-cfg", f"configs/{config}.json", "--run-dir", str(out), *words]
            seconds, megabytes = launched(command, out / "metrics.jsonl")
            rows.append(f"| {title} ({config}) | {seconds:.1f} | {megabytes:.0f} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch", type=int, default=16, help="of the peers' table")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="of the peers' table")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    device = torch.device(args.device)
    print(f"{machine('denoising-diffusion-pytorch')}\n")
    print("| training | images/s | bare loop | ratio |\n| --- | --- | --- | --- |")
    loops = measure_loops(args.rounds)
    for title, script, bare, ratio in loops:
        print(f"| {title} | {script:.1f} | {bare:.1f} | {ratio:.3f} |", flush=True)
    print()
    for title, _, _, ratio in loops:
        print(goal(f"{title.partition(':')[0]} against the bare loop", ratio, 0.97))
    print(f"\n32 px, batch {args.batch}, {device}{', bf16, compiled' if device.type == 'cuda' else ''}\n")
    too = " | its in bf16" if device.type == "cpu" else ""
    head = f"| parameters, GFLOP a call: | its | ours | training, images/s: its{too} | ours in bf16 | ratio "
    print(f"{head}| sampling: its | ours | ratio |")
    print("|" + " --- |" * (10 if too else 9), flush=True)
    print("\n".join(measure_peers(args.rounds, args.batch, device)), flush=True)
    print("\n| start | seconds to the first step | most memory, MB |\n| --- | --- | --- |")
    print("\n".join(measure_starts()))


if __name__ == "__main__":
    main()
