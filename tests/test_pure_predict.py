"""Predicting is a pure function: a call gives what it gives alone, and leaves the model as it found it."""

import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import a2fpn
from a2fpn.inference import Predictor, Result
from a2fpn.inference.eval_view import eval_view
from tests.helpers import tiny_model

OPTIONS: list[dict[str, Any]] = [
    {},
    {"score_threshold": 0.05},
    {"score_threshold": 0.3},
    {"detections_per_image": 3},
    {"nms_threshold": 0.2},
    {"soft_nms": "gaussian"},
    {"tile": 48},
    {"score_threshold": 0.9},
]


def picture(seed: int) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (48, 64, 3), dtype=np.uint8)


def fixed(model: nn.Module) -> dict[str, Any]:
    """All that predicting must not change."""
    tensors = {name: x.clone() for name, x in model.state_dict().items()}
    return {**tensors, **{f"{name} training": module.training for name, module in model.named_modules()}}


def same(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[key], b[key]) if isinstance(a[key], torch.Tensor) else a[key] == b[key] for key in a
    )


def as_numbers(result: Result) -> tuple[Any, ...]:
    return result.boxes.tolist(), result.scores.tolist(), result.labels.tolist(), result.rles


@pytest.mark.parametrize("backbone", ["test_resnet", "test_vit"])
@pytest.mark.parametrize("training", [False, True])
def test_threads_with_mixed_options_get_what_each_gets_alone(backbone: str, training: bool) -> None:
    """The maps of test_vit are collected by hooks, in an object that its calls share."""
    torch.manual_seed(0)
    sizes = {"min_size": 64, "max_size": 64} if backbone == "test_vit" else {}
    model = tiny_model("maskrcnn_fpn", backbone=backbone, **sizes).train(training)
    model.backbone.eval() if training and backbone == "test_vit" else None
    predictors = [Predictor(model), Predictor(model, score_threshold=0.2)]
    calls = [(i, predictors[i % 2], picture(i % 3), OPTIONS[i % len(OPTIONS)]) for i in range(24)]
    before = fixed(model)
    alone = [as_numbers(predictor(image, **options)) for _, predictor, image, options in calls]
    assert len({len(scores) for _, scores, _, _ in alone}) > 2  # the options matter
    start = threading.Barrier(16)

    def work(thread: int) -> list[int]:
        start.wait()
        order = calls[thread:] + calls[:thread]
        return [i for i, predictor, image, options in order[:6] if as_numbers(predictor(image, **options)) != alone[i]]

    with ThreadPoolExecutor(16) as pool:
        assert list(pool.map(work, range(16))) == [[]] * 16
    assert same(fixed(model), before)


@pytest.mark.parametrize("name", ["fasterrcnn_fpn", "retinanet_fpn", "cascademaskrcnn_fpn"])
def test_a_model_in_training_predicts_as_in_evaluation_and_stays_as_it_was(name: str) -> None:
    torch.manual_seed(0)
    model = tiny_model(name).train()
    frozen = next(module for module in model.backbone.modules() if isinstance(module, nn.BatchNorm2d)).eval()
    before = fixed(model)
    found = as_numbers(Predictor(model)(picture(0)))
    assert same(fixed(model), before)
    assert model.training
    assert not frozen.training
    assert as_numbers(Predictor(model.eval())(picture(0))) == found


def test_an_error_leaves_the_model_as_it_was() -> None:
    model = tiny_model("fasterrcnn_fpn").train()
    before = fixed(model)
    with pytest.raises(ValueError, match="values from"):
        Predictor(model)(torch.rand(3, 64, 64) * 255)
    assert same(fixed(model), before)


def test_a_view_follows_the_model_and_calls_its_hooks() -> None:
    model = tiny_model("fasterrcnn_fpn").train()
    seen: list[bool] = []
    hook = model.neck.register_forward_hook(lambda module, args, output: seen.append(module.training))
    Predictor(model)(picture(0))
    assert seen == [False]
    hook.remove()
    view = eval_view(model)
    for own, shared in zip(model.state_dict().values(), view.state_dict().values(), strict=True):
        assert own.data_ptr() == shared.data_ptr()
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias.add_(1.0)
    assert torch.equal(view.roi_heads.box_predictor.cls_score.bias, model.roi_heads.box_predictor.cls_score.bias)
    assert eval_view(model.eval()) is model


def test_a_limit_of_pixels_holds_for_files_alone(tmp_path: Any) -> None:
    from PIL import Image

    predictor = Predictor(tiny_model("fasterrcnn_fpn"), max_pixels=48 * 64 - 1)
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    with pytest.raises(a2fpn.data.ImageError, match="64 x 48 = 3072 pixels are more than the limit of 3071"):
        predictor(tmp_path / "a.png")
    assert predictor(picture(0)).size == (48, 64)
    with pytest.raises(ValueError, match="max_pixels must be at least 1 or None, got 0"):
        Predictor(predictor.model, max_pixels=0)
