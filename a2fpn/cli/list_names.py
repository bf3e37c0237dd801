"""``a2fpn list``."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from a2fpn.cli.format import columns
from a2fpn.errors import ConfigError

if TYPE_CHECKING:
    from a2fpn.pretrained.catalog import PretrainedModel


def list_names(
    pattern: Annotated[
        str, typer.Argument(help='Part of a name, or a glob pattern such as "mask*_r50".', metavar="FILTER")
    ] = "",
    *,
    necks: Annotated[bool, typer.Option("--necks", help="List necks instead of models.")] = False,
    pretrained: Annotated[bool, typer.Option("--pretrained", help="List models with pretrained weights only.")] = False,
) -> None:
    """List models, necks or pretrained weights, one per line.

    Example: `a2fpn list "maskrcnn_a2fpn_*"`

    With `--pretrained`, each line also shows the source of the weights, whether they were trained as is or grafted onto
    another neck (to be fine-tuned), their AP on the source's data, and their license.

    Any other timm model can be the backbone; spell out its name: `maskrcnn_a2fpn_convnext_small.fb_in22k`.
    """
    import a2fpn

    if pretrained:
        names = columns(map(_pretrained_line, a2fpn.list_pretrained(pattern)))
    else:
        names = a2fpn.list_necks(pattern) if necks else a2fpn.list_models(pattern)
    if not names:
        raise ConfigError(f"No name matches {pattern!r}; omit the filter to list all names.")
    typer.echo("\n".join(names))


def ap_columns(row: PretrainedModel) -> list[str]:
    """Box, mask and keypoint AP of pretrained weights; empty where there is none."""
    values = {"box": row.box_ap, "mask": row.mask_ap, "keypoint": row.keypoint_ap}
    return ["" if ap is None else f"{kind} {ap:.3f}" for kind, ap in values.items()]


def _pretrained_line(row: PretrainedModel) -> list[str]:
    return [row.name, row.source, "trained" if row.trained else "grafted", *ap_columns(row), f"license: {row.license}"]
