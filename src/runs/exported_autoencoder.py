"""Our autoencoder, opened from the folder of an AutoencoderKL that it was written as."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import UserError, read_json, validate
from ..models import VAEConfig
from ..runtime.checkpoint import read_tensors
from .diffusers_autoencoder import ATTENTION, RESIDUAL, WEIGHTS, fuse_qkv, pair_names

OURS = "atelier.json"  # beside the config.json of diffusers: what builds our network again, and the hash of its weights
NETWORK_KEYS = ("kind", "model", "channels", "tanh", "sizes")  # what, with the weights, builds our network again


def layer_names(spec: VAEConfig) -> dict[str, str]:
    """The names of our modules that hold weights -> their names in an AutoencoderKL."""

    def level(name: str, kind: str) -> list[dict[str, str]]:
        layers = [pair_names("", f"{name}.resnets.{i}", RESIDUAL) for i in range(spec.blocks)]
        if kind != "none":  # we have one attention in a level, after its last block
            layers.append(pair_names("", f"{name}.attentions.{spec.blocks - 1}", ATTENTION))
        return layers

    def middle(name: str) -> list[dict[str, str]]:
        attention = [pair_names("", f"{name}.attentions.0", ATTENTION)] if spec.mid_attention != "none" else []
        first, last = (pair_names("", f"{name}.resnets.{i}", RESIDUAL) for i in (0, 1))
        return [first, *attention, last]

    last_level, no_weights = len(spec.widths) - 1, dict[str, str]()
    encoder, up = [{"": "encoder.conv_in"}], list[dict[str, str]]()
    for i, kind in enumerate(spec.kinds):
        encoder += [*level(f"encoder.down_blocks.{i}", kind), *([no_weights] if i < last_level else [])]  # pooling
    encoder += [*middle("encoder.mid_block"), {"": "encoder.conv_norm_out"}, no_weights, {"": "encoder.conv_out"}]
    for i, kind in enumerate(reversed(spec.kinds)):
        up += level(f"decoder.up_blocks.{i}", kind)
        up += [{".conv": f"decoder.up_blocks.{i}.upsamplers.0.conv"}] if i < last_level else [{"": "decoder.conv_norm_out"}]
    parts = {"encoder": encoder, "middle": [{"": "decoder.conv_in"}, *middle("decoder.mid_block")], "up": up}
    names = {"last": "decoder.conv_out"}
    for part, layers in parts.items():
        names |= {f"{part}.layers.{i}{ours}": theirs for i, layer in enumerate(layers) for ours, theirs in layer.items()}
    return names


def exported_autoencoder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str] | None:
    """(document, weights by our names, digest) of an AutoencoderKL that we wrote into `folder`, or into its `vae`.

    None where there is none, or where somebody changed its weights: it is then an AutoencoderKL like any other.
    """
    for place in (folder, folder / "vae"):
        weights = place / f"{WEIGHTS}.safetensors"
        if not (place / OURS).is_file() or not weights.is_file():
            continue
        document = read_json(place / OURS)
        with open(weights, "rb") as file:
            if not isinstance(document, Mapping) or hashlib.file_digest(file, "sha256").hexdigest() != document.get("weights"):
                return None
        missing = [key for key in (*NETWORK_KEYS, "digest") if key not in document]
        if missing:
            raise UserError(f"{place / OURS} is damaged: it lacks {', '.join(missing)}")
        names = layer_names(validate(VAEConfig, document["model"], origin=f"{place / OURS}: model"))
        theirs = fuse_qkv(read_tensors(place, WEIGHTS))
        pairs = [(f"{ours}.{kind}", f"{name}.{kind}") for ours, name in names.items() for kind in ("weight", "bias")]
        state_dict = {ours: theirs[name] for ours, name in pairs if name in theirs}
        return {key: document[key] for key in NETWORK_KEYS}, state_dict, document["digest"]
    return None
