"""The networks, each beside its config."""

from .unet import UNet, UNetConfig

__all__ = ["UNet", "UNetConfig"]
