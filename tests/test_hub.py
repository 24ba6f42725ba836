"""Names on the Hugging Face hub: the messages where it was not reached, has no such name, wants a login, or fails."""

import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from src.config import UserError
from src.data.sources import DatasetsSource, open_sources
from src.interop import diffusers_import as folders
from src.models.pretrained import import_torchvision
from src.runs.autoencoder import open_autoencoder
from src.storage.downloads import hub_reason
from tests.conftest import refused
from tests.interop.test_foreign_autoencoders import vae

CPU = torch.device("cpu")
NAME = "stabilityai/sd-vae-ft-mse"


def answer(kind: str, status: int) -> Exception:
    """An error of huggingface_hub with the answer that it comes from."""
    import huggingface_hub.errors as errors
    from huggingface_hub.errors import Response

    request = getattr(__import__(Response.__module__.partition(".")[0]), "Request")("GET", "https://huggingface.co")  # noqa: B009
    return getattr(errors, kind)(f"{status} client error\n\nmore", response=Response(status, request=request))


def wrapped(error: Exception, outer: Exception | None = None) -> Exception:
    """As diffusers, timm and datasets give the hub's errors on."""
    try:
        raise outer or OSError("Can't load the model: it does not appear to have a file named config.json") from error
    except type(outer or OSError()) as error_of_library:
        return error_of_library


def local(cause: Exception | None = None) -> Exception:
    from huggingface_hub.errors import LocalEntryNotFoundError

    return wrapped(cause or ConnectionError("Name or service not known"), LocalEntryNotFoundError("no snapshot; check it"))


def offline() -> Exception:
    from huggingface_hub.errors import OfflineModeIsEnabled

    return OfflineModeIsEnabled("Cannot reach the hub: offline mode is enabled")


def invalid() -> Exception:
    from huggingface_hub.errors import HFValidationError

    return HFValidationError("Repo id must be in the form")


def no_dataset() -> Exception:
    from datasets.exceptions import DatasetNotFoundError

    return DatasetNotFoundError("Dataset 'a/b' doesn't exist on the Hub or cannot be accessed.")


def a_gated_dataset() -> Exception:
    from datasets.exceptions import DatasetNotFoundError

    return DatasetNotFoundError("Dataset 'a/b' is a gated dataset on the Hub. Visit the dataset page to ask for access.")


UNREACHED = "the Hugging Face hub was not reached, and the cache of this machine does not have"
ERRORS: dict[str, tuple[Callable[[], Exception], str]] = {
    "no network": (local, UNREACHED),
    "a library around it": (lambda: wrapped(local()), UNREACHED),
    "a time limit": (lambda: wrapped(TimeoutError("timed out")), UNREACHED),
    "datasets": (lambda: ConnectionError("Couldn't reach 'a/b' on the Hub (LocalEntryNotFoundError)"), UNREACHED),
    "offline by choice": (offline, "the Hugging Face hub was not reached, since HF_HUB_OFFLINE .* is set"),
    "no such name": (lambda: answer("RepositoryNotFoundError", 404), "hub has no [a-z]+ .*, or it is private"),
    "not for strangers": (lambda: answer("RepositoryNotFoundError", 401), "hub has no [a-z]+ .*, or it is private"),
    "no such data set": (no_dataset, "hub has no [a-z]+ .*, or it is private"),
    "gated": (lambda: answer("GatedRepoError", 403), "is gated: accept its conditions at https://huggingface.co/"),
    "a gated data set": (a_gated_dataset, "is gated: accept its conditions at https://huggingface.co/"),
    "a bad token": (
        lambda: answer("HfHubHTTPError", 401),
        r"does not let you read .* \(status 401\): log in with a valid token",
    ),
    "busy": (lambda: local(answer("HfHubHTTPError", 503)), r"answered with an error \(status 503\) for .*; try again later"),
    "too many": (lambda: answer("HfHubHTTPError", 429), r"answered with an error \(status 429\)"),
    "no name": (invalid, "is no folder that is here, and no name on the Hugging Face hub, which is OWNER/NAME"),
    "something else": (lambda: ValueError("\nthe config is odd\nmore"), "^the config is odd$"),
}


@pytest.mark.parametrize("why", list(ERRORS))
def test_why_the_hub_gives_nothing(why: str) -> None:
    error, words = ERRORS[why]
    reason = hub_reason(NAME, error())
    assert re.search(words, reason) and "\n" not in reason
    if "not reached" in reason:
        assert f"hf download {NAME} --local-dir FOLDER" in reason
        assert f"hf download --repo-type dataset {NAME} --local-dir" in hub_reason(NAME, error(), "dataset")
    if "gated" in reason:
        assert f"https://huggingface.co/datasets/{NAME}," in hub_reason(NAME, error(), "dataset")


@pytest.mark.parametrize("why", ["no network", "offline by choice", "no such name", "gated", "busy"])
def test_every_place_that_takes_a_name_says_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, why: str) -> None:
    import datasets
    import huggingface_hub

    error, words = ERRORS[why]

    def fails(*arguments: Any, **options: Any) -> Any:
        raise error()

    import_torchvision()
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fails)
    monkeypatch.setattr(datasets, "load_dataset", fails)
    places: dict[str, Callable[[], Any]] = {
        f"autoencoder {NAME} is no folder here: ": lambda: open_autoencoder(NAME, CPU),
        "someone/net is no folder, and the hub does not give it: ": lambda: folders.read("someone/net"),
        "data set 'someone/images' cannot be loaded: ": lambda: open_sources(
            DatasetsSource(source="datasets", name="someone/images")
        ),
    }
    for begins, place in places.items():
        with pytest.raises(UserError) as raised:
            place()
        assert str(raised.value).startswith(begins) and re.search(words, str(raised.value)), str(raised.value)
        assert "config.json" not in str(raised.value) and "\n" not in str(raised.value)
    run = tmp_path / "run"
    message = refused("train_ldm", "-cfg", "configs/smoke/ldm.json", "--set", f"autoencoder={NAME}", "--run-dir", run)
    assert re.search(words, message) and not run.exists()


def test_an_autoencoder_of_the_hub_is_the_one_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The JSON first, then the weights alone that are needed: not those of the pipeline's other parts."""
    import huggingface_hub

    import_torchvision()
    vae(tmp_path / "hub" / "vae")
    (tmp_path / "hub" / "model_index.json").write_text('{"_class_name": "StableDiffusionPipeline"}')
    cached, requests = tmp_path / "cached", list[str]()

    def download(name: str, allow_patterns: list[str]) -> str:
        requests.extend(allow_patterns)
        for pattern in allow_patterns:
            for path in (tmp_path / "hub").glob(pattern):
                target = cached / path.relative_to(tmp_path / "hub")
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)
        return str(cached)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    opened = open_autoencoder("someone/pipeline", CPU)
    assert opened.digest == open_autoencoder(str(tmp_path / "hub"), CPU).digest and opened.path == "someone/pipeline"
    assert not any(pattern.startswith(("*.", "**", "diffusion")) for pattern in requests)
    shutil.rmtree(cached)
    weights = tmp_path / "hub" / "vae" / "diffusion_pytorch_model.safetensors"
    weights.rename(weights.with_name("diffusion_pytorch_model.fp16.safetensors"))
    assert open_autoencoder("someone/pipeline", CPU).digest == opened.digest, (
        "other names are looked for where the usual is not"
    )
