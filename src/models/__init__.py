"""The networks, each beside its config."""

from .discriminator import Discriminator, DiscriminatorConfig
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

__all__ = ["VAE", "Discriminator", "DiscriminatorConfig", "UNet", "UNetConfig", "VAEConfig"]
