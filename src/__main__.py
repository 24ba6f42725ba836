"""The scripts of an installed package as one command, without a clone: `atelier train-ldm -cfg configs/digits_ldm.json` does
what `python train_ldm.py -cfg configs/digits_ldm.json` does in one.

Several processes: accelerate launch -m atelier train-ldm -cfg ...; where a message says `python sample.py`, `atelier sample` is
meant.
"""

import ast
import difflib
import importlib.metadata
import importlib.util
import shutil
import sys
import typing
from pathlib import Path
from types import ModuleType


def _load(name: str, file: Path, folders: list[str] | None = None) -> ModuleType:
    """The module of a file, imported under a name."""
    spec = importlib.util.spec_from_file_location(name, file, submodule_search_locations=folders)
    assert spec is not None and spec.loader is not None
    module = sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# The scripts import the package by the name `src`. Every process that imports this file gives it that name; so does the worker
# of a loader, which a Mac spawns.
if "src" not in sys.modules:
    _load("src", Path(__file__).with_name("__init__.py"), [str(Path(__file__).resolve().parent)])
from src.config import SCRIPTS, UserError, quoted, run_script  # noqa: E402 (only now is there a `src`)

if str(SCRIPTS) not in sys.path:
    sys.path.append(str(SCRIPTS))  # where doctor.py imports the training scripts from


def list_scripts() -> dict[str, Path]:
    """{"train-ldm": its file} of all scripts."""
    return {file.stem.replace("_", "-"): file for file in sorted(SCRIPTS.glob("*.py"))}


def write_configs(folder: Path) -> None:
    """Copy all configs and their schemas into `folder`/configs; a UserError where that is there."""
    place, staged = folder / "configs", folder / ".configs.part"
    if place.exists():
        raise UserError(f"{place} is there already; give another folder, or move it away")
    folder.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(staged, ignore_errors=True)
    shutil.copytree(SCRIPTS / "configs", staged, ignore=shutil.ignore_patterns("__pycache__"))
    staged.rename(place)
    print(f"{place} has {len(list(place.glob('*.json')))} configs; begin in {quoted(folder)} with")
    print("  atelier train-vae -cfg configs/digits_vae.json\n  atelier train-ldm -cfg configs/digits_ldm.json")


def describe() -> str:
    """What there is to type."""
    scripts = list_scripts()
    lines = [
        f"  {name:<17} {(ast.get_docstring(ast.parse(file.read_bytes())) or '').splitlines()[0]}"
        for name, file in scripts.items()
    ]
    init = f"  {'init DIR':<17} Write the configs into DIR/configs, to begin with."
    return "\n".join([*(__doc__ or "").splitlines(), "", "atelier COMMAND --help says more of each:", *lines, init])


def run() -> int | None:
    """The command of sys.argv."""
    name, rest = (sys.argv[1], sys.argv[2:]) if len(sys.argv) > 1 else ("--help", [])
    scripts = list_scripts()
    if name in ("-h", "--help"):
        print(describe())
    elif name == "--version":
        print(f"atelier {importlib.metadata.version('atelier')}")
    elif name == "init" and len(rest) == 1 and not rest[0].startswith("-"):
        write_configs(Path(rest[0]))
    elif name == "init":
        raise UserError("atelier init takes one folder: atelier init DIR")
    elif (name := name.removesuffix(".py").replace("_", "-")) in scripts:
        sys.argv = [f"atelier {name}", *rest]
        run_script(_load(f"atelier.scripts.{scripts[name].stem}", scripts[name]).main)
    else:
        near = difflib.get_close_matches(name, [*scripts, "init"], 1)
        hint = f"; did you mean {near[0]}?" if near else ""
        raise UserError(f"there is no command {name!r}{hint} (atelier --help lists what there is)")
    return 0


def main() -> typing.NoReturn:
    """The console script `atelier`."""
    run_script(run)


if __name__ == "__main__":
    # So a worker that is spawned runs this file by its path, which gives it the package under the name `src`, too.
    __spec__ = None
    main()
