"""Every shipped config made small, and the values of configs that a test of resuming has to cover."""

import dataclasses
import functools
import json
import types
import typing
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

import ddpm_accelerate
import train_classifier
import train_iadb
import train_ldm
import train_vae
from src.config import OpenUnion, validate
from tests.conftest import ROOT

SCRIPTS: dict[str, Any] = {
    script.__name__: script for script in (train_vae, train_ldm, ddpm_accelerate, train_iadb, train_classifier)
}
CONFIGS = sorted(path for path in (ROOT / "configs").rglob("*.json") if "schemas" not in path.parts)
STEPS = 8  # of a small run; of an autoencoder STAGE_STEPS in each stage
STAGE_STEPS = 3
WEIGHTS = "WEIGHTS"  # stands for a file of random weights, which the test makes
AUTOENCODER = "AUTOENCODER"  # stands for a small autoencoder with random weights, likewise


class Value(NamedTuple):
    """One of the values that a field of a config class can have: a word, true or false, or whether it is set."""

    owner: str
    field: str
    value: str


# Values that no test of resuming covers, and why (a source, besides, is opened anew and held to its fingerprint; tests/data).
# "*" stands for all classes, all fields of a class, all values of a field.
EXEMPT = {
    Value("*", "mixed_precision", "fp16"): "it needs a GPU",
    Value("*", "mixed_precision", "auto"): "a run with it is one with no or bf16; tests/runtime/test_precision.py",
    Value("*", "cpu_threads", "None"): "then the machine decides, and the same bits are promised for equal numbers of threads",
    Value("*", "init_from", "set"): "it is read before the first step alone",
    Value("train_iadb", "pairs", "set"): "pairs are a cache that is made before the first step; tests/test_iadb_scripts.py",
    Value("train_iadb", "steps", "None"): "a run without end has no end to compare; tests/test_iadb_scripts.py stops one",
    Value("Span", "*", "*"): "a length becomes steps before the run starts; tests/test_config.py",
    Value("LabelTable", "*", "*"): "it belongs to a source, and labels are part of its fingerprint; tests/data/test_layout.py",
    Value("ScanConfig", "*", "*"): "it says which images a source has, and these are its fingerprint; tests/data",
    Value("SamplerConfig", "*", "*"): "it draws previews, which change nothing that is trained",
    Value("PreviewConfig", "*", "*"): "previews change nothing that is trained",
    Value("PathPreviewConfig", "*", "*"): "previews change nothing that is trained",
    Value("ReconstructConfig", "*", "*"): "previews change nothing that is trained",
    Value("QualityConfig", "*", "*"): "it measures samples, which changes nothing that is trained",
    Value("*", "space", "latents"): "latents of conditions are a cache that is made before the first step; tests/runs",
    Value("*", "space", "pixels"): "latents of conditions are a cache that is made before the first step; tests/runs",
    Value("*", "space", "set"): "latents of conditions are a cache that is made before the first step; tests/runs",
    Value("EdgesCondition", "*", "*"): "edges are made of an image without a random number, and grey stands for them",
    Value("PairedCondition", "side", "*"): "it belongs to the data, and partners are part of its fingerprint; tests/data",
    Value("PairedCondition", "column", "*"): "it belongs to the data, and partners are part of its fingerprint; tests/data",
    Value("PairedCondition", "channels", "*"): "it belongs to the data, and partners are part of its fingerprint; tests/data",
    Value("PerceptualConfig", "weights", "*"): "a file of the same weights",
    Value("TeacherConfig", "weights", "*"): "a file of the same weights",
    Value("PerceptualConfig", "network", "alex"): "it is frozen, and LPIPS on vgg stands for it",
    Value("PerceptualConfig", "network", "squeeze"): "it is frozen, and LPIPS on vgg stands for it",
    Value("GuardConfig", "rollback", "True"): "tests/test_latent_scripts.py goes back, and tests/test_soak.py kills such runs",
}


def _is_free(owner: Any, name: str) -> bool:
    field = owner.__pydantic_fields__[name]
    return bool((field.json_schema_extra or {}).get("free"))


def name_of(owner: Any) -> str:
    """A config class by its name; of the five root configs, which are all called Config, the script."""
    return owner.__module__ if owner.__name__ == "Config" else owner.__name__


