#!/usr/bin/env python
"""Measure a run, or a folder of images, against real ones: distances, precision and recall, copies; or its likelihood.

python evaluate.py runs/wikiart256_ldm                            10,000 samples against the training images
python evaluate.py runs/landscape256_vae                          reconstructions of held-out images
python evaluate.py samples/mine --data datasets/mine --resize     images that are there already
python evaluate.py runs/wikiart256_ldm --sweep steps=10,20,50 guidance=1,2,4
python evaluate.py runs/digits_ddpm --likelihood --steps 100      bits per dimension
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from src.config import CommandLine, UserError, config, parse_json, read_json, refuse_options, run_script, validate
from src.data import HeldOut, ImageSet, Sources, describe_data
from src.data.conditions import ConditionConfig
from src.data.pairs import open_pairs
from src.evaluation.autoencoder import evaluate_autoencoder
from src.evaluation.conditioned import evaluate_conditioned
from src.evaluation.folder import evaluate_folder
from src.evaluation.likelihood import measure_likelihood
from src.evaluation.results import GIVEN, HELD_OUT, TRAINING, Results, Setup, on_screen
from src.evaluation.samples import evaluate_run, evaluate_sweep, parse_sweep
from src.metrics.features import NAMES, Features, open_features
from src.report.report import write_report
from src.runs.classifier import open_classifier
from src.runs.opened import open_trained
from src.runtime.failures import explain_out_of_memory, warn_on_failure
from src.runtime.launch import start_sampling
from src.runtime.processes import ranks_of
from src.sampling import build_sampler
from src.sampling.config import SAMPLER_KEYS, add_arguments, parse_steps, sampler_config
from src.sampling.sampler import build_samplers
from src.storage.hub import local_path
from src.training.run_directory import append_metrics, check_ranks


@config
class DataConfig:
    """The images to measure on."""

    data: Sources
    held_out: HeldOut = 0.0
    condition: ConditionConfig | None = None


def arguments() -> tuple[argparse.Namespace, argparse.Namespace]:
    """The arguments of the command line, and the defaults."""
    parser = CommandLine(description=__doc__)
    parser.add_argument(
        "run", help="a run, a checkpoint, a final folder, an export, OWNER/NAME on the hub; or a folder of images"
    )
    parser.add_argument("--likelihood", action="store_true", help="the variational bound, in bits per dimension, instead")
    parser.add_argument(
        "--sweep", nargs="+", metavar="KEY=A,B,..", help="one table for all settings of the sampler, and curves"
    )
    parser.add_argument(
        "--features", action="append", metavar="NAME", help=f"{', '.join(NAMES)} (default inception); repeatable"
    )
    parser.add_argument("--inception-weights", metavar="FILE", help="default: where torch's cache keeps them")
    parser.add_argument("--weights", metavar="FILE", help="of dinov2 or timm:NAME, as timm has them (safetensors)")
    parser.add_argument("--num-samples", type=int, default=10_000, metavar="N")
    part_help = "of the run's images (default train; for a likelihood and an autoencoder held_out, if images were held out)"
    parser.add_argument("--part", choices=("held_out", "train"), help=part_help)
    parser.add_argument("--data", metavar="FOLDER", help="other images: a folder, or a source as in a config, as JSON")
    parser.add_argument("--num-images", type=int, metavar="N", help="of those, the N whose names hash lowest (default all)")
    parser.add_argument("--resize", action="store_true", help="of a folder: cut the images of --data to the samples' size")
    parser.add_argument(
        "--samples-per-image", type=int, default=4, metavar="N", help="of a run with a condition: of each image"
    )
    parser.add_argument("--condition-guidance", type=float, default=1.0, metavar="S", help="the scale of its guidance")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for the results (default evaluations/RUN/...)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--json", action="store_true", help="the results for another program, on standard output")
    add_arguments(parser)
    parser.set_defaults(steps=None)
    return parser.parse_args(), parser.parse_args(["RUN"])


class Measured(NamedTuple):
    """Images to measure on; where they are what was trained on, the held-out ones; and a name for the images."""

    images: ImageSet
    held_out: ImageSet | None
    reference: str


def open_images(args: argparse.Namespace, settings: dict[str, Any], part: str) -> Measured:
    """The run's own images, by default those of `part`, or the images of --data; the same on all ranks."""
    measured = _open_images(args, settings, part)
    if args.num_images is not None:
        measured = measured._replace(images=measured.images.lowest(args.num_images))
    check_ranks(describe_data(measured.images, measured.held_out))
    return measured


