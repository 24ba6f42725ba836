"""The networks, each beside its config."""

from .classifier import Classifier, ClassifierConfig
from .discriminator import Discriminator, DiscriminatorConfig
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

__all__ = [
    "VAE",
    "Classifier",
    "ClassifierConfig",
    "Discriminator",
    "DiscriminatorConfig",
    "UNet",
    "UNetConfig",
    "VAEConfig",
]
