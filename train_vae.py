#!/usr/bin/env python
"""Train an autoencoder in stages: L1 with a PatchGAN that starts late, tanh, a perceptual loss, larger pictures.

accelerate launch train_vae.py -cfg configs/wikiart256_vae.json
python train_vae.py -cfg configs/landscape256_vae.json --set data.path=PICTURES --dry-run
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
from src.evaluation.reconstruct import ReconstructConfig, reconstruct, troubled_channels
from src.models import VAE, Discriminator
from src.models.layers import channels_last
from src.runs.autoencoder import start_from
from src.runtime.examples import image_examples
from src.runtime.launch import accumulating, start, warm_up_ddp
from src.runtime.seeds import normal, torch_seed
from src.runtime.stream import stream, to_network
from src.training.adversary import AdaptiveWeight, Guard, GuardConfig, won
from src.training.codebook import CodebookStep
from src.training.ema import EMA, EMAConfig
from src.training.optimizer import OptimizerConfig, build_optimizer, clip_gradients, update
from src.training.preview import save_first_images
from src.training.session import Session
from src.training.stages import StagedConfig, plan_stages, warnings
from src.training.state import TrainState
from src.training.trials import Attempt, run_training


@config
class Config(StagedConfig):
    """All that can be set, with the keys of StagedConfig. `init_from` is a run of this script whose weights are the start."""

    data: Sources
    perceptual: losses.PerceptualConfig = losses.PerceptualConfig()
    discriminator_optimizer: OptimizerConfig = OptimizerConfig(lr=1e-4, betas=(0.5, 0.9))
    ema: EMAConfig = EMAConfig(half_life_images=10_000)
    guard: GuardConfig = GuardConfig()
    preview: ReconstructConfig = ReconstructConfig()

    @pydantic.model_validator(mode="after")
    def _fits(self) -> "Config":
        if self.perceptual.network == "random" and not self.name.startswith("smoke"):
            raise config_error("perceptual.network: 'random' is for smoke tests; use efficientnet_lite0, vgg, alex or squeeze")
        return self


def main() -> int:
    args = training_arguments(Config, __doc__ or "", default="configs/landscape256_vae.json").parse_args()
    return run_training(train, load(args.config, Config, args.set), args)


def train(cfg: Config, run_dir: Path, attempt: Attempt) -> int:
    # Start on the devices there are.
    accelerator = start(cfg, trackers=cfg.log.trackers, folder=run_dir, fp16=False)
    device, dtype = accelerator.device, getattr(torch, cfg.dtype)

    # Look at the data, and lay out the stages.
    attempt.enters("looking at the data")
    train_set, held_out = open_data(cfg.data, cfg.held_out)
    attempt.warnings = check_images(cfg, run_dir, train_set, held_out)
    attempt.warnings += warnings(cfg.stages, from_scratch=cfg.init_from is None, model=cfg.model)
    facts = describe_data(train_set, held_out)
    where = "held_out" if held_out is not None else "train"
    stages = plan_stages(cfg, len(train_set), rank=accelerator.process_index, world=accelerator.num_processes)

    # Build autoencoder, discriminator, perceptual loss, optimisers, EMA.
    attempt.enters("building the networks")
    ask_for("measuring reconstructions", "torchmetrics", "torchvision")
    torch.manual_seed(torch_seed(cfg.seed, "weights"))
    network = channels_last(VAE(cfg.model, cfg.image.channels).to(device, dtype))
    discriminator = channels_last(Discriminator(cfg.discriminator, cfg.image.channels).to(device, dtype))
    perceptual = None
    if any(stage.config.perceptual is not None for stage in stages):
        perceptual = losses.Perceptual(cfg.perceptual, sizes=[stage.image.size for stage in stages]).to(device, dtype)
    bare = build_optimizer(network, cfg.optimizer), build_optimizer(discriminator, cfg.discriminator_optimizer)
    ema = EMA(network, cfg.ema)
    trained = TrainState(network, bare[0], ema, adversary=(discriminator, bare[1]))

    # Go on where the run was.
    session = Session(cfg, accelerator, run_dir, trained, facts, total_steps=stages[-1].end, attempt=attempt)
    use = f"python train_ldm.py -cfg CONFIG --set autoencoder={quoted(run_dir)}"
    if session.finished:
        session.run.close(f"{run_dir} is finished ({session.step} steps); diffusion on its latents: {use}")
        return 0
    stages = [replace(stage, split=session.place(stage.split)) for stage in stages]
    tanh = session.progress.get("tanh", False)
    if cfg.init_from is not None and not session.progress:
        tanh = start_from(cfg.init_from, network, ema.network)
    guard = Guard.load(session.progress.get("guard"))
    seed = torch_seed(cfg.seed, "rollback", guard.rollbacks) if guard.rollbacks else cfg.seed
    adaptive = AdaptiveWeight(network.last.weight, accelerator, session.progress.get("adaptive_weight", 0.0))
    model, judge, optimizer, judge_optimizer = accelerator.prepare(network, discriminator, *bare)
    now = next((stage for stage in stages if session.step < stage.end), stages[-1])
    blank = torch.zeros(1, cfg.image.channels, now.image.size, now.image.size, device=device, dtype=dtype)
    warm_up_ddp(accelerator, model, blank, blank.new_zeros(1, *cfg.model.latent_shape(now.image.size)))
    warm_up_ddp(accelerator, judge, blank)
    total_images, images_seen = stages[-1].split.images_at(stages[-1].end), now.split.images_at(session.step)
    session.begin(train_set, held_out, total_images=total_images, images=images_seen)
    if session.run.writes and session.fresh:
        with session.look("the first images"):
            save_first_images(run_dir, train_set, now.image, cfg.seed)

    for stage in stages[now.number - 1 :]:
        # Enter the stage: picture size, tanh, learning rates, and how well it reconstructs at the start.
        own, split = stage.config, stage.split
        network.tanh = ema.network.tanh = tanh = tanh or own.tanh
        rate_at, judge_rate_at = stage.rate(cfg.optimizer), stage.adversary_rate(cfg.discriminator_optimizer)
        key = f"stages.{stage.number - 1}.micro_batch_size"
        session.enter(split, stage.resolve, end=stage.end, name=stage.describe(len(stages)), key=key)
        examples = image_examples(held_out if held_out is not None else train_set, stage.image)
        more = {"batch_size": split.micro, "warn": session.run.warn}
        look = partial(reconstruct, ema.network, examples, cfg.preview, accelerator, perceptual, **more)
        if guard.enter(stage.number) and own.adversarial is not None and not attempt.trial:
            guard.watch(cfg.guard, session.step, look()["l1"])
        if session.step == stage.first or stage.adversary_at(session.step - 1) is None:
            guard.saved_before(session.step)
        batches = stream(train_set, stage.image, split, seed=seed, start_step=session.step, workers=cfg.workers, device=device)

        # Train.
        model.train()
        while session.step < stage.end:
            # Draw the latents' noise for the whole batch; each rank takes its share below.
            step = session.step
            adversary = stage.adversary_at(step, always=attempt.trial)
            noise_shape = (split.batch, *cfg.model.latent_shape(stage.image.size))
            noise = normal(noise_shape, seed, "noise", step, device=device, dtype=dtype)
            codes = CodebookStep(network.codebook, noise_shape, seed, step) if network.codebook is not None else None

            # Gradients: every loss is its sum over the micro-batch times world size over the batch.
            for part in range(split.accumulation):
                micro, here = next(batches), split.of_step(part)
                images = to_network(micro.images, device, dtype)
                with accumulating(accelerator, model, part, split.accumulation):
                    made = model(images, noise[here])
                    told = {own.reconstruction: losses.reconstruction_loss(own.reconstruction, made.images, images)}
                    loss = told[own.reconstruction]
                    if own.perceptual is not None and perceptual is not None:
                        with accelerator.autocast():
                            told["perceptual"] = perceptual(made.images, images)
                        loss = loss + own.perceptual.weight * told["perceptual"]
                    if adversary is not None:  # the discriminator is frozen here, and learns below
                        discriminator.requires_grad_(False)
                        with accelerator.autocast():
                            told["adversarial"] = losses.generator_loss(adversary.loss, discriminator(made.images))
                        weight = adversary.weight * cfg.guard.shrink**guard.rollbacks
                        if adversary.adaptive:
                            adaptive.measure(loss.sum(), told["adversarial"].sum())
                            weight = weight * adaptive.value
                        loss = loss + weight * told["adversarial"]
                    if codes is None:
                        told["kl"] = losses.kl_divergence(made.mean, made.logvar)
                        loss = loss + own.kl_weight * told["kl"]
                    else:
                        told["commitment"] = losses.commitment_loss(made.mean, codes.watch(made, here))
                        loss = loss + codes.codebook.spec.commitment * told["commitment"]
                    accelerator.backward(loss.sum() * (split.world / split.batch))
                if adversary is not None:
                    discriminator.requires_grad_(True)
                    with accumulating(accelerator, judge, part, split.accumulation):
                        real, drawn = judge(torch.cat([images, made.images.detach().to(dtype)])).chunk(2)
                        told["discriminator"] = losses.discriminator_loss(adversary.loss, real, drawn)
                        told["discriminator_accuracy"] = losses.discriminator_accuracy(real, drawn)
                        accelerator.backward(told["discriminator"].sum() * (split.world / split.batch))
                session.meter.add(split.micro, loss=loss.sum(), **{name: value.sum() for name, value in told.items()})

            # Update both, or, where a gradient is not finite, neither.
            norm = clip_gradients(accelerator, model, cfg.optimizer)
            judge_norm = clip_gradients(accelerator, judge, cfg.discriminator_optimizer) if adversary else norm.new_zeros(())
            counts = torch.isfinite(norm + judge_norm)
            session.settle()
            update(optimizer, rate_at(step), norm + judge_norm)
            if adversary is not None:
                update(judge_optimizer, judge_rate_at(step), norm + judge_norm)
            adaptive.update(counts)
            if codes is not None:
                codes.update(accelerator, counts)
            session.count(counts)

            # Now and then: log, look at reconstructions, save.
            if not session.due:
                continue
            values, best, healthy, seen = session.logged(lr=rate_at(step), grad_norm=norm), False, True, {}
            if values and adversary is not None:
                told = {"adaptive_weight": float(adaptive.value)} if adversary.adaptive else {}
                values |= {"discriminator_grad_norm": float(judge_norm), **told}
            if session.now("preview"):
                seen = look(sheet=session.run.samples / f"step_{session.step:08d}.png")
                values |= {f"{where}_{name}": value for name, value in seen.items()}
                values |= network.codebook.usage() if network.codebook is not None else {}
                told = "lpips" if perceptual is not None else "l1"
                if session.decides:
                    best = session.better(told, seen[told]) and cfg.checkpoint.keep_best
                    healthy = guard.watch(cfg.guard, session.step, seen["l1"], adversary=adversary is not None)
                for line in troubled_channels(seen) + won(values):
                    session.run.say(f"warning: step {session.step}: {line}")
            session.report(values)
            if not healthy and adversary is not None and not attempt.trial:
                session.run.say(f"warning: {guard.explain(cfg.guard, session.step, seen['l1'], values)}")
                if guard.rolls_back(cfg.guard):
                    batches.close()
                    return session.roll_back(guard.back_to, guard=replace(guard, rollbacks=guard.rollbacks + 1).saved())
            keep = best or (cfg.guard.rollback and guard.healthy_step == session.step)
            more = {"tanh": tanh, "guard": guard.saved(), "adaptive_weight": float(adaptive.value)}
            if session.save(keep=keep, **more) and adversary is None:
                guard.saved_before(session.step)
            if session.leaves():
                batches.close()
                return session.end_stopped()
        batches.close()

    # Leave what latent diffusion needs, and say what to do next.
    session.write_final(progress={"tanh": tanh})
    message = f"finished; see {session.run.samples}; next, diffusion on its latents: {use}"
    curves = {"loss": ["loss", f"{where}_l1", f"{where}_lpips"], "PSNR": [f"{where}_psnr"]}
    curves |= {"adversary": ["discriminator_accuracy"]}
    return session.end_finished(message, curves)


if __name__ == "__main__":
    run_script(main)
