#!/usr/bin/env python
"""Bring other projects' checkpoints in, and runs out: guided- and improved-diffusion, IADB, diffusers folders, safetensors."""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
import argparse
import re
from pathlib import Path

import safetensors.torch
import torch

from src.config import UserError, quoted, read_text, run_script, validate
from src.diffusion import ProcessConfig
from src.interop import diffusers, guided_diffusion, iadb, latent_folders
from src.interop.imported import Imported, keep
from src.interop.on_latents import with_autoencoder
from src.interop.own_folders import data_lines, is_autoencoder, is_latent, latent_lines, latent_obstacles, write_own
from src.models import UNet
from src.runs.autoencoder import kept_autoencoder, open_autoencoder
from src.runs.folders import Weights, read_weights
from src.runs.opened import open_trained
from src.storage.files import write_whole


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, epilog="example: python convert.py guided-diffusion 64x64_diffusion.pt --out models/imagenet64"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    guided = commands.add_parser("guided-diffusion", help="import a .pt of guided- or improved-diffusion: U-Net or classifier")
    guided.add_argument("checkpoint")
    guided.add_argument(
        "--flags", metavar="FILE", help="JSON of the flags that it was trained with, where it is no published one"
    )
    theirs = commands.add_parser("diffusers", help="import a folder of diffusers with a UNet2DModel, or a whole DDPMPipeline")
    theirs.add_argument("checkpoint", metavar="folder")
    theirs.add_argument("--autoencoder", metavar="NAME", help="of a network on latents (default: the vae/ of the folder)")
    blended = commands.add_parser("iadb", help="import an IADB checkpoint of a UNet2DModel, a state dict or Lightning's")
    blended.add_argument("checkpoint")
    blended.add_argument("--model-config", metavar="FILE", help="the YAML that the network was built from")
    blended.add_argument("--image-size", metavar="N", type=int, help="the pictures' side, where no YAML says it")
    blended.add_argument("--autoencoder", metavar="NAME", help="of a network on latents: an AutoencoderKL, folder or hub name")
    for importing in (guided, theirs, blended):
        importing.add_argument("--out", required=True, help="the new folder: sample.py and the others open it as a run")
        importing.add_argument("--name", help="what it is called (default: that of the folder)")
        importing.add_argument(
            "--which",
            metavar="NAME",
            help="of several networks in it: ema (the default), raw, or a name that a message lists",
        )
        importing.add_argument("--class-names", metavar="FILE", help="a text file with a name a line, in the labels' order")
    out = commands.add_parser("to-diffusers", help="write a run as a folder that diffusers loads: U-Net, autoencoder, or both")
    out.add_argument("run", help="a run, checkpoint or final folder")
    out.add_argument("--out", required=True, help="the new folder")
    plain = commands.add_parser(
        "safetensors", help="write a run's EMA weights into one file; of a latent run or an autoencoder, into one folder"
    )
    plain.add_argument("run", help="a run, checkpoint or final folder")
    plain.add_argument("--out", required=True, help="the new file; of a latent run or an autoencoder, the new folder")
    plain.add_argument("--fp16", action="store_true", help="in half precision")
    return parser.parse_args()


def bring_in(args: argparse.Namespace, found: Imported) -> None:
    out, names = Path(args.out), []
    if args.class_names is not None:
        names = [line.strip() for line in read_text(args.class_names).splitlines() if line.strip()]
    name = args.name or re.sub(r"[^A-Za-z0-9._-]", "_", out.resolve().name).lstrip("._-") or "imported"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--name {name!r}: begin with a letter or a digit, and use letters, digits, dots, dashes, underscores")
    train = keep(found, out, name=name, class_names=names)
    for line in (*found.taken, *found.told):
        print(line)
    if train is not None:
        print(f"{out}: draw from it with python sample.py {quoted(out)}; train it on your own pictures with")
        print(f"  python {found.script} -cfg {quoted(train)} --set data.path=PICTURES")
    elif found.low_resolution is not None:
        print(f"{out}: make pictures of {found.low_resolution} px larger with python sample.py {quoted(out)} --low PICTURES")
    else:
        print(f"{out}: guide with python sample.py DIFFUSION_RUN --guidance-method classifier --classifier {quoted(out)}")


