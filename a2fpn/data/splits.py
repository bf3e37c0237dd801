"""Deterministic splits by name, independent of the order of files and the machine."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from a2fpn.errors import DataError


def assign_splits(
    names: Sequence[str], *, val: float, test: float = 0.0, group_by: str = "", seed: int = 0
) -> list[str]:
    r"""Assign images to ``"train"``, ``"val"`` and ``"test"``, all images of a group to the same.

    Groups are ordered by the SHA-256 of their name and the seed. In this order each is assigned to validation if that
    brings it closer to the share of images, then likewise to testing; the rest is for training.

    Args:
        names: Names of the images.
        val: Share of the images for validation, in (0, 1).
        test: Share for testing, in [0, 1).
        group_by: A regular expression whose first capturing group (or whole match) is the name of the group, such as
            ``site_(\d+)``. Empty puts each image into its own group.
        seed: Seed of the split.

    Returns:
        The split of each image.

    Raises:
        DataError: For shares out of range, an expression that is invalid or does not match a name, or a single group.

    Example:
        >>> assign_splits(["site_1/a", "site_1/b", "site_2/a"], val=0.3, group_by=r"site_(\d+)")
        ['train', 'train', 'val']
    """
    if not (0 < val < 1 and 0 <= test < 1 and val + test < 1):
        raise DataError(f"val must lie in (0, 1), test in [0, 1), their sum below 1; got {val} and {test}.")
    groups = _groups(names, group_by)
    members: dict[str, int] = {}
    for group in groups:
        members[group] = members.get(group, 0) + 1
    if len(members) < 2:
        raise DataError(
            f"{len(names)} images are {len(members)} group{'s' * (len(members) != 1)}; a split needs two or more. "
            "Omit val, or change group_by."
        )
    ranked = sorted(members, key=lambda group: hashlib.sha256(f"{seed}\0{group}".encode()).digest())
    split_of: dict[str, str] = {}
    for split, share in (("val", val), ("test", test)):
        wanted = share * len(names)
        left = [group for group in ranked if group not in split_of]
        taken = 0
        for group in left[: len(left) - 1] if wanted else ():
            size = members[group]
            if abs(taken + size - wanted) < abs(taken - wanted):
                split_of[group] = split
                taken += size
        if wanted and not taken and len(left) > 1:  # each split gets at least one
            split_of[min(left, key=lambda group: members[group])] = split
    return [split_of.get(group, "train") for group in groups]


def _groups(names: Sequence[str], pattern: str) -> list[str]:
    if not pattern:
        return list(names)
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise DataError(f"group_by {pattern!r} is not a valid regular expression ({error}).") from None
    matches = [expression.search(name) for name in names]
    if not any(matches):
        raise DataError(f"group_by {pattern!r} matches no image name; the first is {names[0] if names else 'none'!r}.")
    return [
        name if match is None else f"\0{match.group(1 if expression.groups else 0)}"
        for name, match in zip(names, matches, strict=True)
    ]
