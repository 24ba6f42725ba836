"""What `make lint` checks beside ruff and pyright: imports go down, names are the field's words, README.md is short.

python tests/house.py              check all, and print the lines of src/ by folder
python tests/house.py FILE ...     check the words of these files alone
"""

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
README_BYTES = 9_000

# A folder of src/ imports only from those above it in this list.
LAYERS = (
    "threads",
    "config",
    "storage",
    "diffusion",
    "models",
    "data",
    "metrics",
    "losses",
    "figures",
    "runtime",
    "runs",
    "sampling",
    "api",
    "evaluation",
    "report",
    "training",
    "doctor",
    "interop",
    "app",
    "__main__",
)

# Names that say nothing of what they hold, or that the field calls otherwise. No variable, argument, function or class has one.
NO_NAMES = frozenset(
    {
        "again",
        "agree",
        "alone",
        "asked",
        "attempt",
        "damage",
        "drawn",
        "draws",
        "ends",
        "fed",
        "found",
        "free",
        "here",
        "home",
        "judge",
        "kept",
        "leaves",
        "look",
        "made",
        "mine",
        "more",
        "own",
        "passing",
        "said",
        "seen",
        "settle",
        "settle_reducer",
        "told",
        "trained",
        "won",
        "wrong",
    }
)
NO_PARTS = frozenset({"picture", "pictures"})  # nor a part of a name between underscores, or of a class's name
# (file, name) that stay as they are: a name that is a key of a file or of an output, which never changes.
EXEMPT = {
    ("src/doctor/health.py", "found"),  # a key of `doctor.py --json`
}


def module_of(path: Path) -> str:
    """The dotted name of a file in src/, without src; of a folder's `__init__` that of the folder."""
    parts = path.relative_to(ROOT / "src").with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def arrows() -> set[tuple[str, str]]:
    """(module, module that it imports) inside src/, imports inside functions too."""
    files = {module_of(path): path for path in (ROOT / "src").rglob("*.py")}
    pairs = set()
    for module, path in files.items():
        package = module if path.name == "__init__.py" else module.rpartition(".")[0]
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.ImportFrom) or not node.level:
                continue
            base = package.split(".") if package else []
            above = base[: len(base) - (node.level - 1)]
            target = ".".join([*above, *([node.module] if node.module else [])])
            for alias in node.names:
                full = f"{target}.{alias.name}" if target else alias.name
                pairs.add((module, full if full in files else target))
    return pairs


def imports_that_go_up() -> set[tuple[str, str]]:
    """Those between folders that LAYERS forbids."""
    place = {folder: i for i, folder in enumerate(LAYERS)}
    return {(a, b) for a, b in arrows() if a and b and place[a.split(".")[0]] < place[b.split(".")[0]]}


def circles() -> list[str]:
    """Imports that go in a circle, between files."""
    below: dict[str, set[str]] = {}
    for module, target in arrows():
        below.setdefault(module, set()).add(target)
    lines: list[str] = []
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        if module in path:
            lines.append(" -> ".join([*path[path.index(module) :], module]))
        elif module not in done:
            for target in sorted(below.get(module, ())):
                visit(target, (*path, module))
            done.add(module)

    for module in sorted(below):
        visit(module, ())
    return lines


def bound_names(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of all that a file binds: assignments, arguments, functions, classes, fields and attributes of self."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id == "self"
        ):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ExceptHandler) and node.name:
            yield node.lineno, node.name
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def parts_of(name: str) -> set[str]:
    """The words of snake_case and of CamelCase, in small letters."""
    spaced = "".join(f" {letter}" if letter.isupper() else letter for letter in name.replace("_", " "))
    return {word.lower() for word in spaced.split()}


def is_refused(name: str) -> bool:
    return name.lower().strip("_") in NO_NAMES or bool(parts_of(name) & NO_PARTS)


def word_faults(path: Path) -> list[str]:
    """A line for each bound name of a file that is on the list."""
    file, bound = path.relative_to(ROOT).as_posix(), sorted(set(bound_names(ast.parse(path.read_text()))))
    return [f"{file}:{line}: {name}" for line, name in bound if is_refused(name) and (file, name) not in EXEMPT]


def checked_files() -> list[Path]:
    """Those whose names are checked."""
    paths = [*ROOT.glob("*.py")]
    for folder in ("src", "tests", "benchmarks"):
        paths += (ROOT / folder).rglob("*.py")
    return sorted(paths)


def lines_by_folder() -> Counter[str]:
    """Lines of src/, templates too."""
    count: Counter[str] = Counter()
    for path in (ROOT / "src").rglob("*"):
        if path.is_file() and path.suffix in (".py", ".html", ".css", ".js", ".md"):
            count[path.relative_to(ROOT / "src").parts[0]] += len(path.read_text().splitlines())
    return count


def main(arguments: list[str]) -> int:
    faults = [fault for path in map(Path, arguments) for fault in word_faults(path.resolve())]
    if not arguments:
        faults = [f"import goes up: {a} -> {b}" for a, b in sorted(imports_that_go_up())]
        faults += [f"imports in a circle: {line}" for line in circles()]
        faults += [f"another name, please: {fault}" for path in checked_files() for fault in word_faults(path)]
        size = len((ROOT / "README.md").read_bytes())
        faults += [f"README.md has {size} bytes, more than {README_BYTES}"] if size > README_BYTES else []
        lines = lines_by_folder()
        for folder, count in sorted(lines.items()):
            print(f"{count:6d}  src/{folder}")
        print(f"{sum(lines.values()):6d}  src/")
    for fault in faults:
        print(fault, file=sys.stderr)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
