"""Arms of the comparison: what differs between two trainings."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Sequence
from dataclasses import dataclass

from a2fpn.detectors import DETECTORS


@dataclass(frozen=True)
class Arm:
    """One side of a comparison.

    Args:
        name: In tables, and as the name of folders.
        settings: What differs from the recipe, as ``section.key=value`` of the training command.
        control: Name of the arm it is compared with.
    """

    name: str
    settings: tuple[str, ...]
    control: str = "fpn"

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ValueError(f"An arm is named with letters, digits and . _ -, got {self.name!r}.")
        if bad := [setting for setting in self.settings if not re.match(r"\w+(\.\w+)+=", setting)]:
            raise ValueError(f"Settings of arm {self.name!r} must read section.key=value, got {bad[0]!r}.")


def _neck(name: str, **arguments: object) -> tuple[str, ...]:
    extra = (f"model.overrides.neck_args.{key}={value}" for key, value in arguments.items())
    return (f"model.overrides.neck={name}", *extra)


ARMS = {
    arm.name: arm
    for arm in (
        Arm("fpn", _neck("fpn")),
        Arm("pafpn", _neck("pafpn")),
        Arm("carafe_fpn", _neck("carafe_fpn")),
        Arm("dysample_fpn", _neck("dysample_fpn")),
        Arm("a2fpn_lite", _neck("a2fpn_lite")),
        Arm("a2fpn", _neck("a2fpn")),
        Arm("pafpn_mgc_dot", _neck("pafpn_mgc", attention="dot")),
        Arm("pafpn_mgc_scaled_dot", _neck("pafpn_mgc", attention="scaled_dot")),
        Arm("pafpn_mgc_scaled_cosine", _neck("pafpn_mgc", attention="scaled_cosine")),
        Arm("pafpn_mgc_no_orthogonal", _neck("pafpn_mgc", orthogonal_weight=0)),
    )
}


def parse_arm(text: str) -> Arm:
    """Read an arm from ``NAME=setting,setting``; a comma in a value is kept.

    Raises:
        ValueError: If it reads otherwise.

    Example:
        >>> parse_arm("own=model.overrides.neck=a2fpn,model.overrides.anchor_sizes=[[8],[16]]").settings
        ('model.overrides.neck=a2fpn', 'model.overrides.anchor_sizes=[[8],[16]]')
    """
    name, _, settings = text.partition("=")
    if not settings:
        raise ValueError(f"An arm reads NAME=section.key=value,section.key=value, got {text!r}.")
    return Arm(name, tuple(re.split(r",(?=\w+(?:\.\w+)+=)", settings)))


def choose(names: Sequence[str], further: Sequence[Arm], *, control: str) -> list[Arm]:
    """Return the named arms and the further ones, the control first.

    Raises:
        ValueError: For an unknown name, a name given twice, or a control that is not there.
    """
    if unknown := [name for name in names if name not in ARMS]:
        raise ValueError(f"Unknown arm {unknown[0]!r}; there are {', '.join(ARMS)}, and --arm defines others.")
    arms = [*(ARMS[name] for name in names), *further]
    taken = [arm.name for arm in arms]
    if twice := {name for name in taken if taken.count(name) > 1}:
        raise ValueError(f"Arm {min(twice)!r} is given twice.")
    if control not in taken:
        raise ValueError(f"The control {control!r} is not among the arms {', '.join(taken)}; name another --control.")
    arms.sort(key=lambda arm: arm.name != control)
    return [dataclasses.replace(arm, control=control) for arm in arms]


def with_detectors(arms: Sequence[Arm], detectors: Sequence[str], model: str) -> list[Arm]:
    """Return every arm with every detector; each is compared with the control of its own detector.

    Args:
        arms: The arms.
        detectors: Names of registered detectors; none keeps that of the recipe.
        model: The recipe's model, of which the detector is replaced.

    Raises:
        ValueError: For an unknown detector, or a model whose name does not begin with one.

    Example:
        >>> arm, = with_detectors([ARMS["fpn"]], ["htc"], "maskrcnn_fpn_lite0")
        >>> arm.name, arm.settings[-1], arm.control
        ('htc.fpn', 'model.name=htc_fpn_lite0', 'htc.fpn')
    """
    if not detectors:
        return list(arms)
    if unknown := [name for name in detectors if name not in DETECTORS]:
        raise ValueError(f"Unknown detector {unknown[0]!r}; there are {', '.join(DETECTORS)}.")
    own = max((name for name in DETECTORS if model.startswith(f"{name}_")), key=len, default=None)
    if own is None:
        raise ValueError(f"The recipe's model {model!r} does not begin with a detector's name; leave --detectors out.")
    rest = model.removeprefix(own)
    return [
        Arm(f"{name}.{arm.name}", (*arm.settings, f"model.name={name}{rest}"), f"{name}.{arm.control}")
        for name in detectors
        for arm in arms
    ]
