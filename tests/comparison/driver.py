"""python tests/comparison/driver.py NAME CHECKOUT COMMANDS RESULTS: many command lines of one checkout in one process.

`tests/compare_commits.py` starts this file, under a launcher too. COMMANDS is a JSON list of command lines, each a list whose
first word is a script's name without `.py`. RESULTS becomes a JSON object that has, for each command line (its words with
spaces between them), its error or "". NAME stands before what is printed. Nothing in here knows the package: the scripts, their
`main` and their options are all that every commit has.
"""

import gc
import importlib
import io
import json
import os
import signal
import sys
import time
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

RANK, WORLD = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Tee(io.StringIO):
    """Text that is remembered and written to a file as well, which says where a command stands when it hangs."""

    def __init__(self, file: Any) -> None:
        super().__init__()
        self.file = file

    def write(self, text: str) -> int:
        self.file.write(text)
        self.file.flush()
        return super().write(text)


def run_main(script: str, arguments: list[str]) -> str:
    """Run a script's main to its end and return its error, or nothing."""
    sys.argv = [f"{script}.py", *arguments]
    try:
        status = importlib.import_module(script).main()
        return f"exit status {status}" if status else ""
    except SystemExit as error:
        return f"exit status {error.code}" if error.code else ""
    except Exception as error:
        if type(error).__name__ != "UserError":
            import traceback

            traceback.print_exc()
        return f"{type(error).__name__}: {error}"


def forget_state() -> None:
    """Bring accelerate, torch and the signals back to where a new process has them."""
    import torch
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)
    torch.use_deterministic_algorithms(False)
    for number in (signal.SIGTERM, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    gc.collect()


def open_store(number: int) -> Any:
    """Where the processes of this command meet, instead of the launcher's store, which still holds the addresses of the command
    before. It must outlive the command, since one process ends earlier than another."""
    from torch.distributed import TCPStore

    path, store = Path(f"port_{os.getppid()}_{number}"), None
    if RANK == 0:
        store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        path.with_suffix(".new").write_text(str(store.port))
        path.with_suffix(".new").rename(path)
    while not path.exists():
        time.sleep(0.02)
    os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": path.read_text()}
    return store


def check_origin(checkout: Path) -> None:
    """Stop where a module of the package, or a script, was loaded from elsewhere (an installed copy, say)."""
    names = {path.stem for path in checkout.glob("*.py")} | {"src", "atelier"}
    for name, module in list(sys.modules.items()):
        file = getattr(module, "__file__", None)
        if name.partition(".")[0] in names and file is not None and checkout not in Path(file).resolve().parents:
            sys.exit(f"{name} was loaded from {file}, not from {checkout}")


def run_command(script: str, arguments: list[str], log: TextIO) -> str:
    """Run a command with its output in the log, and keep the JSON that it prints beside its files; return its error."""
    output = Tee(log)
    print(f"\n$ {script} {' '.join(arguments)}", file=log, flush=True)
    with redirect_stdout(output), redirect_stderr(log):
        error = run_main(script, arguments)
        if WORLD == 1:
            forget_state()
    if "--json" in arguments and not error and RANK == 0:
        out = Path(arguments[arguments.index("--out") + 1])
        (out / "stdout.json").write_text(output.getvalue().strip().splitlines()[-1])
    log.flush()
    return error


def run_forked(script: str, arguments: list[str], log: TextIO) -> str:
    """Run a command in a copy of this process, which then ends at once: what a group of processes leaves in one that lives on
    blocks the next command. The imports are this process's, so they cost once."""
    result = Path(f"error_{os.getppid()}_{RANK}.txt")
    importlib.import_module(script)
    result.unlink(missing_ok=True)
    child = os.fork()
    if not child:
        try:
            result.write_text(run_command(script, arguments, log))
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    return result.read_text() if result.exists() else "the process ended without a result"


def main() -> None:
    side, *words = sys.argv[1:]
    checkout, commands, results = (Path(word).resolve() for word in words)
    sys.path[0] = str(checkout)
    errors: dict[str, str] = {}
    stores: list[Any] = []
    screen, log = sys.stderr, open(f"{side}_rank{RANK}.log", "w")  # noqa: SIM115 (loggers keep it to the end)
    for number, (script, *arguments) in enumerate(json.loads(commands.read_text())):
        line, began = " ".join([script, *arguments]), time.monotonic()
        if WORLD > 1:
            stores.append(open_store(number))
        errors[line] = (run_forked if WORLD > 1 else run_command)(script, arguments, log)
        check_origin(checkout)
        if RANK == 0:
            results.write_text(json.dumps(errors))
            print(f"{side} {time.monotonic() - began:6.1f} s  {line}  {errors[line]}", file=screen, flush=True)
        if errors[line] and WORLD > 1:
            sys.exit(1)  # the other processes may wait for this one in the middle of something


if __name__ == "__main__":
    main()