@functools.cache
def hints_of(owner: Any) -> dict[str, Any]:
    """The types of the fields of a config class, by name."""
    return typing.get_type_hints(owner, include_extras=True)


def possible(hint: Any, owner: str = "", field: str = "") -> Iterator[Value]:
    """All values of the fields below a type that may change a result."""
    origin = get_origin(hint)
    if origin is Annotated:
        union = next((extra for extra in get_args(hint) if isinstance(extra, OpenUnion)), None)
        for part in union.classes if union is not None else get_args(hint)[:1]:
            yield from possible(part, owner, field)
    elif origin in (Union, types.UnionType):
        for part in get_args(hint):
            if part is type(None):
                yield from (Value(owner, field, "None"), Value(owner, field, "set"))
            else:
                yield from possible(part, owner, field)
    elif origin is Literal:
        yield from (Value(owner, field, str(word)) for word in get_args(hint))
    elif origin in (tuple, list):
        yield from possible(get_args(hint)[0], owner, field)
    elif hint is bool:
        yield from (Value(owner, field, "False"), Value(owner, field, "True"))
    elif dataclasses.is_dataclass(hint):
        for name, below in hints_of(hint).items():
            if not _is_free(hint, name):
                yield from possible(below, name_of(hint), name)


@functools.cache
def _words_of(owner: Any) -> dict[str, set[str]]:
    """What each field of a config class can be itself, without the fields of the classes below it."""
    return {name: {entry.value for entry in possible(hint) if not entry.owner} for name, hint in hints_of(owner).items()}


def values_of(cfg: Any) -> set[Value]:
    """Those that a config has."""
    values = set()
    for name, known in _words_of(type(cfg)).items():
        value = getattr(cfg, name)
        if _is_free(type(cfg), name):
            continue
        for each in value if isinstance(value, tuple | list) else (value,):
            if "set" in known:
                values.add(Value(name_of(type(cfg)), name, "None" if each is None else "set"))
            if str(each) in known:
                values.add(Value(name_of(type(cfg)), name, str(each)))
            if dataclasses.is_dataclass(each):
                values |= values_of(each)
    return values


def is_exempt(value: Value) -> bool:
    owner, field, word = value
    forms = [(owner, field, word), (owner, field, "*"), (owner, "*", "*"), ("*", field, word)]
    return owner.endswith("Source") or any(form in EXEMPT for form in forms)


@functools.cache
def to_cover() -> frozenset[Value]:
    everything = {value for script in SCRIPTS.values() for value in possible(script.Config)}
    return frozenset(value for value in everything if not is_exempt(value))


# ---------------------------------------------------------------------------------------------- small configs


@dataclasses.dataclass(frozen=True)
class Job:
    """A training to resume: the shipped config that it was made of (with changes, where shipped ones lack a value), small."""

    name: str
    script: str
    raw: dict[str, Any]

    @functools.cached_property
    def cfg(self) -> Any:
        return validate(SCRIPTS[self.script].Config, self.raw, origin=self.name)

    @property
    def cost(self) -> float:
        """How long it takes, roughly: an autoencoder has stages, and few processors have units for bf16."""
        cost = 3.0 if self.script == "train_vae" else 1.5 if "autoencoder" in self.raw else 1.0
        cost += 10.0 if self.raw.get("perceptual", {}).get("weights") and self.raw.get("mixed_precision") == "bf16" else 0.0
        return cost + (_levels(self.raw) > 4) + 0.5 * (self.raw.get("mixed_precision") == "bf16")

    @functools.cached_property
    def values(self) -> set[Value]:
        return values_of(self.cfg)


def script_of(path: Path) -> str:
    return Path(json.loads(path.read_text())["$schema"]).stem


