#!/usr/bin/env python
"""Write the address of the repository, `project.urls` of pyproject.toml, into the badges and first cells of the notebooks."""

import re
import tomllib
from pathlib import Path

NOTEBOOKS = Path(__file__).resolve().parent
HOSTS = ("https://github.com", "https://colab.research.google.com/github")


def with_repository(text: str, owner_and_name: str) -> str:
    """A notebook's text with this OWNER/NAME wherever a repository is named."""
    hosts = "|".join(map(re.escape, HOSTS))
    return re.sub(rf"({hosts})/[\w.-]+/[\w.-]+", rf"\1/{owner_and_name}", text)


def repository() -> str:
    """OWNER/NAME of the repository."""
    url = tomllib.loads((NOTEBOOKS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    return "/".join(url.split("/")[-2:])


if __name__ == "__main__":
    for notebook in NOTEBOOKS.glob("*.ipynb"):
        notebook.write_text(with_repository(notebook.read_text(encoding="utf-8"), repository()), encoding="utf-8")
