#!/usr/bin/env python
"""Train diffusion on the latents of a frozen autoencoder, by class where the images have classes.

accelerate launch train_ldm.py -cfg configs/wikiart256_ldm.json
python train_ldm.py -cfg configs/landscape256_ldm.json --set data.path=IMAGES --dry-run
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
from functools import partial
from pathlib import Path

import torch

from src.config import Length, config, load, quoted, resumable_field, run_script, to_steps, training_arguments
from src.data import ImageConfig, Sources, check_images, describe_data
from src.data.pairs import open_pairs
from src.diffusion import build_process
from src.evaluation.quality import open_quality
from src.models import ImageModelConfig, build_model
from src.runs.autoencoder import autoencoder_for
from src.runs.densities import ImageDensity
from src.runs.opened import count_classes
from src.runs.starting import start_from
from src.runtime.launch import accumulating, compile_network, start, warm_up_ddp
from src.runtime.seeds import torch_seed
from src.runtime.sharding import build_device
from src.runtime.stream import plan_batch
from src.sampling import Sampler
from src.training.config import LatentConfig, PreviewConfig
from src.training.ema import EMA
from src.training.entry import run_training
from src.training.first_images import save_first_images
from src.training.inputs import Coupling, blank_inputs
from src.training.optimizer import build_optimizer, clip_gradients, learning_rate, update
from src.training.preview import measure_held_out, measure_quality, preview
from src.training.run_directory import check_ranks
from src.training.run_mode import RunMode
from src.training.session import Session
from src.training.state import TrainState, prepare
from src.training.step_noise import StepNoise, TimeSampler, check_contrast


@config
class Config(LatentConfig):
    """All that can be set, with the keys of LatentConfig. The classes of `init_from`, a latent run, may be others."""

    autoencoder: str = resumable_field()
    data: Sources
    image: ImageConfig
    model: ImageModelConfig
    steps: Length
    preview: PreviewConfig = PreviewConfig()


def main() -> int:
    args = training_arguments(Config, __doc__ or "", default="configs/landscape256_ldm.json").parse_args()
    return run_training(train, load(args.config, Config, args.set), args)


def train(cfg: Config, run_dir: Path, run_mode: RunMode, stop_at: int | None = None) -> int:
    # Start on the devices there are.
    accelerator = start(cfg, trackers=cfg.log.trackers, folder=run_dir, fsdp=True)
    device, dtype = accelerator.device, getattr(torch, cfg.dtype)
    rank, world = accelerator.process_index, accelerator.num_processes
    batch_plan = plan_batch(cfg.batch_size, cfg.micro_batch_size, rank=rank, world=world)

    # Look at the data and the autoencoder; encode the one with the other, unless that was done before.
    run_mode.enter_phase("looking at the data")
    train_set, held_out = open_pairs(cfg.data, cfg.held_out, cfg.condition)
    check_ranks(describe_data(train_set, held_out))
    warnings = check_images(cfg, run_dir, train_set, held_out)
    num_classes = count_classes(cfg.class_conditional, train_set.class_names)
    check_contrast(cfg.process.loss.contrast, num_classes, batch_plan)
    autoencoder = autoencoder_for(cfg.autoencoder, run_dir, device)
    factor = autoencoder.factor * cfg.model.factor
    images = Coupling(ImageDensity(train_set, held_out, cfg.image, factor, cfg.condition, cfg.augmentation))
    shape = autoencoder.latent_shape(images.data.buckets.most_frequent)
    torch.manual_seed(torch_seed(cfg.seed, "weights"))
    names, learned = cfg.condition_names(shape), cfg.process.variance == "learned"
    options = {"learned": learned, "condition_channels": len(names), "augmented": cfg.augmentation is not None}
    network = build_model(cfg.model, shape, num_classes, **options).to(build_device(accelerator), dtype)
    coupling = images.encoded(cfg, autoencoder, accelerator, run_dir)
    facts = coupling.facts
    resolve = partial(to_steps, batch_size=cfg.batch_size, num_images=coupling.num_images)

    # Build process, optimizer, EMA, and the sampler of the previews.
    run_mode.enter_phase("building the networks")
    process = build_process(cfg.process)
    times = TimeSampler(cfg.times, process)
    bare_optimizer = build_optimizer(network, cfg.optimizer)
    rate_at = learning_rate(cfg.optimizer, resolve)
    ema = EMA(network, cfg.ema)
    train_state = TrainState(network, bare_optimizer, ema, times=times)
    spec = cfg.preview.sampler.without_guidance(num_classes is None)
    options = coupling.sampler_options(cfg, device)
    sampler = Sampler(ema.network, process, spec, shape=shape, num_classes=num_classes, **options)
    quality = open_quality(cfg.quality, coupling.data, num_classes, accelerator)

    # Go on where the run was.
    session = Session(cfg, accelerator, run_dir, train_state, facts, resolve(cfg.steps), run_mode, stop_at)
    if session.is_finished:
        session.run.close(f"{run_dir} is finished ({session.step} steps); sample from it: python sample.py {quoted(run_dir)}")
        return 0
    batch_plan = session.place(batch_plan)
    if cfg.init_from is not None and not session.progress:
        session.run.say(start_from(cfg.init_from, train_set.class_names, network, ema.network, condition=names))
    if cfg.compile:
        compile_network(network, len(coupling.shapes), session.run.say)
    model, optimizer = prepare(accelerator, network, bare_optimizer, ema)
    warm_up_ddp(accelerator, model, *blank_inputs(cfg, shape, device, dtype))
    session.begin(train_set, held_out, [batch_plan], warnings)
    session.enter_stage(batch_plan, resolve, end=session.total_steps)
    if session.run.writes:
        autoencoder.keep(run_dir / "autoencoder")
        if session.is_fresh:
            with session.drawing("the first images"):
                save_first_images(run_dir, train_set, coupling.data.buckets, cfg.seed, process, sampler.codec, device)
    examples = coupling.held_out_examples()
    batches = coupling.stream(cfg, batch_plan, session.step, device)

    # Train.
    model.train()
    while session.step < session.total_steps:
        # Draw times, noise and dropped labels for the whole batch; each process takes its slice below.
        step = session.step
        step_noise = StepNoise(cfg, times, batch_plan, coupling.shape_at(step), step, device)

        # Gradients: every loss is its sum over the micro-batch times the number of processes over the batch.
        for part in range(batch_plan.accumulation):
            (micro_batch, source), local_slice = next(batches), batch_plan.of_step(part)
            torch.manual_seed(torch_seed(cfg.seed, "dropout", step, micro_batch.position))
            with accumulating(accelerator, model, part, batch_plan.accumulation):
                x0, eps = micro_batch.images, step_noise.match(micro_batch, source, local_slice, coupling.mean)
                condition = step_noise.condition(micro_batch, local_slice, num_classes)
                loss_terms = process.losses(model, x0, eps, step_noise.t[local_slice], **condition)
                loss = times.weigh(loss_terms.loss, local_slice).sum()
                accelerator.backward(loss * (batch_plan.world / batch_plan.batch))
            session.meter.add(batch_plan.micro, loss=loss, **{name: term.sum() for name, term in loss_terms.terms.items()})
        times.observe(accelerator)

        # Update. The EMA takes in the step before: by now all processes know whether it was finite, and none has waited.
        norm = clip_gradients(accelerator, model, cfg.optimizer)
        ema.update_after(session.take_finite_step(), network, batch_plan)
        update(optimizer, rate_at(step, session.total_steps), norm)
        session.end_step(torch.isfinite(norm))

        # Now and then, with this step in the EMA, too: log, preview, quality, save.
        if not session.is_anything_due():
            continue
        ema.update_after(session.take_finite_step(), network, batch_plan)
        values = session.collect_log(lr=rate_at(step, session.total_steps), grad_norm=norm)
        if session.is_due("preview"):
            preview(sampler, cfg.preview, session, train_set.class_names)
        if session.is_due("held_out"):
            values |= measure_held_out(sampler, examples, session)
        if quality is not None and session.is_due("quality"):
            values |= measure_quality(quality, sampler, cfg.preview.batch_size, session)
        session.report(values)
        session.save(keep=session.note_best(values))
        if session.should_stop:
            batches.close()
            return session.end_stopped()

    # Leave what sampling needs, the autoencoder with it, and say what to do next.
    batches.close()
    session.write_final(files=autoencoder.files())
    message = (
        f"finished; see {session.run.samples}, and draw more: python sample.py {quoted(run_dir)}{cfg.sample_options} --frames"
    )
    return session.end_finished(message, {"loss": ["loss", "held_out_loss"]})


if __name__ == "__main__":
    run_script(main)
