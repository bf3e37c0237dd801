"""Rows of a part as plain text, short enough for the end of a log."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

_HIDDEN = ("trace", "outputs", "range")


def print_rows(title: str, rows: Sequence[Mapping[str, Any]]) -> None:
    """Print numbers and short texts; what is said of outputs and errors comes below."""
    good = [row for row in rows if "error" not in row]
    columns = list(dict.fromkeys(key for row in good for key in row if key not in _HIDDEN))
    lines = [columns, *([_text(row.get(key)) for key in columns] for row in good)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    print(f"== {title}", flush=True)
    for line in lines if good else []:
        print("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip(), flush=True)
    for row in rows:
        where = ", ".join(f"{row[key]}" for key in ("size", "batch", "precision", "side", "what", "case") if key in row)
        if "error" in row:
            print(f"FAILED {where}: {row['error'][:300]}", flush=True)
            print("  " + "\n  ".join(row.get("trace") or []), flush=True)
        elif str(row.get("outputs", "")).startswith("UNEQUAL") or (row.get("precision") == "fp32" and "outputs" in row):
            print(f"{where}: {row['outputs']}", flush=True)


def _text(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else str(value)
