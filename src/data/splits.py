"""Which names of folders are splits of a data set: train, val, test and their kin."""

import re
from collections.abc import Iterable

from .names import normal_form

_WORDS = {
    "train": ("train", "training", "trainval"),
    "val": ("val", "valid", "validation", "dev", "development", "eval", "evaluation"),
    "test": ("test", "testing"),
    "held out": ("holdout", "heldout"),
}
PLAIN = {word: plain for plain, words in _WORDS.items() for word in words}
_GLUED = re.compile(rf"^({'|'.join(sorted(PLAIN, key=len, reverse=True))})(data|dataset|set|split|images?|imgs?|[0-9]+k?)$")


def words_of(text: str) -> frozenset[str]:
    """The words of a text, as a set."""
    return frozenset(text.split())


# What may stand beside the word of a split in a folder's name, and says nothing about what is on the images.
FILLERS = words_of(
    "data dataset datasets set split subset part folder files image images img imgs picture pictures photo photos jpeg jpg png "
    "public private seg cls hr lr"
)


def _tokens(name: str) -> list[str]:
    """The words of a folder's name: `TrainingSet (1)` is training, set, 1."""
    parted = re.sub(r"(?<=[a-z])(?=[A-Z])", " ", normal_form(name))
    return [word for word in re.split(r"[\W_]+", parted.casefold()) if word]


def squeezed(name: str) -> str:
    """A folder's name in small letters, without what parts its words."""
    return "".join(_tokens(name))


def split_of(name: str) -> str | None:
    """train, val, test or held out, where a folder's name says that it is one: `train`, `Training Data`, `val2017`,
    `test_images`, `trainA`. A name that means something else beside that word (`train station`, `trains`) says nothing."""
    if squeezed(name) in PLAIN:  # `held-out`, too
        return PLAIN[squeezed(name)]
    if domain := re.fullmatch(r"(train|val|test)[ _-]?[AB]", name):
        return domain[1]
    words = [word for word in _tokens(name) if word not in FILLERS and not re.fullmatch(r"\d+(k|px)?", word)]
    if len(words) != 1:
        return None
    glued = _GLUED.match(words[0])
    return PLAIN.get(glued[1] if glued else words[0])


def splits_among(names: Iterable[str]) -> dict[str, str]:
    """{folder: train, val, test or held out} of those that are splits: by their own names, or because folders differ in that
    word alone, as `asl_alphabet_train` and `asl_alphabet_test` do."""
    names = list(names)
    found = {name: split for name in names if (split := split_of(name)) is not None}
    others: dict[tuple[str, ...], dict[str, str]] = {}
    for name in names:
        tokens = _tokens(name)
        where = [i for i, word in enumerate(tokens) if word in PLAIN]
        if len(where) == 1 and len(tokens) > 1:
            rest = (*tokens[: where[0]], "*", *tokens[where[0] + 1 :])
            others.setdefault(rest, {})[name] = PLAIN[tokens[where[0]]]
    for alike in others.values():
        if len(set(alike.values())) > 1:
            found |= alike
    return {name: found[name] for name in names if name in found}
