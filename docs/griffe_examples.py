"""Extension of Griffe: sections named "Example" are read as "Examples", whose prompts are shown as code."""

import re
from typing import Any

import griffe


class Examples(griffe.Extension):
    """Renames the sections before docstrings are parsed."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rename them in one docstring."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"(?m)^Example:$", "Examples:", obj.docstring.value)
