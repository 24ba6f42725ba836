"""Every random number is a function of words such as (seed, purpose, step), and of no number that was drawn before."""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def _key(words: Sequence[int | str]) -> bytes:
    return hashlib.blake2b(repr(tuple(words)).encode(), digest_size=16).digest()


def generator(*words: int | str) -> np.random.Generator:
    """A Philox generator that belongs to these words."""
    return np.random.Generator(np.random.Philox(key=int.from_bytes(_key(words), "little")))


def torch_seed(*words: int | str) -> int:
    """A 63-bit seed that belongs to these words."""
    return int.from_bytes(_key(words)[:8], "little") >> 1


def normal(shape: Sequence[int], *words: int | str, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Standard normal numbers that belong to these words, drawn on the device (on a CPU by Philox, whose seed is not cut)."""
    if device.type == "cuda":
        rng = torch.Generator(device).manual_seed(torch_seed(*words))
        return torch.randn(tuple(shape), generator=rng, device=device, dtype=dtype)
    wide = np.float64 if dtype == torch.float64 else np.float32
    return torch.from_numpy(generator(*words).standard_normal(tuple(shape), dtype=wide)).to(device, dtype)


def uniforms(rng: np.random.Generator, count: int) -> Tensor:
    """`count` numbers in [0, 1), float64 on the CPU."""
    return torch.from_numpy(rng.random(count))


def noise_of(seed: int, indices: Sequence[int], shape: Sequence[int], step: int = 0, sweep: int = 0) -> Tensor:
    """Standard normal noise, (len(indices), *shape) float32 on the CPU: a function of (seed, image, step, sweep) alone.

    Philox (Salmon et al. 2011) with (seed, image) as its key, and the step and how often it was taken before in its counter.
    """
    counter = np.array([0, 0, sweep, step], dtype=np.uint64)
    bits = (np.random.Philox(key=np.array([seed, i], dtype=np.uint64), counter=counter) for i in indices)
    noise = [np.random.Generator(of_image).standard_normal(tuple(shape), dtype=np.float32) for of_image in bits]
    return torch.from_numpy(np.stack(noise))