CPU = torch.device("cpu")


def to_diffusers(run: str, out: Path) -> None:
    weights = read_weights(Path(run))
    if is_autoencoder(weights):
        autoencoder_to_diffusers(run, weights, out)
        return
    opened = open_trained(run, CPU)
    latent = is_latent(weights)
    if not isinstance(opened.network, UNet) or opened.low_resolution is not None or not (opened.gaussian or latent):
        raise UserError(f"{run} does not draw pixels from noise alone; a UNet2DModel can be written of nothing else")
    part = None
    if latent:
        autoencoder = kept_autoencoder(weights.folder, CPU)
        if reasons := latent_obstacles(opened, autoencoder):
            raise UserError(f"{run}: diffusers cannot have it ({'; '.join(reasons)}); {_other_way(run)}")
        part = latent_folders.latent_part(autoencoder, weights.data["latents"])
    diffusers.export(
        opened.network,
        validate(ProcessConfig, opened.config["process"], origin=run),
        image_size=opened.image.size,
        out=out,
        name=opened.name,
        class_names=opened.class_names if opened.num_classes is not None else (),
        card="\n".join([*data_lines(weights.data, classes=False), *latent_lines(part.facts)]) if part is not None else "",
        latents=part,
    )
    print(f"{out}: {out / 'README.md'} says how diffusers loads and samples from it")


def _other_way(run: str) -> str:
    return f"python convert.py safetensors {quoted(run)} --out FOLDER writes all of it as Atelier reads it"


def autoencoder_to_diffusers(run: str, weights: Weights, out: Path) -> None:
    autoencoder = open_autoencoder(run, CPU)
    try:
        files = latent_folders.autoencoder_files(autoencoder)
    except UserError as error:
        raise UserError(f"{error}; {_other_way(run)}") from None
    files["README.md"] = latent_folders.autoencoder_card(autoencoder, weights, out.resolve().name).encode()
    diffusers.write_files(out, files)
    taken = f"train_ldm.py --set autoencoder={quoted(out)}"
    print(f"{out}: {out / 'README.md'} says how diffusers loads it; {taken} takes it, too")


def to_safetensors(run: str, out: Path, *, half: bool) -> None:
    if out.exists() and not out.is_dir():
        raise UserError(f"{out} is there already; give another --out")
    weights = read_weights(Path(run))
    if is_autoencoder(weights) or is_latent(weights):
        if out.suffix == ".safetensors":
            raise UserError(
                f"{run} needs more than one file: give --out a folder, such as {out.with_suffix('')}, for weights, "
                "configuration and a README.md"
            )
        write_own(run, weights, out, half=half)
        size = sum(path.stat().st_size for path in out.iterdir())
        print(f"{out}: {size / 1e6:.1f} MB; {out / 'README.md'} says what is in it, and Atelier opens it as it is")
        return
    if out.exists():
        raise UserError(f"{out} is there already; give another --out")
    opened = open_trained(run, CPU)
    state = {
        key: (value.half() if half and value.is_floating_point() else value).contiguous()
        for key, value in opened.network.state_dict().items()
    }
    told = {"run": opened.name, "step": str(opened.step), "weights": opened.digest}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, safetensors.torch.save(state, metadata=told))
    print(f"{out}: {len(state)} tensors, {out.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    args = arguments()
    if args.command == "guided-diffusion":
        bring_in(args, guided_diffusion.read(args.checkpoint, args.flags, which=args.which))
    elif args.command == "diffusers":
        found = (diffusers if args.autoencoder else latent_folders).read(args.checkpoint, which=args.which)
        bring_in(args, with_autoencoder(found, args.checkpoint, args.autoencoder))
    elif args.command == "iadb":
        given = {"model_config": args.model_config, "image_size": args.image_size, "autoencoder": args.autoencoder}
        given["which"] = args.which
        bring_in(args, iadb.read(args.checkpoint, **given))
    elif args.command == "to-diffusers":
        to_diffusers(args.run, Path(args.out))
    else:
        to_safetensors(args.run, Path(args.out), half=args.fp16)


if __name__ == "__main__":
    run_script(main)
