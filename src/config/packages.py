"""Packages that only some uses need. They are imported there; where one is missing, one line says how to install it."""

import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import version

from . import UserError

INSTALLED_AS = {"google": "google-cloud-storage", "sklearn": "scikit-learn"}  # others have hyphens for underscores


class MissingPackage(UserError):
    """A package is missing. The user can install it; images and curves beside a run are left out without it."""


def _missing(why: str, *packages: str, problem: str = "", cure: str = "pip install") -> MissingPackage:
    word = "the package" if len(packages) == 1 else "the packages"
    return MissingPackage(f"{why} needs {word} {' and '.join(packages)}{problem}: {cure} {' '.join(packages)}")


def installed_as(module: str) -> str:
    """The name by which pip installs the package of a module."""
    top = module.partition(".")[0]
    return INSTALLED_AS.get(top, top.replace("_", "-"))


def is_installed(module: str) -> bool:
    """Whether a module can be found; it is not imported."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):  # not even the package that it lies in; or a stand-in that somebody has put there
        return sys.modules.get(module) is not None


def ask_for(why: str, *modules: str) -> None:
    """A UserError where a module that `why` needs later is missing: before hours of work, not after.

    torchvision is imported, because only that shows whether its compiled operators load beside the installed torch.
    """
    missing = [installed_as(module) for module in modules if not is_installed(module)]
    if missing:
        raise _missing(why, *missing)
    if "torchvision" in modules:
        try:
            importlib.import_module("torchvision")
        except RuntimeError as error:
            if "torchvision::nms" not in str(error):  # the first operator that it looks for
                raise
            problem = f", and the installed one was compiled for another torch than {version('torch')}"
            raise _missing(why, "torchvision", problem=problem, cure="pip install --upgrade torch") from None


@contextmanager
def needed(why: str, *modules: str) -> Iterator[None]:
    """Around imports of these modules: a UserError names what is missing or cannot be imported, and what needs it."""
    ask_for(why, *modules)
    try:
        yield
    except ModuleNotFoundError as error:
        raise _missing(why, installed_as(error.name or modules[0])) from None
    except ImportError as error:
        problem = f", which cannot be imported ({(str(error).strip().splitlines() or [type(error).__name__])[0][:200]})"
        package, cure = installed_as(error.name or modules[0]), "pip install --force-reinstall"
        raise _missing(why, package, problem=problem, cure=cure) from None
