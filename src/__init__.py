"""Atelier: train image generators from scratch on your own images, and sample from them."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .api import Pretrained, from_pretrained

__all__ = ["Pretrained", "from_pretrained"]


def __getattr__(name: str) -> Any:
    """What draws is imported when it is asked for: so `import atelier` takes no time, and scripts start as before."""
    if name in __all__:
        from . import api

        return getattr(api, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
