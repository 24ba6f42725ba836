"""diffusers' autoencoders behind the interface of ours; and ours, opened from the AutoencoderKL that it was written as."""

import hashlib
import importlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..config import UserError, prefix_errors, quoted, read_json, validate
from ..config.packages import ask_for, needed
from ..models import VAEConfig
from ..models.pretrained import import_torchvision
from ..runtime.checkpoint import read_tensors
from ..storage.downloads import from_hub
from ..storage.networks import DC, KL, TINY, VQ, Kind, few, find_network, list_differences, present_names
from ..storage.weight_files import find_files, read_files, read_foreign_json
from .folders import read_if_there

VERSION = "0.35.0"  # the oldest version of diffusers that reads the folders that we write
WEIGHTS = "diffusion_pytorch_model"
SUBFOLDERS = ("vae", "vqvae", "movq")  # in which pipelines have their autoencoder
KL_NAME = "AutoencoderKL"
HALVES, CONVS = ("encoder", "decoder"), ("quant_conv", "post_quant_conv")


class Family(NamedTuple):
    """A class of diffusers' autoencoders: where it is, how its weights are known, and the first words of their names."""

    module: str
    kind: Kind
    parts: tuple[str, ...]


FAMILIES = {
    KL_NAME: Family("autoencoder_kl", KL, (*HALVES, *CONVS)),
    "AutoencoderDC": Family("autoencoder_dc", DC, HALVES),
    "AutoencoderTiny": Family("autoencoder_tiny", TINY, HALVES),
    "VQModel": Family("vq_model", VQ, (*HALVES, *CONVS, "quantize")),
}
CLASSES = f"{', '.join(list(FAMILIES)[:-1])} or {list(FAMILIES)[-1]}"
OURS = "atelier.json"  # beside the config.json of diffusers: what builds our network again, and the hash of its weights
NETWORK_KEYS = ("kind", "model", "channels", "tanh", "sizes")  # what, with the weights, builds our network again

# The names inside a residual block, an attention and a resampling: ours -> diffusers'. Its to_q, to_k and to_v count as one.
INSIDE = {"norm_1": "norm1", "conv_1": "conv1", "embed": "time_emb_proj", "norm_2": "norm2", "conv_2": "conv2"}
INSIDE |= {"skip": "conv_shortcut", "norm": "group_norm", "qkv": "qkv", "out": "to_out.0", "conv": "conv"}


def names_inside(places: Mapping[str, str], inside: Mapping[str, str] = INSIDE) -> dict[str, str]:
    """The names of modules, ours -> theirs: `places`, and the names `inside` each of them, whatever it is."""
    return {**places, **{f"{ours}.{a}": f"{theirs}.{b}" for ours, theirs in places.items() for a, b in inside.items()}}


