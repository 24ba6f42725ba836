#!/usr/bin/env python
"""Train iterative alpha-(de)blending between two densities: noise, images, latents, 2-D points.

accelerate launch train_iadb.py -cfg configs/cats64_iadb.json --set data.path=IMAGES
python train_iadb.py -cfg configs/points2d_iadb.json
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
import math
from functools import partial
from pathlib import Path
from typing import Literal

import pydantic
import torch

from src.config import ENDLESS, config, config_error, load, run_script, to_steps, training_arguments
from src.data import ImageConfig, check_images
from src.diffusion import ProcessConfig, TimeInput, build_process
from src.diffusion.schedules import BlendScheduleConfig
from src.evaluation.quality import open_quality
from src.models import ModelConfig
from src.runs.autoencoder import autoencoder_for
from src.runs.opened import count_classes
from src.runs.starting import start_from
from src.runtime.launch import accumulating, compile_network, start, warm_up_ddp
from src.runtime.seeds import torch_seed
from src.runtime.stream import plan_batch
from src.sampling import Sampler, SamplerConfig
from src.sampling.paths import write_points
from src.sampling.sampler import random_labels
from src.training.config import BlendConfig, PathPreviewConfig
from src.training.ema import EMA
from src.training.entry import from_python, run_training
from src.training.first_images import save_first_blends
from src.training.given import Given
from src.training.inputs import blank_inputs, open_coupling
from src.training.optimizer import build_optimizer, clip_gradients, learning_rate, update
from src.training.pairs import PairCoupling
from src.training.preview import measure_held_out, measure_quality, preview_paths
from src.training.run_directory import check_ranks
from src.training.run_mode import RunMode
from src.training.session import Session
from src.training.state import TrainState
from src.training.step_noise import StepNoise, TimeSampler, check_contrast

IADB = ProcessConfig(schedule=BlendScheduleConfig(kind="blend"), target="blend", clip=False, time_input=TimeInput(kind="alpha"))


@config
class Config(BlendConfig):
    """All that can be set, with the keys of BlendConfig. `source` is what one starts from (the paper's x_0, alpha 0), `data`
    what is wanted (its x_1, alpha 1): both images of `image`, or both 2-D points, which have no `image`. With `autoencoder`
    images are blended as latents. `pairs` names an earlier run, and the run trains on pairs (source, sample) of it: reflow.
    `loss_reduction` sum is the paper's, over a step's batch; the mean is logged. Without `steps` a run has no end.
    """

    image: ImageConfig | None = None
    process: ProcessConfig = IADB
    loss_reduction: Literal["mean", "sum"] = "mean"
    model: ModelConfig
    preview: PathPreviewConfig = PathPreviewConfig()

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.process.schedule.kind != "blend":
            raise config_error(
                "process.schedule.kind: only the blend joins two densities; ddpm_accelerate.py trains on the others"
            )
        if self.model.takes_points != (self.image is None):
            raise config_error("model: 2-D points, which have no image, need an mlp, and images another kind, such as unet")
        time_input = self.process.time_input
        if self.image is None and (
            self.process.clip or time_input is None or time_input.kind == "index" or time_input.scale != 1
        ):
            raise config_error(
                "process: 2-D points have no bounds to clip to, and an mlp is fed alpha or t as it is: leave process out"
            )
        if self.image is None and self.autoencoder is not None:
            raise config_error("autoencoder: 2-D points have no latents; leave it out")
        if self.steps is None and self.optimizer.schedule.kind not in ("constant", "wsd"):
            raise config_error("steps: a run without end needs optimizer.schedule.kind constant or wsd, since the others end")
        return self


def main() -> int:
    args = training_arguments(Config, __doc__ or "", default="configs/points2d_iadb.json").parse_args()
    return run_training(train, load(args.config, Config, args.set), args)


@from_python
def train(cfg: Config, run_dir: Path, run_mode: RunMode, stop_at: int | None, given: Given) -> int:
    # Start on the devices there are.
    accelerator = start(cfg, trackers=cfg.log.trackers, folder=run_dir)
    device, dtype = accelerator.device, getattr(torch, cfg.dtype)
    rank, world = accelerator.process_index, accelerator.num_processes
    batch_plan = plan_batch(cfg.batch_size, cfg.micro_batch_size, rank=rank, world=world)

    # Open data and source: as they are, as latents, or paired by an earlier run.
    run_mode.enter_phase("looking at the data")
    autoencoder = autoencoder_for(cfg.autoencoder, run_dir, device) if cfg.autoencoder is not None else None
    factor = cfg.model.factor * (autoencoder.factor if autoencoder is not None else 1)
    options = {
        "factor": factor,
        "condition": cfg.condition,
        "augmentation": cfg.augmentation,
        "paired": cfg.coupling == "paired",
    }
    coupling = open_coupling(cfg.data, cfg.source, cfg.held_out, cfg.image, given.dataset, **options)
    check_ranks(coupling.facts)
    train_set, held_out = coupling.data.train, coupling.data.held_out
    source_sets = (coupling.source.train, coupling.source.held_out) if coupling.source is not None else ()
    warnings = check_images(cfg, run_dir, train_set, held_out, *source_sets)
    num_classes = count_classes(cfg.class_conditional, train_set.class_names)
    check_contrast(cfg.process.loss.contrast, num_classes, batch_plan)
    if autoencoder is not None:
        coupling = coupling.encoded(cfg, autoencoder, accelerator, run_dir)
    if cfg.pairs is not None:
        coupling = PairCoupling(cfg.pairs, coupling, num_classes, run_dir, accelerator)
    shape, facts = coupling.shape, coupling.facts | given.facts
    names = cfg.condition_names(shape)
    resolve = partial(to_steps, batch_size=cfg.batch_size, num_images=coupling.num_images)

    # Build process, network, optimizer, EMA, and the samplers of the previews.
    run_mode.enter_phase("building the networks")
    process = build_process(cfg.process)
    times = TimeSampler(cfg.times, process)
    torch.manual_seed(torch_seed(cfg.seed, "weights"))
    network = given.build(cfg, accelerator, shape, num_classes, train_set, held_out)
    bare_optimizer = build_optimizer(network, cfg.optimizer)
    rate_at = learning_rate(cfg.optimizer, resolve)
    ema = EMA(network, cfg.ema)
    train_state = TrainState(network, bare_optimizer, ema, times=times)
    options = coupling.sampler_options(cfg, device)

    def sampler_for(spec: SamplerConfig) -> Sampler:
        spec = spec.without_guidance(num_classes is None)
        return Sampler(ema.network, process, spec, shape=shape, num_classes=num_classes, **options)

    sampler = sampler_for(cfg.preview.most_calls)
    quality = open_quality(cfg.quality, coupling.data, num_classes, accelerator)

    # Go on where the run was.
    total_steps = resolve(cfg.steps) if cfg.steps is not None else ENDLESS
    session = Session(cfg, accelerator, run_dir, train_state, facts, total_steps, run_mode, stop_at)
    if session.is_finished:
        session.run.close(f"{run_dir} is finished ({session.step} steps); sample from it: {given.how_to_draw(run_dir)}")
        return 0
    batch_plan = session.place(batch_plan)
    if cfg.init_from is not None and not session.progress:
        session.run.say(start_from(cfg.init_from, train_set.class_names, network, ema.network, condition=names))
    if cfg.compile:
        compile_network(network, len(coupling.shapes), session.run.say)
    model, optimizer = accelerator.prepare(network, bare_optimizer)
    warm_up_ddp(accelerator, model, *blank_inputs(cfg, shape, device, dtype))
    session.begin(train_set, held_out, [batch_plan], warnings)
    session.enter_stage(batch_plan, resolve, end=session.total_steps)
    if session.run.writes:
        if autoencoder is not None:
            autoencoder.keep(run_dir / "autoencoder")
        if session.is_fresh:
            with session.drawing("blend.png"):
                save_first_blends(sampler_for(SamplerConfig()), coupling.data.examples(), run_dir)
    loss_scale = math.prod(shape) * batch_plan.batch if cfg.loss_reduction == "sum" else 1
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
                accelerator.backward(loss * (batch_plan.world / batch_plan.batch * loss_scale))
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
            values |= preview_paths(sampler_for, cfg.preview, session, train_set.class_names, coupling)
        if session.is_due("held_out"):
            values |= measure_held_out(sampler, examples, session)
        if quality is not None and session.is_due("quality"):
            values |= measure_quality(quality, sampler, cfg.preview.batch_size, session)
        session.report(values)
        session.save(keep=session.note_best(values))
        if session.should_stop:
            batches.close()
            return session.end_stopped()

    # Leave what sampling needs, and say what to do next; of 2-D points, show how they move.
    batches.close()
    session.clock.close()
    session.write_final(files=autoencoder.files() if autoencoder is not None else ({}, {}))
    if cfg.image is None and session.run.writes:
        with session.drawing("points"):
            labels = random_labels(0, range(20_000), num_classes) if num_classes is not None else None
            write_points(
                sampler_for(SamplerConfig(solver="euler", steps=128)), run_dir / "points", labels=labels, device=device
            )
    shown = session.run.samples if cfg.image is not None else run_dir / "points"
    message = f"finished; see {shown}, and draw more: {given.how_to_draw(run_dir, cfg.sample_options)}"
    return session.end_finished(message, {"loss": ["loss", "held_out_loss"], "straightness": ["straightness"]})


if __name__ == "__main__":
    run_script(main)
