#!/usr/bin/env python
"""Train a classifier of noised images, for classifier guidance: sample.py RUN --guidance-method classifier --classifier THIS.

accelerate launch train_classifier.py -cfg configs/imagenet64_classifier.json
python train_classifier.py -cfg configs/digits_classifier.json --dry-run
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from src.config import Length, UserError, config, load, quoted, run_script, to_steps, training_arguments
from src.data import ImageConfig, Sources, check_images, open_data
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
from src.runs.densities import ImageDensity
from src.runtime.launch import accumulating, compile_network, start, warm_up_ddp
from src.runtime.seeds import torch_seed
from src.runtime.stream import plan_batch
from src.training.config import StepsConfig
from src.training.ema import EMA
from src.training.entry import run_training
from src.training.first_images import save_first_images
from src.training.inputs import Coupling
from src.training.optimizer import build_optimizer, clip_gradients, learning_rate, update
from src.training.run_mode import RunMode
from src.training.session import Session
from src.training.state import TrainState
from src.training.step_noise import StepNoise, TimeSampler


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


def train(cfg: Config, run_dir: Path, run_mode: RunMode, stop_at: int | None = None) -> int:
    # Start on the devices there are.
    accelerator = start(cfg, trackers=cfg.log.trackers, folder=run_dir)
    device, dtype = accelerator.device, getattr(torch, cfg.dtype)
    rank, world = accelerator.process_index, accelerator.num_processes
    batch_plan = plan_batch(cfg.batch_size, cfg.micro_batch_size, rank=rank, world=world)

    # Look at the data.
    run_mode.enter_phase("looking at the data")
    train_set, held_out = open_data(cfg.data, cfg.held_out)
    warnings = check_images(cfg, run_dir, train_set, held_out)
    num_classes = len(train_set.class_names)
    if not num_classes:
        raise UserError("a classifier needs classes and the data has none: use class subfolders or a label_column")
    coupling = Coupling(ImageDensity(train_set, held_out, cfg.image, cfg.classifier.factor))
    shape, facts = coupling.shape, coupling.facts
    resolve = partial(to_steps, batch_size=cfg.batch_size, num_images=coupling.num_images)

    # Build what adds the noise, network, optimizer, EMA.
    run_mode.enter_phase("building the networks")
    process = noise_process(cfg.noise)
    times = TimeSampler(cfg.times, process)
    torch.manual_seed(torch_seed(cfg.seed, "weights"))
    network = build_classifier(cfg.classifier, cfg.image, num_classes).to(device, dtype)
    bare_optimizer = build_optimizer(network, cfg.optimizer)
    rate_at = learning_rate(cfg.optimizer, resolve)
    ema = EMA(network, cfg.ema)
    train_state = TrainState(network, bare_optimizer, ema, times=times)
    use = f"python sample.py DIFFUSION_RUN --guidance-method classifier --classifier {quoted(run_dir)}"

    # Go on where the run was.
    session = Session(cfg, accelerator, run_dir, train_state, facts, resolve(cfg.steps), run_mode, stop_at)
    if session.is_finished:
        session.run.close(f"{run_dir} is finished ({session.step} steps); guide with it: {use}")
        return 0
    batch_plan = session.place(batch_plan)
    if cfg.init_from is not None and not session.progress:
        session.run.say(start_classifier_from(cfg.init_from, train_set.class_names, network, ema.network))
    if cfg.compile:
        compile_network(network, len(coupling.shapes), session.run.say)
    model, optimizer = accelerator.prepare(network, bare_optimizer)
    warm_up_ddp(accelerator, model, torch.zeros(1, *shape, device=device, dtype=dtype), torch.zeros(1, device=device))
    session.begin(train_set, held_out, [batch_plan], warnings)
    session.enter_stage(batch_plan, resolve, end=session.total_steps)
    if session.run.writes and session.is_fresh:
        with session.drawing("the first images"):
            save_first_images(run_dir, train_set, coupling.data.buckets, cfg.seed, process)
    where, examples = "train" if held_out is None else "held_out", coupling.data.examples()
    measure = partial(accuracy_by_level, ema.network, process, examples, cfg.preview, batch_plan.micro)
    batches = coupling.stream(cfg, batch_plan, session.step, device)

    # Train.
    model.train()
    while session.step < session.total_steps:
        # Draw times and noise for the whole batch; each process takes its slice below.
        step = session.step
        step_noise = StepNoise(cfg, times, batch_plan, coupling.shape_at(step), step, device)

        # Gradients: every loss is its sum over the micro-batch times the number of processes over the batch; no label, no loss.
        for part in range(batch_plan.accumulation):
            (micro_batch, _), local_slice = next(batches), batch_plan.of_step(part)
            torch.manual_seed(torch_seed(cfg.seed, "dropout", step, micro_batch.position))
            with accumulating(accelerator, model, part, batch_plan.accumulation):
                t, labels = step_noise.t[local_slice], micro_batch.labels.to(device, non_blocking=True)
                x_t = process.add_noise(micro_batch.images, step_noise.eps[local_slice], t)
                logits = model(x_t, process.network_time(t).to(dtype).to(device, non_blocking=True))
                losses = F.cross_entropy(logits.to(dtype), labels, reduction="none", ignore_index=-1)
                loss = times.weigh(losses, local_slice).sum()
                accelerator.backward(loss * (batch_plan.world / batch_plan.batch))
            session.meter.add(batch_plan.micro, loss=loss, accuracy=(logits.argmax(1) == labels).sum())
        times.observe(accelerator)

        # Update. The EMA takes in the step before: by now all processes know whether it was finite, and none has waited.
        norm = clip_gradients(accelerator, model, cfg.optimizer)
        ema.update_after(session.take_finite_step(), network, batch_plan)
        update(optimizer, rate_at(step, session.total_steps), norm)
        session.end_step(torch.isfinite(norm))

        # Now and then, with this step in the EMA, too: log, measure by noise level, save.
        if not session.is_anything_due():
            continue
        ema.update_after(session.take_finite_step(), network, batch_plan)
        values, is_best = session.collect_log(lr=rate_at(step, session.total_steps), grad_norm=norm), False
        if session.is_due("preview"):
            session.clock.enter("a preview")
            loss, accuracy = measure(accelerator)
            values |= {f"{where}_loss": loss} | {f"{where}_accuracy_{i}": value for i, value in enumerate(accuracy)}
            is_best = session.decides and session.note_if_best(f"{where}_loss", loss)
            with session.drawing("the accuracy by noise level"):
                if session.run.writes:
                    draw_accuracy(session.run.samples / f"step_{session.step:08d}.png", process, accuracy, num_classes, where)
        session.report(values)
        session.save(keep=is_best and cfg.checkpoint.keep_best)
        if session.should_stop:
            batches.close()
            return session.end_stopped()

    # Leave what guidance needs, and say what to do next.
    batches.close()
    session.write_final()
    message = f"finished; see the accuracy by noise level in {session.run.samples}, and guide with it: {use}"
    return session.end_finished(message, {"loss": ["loss", f"{where}_loss"], "accuracy": ["accuracy"]})


if __name__ == "__main__":
    run_script(main)
