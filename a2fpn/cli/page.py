"""``a2fpn app``."""

from __future__ import annotations

from typing import Annotated

import typer

from a2fpn.cli.demo import DEMO_MODEL
from a2fpn.cli.options import Device, Model, pick_device
from a2fpn.errors import ConfigError


def show_page(
    *,
    model: Model = DEMO_MODEL,
    host: Annotated[str, typer.Option(help="Address to bind; 0.0.0.0 for all interfaces.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(min=1, max=65535, help="Port; default: first free one from 7860.")] = None,
    device: Device = None,
) -> None:
    """Try a model in the browser: upload pictures, adjust thresholds, download the results.

    Example: `a2fpn app --model runs/cells/best`

    Requires the `app` extra: `pip install "a2fpn[app]"`. No data is sent to other machines.
    """
    try:
        from a2fpn.app import launch
    except ImportError as error:
        if error.name != "gradio":
            raise
        raise ConfigError('a2fpn app needs Gradio: pip install "a2fpn[app]".') from error
    page = launch(model, host=host, port=port, device=str(pick_device(device)), quiet=True, prevent_thread_lock=True)
    typer.echo(f"Open {page.local_url} (stop with Ctrl+C)")
    page.block_thread()
