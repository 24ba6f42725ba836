"""Where in a folder the images are: splits, annotations and classes are told apart, and what is left aside is said."""

import errno
import os
import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ..config import UserError
from . import formats
from .names import few, normal_form, shown
from .splits import FILLERS, PLAIN, split_of, splits_among, squeezed, tokens, words_of

_IMAGE_FOLDERS = words_of("images image imgs img jpegimages pictures photos jpg jpeg jpgs rgb")
_ANNOTATIONS = words_of(
    "annotations annotation labels label masks mask captions caption gt groundtruth trimaps trimap segmentation segmentations "
    "segmentationclass segmentationobject segments bboxes boundingboxes keypoints landmarks imagesets anno annos "
    "thumbnails thumbs depth normals edges"
)
_NEVER_A_CLASS = words_of(
    "annotations annotation segmentations trimaps groundtruth bboxes boundingboxes imagesets annos thumbnails"
)
_NO_CLASSES = words_of("extra extras unlabeled unlabelled additional others sample samples")
_NOWHERE = (errno.ENOENT, errno.ELOOP, errno.ENOTDIR, errno.ENAMETOOLONG)  # of a link


# ---------------------------------------------------------------------------------------------- reading folders


def _has_word(name: str, words: frozenset[str]) -> bool:
    """Whether a folder's name is one of these words, or has one in it: `CelebA-HQ-img`, `images1024x1024`."""
    return squeezed(name) in words or any(re.sub(r"\d.*$", "", word) in words for word in tokens(name))


def _is_annotation(name: str) -> bool:
    return _has_word(name, _ANNOTATIONS)


def _holds_plain_images(name: str) -> bool:
    return _has_word(name, _IMAGE_FOLDERS) and not _is_annotation(name)


def _hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _is_image(name: str) -> bool:
    return os.path.splitext(name)[1].lower() in formats.endings()


def _is_folder(entry: os.DirEntry[str]) -> bool | None:
    """None of a link that leads nowhere."""
    try:
        return entry.is_dir() if not entry.is_symlink() or os.path.exists(entry.path) else None
    except OSError as error:
        if error.errno in _NOWHERE:
            return None
        raise


def _entries(folder: Path | str) -> list[tuple[os.DirEntry[str], bool]]:
    """(entry, whether it is a folder) of what is in a folder, in the order of the names; hidden ones left out."""
    with os.scandir(folder) as entries:
        found = [(entry, _is_folder(entry)) for entry in entries if not _hidden(entry.name)]
    return sorted(((entry, kind) for entry, kind in found if kind is not None), key=lambda pair: pair[0].name)


def holds_images(folder: Path, *, also_foreign: bool = False) -> bool:
    """Whether there are images in a folder, at any depth (`also_foreign`: those that cannot be read here, too)."""
    waiting, visited = [str(folder)], set[tuple[int, int]]()
    while waiting:
        place = waiting.pop()
        state = os.stat(place)
        if (state.st_dev, state.st_ino) in visited:
            continue
        visited.add((state.st_dev, state.st_ino))
        with os.scandir(place) as entries:  # in no order, so that one image is enough
            for entry in entries:
                if _hidden(entry.name):
                    continue
                ending = os.path.splitext(entry.name)[1].lower()
                if _is_folder(entry):
                    waiting.append(entry.path)
                elif _is_folder(entry) is not None and (
                    ending in formats.endings() or (also_foreign and ending in formats.foreign())
                ):
                    return True
    return False


@dataclass
class Found:
    """The images below a folder: `parts` are the names from there down to each file, `files` the files themselves.

    `subfolders` are those of the first level. `foreign` are the parts of files that cannot be read here, `others` how many
    files of which ending are no images, and `links` the links to folders that are here already.
    """

    parts: list[tuple[str, ...]] = field(default_factory=list)
    files: list[os.DirEntry[str]] = field(default_factory=list)
    subfolders: list[str] = field(default_factory=list)
    foreign: list[tuple[str, ...]] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    links: list[str] = field(default_factory=list)


