"""A page of a report taken apart, and what a run writes that a report reads."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

from PIL import Image

from src.report.report import make_report

VOID = {"meta", "img", "input", "br", "hr", "link"}
BAD = '<script>alert("1")</script>&amp;'


class Page(HTMLParser):
    """A page taken apart: what is not closed in order fails."""

    def __init__(self, content: bytes) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[tuple[str, str]] = []
        self.feed(content.decode())
        self.close()
        assert self.open == [], "every tag is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len({name for name, _ in attrs}) == len(attrs)
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        self.texts.append((self.open[-1] if self.open else "", data))

    def text(self, *, of: str | None = None) -> str:
        return "".join(data for tag, data in self.texts if (tag == of if of else tag not in ("script", "style")))

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.tags if name == tag]

    @property
    def images(self) -> list[str]:
        return [image["alt"] or "" for image in self.all("img")]

    @property
    def charts(self) -> list[dict[str, Any]]:
        """What each chart says below the pointer."""
        return [json.loads(data) for tag, data in self.texts if tag == "script" and data.startswith('{"box"')]


def page_of(run: Path) -> Page:
    page = Page(make_report(run))
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            assert not name.startswith("on") and name not in ("action", "srcset", "data", "poster"), "no code, no address"
            assert name != "src" or str(value).startswith("data:image/"), tag
            assert name != "href" or str(value).startswith("#"), tag
    assert len(page.all("script")) == len(page.charts) + 1 and not page.all("link") and not page.all("iframe")
    assert "url(" not in page.text(of="style") and "@import" not in page.text(of="style")
    assert not re.search(r"fetch|XMLHttpRequest|import\(|WebSocket|innerHTML|https?:", page.text(of="script"))
    return page


def sheet(path: Path, shade: int = 0, size: tuple[int, int] = (40, 30)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, (shade % 256, 90, 200)).save(path)


def write(folder: Path, name: str, document: Any) -> None:
    (folder / f"{name}.json").write_text(json.dumps(document))


def lines(folder: Path, values: list[dict[str, Any]], end: str = "") -> None:
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in values) + end)
