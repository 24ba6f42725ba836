#!/usr/bin/env python
"""Bring other projects' checkpoints in, and runs out: guided- and improved-diffusion, IADB, diffusers folders, safetensors."""

import argparse
import re
from pathlib import Path

import safetensors.torch
import torch

from src.config import UserError, quoted, run_script, validate, write_whole
from src.diffusion import ProcessConfig
from src.interop import diffusers, guided_diffusion, iadb
from src.interop.imported import Imported, keep
from src.models import UNet
from src.sampling import open_trained


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
    blended = commands.add_parser("iadb", help="import an IADB checkpoint of a UNet2DModel, a state dict or Lightning's")
    blended.add_argument("checkpoint")
    blended.add_argument("--model-config", metavar="FILE", help="the YAML that the network was built from")
    blended.add_argument("--image-size", metavar="N", type=int, help="the pictures' side, where no YAML says it")
    blended.add_argument("--autoencoder", metavar="NAME", help="of a network on latents: an AutoencoderKL, folder or hub name")
    for importing in (guided, theirs, blended):
        importing.add_argument("--out", required=True, help="the new folder: sample.py and the others open it as a run")
        importing.add_argument("--name", help="what it is called (default: that of the folder)")
        importing.add_argument("--class-names", metavar="FILE", help="a text file with a name a line, in the labels' order")
    out = commands.add_parser("to-diffusers", help="write a run as a folder that diffusers loads")
    out.add_argument("run")
    out.add_argument("--out", required=True)
    plain = commands.add_parser("safetensors", help="write a run's EMA weights into one file")
    plain.add_argument("run")
    plain.add_argument("--out", required=True)
    plain.add_argument("--fp16", action="store_true", help="in half precision")
    return parser.parse_args()


def bring_in(args: argparse.Namespace, found: Imported) -> None:
    out, names = Path(args.out), []
    if args.class_names is not None:
        try:
            names = [line.strip() for line in Path(args.class_names).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{args.class_names}: cannot be read as a text file ({error})") from None
    name = args.name or re.sub(r"[^A-Za-z0-9._-]", "_", out.resolve().name).lstrip("._-") or "imported"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--name {name!r}: begin with a letter or a digit, and use letters, digits, dots, dashes, underscores")
    train = keep(found, out, name=name, class_names=names)
    for line in found.told:
        print(line)
    if train is not None:
        print(f"{out}: draw from it with python sample.py {quoted(out)}; train it on your own pictures with")
        print(f"  python {found.script} -cfg {quoted(train)} --set data.path=PICTURES")
    elif found.low_resolution is not None:
        print(f"{out}: make pictures of {found.low_resolution} px larger with python sample.py {quoted(out)} --low PICTURES")
    else:
        print(f"{out}: guide with python sample.py DIFFUSION_RUN --guidance-method classifier --classifier {quoted(out)}")


def to_diffusers(run: str, out: Path) -> None:
    opened = open_trained(run, torch.device("cpu"))
    plain = opened.codec is None and opened.low_resolution is None and opened.gaussian
    if not isinstance(opened.network, UNet) or not plain:
        raise UserError(f"{run} does not draw pixels from noise alone; a UNet2DModel can be written of nothing else")
    process = validate(ProcessConfig, opened.config["process"], origin=run)
    diffusers.export(
        opened.network,
        process,
        image_size=opened.image.size,
        out=out,
        name=opened.name,
        class_names=opened.class_names if opened.num_classes is not None else (),
    )
    print(f"{out}: {out / 'README.md'} says how diffusers loads and samples from it")


def to_safetensors(run: str, out: Path, *, half: bool) -> None:
    if out.exists():
        raise UserError(f"{out} is there already; give another --out")
    opened = open_trained(run, torch.device("cpu"))
    weights = {
        key: (value.half() if half and value.is_floating_point() else value).contiguous()
        for key, value in opened.network.state_dict().items()
    }
    told = {"run": opened.name, "step": str(opened.step), "weights": opened.digest}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, safetensors.torch.save(weights, metadata=told))
    print(f"{out}: {len(weights)} tensors, {out.stat().st_size / 1e6:.1f} MB")


def main() -> None:
    args = arguments()
    if args.command == "guided-diffusion":
        bring_in(args, guided_diffusion.read(args.checkpoint, args.flags))
    elif args.command == "diffusers":
        bring_in(args, diffusers.read(args.checkpoint))
    elif args.command == "iadb":
        given = {"model_config": args.model_config, "image_size": args.image_size, "autoencoder": args.autoencoder}
        bring_in(args, iadb.read(args.checkpoint, **given))
    elif args.command == "to-diffusers":
        to_diffusers(args.run, Path(args.out))
    else:
        to_safetensors(args.run, Path(args.out), half=args.fp16)


if __name__ == "__main__":
    run_script(main)
