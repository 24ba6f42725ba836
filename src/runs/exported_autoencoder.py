"""Our autoencoder, opened from the folder of an AutoencoderKL that it was written as."""

import hashlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..config import UserError, read_json, validate
from ..models import VAEConfig
from ..runtime.checkpoint import read_tensors
from .diffusers_autoencoder import ATTENTION, RESIDUAL, WEIGHTS

OURS = "atelier.json"  # beside their config.json: what brings our own network back, and the hash of the weights it belongs to


KEPT = ("kind", "model", "channels", "tanh", "sizes")  # what, with the weights, builds our network again


def _layer_names(spec: VAEConfig) -> Iterator[tuple[str, str]]:
    """(our module, theirs), in the order in which VAE builds its layers."""
    last = len(spec.widths) - 1

    def residual(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in RESIDUAL.items())

    def attention(ours: str, theirs: str) -> Iterator[tuple[str, str]]:
        yield from ((f"{ours}.{a}", f"{theirs}.{b}") for a, b in ATTENTION.items())

    def middle(ours: str, at: int, theirs: str) -> Iterator[tuple[str, str]]:
        yield from residual(f"{ours}.{at}", f"{theirs}.resnets.0")
        if spec.mid_attention != "none":
            yield from attention(f"{ours}.{at + 1}", f"{theirs}.attentions.0")
            at += 1
        yield from residual(f"{ours}.{at + 1}", f"{theirs}.resnets.1")

    def level(ours: str, at: int, theirs: str, kind: str) -> Iterator[tuple[str, str]]:
        for i in range(spec.blocks):
            yield from residual(f"{ours}.{at + i}", f"{theirs}.resnets.{i}")
        if kind != "none":  # we have one attention a level, after its last block
            yield from attention(f"{ours}.{at + spec.blocks}", f"{theirs}.attentions.{spec.blocks - 1}")

    def length(kind: str) -> int:
        return spec.blocks + (kind != "none")

    side, at = "encoder.layers", 1
    yield f"{side}.0", "encoder.conv_in"
    for i, kind in enumerate(spec.kinds):
        yield from level(side, at, f"encoder.down_blocks.{i}", kind)
        at += length(kind) + (i < last)  # pooling has no weights
    yield from middle(side, at, "encoder.mid_block")
    at += 2 + (spec.mid_attention != "none")
    yield f"{side}.{at}", "encoder.conv_norm_out"
    yield f"{side}.{at + 2}", "encoder.conv_out"
    yield "middle.layers.0", "decoder.conv_in"
    yield from middle("middle.layers", 1, "decoder.mid_block")
    side, at = "up.layers", 0
    for step, i in enumerate(reversed(range(last + 1))):
        yield from level(side, at, f"decoder.up_blocks.{step}", spec.kinds[i])
        at += length(spec.kinds[i])
        if i > 0:
            yield f"{side}.{at}.conv", f"decoder.up_blocks.{step}.upsamplers.0.conv"
            at += 1
    yield f"{side}.{at}", "decoder.conv_norm_out"
    yield "last", "decoder.conv_out"


def _fused(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Their state dict with to_q, to_k and to_v as the one `qkv` that we have."""
    fused = dict(state)
    for key in [key for key in fused if ".to_q." in key]:
        fused[key.replace(".to_q.", ".qkv.")] = torch.cat([fused.pop(key.replace(".to_q.", f".to_{part}.")) for part in "qkv"])
    return fused


def exported_autoencoder(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor], str] | None:
    """(document, weights by our names, digest) of an AutoencoderKL that we wrote into `folder`, or into its `vae`; None where
    there is none, or where its weights are no longer those that we wrote: then it is an AutoencoderKL as any other."""
    for place in (folder, folder / "vae"):
        weights = place / f"{WEIGHTS}.safetensors"
        if not (place / OURS).is_file() or not weights.is_file():
            continue
        document = read_json(place / OURS)
        with open(weights, "rb") as file:
            if not isinstance(document, dict) or hashlib.file_digest(file, "sha256").hexdigest() != document.get("weights"):
                return None
        lacks = [key for key in (*KEPT, "digest") if key not in document]
        if lacks:
            raise UserError(f"{place / OURS} is damaged: it lacks {', '.join(lacks)}")
        spec = validate(VAEConfig, document["model"], origin=f"{place / OURS}: model")
        state = _fused(read_tensors(place, WEIGHTS))
        found = {
            f"{ours}.{kind}": state[f"{theirs}.{kind}"]
            for ours, theirs in _layer_names(spec)
            for kind in ("weight", "bias")
            if f"{theirs}.{kind}" in state
        }
        return {key: document[key] for key in KEPT}, found, document["digest"]
    return None
