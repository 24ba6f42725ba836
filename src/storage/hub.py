"""Runs on the Hugging Face hub: a name becomes a folder here, and files are pushed. huggingface_hub does the transfer."""

import hashlib
import json
import os
import platform
import re
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import pydantic

from ..config import UserError, config, config_error, prefix_errors, resumable_field
from .downloads import UNREACHED, HubFailure, first_line, from_hub, is_on_hub, quiet_hub, split_revision
from .files import as_json, write_whole
from .locks import folder_lock

if TYPE_CHECKING:
    from huggingface_hub import HfApi

MANIFEST = "MANIFEST.json"  # lists the files of a run on the hub, which lie beside it
CARD, OTHER_CARD = "README.md", "ATELIER.md"  # the second is for where a person wrote the first
NAME = r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*"
_MARK, _END = "<!-- Atelier made this card. Change it as you like: then it is kept as it is. ", " -->"


@config
class HubConfig:
    """The weights of the run, with its config, data.json, previews and a card, are pushed into the repository `repo` of the
    Hugging Face hub (OWNER/NAME), at the `end` or also at each `checkpoint`; its data never is. A repository that is missing is
    made, `private` or as the hub does it by default. `revision` is a branch, main by default."""

    repo: str = resumable_field()
    every: Literal["checkpoint", "end"] = resumable_field("end")
    private: bool = resumable_field(False)
    revision: str | None = resumable_field(None, pattern=r"^[\w./-]+$")

    @pydantic.field_validator("repo")
    @classmethod
    def _is_a_name(cls, repo: str) -> str:
        if re.fullmatch(NAME, repo) is None:
            raise config_error(f"give OWNER/NAME, the name of a repository on the Hugging Face hub, not {repo!r}")
        return repo

    @property
    def name(self) -> str:
        """OWNER/NAME[@REVISION], as sample.py and the others take it."""
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


# ---------------------------------------------------------------------------------------------- from the hub

_brought = dict[str, Path]()  # so that a process sees one version of a name, whatever is pushed meanwhile


def local_path(name: str | Path) -> Path:
    """The path that the `name` of a run means: itself where it is here, or where it can be no name on the hub; else the folder
    in the hub's cache with the files of the run OWNER/NAME[@REVISION]. One process of a machine fetches them and the others
    wait. A UserError says why the hub does not give them."""
    path, name = Path(name), Path(name).as_posix()
    if not is_on_hub(name):
        return path
    if name not in _brought or not _brought[name].is_dir():
        with prefix_errors(f"{name}: there is no such run or checkpoint here"):
            _brought[name] = _bring(name)
    return _brought[name]


def forget(name: str | Path) -> None:
    """Let the next use of a name ask the hub for what is there then."""
    _brought.pop(Path(name).as_posix(), None)


def is_run(name: str) -> bool:
    """Whether the repository OWNER/NAME[@REVISION] on the hub holds a run of this project. A UserError where there is none."""
    return (from_hub(name, [MANIFEST]) / MANIFEST).is_file()


def _bring(name: str) -> Path:
    """Fetch the files that the manifest of `name` lists. Processes that one launcher started see the same commit of it."""
    quiet_hub(f"{name}, which is no folder here,")
    from huggingface_hub.constants import HF_HUB_CACHE

    repo, _ = split_revision(name)
    place = Path(HF_HUB_CACHE) / ".locks" / f"models--{repo.replace('/', '--')}"
    launch, marker = _launch(), place.with_name(f".{place.name}.launch.json")
    with folder_lock(place):
        known = _read(marker)
        commits = known.get("commits", {}) if launch is not None and known.get("launch") == launch else {}
        folder = from_hub(f"{repo}@{commits[name]}" if name in commits else name, [MANIFEST])
        version, listed = f"{repo}@{folder.name}", _read(folder / MANIFEST).get("files")
        if isinstance(listed, dict):
            from_hub(version, [MANIFEST, *listed])
        else:  # no run of this project: its JSON files say what it is
            from_hub(version, ["*.json"])
        if launch is not None:
            write_whole(marker, as_json({"launch": launch, "commits": {**commits, name: folder.name}}))
    return folder


def _launch() -> str | None:
    """What only the processes of one launch on this machine have in common; None of a process that no launcher started, or one
    that cannot see its launcher, as in a container of its own."""
    import psutil

    if os.environ.get("WORLD_SIZE", "1") in ("", "0", "1") or not psutil.pid_exists(os.getppid()):
        return None
    parent = psutil.Process(os.getppid())
    return f"{platform.node()} {parent.pid} {parent.create_time()} {os.environ.get('MASTER_PORT')}"


def _read(path: Path) -> dict[str, Any]:
    """A JSON object, empty where there is none: whoever needs it says what is wrong."""
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return document if isinstance(document, dict) else {}


# ---------------------------------------------------------------------------------------------- to the hub


