#!/usr/bin/env python
"""Train diffusion on the latents of a frozen autoencoder, by class where the pictures have classes.

accelerate launch train_ldm.py -cfg configs/wikiart256_ldm.json
python train_ldm.py -cfg configs/landscape256_ldm.json --set data.path=PICTURES --dry-run
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
from functools import partial
from pathlib import Path

import pydantic
import torch

from src.config import Length, config, load, quoted, resumable_field, run_script, to_steps, training_arguments
from src.data import ImageConfig, Sources, check_images, describe_data, open_data
from src.diffusion import build_process
from src.evaluation.quality import open_quality
from src.models import ImageModelConfig, build_model
from src.runs.autoencoder import autoencoder_for
from src.runs.latents import cache_folder, latents_of
from src.runs.opened import count_classes, start_from
from src.runs.starts import latent_bounds
from src.runtime.launch import accumulating, start, warm_up_ddp
from src.runtime.seeds import normal, torch_seed
from src.runtime.sharding import build_device
from src.runtime.stream import latent_stream, plan_batch
from src.training.config import DiffusionConfig, PreviewConfig
from src.training.draws import StepNoise
from src.training.ema import EMA
from src.training.optimizer import build_optimizer, clip_gradients, learning_rate, update
from src.training.preview import preview, preview_sampler, save_first_images
from src.training.run import check_ranks
from src.training.session import Session
from src.training.sharding import prepare
from src.training.state import TrainState
from src.training.time_sampler import TimeSampler
from src.training.trials import Attempt, run_training


@config
class Config(DiffusionConfig):
    """All that can be set, with the keys of DiffusionConfig. `autoencoder` is a finished run of train_vae.py, or a diffusers
    AutoencoderKL (folder or hub name). `latents` is the folder of the latent cache, which is made if it is missing (without
    it: in the autoencoder's run). The classes of `init_from`, a latent run, may be others."""

    autoencoder: str = resumable_field()
    latents: str | None = resumable_field(None)
    encode_batch_size: int = pydantic.Field(16, gt=0)
    data: Sources
    image: ImageConfig
    model: ImageModelConfig
    steps: Length
    preview: PreviewConfig = PreviewConfig()


def main() -> int:
    args = training_arguments(Config, __doc__ or "", default="configs/landscape256_ldm.json").parse_args()
    return run_training(train, load(args.config, Config, args.set), args)


def train(cfg: Config, run_dir: Path, attempt: Attempt) -> int:
    # Start on the devices there are.
    accelerator = start(cfg, trackers=cfg.log.trackers, folder=run_dir, fsdp=True)
    device, dtype = accelerator.device, getattr(torch, cfg.dtype)
    split = plan_batch(cfg.batch_size, cfg.micro_batch_size, rank=accelerator.process_index, world=accelerator.num_processes)

    # Look at the data and the autoencoder; encode the one with the other, unless that was done before.
    attempt.enters("looking at the data")
    train_set, held_out = open_data(cfg.data, cfg.held_out)
    data_facts = describe_data(train_set, held_out)
    check_ranks(data_facts)
    attempt.warnings = check_images(cfg, run_dir, train_set, held_out)
    num_classes = count_classes(cfg.class_conditional, train_set.class_names)
    autoencoder = autoencoder_for(cfg.autoencoder, run_dir, device)
    shape = autoencoder.latent_shape(cfg.image.channels, cfg.image.size)
    torch.manual_seed(torch_seed(cfg.seed, "weights"))
    network = build_model(cfg.model, shape, num_classes, learned=cfg.process.variance == "learned")
    network = network.to(build_device(accelerator), dtype)
    folder = Path(cfg.latents) if cfg.latents else cache_folder(autoencoder, cfg.image, train_set, held_out, run_dir)
    encoding = {"batch_size": cfg.encode_batch_size, "workers": cfg.workers, "attempt": attempt, "run_dir": run_dir}
    latents = latents_of(autoencoder, train_set, held_out, cfg.image, folder, accelerator, **encoding)
    facts = data_facts | {"latents": latents.facts}
    resolve = partial(to_steps, batch_size=cfg.batch_size, num_images=len(train_set))
    total_steps = resolve(cfg.steps)

    # Build process, optimiser, EMA, and the sampler of the previews.
    attempt.enters("building the networks")
    process = build_process(cfg.process)
    times = TimeSampler(cfg.times, process)
    bare_optimizer = build_optimizer(network, cfg.optimizer)
    rate_at = learning_rate(cfg.optimizer, total_steps, resolve)
    ema = EMA(network, cfg.ema)
    trained = TrainState(network, bare_optimizer, ema, times=times)
    bounds = latent_bounds(latents.facts, device)
    sampler = preview_sampler(cfg, cfg.preview, ema.network, process, shape, num_classes, codec=latents.codec, bounds=bounds)
    quality = open_quality(cfg.preview.quality, train_set, cfg.image, num_classes, accelerator, attempt)

    # Go on where the run was.
    session = Session(cfg, accelerator, run_dir, trained, facts, total_steps=total_steps, attempt=attempt)
    if session.finished:
        session.run.close(f"{run_dir} is finished ({session.step} steps); sample from it: python sample.py {quoted(run_dir)}")
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
    if session.run.writes:
        autoencoder.keep(run_dir / "autoencoder")
        if session.fresh:
            with session.look("the first images"):
                save_first_images(run_dir, train_set, cfg.image, cfg.seed, process, latents.codec, device)
    examples = latents.examples(held_out.labels) if held_out is not None else None
    batches = latent_stream(
        latents.train,
        train_set.labels,
        split,
        seed=cfg.seed,
        balanced=cfg.balance_classes,
        flip=cfg.image.flip,
        start_step=session.step,
    )

    # Train.
    model.train()
    while session.step < total_steps:
        # Draw times, noise, dropped labels and the posterior's noise for the whole batch; each rank takes its share below.
        step = session.step
        draws = StepNoise(
            times, split, shape, seed=cfg.seed, step=step, label_dropout=cfg.label_dropout, device=device, dtype=dtype
        )
        posterior = normal(draws.eps.shape, cfg.seed, "posterior", step, device=device, dtype=dtype)

        # Gradients: every loss is its sum over the micro-batch times world size over the batch.
        for part in range(split.accumulation):
            micro, here = next(batches), split.of_step(part)
            torch.manual_seed(torch_seed(cfg.seed, "dropout", step, micro.position))
            with accumulating(accelerator, model, part, split.accumulation):
                x0 = latents.draw(micro.images, posterior[here])
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

        # Now and then: log, preview, quality, save.
        if not session.due:
            continue
        values = session.logged(lr=rate_at(step), grad_norm=norm)
        if session.now("preview"):
            values |= preview(sampler, cfg.preview, session, train_set.class_names, examples)
        if quality is not None and session.now("quality"):
            values |= quality.measure(sampler, cfg.preview.batch_size, session.run.say)
        session.report(values)
        session.save(keep=session.best_of(values))
        if session.leaves():
            return session.end_stopped()

    # Leave what sampling needs, the autoencoder with it, and say what to do next.
    session.write_final(more=autoencoder.files())
    message = f"finished; see {session.run.samples}, and draw more: python sample.py {quoted(run_dir)} --frames"
    return session.end_finished(message, {"loss": ["loss", "held_out_loss"]})


if __name__ == "__main__":
    run_script(main)
