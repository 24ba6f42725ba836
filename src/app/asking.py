"""What a visitor asks for, in the words of the scripts: the page draws what `python sample.py ...` draws with them."""

import argparse
import dataclasses
import shlex
from collections.abc import Sequence
from typing import Any

from ..config import UserError
from ..data.names import parse_classes
from ..sampling.config import SamplerConfig, sampler_words

MOST_IMAGES = 64  # of one job


@dataclasses.dataclass(frozen=True, kw_only=True)
class DrawRequest:
    """The arguments of sample.py that the page knows, with the defaults that they have there. `run` is a path as the script
    takes it, `spec` the sampler."""

    run: str
    spec: SamplerConfig = dataclasses.field(default_factory=SamplerConfig)
    num_samples: int | None = None
    batch_size: int = 16
    classes: str | None = None
    size: str | None = None
    seed: int = 0
    frames: bool = False
    image: str | None = None
    start_at: int = 0
    mask: str | None = None
    resamplings: int = 1
    condition: str | None = None
    then: str | None = None
    condition_guidance: float = 1.0
    condition_noise: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.seed < 2**64:
            raise UserError("the seed goes from 0 to 2^64 - 1")
        if (self.num_samples is not None and self.num_samples < 1) or self.resamplings < 1:
            raise UserError("the number of images and of resamplings is at least 1")

    @property
    def arguments(self) -> argparse.Namespace:
        """As sample.py reads them, without those of the sampler."""
        others = {"low": None, "truth": None, "source": None, "classifier": None}
        return argparse.Namespace(**{key.name: getattr(self, key.name) for key in dataclasses.fields(self)}, **others)

    @property
    def words(self) -> list[str]:
        """The arguments of `python sample.py`: number, batch size, seed and sampler always, the others where they are not the
        default."""
        words = [self.run]
        for key in dataclasses.fields(self):
            value, option = getattr(self, key.name), f"--{key.name.replace('_', '-')}"
            if key.name in ("run", "spec") or (value == key.default and key.name not in ("seed", "batch_size")):
                continue
            words += [option] if value is True else [option, str(value)]
        return [*words, *sampler_words(self.spec)]

    def command(self, device: str | None = None) -> str:
        """The whole command, as a shell takes it. `device` is named where it is not the best that there is."""
        return command_line("sample.py", [*self.words, *(["--device", device] if device is not None else [])])


def command_line(script: str, words: Sequence[str]) -> str:
    """A command as a shell takes it."""
    return shlex.join(["python", script, *words])


def parse_shares(text: str | None, count: int) -> list[int]:
    """`2/1` as whole numbers, one for each of `count` classes; all 1 of an empty text. A UserError for other text."""
    if not text or not text.strip():
        return [1] * count
    words = text.strip().split("/")
    if len(words) != count or not all(word.strip().isdecimal() and 1 <= int(word) <= 100 for word in words):
        example = "/".join(["2", *["1"] * (count - 1)])
        raise UserError(
            f"shares {text.strip()}: give a number from 1 to 100 for each of the {count} classes, such as {example}"
        )
    return [int(word) for word in words]


def join_classes(chosen: Sequence[str], class_names: Sequence[str], shares: str | None = None) -> str | None:
    """The argument --classes of the chosen names: each as often as its share says, so that blocks of images are as large as the
    shares; None of none. Where names could mean two things, their numbers stand there."""
    if not chosen:
        return None
    wanted = [name for name, share in zip(chosen, parse_shares(shares, len(chosen)), strict=True) for _ in range(share)]
    unknown = [name for name in wanted if name not in class_names]
    if unknown:
        raise UserError(f"this run does not know the class {unknown[0]}; choose among those of the run")
    numbers = [list(class_names).index(name) for name in wanted]
    text = "/".join(name.replace("/", "\\/") for name in wanted)
    try:
        if parse_classes(text, class_names) == numbers:
            return text
    except UserError:
        pass
    return "/".join(map(str, numbers))


def divisible(count: int, classes: str | None, class_names: Sequence[str]) -> int:
    """The least number of images from `count` on that can be dealt to the classes in equal blocks; a UserError where that is
    more than one job may draw."""
    blocks = len(parse_classes(classes, class_names)) if classes is not None else 1
    if (number := -(-count // blocks) * blocks) > MOST_IMAGES:
        raise UserError(f"shares of {blocks} in all need {number} images, and {MOST_IMAGES} is the most: give smaller shares")
    return number


def whole(value: Any, name: str, low: int, high: int) -> int:
    """A number of a field of the page as a whole number; a UserError where it is none, or outside."""
    if not isinstance(value, int | float) or not low <= value <= high or value != int(value):
        raise UserError(f"{name}: give a whole number from {low} to {high}")
    return int(value)