def _open_images(args: argparse.Namespace, settings: dict[str, Any], part: str) -> Measured:
    if args.data is not None and args.part is not None:
        raise UserError("--part is of the run's own images and --data are others; leave one out")
    if args.data is not None:
        source = parse_json(args.data) if args.data[:1] in ("{", "[") else {"source": "folder", "path": args.data}
        spec = validate(DataConfig, {"data": source, "condition": settings.get("condition")}, origin="--data")
        return Measured(open_pairs(spec.data, 0.0, spec.condition)[0], None, GIVEN)
    if "data" not in settings:
        raise UserError(f"{args.run} names no images to measure it on: give --data FOLDER")
    keys = ("data", "held_out", "condition")
    spec = validate(DataConfig, {key: settings[key] for key in keys if key in settings}, origin=args.run)
    train_set, held_out = open_pairs(spec.data, spec.held_out, spec.condition)
    if args.part == "held_out" and held_out is None:
        raise UserError(f"{args.run} held nothing out; give --part train, or --data FOLDER")
    if (args.part or part) == "held_out" and held_out is not None:
        return Measured(held_out, None, HELD_OUT)
    return Measured(train_set, held_out, TRAINING)


def main() -> None:
    args, defaults = arguments()
    counts = (args.batch_size, args.num_samples, args.num_images if args.num_images is not None else 1)
    if min(*counts, args.samples_per_image) < 1 or not 0 <= args.seed < 2**64:
        raise UserError("--batch-size, --num-samples and --num-images must be at least 1, --seed from 0 to 2^64 - 1")
    state, device = start_sampling(args.device)
    with explain_out_of_memory(args.batch_size, args.batch_size, key="--batch-size"):
        measure = measure_bits if args.likelihood else measure_quality
        measure(args, defaults, state, device)


# ---------------------------------------------------------------------------------------------- how good the images are


def measure_quality(args: argparse.Namespace, defaults: argparse.Namespace, state: Any, device: torch.device) -> None:
    """Measure images of a folder, reconstructions of an autoencoder, or samples of another run."""
    place = local_path(args.run)
    is_folder = place.is_dir() and not any((place / name).exists() for name in ("config.json", "checkpoints", "final"))
    known = [path for path in (place / "config.json", place / "final" / "config.json") if path.exists()]
    settings = read_json(known[0]) if known else {}
    draws_samples = not is_folder and "stages" not in settings
    if any(place.glob("step_*/MANIFEST.json")):
        raise UserError(f"{place} holds the checkpoints of {place.parent}: give that, or one of them")
    if not draws_samples:
        of_samples = {"sweep", "num_samples", "seed", "classifier", *SAMPLER_KEYS}
        refuse_options(args, defaults, of_samples, f"is about drawing samples, and {args.run} draws none")
    if args.resize and not is_folder:
        raise UserError("--resize is for a folder of images: a run says itself how large they are")
    opened = open_trained(args.run, device) if draws_samples else None
    if opened is None or opened.condition is None:
        of_images = {"samples_per_image", "condition_guidance"}
        refuse_options(args, defaults, of_images, f"is about drawing from images, and {args.run} draws from none")
    setup = setup_of(args, state, device, [network.to(device) for network in open_networks(args)])
    if is_folder:
        results = evaluate_folder(setup, place, open_images(args, {}, "train").images, resize=args.resize)
    elif opened is None:
        data, _, reference = open_images(args, settings, "held_out")
        results = evaluate_autoencoder(setup, args.run, settings, data, reference)
    else:
        data, held_out, reference = open_images(args, opened.config, "train" if opened.condition is None else "held_out")
        args.steps = "50" if args.steps is None else args.steps
        spec, samples = sampler_config(args), {"count": args.num_samples, "reference": reference}
        classifier = open_classifier(args.classifier, device) if args.classifier is not None else None
        if opened.condition is not None and args.sweep is None:
            sampler = build_sampler(opened, spec, classifier, condition_guidance=args.condition_guidance)
            results = evaluate_conditioned(setup, opened, sampler, data, each=args.samples_per_image, **samples)
        elif args.sweep is not None:
            samplers = build_samplers(opened, parse_sweep(spec, args.sweep), classifier)
            results = evaluate_sweep(setup, opened, samplers, data, **samples)
        else:
            results = evaluate_run(setup, opened, build_sampler(opened, spec, classifier), data, held_out, **samples)
    if state.is_main_process:
        show(results, args)


