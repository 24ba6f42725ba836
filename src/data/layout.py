"""Where in a folder the images are: splits, annotations and classes are told apart, and what is left aside is noted."""

import re
import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePath

from ..config import UserError
from .folders import FolderTree, ending_of, entries, holds_images, identity, is_image, is_unreadable_image, walk
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


class Folder:
    """A folder on the way to the images. What is in it is read once."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @cached_property
    def _names(self) -> list[tuple[str, bool]]:
        return sorted((entry.name, is_folder) for entry, is_folder in entries(self.path))

    @cached_property
    def subfolders(self) -> dict[str, "Folder"]:
        return {name: Folder(self.path / name) for name, is_folder in self._names if is_folder}

    @property
    def files(self) -> list[str]:
        return [name for name, is_folder in self._names if not is_folder]

    @cached_property
    def has_images(self) -> bool:
        """Whether images lie in the folder itself."""
        return any(map(is_image, self.files))

    @cached_property
    def image_folders(self) -> dict[str, "Folder"]:
        """The subfolders with images that can be read here, or, where there are none, with other ones. Links to others of them
        do not count."""
        links = {name for name, folder in self.subfolders.items() if folder.path.is_symlink()}
        places = {identity(folder.path) for name, folder in self.subfolders.items() if name not in links} if links else set()
        below = [(n, folder) for n, folder in self.subfolders.items() if n not in links or identity(folder.path) not in places]
        folders = {name: folder for name, folder in below if holds_images(folder.path)}
        if not folders and not self.has_images:
            folders = {name: folder for name, folder in below if holds_images(folder.path, also_unreadable=True)}
        return folders

    @property
    def is_deep(self) -> bool:
        """Whether there are several folders with images, and one of the first has folders of its own: for that, not all of a
        thousand flat classes are read."""
        folders = list(self.image_folders.values())
        return len(folders) > 1 and any(folder.subfolders for folder in folders[:16])

    def splits(self, *, is_inside_split: bool) -> list[str]:
        """Which of the subfolders with images are splits, and not a class that has the name of one: a bus, a car, a train.
        Inside a split that was chosen, one such name is a class."""
        splits = splits_among(self.image_folders)
        others = [name for name in self.image_folders if name not in splits]
        if len(splits) != 1 or not others:
            return list(splits)
        name = next(iter(splits))
        says_split = normal_form(name).casefold() not in PLAIN  # `Training Data` is no class; `train` may be one
        no_classes = _NO_CLASSES | _ANNOTATIONS | _IMAGE_FOLDERS | FILLERS
        folder = self.image_folders[name]
        is_deep = len(others) == 1 and bool(folder.image_folders) and not folder.has_images
        is_split = says_split or all(words_joined(other) in no_classes for other in others) or (is_deep and not is_inside_split)
        return [name] if is_split else []

    def splits_of_classes(self) -> dict[str, list[str]]:
        """{class: its splits} where the classes are the outer folders, and each holds nothing but splits of its own."""
        splits_of_class: dict[str, list[str]] = {}
        for name, folder in self.image_folders.items() if self.is_deep else ():
            below = folder.image_folders
            splits = list(splits_among(below))
            if not splits and not below:
                continue  # a class that was not split, beside others that were
            if not splits or folder.has_images or not all(map(_is_annotation, {*below} - {*splits})):
                return {}
            splits_of_class[name] = splits
        return splits_of_class if any(len(splits) > 1 for splits in splits_of_class.values()) else {}

    def next_folder(self) -> str | None:
        """The subfolder in which to go on: the only one with images, or the one beside annotations (masks, labels)."""
        if self.has_images:
            return None
        if len(self.image_folders) == 1:
            (name,) = self.image_folders
            leads_back = self.path.resolve().is_relative_to((self.path / name).resolve())  # a link to a folder above
            return name if not leads_back else None
        return _folder_beside_annotations(self.image_folders)

    def masks_of_classes(self) -> set[tuple[str, str]]:
        """(class, subfolder) of the masks where a class holds its images in one folder and masks of them in another."""
        masks = set[tuple[str, str]]()
        for name, folder in self.image_folders.items() if self.is_deep else ():
            images = None if folder.has_images else _folder_beside_annotations(folder.image_folders)
            masks |= {(name, other) for other in folder.image_folders if images not in (None, other)}
        return masks

    def innermost(self) -> Path:
        """The folder in a folder in a folder, where there is nothing beside them."""
        folder = self
        while not folder.has_images and len(folder.subfolders) == 1:
            (folder,) = folder.subfolders.values()
        return folder.path


@dataclass(kw_only=True)
class Layout(FolderTree):
    """Where the images are: all that is below `folder`, whose subfolders are the classes. The images' names are their paths
    from `named_from`, so that who is held out does not depend on what else the folder holds.

    `inner` is {class: its subfolder} where each class holds the splits. `masks` are (class, its subfolder) that are left
    aside. `passed` are the folders beside the way to `folder`: `unreadable` and `others` count what stands there, too. `notes`
    are remarks for the person.
    """

    folder: Folder
    named_from: Path
    inner: dict[str, str] = field(default_factory=dict)
    masks: set[tuple[str, str]] = field(default_factory=set)
    passed: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def enter(self, name: str) -> None:
        """Go into a subfolder, and note what stands beside it."""
        for file in self.folder.files:
            if is_unreadable_image(file):
                self.unreadable.append(self.folder.path / file)
            else:
                self.others[ending_of(file)] += 1
        for other, beside in self.folder.subfolders.items():
            if other != name:
                self.passed.append(other)
                self.unreadable += walk(beside.path).unreadable
        self.folder = self.folder.subfolders[name]


def find_layout(path: Path, split: str | None, where: str) -> Layout:
    """Where the images of the folder `path` are. A subfolder that alone holds images is entered. UserErrors name the splits of
    which one has to be chosen, or say that there is none of the name `split`; with the split "." none is looked for."""
    layout, no_splits = Layout(folder=Folder(path), named_from=path), split == "."
    if split is not None and not no_splits:
        parts = PurePath(split).parts  # `images/train` says both
        if not parts or PurePath(split).is_absolute() or ".." in parts:
            raise UserError(f"{where}: data.split {split!r} is not the name of one of its subfolders")
        _enter_split(layout, parts, where)
    while not layout.inner:
        folder, names = layout.folder, layout.folder.image_folders
        splits = folder.splits(is_inside_split=split is not None) if not no_splits else []
        if splits and not (split is not None and len(names) == 1):
            raise UserError(f"{where} holds the splits {_split_advice(splits, split)}")
        annotated = not folder.has_images and _folder_beside_annotations(names) is not None
        if not splits and not no_splits and not annotated and (inner := folder.splits_of_classes()):
            all_splits = list(dict.fromkeys(name for class_splits in inner.values() for name in class_splits))
            raise UserError(f"{where} holds classes, and each of them the splits {_split_advice(all_splits, split)}")
        subfolder = folder.next_folder()
        if subfolder is not None:
            layout.enter(subfolder)
            continue
        if not no_splits:
            printed = map(printable, () if splits else splits_among(names))
            layout.notes += [f"{name!r} is read as a class; if it is a split, set data.split" for name in printed]
            layout.masks = folder.masks_of_classes()
        break
    walk(layout.folder.path, layout)
    return layout


def _split_advice(splits: Sequence[str], folder: str | None) -> str:
    """The splits of which one has to be chosen, and what to set for that."""
    training = next((name for name in splits if splits_among(splits).get(name) == "train"), splits[0])
    example = printable(shlex.quote("/".join([*([folder] if folder is not None else []), training])))
    return (
        f"{join_names(splits, 10)}; set data.split to the one to train on (of prepare_data.py: --split {example}), "
        'or to "." where they are classes'
    )


def _enter_split(layout: Layout, parts: Sequence[str], where: str) -> None:
    """Go to the split with the names `parts`, further in where its folder is not at the top."""
    top, split = layout.folder, "/".join(parts)
    while _find_name(layout.folder.subfolders, parts[0], where) is None:
        folder = layout.folder
        subfolder = folder.next_folder()
        if subfolder is not None and subfolder not in splits_among(folder.image_folders):
            layout.enter(subfolder)
            continue
        if len(parts) == 1 and _find_name([top.path.name], split, where) is not None:  # data.path is that split already
            layout.folder, layout.named_from = top, top.innermost()
            return
        inner = {name: _find_name(names, parts[0], where) for name, names in folder.splits_of_classes().items()}
        if not any(inner.values()):
            break
        layout.inner = {name: chosen for name, chosen in inner.items() if chosen is not None}
        if without := join_names([name for name in folder.image_folders if name not in layout.inner], 10):
            layout.notes.append(f"the classes {without} hold no split {printable(parts[0])!r} and are left aside")
        return
    names = []
    for part in parts:
        subfolders = layout.folder.subfolders
        name = _find_name(subfolders, part, where)
        if name is None:
            choices = join_names(list(subfolders), 10) or "none"
            raise UserError(f"{where} has no split {split!r}; its subfolders: {choices}")
        names.append(name)
        layout.folder = subfolders[name]
    layout.named_from = layout.folder.path
    if names == list(parts):
        same_name = top.path.joinpath(*parts)
        layout.named_from = same_name if same_name.is_dir() else layout.folder.innermost()


def _find_name(names: Iterable[str], wanted: str, where: str) -> str | None:
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


def _folder_beside_annotations(names: Iterable[str]) -> str | None:
    """The one folder of images where all others hold masks, labels and the like."""
    images = [name for name in names if _has_word(name, _IMAGE_FOLDERS) and not _is_annotation(name)]
    others = [name for name in names if name not in images]
    if len(images) == 1 and others and all(map(_is_annotation, others)):
        return images[0]
    classes = [name for name in names if words_joined(name) not in _NEVER_A_CLASS]
    return classes[0] if len(classes) == 1 and len(others) > 1 and not images else None
