#!/usr/bin/env python
"""Open a page on the runs below runs/ and models/: see them train, draw, compare, edit. Or export a run as a Space.

The page listens on this machine alone, unless --host or --share say otherwise.
"""

import src.threads  # noqa: F401 (before torch, which reads it at its start)
import argparse
from pathlib import Path

from src.app.page import serve
from src.app.places import ROOTS, Places
from src.app.space import write_space
from src.config import CommandLine, UserError, quoted, run_script
from src.runtime.launch import start_sampling


def arguments() -> argparse.Namespace:
    parser = CommandLine(
        description=__doc__, epilog="example: python app.py      or: python app.py --export digits_space runs/digits_ldm"
    )
    parser.add_argument("runs", nargs="*", metavar="RUN", help="runs besides those, such as me/cats on the hub")
    parser.add_argument("--host", help="the address to listen on (default 127.0.0.1, which only this machine reaches)")
    parser.add_argument("--port", type=int, help="(default: the first that is free from 7860 on)")
    parser.add_argument("--share", action="store_true", help="also make a public link, through a server of Gradio")
    parser.add_argument("--auth", metavar="USER:PASSWORD", help="ask visitors for these")
    parser.add_argument("--browser", action="store_true", help="open the page in a browser")
    parser.add_argument("--device", help="cpu, cuda, mps (default: the best there is)")
    parser.add_argument("--export", metavar="DIR", help="write a folder that is a Space of one RUN, and serve nothing")
    return parser.parse_args()


def read_login(text: str | None) -> tuple[str, str] | None:
    """User and password of --auth, if it is given; a UserError for other text."""
    if text is None:
        return None
    user, _, password = text.partition(":")
    if not user or not password:
        raise UserError("--auth: give it as USER:PASSWORD, both not empty")
    return user, password


def main() -> None:
    args = arguments()
    login = read_login(args.auth)
    if args.port is not None and not 1 <= args.port <= 65535:
        raise UserError(f"--port {args.port}: ports go from 1 to 65535")
    _, device = start_sampling(args.device)
    if args.export is not None:
        if len(args.runs) != 1:
            raise UserError("--export DIR writes a Space of one run: name it, as in --export DIR runs/digits_ldm")
        paths = write_space(Path(args.export), args.runs[0], device)
        print(f"{args.export}: {', '.join(path.name for path in paths)}")
        print(f"  try it with: cd {quoted(args.export)} && python app.py; then push the folder to a Space of yours")
        return
    places = Places(ROOTS, tuple(args.runs))
    options = {"host": args.host, "port": args.port, "share": args.share, "auth": login, "browser": args.browser}
    with serve(places, device, **options, device_word=args.device) as page:
        page.block_thread()


if __name__ == "__main__":
    run_script(main)