def setup_of(args: argparse.Namespace, state: Any, device: torch.device, networks: Sequence[Features] = ()) -> Setup:
    """The setup that the arguments describe."""
    out = Path(args.out) if args.out else None
    return Setup(networks, out, ranks_of(state), device, batch_size=args.batch_size, seed=args.seed)


def open_networks(args: argparse.Namespace) -> list[Features]:
    """The networks of --features, each with the file that is meant for it."""
    names = list(dict.fromkeys(args.features or ["inception"]))
    of_timm = [name for name in names if name == "dinov2" or name.startswith("timm:")]
    if args.weights is not None and len(of_timm) != 1:
        raise UserError("--weights is the file of one network, dinov2 or timm:NAME: give it with --features of that alone")
    if args.inception_weights is not None and "inception" not in names:
        raise UserError("--inception-weights belongs to --features inception")
    files = {"inception": args.inception_weights, **dict.fromkeys(of_timm, args.weights)}
    return [open_features(name, files.get(name)) for name in names]


def show(results: Results, args: argparse.Namespace) -> None:
    """Print the table, and add a line to metrics.jsonl."""
    if args.json:
        print(json.dumps({"run": args.run, "step": results.step, **results.document}))
    else:
        print("\n".join([*results.lines, *(f"  {path}" for path in results.files)]))
    append(args, results.step, results.values, results.out)


def append(args: argparse.Namespace, step: int, values: dict[str, float], out: Path) -> None:
    """Add a line to the metrics.jsonl of the run, or, where it has none, to one beside the results. Names say which images were
    measured, unless these are the default."""
    which = "_on_given" if args.data is not None else f"_on_{args.part}" if args.part is not None else ""
    run = Path(args.run)
    place = run if (run / "metrics.jsonl").exists() else out
    append_metrics(place, step, {f"evaluation_{name}{which}": value for name, value in values.items()})
    if (place / "report.html").exists():
        with warn_on_failure("report.html"):
            write_report(place)


# ---------------------------------------------------------------------------------------------- likelihood


def measure_bits(args: argparse.Namespace, defaults: argparse.Namespace, state: Any, device: torch.device) -> None:
    """Measure the likelihood of a run, in bits per dimension."""
    of_samples = {"samples_per_image", "condition_guidance"}
    of_samples |= {"sweep", "features", "inception_weights", "weights", "num_samples", "resize", "classifier", *SAMPLER_KEYS}
    refuse_options(args, defaults, of_samples - {"steps", "spacing"}, "is about samples, and --likelihood draws none")
    opened = open_trained(args.run, device)
    data, _, reference = open_images(args, opened.config, "held_out")
    steps = parse_steps(args.steps) if args.steps is not None else None
    means, out = measure_likelihood(setup_of(args, state, device), opened, data, steps=steps, spacing=args.spacing)
    if not state.is_main_process:
        return
    bits, prior, decoder = (means[key] for key in ("bits_per_dimension", "prior", "decoder"))
    num_steps = len(means["steps"])
    if args.json:
        print(json.dumps(means))
    else:
        print(
            f"{opened.path} (step {opened.step}) on {len(data)} {on_screen(reference)}, {num_steps} steps:\n"
            f"  {bits:.4f} +- {means['standard_error']:.4f} bits per dimension = prior {prior:.4f} + steps "
            f"{bits - prior - decoder:.4f} + decoder {decoder:.4f}"
        )
        if (out / "likelihood.png").exists():
            print(f"  {out}/likelihood.png")
    append(args, opened.step, {f"bits_per_dimension_of_{len(data)}_in_{num_steps}_steps": bits}, out)


if __name__ == "__main__":
    run_script(main)
