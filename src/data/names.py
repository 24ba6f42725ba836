"""Names of classes and of files: which are the same, in which order they stand, how they are printed, and as file names."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence

from ..config import UserError

NO_LABEL = ("", "nan", "<na>")  # what is left of a missing label once it is text
_PARTS = re.compile(r"(?i)(part|fold|batch|chunk|shard|split|subset|volume|vol|images?|imgs?|data)[ _.-]*\d+")
_JOINERS = "\u200c\u200d"  # part of words and of emoji, and not to be seen


def normal_form(name: str) -> str:
    """A name as it is compared: macOS writes `é` as two characters, other systems as one."""
    return unicodedata.normalize("NFC", name)


def same_names(ours: Sequence[str], theirs: Sequence[str]) -> bool:
    """Whether two lists hold the same names in the same order."""
    return [normal_form(name) for name in ours] == [normal_form(name) for name in theirs]


def find_spelling(names: Iterable[str], wanted: str) -> str | None:
    """The name among these that looks as `wanted` does, as it is spelled there, or None."""
    names = list(names)
    return wanted if wanted in names else next((name for name in names if normal_form(name) == normal_form(wanted)), None)


def class_sort_key(name: str) -> tuple[int, str, str]:
    """The place of a class in the order of classes: numbers by their value, then the other names. No two names that differ
    have the same place, so the order of names is the same in every process."""
    number = name.isdecimal() and len(name) <= 1000  # int() refuses longer ones
    return (int(name), "", name) if number else (1 << 62, name, name)


def sorted_classes(names: Iterable[str]) -> tuple[str, ...]:
    """The classes of these names, each once, in their order: of names with the same normal form the first is taken."""
    by_form: dict[str, str] = {}
    for name in names:
        by_form.setdefault(normal_form(name), name)
    return tuple(sorted(by_form.values(), key=class_sort_key))


def class_of(label: object) -> str | None:
    """The class that a cell of a table means, or None where it means none: None, NaN of any library, nothing but spaces."""
    text = "" if label is None else str(label)
    return None if text.strip().casefold() in NO_LABEL else text


def printable(name: str) -> str:
    """A name as it can be printed on one line: line breaks, bytes that are no text and the like are escaped."""
    return "".join(
        c if c.isprintable() or c in _JOINERS else c.encode("unicode_escape", "surrogatepass").decode("ascii") for c in name
    )


def join_names(names: Sequence[str], most: int = 5) -> str:
    """The first names of a list, and how many more there are, on one line."""
    rest = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(map(printable, names[:most])) + rest


def file_stems(names: Sequence[str]) -> list[str]:
    """A part of a file name for each class: its letters and digits, cut where it is long; no two are the same."""
    safe = ["".join(c if c.isalnum() or c in "-_." else "_" for c in name) for name in names]
    cut = [name.encode()[:100].decode(errors="ignore") for name in safe]
    cut = [short if short == name else f"{short}_{i}" for i, (name, short) in enumerate(zip(safe, cut, strict=True))]
    return cut if len(set(cut)) == len(cut) else [f"{i}_{name}" for i, name in enumerate(cut)]


def sorted_by_count(counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """(name, count) of each, the most frequent first."""
    return sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))


def class_remarks(class_names: Sequence[str], images: int) -> list[str]:
    """What is odd about the classes of a class-conditional run before it is trained: one remark at most."""
    count, without = len(class_names), "--set class_conditional=false"
    if count == 1:
        return [
            f"all images with a class have the same one, {printable(class_names[0])!r}: there is nothing to tell apart; is "
            f"that folder (or column) meant as a class? Without classes: {without}"
        ]
    if count and all(_PARTS.fullmatch(name) for name in class_names):
        return [
            f"the classes {join_names(class_names)} look like parts of one data set, and the network learns them as classes; "
            f"where they are parts: {without}"
        ]
    if images < 4 * count:
        return [
            f"there are {count} classes for {images} images, too few of each to learn: does the label column hold captions or "
            f"file names? Without classes: {without}"
        ]
    return []


def parse_classes(text: str, class_names: Sequence[str]) -> list[int]:
    """The numbers of the classes `A/B/C`, each by its name or its number. A name that has a slash in it may be given as it is,
    or with `\\/` for the slash; a UserError says which class is not known, and what may mean two things."""
    known = {normal_form(name): i for i, name in enumerate(class_names)}
    words = re.split(r"(?<!\\)/", normal_form(text))
    most = 1 + max((name.count("/") for name in known), default=0)

    def label_of(word: str, *, may_be_number: bool) -> int | None:
        label = known.get(word, known.get(word.replace("\\/", "/")))
        is_number = may_be_number and label is None and word.isdecimal() and word.isascii() and len(word) < 10
        return int(word) if is_number and int(word) < len(known) else label

    for may_be_number in (False, True):  # names go before numbers
        ways: list[list[list[int]]] = [[[]]]  # up to two ways to read the first words
        for end in range(1, len(words) + 1):
            lengths = [k for k in range(1, min(most, end) + 1) if ways[end - k]]
            labels = [(k, label_of("/".join(words[end - k : end]), may_be_number=may_be_number and k == 1)) for k in lengths]
            ways.append([[*way, label] for k, label in labels if label is not None for way in ways[end - k]][:2])
        if len(ways[-1]) == 1:
            return ways[-1][0]
        if len(ways[-1]) > 1:
            both = " or ".join("/".join(printable(class_names[i]).replace("/", "\\/") for i in way) for way in ways[-1])
            advice = f"write it as {both}, or give the classes' numbers"
            raise UserError(f"--classes {printable(text)} may mean two things; {advice}")
    unknown = next((word for word in words if label_of(word, may_be_number=True) is None), text)
    advice = f"ask for one by its name or its number, 0 to {len(class_names) - 1}"
    raise UserError(f"class {printable(unknown)!r} is not known; the classes are: {join_names(class_names, 40)}; {advice}")
