"""The proof on two processes with each thing broken that it checks: rank 0 prints {scenario: rows} as JSON.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/training/sabotage.py FOLDER [bf16]

With a word behind the folder only the gradients, sound, in that precision.
"""

import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist

ROOT = Path(__file__).resolve().parent.parent.parent
sys.path.insert(0, str(ROOT))
import ddpm_accelerate  # noqa: E402
from src.config import load as load_config  # noqa: E402
from src.doctor import proof  # noqa: E402
from src.training.state import TrainState  # noqa: E402

RANK = int(os.environ["RANK"])
SMOKE = load_config(ROOT / "configs/smoke/ddpm.json", ddpm_accelerate.Config)
network, load, all_reduce, update = proof.Bench.network, TrainState.load, dist.all_reduce, ddpm_accelerate.update


def other_gradients(bench: proof.Bench) -> torch.nn.Module:
    """On rank 1 one parameter's are a thousandth larger."""
    built = network(bench)
    if RANK == 1:
        next(built.parameters()).register_hook(lambda gradient: gradient * 1.001)
    return built


def other_parameter(optimizer: Any, *rest: Any) -> None:
    """On rank 1 a weight is changed a little in each step."""
    update(optimizer, *rest)
    if RANK == 1:
        with torch.no_grad():
            optimizer.param_groups[0]["params"][0].flatten()[0] += 1e-9


def without_a_moment(state: TrainState, folder: Path) -> None:
    """On rank 1 one of the moments is lost."""
    load(state, folder)
    if RANK == 1:
        optimizer = state._pairs["model", "optimizer"][1]
        next(iter(optimizer.state.values()))["exp_avg"].zero_()


def wrong_sum(values: torch.Tensor, *args: object, **options: object) -> object:
    """Of many numbers one is too large."""
    done = all_reduce(values, *args, **options)  # pyright: ignore[reportArgumentType]
    if values.numel() > 1000:
        values[7] += 1
    return done


def wrong_ones(values: torch.Tensor, *args: object, **options: object) -> object:
    """So is the sum of a single one."""
    done = all_reduce(values, *args, **options)  # pyright: ignore[reportArgumentType]
    return values.add_(1) if values.numel() == 1 else done


def hanging(bench: proof.Bench) -> proof.Verdict:
    """Rank 1 does not come."""
    dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1), dist.group.WORLD)
    if RANK == 1:
        time.sleep(5)
        os._exit(0)
    return proof.first_collective(bench)


def shared_folder(folder: Path) -> Path:
    """A new one for each scenario, with the same name on both ranks."""
    global number
    number += 1
    return folder / f"scenario_{number}"


number = 0


def run(folder: Path, stages: str, cfg: Any = None) -> list[dict]:
    rows: list[proof.Row] = []
    chosen = {name: stage for name, stage in proof.STAGES.items() if name in stages.split(", ")}
    with patch.object(proof, "STAGES", chosen):
        try:
            proof.prove(cfg, SMOKE, shared_folder(folder), rows.append)
        except proof.Broken as error:
            print(f"broken: {error}", file=sys.stderr)
    return [row._asdict() for row in rows]


def main() -> None:
    folder, verdicts, steps = Path(sys.argv[1]), {}, "ten steps, resume"
    if len(sys.argv) > 2:
        verdicts[sys.argv[2]] = run(folder, "gradients", SimpleNamespace(mixed_precision=sys.argv[2]))
        if RANK == 0:
            print(json.dumps(verdicts), flush=True)
        return
    with patch.object(proof.Bench, "network", other_gradients):
        verdicts["gradients"] = run(folder, "gradients")

    def never_averaged(accelerator: Any, model: Any, *_: object) -> Any:
        return accelerator.no_sync(model)

    with patch.object(proof, "accumulating", never_averaged), patch.object(ddpm_accelerate, "accumulating", never_averaged):
        verdicts["not averaged"] = run(folder, "gradients, ten steps")
    with patch.object(ddpm_accelerate, "update", other_parameter):
        verdicts["parameter"] = run(folder, "ten steps")
    with patch.object(TrainState, "load", without_a_moment):
        verdicts["moment"] = run(folder, steps)
    with patch.object(dist, "all_reduce", wrong_sum):
        verdicts["sum"] = run(folder, "all-reduce")
    with patch.object(dist, "all_reduce", wrong_ones):
        verdicts["ones"] = run(folder, "first collective")
    proof.STAGES = {"first collective": hanging}
    verdicts["hang"] = run(folder, "first collective")
    print(json.dumps(verdicts), flush=True)
    os._exit(0)


if __name__ == "__main__":
    main()
