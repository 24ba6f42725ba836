#!/usr/bin/env python
"""Check a folder of images, unpack an archive, pack images into one mapped file, or encode them ahead of training.

python prepare_data.py check datasets/landscape --min-file-bytes 5000
python prepare_data.py check datasets/landscape --size 64 --aspect
python prepare_data.py unpack landscape.zip --out datasets/landscape
python prepare_data.py pack datasets/landscape --size 64 --out datasets/landscape64
python prepare_data.py latents runs/landscape256_vae
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
import argparse
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from src import figures
from src.config import CommandLine, UserError, config, quoted, read_json, run_script, validate
from src.config.sizes import Sides, describe_size
from src.data import HeldOut, ImageConfig, ImageSet, describe_data, open_sources
from src.data.buckets import describe_buckets
from src.data.conditions import ConditionConfig
from src.data.facts import count_notes, count_small, describe_small, refuse_small_packs, skipped_files
from src.data.names import class_remarks, printable
from src.data.packing import pack
from src.data.pairs import open_pairs
from src.data.sources import FolderSource, Sources
from src.runs.autoencoder import open_autoencoder
from src.runs.config_buckets import (
    ModelOnly,
    bucketed_images,
    draw_buckets,
    draw_images,
    sizes_of_config,
)
from src.runs.densities import ImageDensity
from src.runs.latents import cache_folder, latents_of
from src.runtime.failures import explain_failure
from src.runtime.launch import start_sampling
from src.storage.archives import stem, unpack
from src.training.run_directory import check_ranks


@config
class DataOnly:
    """The part of a training config that this script reads."""

    data: Sources


@config
class ToEncode(DataOnly):
    """The part of the config of train_vae.py or train_ldm.py that says what to encode."""

    autoencoder: str
    latents: str | None = None
    encode_batch_size: int = 16
    held_out: HeldOut = 0.0
    image: ImageConfig
    condition: ConditionConfig | None = None


def arguments() -> argparse.Namespace:
    parser = CommandLine(description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="check|unpack|pack|latents")
    check = commands.add_parser("check", help="what is in a folder, and what a run would leave out")
    packing = commands.add_parser("pack", help="write one mapped file that trains faster")
    for command in (check, packing):
        command.add_argument("data", help="a folder of images, or a config .json whose `data` is meant")
        command.add_argument("--split", help="the subfolder to use where there are train/, test/ ...")
        command.add_argument("--labels", metavar="FILE", help="a table that says the class of each image, instead of folders")
        command.add_argument("--label-column", metavar="COLUMN", help="of --labels: its name, or its number from 0")
        command.add_argument("--image-column", metavar="COLUMN", help="of --labels (default: the first)")
        command.add_argument("--min-file-bytes", type=int, default=0, help="leave out smaller files")
        command.add_argument("--min-side", type=int, help="leave out images whose shorter side has fewer pixels")
        command.add_argument("--max-broken-fraction", type=float, default=1.0, help="stop above this share of broken files")
    check.add_argument("--size", type=int, help="count smaller images (default: than the config trains at)")
    check.add_argument(
        "--aspect", type=float, nargs="?", const=2.0, metavar="RATIO",
        help="show the buckets of --size, whose sides differ by this factor at most (default 2); a config has image.aspect",
    )  # fmt: skip
    check.add_argument("--step", type=int, help="of --aspect: sides are multiples of it, as the network wants (default 8)")
    check.add_argument("--sheet", metavar="FILE.png", help="write a contact sheet")
    check.add_argument("--json", action="store_true", help="print the findings as JSON")
    packing.add_argument("--out", required=True, help="the new folder")
    packing.add_argument("--size", type=int, required=True, help="pixels of the shorter side")
    packing.add_argument("--channels", type=int, choices=(1, 3), default=3)
    packing.add_argument("--held-out", type=float, default=0.0, help="mark this fraction, by hash of the path, as held out")
    unpacking = commands.add_parser("unpack", help="unpack a zip or tar archive, safely")
    unpacking.add_argument("archive")
    unpacking.add_argument("--out", help="the new folder (default: the archive's name without its ending)")
    encoding = commands.add_parser("latents", help="encode images ahead of train_ldm.py, on one process or several")
    encoding.add_argument("run", help="a run of train_vae.py, whose images are encoded, or a config .json of train_ldm.py")
    encoding.add_argument("--size", type=int, help="pixels, where the run was trained at several sizes")
    encoding.add_argument("--out", help="the cache's folder (default: in the autoencoder's run)")
    encoding.add_argument("--batch-size", type=int, help="images at a time (default 16)")
    return parser.parse_args()


def open_images(args: argparse.Namespace) -> ImageSet:
    if args.data.endswith(".json"):
        options = ("split", "labels", "label_column", "image_column", "min_side")
        is_for_folder = any(getattr(args, option) is not None for option in options)
        if is_for_folder or args.min_file_bytes or args.max_broken_fraction != 1.0:
            raise UserError(
                "--split, --labels, --label-column, --image-column, --min-file-bytes, --min-side and --max-broken-fraction are "
                "for a folder; a config's data has its own"
            )
        raw = read_json(args.data)
        if not isinstance(raw, dict) or "data" not in raw:
            raise UserError(f"{args.data}: has no `data`")
        return open_sources(validate(DataOnly, {"data": raw["data"]}, origin=args.data).data)
    scan = {key: getattr(args, key) for key in ("min_file_bytes", "max_broken_fraction", "min_side")}
    spec = {"source": "folder", "path": args.data, "split": args.split, "scan": scan}
    if (args.labels is None) != (args.label_column is None) or (args.labels is None and args.image_column is not None):
        raise UserError("--labels FILE and --label-column COLUMN belong together; --image-column goes with them")
    if args.labels is not None:
        columns = {key: getattr(args, key) for key in ("label_column", "image_column")}
        given = {key: int(column) if column.isdecimal() else column for key, column in columns.items() if column is not None}
        spec["labels"] = {"file": args.labels, **given}
    return open_sources(validate(FolderSource, spec, origin="arguments"))


def wanted_sizes(args: argparse.Namespace) -> dict[str, int | Sides]:
    """{option or config key: size} of the sizes to compare the images with: --size, or all at which a config trains."""
    if args.size is not None:
        if args.size < 2:
            raise UserError("--size must be at least 2")
        return {"--size": args.size}
    if not args.data.endswith(".json"):
        return {}
    return sizes_of_config(read_json(args.data))


def check(args: argparse.Namespace) -> None:
    images, sizes = open_images(args), wanted_sizes(args)
    bucketed = bucketed_images(args.data, images, sizes, max_ratio=args.aspect, step=args.step)
    tables = bucketed.measure() if bucketed is not None else {}
    sides = images.sides.min(1)
    sides = sides[sides > 0] if (sides > 0).any() else np.zeros(1, np.int64)
    skipped, notes = skipped_files(images), count_notes(images)
    remarks = [remark for part in images.parts for remark in part.report.remarks]
    remarks += [f"{count} {kind}" for kind, count in images.sequences().items()]
    remarks += class_remarks(images.class_names, len(images))
    if args.json:
        findings = {
            "pictures": len(images),
            "classes": images.counts,
            "skipped": skipped,
            "notes": notes,
            "shorter_side": {"smallest": int(sides.min()), "median": int(np.median(sides)), "largest": int(sides.max())},
            "smaller": {describe_size(size).removesuffix(" px"): count_small(size, images)[0] for size in sizes.values()},
            "remarks": remarks,
            "fingerprint": images.fingerprint,
        } | ({"buckets": tables} if tables else {})
        print(json.dumps(findings, indent=1))
    else:
        print(f"{len(images)} images can be trained on, {len(skipped)} files are left out")
        for reason, count in Counter(reason for _, reason in skipped).most_common():
            first = next(name for name, why in skipped if why == reason)
            print(f"  {count:>8}  {reason}, for one {first!r}")
        for note, count in notes.items():
            print(f"  {count:>8}  {note}")
        print(f"shorter sides of {sides.min()} to {sides.max()} px, half of them below {np.median(sides):.0f}")
        for line in describe_small(sizes, images):
            print(f"warning: {line}")
        for remark in remarks:
            print(f"  {remark}")
        print(f"{len(images.class_names) or 'no'} classes")
        for name, count in images.counts.items() if images.class_names else ():
            print(f"  {count:>8}  {printable(name)}")
        for key, table in tables.items():
            print(f"{key}: " + "\n".join(describe_buckets(table)))
    if args.sheet:
        sheet = draw_images(images) if bucketed is None else draw_buckets(bucketed)
        with explain_failure(args.sheet):
            figures.save(sheet, Path(args.sheet))
        print(f"  {args.sheet}")


def latents(args: argparse.Namespace) -> None:
    state, device = start_sampling()
    path = Path(args.run)
    raw = read_json(path if path.suffix == ".json" else path / "config.json")
    keys = ("data", "held_out", "image", "autoencoder", "latents", "encode_batch_size", "condition")
    known = {key: raw[key] for key in keys if key in raw}
    if not {"data", "image"} <= set(known) or (path.suffix == ".json" and "autoencoder" not in known):
        raise UserError(f"{path} is neither a run of train_vae.py nor a config of train_ldm.py")
    spec = validate(ToEncode, {"autoencoder": args.run, **known}, origin=args.run)
    image = replace(spec.image, size=args.size or spec.image.size, crop="center")
    train_set, held_out = open_pairs(spec.data, spec.held_out, spec.condition)
    sizes = {"--size" if args.size else "image.size": image.size}
    refuse_small_packs(sizes, train_set, held_out)
    if state.is_main_process:
        for line in describe_small(sizes, train_set, held_out):
            print(f"warning: {line}")
    check_ranks(describe_data(train_set, held_out))
    autoencoder = open_autoencoder(spec.autoencoder, device)
    run_dir = Path("runs") / str(raw.get("name", "latents"))
    given_folder, batch = args.out or spec.latents, args.batch_size or spec.encode_batch_size
    factor = autoencoder.factor
    if "stages" not in raw:
        factor *= validate(ModelOnly, {"model": raw["model"]}, origin=args.run).model.factor
    elif image.aspect is not None and image.aspect.step is None:
        raise UserError(
            f"{args.run}: the sizes of the buckets follow from the network that will learn from the latents; give the config "
            "of train_ldm.py, or set image.aspect.step in both"
        )
    density = ImageDensity(train_set, held_out, image, factor, spec.condition)
    folder = Path(given_folder) if given_folder else cache_folder(autoencoder, density, run_dir)
    facts = latents_of(autoencoder, density, folder, state, batch_size=batch).facts
    if state.is_main_process:
        channels = ", ".join(f"{mean:.2f} +- {std:.2f}" for mean, std in zip(facts["mean"], facts["std"], strict=True))
        print(f"{folder}: latents of {len(train_set)} images, {'x'.join(map(str, facts['shape']))}; channels {channels}")


def main() -> None:
    args = arguments()
    if args.command == "check":
        check(args)
    elif args.command == "latents":
        latents(args)
    elif args.command == "pack":
        if args.size < 2:
            raise UserError("--size must be at least 2")
        images = open_images(args)
        for line in describe_small({"--size": args.size}, images):
            print(f"warning: {line.replace('--set data.scan.min_side=', '--min-side ')}")
        count = pack(images, Path(args.out), size=args.size, channels=args.channels, held_out=args.held_out)
        print(f"packed {count} images; train on them: --set data.source=packed --set {quoted(f'data.path={args.out}')}")
    else:
        archive = Path(args.archive)
        name = stem(archive.name) or archive.stem
        if not args.out and (not name or name == archive.name):
            raise UserError(f"{archive}: its name has no ending to leave away for a folder's name; give the folder with --out")
        out = Path(args.out) if args.out else archive.with_name(name)
        count = unpack(archive, out)
        print(f"unpacked {count} files into {out}; now: python prepare_data.py check {quoted(out)}")


if __name__ == "__main__":
    run_script(main)
