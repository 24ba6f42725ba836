#!/usr/bin/env python
"""Measure a run, or a folder of pictures, against real ones: distances, precision and recall, copies; or its likelihood.

python evaluate.py runs/wikiart256_ldm                            10,000 samples against the training pictures
python evaluate.py runs/landscape256_vae                          reconstructions of held-out pictures
python evaluate.py samples/mine --data datasets/mine --resize     pictures that are there already
python evaluate.py runs/wikiart256_ldm --sweep steps=10,20,50 guidance=1,2,4
python evaluate.py runs/digits_ddpm --likelihood --steps 100      bits per dimension
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
import argparse
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import torch

from src.config import UserError, config, parse_json, read_json, run_script, validate
from src.data import HeldOut, ImageSet, Sources, describe_data, open_data
from src.diffusion import TableSchedule, times
from src.evaluation.evaluation import (
    GIVEN,
    HELD_OUT,
    TRAINING,
    Evaluation,
    Report,
    evaluate_autoencoder,
    evaluate_folder,
    evaluate_run,
    parse_sweep,
    sweep,
)
from src.evaluation.likelihood import measure_likelihood
from src.metrics.features import NAMES, Features, open_features
from src.report.report import write_report
from src.runs.classifier import open_classifier
from src.runs.opened import open_trained
from src.runtime.failures import warn_on_failure
from src.runtime.launch import start_sampling
from src.runtime.memory import explain_out_of_memory
from src.runtime.processes import ranks_of
from src.sampling import build_sampler
from src.sampling.arguments import add_arguments, parse_steps, sampler_config
from src.sampling.config import SAMPLER_KEYS
from src.training.run import append_metrics, check_ranks


@config
class Data:
    """What is measured on."""

    data: Sources
    held_out: HeldOut = 0.0


def arguments() -> tuple[argparse.Namespace, argparse.Namespace]:
    """What was asked, and what is not asked."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="a run, a checkpoint, a final folder, an export; or a folder of pictures")
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
    told = "of the run's pictures (default train; for a likelihood and an autoencoder held_out, where there are)"
    parser.add_argument("--part", choices=("held_out", "train"), help=told)
    parser.add_argument("--data", metavar="FOLDER", help="other pictures: a folder, or a source as in a config, as JSON")
    parser.add_argument("--num-images", type=int, metavar="N", help="of those, the N whose names hash lowest (default all)")
    parser.add_argument("--resize", action="store_true", help="of a folder: cut the pictures of --data to the samples' size")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", help="folder for the figures (default evaluations/RUN/...)")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--json", action="store_true", help="the figures for another program, on standard output")
    add_arguments(parser)
    parser.set_defaults(steps=None)
    return parser.parse_args(), parser.parse_args(["RUN"])


class Chosen(NamedTuple):
    """Pictures to measure on; where they are what was trained on, those held out; and, in words, what they are."""

    pictures: ImageSet
    held_out: ImageSet | None
    told: str


def open_pictures(args: argparse.Namespace, settings: dict[str, Any], part: str) -> Chosen:
    """The pictures that are meant, the run's own or others, by default those of `part`; the same on all ranks."""
    found = _open_pictures(args, settings, part)
    check_ranks(describe_data(found.pictures, found.held_out))
    return found


def _open_pictures(args: argparse.Namespace, settings: dict[str, Any], part: str) -> Chosen:
    def few(pictures: ImageSet) -> ImageSet:
        return pictures.lowest(args.num_images) if args.num_images is not None else pictures

    if args.data is not None and args.part is not None:
        raise UserError("--part is of the run's own pictures and --data are others; leave one out")
    if args.data is not None:
        source = parse_json(args.data) if args.data[:1] in ("{", "[") else {"source": "folder", "path": args.data}
        return Chosen(few(open_data(validate(Data, {"data": source}, origin="--data").data, 0.0)[0]), None, GIVEN)
    if "data" not in settings:
        raise UserError(f"{args.run} names no pictures to measure it on: give --data FOLDER")
    spec = validate(Data, {key: settings[key] for key in ("data", "held_out") if key in settings}, origin=args.run)
    train_set, held_out = open_data(spec.data, spec.held_out)
    if args.part == "held_out" and held_out is None:
        raise UserError(f"{args.run} held nothing out; give --part train, or --data FOLDER")
    chosen = held_out if (args.part or part) == "held_out" and held_out is not None else train_set
    if chosen is train_set:
        return Chosen(few(chosen), held_out, TRAINING)
    return Chosen(few(chosen), None, HELD_OUT)


def main() -> None:
    args, defaults = arguments()
    counts = (args.batch_size, args.num_samples, args.num_images if args.num_images is not None else 1)
    if min(counts) < 1 or not 0 <= args.seed < 2**64:
        raise UserError("--batch-size, --num-samples and --num-images must be at least 1, --seed from 0 to 2^64 - 1")
    state, device = start_sampling(args.device)
    with explain_out_of_memory(args.batch_size, args.batch_size, key="--batch-size"):
        if args.likelihood:
            likelihood(args, defaults, state, device)
        else:
            quality(args, defaults, state, device)


# ---------------------------------------------------------------------------------------------- how good the pictures are


