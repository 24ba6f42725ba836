"""Where in a folder the images are: splits, annotations and classes are told apart, and what is left aside is noted."""

import re
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from ..config import UserError
from .folders import ending_of, entries, holds_images, identity, is_image, is_unreadable_image, walk
from .names import join_names, normal_form, printable
from .splits import FILLERS, PLAIN, split_of, splits_among, tokens, words_joined, words_of

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


def _has_word(name: str, words: frozenset[str]) -> bool:
    """Whether a folder's name is one of these words, or has one in it: `CelebA-HQ-img`, `images1024x1024`."""
    return words_joined(name) in words or any(re.sub(r"\d.*$", "", word) in words for word in tokens(name))


def _is_annotation(name: str) -> bool:
    return _has_word(name, _ANNOTATIONS)


@dataclass
class Layout:
    """Where the images are: below `root`, whose subfolders are the classes. The images' names are their paths from
    `named_from`, so that who is held out does not depend on what else the folder holds.

    `inner` is {class: its subfolder} where each class holds the splits. `masks` are (class, its subfolder) that are left
    aside. `passed` are the folders beside the way to `root`, `unreadable` the images there that cannot be read here, `others`
    the number of other files by their endings, and `notes` remarks for the person.
    """

    root: Path
    named_from: Path
    inner: dict[str, str] = field(default_factory=dict)
    masks: set[tuple[str, str]] = field(default_factory=set)
    passed: list[str] = field(default_factory=list)
    unreadable: list[Path] = field(default_factory=list)
    others: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)


class _FolderReader:
    """What is in the folders on the way to the images. Each folder is read once."""

    def __init__(self) -> None:
        self._contents: dict[Path, tuple[list[str], list[str]]] = {}
        self._image_folders: dict[Path, list[str]] = {}

    def _read(self, folder: Path) -> tuple[list[str], list[str]]:
        if folder not in self._contents:
            names = sorted((entry.name, is_folder) for entry, is_folder in entries(folder))
            subfolders, files = ([name for name, is_folder in names if is_folder is kind] for kind in (True, False))
            self._contents[folder] = subfolders, files
        return self._contents[folder]

    def subfolders(self, folder: Path) -> list[str]:
        return self._read(folder)[0]

    def files(self, folder: Path) -> list[str]:
        return self._read(folder)[1]

    def has_images(self, folder: Path) -> bool:
        """Whether images lie in the folder itself."""
        return any(map(is_image, self.files(folder)))

    def image_folders(self, folder: Path) -> list[str]:
        """The subfolders with images that can be read here, or, where there are none, with other ones. Links to others of them
        do not count."""
        if folder not in self._image_folders:
            links = {name for name in self.subfolders(folder) if (folder / name).is_symlink()}
            places = {identity(folder / name) for name in self.subfolders(folder) if name not in links} if links else set()
            below = [name for name in self.subfolders(folder) if name not in links or identity(folder / name) not in places]
            names = [name for name in below if holds_images(folder / name)]
            if not names and not self.has_images(folder):
                names = [name for name in below if holds_images(folder / name, also_unreadable=True)]
            self._image_folders[folder] = names
        return self._image_folders[folder]

    def is_deep(self, folder: Path) -> bool:
        """Whether one of the first folders has folders of its own: for that, not all of a thousand flat classes are read."""
        return any(self.subfolders(folder / name) for name in self.image_folders(folder)[:16])

    def splits_in(self, folder: Path, *, is_inside_split: bool) -> list[str]:
        """Which of the subfolders with images are splits, and not a class that has the name of one: a bus, a car, a train.
        Inside a split that was chosen, one such name is a class."""
        names = self.image_folders(folder)
        splits = splits_among(names)
        others = [name for name in names if name not in splits]
        if len(splits) != 1 or not others:
            return list(splits)
        name = next(iter(splits))
        says_split = normal_form(name).casefold() not in PLAIN  # `Training Data` is no class; `train` may be one
        no_classes_beside = all(
            words_joined(other) in _NO_CLASSES | _ANNOTATIONS | _IMAGE_FOLDERS | FILLERS for other in others
        )
        is_deep = len(others) == 1 and bool(self.image_folders(folder / name)) and not self.has_images(folder / name)
        return [name] if says_split or no_classes_beside or (is_deep and not is_inside_split) else []

    def splits_of_classes(self, folder: Path) -> dict[str, list[str]]:
        """{class: its splits} where the classes are the outer folders, and each holds nothing but splits of its own."""
        names = self.image_folders(folder)
        if len(names) < 2 or not self.is_deep(folder):
            return {}
        splits_of_class: dict[str, list[str]] = {}
        for name in names:
            below = self.image_folders(folder / name)
            splits = list(splits_among(below))
            if not splits and not below:
                continue  # a class that was not split, beside others that were
            if not splits or self.has_images(folder / name) or not all(map(_is_annotation, {*below} - {*splits})):
                return {}
            splits_of_class[name] = splits
        return splits_of_class if any(len(splits) > 1 for splits in splits_of_class.values()) else {}

    def next_folder(self, folder: Path) -> str | None:
        """The subfolder in which to go on: the only one with images, or the one beside annotations (masks, labels)."""
        names = self.image_folders(folder)
        if self.has_images(folder):
            return None
        if len(names) == 1:
            leads_back = folder.resolve().is_relative_to((folder / names[0]).resolve())  # a link to a folder above
            return names[0] if not leads_back else None
        return _folder_beside_annotations(names)

    def masks_of_classes(self, folder: Path) -> set[tuple[str, str]]:
        """(class, subfolder) of the masks where a class holds its images in one folder and masks of them in another."""
        masks = set[tuple[str, str]]()
        if len(self.image_folders(folder)) < 2 or not self.is_deep(folder):
            return masks
        for name in self.image_folders(folder):
            below = self.image_folders(folder / name)
            if not self.has_images(folder / name) and (images := _folder_beside_annotations(below)) is not None:
                masks |= {(name, other) for other in below if other != images}
        return masks

    def innermost(self, folder: Path) -> Path:
        """The folder in a folder in a folder, where there is nothing beside them."""
        while not self.has_images(folder) and len(below := self.subfolders(folder)) == 1:
            folder = folder / below[0]
        return folder


