#!/usr/bin/env python
"""Train a diffusion model on pixels (DDPM, DDIM, v-prediction, rectified flow), or sample from one.

accelerate launch ddpm_accelerate.py -cfg configs/landscape64_ddpm.json --set data.path=PICTURES
python ddpm_accelerate.py --ckpt runs/landscape64_ddpm --ckpt_sampling --num-samples 32 --guidance 2
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
from functools import partial
from pathlib import Path

import torch

from src.config import Length, config, load, resumable_field, run_script, to_steps, training_arguments
from src.data import ImageConfig, Sources, check_images, describe_data
from src.diffusion import build_process
from src.evaluation.quality import open_quality
from src.models import ImageModelConfig
from src.runs.opened import count_classes, start_from
from src.runtime.examples import image_examples
from src.runtime.launch import accumulating, start, warm_up_ddp
from src.runtime.seeds import torch_seed
from src.runtime.stream import plan_batch, stream, to_network
from src.sampling.checkpoints import parse_with_sampling, sample_checkpoints
from src.training.config import DiffusionConfig, PreviewConfig
from src.training.draws import StepNoise
from src.training.ema import EMA
from src.training.from_python import Given, from_python
from src.training.optimizer import build_optimizer, clip_gradients, learning_rate, update
from src.training.preview import preview, preview_sampler, save_first_images
from src.training.session import Session
from src.training.sharding import prepare
from src.training.state import TrainState
from src.training.time_sampler import TimeSampler
from src.training.trials import Attempt, run_training


@config
class Config(DiffusionConfig):
    """All that can be set, with the keys of DiffusionConfig. `init_from` may also be what convert.py made; its classes may be
    others. `export_every` writes the EMA weights as one .pt file into `export_dir`."""

    data: Sources
    image: ImageConfig
    model: ImageModelConfig
    steps: Length
    preview: PreviewConfig = PreviewConfig()
    export_every: Length | None = resumable_field(None)
    export_dir: str = resumable_field("models")


def main() -> int:
    parser = training_arguments(Config, __doc__ or "", default="configs/landscape64_ddpm.json")
    args, samples = parse_with_sampling(parser)
    if samples:
        return sample_checkpoints(args)
    return run_training(train, load(args.config, Config, args.set), args)


@from_python
def train(cfg: Config, run_dir: Path, attempt: Attempt, given: Given) -> int:
    # Start on the devices there are.
    accelerator = start(cfg, trackers=cfg.log.trackers, folder=run_dir, fsdp=True)
    device, dtype = accelerator.device, getattr(torch, cfg.dtype)
    split = plan_batch(cfg.batch_size, cfg.micro_batch_size, rank=accelerator.process_index, world=accelerator.num_processes)

    # Look at the data.
    attempt.enters("looking at the data")
    train_set, held_out = given.open_data(cfg)
    attempt.warnings = check_images(cfg, run_dir, train_set, held_out)
    num_classes = count_classes(cfg.class_conditional, train_set.class_names)
    facts = describe_data(train_set, held_out) | given.facts
    resolve = partial(to_steps, batch_size=cfg.batch_size, num_images=len(train_set))
    total_steps = resolve(cfg.steps)

    # Build process, network, optimiser, EMA, and the sampler of the previews.
    attempt.enters("building the networks")
    process = build_process(cfg.process)
    times = TimeSampler(cfg.times, process)
    shape = (cfg.image.channels, cfg.image.size, cfg.image.size)
    torch.manual_seed(torch_seed(cfg.seed, "weights"))
    network = given.build(cfg, accelerator, shape, num_classes, train_set, held_out)
    bare_optimizer = build_optimizer(network, cfg.optimizer)
    rate_at = learning_rate(cfg.optimizer, total_steps, resolve)
    ema = EMA(network, cfg.ema)
    trained = TrainState(network, bare_optimizer, ema, times=times)
    sampler = preview_sampler(cfg, cfg.preview, ema.network, process, shape, num_classes)
    quality = open_quality(cfg.preview.quality, train_set, cfg.image, num_classes, accelerator, attempt)

    # Go on where the run was.
    session = Session(cfg, accelerator, run_dir, trained, facts, total_steps=total_steps, attempt=attempt)
    if session.finished:
        session.run.close(f"{run_dir} is finished ({session.step} steps); sample from it: {given.how_to_draw(run_dir)}")
        return 0
    split = session.place(split)
    if cfg.init_from is not None and not session.progress:
        session.run.say(start_from(cfg.init_from, train_set.class_names, network, ema.network))
    if cfg.compile:
        network.compile()
    model, optimizer = prepare(accelerator, network, bare_optimizer, ema)
    warm_up_ddp(accelerator, model, torch.zeros(1, *shape, device=device, dtype=dtype), torch.zeros(1, device=device))
    session.begin(train_set, held_out, total_images=split.images_at(total_steps), images=split.images_at(session.step))
    session.enter(split, resolve, end=total_steps)
    if session.run.writes and session.fresh:
        with session.look("the first images"):
            save_first_images(run_dir, train_set, cfg.image, cfg.seed, process)
    examples = image_examples(held_out, cfg.image) if held_out is not None else None
    batches = stream(
        train_set, cfg.image, split, seed=cfg.seed, balanced=cfg.balance_classes, start_step=session.step, workers=cfg.workers,
        device=device,
    )  # fmt: skip

    # Train.
    model.train()
    while session.step < total_steps:
        # Draw times, noise and dropped labels for the whole batch; each rank takes its share below.
        step = session.step
        draws = StepNoise(
            times, split, shape, seed=cfg.seed, step=step, label_dropout=cfg.label_dropout, device=device, dtype=dtype
        )

        # Gradients: every loss is its sum over the micro-batch times world size over the batch.
        for part in range(split.accumulation):
            micro, here = next(batches), split.of_step(part)
            torch.manual_seed(torch_seed(cfg.seed, "dropout", step, micro.position))
            with accumulating(accelerator, model, part, split.accumulation):
                x0 = to_network(micro.images, device, dtype)
                condition = draws.condition(micro, here, num_classes)
                found = process.losses(model, x0, draws.eps[here], draws.t[here], **condition)
                loss = times.weigh(found.loss, here).sum()
                accelerator.backward(loss * (split.world / split.batch))
            session.meter.add(split.micro, loss=loss, **{name: term.sum() for name, term in found.terms.items()})
        times.observe(accelerator)

        # Update.
        norm = clip_gradients(accelerator, model, cfg.optimizer)
        session.settle()
        update(optimizer, rate_at(step), norm)
        session.count(torch.isfinite(norm))

        # Now and then: log, preview, quality, save, export.
        if not session.due:
            continue
        values = session.logged(lr=rate_at(step), grad_norm=norm)
        if session.now("preview"):
            values |= preview(sampler, cfg.preview, session, train_set.class_names, examples)
        if quality is not None and session.now("quality"):
            values |= quality.measure(sampler, cfg.preview.batch_size, session.run.say)
        session.report(values)
        session.save(keep=session.best_of(values))
        if session.now("export"):
            session.export(Path(cfg.export_dir), f"ckpt_epoch{split.images_at(session.step) // len(train_set)}_ddpm.pt")
        if session.leaves():
            batches.close()
            return session.end_stopped()

    # Leave what sampling needs, and say what to do next.
    batches.close()
    session.write_final()
    message = f"finished; see {session.run.samples}, and draw more: {given.how_to_draw(run_dir, ' --frames')}"
    return session.end_finished(message, {"loss": ["loss", "held_out_loss"]})


if __name__ == "__main__":
    run_script(main)