def small(path: Path, changes: Mapping[str, Any] = types.MappingProxyType({}), name: str = "") -> Job:
    """A config made small by overrides of sizes, data, lengths and weights alone; `changes` (dotted keys) come after."""
    raw, script = json.loads(path.read_text()), script_of(path)
    raw |= {"cpu_threads": 1, "workers": 0, "batch_size": 4, "micro_batch_size": 2}
    raw["log"] = {"every": 1, "trackers": []}
    raw["checkpoint"] = {"every": 1, "every_minutes": None, "keep": 99}
    image = raw.get("image")
    if image is not None:
        image["size"] = _size(raw, script, path)
        raw["data"] = _small_source(raw["data"], image["size"], "train")
        held_out = raw.get("held_out", 0.0)
        raw["held_out"] = held_out if held_out == 0 else 0.25
        if isinstance(held_out, dict | list):
            raw["held_out"] = _small_source(held_out, image["size"], "test")
        if "source" in raw and raw["source"]["source"] != "gaussian":
            raw["source"] = _small_source(raw["source"], image["size"], "test")
    if raw.get("autoencoder"):
        raw["autoencoder"], raw["encode_batch_size"] = AUTOENCODER, 4
    if "size" in raw.get("condition", {}):
        raw["condition"]["size"] = raw["image"]["size"] // 2
    for key in ("model", "classifier"):
        if key in raw:
            raw[key] |= _small_network(raw[key])
    for key in ("optimizer", "discriminator_optimizer"):
        if "schedule" in raw.get(key, {}):
            raw[key]["schedule"] |= _short_schedule(raw[key]["schedule"])
    for key in ("process", "noise"):
        if "steps" in raw.get(key, {}).get("schedule", {}):
            raw[key]["schedule"]["steps"] = 50
    if script == "train_vae":
        raw["discriminator"] = raw.get("discriminator", {}) | {"base_channels": 8}
        raw["perceptual"] = raw.get("perceptual", {})
        if raw["perceptual"].get("network", "vgg") == "vgg":
            raw["perceptual"]["weights"] = WEIGHTS
        raw["stages"] = [_small_stage(stage, json.loads(path.read_text())["image"]["size"], raw) for stage in raw["stages"]]
    else:
        raw["steps"] = STEPS
    if "export_every" in raw:
        raw["export_every"] = STEPS // 2
    _small_preview(raw.setdefault("preview", {}), script, points=image is None)
    for key, value in changes.items():
        below, (*parents, last) = raw, key.split(".")
        for parent in parents:
            below = below[int(parent)] if isinstance(below, list) else below.setdefault(parent, {})
        below[int(last) if isinstance(below, list) else last] = value
    return Job(name or path.stem if path.parent.name != "smoke" else name or f"smoke_{path.stem}", script, raw)


def _levels(raw: dict[str, Any]) -> int:
    network = raw.get("model", raw.get("classifier", {}))
    return len(network.get("widths", network.get("channel_mult", (1, 2, 2, 4))))


def _size(raw: dict[str, Any], script: str, path: Path) -> int:
    """The smallest that the networks take."""
    if script == "train_vae":
        return 16 if path.parent.name == "smoke" else 32
    factor = 2 ** (_levels(raw) - 1)
    return max(16, 2 * factor) if raw.get("autoencoder") else max(16, factor)


def _small_source(source: Any, size: int, split: str) -> Any:
    if isinstance(source, list):
        return [_small_source(each, size, word) for each, word in zip(source, ("train", "test"), strict=False)]
    return {"source": "shapes", "count": 24, "size": size, "split": split}


def _small_network(network: dict[str, Any]) -> dict[str, Any]:
    if network.get("kind") == "mlp":
        return {"width": 24, "layers": 2}
    if "widths" in network:
        return {"widths": [16] * (len(network["widths"]) - 1) + [32], "blocks": 1}
    mults = network.get("channel_mult", [1, 2, 2, 4])
    changes = {"base_channels": 16, "blocks": 1, "norm_groups": 8}
    changes["channel_mult"] = [1 if mult == min(mults) else 2 for mult in mults]
    return changes | ({"head_channels": 16} if network.get("head_channels") else {})


def _short_schedule(schedule: dict[str, Any]) -> dict[str, Any]:
    short = {"warmup": 2} if schedule.get("warmup") is not None else {}
    return short | ({"milestones": [2, 5]} if "milestones" in schedule else {})


def _small_stage(stage: dict[str, Any], size: int, raw: dict[str, Any]) -> dict[str, Any]:
    small_stage = stage | {"steps": STAGE_STEPS}
    if stage.get("image_size"):
        small_stage["image_size"] = raw["image"]["size"] * stage["image_size"] // size
    for key, value in (("batch_size", 2), ("micro_batch_size", 1)):
        if stage.get(key):
            small_stage[key] = value
    if stage.get("adversarial", {}).get("start_step"):
        small_stage["adversarial"] = stage["adversarial"] | {"start_step": 1}
    if "schedule" in stage:
        small_stage["schedule"] = stage["schedule"] | _short_schedule(stage["schedule"])
    return small_stage


