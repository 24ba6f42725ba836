"""The names of files that move between a folder and a bucket: which do not move, which come last, which are refused."""

import re

from ...config import UserError

# Hidden files with these endings belong to a process of this project that runs or was killed, or are notes for this machine.
PROJECT_ENDINGS = (".lock", ".part", ".partial", ".old", ".trial", ".unpacked")
HALF_WRITTEN = (".part", ".partial", ".swp", ".swx", "~")  # of this project and of editors
JUNK = ("__pycache__", ".ipynb_checkpoints", ".DS_Store", "Thumbs.db")
CACHES = ("latents", "pairs")  # folders of a run that are large, and are made anew where they are missing


def is_manifest(name: str) -> bool:
    """Whether a file promises that the others in its folder are whole."""
    return name.endswith(("MANIFEST.json", "manifest.json"))


def is_of_this_machine(name: str) -> bool:
    """Whether the project keeps a file, or a folder that the file is in, for this machine alone: nobody misses it elsewhere."""
    parts = name.split("/")
    return any((part.startswith(".") and part.endswith(PROJECT_ENDINGS)) or part.startswith(".doctor-") for part in parts)


def is_temporary(name: str) -> bool:
    """Whether a file, or a folder that it is in, is of this machine alone, half-written, or an editor's."""
    return is_of_this_machine(name) or any(part.endswith(HALF_WRITTEN) or part in JUNK for part in name.split("/"))


def join(*names: str) -> str:
    return "/".join(name for name in names if name)


def folder_of(name: str) -> str:
    """The part of a name before the file's, with its slash."""
    return name[: name.rfind("/") + 1]


def is_unsafe(name: str) -> bool:
    """Whether a name could lead out of its folder, or cannot be a file's."""
    if any(part in ("", ".", "..") for part in name.split("/")):
        return True
    return bool(re.search(r"^[A-Za-z]:|[\x00-\x1f\\\ud800-\udfff]", name))


def check_name(name: str, where: str) -> None:
    """A UserError where a name is unsafe."""
    if is_unsafe(name):
        raise UserError(f"{where}: the name {name!r} could lead out of the folder, or cannot be a file's; rename or delete it")
