"""State dicts with the names of guided-diffusion, made of our networks."""

from torch import Tensor, nn

from src.interop.guided_diffusion import module_names
from src.models import ClassifierConfig, UNetConfig

FLAGS = {
    "image_size": 32,
    "num_channels": 32,
    "num_res_blocks": 2,
    "num_heads": 2,
    "num_head_channels": -1,
    "attention_resolutions": "16,8",
    "channel_mult": "1,1,2",
    "learn_sigma": False,
    "diffusion_steps": 500,
    "noise_schedule": "linear",
    "predict_xstart": True,
    "rescale_timesteps": True,
    "sigma_small": True,
}


def foreign_state(network: nn.Module, config: UNetConfig | ClassifierConfig) -> dict[str, Tensor]:
    """A state dict with guided-diffusion's names and shapes, made from a network of ours."""
    names, state = module_names(config), {}
    for key, value in network.state_dict().items():
        module, _, kind = key.rpartition(".")
        theirs = names[module]
        if kind == "weight" and theirs.endswith(("qkv", "proj_out", "qkv_proj", "c_proj")):
            value = value[..., None]  # convolutions of one pixel
        if kind == "weight" and theirs == "out.3":
            value = value[..., None, None]
        state[f"{theirs}.{kind}"] = value
    return state


def shapes_of(state: dict[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(value.shape) for name, value in state.items()}


SMALL = {
    "base_channels": 32,
    "channel_mult": [1, 1, 2],
    "blocks": 2,
    "attention": ["none", "full", "full"],
    "num_heads": 2,
    "split_qkv_first": False,
    "downsample": "conv",
}
SMALL_FLAGS = {"image_size": 16, "num_heads": 2}