def quality(args: argparse.Namespace, defaults: argparse.Namespace, state: Any, device: torch.device) -> None:
    """What is measured depends on what `run` is: pictures, an autoencoder, or what draws."""
    place = Path(args.run)
    made = place.is_dir() and not any((place / name).exists() for name in ("config.json", "checkpoints", "final"))
    known = [path for path in (place / "config.json", place / "final" / "config.json") if path.exists()]
    settings = read_json(known[0]) if known else {}
    if any(place.glob("step_*/MANIFEST.json")):
        raise UserError(f"{place} holds the checkpoints of {place.parent}: give that, or one of them")
    idle = given(args, defaults, "sweep", "num_samples", "seed", "classifier", *SAMPLER_KEYS)
    if idle and (made or "stages" in settings):
        raise UserError(f"{idle[0]} is about drawing samples, and {args.run} draws none: leave it out")
    if args.resize and not made:
        raise UserError("--resize is for a folder of pictures: a run says itself how large they are")
    opened = None if made or "stages" in settings else open_trained(args.run, device)
    networks = open_networks(args)
    it = Evaluation(
        [network.to(device) for network in networks], Path(args.out) if args.out else None, ranks_of(state), device,
        batch_size=args.batch_size, seed=args.seed,
    )  # fmt: skip
    if made:
        report = evaluate_folder(it, place, open_pictures(args, {}, "train").pictures, resize=args.resize)
    elif opened is None:
        data, _, told = open_pictures(args, settings, "held_out")
        report = evaluate_autoencoder(it, args.run, settings, data, told)
    else:
        data, held_out, told = open_pictures(args, opened.config, "train")
        args.steps = "50" if args.steps is None else args.steps
        classifier = open_classifier(args.classifier, device) if args.classifier is not None else None
        if args.sweep is not None:
            settings = parse_sweep(sampler_config(args), args.sweep)
            report = sweep(it, opened, data, settings, count=args.num_samples, classifier=classifier, told=told)
        else:
            how = build_sampler(opened, sampler_config(args), classifier)
            report = evaluate_run(it, opened, how, data, held_out, count=args.num_samples, told=told)
    if state.is_main_process:
        show(report, args)


def given(args: argparse.Namespace, defaults: argparse.Namespace, *names: str) -> list[str]:
    """Which of these options were given."""
    return [f"--{name.replace('_', '-')}" for name in names if getattr(args, name) != getattr(defaults, name)]


def open_networks(args: argparse.Namespace) -> list[Features]:
    """Those of --features, each with the file that is meant for it."""
    named = list(dict.fromkeys(args.features or ["inception"]))
    own = [name for name in named if name == "dinov2" or name.startswith("timm:")]
    if args.weights is not None and len(own) != 1:
        raise UserError("--weights is the file of one network, dinov2 or timm:NAME: give it with --features of that alone")
    if args.inception_weights is not None and "inception" not in named:
        raise UserError("--inception-weights belongs to --features inception")
    files = {"inception": args.inception_weights, **dict.fromkeys(own, args.weights)}
    return [open_features(name, files.get(name)) for name in named]


def show(report: Report, args: argparse.Namespace) -> None:
    """One table on the screen, and a line of metrics.jsonl."""
    if args.json:
        print(json.dumps({"run": args.run, "step": report.step, **report.figures}))
    else:
        print("\n".join([*report.lines, *(f"  {path}" for path in report.files)]))
    append(args, report.step, report.values, report.out)


def append(args: argparse.Namespace, step: int, values: dict[str, float], out: Path) -> None:
    """A line of metrics.jsonl, the run's own, or, where it has none, one beside the figures; other pictures than those by
    default are a part of the names."""
    which = "_on_given" if args.data is not None else f"_on_{args.part}" if args.part is not None else ""
    run = Path(args.run)
    place = run if (run / "metrics.jsonl").exists() else out
    append_metrics(place, step, {f"evaluation_{name}{which}": value for name, value in values.items()})
    if (place / "report.html").exists():
        with warn_on_failure("report.html"):
            write_report(place)


# ---------------------------------------------------------------------------------------------- likelihood


def likelihood(args: argparse.Namespace, defaults: argparse.Namespace, state: Any, device: torch.device) -> None:
    other = (key for key in SAMPLER_KEYS if key not in ("steps", "spacing"))
    idle = given(
        args, defaults, "sweep", "features", "inception_weights", "weights", "num_samples", "resize", "classifier", *other
    )
    if idle:
        raise UserError(f"--likelihood draws nothing: leave {idle[0]} out")
    opened = open_trained(args.run, device)
    data, _, told = open_pictures(args, opened.config, "held_out")
    schedule = opened.process.schedule
    if not isinstance(schedule, TableSchedule):
        raise UserError(f"{args.run} is on the blend: it has no chain of steps, so no bits per dimension")
    steps = parse_steps(args.steps) if args.steps is not None else schedule.num_steps
    chain = times(schedule, steps, args.spacing)
    request = json.dumps([opened.digest, data.fingerprint, data.state, chain.tolist(), args.batch_size, args.seed])
    out = Path(args.out or f"evaluations/{opened.folder}/likelihood_{hashlib.sha256(request.encode()).hexdigest()[:8]}")
    found = measure_likelihood(opened, data, chain, out, batch_size=args.batch_size, seed=args.seed, ranks=ranks_of(state))
    if not state.is_main_process:
        return None
    name = f"bits_per_dimension_of_{len(data)}_in_{len(chain) - 1}_steps"
    if args.json:
        print(json.dumps(found))
        return append(args, opened.step, {name: found["bits_per_dimension"]}, out)
    between = found["bits_per_dimension"] - found["prior"] - found["decoder"]
    print(
        f"{opened.path} (step {opened.step}) on {len(data)} {told}, {len(chain) - 1} steps:\n"
        f"  {found['bits_per_dimension']:.4f} +- {found['standard_error']:.4f} bits per dimension = prior "
        f"{found['prior']:.4f} + steps {between:.4f} + decoder {found['decoder']:.4f}"
    )
    if (out / "likelihood.png").exists():
        print(f"  {out}/likelihood.png")
    return append(args, opened.step, {name: found["bits_per_dimension"]}, out)


if __name__ == "__main__":
    run_script(main)