def walk(root: Path) -> Found:
    """All files below `root`, in the order of their names. A folder is visited once, under its own name before that of a
    link to it."""
    found, visited = Found(), set[tuple[int, int]]()
    state = root.stat()
    visited.add((state.st_dev, state.st_ino))
    above_root = {(state.st_dev, state.st_ino) for state in (folder.stat() for folder in root.resolve().parents)}
    folders: list[tuple[tuple[str, ...], str]] = [((), str(root))]
    links: list[tuple[tuple[str, ...], os.DirEntry[str]]] = []
    images: list[tuple[tuple[str, ...], os.DirEntry[str]]] = []
    while folders or links:
        if not folders:  # all that stands here under its own name was visited
            links.sort(key=lambda link: link[0])
            parts, entry = links.pop(0)
            state = entry.stat()
            back = images and (state.st_dev, state.st_ino) in above_root  # leads around to what is here
            if back or (state.st_dev, state.st_ino) in visited:
                found.links.append("/".join(parts))
                continue
            visited.add((state.st_dev, state.st_ino))
            folders.append((parts, entry.path))
        above, place = folders.pop()
        for entry, is_folder in _entries(place):
            parts = (*above, entry.name)
            if is_folder and entry.is_symlink():
                links.append((parts, entry))
            elif is_folder:
                if not above:
                    found.subfolders.append(entry.name)
                state = entry.stat()
                if (state.st_dev, state.st_ino) not in visited:
                    visited.add((state.st_dev, state.st_ino))
                    folders.append((parts, entry.path))
            else:
                ending = os.path.splitext(entry.name)[1].lower()
                if ending in formats.endings():
                    images.append((parts, entry))
                elif ending in formats.foreign():
                    found.foreign.append(parts)
                else:
                    found.others[ending] += 1
    images.sort(key=lambda image: image[0])
    found.foreign.sort()
    found.parts, found.files = [parts for parts, _ in images], [entry for _, entry in images]
    return found


# ---------------------------------------------------------------------------------------------- choosing


@dataclass
class Layout:
    """Where the images are: below `root`, whose subfolders are the classes. The images' names are their paths from
    `named_from`, so that who is held out does not depend on what else the folder holds.

    `inner` is {class: its subfolder} where each class holds the splits. `masks` are (class, its subfolder) that are left
    aside. `left` are folders that were passed on the way,
    `foreign` files there that cannot be read here, `others` the number of other files by their endings, `notes` what to know
    besides.
    """

    root: Path
    named_from: Path
    inner: dict[str, str] = field(default_factory=dict)
    masks: set[tuple[str, str]] = field(default_factory=set)
    left: list[str] = field(default_factory=list)
    foreign: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


def _without_links(folder: Path, below: Sequence[str]) -> list[str]:
    """The subfolders, less links to others of them."""
    links = [name for name in below if (folder / name).is_symlink()]
    if not links:
        return list(below)
    real = {(state.st_dev, state.st_ino) for state in ((folder / name).stat() for name in below if name not in links)}
    same = [name for name in links if ((state := (folder / name).stat()).st_dev, state.st_ino) in real]
    return [name for name in below if name not in same]


