"""The README.md of an exported folder, made of the templates in cards/."""

import json
import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torch import nn

from ..config import quoted
from ..config.sizes import Sides, describe_size, sides_of
from ..data.names import printable


def render_card(template: str, **values: Any) -> str:
    """The Markdown of `cards/TEMPLATE.md` with these values."""
    import jinja2

    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "cards"),
        trim_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    filters = (quoted, printable, in_python, in_pixels, millions, colours, sides_of)
    environment.filters |= {function.__name__: function for function in filters}
    return environment.get_template(f"{template}.md").render(values).strip() + "\n"


def in_python(text: str) -> str:
    """Text as it stands inside double quotes of Python."""
    return json.dumps(text, ensure_ascii=False)[1:-1]


def in_pixels(sizes: Iterable[int | Sides] | None) -> str:
    """Sizes of images in words, the smallest first."""
    return " and ".join(map(describe_size, sorted(sizes or (), key=lambda size: math.prod(sides_of(size)))))


def millions(network: nn.Module) -> str:
    """The number of parameters in words."""
    return f"{sum(parameter.numel() for parameter in network.parameters()) / 1e6:.1f} M parameters"


def colours(channels: int) -> str:
    """What images of so many channels are called."""
    return "RGB" if channels == 3 else "grey"
