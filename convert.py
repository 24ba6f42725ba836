#!/usr/bin/env python
"""Import checkpoints of guided- and improved-diffusion, IADB and diffusers; export runs, or push them to the hub."""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
import argparse
import re
from pathlib import Path

import safetensors.torch
import torch

from src.config import CommandLine, UserError, quoted, read_text, run_script, validate
from src.diffusion import ProcessConfig
from src.interop import diffusers_import, guided_diffusion, iadb
from src.interop.atelier_folder import is_autoencoder, is_latent, latent_obstacles, write_atelier_folder
from src.interop.autoencoder_kl import autoencoder_files
from src.interop.cards import render_card
from src.interop.diffusers_export import export, write_files
from src.interop.imported import Imported, keep
from src.models import UNet
from src.runs.autoencoder import kept_autoencoder, open_autoencoder
from src.runs.folders import read_weights
from src.runs.opened import open_trained
from src.storage.downloads import split_revision
from src.storage.files import write_whole
from src.storage.hub import CARD, NAME

CPU = torch.device("cpu")


def arguments() -> argparse.Namespace:
    parser = CommandLine(
        description=__doc__, epilog="example: python convert.py guided-diffusion 64x64_diffusion.pt --out models/imagenet64"
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    guided = commands.add_parser("guided-diffusion", help="import a .pt of guided- or improved-diffusion: U-Net or classifier")
    guided.add_argument("checkpoint")
    guided.add_argument("--flags", metavar="FILE", help="JSON of the flags of its training; a published checkpoint needs none")
    theirs = commands.add_parser("diffusers", help="import a folder of diffusers with a UNet2DModel, or a whole DDPMPipeline")
    theirs.add_argument("checkpoint", metavar="folder")
    blended = commands.add_parser("iadb", help="import an IADB checkpoint of a UNet2DModel, a state dict or Lightning's")
    blended.add_argument("checkpoint")
    blended.add_argument("--model-config", metavar="FILE", help="the YAML that the network was built from")
    blended.add_argument("--image-size", metavar="N", type=int, help="the side of the images, where no YAML says it")
    of_latents = "diffusers' autoencoder of a network on latents: a folder or a name on the hub"
    theirs.add_argument("--autoencoder", metavar="NAME", help=f"{of_latents} (default: the vae/ of the folder)")
    blended.add_argument("--autoencoder", metavar="NAME", help=of_latents)
    for importing in (guided, theirs, blended):
        importing.add_argument("--out", required=True, help="the new folder, which sample.py and the others open as a run")
        importing.add_argument("--name", help="the name of the run (default: that of the folder)")
        which = "the network to take where there are several: ema (the default), raw, or a name that a message lists"
        importing.add_argument("--which", metavar="NAME", help=which)
        names = "a text file with the name of a class on each line, in the order of the labels"
        importing.add_argument("--class-names", metavar="FILE", help=names)
    leaving = commands.add_parser(
        "to-diffusers", help="write a run as a folder that diffusers loads: U-Net, autoencoder, or both"
    )
    plain = commands.add_parser("safetensors", help="write a run's EMA weights as safetensors")
    for exporting, out in ((leaving, "folder"), (plain, "file; for a latent run or an autoencoder, the new folder")):
        exporting.add_argument("run", help="a run, checkpoint or final folder")
        exporting.add_argument("--out", required=True, help=f"the new {out}")
    pushed = commands.add_parser("push", help="show a run on the Hugging Face hub: weights, config, previews, a card; no data")
    pushed.add_argument("run", help="a run, checkpoint or final folder")
    pushed.add_argument("repo", metavar="OWNER/NAME[@BRANCH]", help="the repository, which is made where it is missing")
    pushed.add_argument("--private", action="store_true", help="make it private, where it is made")
    plain.add_argument("--fp16", action="store_true", help="write the weights in half precision")
    return parser.parse_args()


def save_imported(args: argparse.Namespace, imported: Imported) -> None:
    out, names = Path(args.out), []
    if args.class_names is not None:
        names = [line.strip() for line in read_text(args.class_names).splitlines() if line.strip()]
    name = args.name or re.sub(r"[^A-Za-z0-9._-]", "_", out.resolve().name).lstrip("._-") or "imported"
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(f"--name {name!r}: begin with a letter or a digit, and use letters, digits, dots, dashes, underscores")
    train = keep(imported, out, name=name, class_names=names)
    print("\n".join(imported.notes))
    if train is not None:
        how = f"draw samples with python sample.py {quoted(out)}"
        if imported.low_resolution is not None:
            how = f"enlarge images of {imported.low_resolution} px with python sample.py {quoted(out)} --low IMAGES"
        print(f"{out}: {how}; train the network on your own images with")
        print(f"  python {imported.script} -cfg {quoted(train)} --set data.path=IMAGES")
    else:
        print(f"{out}: guide with python sample.py DIFFUSION_RUN --guidance-method classifier --classifier {quoted(out)}")


def to_diffusers(run: str, out: Path) -> None:
    weights = read_weights(Path(run))
    hint = f"python convert.py safetensors {quoted(run)} --out FOLDER writes all of it as Atelier reads it"
    if is_autoencoder(weights):
        autoencoder = open_autoencoder(run, CPU)
        try:
            files = autoencoder_files(autoencoder)
        except UserError as error:
            raise UserError(f"{error}; {hint}") from None
        card = render_card("autoencoder_kl", autoencoder=autoencoder, weights=weights, folder=out.resolve().name)
        write_files(out, {**files, "README.md": card.encode()})
        how = out / "README.md"
        print(f"{out}: {how} says how diffusers loads it; train_ldm.py --set autoencoder={quoted(out)} takes it, too")
        return
    opened = open_trained(run, CPU)
    latent = is_latent(weights)
    if not isinstance(opened.network, UNet) or opened.condition is not None or not (opened.gaussian or latent):
        raise UserError(f"{run} does not draw pixels from noise alone; a UNet2DModel can be written of nothing else")
    facts = files = None
    if latent:
        autoencoder, facts = kept_autoencoder(weights.folder, CPU), weights.data["latents"]
        if reasons := latent_obstacles(opened, autoencoder):
            raise UserError(f"{run}: diffusers cannot have it ({'; '.join(reasons)}); {hint}")
        files = autoencoder_files(autoencoder, facts)
    export(
        opened.network,
        validate(ProcessConfig, opened.config["process"], origin=run),
        image_size=opened.image.size,
        out=out,
        name=opened.name,
        class_names=opened.class_names if opened.num_classes is not None else (),
        data=weights.data,
        latents=facts,
        autoencoder=files,
    )
    print(f"{out}: {out / 'README.md'} says how diffusers loads and samples from it")


def to_safetensors(run: str, out: Path, *, half: bool) -> None:
    weights = read_weights(Path(run))
    if is_autoencoder(weights) or is_latent(weights):
        if out.suffix == ".safetensors":
            raise UserError(
                f"{run} needs more than one file: give --out a folder, such as {out.with_suffix('')}, for weights, "
                "configuration and a README.md"
            )
        write_atelier_folder(run, weights, out, half=half)
        size = sum(path.stat().st_size for path in out.iterdir())
        print(f"{out}: {size / 1e6:.1f} MB; {out / 'README.md'} says what is in it, and Atelier opens it as it is")
        return
    if out.exists():
        raise UserError(f"{out} is there already; give another --out")
    opened = open_trained(run, CPU)
    state_dict = {
        key: (value.half() if half and value.is_floating_point() else value).contiguous()
        for key, value in opened.network.state_dict().items()
    }
    metadata = {"run": opened.name, "step": str(opened.step), "weights": opened.digest}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_whole(out, safetensors.torch.save(state_dict, metadata=metadata))
    print(f"{out}: {len(state_dict)} tensors, {out.stat().st_size / 1e6:.1f} MB")


def push(run: str, repo: str, *, private: bool) -> None:
    if re.fullmatch(NAME, split_revision(repo)[0]) is None:
        raise UserError(f"{repo} is no name on the Hugging Face hub, which is OWNER/NAME or OWNER/NAME@BRANCH")
    from src.report.card import push_run  # and with it the report: nothing else here needs them

    address, card = push_run(run, repo, private=private)
    remark = "" if card == CARD else f"; the {CARD} there is somebody's own, and is as it was"
    print(f"{address}: {card} says how to draw from it, and asks for a licence{remark}; here: python sample.py {quoted(repo)}")


def main() -> None:
    args = arguments()
    if args.command == "guided-diffusion":
        save_imported(args, guided_diffusion.read(args.checkpoint, args.flags, which=args.which))
    elif args.command == "diffusers":
        save_imported(args, diffusers_import.read_whole(args.checkpoint, args.autoencoder, which=args.which))
    elif args.command == "iadb":
        given = {"model_config": args.model_config, "image_size": args.image_size, "autoencoder": args.autoencoder}
        save_imported(args, iadb.read(args.checkpoint, **given, which=args.which))
    elif args.command == "to-diffusers":
        to_diffusers(args.run, Path(args.out))
    elif args.command == "push":
        push(args.run, args.repo, private=args.private)
    else:
        to_safetensors(args.run, Path(args.out), half=args.fp16)


if __name__ == "__main__":
    run_script(main)
