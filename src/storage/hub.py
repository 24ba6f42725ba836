"""Models and datasets on the Hugging Face hub: their names, their files, and why the hub does not give them."""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path

from ..config import UserError
from ..config.packages import needed

NOT_THERE = {"RepositoryNotFoundError", "DatasetNotFoundError"}
UNREACHED = {
    *("ConnectError", "ConnectionError", "LocalEntryNotFoundError", "ProxyError", "SSLError", "Timeout", "TimeoutError"),
    *("TimeoutException", "TransportError", "gaierror"),
}


def is_hub_name(name: str) -> bool:
    """Whether a name that is no folder here may be one on the hub: OWNER/NAME, or a bare NAME."""
    if not name or name[0] in "./~" or name.count("/") > 1 or "\\" in name or name.startswith("runs/"):
        return False
    return "/" not in name or not Path(name).parent.exists()


def hub_name_of_url(address: str) -> str | None:
    """The name OWNER/NAME in the address of a page of the hub; None for anything else."""
    match = re.match(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)", address)
    return match[1] if match is not None else None


def from_hub(name: str, patterns: Sequence[str]) -> Path:
    """The folder in the cache of the hub with the files of `name` that match; a UserError says why the hub does not give it."""
    with needed(f"{name}, which is no folder here,", "huggingface_hub"):
        import huggingface_hub
        import huggingface_hub.utils.logging

    huggingface_hub.utils.logging.set_verbosity_error()  # the UserError below says once what it says at each try
    try:
        return Path(huggingface_hub.snapshot_download(name, allow_patterns=list(patterns)))
    except Exception as error:
        raise UserError(hub_reason(name, error)) from None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """The error, what caused it, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def hub_reason(name: str, error: BaseException, kind: str = "model") -> str:
    """Why the Hugging Face hub did not give the `kind` (model or dataset) `name`, and how to go on, in one line.

    Libraries wrap the hub's errors in their own, so whatever caused the error counts. It tells apart: the hub was not reached;
    it has no such repository; it wants a login; it answered with another error. Anything else is given in its own words.
    """
    chain = list(_causes(error))
    words = {base.__name__ for cause in chain for base in type(cause).__mro__}
    text = " ".join(str(cause) for cause in chain)
    codes = [getattr(getattr(cause, "response", None), "status_code", None) for cause in chain]
    status = next((code for code in codes if isinstance(code, int) and code >= 400), None)
    option = " --repo-type dataset" if kind == "dataset" else ""
    fetch = f"where there is a network: hf download{option} {name} --local-dir FOLDER, then give the path of that FOLDER here"
    page = f"https://huggingface.co/{'datasets/' if kind == 'dataset' else ''}{name}"
    if "GatedRepoError" in words or "is a gated" in text:
        return f"on the Hugging Face hub {name} is gated: accept its conditions at {page}, then log in with: hf auth login"
    if "HFValidationError" in words or (words & NOT_THERE and (name[:1] in ("/", ".", "~") or name.count("/") > 1)):
        return f"{name} is no folder that is here, and no name on the Hugging Face hub, which is OWNER/NAME; check it"
    if words & NOT_THERE or status == 404:
        return (
            f"the Hugging Face hub has no {kind} {name}, or it is private: check the name, or, where it is private, log in "
            "with: hf auth login"
        )
    if status in (401, 403):
        return f"the Hugging Face hub does not let you read {name} (status {status}): log in with a valid token: hf auth login"
    if status is not None:
        return f"the Hugging Face hub answered with an error (status {status}) for {name}; try again later, or, {fetch}"
    if "OfflineModeIsEnabled" in words or "offline mode" in text.lower():
        return (
            "the Hugging Face hub was not reached, since HF_HUB_OFFLINE (or a variable like it) is set, and the cache of this "
            f"machine does not have {name}; unset the variable, or, {fetch}"
        )
    if words & UNREACHED:
        return f"the Hugging Face hub was not reached, and the cache of this machine does not have {name}; {fetch}"
    return next((line for line in str(error).splitlines() if line.strip()), type(error).__name__).strip()
