#!/usr/bin/env python
"""Train a classifier of noised pictures, for classifier guidance: sample.py RUN --guidance-method classifier --classifier THIS.

accelerate launch train_classifier.py -cfg configs/imagenet64_classifier.json
python train_classifier.py -cfg configs/digits_classifier.json --dry-run
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from src.config import Length, UserError, config, load, quoted, run_script, to_steps, training_arguments
from src.data import ImageConfig, Sources, check_images, describe_data, open_data
from src.models import ClassifierConfig
from src.runs.classifier import (
    MeasureConfig,
    NoiseConfig,
    accuracy_by_level,
    build_classifier,
    draw_accuracy,
    noise_process,
    start_classifier_from,
)
from src.runtime.examples import image_examples
from src.runtime.launch import accumulating, start, warm_up_ddp
from src.runtime.seeds import torch_seed
from src.runtime.stream import plan_batch, stream, to_network
from src.training.config import StepsConfig
from src.training.draws import StepNoise
from src.training.ema import EMA
from src.training.optimizer import build_optimizer, clip_gradients, learning_rate, update
from src.training.preview import save_first_images
from src.training.session import Session
from src.training.state import TrainState
from src.training.time_sampler import TimeSampler
from src.training.trials import Attempt, run_training


@config
class Config(StepsConfig):
    """All that can be set, with the keys of StepsConfig. `noise` is that of the diffusion which the classifier will guide.
    `init_from` is a classifier whose weights are the start; where its classes are others, the last layer is new."""

    data: Sources
    image: ImageConfig
    noise: NoiseConfig
    classifier: ClassifierConfig
    steps: Length
    preview: MeasureConfig = MeasureConfig()


def main() -> int:
    args = training_arguments(Config, __doc__ or "", default="configs/digits_classifier.json").parse_args()
    return run_training(train, load(args.config, Config, args.set), args)


def train(cfg: Config, run_dir: Path, attempt: Attempt) -> int:
    # Start on the devices there are.
    accelerator = start(cfg, trackers=cfg.log.trackers, folder=run_dir)
    device, dtype = accelerator.device, getattr(torch, cfg.dtype)
    split = plan_batch(cfg.batch_size, cfg.micro_batch_size, rank=accelerator.process_index, world=accelerator.num_processes)

    # Look at the data.
    attempt.enters("looking at the data")
    train_set, held_out = open_data(cfg.data, cfg.held_out)
    attempt.warnings = check_images(cfg, run_dir, train_set, held_out)
    num_classes = len(train_set.class_names)
    if not num_classes:
        raise UserError("a classifier needs classes and the data has none: use class subfolders or a label_column")
    facts = describe_data(train_set, held_out)
    resolve = partial(to_steps, batch_size=cfg.batch_size, num_images=len(train_set))
    total_steps = resolve(cfg.steps)

    # Build what noises, network, optimiser, EMA.
    attempt.enters("building the networks")
    process = noise_process(cfg.noise)
    times = TimeSampler(cfg.times, process)
    shape = (cfg.image.channels, cfg.image.size, cfg.image.size)
    torch.manual_seed(torch_seed(cfg.seed, "weights"))
    network = build_classifier(cfg.classifier, cfg.image, num_classes).to(device, dtype)
    bare_optimizer = build_optimizer(network, cfg.optimizer)
    rate_at = learning_rate(cfg.optimizer, total_steps, resolve)
    ema = EMA(network, cfg.ema)
    trained = TrainState(network, bare_optimizer, ema, times=times)

    # Go on where the run was.
    session = Session(cfg, accelerator, run_dir, trained, facts, total_steps=total_steps, attempt=attempt)
    use = f"python sample.py DIFFUSION_RUN --guidance-method classifier --classifier {quoted(run_dir)}"
    if session.finished:
        session.run.close(f"{run_dir} is finished ({session.step} steps); guide with it: {use}")
        return 0
    split = session.place(split)
    if cfg.init_from is not None and not session.progress:
        session.run.say(start_classifier_from(cfg.init_from, train_set.class_names, network, ema.network))
    if cfg.compile:
        network.compile()
    model, optimizer = accelerator.prepare(network, bare_optimizer)
    warm_up_ddp(accelerator, model, torch.zeros(1, *shape, device=device, dtype=dtype), torch.zeros(1, device=device))
    session.begin(train_set, held_out, total_images=split.images_at(total_steps), images=split.images_at(session.step))
    session.enter(split, resolve, end=total_steps)
    if session.run.writes and session.fresh:
        with session.look("the first images"):
            save_first_images(run_dir, train_set, cfg.image, cfg.seed, process)
    where, examples = ("train", train_set) if held_out is None else ("held_out", held_out)
    measure = partial(accuracy_by_level, ema.network, process, image_examples(examples, cfg.image), cfg.preview, split.micro)
    batches = stream(
        train_set,
        cfg.image,
        split,
        seed=cfg.seed,
        balanced=cfg.balance_classes,
        start_step=session.step,
        workers=cfg.workers,
        device=device,
    )

    # Train.
    model.train()
    while session.step < total_steps:
        # Draw times and noise for the whole batch; each rank takes its share below.
        step = session.step
        draws = StepNoise(times, split, shape, seed=cfg.seed, step=step, label_dropout=0.0, device=device, dtype=dtype)

        # Gradients: every loss is its sum over the micro-batch times world size over the batch; no label, no loss.
        for part in range(split.accumulation):
            micro, here = next(batches), split.of_step(part)
            if cfg.classifier.dropout:
                torch.manual_seed(torch_seed(cfg.seed, "dropout", step, micro.position))
            with accumulating(accelerator, model, part, split.accumulation):
                x_t = process.add_noise(to_network(micro.images, device, dtype), draws.eps[here], draws.t[here])
                labels = micro.labels.to(device, non_blocking=True)
                logits = model(x_t, process.network_time(draws.t[here]).to(dtype).to(device, non_blocking=True))
                losses = F.cross_entropy(logits.to(dtype), labels, reduction="none", ignore_index=-1)
                loss = times.weigh(losses, here).sum()
                accelerator.backward(loss * (split.world / split.batch))
            session.meter.add(split.micro, loss=loss, accuracy=(logits.argmax(1) == labels).sum())
        times.observe(accelerator)

        # Update.
        norm = clip_gradients(accelerator, model, cfg.optimizer)
        session.settle()
        update(optimizer, rate_at(step), norm)
        session.count(torch.isfinite(norm))

        # Now and then: log, measure by noise level, save.
        if not session.due:
            continue
        values, best = session.logged(lr=rate_at(step), grad_norm=norm), False
        if session.now("preview"):
            loss, accuracy = measure(accelerator)
            values |= {f"{where}_loss": loss} | {f"{where}_accuracy_{i}": value for i, value in enumerate(accuracy)}
            best = session.decides and session.better(f"{where}_loss", loss)
            with session.look("the accuracy by noise level"):
                if session.run.writes:
                    draw_accuracy(session.run.samples / f"step_{session.step:08d}.png", process, accuracy, num_classes, where)
        session.report(values)
        session.save(keep=best and cfg.checkpoint.keep_best)
        if session.leaves():
            batches.close()
            return session.end_stopped()

    # Leave what guidance needs, and say what to do next.
    batches.close()
    session.write_final()
    message = f"finished; see the accuracy by noise level in {session.run.samples}, and guide with it: {use}"
    return session.end_finished(message, {"loss": ["loss", f"{where}_loss"], "accuracy": ["accuracy"]})


if __name__ == "__main__":
    run_script(main)
