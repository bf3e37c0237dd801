"""Model card of a published checkpoint."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from a2fpn.detectors import DETECTORS
from a2fpn.pretrained.checkpoint import (
    Checkpoint,
)

CARD_FILE = "README.md"
_CARD = """
# {name}

A `{detector}` with neck `{neck}` on backbone `{backbone}`, {classes}, made with a2fpn {version}.

```python
import a2fpn

model = a2fpn.from_pretrained("{repo_id}")
result = a2fpn.Predictor(model)("image.jpg")
```

Classes: {categories}

{sizes}
{results}
## Origin

{facts}

The code is under {code_license}. {backbone_license}
"""
_METRICS = {
    "bbox/ap": ("object-detection", "box AP"),
    "bbox/ap50": ("object-detection", "box AP50"),
    "segm/ap": ("image-segmentation", "mask AP"),
    "segm/ap50": ("image-segmentation", "mask AP50"),
    "keypoints/ap": ("keypoint-detection", "keypoint AP"),
    "keypoints/ap50": ("keypoint-detection", "keypoint AP50"),
}
"""Metrics in a card, with the Hub's task and a name."""


_LICENSES = (
    *("apache-2.0", "mit", "bsd-2-clause", "bsd-3-clause", "cc0-1.0", "cc-by-4.0", "cc-by-sa-4.0", "cc-by-nc-4.0"),
    *("cc-by-nc-sa-4.0", "gpl-2.0", "gpl-3.0", "lgpl-3.0", "agpl-3.0", "mpl-2.0", "openrail", "unlicense"),
)
"""Most of the licenses that the Hub has a name for; any other is ``other`` in the header of a card."""


def model_card(checkpoint: Checkpoint, repo_id: str) -> str:
    """Build the ``README.md`` of a published checkpoint, with results in the Hub's format.

    Args:
        checkpoint: The checkpoint.
        repo_id: Its repository, ``org/name``.

    Returns:
        Markdown with a YAML header.
    """
    from huggingface_hub import EvalResult, ModelCardData

    model, facts = checkpoint.model, checkpoint.facts
    metrics = {key: facts.metrics[key] for key in _METRICS if key in facts.metrics}
    results = [
        EvalResult(
            task_type=_METRICS[key][0],
            dataset_type="custom",
            dataset_name=facts.data or "not stated",
            metric_type=key.replace("/", "-"),
            metric_name=_METRICS[key][1],
            metric_value=round(value, 4),
        )
        for key, value in metrics.items()
    ]
    task = "image-segmentation" if DETECTORS[model.detector].has_masks else "object-detection"
    license = (facts.license or "").lower().replace(" ", "-")
    data = ModelCardData(
        license=license if license in _LICENSES else "other" if license else None,
        license_name=None if license in _LICENSES else facts.license,
        library_name="a2fpn",
        pipeline_tag=task,
        tags=list(dict.fromkeys([model.detector, model.neck.name, "object-detection"])),
        base_model=f"timm/{model.backbone.name}" if model.backbone.license else None,
        model_name=model.architecture,
        eval_results=results or None,
    )
    table = "\n".join(f"| {_METRICS[key][1]} | {value:.4f} |" for key, value in metrics.items())
    told = {key: value for key, value in checkpoint.metadata.items() if key != "metrics"}
    told["sha256"] = checkpoint.sha256
    sizes = model.preprocess
    text = _CARD.format(
        name=model.architecture,
        detector=model.detector,
        neck=model.neck.name,
        backbone=model.backbone.name,
        classes="1 class" if model.num_classes == 1 else f"{model.num_classes} classes",
        version=checkpoint.a2fpn_version,
        repo_id=repo_id,
        categories=", ".join(category.name for category in model.labeled_categories),
        sizes="Images keep their size."
        if sizes.resize == "none"
        else f"Images are resized by the rule `{sizes.resize}`, min_size {sizes.min_size}, max_size {sizes.max_size}.",
        results=f"\n| metric | value |\n| --- | --- |\n{table}\n" if table else "",
        facts="\n".join(_bullets(told)),
        code_license=checkpoint.code_license,
        backbone_license="No license of backbone weights is recorded."
        if model.backbone.license is None
        else f"The weights of the backbone that training began with are under {model.backbone.license}.",
    )
    return f"---\n{data.to_yaml()}\n---\n{text}"


def _bullets(facts: Mapping[str, Any], indent: str = "") -> Iterator[str]:
    """Yield the lines of a list of facts, with nested facts of a parent model below their key."""
    for key, value in facts.items():
        if isinstance(value, Mapping):
            yield f"{indent}* {key}:"
            yield from _bullets(value, indent + "    ")
        else:
            yield f"{indent}* {key}: {value}"
