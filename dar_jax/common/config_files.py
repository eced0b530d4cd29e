"""Config files by name: those of `configs/`, which the installed package brings along."""

import pathlib
import sys
import types

from dar_jax.common import addresses

NAME = "configs"
"""Folder of the config files, and the name by which they import each other."""
PACKAGE = pathlib.Path(__file__).parents[1]
DIRECTORY = PACKAGE / NAME if (PACKAGE / NAME).is_dir() else PACKAGE.parent / NAME
"""Inside the package where it is installed, beside it in a checkout."""


def find(argument: str) -> str:
    """Turn the value of `--config` into one whose file exists, if there is any.

    A file of that name comes first. Where there is none, `mnist.py:dar` and `configs/mnist.py:dar`
    mean the package's own. `from configs import ...` in it then finds its neighbours, and the
    package's own files.

    Args:
        argument: FILE, or FILE:VARIANT.

    Raises:
        ValueError: it is an address, where no programs are read from.
    """
    addresses.check_path(argument, "--config")
    name, colon, variant = argument.partition(":")
    path = pathlib.Path(name)
    own = DIRECTORY / path.name
    if not path.exists() and str(path.parent) in (".", NAME) and own.is_file():
        path = own
    package = types.ModuleType(NAME)
    package.__path__ = [str(path.absolute().parent), str(DIRECTORY)]
    sys.modules.setdefault(NAME, package)
    return f"{path}{colon}{variant}" if path == own else argument
