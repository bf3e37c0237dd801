"""Validation of arguments with a fixed set of choices."""

from __future__ import annotations

from collections.abc import Sequence

from a2fpn.errors import ConfigError


def check_choice(argument: str, value: object, allowed: Sequence[str]) -> None:
    """Check that an argument is one of the allowed choices.

    Args:
        argument: Its name in the message.
        value: Value of the argument.
        allowed: The choices.

    Raises:
        ValueError: For any other value; the message lists the choices.

    Example:
        >>> check_choice("pool", "max", ("mean", "attention"))
        Traceback (most recent call last):
        a2fpn.errors.ConfigError: Unknown pool='max'; expected one of mean, attention.
    """
    if value not in allowed:
        raise ConfigError(f"Unknown {argument}={value!r}; expected one of {', '.join(allowed)}.")
