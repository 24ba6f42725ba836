"""What the tests of buckets write, read and call."""

import io
import random
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from src.config import UserError
from src.storage.buckets.__main__ import main

MANIFEST = "step_1/MANIFEST.json"

LARGE = 20_000_000  # bytes: two chunks of an upload
MANIFEST = "step_1/MANIFEST.json"


def tree(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def write(folder: Path, contents: dict[str, bytes]) -> Path:
    for name, content in contents.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


def random_bytes(size: int, seed: int = 0) -> bytes:
    return random.Random(seed).randbytes(size)


def small() -> dict[str, bytes]:
    return {"log.txt": b"step 1\n", "empty": b"", "a b/ü?#%.txt": b"x", "step_1/model": random_bytes(9000), MANIFEST: b"{}"}


def mistake(call: Any, *arguments: Any, **options: Any) -> str:
    with pytest.raises(UserError) as raised:
        call(*arguments, **options)
    assert "\n" not in str(raised.value)
    return str(raised.value)


def call(line: str) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["buckets", *line.split()])
        return main()


def zipped(contents: dict[str, bytes]) -> bytes:
    with io.BytesIO() as held:
        with zipfile.ZipFile(held, "w") as file:
            for name, content in contents.items():
                file.writestr(name, content)
        return held.getvalue()
