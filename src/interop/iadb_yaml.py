"""The YAML that the network of an IADB checkpoint was built from, whatever its author called the keys."""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

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
    """What a YAML says: `facts` by the names of diffusers, each with its dotted key in the file; `latent` likewise whether the
    network works on latents; the words of what it gives as an autoencoder; and the keys that are ignored."""

    file: str = ""
    facts: dict[str, tuple[str, Any]] = field(default_factory=dict)
    latent: tuple[str, bool] | None = None
    autoencoder: list[str] | None = None
    ignored: list[str] = field(default_factory=list)

    def add(self, name: str, key: str, value: Any) -> None:
        """Keep a fact; a UserError where the file says it twice and differently."""
        first_key, first_value = self.facts.setdefault(name, (key, value))
        if first_value != value:
            raise UserError(f"{self.file}: {first_key} is {first_value} and {key} is {value}; leave one out")

    def convert(self, key: str, value: Any, kind: type) -> Any:
        """The value as `kind`; a UserError where it is of another type. YAML reads 1e-5 as a word."""
        if key.rpartition(".")[2] in SIZES and isinstance(value, list) and value and value.count(value[0]) == len(value):
            value = value[0]
        try:
            if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
                return float(value)
        except ValueError:
            pass
        if type(value) is not kind:
            raise UserError(f"{self.file}: {key} is {value!r}, and should be {TYPE_WORDS[kind]}")
        return value

    def add_section(self, section: dict[Any, Any], path: str, visited: set[int]) -> None:
        """Keep what a section and the sections in it say; `path` is its dotted key, with a dot at its end."""
        if id(section) in visited:  # a YAML alias may stand for a section around it
            return
        visited.add(id(section))
        base, mult = section.get("base_channels", section.get("channels")), section.get("channel_mult")
        used: tuple[str, ...] = ()
        if isinstance(base, int) and isinstance(mult, list):
            key, used = f"{path}channel_mult", ("base_channels", "channels", "channel_mult")
            self.add("block_out_channels", key, [int(base * self.convert(key, times, float)) for times in mult])
        for name, value in ((str(name), value) for name, value in section.items()):
            key, fact = f"{path}{name}", SYNONYMS.get(name, name)
            if name in used:
                continue
            if name == "channels" and isinstance(value, list):
                self.add("block_out_channels", key, value)
            elif name == "attention" and isinstance(value, list) and all(type(level) is int for level in value):
                self.add(name, key, sorted(set(value)))
            elif name in LATENT and value is not None:
                self.latent = (key, bool(value))
            elif AUTOENCODER.fullmatch(name):
                self.autoencoder = self.autoencoder if value is None or value is False else _words(value)
            elif fact in TYPES:
                if value is not None or fact == "attention_head_dim":  # there null is a choice: one head
                    self.add(fact, key, value if value is None else self.convert(key, value, TYPES[fact]))
            elif name in SECTIONS and isinstance(value, dict):
                self.add_section(value, f"{key}.", visited)
            else:
                self.ignored.append(key)


def read_yaml(path: str | Path) -> YamlFacts:
    """What the YAML says: its keys at the top, and in sections such as model, params or data.

    The keys are those of UNet2DModel's config; `resolution` or `image_size` of the images; `blocks` or `num_res_blocks`;
    `channels`, a list of widths, or a number (or `base_channels`) with `channel_mult`; `attention`, the levels that have it,
    counted from 0; `vae_latents`, `latents` or `use_latents`; and `vae`, `autoencoder` or `first_stage`. A UserError says why
    it is no such file, and what it says twice and differently.
    """
    try:
        raw = yaml.safe_load(read_text(path))
    except UserError:
        raise
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        raise UserError(f"{path}: not valid YAML{line}") from None
    if not isinstance(raw, dict):
        raise UserError(f"{path}: not a YAML mapping, KEY: VALUE")
    facts = YamlFacts(str(path))
    facts.add_section(raw, "", set())
    return facts


def _words(value: Any, depth: int = 4) -> list[str]:
    """Every word in a value, whatever is around it."""
    if isinstance(value, str):
        return [value]
    entries = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    return [word for entry in entries for word in _words(entry, depth - 1)] if depth else []
