#!/usr/bin/env python
"""Train a diffusion model on pixels (DDPM, DDIM, v-prediction, rectified flow), or sample from one.

accelerate launch ddpm_accelerate.py -cfg configs/landscape64_ddpm.json --set data.path=IMAGES
python ddpm_accelerate.py --ckpt runs/landscape64_ddpm --ckpt_sampling --num-samples 32 --guidance 2
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
from functools import partial
from pathlib import Path

import torch

from src.config import Length, config, load, resumable_field, run_script, to_steps, training_arguments
from src.data import ImageConfig, Sources, check_images
from src.diffusion import build_process
from src.evaluation.quality import open_quality
from src.models import ImageModelConfig
from src.runs.densities import ImageDensity
from src.runs.opened import count_classes
from src.runs.starting import start_from
from src.runtime.launch import accumulating, compile_network, start, warm_up_ddp
from src.runtime.seeds import torch_seed
from src.runtime.stream import plan_batch
from src.sampling import Sampler
from src.sampling.checkpoints import parse_with_sampling, sample_checkpoints
from src.training.config import DiffusionConfig, PreviewConfig
from src.training.ema import EMA
from src.training.entry import from_python, run_training
from src.training.first_images import save_first_images
from src.training.given import Given
from src.training.inputs import Coupling, blank_inputs
from src.training.optimizer import build_optimizer, clip_gradients, learning_rate, update
from src.training.preview import measure_held_out, measure_quality, preview
from src.training.run_mode import RunMode
from src.training.session import Session
from src.training.state import TrainState, prepare
from src.training.step_noise import StepNoise, TimeSampler, check_contrast


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
    args, samples = parse_with_sampling(training_arguments(Config, __doc__ or "", default="configs/landscape64_ddpm.json"))
    return sample_checkpoints(args) if samples else run_training(train, load(args.config, Config, args.set), args)


@from_python
def train(cfg: Config, run_dir: Path, run_mode: RunMode, stop_at: int | None, given: Given) -> int:
    # Start on the devices there are.
    accelerator = start(cfg, trackers=cfg.log.trackers, folder=run_dir, fsdp=True)
    device, dtype = accelerator.device, getattr(torch, cfg.dtype)
    rank, world = accelerator.process_index, accelerator.num_processes
    batch_plan = plan_batch(cfg.batch_size, cfg.micro_batch_size, rank=rank, world=world)

    # Look at the data.
    run_mode.enter_phase("looking at the data")
    train_set, held_out = given.open_data(cfg.data, cfg.held_out, cfg.image, cfg.condition)
    warnings = check_images(cfg, run_dir, train_set, held_out)
    num_classes = count_classes(cfg.class_conditional, train_set.class_names)
    check_contrast(cfg.process.loss.contrast, num_classes, batch_plan)
    coupling = Coupling(ImageDensity(train_set, held_out, cfg.image, cfg.model.factor, cfg.condition, cfg.augmentation))
    shape, facts, names = coupling.shape, coupling.facts | given.facts, cfg.condition_names(coupling.shape)
    resolve = partial(to_steps, batch_size=cfg.batch_size, num_images=coupling.num_images)

    # Build process, network, optimizer, EMA, and the sampler of the previews.
    run_mode.enter_phase("building the networks")
    process = build_process(cfg.process)
    times = TimeSampler(cfg.times, process)
    torch.manual_seed(torch_seed(cfg.seed, "weights"))
    network = given.build(cfg, accelerator, shape, num_classes, train_set, held_out)
    bare_optimizer = build_optimizer(network, cfg.optimizer)
    rate_at = learning_rate(cfg.optimizer, resolve)
    ema = EMA(network, cfg.ema)
    train_state = TrainState(network, bare_optimizer, ema, times=times)
    spec = cfg.preview.sampler.without_guidance(num_classes is None)
    sampler = Sampler(ema.network, process, spec, shape=shape, num_classes=num_classes, **coupling.sampler_options(cfg, device))
    quality = open_quality(cfg.quality, coupling.data, num_classes, accelerator)

    # Go on where the run was.
    session = Session(cfg, accelerator, run_dir, train_state, facts, resolve(cfg.steps), run_mode, stop_at)
    if session.is_finished:
        session.run.close(f"{run_dir} is finished ({session.step} steps); sample from it: {given.how_to_draw(run_dir)}")
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
    if session.run.writes and session.is_fresh:
        with session.drawing("the first images"):
            save_first_images(run_dir, train_set, coupling.data.buckets, cfg.seed, process)
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
        if session.is_due("export"):
            session.export(Path(cfg.export_dir), f"ckpt_epoch{batch_plan.images_at(session.step) // len(train_set)}_ddpm.pt")
        if session.should_stop:
            batches.close()
            return session.end_stopped()

    # Leave what sampling needs, and say what to do next.
    batches.close()
    session.write_final()
    how_to_draw = given.how_to_draw(run_dir, cfg.sample_options + " --frames")
    message = f"finished; see {session.run.samples}, and draw more: {how_to_draw}"
    return session.end_finished(message, {"loss": ["loss", "held_out_loss"]})


if __name__ == "__main__":
    run_script(main)
