#!/usr/bin/env python
"""Train a diffusion model on pixels (DDPM, DDIM, v-prediction, rectified flow), or sample from one.

accelerate launch ddpm_accelerate.py -cfg configs/landscape64_ddpm.json --set data.path=PICTURES
python ddpm_accelerate.py --ckpt runs/landscape64_ddpm --ckpt_sampling
"""

from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pydantic
import torch

from src.config import (
    Length,
    Span,
    UserError,
    config,
    dump,
    free,
    load,
    run_script,
    to_steps,
    training_arguments,
    wrong,
)
from src.data import HeldOut, ImageConfig, Sources, open_data
from src.diffusion import ProcessConfig, build_process
from src.models import UNetConfig
from src.sampling import Sampler
from src.sampling.files import sample_checkpoints
from src.sampling.opened import build_unet, count_classes
from src.sampling.preview import PreviewConfig, first_pictures, held_out_loss, preview
from src.training import checkpoint
from src.training.checkpoint import CheckpointConfig, export
from src.training.clock import Cadence, Clock
from src.training.ema import EMA, EMAConfig
from src.training.launch import (
    MachineConfig,
    StepGate,
    StopRequest,
    agree,
    explain_out_of_memory,
    settle_reducer,
    start,
    start_trackers,
)
from src.training.optimizer import OptimizerConfig, adamw, clip_gradients, learning_rate, update
from src.training.run import LogConfig, RunDirectory, describe_data, describe_run
from src.training.seeds import generator, normal, torch_seed, uniforms
from src.training.state import Meter, Trained
from src.training.stream import split_batch, stream, to_network


@config
class Config(MachineConfig):
    """All there is to set. `batch_size` counts the images of an optimiser step, on all devices together.

    Without `class_conditional` the data decides: classes are learned where there are any; previews are guided there alone.
    """

    name: str = pydantic.Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    seed: int = pydantic.Field(0, ge=0, lt=2**32)
    data: Sources
    held_out: HeldOut = 0.0
    image: ImageConfig
    class_conditional: bool | None = None
    label_dropout: float = pydantic.Field(0.0, ge=0, le=1)
    balance_classes: bool = False
    process: ProcessConfig
    model: UNetConfig
    optimizer: OptimizerConfig
    steps: Length
    batch_size: int = pydantic.Field(gt=0)
    micro_batch_size: int | None = pydantic.Field(None, gt=0)
    ema: EMAConfig = EMAConfig()
    preview: PreviewConfig = PreviewConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    log: LogConfig = LogConfig()
    export_every: Length | None = free(None)
    export_dir: str = free("models")
    max_nonfinite_steps: int = free(10, ge=1)

    @pydantic.field_validator("process")
    @classmethod
    def _trainable(cls, process: ProcessConfig) -> ProcessConfig:
        if process.variance == "learned":
            raise wrong("variance: 'learned' cannot be trained here (it is for imported networks); use small or large")
        return process


def main() -> int:
    parser = training_arguments(Config, __doc__ or "", default="configs/landscape64_ddpm.json")
    parser.add_argument("--ckpt", metavar="FILE", action="append", default=[], help="with --ckpt_sampling; repeatable")
    parser.add_argument("--ckpt_sampling", action="store_true", help="sample from each --ckpt into results/")
    args = parser.parse_args()
    if args.ckpt_sampling:
        return sample_checkpoints(args.ckpt, Path("results"))
    if args.ckpt:
        raise UserError("--ckpt is for sampling: add --ckpt_sampling; a run goes on by itself when started again")
    cfg = load(args.config, Config, args.set)
    with explain_out_of_memory(cfg.batch_size, cfg.micro_batch_size):
        return train(cfg, Path(args.run_dir or f"runs/{cfg.name}"), dry_run=args.dry_run)


