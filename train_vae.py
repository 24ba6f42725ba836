#!/usr/bin/env python
"""Train an autoencoder in stages: L1 with a PatchGAN that starts late, tanh, a perceptual loss, larger images.

accelerate launch train_vae.py -cfg configs/wikiart256_vae.json
python train_vae.py -cfg configs/landscape256_vae.json --set data.path=IMAGES --dry-run
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
from dataclasses import replace
from functools import partial
from pathlib import Path

import pydantic
import torch

from src import losses
from src.config import config, config_error, load, quoted, run_script, training_arguments
from src.config.packages import ask_for
from src.data import Sources, check_images, describe_data, open_data
from src.evaluation.autoencoder import ReconstructConfig, reconstruct, troubled_channels
from src.models import VAE, Discriminator
from src.models.layers import channels_last
from src.runs.autoencoder import start_from
from src.runtime.launch import accumulating, start, warm_up_ddp
from src.runtime.seeds import normal, torch_seed
from src.runtime.stream import StepOrder, image_examples, stream, to_network
from src.training.alignment import Aligner
from src.training.autoencoder_stages import Guard, GuardConfig, StagedConfig, bucket_stages, plan_stages, stage_warnings
from src.training.ema import EMA, EMAConfig
from src.training.entry import run_training
from src.training.first_images import save_first_images
from src.training.loss_terms import AdaptiveWeight, CodebookStep, discriminator_terms, generator_terms, winner_warnings
from src.training.optimizer import OptimizerConfig, build_optimizer, clip_gradients, update
from src.training.run_mode import RunMode
from src.training.session import Session
from src.training.state import TrainState


@config
class Config(StagedConfig):
    """All that can be set, with the keys of StagedConfig. `init_from` is a run of this script whose weights are the start."""

    data: Sources
    perceptual: losses.PerceptualConfig = losses.PerceptualConfig()
    teacher: losses.TeacherConfig = losses.TeacherConfig()
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, betas=(0.5, 0.9))
    ema: EMAConfig = EMAConfig(half_life_images=10_000)
    guard: GuardConfig = GuardConfig()
    preview: ReconstructConfig = ReconstructConfig()

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.perceptual.network == "random" and not self.name.startswith("smoke"):
            raise config_error("perceptual.network: 'random' is for smoke tests; use efficientnet_lite0, vgg, alex or squeeze")
        if self.teacher.network == "random" and not self.name.startswith("smoke"):
            raise config_error("teacher.network: 'random' is for smoke tests; use efficientnet_lite0 or timm:NAME")
        return self


def main() -> int:
    args = training_arguments(Config, __doc__ or "", default="configs/landscape256_vae.json").parse_args()
    return run_training(train, load(args.config, Config, args.set), args)


def train(cfg: Config, run_dir: Path, run_mode: RunMode, stop_at: int | None = None) -> int:
    # Start on the devices there are.
    accelerator = start(cfg, trackers=cfg.log.trackers, folder=run_dir, fp16=False)
    device, dtype = accelerator.device, getattr(torch, cfg.dtype)

    # Look at the data, and lay out the stages.
    run_mode.enter_phase("looking at the data")
    train_set, held_out = open_data(cfg.data, cfg.held_out)
    warnings = check_images(cfg, run_dir, train_set, held_out)
    warnings += stage_warnings(cfg.stages, cfg.model, from_scratch=cfg.init_from is None)
    facts = describe_data(train_set, held_out)
    where = "held_out" if held_out is not None else "train"
    stages = plan_stages(cfg, len(train_set), rank=accelerator.process_index, world=accelerator.num_processes)
    buckets = bucket_stages(cfg, stages, train_set.sides)
    facts |= {"buckets": buckets[-1].table} if cfg.image.aspect is not None else {}

    # Build autoencoder, discriminator, perceptual loss, optimizers, EMA.
    run_mode.enter_phase("building the networks")
    ask_for("measuring reconstructions", "torchmetrics", "torchvision")
    torch.manual_seed(torch_seed(cfg.seed, "weights"))
    network = channels_last(VAE(cfg.model, cfg.image.channels).to(device, dtype))
    discriminator = channels_last(Discriminator(cfg.discriminator, cfg.image.channels).to(device, dtype))
    perceptual = None
    if any(stage.config.perceptual is not None for stage in stages):
        sizes = [spec.size for of_stage in buckets for spec in of_stage.specs]
        perceptual = losses.Perceptual(cfg.perceptual, sizes=sizes).to(device, dtype)
    aligner, trained_networks = None, torch.nn.ModuleList([network])
    if any(stage.config.alignment is not None for stage in stages):
        aligner = Aligner(cfg.teacher, cfg.model.latent_channels, device, dtype)
        trained_networks.append(aligner.projection)
    bare = build_optimizer(trained_networks, cfg.optimizer), build_optimizer(discriminator, cfg.discriminator_optimizer)
    ema, projection = EMA(network, cfg.ema), aligner.projection if aligner is not None else None
    train_state = TrainState(network, bare[0], ema, adversary=(discriminator, bare[1]), projection=projection)

    # Go on where the run was.
    session = Session(cfg, accelerator, run_dir, train_state, facts, stages[-1].end, run_mode, stop_at)
    use = f"python train_ldm.py -cfg CONFIG --set autoencoder={quoted(run_dir)}"
    if session.is_finished:
        session.run.close(f"{run_dir} is finished ({session.step} steps); diffusion on its latents: {use}")
        return 0
    stages = [replace(stage, batch_plan=session.place(stage.batch_plan)) for stage in stages]
    tanh = session.progress.get("tanh", False)
    if cfg.init_from is not None and not session.progress:
        tanh = start_from(cfg.init_from, network, ema.network)
    guard = Guard.load(session.progress.get("guard"))
    seed = torch_seed(cfg.seed, "rollback", guard.rollbacks) if guard.rollbacks else cfg.seed
    shrink, adaptive_value = cfg.guard.shrink**guard.rollbacks, session.progress.get("adaptive_weight", 0.0)
    adaptive = AdaptiveWeight(network.last.weight, accelerator, adaptive_value, shrink)
    alignment_value = session.progress.get("alignment_weight", 0.0)
    alignment_weight = AdaptiveWeight(network.to_moments.weight, accelerator, alignment_value)
    critics = {"perceptual": perceptual, "discriminator": discriminator, "adaptive": adaptive}
    critics |= {"aligner": aligner, "alignment_weight": alignment_weight}
    model, discriminator_ddp, optimizer, discriminator_optimizer = accelerator.prepare(network, discriminator, *bare)
    stages_left = [stage for stage in stages if session.step < stage.end] or stages[-1:]
    image = buckets[stages_left[0].number - 1].most_frequent
    blank = torch.zeros(1, *image.shape, device=device, dtype=dtype)
    blank_latents = blank.new_zeros(1, *cfg.model.latent_shape(image.size))
    warm_up_ddp(accelerator, model, blank, blank_latents)
    warm_up_ddp(accelerator, discriminator_ddp, blank)
    generators = torch.nn.ModuleList([model])  # what the generator's loss trains
    if aligner is not None:
        generators.append(aligner.prepare(accelerator))
        warm_up_ddp(accelerator, generators[1], blank_latents)
    session.begin(train_set, held_out, [stage.batch_plan for stage in stages_left], warnings)
    if session.run.writes and session.is_fresh:
        with session.drawing("the first images"):
            save_first_images(run_dir, train_set, buckets[stages_left[0].number - 1], cfg.seed)

    for stage in stages_left:
        # Enter the stage: image size, tanh, learning rates, and how well it reconstructs at the start.
        stage_cfg, batch_plan = stage.config, stage.batch_plan
        network.tanh = ema.network.tanh = tanh = tanh or stage_cfg.tanh
        rate_at, discriminator_rate_at = stage.rate(cfg.optimizer), stage.adversary_rate(cfg.discriminator_optimizer)
        key = f"stages.{stage.number - 1}.micro_batch_size"
        session.enter_stage(batch_plan, stage.resolve, end=stage.end, name=stage.describe(len(stages)), key=key)
        of_stage, measured_set = buckets[stage.number - 1], held_out if held_out is not None else train_set
        examples = image_examples(measured_set, of_stage.of(measured_set.sides))
        options = {"batch_size": batch_plan.micro, "warn": session.run.warn}
        measure = partial(reconstruct, ema.network, examples, cfg.preview, accelerator, perceptual, **options)
        if guard.enter_stage(stage.number) and stage_cfg.adversarial is not None:
            guard.watch(cfg.guard, session.step, measure()["l1"])
        if session.step == stage.first or stage.adversary_at(session.step - 1) is None:
            guard.saved_before(session.step)
        order = StepOrder(of_stage, train_set.labels, batch_plan, seed)
        batches = stream(train_set, order, start_step=session.step, workers=cfg.workers, device=device)

        # Train.
        model.train()
        while session.step < stage.end:
            # Draw the latents' noise for the whole batch, of which each process takes its slice below, and their transform.
            step = session.step
            adversarial = stage.adversary_at(step)
            noise_shape = (batch_plan.batch, *cfg.model.latent_shape(order.spec_at(step).size))
            noise = normal(noise_shape, seed, "noise", step, device=device, dtype=dtype)
            codes = CodebookStep(network.codebook, noise_shape, seed, step) if network.codebook is not None else None
            transform = stage.transform_at(step, noise_shape[2:], seed)

            # Gradients: every loss is its sum over the micro-batch times the number of processes over the batch.
            for part in range(batch_plan.accumulation):
                micro_batch, local_slice = next(batches), batch_plan.of_step(part)
                images = to_network(micro_batch.images, device, dtype)
                targets = images if transform is None else transform(images)
                features = None
                if aligner is not None and stage_cfg.alignment is not None:
                    features = aligner.features(micro_batch.images)
                with accumulating(accelerator, generators, part, batch_plan.accumulation):
                    outputs = model(images, noise[local_slice], transform)
                    of_part = stage_cfg, adversarial, codes, features, local_slice
                    loss, loss_terms = generator_terms(outputs, images, targets, *of_part, **critics)
                    accelerator.backward(loss.sum() * (batch_plan.world / batch_plan.batch))
                if adversarial is not None:
                    with accumulating(accelerator, discriminator_ddp, part, batch_plan.accumulation):
                        loss_terms |= discriminator_terms(discriminator_ddp, adversarial, targets, outputs.images)
                        accelerator.backward(loss_terms["discriminator"].sum() * (batch_plan.world / batch_plan.batch))
                sums = {name: values.sum() for name, values in loss_terms.items()}
                session.meter.add(batch_plan.micro, loss=loss.sum(), **sums)

            # Update both, or, where a gradient is not finite, neither. The EMA takes in the step before.
            norm = clip_gradients(accelerator, generators, cfg.optimizer)
            discriminator_norm = norm.new_zeros(())
            if adversarial is not None:
                discriminator_norm = clip_gradients(accelerator, discriminator_ddp, cfg.discriminator_optimizer)
            ema.update_after(session.take_finite_step(), network, batch_plan)
            update(optimizer, rate_at(step), norm + discriminator_norm)
            if adversarial is not None:
                update(discriminator_optimizer, discriminator_rate_at(step), norm + discriminator_norm)
            is_finite = torch.isfinite(norm + discriminator_norm)
            adaptive.update(is_finite)
            alignment_weight.update(is_finite)
            if codes is not None:
                codes.update(accelerator, is_finite)
            session.end_step(is_finite)

            # Now and then, with this step in the EMA, too: log, measure reconstructions, save.
            if not session.is_anything_due():
                continue
            ema.update_after(session.take_finite_step(), network, batch_plan)
            values, is_best, is_healthy = session.collect_log(lr=rate_at(step), grad_norm=norm), False, True
            if values and adversarial is not None:
                adaptive_weight = {"adaptive_weight": float(adaptive.value)} if adversarial.adaptive else {}
                values |= {"discriminator_grad_norm": float(discriminator_norm), **adaptive_weight}
            if values and stage_cfg.alignment is not None and stage_cfg.alignment.adaptive:
                values |= {"alignment_weight": float(alignment_weight.value)}
            if session.is_due("preview"):
                session.clock.enter("a preview")
                measured = measure(sheet=session.run.samples / f"step_{session.step:08d}.png")
                values |= {f"{where}_{name}": value for name, value in measured.items()}
                values |= network.codebook.usage() if network.codebook is not None else {}
                if session.decides:
                    best_of = "lpips" if perceptual is not None else "l1"
                    is_best = session.note_if_best(best_of, measured[best_of]) and cfg.checkpoint.keep_best
                    is_healthy = guard.watch(cfg.guard, session.step, measured["l1"], adversary=adversarial is not None)
                for line in troubled_channels(measured) + winner_warnings(values):
                    session.run.say(f"warning: step {session.step}: {line}")
            session.report(values)
            if not is_healthy and adversarial is not None:
                session.run.say(f"warning: {guard.explain(cfg.guard, session.step, values[f'{where}_l1'], values)}")
                if guard.rolls_back(cfg.guard):
                    batches.close()
                    return session.roll_back(guard.back_to, guard=replace(guard, rollbacks=guard.rollbacks + 1).saved())
            keep = is_best or (cfg.guard.rollback and guard.healthy_step == session.step)
            progress = {"tanh": tanh, "guard": guard.saved(), "adaptive_weight": float(adaptive.value)}
            progress |= {"alignment_weight": float(alignment_weight.value)} if aligner is not None else {}
            if session.save(keep=keep, **progress) and adversarial is None:
                guard.saved_before(session.step)
            if session.should_stop:
                batches.close()
                return session.end_stopped()
        batches.close()

    # Leave what latent diffusion needs, and say what to do next.
    session.write_final(tanh=tanh)
    message = f"finished; see {session.run.samples}; next, diffusion on its latents: {use}"
    curves = {"loss": ["loss", f"{where}_l1", f"{where}_lpips"], "PSNR": [f"{where}_psnr"]}
    curves |= {"adversary": ["discriminator_accuracy"]}
    return session.end_finished(message, curves)


if __name__ == "__main__":
    run_script(main)
