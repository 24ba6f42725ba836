"""The networks, each beside its config."""

from .classifier import Classifier, ClassifierConfig
from .discriminator import Discriminator, DiscriminatorConfig
from .mlp import MLP, MLPConfig
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig

__all__ = [
    "MLP",
    "VAE",
    "Classifier",
    "ClassifierConfig",
    "Discriminator",
    "DiscriminatorConfig",
    "MLPConfig",
    "UNet",
    "UNetConfig",
    "VAEConfig",
]