class _Look:
    """What is in the folders on the way, each read once."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[list[str], list[str]]] = {}
        self._holders: dict[Path, list[str]] = {}

    def _read(self, folder: Path) -> tuple[list[str], list[str]]:
        if folder not in self._known:
            entries = _entries(folder)
            below, files = ([entry.name for entry, is_folder in entries if is_folder is kind] for kind in (True, False))
            self._known[folder] = below, files
        return self._known[folder]

    def subfolders(self, folder: Path) -> list[str]:
        return self._read(folder)[0]

    def files(self, folder: Path) -> list[str]:
        return self._read(folder)[1]

    def has_images(self, folder: Path) -> bool:
        """Whether they lie in the folder itself."""
        return any(_is_image(name) for name in self.files(folder))

    def holders(self, folder: Path) -> list[str]:
        """The subfolders that hold images: those that can be read here, or, where there are none, others."""
        if folder not in self._holders:
            below = _without_links(folder, self.subfolders(folder))
            found = [name for name in below if holds_images(folder / name)]
            if not found and not self.has_images(folder):
                found = [name for name in below if holds_images(folder / name, also_foreign=True)]
            self._holders[folder] = found
        return self._holders[folder]


def find_layout(path: Path, split: str | None, where: str) -> Layout:
    """Where the images of the folder `path` are. A folder that alone holds images is gone into. UserErrors name the splits of
    which one has to be chosen, or say that there is none of the name `split`; with the split "." none is looked for."""
    look, layout = _Look(), Layout(root=path, named_from=path)
    plain = split == "."
    if split is not None and not plain:
        parts = PurePath(split).parts  # `images/train` says both
        if not parts or PurePath(split).is_absolute() or ".." in parts:
            raise UserError(f"{where}: data.split {split!r} is not the name of one of its subfolders")
        _seek(look, layout, parts, where)
    while not layout.inner:
        folder, holders = layout.root, look.holders(layout.root)
        splits = _splits_in(look, folder, holders, inside=split is not None) if not plain else []
        if splits and not (split is not None and len(holders) == 1):
            raise UserError(f"{where} holds the splits {few(splits, 10)}; {_ask(splits, split)}")
        annotated = not look.has_images(folder) and _beside_annotations(holders) is not None
        if not splits and not plain and not annotated and (inner := _inner_splits(look, folder, holders)):
            every = list(dict.fromkeys(name for names in inner.values() for name in names))
            raise UserError(f"{where} holds classes, and each of them the splits {few(every, 10)}; {_ask(every, split)}")
        if (inside := _goes_into(look, folder, holders)) is None:
            lone = [] if splits or plain else list(splits_among(holders))
            layout.notes += [f"{shown(name)!r} is read as a class; if it is a split, set data.split" for name in lone]
            layout.masks = set() if plain else _masks_of_classes(look, folder, holders)
            break
        _pass(look, layout, inside)
    return layout


def _ask(splits: Sequence[str], inside: str | None) -> str:
    training = next((name for name in splits if splits_among(splits).get(name) == "train"), splits[0])
    example = shown(shlex.quote("/".join([*([inside] if inside is not None else []), training])))
    return f'set data.split to the one to train on (of prepare_data.py: --split {example}), or to "." where they are classes'


def _seek(look: _Look, layout: Layout, parts: Sequence[str], where: str) -> None:
    """Go to the split of which `parts` are the names, further in where its folder is not at the top."""
    path, exact = layout.root, True
    while (found := _choose(look.subfolders(layout.root), parts[0], where)) is None:
        folder, holders = layout.root, look.holders(layout.root)
        inside = _goes_into(look, folder, holders)
        if inside is not None and inside not in splits_among(holders):
            _pass(look, layout, inside)
            continue
        if len(parts) == 1 and _choose([path.name], parts[0], where) is not None:  # data.path is that split already
            layout.root, layout.named_from = path, _alone(look, path)
            return
        inner = {name: _choose(splits, parts[0], where) for name, splits in _inner_splits(look, folder, holders).items()}
        if any(inner.values()):
            layout.inner = {name: chosen for name, chosen in inner.items() if chosen is not None}
            if without := [name for name in holders if name not in layout.inner]:
                layout.notes.append(f"the classes {few(without, 10)} hold no split {shown(parts[0])!r} and are left aside")
            return
        raise _no_split(look, folder, "/".join(parts), where)
    for part in parts:
        found = _choose(look.subfolders(layout.root), part, where)
        if found is None:
            raise _no_split(look, layout.root, "/".join(parts), where)
        exact &= found == part
        layout.root = layout.root / found
    beside = path.joinpath(*parts)
    if exact:
        layout.named_from = beside if beside.is_dir() else _alone(look, layout.root)
    else:
        layout.named_from = layout.root


def _no_split(look: _Look, folder: Path, split: str, where: str) -> UserError:
    return UserError(f"{where} has no split {split!r}; its subfolders: {few(look.subfolders(folder), 10) or 'none'}")


def _choose(names: Sequence[str], wanted: str, where: str) -> str | None:
    """The folder that `wanted` means: by its name as it stands, in other letters, or by the plain word of a split."""
    forms: tuple[Callable[[str], str], ...] = (str, normal_form, lambda name: normal_form(name).casefold())
    for form in forms:
        found = [name for name in names if form(name) == form(wanted)]
        if len(found) == 1:
            return found[0]
    if squeezed(wanted) not in PLAIN:
        return None
    found = [name for name, split in splits_among(names).items() if split == split_of(wanted)]
    if len(found) > 1:
        raise UserError(
            f"{where}: data.split {wanted!r} may mean {' or '.join(map(shown, found))}; give that folder's own name"
        )
    return found[0] if found else None


def _splits_in(look: _Look, folder: Path, holders: Sequence[str], *, inside: bool) -> list[str]:
    """Which of the subfolders that hold images are splits, and not a class that has the name of one: a bus, a car, a train.
    `inside` a split that was chosen, one such name is a class."""
    splits = splits_among(holders)
    others = [name for name in holders if name not in splits]
    if len(splits) != 1 or not others:
        return list(splits)
    name = next(iter(splits))
    telling = normal_form(name).casefold() not in PLAIN  # `Training Data` is no class; `train` may be one
    beside = all(squeezed(other) in _NO_CLASSES | _ANNOTATIONS | _IMAGE_FOLDERS | FILLERS for other in others)
    deep = len(others) == 1 and bool(look.holders(folder / name)) and not look.has_images(folder / name)
    return [name] if telling or beside or (deep and not inside) else []


def _is_deep(look: _Look, folder: Path, holders: Sequence[str]) -> bool:
    """Whether one of the first folders has folders of its own: not all of a thousand flat classes need to be read for that."""
    return any(look.subfolders(folder / name) for name in holders[:16])


def _inner_splits(look: _Look, folder: Path, holders: Sequence[str]) -> dict[str, list[str]]:
    """{class: its splits} where the classes are the outer folders, and each holds nothing but splits of its own."""
    if len(holders) < 2 or not _is_deep(look, folder, holders):
        return {}
    found: dict[str, list[str]] = {}
    for name in holders:
        below = look.holders(folder / name)
        splits = list(splits_among(below))
        if not splits and not below:
            continue  # a class that was not split, beside others that were
        if not splits or look.has_images(folder / name) or not all(map(_is_annotation, {*below} - {*splits})):
            return {}
        found[name] = splits
    return found if any(len(splits) > 1 for splits in found.values()) else {}


def _goes_into(look: _Look, folder: Path, holders: Sequence[str]) -> str | None:
    """The subfolder in which to go on: the only one with images, or the one of images beside annotations (masks, labels)."""
    if look.has_images(folder):
        return None
    if len(holders) == 1:
        back = folder.resolve().is_relative_to((folder / holders[0]).resolve())  # a link to where one comes from
        return holders[0] if not back else None
    return _beside_annotations(holders)


def _beside_annotations(holders: Sequence[str]) -> str | None:
    """The one folder of images where all others hold masks, labels and the like."""
    images = [name for name in holders if _holds_plain_images(name)]
    others = [name for name in holders if name not in images]
    if len(images) == 1 and others and all(map(_is_annotation, others)):
        return images[0]
    alone = [name for name in holders if squeezed(name) not in _NEVER_A_CLASS]
    return alone[0] if len(alone) == 1 and len(holders) > 1 and not images else None


def _masks_of_classes(look: _Look, folder: Path, holders: Sequence[str]) -> set[tuple[str, str]]:
    """(class, subfolder) of the masks where a class holds its images in one folder and masks of them in another."""
    if len(holders) < 2 or not _is_deep(look, folder, holders):
        return set()
    masks = set[tuple[str, str]]()
    for name in holders:
        below = look.holders(folder / name)
        if not look.has_images(folder / name) and (images := _beside_annotations(below)) is not None:
            masks |= {(name, other) for other in below if other != images}
    return masks


def _alone(look: _Look, folder: Path) -> Path:
    """The folder in a folder in a folder, where there is nothing beside."""
    while not look.has_images(folder) and len(below := look.subfolders(folder)) == 1:
        folder = folder / below[0]
    return folder


def _pass(look: _Look, layout: Layout, inside: str) -> None:
    """Go into a subfolder, and note what stands beside it."""
    folder, beside = layout.root, [name for name in look.subfolders(layout.root) if name != inside]
    layout.left += beside
    for name in look.files(folder):
        ending = os.path.splitext(name)[1].lower()
        if ending in formats.foreign():
            layout.foreign.append(folder / name)
        else:
            layout.others[ending] += 1
    for name in beside:
        layout.foreign += [(folder / name).joinpath(*parts) for parts in walk(folder / name).foreign]
    layout.root = folder / inside


def in_words(counts: Counter[str]) -> str:
    """Files by ending: `3 .json, 1 without an ending`."""
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    told = [f"{count} {shown(ending) or 'without an ending'}" for ending, count in ordered[:8]]
    more = sum(count for _, count in ordered[8:])
    return ", ".join([*told, *([f"{more} others"] if more else [])])
