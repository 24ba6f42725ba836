"""The YAML that the network of an IADB checkpoint was built from, whatever its author called the keys."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pydantic

from ..config import UserError, read_text

SECTIONS = (
    *("model", "params", "unet", "unet_config", "model_config", "network", "net", "denoiser", "backbone", "init_args"),
    *("data", "dataset", "datamodule", "image", "config", "hparams", "hyper_parameters"),
)
SYNONYMS = {"num_res_blocks": "layers_per_block", "blocks": "layers_per_block"}
LATENT = ("latent", "latents", "use_latents", "vae_latents", "use_vae")
AUTOENCODER = re.compile(r"(vae|autoencoder|first_stage)(_(model|config|path|name|dir|folder|ckpt))?")
SIZES = ("resolution", "image_size", "sample_size")  # the first two of images, the last of what the network sees
TYPE_WORDS = {int: "a whole number", float: "a number", bool: "true or false", str: "a word", list: "a list"}
TYPES: dict[str, type] = {
    **dict.fromkeys((*SIZES, "in_channels", "out_channels", "layers_per_block", "num_class_embeds", "time_embedding_dim"), int),
    **dict.fromkeys(("attention_head_dim", "norm_num_groups", "attn_norm_num_groups", "downsample_padding"), int),
    **dict.fromkeys(("norm_eps", "dropout", "freq_shift", "mid_block_scale_factor"), float),
    **dict.fromkeys(("add_attention", "flip_sin_to_cos", "center_input_sample"), bool),
    **dict.fromkeys(("block_out_channels", "down_block_types", "up_block_types"), list),
    **dict.fromkeys(("resnet_time_scale_shift", "downsample_type", "upsample_type", "act_fn", "mid_block_type"), str),
    **dict.fromkeys(("time_embedding_type", "class_embed_type"), str),
}


@dataclass
class YamlFacts:
    """What a YAML says: `facts` by the names of diffusers, each with its dotted key in the file; among them `latents`, whether
    the network works on latents; the words of what it gives as an autoencoder; and the keys that are ignored."""

    file: str = ""
    facts: dict[str, tuple[str, Any]] = field(default_factory=dict)
    autoencoder: list[str] | None = None
    ignored: list[str] = field(default_factory=list)

    def convert(self, key: str, value: Any, kind: type) -> Any:
        """The value as `kind`; a UserError where it is of another type. YAML reads 1e-5 as a word."""
        if key.rpartition(".")[2] in SIZES and isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        try:
            return pydantic.TypeAdapter(kind).validate_python(value, strict=kind is not float or not isinstance(value, str))
        except pydantic.ValidationError:
            raise UserError(f"{self.file}: {key} is {value!r}, and should be {TYPE_WORDS[kind]}") from None

    def add(self, name: str, key: str, value: Any) -> None:
        """Keep a fact; a UserError where the file says it twice and differently."""
        first_key, first_value = self.facts.setdefault(name, (key, value))
        if first_value != value:
            raise UserError(f"{self.file}: {first_key} is {first_value} and {key} is {value}; leave one out")

    def entries(self, section: dict[Any, Any], path: str, visited: set[int]) -> Iterator[tuple[str, str, Any]]:
        """(dotted key, name, value) of all that a section and the sections in it say; `path` is its key, with a dot at its
        end."""
        visited.add(id(section))  # a YAML alias may stand for a section around it
        base, mult = section.get("base_channels", section.get("channels")), section.get("channel_mult")
        key, used = f"{path}channel_mult", ()
        if isinstance(base, int) and isinstance(mult, list):
            used = ("base_channels", "channels", "channel_mult")
            yield key, "channels", [int(base * self.convert(key, times, float)) for times in mult]
        for name, value in section.items():
            if name in SECTIONS and isinstance(value, dict):
                yield from () if id(value) in visited else self.entries(value, f"{path}{name}.", visited)
            elif name not in used:
                yield f"{path}{name}", str(name), value


def read_yaml(path: str | Path) -> YamlFacts:
    """What the YAML says: its keys at the top, and in sections such as model, params or data. The keys are those of
    UNet2DModel's config; `resolution` or `image_size` of the images; `blocks` or `num_res_blocks`; `channels`, a list of
    widths, or a number (or `base_channels`) with `channel_mult`; `attention`, the levels that have it, counted from 0;
    `vae_latents`, `latents` or `use_latents`; and `vae`, `autoencoder` or `first_stage`. A UserError says why it is no such
    file, and what it says twice and differently."""
    import yaml

    text = read_text(path)
    try:
        raw = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}: not valid YAML{line}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a YAML mapping, KEY: VALUE")
    facts = YamlFacts(str(path))
    for key, name, value in facts.entries(raw, "", set()):
        fact = SYNONYMS.get(name, name)
        if name == "channels" and isinstance(value, list):
            facts.add("block_out_channels", key, value)
        elif name == "attention" and isinstance(value, list) and all(type(level) is int for level in value):
            facts.add(name, key, sorted(set(value)))
        elif name in LATENT and value is not None:
            facts.add("latents", key, bool(value))
        elif AUTOENCODER.fullmatch(name):
            facts.autoencoder = facts.autoencoder if value is None or value is False else _words(value)
        elif fact not in TYPES:
            facts.ignored.append(key)
        elif value is not None or fact == "attention_head_dim":  # there null is a choice: one head
            facts.add(fact, key, None if value is None else facts.convert(key, value, TYPES[fact]))
    return facts


def _words(value: Any, depth: int = 4) -> list[str]:
    """Every word in a value, whatever is around it."""
    if isinstance(value, str):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [word for entry in entries for word in _words(entry, depth - 1)] if depth else []
