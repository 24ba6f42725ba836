"""How a processor's threads wait for each other. A script imports this before torch, whose OpenMP reads it once, at its start.

A thread that waits spins first, and sleeps then. The default spins so long that a run keeps a third of its speed beside one
busy process and nearly stops beside two; to sleep at once costs a small network a quarter of its speed
(benchmarks/results/threads.md). Whoever sets one of the variables decides otherwise. The number of threads stays as it is,
since it decides how sums are rounded.
"""

import os

SPIN_COUNT = "700"
CHOSEN_BY = ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "KMP_BLOCKTIME")

if not any(name in os.environ for name in CHOSEN_BY):
    os.environ["GOMP_SPINCOUNT"] = SPIN_COUNT