def make_repo(name: str, *, private: bool = False) -> None:
    """Make the repository OWNER/NAME[@BRANCH] and the branch where they are missing. A UserError says why it cannot be."""
    quiet_hub("a push to the hub", shown=False)
    from huggingface_hub import HfApi

    with _explained(name):
        _make_repo(HfApi(), name, private)


def _make_repo(api: "HfApi", name: str, private: bool) -> None:
    repo, revision = split_revision(name)
    api.create_repo(repo, private=private or None, exist_ok=True)
    if revision is not None:
        api.create_branch(repo, branch=revision, exist_ok=True)


@contextmanager
def _explained(name: str) -> Iterator[None]:
    """Around what writes to the hub: a UserError says why it fails, and never holds the token."""
    from huggingface_hub import get_token

    token = get_token()
    if token is None:
        repo, _ = split_revision(name)
        raise UserError(f"there is no token to write to {repo} on the Hugging Face hub with: hf auth login, or set HF_TOKEN")
    try:
        yield
    except Exception as error:
        raise UserError(push_reason(name, error).replace(token, "(the token)")) from None


class Pushed(NamedTuple):
    """Where it was pushed to, and the name of the card there."""

    address: str
    card: str


def push_files(
    name: str,
    files: Mapping[str, Path | bytes],
    card: str,
    *,
    message: str,
    private: bool = False,
    replaced: Collection[str] = (),
    shown: bool = True,
) -> Pushed:
    """Put files, by their names there, and a card into the repository OWNER/NAME[@BRANCH], in one commit with this `message`,
    or nothing where it fails. A repository and a branch that are missing are made.

    A README.md there that a person wrote or changed is kept: the card is put beside it as ATELIER.md. Files in the folders
    `replaced` that are not among the new ones are deleted. The progress is `shown` to who watches. A UserError says why the hub
    does not take it.
    """
    quiet_hub("a push to the hub", shown=shown)
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, hf_hub_download

    (repo, revision), api = split_revision(name), HfApi()
    with _explained(name):
        _make_repo(api, name, private)
        head = api.model_info(repo, revision=revision).sha
        there = set(api.list_repo_files(repo, revision=head))
        before = Path(hf_hub_download(repo, CARD, revision=head)).read_bytes() if CARD in there else None
        named = CARD if before is None or is_signed(before) else OTHER_CARD
        contents: dict[str, Path | bytes] = {**files, named: sign(card)}
        outdated = [file for file in there - contents.keys() if file.startswith(tuple(f"{folder}/" for folder in replaced))]
        operations = [
            *(CommitOperationDelete(path_in_repo=file) for file in sorted(outdated)),
            *(CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in contents.items()),
        ]
        api.create_commit(repo, operations, commit_message=message, revision=revision, parent_commit=head)
    return Pushed(f"{api.endpoint}/{repo}" + (f"/tree/{revision}" if revision is not None else ""), named)


def sign(card: str) -> bytes:
    """The card with a last line by which `is_signed` knows it, for as long as nobody changes it."""
    text = card.rstrip() + "\n\n"
    return f"{text}{_MARK}{hashlib.sha256(text.encode()).hexdigest()}{_END}\n".encode()


def is_signed(content: bytes) -> bool:
    """Whether a card is as `sign` made it."""
    text, mark, last = content.decode(errors="replace").rpartition(_MARK)
    return bool(mark) and last.strip() == hashlib.sha256(text.encode()).hexdigest() + _END.rstrip()


def push_reason(name: str, error: BaseException) -> str:
    """Why the Hugging Face hub did not take what is pushed to `name`, and what to do, in one line."""
    kinds, _, status = failure = HubFailure.of(error)
    repo, _ = split_revision(name)
    hub = "the Hugging Face hub"
    reasons = (  # the first that holds is the reason
        ("HFValidationError" in kinds, f"{repo} is no name on {hub}, which is OWNER/NAME"),
        (failure.is_offline, f"{hub} was not reached, since HF_HUB_OFFLINE (or a variable like it) is set; unset the variable"),
        (
            status == 401,
            f"{hub} does not take the token for {repo} (status 401): log in with a valid one that may write: hf auth login",
        ),
        (
            status == 403,
            f"on {hub} the token may not write to {repo} (status 403): it is somebody else's, or the token may only read; give "
            "a name of your own, or a token that may write: hf auth login",
        ),
        ("RevisionNotFoundError" in kinds, f"on {hub} {repo} has no such branch as {name} names, and it cannot be made"),
        (status == 404, f"{hub} has no {repo}, and cannot make it: check the name of its owner"),
        (status in (409, 412), f"on {hub} somebody changed {repo} at the same time (status {status}); push it again"),
        (status, f"{hub} answered with an error (status {status}) for {repo}; try again later"),
        (kinds & UNREACHED, f"{hub} was not reached; is there a network?"),
    )
    cause = error.__cause__ or error
    in_its_words = first_line(error) if cause is error else f"{first_line(error)} ({first_line(cause)})"
    return next((reason for holds, reason in reasons if holds), in_its_words)
