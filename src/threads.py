"""How torch starts. A script imports this first: torch's OpenMP reads once, at its start, how its threads wait for each other.

A thread that waits spins first, and sleeps then. The default spins so long that a run keeps a third of its speed beside one
busy process and nearly stops beside two; to sleep at once costs a small network a quarter of its speed
(benchmarks/results/threads.md). Whoever sets one of the variables decides otherwise. The number of threads stays as it is,
since it decides how sums are rounded.
"""

import gc
import os

SPIN_COUNT = "700"
CHOSEN_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")

if not any(name in os.environ for name in CHOSEN_BY):
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT

gc.disable()  # what torch loads stays until the end; to look through it for garbage again and again takes a tenth of its start
import torch  # noqa: E402, F401

gc.freeze()
gc.enable()
