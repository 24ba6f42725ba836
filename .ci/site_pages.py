"""What mkdocs.yml cannot say: pages of the site that lie outside docs/, links to them, and the reference of the packages.

A link to a file of the repository that is no page of the site goes to the repository (`project.urls` of pyproject.toml).
"""

import ast
import posixpath
import re
import tomllib
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).resolve().parent.parent
MOVED = {"README.md": "index.md", "CONTRIBUTING.md": "contributing.md", "benchmarks/README.md": "benchmarks/index.md"}
RESULTS = sorted(
    path.relative_to(ROOT).as_posix() for path in (ROOT / "benchmarks" / "results").glob("*") if path.suffix != ".json"
)
LINK = re.compile(r"(\]\()([^)\s]+)(\))")
REFERENCE = "reference.md"


def place_of(file: str) -> str | None:
    """Where a file of the repository is on the site, or None where it is not on it."""
    if file in RESULTS:
        return file
    return MOVED.get(file) or (file.removeprefix("docs/") if file.startswith("docs/") else None)


def file_of(place: str) -> str:
    """Which file of the repository a page is made of."""
    return next((file for file, moved in MOVED.items() if moved == place), place if place in RESULTS else f"docs/{place}")


def public_names(package: Path) -> list[str]:
    """What a package re-exports, as dotted names of the modules that define it."""
    tree = ast.parse((package / "__init__.py").read_text(encoding="utf-8"))
    dotted = ".".join(package.relative_to(ROOT).parts)
    imports = [node for node in tree.body if isinstance(node, ast.ImportFrom) and node.level == 1 and node.module]
    return [f"{dotted}.{node.module}.{name.name}" for node in imports for name in node.names]


def reference() -> str:
    """The page of all that is public: each package of src/, what it is for, and what it re-exports."""
    lines = [
        "# Reference",
        "",
        "What the packages of `src/` offer to other packages and to you. With the wheel, `src` is `atelier`.",
    ]
    for init in sorted((ROOT / "src").rglob("__init__.py")):
        names = public_names(init.parent)
        if names:
            words = ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))) or ""
            lines += ["", f"## {'.'.join(init.parent.relative_to(ROOT).parts)}", "", words, ""]
            lines += [f"::: {name}" for name in names]
    return "\n".join(lines) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Add the pages and images from outside docs/."""
    for file in (*MOVED, *RESULTS):
        files.append(File.generated(config, place_of(file) or file, abs_src_path=str(ROOT / file)))
    files.append(File.generated(config, REFERENCE, content=reference()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links between pages, or to the repository."""
    here = page.file.src_uri
    if here == REFERENCE:
        return markdown
    url = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]

    def turned(link: re.Match[str]) -> str:
        target, _, anchor = link[2].partition("#")
        if not target or ":" in target:
            return link[0]
        file = posixpath.normpath(posixpath.join(posixpath.dirname(file_of(here)), target))
        place = place_of(file)
        if place is None and (ROOT / file).exists():
            return f"{link[1]}{url}/blob/main/{file}{link[3]}"
        words = posixpath.relpath(place or file, posixpath.dirname(here) or ".")
        return f"{link[1]}{words}{'#' if anchor else ''}{anchor}{link[3]}"

    return LINK.sub(turned, markdown)
