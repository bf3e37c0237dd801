"""Comparison of categories between a file, a model and another file."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

from a2fpn._text import count_of, shorten
from a2fpn.data.annotation_table import AnnotationTable
from a2fpn.data.check.problem import names_of, used_categories
from a2fpn.data.check.report import Finding, few
from a2fpn.data.document import CocoDocument


def compare_with_model(model: Mapping[int, str], file: CocoDocument, table: AnnotationTable) -> Iterator[Finding]:
    """Compare the categories of the data with those of a model."""
    yield from _compare("the model", model, file.name, names_of(file), used_categories(file, table))
    unseen = model.keys() - file.categories.keys()
    if unseen and len(unseen) < len(model):
        message = f"{count_of(len(unseen), 'class')} of the model not in {file.name}: {named(model, unseen)}."
        yield Finding(
            "note", "class-not-in-data", message, "On this data they can only be false positives.", len(unseen)
        )


def compare_with_other(
    file: CocoDocument, table: AnnotationTable, other: CocoDocument, other_table: AnnotationTable
) -> Iterator[Finding]:
    """Compare the categories of the training and the validation file, and their classes with objects."""
    used, other_used = used_categories(file, table), used_categories(other, other_table)
    yield from _compare(file.name, names_of(file), other.name, names_of(other), other_used)
    shared = file.categories.keys() & other.categories.keys()
    for code, here, there, missing in (
        ("class-not-learned", other, file, (other_used - used) & shared),
        ("class-not-measured", file, other, used - other_used),
    ):
        if missing and shared:
            names = named(names_of(here), missing)
            message = (
                f"{count_of(len(missing), 'class')} with objects in {here.name} and none in {there.name}: {names}."
            )
            yield Finding(
                "warning", code, message, "Split the images so that both files hold each class.", len(missing)
            )


def _compare(
    source: str, known: Mapping[int, str], target: str, categories: Mapping[int, str], used: frozenset[int]
) -> Iterator[Finding]:
    """Check that the categories of ``target`` are among those of ``source``, under the same names."""
    advice = "Give both the same ids and names."
    if source == "the model":
        advice += " To train on other classes, check against the architecture without its weights' tag."
    others = {key: name for key, name in categories.items() if known.get(key, name).casefold() != name.casefold()}
    if others and known:
        pairs = (f"{key} is {known[key]!r} for {source} and {others[key]!r} in {target}" for key in others)
        message = f"Ids that mean different classes, {len(others)} of {len(categories)}: {few(pairs, len(others))}."
        # The same names with other ids: every metric would be that of another class.
        swapped = {name.casefold() for name in others.values()} <= {name.casefold() for name in known.values()}
        message += _shift(known, categories)
        yield Finding("error", "category-names", message, advice, len(others), fatal=swapped)
    if known and categories and not known.keys() & categories.keys():
        message = f"{target} has no category id in common with {source}: {few(categories, len(categories))} against "
        message += f"{few(known, len(known))}.{_shift(known, categories)}"
        yield Finding("error", "no-common-category", message, advice, len(categories), fatal=True)
    elif unknown := used - known.keys():
        message = f"{target} has objects of {count_of(len(unknown), 'class')} that {source} doesn't know: "
        message += f"{named(categories, unknown)}.{_shift(known, categories)}"
        yield Finding("error", "unknown-class", message, advice, len(unknown), fatal=True)


def _shift(known: Mapping[int, str], categories: Mapping[int, str]) -> str:
    """Explain ids that would agree with another start of counting."""
    ids = {name.casefold(): key for key, name in known.items()}
    shifts = Counter(key - ids[name.casefold()] for key, name in categories.items() if name.casefold() in ids)
    shift, count = shifts.most_common(1)[0] if shifts else (0, 0)
    return f" {count} of the names agree with ids {abs(shift)} {'higher' if shift > 0 else 'lower'}." if shift else ""


def named(categories: Mapping[int, str], ids: Iterable[int]) -> str:
    """Format ids and names of categories for a message."""
    ordered = sorted(ids)
    return few((f"{key} ({shorten(repr(categories[key]), 40)})" for key in ordered), len(ordered))
