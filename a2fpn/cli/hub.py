"""``a2fpn hub push | card | convert | verify | backbone``: publishing, also as ``python -m hub``."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

import a2fpn
from a2fpn.cli.door import SETTINGS, Debug, Door, prepare_streams
from a2fpn.cli.evaluate import open_annotated, predict_annotated
from a2fpn.cli.options import build_predictor, load_checkpoint
from a2fpn.errors import ConfigError, ConfigTypeError

TOLERANCE = 0.002
"""Largest difference of an AP measured again that other kernels explain."""

VERIFIED = ("bbox/ap", "segm/ap", "keypoints/ap")
"""Metrics that are measured again."""

PARITY = 1e-3
"""Largest difference of features (relative) and of scores that rounding explains."""

app = typer.Typer(name="hub", cls=Door, **SETTINGS)
Folder = Annotated[Path, typer.Argument(help="Checkpoint folder, such as runs/cells/best.", metavar="MODEL_DIR")]
RepoName = Annotated[str, typer.Option(help="Hub repository.", metavar="ORG/NAME")]


def main(argv: Sequence[str] | None = None) -> None:
    """Run the command line and exit.

    Args:
        argv: Arguments without the program's name; None takes ``sys.argv``.
    """
    prepare_streams()
    app(args=argv, prog_name="python -m hub")


@app.callback()
def _options(*, debug: Debug = False) -> None:
    """Publish detectors on the Hugging Face Hub as safetensors with a model card. Log in with `hf auth login`."""


@app.command()
def push(
    folder: Folder,
    *,
    repo: RepoName,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request instead of committing directly.")
    ] = False,
    space: Annotated[
        bool, typer.Option("--space", help="Also publish a demo as the Space ORG/NAME-app; needs a2fpn[app].")
    ] = False,
) -> None:
    """Push a checkpoint folder to the Hub in one commit; its README.md, if any, becomes the model card."""
    from a2fpn.pretrained.hub import push_space

    files = _space_files(repo) if space else None
    commit = a2fpn.push_to_hub(folder, repo, private=private or None, create_pr=create_pr)
    typer.echo(f'Load it: a2fpn.from_pretrained("{repo}", revision="{commit}")')
    if files is not None:
        typer.echo(f"Try it:  {push_space(files, f'{repo}-app', private=private or None)}")


def _space_files(repo: str) -> dict[str, str]:
    """Files of the Space; made before anything is published, since they need an extra."""
    try:
        from a2fpn.app import space_files
    except ModuleNotFoundError as error:
        raise ConfigError(f'--space needs {error.name}: pip install "a2fpn[app]".') from error
    return space_files(repo)


@app.command()
def card(folder: Folder, *, repo: RepoName) -> None:
    """Print the model card that `push` would write, to edit and save as README.md in the folder."""
    from a2fpn.pretrained.card import model_card
    from a2fpn.pretrained.checkpoint import read_checkpoint

    typer.echo(model_card(read_checkpoint(folder), repo))


@app.command()
def convert(
    file: Annotated[Path, typer.Argument(help="Weights file: .pth, .pkl or .safetensors.", metavar="FILE")],
    *,
    source: Annotated[Literal["torchvision", "detectron2", "mmdet"], typer.Option("--from", help="Source framework.")],
    model: Annotated[
        str,
        typer.Option(
            help="Model name, such as maskrcnn_fpn_r50; for torchvision, its builder function, such as "
            "maskrcnn_resnet50_fpn.",
            metavar="NAME",
        ),
    ],
    output: Annotated[Path, typer.Option(help="Output folder; must not hold a checkpoint.", metavar="DIR")],
    option: Annotated[
        list[str] | None,
        typer.Option(
            help="Argument of the converter, create_model or the torchvision builder; VALUE is JSON, such as "
            "stride_in_1x1=false. Repeatable.",
            metavar="KEY=VALUE",
        ),
    ] = None,
) -> None:
    """Convert weights from another framework to a checkpoint folder, without running code from the file.

    Torchvision conversions are verified: both models run on a random image, and a mismatch is an error. For the other
    frameworks, run `python -m benchmarks.parity` where they are installed.
    """
    from a2fpn.convert import from_detectron2, from_mmdet, from_torchvision, load_torchvision, read_state_dict
    from a2fpn.pretrained.checkpoint import CONFIG_FILE, file_sha256, save_checkpoint

    if (output / CONFIG_FILE).exists():
        raise ConfigError(f"{str(output)!r} holds a checkpoint; choose another folder.")
    options = _options_of(option or [])
    state = read_state_dict(file)
    try:
        if source == "torchvision":
            categories = options.pop("categories", None)
            module = load_torchvision(state, model, **options)
            detector = from_torchvision(module, categories=categories)
            typer.echo(_compare(module, detector))
            config, converted = detector.config, detector.state_dict()
        else:
            converter = from_detectron2 if source == "detectron2" else from_mmdet
            config, converted = converter(state, model, **options)
    except ConfigTypeError as error:
        raise ConfigError(f"--option: {error}") from error
    origin = {"framework": source, "file": file.name, "sha256": file_sha256(file)}
    save_checkpoint(output, config, converted, metadata={"converted_from": origin})
    typer.echo(f'Load it: a2fpn.from_pretrained("{output}")')


def _compare(theirs: Any, ours: a2fpn.Detector) -> str:
    """Run both on a random image that neither resizes.

    Raises:
        ValueError: If they differ by more than rounding.
    """
    import torch

    size, divisor = theirs.transform.min_size[-1], theirs.transform.size_divisible
    side = -(-size // divisor) * divisor
    image = torch.rand(3, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        batch = ours.preprocess([image])
        pairs = list(zip(theirs.backbone(batch.tensor).values(), ours.features(batch).values(), strict=True))
        features = max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
        expected, got = theirs([image])[0]["scores"], ours([image])[0]["scores"]
    scores = (expected - got).abs().max().item() if len(expected) == len(got) > 0 else float(len(expected) != len(got))
    if max(features, scores) > PARITY:
        raise ConfigError(
            f"The two sides differ on a random image: features by {features:.1e} (relative), scores by {scores:.1e} "
            f"({len(expected)} and {len(got)} detections)."
        )
    return (
        f"Same as torchvision on a random image: features differ by {features:.1e} (relative), scores by {scores:.1e}."
    )


def _options_of(pairs: Sequence[str]) -> dict[str, Any]:
    """``KEY=VALUE`` as keyword arguments; what is no JSON is text."""
    options = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals:
            raise ConfigError(f"--option {pair!r}: expected KEY=VALUE.")
        try:
            options[key] = json.loads(text)
        except ValueError:
            options[key] = text
    return options


@app.command()
def verify(
    name: Annotated[str, typer.Argument(help="Hub repository to verify.", metavar="ORG/NAME[@REVISION]")],
    *,
    images: Annotated[Path, typer.Option(help="Folder of the evaluation images.", metavar="DIR")],
    annotations: Annotated[Path, typer.Option(help="COCO file with the ground truth.", metavar="JSON")],
) -> None:
    """Download a pushed model into an empty cache, evaluate it and compare with its stated metrics."""
    from a2fpn.pretrained.hub import download_checkpoint
    from a2fpn.pretrained.hub_client import Repo

    with tempfile.TemporaryDirectory() as temporary:
        folder, checkpoint = download_checkpoint(Repo.parse(name, cache_dir=temporary))
        facts = checkpoint.facts
        measured = _measure(folder, images, annotations, max_detections=facts.max_detections)
    stated = {key: value for key, value in facts.metrics.items() if key in VERIFIED}
    if not stated:
        raise ConfigError(f"{name!r} states no metrics to verify.")
    wrong = [
        f"{key} is {measured.get(key, -1):.4f}, stated {value:.4f}"
        for key, value in stated.items()
        if abs(measured.get(key, -1) - value) > TOLERANCE
    ]
    if wrong:
        raise ConfigError(f"{name!r} does not reproduce its stated metrics: {'; '.join(wrong)}.")
    typer.echo(f"{name}: {', '.join(f'{key} {value:.4f}' for key, value in stated.items())}, as stated.")


def _measure(folder: Path, images: Path, annotations: Path, *, max_detections: int) -> dict[str, float]:
    from a2fpn.evaluation import common_iou_types, evaluate_coco

    detector = load_checkpoint(str(folder))
    dataset = open_annotated(detector, images, annotations)
    records = predict_annotated(build_predictor(detector, None, optimize=False, dtype="float32"), dataset, images)
    kinds = common_iou_types(dataset.coco, detector.target_keys)
    return evaluate_coco(dataset.coco, records, iou_types=kinds, max_detections=max_detections).to_dict()


@app.command()
def backbone(
    name: Annotated[str, typer.Argument(help="Checkpoint folder, Hub repository or pretrained name.", metavar="MODEL")],
    *,
    output: Annotated[Path, typer.Option(help="Output folder.", metavar="DIR")],
) -> None:
    """Export a detector's backbone to a folder that timm loads; publish it with `hf upload org/name DIR`."""
    from a2fpn.backbones import export_backbone

    detector = a2fpn.from_pretrained(name)
    export_backbone(detector.backbone, output, preprocess=detector.config.preprocess)
    typer.echo(f'Load it: timm.create_model("local-dir:{output}", pretrained=True, features_only=True)')
