"""Which version of this package makes a result."""

import importlib.metadata
import pathlib
import subprocess

DISTRIBUTION = "dar-jax"


def version() -> str | None:
    """The version of the installed package; None if it runs without being installed."""
    try:
        return importlib.metadata.version(DISTRIBUTION)
    except importlib.metadata.PackageNotFoundError:
        return None


def revision() -> str | None:
    """The commit of the checkout that the package runs from, "-dirty" if it was changed since.

    None if it does not run from a checkout, or git is not installed.
    """
    root = pathlib.Path(__file__).parents[2]
    if not (root / ".git").exists():
        return None
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return done.stdout.strip() or None