def train(cfg: Config, run_dir: Path, *, dry_run: bool) -> int:
    # Start on the devices there are.
    accelerator = start(cfg, trackers=() if dry_run else cfg.log.trackers, folder=run_dir)
    device, dtype = accelerator.device, getattr(torch, cfg.dtype)
    split = split_batch(cfg.batch_size, cfg.micro_batch_size, rank=accelerator.process_index, world=accelerator.num_processes)

    # Look at the data.
    train_set, held_out = open_data(cfg.data, cfg.held_out)
    num_classes = count_classes(cfg.class_conditional, train_set.class_names)
    facts = describe_data(train_set, held_out)

    def resolve(length: int | Span) -> int:
        return to_steps(length, batch_size=cfg.batch_size, num_images=len(train_set))

    total_steps = resolve(cfg.steps)

    # Build process, network, optimiser, EMA, and the sampler of the previews.
    process = build_process(cfg.process)
    shape = (cfg.image.channels, cfg.image.size, cfg.image.size)
    torch.manual_seed(torch_seed(cfg.seed, "weights"))
    network = build_unet(cfg.model, cfg.image, num_classes).to(device, dtype)
    bare_optimizer = adamw(network.parameters(), cfg.optimizer)
    rate_at = learning_rate(cfg.optimizer, total_steps, resolve)
    ema = EMA(network, cfg.ema, cfg.batch_size)
    trained = Trained(network, bare_optimizer, ema)
    sampler = Sampler(
        ema.network,
        process,
        cfg.preview.sampler if num_classes is not None else replace(cfg.preview.sampler, guidance=1.0),
        shape=shape,
        num_classes=num_classes,
        clip_x0=cfg.process.clip,
        guidable=cfg.label_dropout > 0,
    )

    # Go on where the run was.
    run = RunDirectory(run_dir, writes=accelerator.is_main_process and not dry_run)
    step, progress = 0, {}
    resumed = None if dry_run else agree(run.newest_checkpoint() if run.writes else None)
    if resumed is not None:
        progress = run.adopt_progress(resumed, facts)
        step = progress["step"]
        trained.load(resumed)
    run.hold_config(cfg, resumed)
    if step >= total_steps and checkpoint.damage(run.final) is None:
        run.say(f"{run_dir} is finished ({step} steps); sample from it: python sample.py {run_dir}")
        return 0
    model, optimizer = accelerator.prepare(network, bare_optimizer)
    if accelerator.scaler is not None and "scaler" in progress:
        accelerator.scaler.load_state_dict(progress["scaler"])
    settle_reducer(accelerator, model, torch.zeros(1, *shape, device=device, dtype=dtype), torch.zeros(1, device=device))
    meter = Meter(accelerator, progress.get("meter"))
    best = progress.get("best")
    stop = StopRequest()
    gate = StepGate(accelerator, stop, every_minutes=cfg.checkpoint.every_minutes, patience=cfg.max_nonfinite_steps)
    gate.skipped_in_a_row = progress.get("skipped_in_a_row", 0)

    # Say what will happen.
    run.begin(step, cfg, facts, train_set, held_out)
    start_trackers(accelerator, cfg.log.project, run_dir, cfg, step)
    log_now, preview_now, save_now, export_now = cadences = [
        Cadence(word, resolve(length) if length is not None else None)
        for word, length in (
            ("log", cfg.log.every),
            ("preview", cfg.preview.every),
            ("save", cfg.checkpoint.every),
            ("export", cfg.export_every),
        )
    ]
    run.say(describe_run(cfg.name, facts, split, total_steps, trained.num_parameters, step, device, cadences))
    if run.writes and step == 0:
        first_pictures(run.path, process, train_set, cfg.image, cfg.seed)
    batches = stream(
        train_set,
        cfg.image,
        split,
        seed=cfg.seed,
        balanced=cfg.balance_classes,
        start_step=step,
        workers=cfg.workers,
        device=device,
    )
    clock = Clock(step, total_steps, split.batch, shown=accelerator.is_main_process)

    # Train.
    model.train()
    while step < total_steps:
        # Draw noise, times and dropped labels for the whole batch; each rank takes its share below.
        rng = generator(cfg.seed, "step", step)
        u, dropped = uniforms(rng, split.batch), uniforms(rng, split.batch) < cfg.label_dropout
        eps = normal((split.batch, *shape), cfg.seed, "noise", step, device=device, dtype=dtype)

        # Gradients: every loss is its sum over the micro-batch times world size over the batch.
        for part in range(split.accumulation):
            micro, here = next(batches), split.of_step(part)
            condition = {}
            if num_classes is not None:
                null = dropped[here] | (micro.labels < 0)
                condition["labels"] = torch.where(null, num_classes, micro.labels).to(device, non_blocking=True)
            if cfg.model.dropout:
                torch.manual_seed(torch_seed(cfg.seed, "dropout", step, micro.position))
            with accelerator.no_sync(model) if part < split.accumulation - 1 else nullcontext():
                x0 = to_network(micro.images, device, dtype)
                loss = process.losses(model, x0, eps[here], process.draw_times(u[here]), **condition).loss.sum()
                accelerator.backward(loss * (split.world / split.batch))
            meter.add(loss.detach(), split.micro)

        # Update. By now it is known whether the step before was finite: then its weights enter the EMA.
        norm = clip_gradients(accelerator, model, cfg.optimizer)
        if (counted := gate.settle()) is not None:
            ema.update(network, counted * split.batch)
        rate = rate_at(step)
        update(optimizer, rate, norm)
        step += 1
        gate.send(step, torch.isfinite(norm))
        clock.tick()
        if dry_run:
            if clock.measured(device, step):
                batches.close()
                clock.report(cfg.name, split, trained.num_parameters, len(train_set), device)
                return 0
            continue

        # Now and then: log, preview, save. All of it waits for the device.
        last = step == total_steps
        if not (last or gate.stop or gate.save or any(due(step) for due in cadences)):
            continue
        if (counted := gate.settle()) is not None:
            ema.update(network, counted * split.batch)
        values, keep = {}, save_now(step) or last
        if log_now(step) or last:
            values = {"loss": meter.read(), "lr": rate, "grad_norm": float(norm)} | clock.read(len(train_set))
        if preview_now(step) or last:
            picture = run.samples / f"step_{step:08d}.png"
            preview(sampler, cfg.preview, picture, class_names=train_set.class_names, accelerator=accelerator)
            if held_out is not None:
                values["held_out_loss"] = held_out_loss(
                    ema.network,
                    process,
                    held_out,
                    cfg.image,
                    batch_size=split.micro,
                    num_classes=num_classes,
                    accelerator=accelerator,
                )
                if best is None or values["held_out_loss"] < best["held_out_loss"]:
                    best = {"step": step, "held_out_loss": values["held_out_loss"]}
                    keep |= cfg.checkpoint.keep_best
        if values:
            run.log(step, values)
            accelerator.log(values, step=step)
            run.say_progress(clock, step, total_steps, values)
        if (keep or gate.save or gate.stop) and gate.skipped_in_a_row == 0:  # a run gone bad must not rotate out good ones
            state = {"step": step, "meter": meter.saved(), "best": best, "skipped_in_a_row": gate.skipped_in_a_row}
            if accelerator.scaler is not None:
                state["scaler"] = accelerator.scaler.state_dict()
            if run.writes:
                run.save(trained.tensors(), {"progress": state, "config": dump(cfg), "data": facts}, cfg.checkpoint)
            gate.saved()
        if export_now(step) and run.writes:
            file = Path(cfg.export_dir) / f"ckpt_epoch{step * split.batch // len(train_set)}_ddpm.pt"
            export(file, trained.tensors()["ema"], dump(cfg), facts, step)
        if gate.stop and not last:
            clock.close()
            batches.close()
            run.finish("stopped", step, total_steps, f"stopped at step {step} and saved; to go on, run the same command again")
            accelerator.end_training()
            return 1

    # Leave what sampling needs, and say what to do next.
    clock.close()
    batches.close()
    if run.writes:
        documents = {"progress": {"step": step}, "config": dump(cfg), "data": facts}
        checkpoint.write_folder(run.final, {"ema": trained.tensors()["ema"]}, documents)
        run.draw_curve("loss", "held_out_loss")
    run.finish(
        "finished",
        step,
        total_steps,
        f"finished; see {run.samples}, and draw more: python sample.py {run_dir} --frames",
    )
    accelerator.end_training()
    return 0


if __name__ == "__main__":
    run_script(main)
