"""Several scripts one after the other in the same processes, each as if it were launched alone: their imports are paid once.

python -m torch.distributed.run --standalone --nproc-per-node 2 tests/in_turn.py FOLDER

FOLDER/commands.json lists the words of each. What rank R says in command N, and its status, go to FOLDER/N_R.json.
"""

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path

from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from tests.conftest import Finished, launch, run_in_process


def launch_in_turn(folder: Path, *commands: tuple[str | Path, ...], processes: int = 2) -> list[Finished]:
    """Run these scripts of the repository to their ends, in one launch."""
    folder.mkdir(parents=True)
    (folder / "commands.json").write_text(json.dumps([[str(word) for word in words] for words in commands]))
    done = launch(__file__, folder, processes=processes, timeout=900)
    assert done.status == 0, done.all
    return [_finished(folder, number, processes) for number in range(len(commands))]


def _finished(folder: Path, number: int, processes: int) -> Finished:
    """What all ranks said together, and the worst of their statuses."""
    ranks = [json.loads((folder / f"{number}_{rank}.json").read_text()) for rank in range(processes)]
    return Finished(max(rank["status"] for rank in ranks), *("".join(rank[key] for rank in ranks) for key in ("out", "err")))


def main() -> None:
    folder = Path(sys.argv[1])
    PartialState.destroy_process_group = lambda *_: None  # the next script finds the group; a second one would wait for ever
    for number, words in enumerate(json.loads((folder / "commands.json").read_text())):
        done = run_in_process(*words)
        (folder / f"{number}_{os.environ['RANK']}.json").write_text(json.dumps(asdict(done)))


if __name__ == "__main__":
    main()
