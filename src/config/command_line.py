"""The command line of the training scripts."""

import argparse
import json
from typing import Any

import pydantic


def json_schema(root: type) -> str:
    """The JSON Schema of a root config, as text, for editors."""
    schema = pydantic.TypeAdapter(root).json_schema()
    schema["properties"]["$schema"] = {"type": "string"}
    return json.dumps(schema, indent=1) + "\n"


class _PrintSchema(argparse.Action):
    def __init__(self, *args: Any, root: type, **kwargs: Any) -> None:
        super().__init__(*args, nargs=0, help="print the JSON Schema of the config and stop", **kwargs)
        self.root = root

    def __call__(self, parser: argparse.ArgumentParser, *_: Any) -> None:
        print(json_schema(self.root), end="")
        parser.exit()


def training_arguments(root: type, description: str, *, default: str) -> argparse.ArgumentParser:
    """The command line that all training scripts share."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-cfg", "--config", metavar="FILE", default=default, help=f"the JSON config (default {default})")
    parser.add_argument("--set", metavar="KEY=VALUE", action="append", default=[], help="change one key; repeatable")
    parser.add_argument("--run-dir", metavar="DIR", help="the folder of the run (default runs/NAME)")
    parser.add_argument(
        "--continue-as",
        metavar="NAME",
        help="go on from the run's newest checkpoint in a new run beside it: with another rate, or longer",
    )
    parser.add_argument("--dry-run", action="store_true", help="measure data, speed, memory, disk and time; write nothing")
    parser.add_argument("--verify-resume", action="store_true", help="after a change of the code: does a run go on to the bit?")
    parser.add_argument("--schema", action=_PrintSchema, root=root)
    return parser
