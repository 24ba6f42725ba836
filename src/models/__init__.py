"""The networks, each beside its config."""

from .backbone import BACKBONES, Backbone, ImageModelConfig, ModelConfig, build_model
from .classifier import Classifier, ClassifierConfig
from .discriminator import Discriminator, DiscriminatorConfig
from .mlp import MLP, MLPConfig
from .unet import UNet, UNetConfig
from .vae import VAE, VAEConfig
