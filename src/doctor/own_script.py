"""The proof with the config's own script: it trains a shrunk config on all processes together, on one alone, and again from a
checkpoint. The config takes ten steps in seconds, on drawn data and without weights."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError, dump, script_command
from ..data.conditions import EdgesCondition, LowCondition, PairedCondition
from ..data.points import GaussianSource, MoonsSource
from ..data.sources import ShapesSource
from ..models import VAE, MLPConfig, VAEConfig
from ..models.unet import EncoderConfig
from ..runtime.checkpoint import digest_of, newest, read_tensors, step_folder, verify_checkpoint, write_folder
from ..runtime.launch import MachineConfig, undetermined
from ..runtime.processes import broadcast
from ..training.autoencoder_stages import StagedConfig
from ..training.config import BlendConfig, DiffusionConfig, LatentConfig, PreviewConfig, TrainConfig
from ..training.entry import keep_signals
from ..training.rehearsal import compare_tensors, rehearsal_config, short_stages
from ..training.run_mode import RunMode, Train, call
from .health import Verdict, verdict_on

STEPS = 10
BROKEN = "do not train on these devices together: try fewer (--processes), NCCL_P2P_DISABLE=1, another torch or driver"
LAUNCHER = ("WORLD_SIZE", "RANK", "LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")


def shrink(cfg: TrainConfig, folder: Path, machine: MachineConfig, batch_size: int, micro_batch_size: int) -> TrainConfig:
    """The config for `STEPS` steps (of an autoencoder as many in all of its stages) with the network's kind, the optimizer and
    the losses as they are, but the perceptual one and the alignment, which need weights. An autoencoder that the config names
    is replaced by a random one in `folder`. Its checkpoints are kept all."""
    network = "classifier" if hasattr(cfg, "classifier") else "model"
    if isinstance(cfg.preview, PreviewConfig):  # the guide of its previews draws larger images
        cfg = replace(cfg, preview=replace(cfg.preview, sampler=replace(cfg.preview.sampler, guide_with=None)))
    small = _small_network(getattr(cfg, network))
    changes: dict[str, Any] = {field.name: getattr(machine, field.name) for field in fields(machine)}
    changes |= {"name": "smoke_doctor", "batch_size": batch_size, "micro_batch_size": micro_batch_size, "steps": STEPS}
    changes |= {
        "held_out": 0.0,
        "stop": None,
        "init_from": None,
        "compile": False,
        "workers": 0,
        "pairs": None,
        "max_nonfinite_steps": 3,
    }
    changes |= {network: small, "data": MoonsSource(source="moons", count=64)}
    source: Any = changes["data"]
    if cfg.image is not None:
        latent = isinstance(cfg, LatentConfig) and cfg.autoencoder is not None
        size = max(16, getattr(small, "factor", 1) * (2 if latent else 1))
        changes |= {
            "image": replace(cfg.image, size=size, aspect=None),
            "data": ShapesSource(source="shapes", count=24, size=size),
        }
        source = replace(changes["data"], split="test")
        condition = getattr(cfg, "condition", None)
        if isinstance(condition, LowCondition):
            changes["condition"] = replace(condition, size=size // 2)
        elif isinstance(condition, PairedCondition):  # shapes have no partners
            changes["condition"] = EdgesCondition(kind="edges", space=condition.space)
        if latent:
            path = _write_random_autoencoder(folder / "autoencoder", cfg.image.channels, size)
            changes |= {"autoencoder": path, "latents": str(folder / "latents"), "encode_batch_size": 4}
    if isinstance(cfg, DiffusionConfig) and cfg.process.loss.contrast is not None:
        contrast = replace(cfg.process.loss.contrast, group=micro_batch_size)
        changes["process"] = replace(cfg.process, loss=replace(cfg.process.loss, contrast=contrast))
    if isinstance(cfg, BlendConfig) and not isinstance(cfg.source, GaussianSource):
        changes["source"] = source
    if isinstance(cfg, StagedConfig):
        plain = {"perceptual": None, "alignment": None, "image_size": None, "batch_size": None, "micro_batch_size": None}
        stages = short_stages(cfg, -(-STEPS // len(cfg.stages)))
        turned = (stage.equivariance and replace(stage.equivariance, turns=True) for stage in stages)  # no scale is left
        changes["stages"] = tuple(
            replace(stage, equivariance=term, **plain) for stage, term in zip(stages, turned, strict=True)
        )
        changes["image"] = replace(cfg.image, size=max(32, small.factor), aspect=None)
        changes["discriminator"] = replace(cfg.discriminator, base_channels=8, layers=min(2, cfg.discriminator.layers))
    return rehearsal_config(cfg, save_every=1, **changes)


def _small_network(network: Any) -> Any:
    if isinstance(network, MLPConfig):
        return replace(network, width=24, layers=2)
    if isinstance(network, VAEConfig):
        bottleneck = replace(network.bottleneck, codes=16) if network.bottleneck.kind == "vq" else network.bottleneck
        widths = (16,) * len(network.widths)
        return replace(network, widths=widths, blocks=1, norm_groups=8, head_channels=None, bottleneck=bottleneck)
    if isinstance(network, EncoderConfig):
        heads = {"head_channels": 16 if network.num_heads is None else None, "num_heads": network.num_heads and 2}
        mult = tuple(1.0 if mult == min(network.channel_mult) else 2.0 for mult in network.channel_mult)
        return replace(network, base_channels=16, channel_mult=mult, blocks=1, norm_groups=8, **heads)
    return network


def _write_random_autoencoder(folder: Path, channels: int, size: int) -> str:
    vae = VAEConfig(widths=(8, 16), blocks=1, norm_groups=4)
    torch.manual_seed(0)
    document = {"kind": "atelier", "model": dump(vae), "channels": channels, "tanh": False, "sizes": [size]}
    document |= {"path": str(folder), "digest": "random"}
    write_folder(folder, {"autoencoder": VAE(vae, channels).state_dict()}, {"autoencoder_config": document})
    return str(folder)


class OwnScript:
    """`train` of the script of a config, with a shrunk config, in `folder`, which is the first process's on all of them."""

    def __init__(self, cfg: TrainConfig, folder: Path, machine: MachineConfig, batch_size: int, micro_batch_size: int) -> None:
        module = sys.modules[type(cfg).__module__]
        self.train: Train = module.train
        self.path, self.folder = Path(str(module.__file__)), folder
        machine = replace(machine, cpu_threads=1, deterministic=True)
        self.cfg = shrink(cfg, folder, machine, batch_size, micro_batch_size)
        stages = len(self.cfg.stages) if isinstance(self.cfg, StagedConfig) else 1
        self.steps = stages * -(-STEPS // stages)
        self.name = f"{self.path.name}, shrunk, in {'bf16' if machine.mixed_precision == 'bf16' else machine.dtype}"

        self.state: dict[str, dict[str, Tensor]] | None = None  # what `after_steps` has found
        self.undetermined: str | None = None  # what torch has no deterministic way for on this device

    def run(self, name: str) -> dict[str, dict[str, Tensor]] | None:
        """Train to the last step in the run directory `name` on all processes: weights, moments and EMA as this process has
        them in the end, or None where the last step is not saved, since a loss is not finite."""
        run_mode, folder = RunMode(quiet=True, says_at_once=False), self.folder / name
        with as_before(), contextlib.redirect_stdout(io.StringIO()):
            try:
                status = call(self.train, self.cfg, folder, run_mode, self.steps)
            except UserError as error:
                if self.undetermined is not None or (missing := undetermined(error.__cause__)) is None:
                    raise
                self.undetermined, self.cfg = missing, replace(self.cfg, deterministic=False)
                torch.use_deterministic_algorithms(False)
                return self.run(f"{name} as well as can be")
            if status:
                raise UserError("the training was stopped; run it again")
        assert run_mode.train_state is not None
        tensors = run_mode.train_state.tensors()
        is_saved = broadcast(verify_checkpoint(step_folder(folder / "checkpoints", self.steps)) is None)
        return tensors if is_saved else None

    def run_alone(self) -> dict[str, Tensor]:
        """Train with one process, which the script starts as a person would: its weights in the end."""
        path, run = self.folder / "alone.json", self.folder / "alone"
        path.write_text(json.dumps(dump(self.cfg)), encoding="utf-8")
        words = [*script_command(self.path), "-cfg", str(path), "--run-dir", str(run)]
        environment = {key: value for key, value in os.environ.items() if not key.startswith(LAUNCHER)}
        done = subprocess.run(words, env=environment, capture_output=True, text=True, stdin=subprocess.DEVNULL)
        if done.returncode:
            lines = [line.strip() for line in done.stderr.splitlines() if line.strip()] or ["no word why"]
            raise UserError(f"{self.path.name} fails on one process: {lines[-1][:300]}")
        return read_tensors(step_folder(run / "checkpoints", self.steps), "model")

    def read_problem(self, name: str) -> str | None:
        """Why the newest checkpoint of a run cannot be read here."""
        checkpoint, passed = newest(self.folder / name / "checkpoints")
        return None if checkpoint is not None and not passed else "; ".join(passed) or "it is not here"


@contextlib.contextmanager
def as_before() -> Iterator[None]:
    """In the end signals, threads, TF32 and the choice of algorithms are as they were."""
    threads, tf32 = torch.get_num_threads(), torch.backends.cudnn.allow_tf32
    exact, warn_only = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        with keep_signals():
            yield
    finally:
        torch.backends.cudnn.allow_tf32 = tf32
        torch.set_num_threads(threads)
        torch.use_deterministic_algorithms(exact, warn_only=warn_only)


def gather(value: Any) -> list[Any]:
    """What each rank found, on all ranks."""
    from accelerate.utils import gather_object

    return gather_object([value])


def relative_difference(weights: dict[str, Tensor], reference: dict[str, Tensor]) -> float:
    """The norm of the difference of all weights, relative to the norm of the reference's."""
    if weights.keys() != reference.keys():
        return float("inf")
    one, other = (torch.cat([state[key].double().flatten() for key in reference]) for state in (weights, reference))
    return float((one - other).norm() / other.norm())


def after_steps(script: OwnScript) -> Verdict:
    """Ten steps of the script; then weights, moments and EMA are the same on all ranks, to the bit, and one process's too."""
    state = script.state = script.run("several")
    if state is None:
        return Verdict("fail", f"the loss is not finite after {script.steps} steps", BROKEN)
    digests = gather(digest_of({f"{part} {name}": value for part in state for name, value in state[part].items()}))
    if len(digests) == 1:
        return Verdict("skip", f"one process: not tested; {script.steps} steps are taken, the loss stays finite")
    others = [str(rank) for rank, digest in enumerate(digests) if digest != digests[0]]
    if others:
        words = f"after {script.steps} steps rank {', '.join(others)} has other weights than rank 0"
        return Verdict("fail", words, BROKEN)
    worst = relative_difference(state["model"], script.run_alone()) if os.environ["RANK"] == "0" else 0.0
    allowed = 1e-9 if script.cfg.dtype == "float64" else 1e-2
    words = f"the same weights and moments on all {len(digests)} ranks, to the bit (hash {digests[0][:8]}); they are one "
    return verdict_on(worst <= allowed, f"{words}process's to {worst:.1e} ({allowed:g} allowed), {script.name}", BROKEN)


def resumed(script: OwnScript) -> Verdict:
    """The last step, from memory and from a checkpoint that all ranks read back into new objects: the same to the bit."""
    if script.state is None:
        return Verdict("skip", "not reached")
    if script.undetermined is not None:
        return Verdict("skip", f"not tested: there is no deterministic {script.undetermined} here")
    if os.environ.get("RANK", "0") == "0":  # the checkpoint before the last step is the only one there
        source, target = (script.folder / name / "checkpoints" for name in ("several", "again"))
        shutil.copytree(step_folder(source, script.steps - 1), step_folder(target, script.steps - 1))
    gather(None)  # wait for it
    reason = script.read_problem("again")
    if any(gather(reason)):
        advice = "is --run-dir on a file system that all machines see?"
        return Verdict("fail", f"the checkpoint cannot be read: {reason or 'on another rank'}", advice)
    others = compare_tensors(script.state, script.run("again") or {})
    if others:
        advice = "a run that is killed does not go on as it was: is the disk sound, is this torch known to be?"
        return Verdict("fail", f"{len(others)} tensors are others after going on from a checkpoint: {others[0]} ...", advice)
    mover = "AdamW" if script.cfg.optimizer.muon is None else "Muon and AdamW"
    same = f"step {script.steps} from a checkpoint is the uninterrupted one, to the bit"
    return Verdict("pass", f"{same}, {script.name}, moved by {mover}")