def find_layout(path: Path, split: str | None, where: str) -> Layout:
    """Where the images of the folder `path` are. A subfolder that alone holds images is entered. UserErrors name the splits of
    which one has to be chosen, or say that there is none of the name `split`; with the split "." none is looked for."""
    reader, layout = _FolderReader(), Layout(root=path, named_from=path)
    no_splits = split == "."
    if split is not None and not no_splits:
        parts = PurePath(split).parts  # `images/train` says both
        if not parts or PurePath(split).is_absolute() or ".." in parts:
            raise UserError(f"{where}: data.split {split!r} is not the name of one of its subfolders")
        _enter_split(reader, layout, parts, where)
    while not layout.inner:
        folder, names = layout.root, reader.image_folders(layout.root)
        splits = reader.splits_in(folder, is_inside_split=split is not None) if not no_splits else []
        if splits and not (split is not None and len(names) == 1):
            raise UserError(f"{where} holds the splits {join_names(splits, 10)}; {_split_advice(splits, split)}")
        annotated = not reader.has_images(folder) and _folder_beside_annotations(names) is not None
        if not splits and not no_splits and not annotated and (inner := reader.splits_of_classes(folder)):
            all_splits = list(dict.fromkeys(name for class_splits in inner.values() for name in class_splits))
            raise UserError(
                f"{where} holds classes, and each of them the splits {join_names(all_splits, 10)}; "
                f"{_split_advice(all_splits, split)}"
            )
        if (subfolder := reader.next_folder(folder)) is None:
            maybe_splits = [] if splits or no_splits else splits_among(names)
            printed = map(printable, maybe_splits)
            layout.notes += [f"{name!r} is read as a class; if it is a split, set data.split" for name in printed]
            layout.masks = set() if no_splits else reader.masks_of_classes(folder)
            break
        _enter(reader, layout, subfolder)
    return layout