def _small_preview(preview: dict[str, Any], script: str, *, points: bool) -> None:
    preview["every"] = STEPS // 2
    if script == "train_classifier":
        preview |= {"num_measured": 4, "levels": 2}
    elif script == "train_iadb":
        preview |= {"num_samples": 16 if points else 2, "calls": [1, 2]} | ({"batch_size": 16} if points else {})
    elif script != "train_vae":
        preview |= {"num_samples": 4, "batch_size": 4}
        preview["sampler"] = preview.get("sampler", {"solver": "ddim"}) | {"steps": 2}
    if preview.get("quality"):
        preview["quality"] |= {"every": STEPS // 2, "num_samples": 10}


# ---------------------------------------------------------------------------------------------- what shipped configs lack

_LEARNED = {"process.variance": "learned", "process.target": "eps"}
_PLAIN = {"dtype": "float64", "deterministic": True, "balance_classes": True}
_MULTISTEP = {"kind": "multistep", "milestones": [2, 5]}
_TIMES = {"kind": "second_moment", "history": 2}
_ASPECT = {"min_images": 4, "max_ratio": 2.0}


def _of_many_shapes(split: str = "train") -> list[dict[str, Any]]:
    sizes = ((16, 12), ([12, 20], 8), ([20, 12], 12))
    return [{"source": "shapes", "count": count, "size": size, "split": split} for size, count in sizes]


def _drawn_from(kind: str, **options: Any) -> dict[str, Any]:
    """The changes for a condition."""
    of_preview = {"preview.quality": None, "preview.sheets": "one"}
    return {"condition": {"kind": kind, **options}, "condition_dropout": 0.3, **of_preview}


def _variants() -> Iterator[Job]:
    def smoke(kind: str, number: int, changes: Mapping[str, Any]) -> Job:
        return small(ROOT / "configs" / "smoke" / f"{kind}.json", changes, f"{kind}_{number}")

    linear = {"optimizer.schedule": {"kind": "linear", "warmup": 2}, "optimizer.muon": {}, "ema.snapshot_every": 4}
    wsd = {"kind": "wsd", "cooldown": 0.5}
    yield smoke("ddpm", 1, _PLAIN | linear | {"data": _of_many_shapes(), "image.aspect": _ASPECT} | {
        "process.schedule": {"kind": "quadratic", "steps": 50}, "process.variance": "small", "model.downsample": "max",
        "model.mid_attention": "linear", "times": {"kind": "logit_normal", "shift": {"base": 192}}, "preview.sampler.steps": 5,
        "process.loss.weighting": {"kind": "p2"}, "process.loss.contrast": {"group": 2}, "noise": {"candidates": 3},
        "augmentation": {"probability": 0.5},
        "optimizer.schedule": wsd | {"warmup": 2}, "stop": {"kind": "held_out", "every": 1, "patience": 2},
    })  # fmt: skip
    yield smoke("ddpm", 2, {
        "process.schedule": {"kind": "sigmoid", "steps": 50, "zero_terminal_snr": True}, "process.target": "v",
        "optimizer.schedule": _MULTISTEP | {"warmup": 2}, "class_conditional": True, "mixed_precision": "bf16",
        "augmentation": {"turns": True, "probability": 0.5},
    } | _drawn_from("low", size=8, noise=0.5))  # fmt: skip
    yield smoke("ddpm", 3, _LEARNED | {
        "process.schedule": {"kind": "cosine", "steps": 50}, "process.loss": {"kind": "kl"}, "times": _TIMES,
        "optimizer.schedule": _MULTISTEP,
    } | _drawn_from("mask"))  # fmt: skip
    yield smoke("ddpm", 4, _LEARNED | _drawn_from("grey") | {
        "process.loss": {"kind": "rescaled_kl"}, "process.schedule.steps": 100,
    })  # fmt: skip
    yield smoke("ddpm", 5, {
        "process.schedule": {"kind": "cosine", "steps": 50, "zero_terminal_snr": True}, "process.target": "x0",
        "optimizer.schedule": {"kind": "one_cycle", "anneal_strategy": "linear", "three_phase": True},
        "process.time_input": {"kind": "t", "scale": 1000.0}, "process.loss.weighting": {"kind": "edm"},
    } | _drawn_from("paired", side="left", channels=1))  # fmt: skip
    turned = {"equivariance": {"probability": 0.9}, "alignment": {"adaptive": True}}
    stages = [
        {
            "steps": STAGE_STEPS,
            "schedule": wsd | {"curve": "cosine"},
            "reconstruction": "mse",
            "equivariance": {"turns": False},
        },
        {"steps": STAGE_STEPS, "adversarial": {"weight": 0.1, "adaptive": True}} | turned,
    ]
    vq = {"kind": "vq", "codes": 16}
    plain = {
        "dtype": "float64",
        "deterministic": True,
        "stages": stages,
        "teacher.network": "random",
        "image.channels": 1,
        "image.crop": "random",
    }
    buckets = {"data": _of_many_shapes(), "image.aspect": _ASPECT}
    yield smoke("vae", 1, plain | linear | buckets | {
        "model.bottleneck": vq, "model.attention": ["none", "full"], "model.mid_attention": "none", "model.head_channels": 8,
        "model.downsample": "max", "model.upsample": "bilinear",
    })  # fmt: skip
    strided = {"model.downsample": "conv", "model.upsample": "transposed"}
    yield smoke("vae", 2, strided | {"mixed_precision": "bf16", "discriminator_optimizer.muon": {}})
    vgg = {"perceptual": {"network": "vgg", "weights": WEIGHTS}, "image.size": 32, "teacher.network": "random"}
    of_vgg = [stages[1] | {"perceptual": {}, "alignment": {}}]
    yield smoke("vae", 3, vgg | {"model.mid_attention": "full", "stages": of_vgg})
    yield smoke("ldm", 1, _PLAIN | linear | buckets | {
        "times": _TIMES, "image.channels": 1, "class_conditional": True,
        "augmentation": {"flips": False, "probability": 0.5, "copies": 2},
    })  # fmt: skip
    yield smoke("ldm", 2, _drawn_from("mask", copies=2) | {
        "process.schedule": {"kind": "blend"}, "process.target": "blend", "times": {"kind": "logit_normal"},
        "process.loss.contrast": {"group": 2, "weight": 0.1}, "noise": {"candidates": 4},
    })  # fmt: skip
    yield smoke("iadb", 1, _PLAIN | linear | buckets | {
        "source": _of_many_shapes("test"), "image.aspect": _ASPECT | {"step": 4}, "class_conditional": True,
        "image.channels": 1, "times": {"kind": "uniform", "shift": {"base": 64}},
        "condition": {"kind": "low", "size": 8}, "condition_dropout": 0.3, "augmentation": {"probability": 0.5},
    })  # fmt: skip
    same = {"source": "shapes", "count": 24, "size": 16, "split": "train"}
    yield smoke("iadb", 2, {"source": same, "coupling": "paired", "held_out": 0.0})
    encoder = {"classifier.downsample": "average", "classifier.pool": "adaptive", "classifier.attention": ["none", "linear"]}
    yield smoke("classifier", 1, _PLAIN | linear | encoder | buckets | {
        "classifier.embedding": "add", "classifier.mid_attention": "linear", "noise.time_input": {"kind": "t", "scale": 1000.0},
    })  # fmt: skip
    yield smoke("classifier", 2, {
        "classifier.downsample": "conv", "classifier.pool": "spatial", "classifier.mid_attention": "none",
        "classifier.head_channels": None, "classifier.num_heads": 4, "times": _TIMES, "mixed_precision": "bf16",
        "optimizer.schedule": wsd | {"curve": "linear"},
    })  # fmt: skip
    for number, downsample in enumerate(("conv_right", "max"), 3):
        yield smoke("classifier", number, {"classifier.downsample": downsample, "classifier.split_qkv_first": True})


@functools.cache
def jobs() -> tuple[Job, ...]:
    """All trainings that are resumed: every shipped config, and variants with what these lack."""
    return (*(small(path) for path in CONFIGS), *_variants())
