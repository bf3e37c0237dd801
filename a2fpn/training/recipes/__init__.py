"""Recipes in the package: settings of training runs, by name."""

from __future__ import annotations

from pathlib import Path

from a2fpn._registry import did_you_mean
from a2fpn.errors import ConfigError, ExistingFileError

FOLDER = Path(__file__).parent
AUTO = FOLDER / "auto.yaml"
"""Data-independent settings of a run whose other settings are chosen from the data."""


def list_recipes() -> dict[str, str]:
    """Names of the recipes with descriptions.

    Example:
        >>> list_recipes()["nuclei_lite0"].partition(":")[0]
        'Instance segmentation of cell nuclei'
    """
    paths = sorted(FOLDER.glob("*.yaml"))
    return {path.stem: path.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ") for path in paths}


def find_recipe(name: str) -> Path:
    """Find the file of a recipe.

    Args:
        name: A path, or a name of :func:`list_recipes`, also with the folder ``recipes/`` and ``.yaml``.

    Raises:
        ConfigError: If there is none, with the closest name.
    """
    path = Path(name)
    if path.is_file():
        return path
    packaged = FOLDER / f"{path.stem if path.suffix == '.yaml' else path.name}.yaml"
    if packaged.is_file() and path.parent.name in ("", "recipes"):
        return packaged
    raise ConfigError(f"{name!r} is neither a file nor a recipe. {did_you_mean(path.stem, list_recipes())}")


def copy_recipe(name: str, file: Path) -> None:
    """Copy a recipe for editing.

    Raises:
        ConfigError: If there is no such recipe.
        ExistingFileError: If the file exists.
    """
    text = find_recipe(name).read_text(encoding="utf-8")
    try:
        with file.open("x", encoding="utf-8") as copy:
            copy.write(text)
    except FileExistsError:
        raise ExistingFileError(f"{file} exists already; choose another name.") from None
