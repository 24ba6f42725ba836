#!/usr/bin/env python
"""Train iterative alpha-(de)blending between two densities: noise, pictures, latents, 2-D points.

accelerate launch train_iadb.py -cfg configs/cats64_iadb.json --set data.path=PICTURES
python train_iadb.py -cfg configs/points2d_iadb.json
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
from functools import partial
from pathlib import Path
from typing import Literal

import pydantic
import torch

from src.config import ENDLESS, config, config_error, load, resumable_field, run_script, to_steps, training_arguments
from src.data import GaussianSource, ImageConfig, SourceEnd, check_images
from src.diffusion import ProcessConfig, TimeInput, build_process
from src.diffusion.schedules import BlendScheduleConfig
from src.evaluation.quality import open_quality
from src.models import ModelConfig
from src.runs.autoencoder import autoencoder_for
from src.runs.ends import open_coupling
from src.runs.opened import count_classes, start_from
from src.runtime.launch import accumulating, start, warm_up_ddp
from src.runtime.seeds import torch_seed
from src.runtime.stream import plan_batch
from src.sampling import Sampler, SamplerConfig
from src.sampling.build import sampler_of
from src.sampling.points import write_points
from src.sampling.sampler import random_labels
from src.training.config import DiffusionConfig, PathPreviewConfig
from src.training.draws import StepNoise
from src.training.ema import EMA
from src.training.from_python import Given, from_python
from src.training.optimizer import build_optimizer, clip_gradients, learning_rate, update
from src.training.pairs import PairEnds, Pairs
from src.training.paths import first_ends, preview_paths
from src.training.run import check_ranks
from src.training.session import Session
from src.training.state import TrainState
from src.training.time_sampler import TimeSampler
from src.training.trials import Attempt, run_training

IADB = ProcessConfig(schedule=BlendScheduleConfig(kind="blend"), target="blend", clip=False, time_input=TimeInput(kind="alpha"))


@config
class Config(DiffusionConfig):
    """All that can be set, with the keys of DiffusionConfig. `source` is what one starts from (the paper's x_0, alpha 0),
    `data` what is wanted (its x_1, alpha 1): both images of `image`, or both 2-D points, which have no `image`. With
    `autoencoder` (a finished run of train_vae.py or a diffusers AutoencoderKL) images are blended as latents, which are kept
    in the folder `latents`.

    `pairs` names an earlier run, and the run trains on pairs (source, sample) of it: reflow. `loss_reduction` sum is the
    paper's, over a step's batch; the mean is logged. Without `steps` a run has no end.
    """

    source: SourceEnd = GaussianSource(source="gaussian")
    image: ImageConfig | None = None
    autoencoder: str | None = resumable_field(None)
    latents: str | None = resumable_field(None)
    encode_batch_size: int = pydantic.Field(16, gt=0)
    pairs: Pairs = None
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
        fed = self.process.time_input
        if self.image is None and (self.process.clip or fed is None or fed.kind == "index" or fed.scale != 1):
            raise config_error(
                "process: 2-D points have no bounds to clip to, and an mlp is fed alpha or t as it is: leave process out"
            )
        if self.image is None and self.autoencoder is not None:
            raise config_error("autoencoder: 2-D points have no latents; leave it out")
        if self.steps is None and self.optimizer.schedule.kind != "constant":
            raise config_error("steps: a run without end needs optimizer.schedule.kind constant, since the others end")
        return self


def main() -> int:
    args = training_arguments(Config, __doc__ or "", default="configs/points2d_iadb.json").parse_args()
    return run_training(train, load(args.config, Config, args.set), args)


@from_python
def train(cfg: Config, run_dir: Path, attempt: Attempt, given: Given) -> int:
    # Start on the devices there are.
    accelerator = start(cfg, trackers=cfg.log.trackers, folder=run_dir)
    device, dtype = accelerator.device, getattr(torch, cfg.dtype)
    split = plan_batch(cfg.batch_size, cfg.micro_batch_size, rank=accelerator.process_index, world=accelerator.num_processes)

    # Open both ends: as they are, as latents, or paired by an earlier run.
    attempt.enters("looking at the data")
    ends = open_coupling(cfg.data, cfg.source, cfg.held_out, cfg.image, given.dataset)
    check_ranks(ends.facts)
    train_set, held_out = ends.data.train, ends.data.held_out
    source = (ends.source.train, ends.source.held_out) if ends.source is not None else ()
    attempt.warnings = check_images(cfg, run_dir, train_set, held_out, *source)
    num_classes = count_classes(cfg.class_conditional, train_set.class_names)
    autoencoder = autoencoder_for(cfg.autoencoder, run_dir, device) if cfg.autoencoder is not None else None
    if autoencoder is not None:
        encoding = {"batch_size": cfg.encode_batch_size, "workers": cfg.workers, "attempt": attempt}
        ends = ends.encoded(autoencoder, accelerator, cfg.latents, run_dir, **encoding)
    if cfg.pairs is not None:
        ends = PairEnds(cfg.pairs, ends, num_classes, run_dir, accelerator, attempt)
    shape, starts, facts = ends.shape, ends.starts(), ends.facts | given.facts
    resolve = partial(to_steps, batch_size=cfg.batch_size, num_images=ends.num_images)
    total_steps = resolve(cfg.steps) if cfg.steps is not None else ENDLESS

    # Build process, network, optimiser, EMA, and the samplers of the previews.
    attempt.enters("building the networks")
    process = build_process(cfg.process)
    times = TimeSampler(cfg.times, process)
    torch.manual_seed(torch_seed(cfg.seed, "weights"))
    network = given.build(cfg, accelerator, shape, num_classes, train_set, held_out)
    bare_optimizer = build_optimizer(network, cfg.optimizer)
    rate_at = learning_rate(cfg.optimizer, total_steps, resolve)
    ema = EMA(network, cfg.ema)
    trained = TrainState(network, bare_optimizer, ema, times=times)

    def sampler_for(spec: SamplerConfig) -> Sampler:
        spec = spec.without_guidance(num_classes is None)
        more = {"clip": cfg.process.clip, "label_dropout": cfg.label_dropout, "source": starts, **ends.codec(device)}
        return sampler_of(spec, ema.network, process, shape, num_classes, **more)

    sampler_for(SamplerConfig(guidance=cfg.preview.guidance))  # what is wrong with it is said now
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
    model, optimizer = accelerator.prepare(network, bare_optimizer)
    warm_up_ddp(accelerator, model, torch.zeros(1, *shape, device=device, dtype=dtype), torch.zeros(1, device=device))
    session.begin(train_set, held_out, total_images=split.images_at(total_steps), images=split.images_at(session.step))
    session.enter(split, resolve, end=total_steps)
    if session.run.writes:
        if autoencoder is not None:
            autoencoder.keep(run_dir / "autoencoder")
        if session.fresh:
            with session.look("blend.png"):
                first_ends(sampler_for(SamplerConfig()), ends.data.examples(), run_dir)
    batches = ends.stream(
        split,
        seed=cfg.seed,
        balanced=cfg.balance_classes,
        start_step=session.step,
        workers=cfg.workers,
        device=device,
        dtype=dtype,
    )

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
            (micro, source), here = next(batches), split.of_step(part)
            torch.manual_seed(torch_seed(cfg.seed, "dropout", step, micro.position))
            with accumulating(accelerator, model, part, split.accumulation):
                x0, eps = micro.images, draws.eps[here] if source is None else source
                condition = draws.condition(micro, here, num_classes)
                found = process.losses(model, x0, eps, draws.t[here], **condition)
                loss = times.weigh(found.loss, here).sum()
                summed = x0[0].numel() * split.batch if cfg.loss_reduction == "sum" else 1
                accelerator.backward(loss * (split.world / split.batch * summed))
            session.meter.add(split.micro, loss=loss)
        times.observe(accelerator)

        # Update.
        norm = clip_gradients(accelerator, model, cfg.optimizer)
        session.settle()
        update(optimizer, rate_at(step), norm)
        session.count(torch.isfinite(norm))

        # Now and then: log, preview, quality, save.
        if not session.due:
            continue
        values = session.logged(lr=rate_at(step), grad_norm=norm)
        if session.now("preview"):
            values |= preview_paths(sampler_for, cfg.preview, session, train_set.class_names, ends)
        if quality is not None and session.now("quality"):
            values |= quality.measure(sampler_for(cfg.preview.most_calls), cfg.preview.batch_size, session.run.say)
        session.report(values)
        session.save(keep=session.best_of(values))
        if session.leaves():
            batches.close()
            return session.end_stopped()

    # Leave what sampling needs, and say what to do next; of 2-D points, show how they move.
    batches.close()
    session.clock.close()
    session.write_final(more=autoencoder.files() if autoencoder is not None else ({}, {}))
    if cfg.image is None and session.run.writes:
        with session.look("points"):
            labels = random_labels(0, range(20_000), num_classes) if num_classes is not None else None
            walk = sampler_for(SamplerConfig(solver="euler", steps=128))
            write_points(walk, run_dir / "points", labels=labels, device=device)
    made = session.run.samples if cfg.image is not None else run_dir / "points"
    message = f"finished; see {made}, and draw more: {given.how_to_draw(run_dir)}"
    return session.end_finished(message, {"loss": ["loss", "held_out_loss"], "straightness": ["straightness"]})


if __name__ == "__main__":
    run_script(main)