def fuse_qkv(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of diffusers with to_q, to_k and to_v joined to the one `qkv` that our attention has."""
    fused = present_names(state_dict)
    for key in [key for key in fused if ".to_q." in key]:
        names = [key.replace(".to_q.", f".to_{part}.") for part in "qkv"]
        if all(name in fused for name in names):
            fused[key.replace(".to_q.", ".qkv.")] = torch.cat([fused.pop(name) for name in names])
    return fused


def fit_state(state_dict: Mapping[str, Tensor], wanted: Mapping[str, Tensor], where: str) -> dict[str, Tensor]:
    """The tensors of a state dict in the shapes of `wanted`, where only 1s differ. A UserError, which begins with `where`, says
    which keys or shapes differ."""
    faults = list_differences(wanted.keys() - state_dict.keys(), state_dict.keys() - wanted.keys())
    for key in () if faults else wanted:
        shape, wanted_shape = tuple(state_dict[key].shape), tuple(wanted[key].shape)
        if [n for n in shape if n != 1] != [n for n in wanted_shape if n != 1]:
            faults = [f"{key} is {shape}, this network wants {wanted_shape}"]
            break
    if faults:
        raise UserError(f"{where}: {'; '.join(faults)}")
    return {key: state_dict[key].reshape(value.shape) for key, value in wanted.items()}


class DiffusersAutoencoder(nn.Module):
    """An autoencoder of diffusers with our names: moments(images) and decode(z). `scaling` is the mean and the standard
    deviation of its latents, by its shift_factor and scaling_factor; `notes` say in words which weights were taken.

    The latents of an AutoencoderKL are drawn from a Gaussian. Those of the other classes are a function of the image; a VQModel
    gives them as they are before its codebook, which `decode` goes through (Rombach et al. 2022, arXiv:2112.10752).
    """

    def __init__(self, network: Any) -> None:
        super().__init__()
        self.network = network
        theirs = network.config
        self.class_name = type(network).__name__
        self.config = {key: value for key, value in dict(theirs).items() if not key.startswith("_")}
        self.channels, self.latent_channels = theirs["in_channels"], theirs["latent_channels"]
        if self.class_name == "VQModel":
            self.latent_channels = theirs["vq_embed_dim"] or self.latent_channels
        self.factor = self._factor(theirs)
        scale, shift = theirs["scaling_factor"], theirs.get("shift_factor") or 0.0
        if not isinstance(scale, int | float) or not isinstance(shift, int | float) or scale == 0 or not math.isfinite(scale):
            raise UserError(f"{self.class_name} with scaling_factor {scale!r} and shift_factor {shift!r} cannot be used")
        self.scaling = (float(shift), 1.0 / scale)
        self.notes: tuple[str, ...] = ()

    def _factor(self, theirs: Mapping[str, Any]) -> int:
        """By how much the sides of an image are larger than those of its latents."""
        levels = {
            "AutoencoderDC": ("encoder_block_out_channels", "decoder_block_out_channels"),
            "AutoencoderTiny": ("num_encoder_blocks", "num_decoder_blocks"),
        }.get(self.class_name, ("block_out_channels",))
        counts, up = {len(theirs[key]) for key in levels}, theirs.get("upsampling_scaling_factor", 2)
        if len(counts) > 1 or up != 2:
            raise UserError(f"{self.class_name}, here with images of another size than it was given, cannot be used")
        return 2 ** (counts.pop() - 1)

    def moments(self, images: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, C, H, W) in [-1, 1] -> mean and logvar (B, D, h, w), not normalised; no logvar where latents are not drawn."""
        encoded = self.network.encode(images)
        if self.class_name == KL_NAME:
            return encoded.latent_dist.mean, encoded.latent_dist.logvar
        return encoded.latent if self.class_name == "AutoencoderDC" else encoded.latents, None

    def decode(self, z: Tensor) -> Tensor:
        """(B, D, h, w), not normalised -> (B, C, H, W)."""
        return self.network.decode(z).sample


def autoencoder_from_config(config: Mapping[str, Any], class_name: str = KL_NAME) -> DiffusersAutoencoder:
    """An autoencoder of this class of diffusers and this config, with random weights."""
    import_torchvision()
    with needed("a diffusers autoencoder", "diffusers"):
        module = importlib.import_module(f"diffusers.models.autoencoders.{FAMILIES[class_name].module}")
    return DiffusersAutoencoder(getattr(module, class_name).from_config(dict(config)))


def _find_autoencoder(folder: Path, name: str) -> tuple[Path, dict[str, Any], list[str]]:
    """The folder of an autoencoder in `folder`, its config, and notes on what was chosen. A UserError says what is in the
    folder instead."""
    usable = f"an {CLASSES}, such as stabilityai/sd-vae-ft-mse, is what can be used"
    place, notes = folder, list[str]()
    inside = next((folder / sub for sub in SUBFOLDERS if (folder / sub / "config.json").is_file()), None)
    if not (folder / "config.json").is_file() or inside is not None:
        place = inside or folder / SUBFOLDERS[0]
        notes = [f"the autoencoder is {place}, a part of the pipeline {folder}"]
    if not (place / "config.json").is_file():
        if place.is_dir():
            raise UserError(f"autoencoder {name}: {place} has no config.json, which says what its weights are")
        configs = {path.parent.name: read_foreign_json(path) for path in sorted(folder.glob("*/config.json"))}
        index = read_if_there(folder / "model_index.json")
        kind = f"a {index['_class_name']}" if "_class_name" in index else "a folder"
        parts = few((f"{sub} ({config.get('_class_name', '?')})" for sub, config in configs.items()), 6)
        contents = parts or few(path.name for path in folder.iterdir()) or "nothing"
        missing = "vae/ with an autoencoder" if configs or index else "config.json"
        raise UserError(f"autoencoder {name} is {kind} without {missing}; it holds {contents}; {usable}")
    config = read_foreign_json(place / "config.json")
    kind = config.get("_class_name")
    if kind is None and not {"block_out_channels", "latent_channels"} <= set(config):
        raise UserError(f"autoencoder {name}: {place / 'config.json'} does not say its _class_name; {usable}")
    if kind not in (*FAMILIES, None):
        hint = f"; import a network with: python convert.py diffusers {quoted(name)}" if kind == "UNet2DModel" else ""
        words = "a diffusion network and no autoencoder" if str(kind).startswith("UNet") else "none of these"
        raise UserError(f"autoencoder {name}: {place} is of the class {kind}, which is {words}; {usable}{hint}")
    return place, config, notes


def load_autoencoder(name: str) -> DiffusersAutoencoder:
    """An autoencoder of diffusers (AutoencoderKL, AutoencoderDC, AutoencoderTiny, VQModel) from a folder or the hub, or from
    the subfolder of a whole pipeline. Its weights may be in any file, whole or in shards, and no code in them runs. A
    UserError says why it cannot be loaded: what the folder is instead, which weights are missing, or that the hub was not
    reached."""
    ask_for("a diffusers autoencoder", "diffusers")  # before anything is downloaded
    folder = Path(name).expanduser()
    on_hub = not folder.is_dir()
    if on_hub:
        with prefix_errors(f"autoencoder {name} is no folder here"):
            folder = from_hub(name, ["model_index.json", "config.json", "*/config.json"])
    place, config, notes = _find_autoencoder(folder, name)
    class_name = config.get("_class_name") or KL_NAME
    family = FAMILIES[class_name]
    with prefix_errors(f"autoencoder {name}"):
        if on_hub:
            inside = "" if place == folder else f"{place.name}/"
            from_hub(name, [f"{inside}{WEIGHTS}.safetensors"])
            if not any(place.glob("*.safetensors")):
                from_hub(name, [f"{inside}{file}" for file in (f"{WEIGHTS}.bin", "*.safetensors", "*.index.json")])
        files, left_out = find_files(place)
        state_dict, (first, *others) = find_network(read_files(files), family.kind, place / files.name)
        try:
            autoencoder = autoencoder_from_config(config, class_name)
        except Exception as error:  # it raises errors of many kinds for values that it does not take
            if isinstance(error, UserError):
                raise
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise UserError(f"no {class_name} can be built of {place / 'config.json'}: {reason}") from None
    state_dict, where = present_names(state_dict), f"autoencoder {name}: {place / files.name}"
    if "encoder.down.0.block.0.conv1.weight" in state_dict:
        raise UserError(f"{where} has the names of CompVis's latent-diffusion; convert it to diffusers' AutoencoderKL first")
    weights = {key: tensor for key, tensor in state_dict.items() if key.split(".")[0] in family.parts}
    where += f" does not hold the weights of a whole {class_name} of its config.json"
    autoencoder.network.load_state_dict(fit_state(weights, autoencoder.network.state_dict(), where))
    beside = state_dict.keys() - weights.keys()
    unused = [f"left out, tensors of no {class_name}: {few(beside)}"] if beside else []
    autoencoder.notes = (*notes, f"autoencoder: {place}, {first.removeprefix('network: ')}", *others, *unused, *left_out)
    return autoencoder


def layer_names(spec: VAEConfig) -> dict[str, str]:
    """The names of our modules that hold weights -> their names in an AutoencoderKL."""

    def level(name: str, kind: str) -> list[str]:
        attention = [] if kind == "none" else [f"{name}.attentions.{spec.blocks - 1}"]  # ours, after the last block
        return [*(f"{name}.resnets.{i}" for i in range(spec.blocks)), *attention]

    def middle(name: str) -> list[str]:
        attention = [] if spec.mid_attention == "none" else [f"{name}.attentions.0"]
        return [f"{name}.resnets.0", *attention, f"{name}.resnets.1"]

    encoder, up, no_weights = ["encoder.conv_in"], list[str](), ""
    for i, kind in enumerate(spec.kinds):
        encoder += [*level(f"encoder.down_blocks.{i}", kind), no_weights]  # pooling
        up += [*level(f"decoder.up_blocks.{i}", spec.kinds[-1 - i]), f"decoder.up_blocks.{i}.upsamplers.0"]
    encoder[-1:] = [*middle("encoder.mid_block"), "encoder.conv_norm_out", no_weights, "encoder.conv_out"]
    up[-1] = "decoder.conv_norm_out"
    parts = {"encoder": encoder, "middle": ["decoder.conv_in", *middle("decoder.mid_block")], "up": up}
    places = {f"{part}.layers.{i}": theirs for part, layers in parts.items() for i, theirs in enumerate(layers) if theirs}
    return names_inside({"last": "decoder.conv_out", **places})


def exported_autoencoder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str] | None:
    """(document, weights by our names, digest) of our autoencoder that was written as an AutoencoderKL into `folder`, or into
    its `vae`. None where there is none, or where somebody changed its weights: it is then an AutoencoderKL like any other."""
    places = (place for place in (folder, folder / "vae") if (place / OURS).is_file())
    place = next((place for place in places if (place / f"{WEIGHTS}.safetensors").is_file()), None)
    if place is None:
        return None
    document = read_json(place / OURS)
    with open(place / f"{WEIGHTS}.safetensors", "rb") as file:
        if not isinstance(document, Mapping) or hashlib.file_digest(file, "sha256").hexdigest() != document.get("weights"):
            return None
    if missing := [key for key in (*NETWORK_KEYS, "digest") if key not in document]:
        raise UserError(f"{place / OURS} is damaged: it lacks {', '.join(missing)}")
    names = layer_names(validate(VAEConfig, document["model"], origin=f"{place / OURS}: model"))
    theirs = fuse_qkv(read_tensors(place, WEIGHTS))
    pairs = [(f"{ours}.{kind}", f"{name}.{kind}") for ours, name in names.items() for kind in ("weight", "bias")]
    state_dict = {ours: theirs[name] for ours, name in pairs if name in theirs}
    return {key: document[key] for key in NETWORK_KEYS}, state_dict, document["digest"]
