"""Third-party packages that register necks, detectors and backbones.

An installed package declares an entry point in the group :data:`GROUP` whose value names the module to import; it is
imported when a2fpn itself does not know a requested name. Other modules are imported by the user.
"""

from __future__ import annotations

import importlib
import logging
import sys
from importlib.metadata import entry_points

from a2fpn.errors import ConfigError

GROUP = "a2fpn.plugins"

_logger = logging.getLogger(__name__)
_tried: set[str] = set()


def load_plugins() -> bool:
    """Import the modules of installed plugins, each once; one that fails is logged with its traceback.

    Returns:
        Whether a module was newly imported.
    """
    fresh = [point for point in entry_points(group=GROUP) if point.value not in _tried]
    for point in fresh:
        _tried.add(point.value)
        try:
            point.load()
        except Exception:
            _logger.warning("The plugin %s (%s) can't be imported.", point.name, point.value, exc_info=True)
    return bool(fresh)


def import_package(name: str) -> None:
    """Import a module named on the command line, also from the working directory.

    Raises:
        ConfigError: If there is no such module.
    """
    if "" not in sys.path:
        sys.path.insert(0, "")
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{name}.".startswith(f"{error.name}."):
            raise  # one of its own imports is missing
        raise ConfigError(f"--import {name}: module {error.name!r} not found.") from error