def _split_advice(splits: Sequence[str], folder: str | None) -> str:
    """What to set where one of the splits has to be chosen."""
    training = next((name for name in splits if splits_among(splits).get(name) == "train"), splits[0])
    example = printable(shlex.quote("/".join([*([folder] if folder is not None else []), training])))
    return f'set data.split to the one to train on (of prepare_data.py: --split {example}), or to "." where they are classes'


def _enter_split(reader: _FolderReader, layout: Layout, parts: Sequence[str], where: str) -> None:
    """Go to the split with the names `parts`, further in where its folder is not at the top."""
    path, is_exact, split = layout.root, True, "/".join(parts)
    while _find_name(reader.subfolders(layout.root), parts[0], where) is None:
        folder = layout.root
        subfolder = reader.next_folder(folder)
        if subfolder is not None and subfolder not in splits_among(reader.image_folders(folder)):
            _enter(reader, layout, subfolder)
            continue
        if len(parts) == 1 and _find_name([path.name], split, where) is not None:  # data.path is that split already
            layout.root, layout.named_from = path, reader.innermost(path)
            return
        inner = {name: _find_name(names, parts[0], where) for name, names in reader.splits_of_classes(folder).items()}
        if any(inner.values()):
            layout.inner = {name: chosen for name, chosen in inner.items() if chosen is not None}
            if without := [name for name in reader.image_folders(folder) if name not in layout.inner]:
                layout.notes.append(
                    f"the classes {join_names(without, 10)} hold no split {printable(parts[0])!r} and are left aside"
                )
            return
        raise _no_split_error(reader, folder, split, where)
    for part in parts:
        name = _find_name(reader.subfolders(layout.root), part, where)
        if name is None:
            raise _no_split_error(reader, layout.root, split, where)
        is_exact &= name == part
        layout.root = layout.root / name
    same_name = path.joinpath(*parts)
    if not is_exact:
        layout.named_from = layout.root
    else:
        layout.named_from = same_name if same_name.is_dir() else reader.innermost(layout.root)


def _no_split_error(reader: _FolderReader, folder: Path, split: str, where: str) -> UserError:
    names = join_names(reader.subfolders(folder), 10) or "none"
    return UserError(f"{where} has no split {split!r}; its subfolders: {names}")


def _find_name(names: Sequence[str], wanted: str, where: str) -> str | None:
    """The folder that `wanted` means: by its name as it stands, in other letters, or by the plain word of a split."""
    forms: tuple[Callable[[str], str], ...] = (str, normal_form, lambda name: normal_form(name).casefold())
    for form in forms:
        alike = [name for name in names if form(name) == form(wanted)]
        if len(alike) == 1:
            return alike[0]
    if words_joined(wanted) not in PLAIN:
        return None
    alike = [name for name, split in splits_among(names).items() if split == split_of(wanted)]
    if len(alike) > 1:
        choices = " or ".join(map(printable, alike))
        raise UserError(f"{where}: data.split {wanted!r} may mean {choices}; give that folder's own name")
    return alike[0] if alike else None


def _folder_beside_annotations(names: Sequence[str]) -> str | None:
    """The one folder of images where all others hold masks, labels and the like."""
    images = [name for name in names if _has_word(name, _IMAGE_FOLDERS) and not _is_annotation(name)]
    others = [name for name in names if name not in images]
    if len(images) == 1 and others and all(map(_is_annotation, others)):
        return images[0]
    classes = [name for name in names if words_joined(name) not in _NEVER_A_CLASS]
    return classes[0] if len(classes) == 1 and len(names) > 1 and not images else None


def _enter(reader: _FolderReader, layout: Layout, subfolder: str) -> None:
    """Go into a subfolder, and note what stands beside it."""
    folder, beside = layout.root, [name for name in reader.subfolders(layout.root) if name != subfolder]
    layout.passed += beside
    for name in reader.files(folder):
        if is_unreadable_image(name):
            layout.unreadable.append(folder / name)
        else:
            layout.others[ending_of(name)] += 1
    for name in beside:
        layout.unreadable += [(folder / name).joinpath(*parts) for parts in walk(folder / name).unreadable]
    layout.root = folder / subfolder
