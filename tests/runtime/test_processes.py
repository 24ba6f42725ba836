"""The processes of a run, as accelerate knows them."""

import subprocess
import sys
from pathlib import Path

import torch

from src.runtime.processes import CpuCopy, broadcast, process_state, ranks_of, ranks_of_machine

MODULES = ("launch", "processes", "stopping", "sharding", "stream", "failures", "checkpoint", "precision")


def test_one_process_has_all_ranks() -> None:
    state = process_state()
    assert (state.num_processes, state.process_index) == (1, 0) and broadcast("chosen") == "chosen"
    assert ranks_of(state)[:2] == ranks_of_machine()[:2] == (0, 1)


def test_a_copy_on_the_cpu_has_the_values() -> None:
    values = torch.arange(3.0)
    assert CpuCopy(values).wait() is values  # nothing is copied where it is there already


def test_accelerate_is_not_imported_before_it_is_needed() -> None:
    code = f"import sys; {'; '.join(f'import src.runtime.{name}' for name in MODULES)}; assert 'accelerate' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
