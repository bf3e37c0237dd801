"""Predicting is a pure function: a call gives what it gives alone, and leaves the model as it found it."""

import copy
import itertools
import pickle
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

import a2fpn
from a2fpn.build import build_model
from a2fpn.detectors import Detector
from a2fpn.inference import Predictor, Result
from a2fpn.inference.eval_view import EvalViews, eval_view
from tests.helpers import tiny_model

OPTIONS: list[dict[str, Any]] = [
    {},
    {"score_threshold": 0.05},
    {"score_threshold": 0.3},
    {"max_objects": 3},
    {"nms_threshold": 0.2},
    {"soft_nms": "gaussian"},
    {"tile": 48},
    {"score_threshold": 0.9},
]


def picture(seed: int, size: tuple[int, int] = (48, 64)) -> NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (*size, 3), dtype=np.uint8)


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


def tapped_model(name: str = "fasterrcnn_fpn") -> Detector:
    """A model in evaluation mode whose maps are collected by hooks."""
    config = tiny_model(name, backbone="test_resnet").config
    taps = ("layer1", "layer2", "layer3", "layer4")
    return build_model(replace(config, backbone=replace(config.backbone, taps=taps))).eval()


@pytest.mark.parametrize("kind", ["eval", "train", "hooks"])
def test_threads_with_mixed_options_get_what_each_gets_alone(kind: str) -> None:
    torch.manual_seed(0)
    model = tapped_model("maskrcnn_fpn") if kind == "hooks" else tiny_model("maskrcnn_fpn").train(kind == "train")
    predictors = [Predictor(model), Predictor(model, score_threshold=0.2)]
    differing = calls_that_differ(model, predictors, lambda seed: picture(seed, (32, 56)), calls=4, threads=8)
    assert differing == [[]] * 8


@pytest.mark.slow
@pytest.mark.parametrize("training", [False, True])
def test_16_threads_of_200_calls_differ_nowhere(training: bool) -> None:
    torch.manual_seed(0)
    model = tiny_model("maskrcnn_fpn", rpn_post_nms_top_n_test=8).train(training)
    predictors = [Predictor(model), Predictor(model, score_threshold=0.2)]
    assert (
        calls_that_differ(model, predictors, lambda seed: picture(seed, (32, 56)), calls=200, threads=16) == [[]] * 16
    )


def calls_that_differ(
    model: nn.Module,
    predictors: Sequence[Predictor],
    image_of: Callable[[int], NDArray[np.uint8]],
    *,
    calls: int,
    threads: int,
) -> list[list[int]]:
    """Of each thread the calls that gave something else than alone; checks that the model stays as it is."""
    cases = [(i, predictors[i % 2], image_of(i % 3), OPTIONS[i % len(OPTIONS)]) for i in range(24)]
    before = fixed(model)
    alone = [as_numbers(predictor(image, **options)) for _, predictor, image, options in cases]
    assert len({len(scores) for _, scores, _, _ in alone}) > 2  # the options matter
    start = threading.Barrier(threads)

    def work(thread: int) -> list[int]:
        start.wait()
        order = itertools.islice(itertools.cycle(cases), thread, thread + calls)
        return [i for i, predictor, image, options in order if as_numbers(predictor(image, **options)) != alone[i]]

    with ThreadPoolExecutor(threads) as pool:
        differing = list(pool.map(work, range(threads)))
    assert same(fixed(model), before)
    return differing


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


def lent(views: EvalViews, model: nn.Module) -> nn.Module:
    with views.lend(model) as view:
        return view


@pytest.mark.parametrize("mode", ["train", "hooks"])
def test_a_view_is_built_once_and_anew_for_a_changed_model(mode: str) -> None:
    model: Any = tapped_model() if mode == "hooks" else tiny_model("fasterrcnn_fpn").train()
    views = EvalViews()
    first = lent(views, model)
    assert first is not model
    assert lent(views, model) is first
    with torch.no_grad():
        model.roi_heads.box_predictor.cls_score.bias.add_(1.0)  # a step of training changes values, not tensors
    assert lent(views, model) is first
    changes: list[Callable[[], Any]] = [
        lambda: model.neck.register_forward_hook(lambda module, args, output: None),
        lambda: model.roi_heads.box_predictor.register_buffer("more", torch.ones(1)),
        lambda: setattr(
            model.roi_heads.box_predictor, "cls_score", copy.deepcopy(model.roi_heads.box_predictor.cls_score)
        ),
        lambda: model.load_state_dict({k: x.clone() for k, x in model.state_dict().items()}, assign=True),
        lambda: model.rpn._pre_nms_top_n.update(testing=7),
        lambda: setattr(model.rpn, "nms_thresh", 0.123),
    ]
    for change in changes:
        change()
        view = lent(views, model)
        assert view is not first
        assert lent(views, model) is view
        first = view
    assert view.rpn.nms_thresh == 0.123  # type: ignore[union-attr]


def test_a_view_is_lent_to_one_call_at_a_time_and_not_kept_after_an_error() -> None:
    model, views = nn.Sequential(nn.BatchNorm2d(2)).train(), EvalViews()
    with views.lend(model) as one, views.lend(model) as other:
        assert one is not other
    assert lent(views, model) in (one, other)
    with pytest.raises(KeyError), views.lend(model) as broken:
        raise KeyError
    assert lent(views, model) is not broken
    with views.lend(model.eval()) as own:
        assert own is model


def test_a_predictor_that_was_used_travels() -> None:
    predictor = Predictor(tiny_model("fasterrcnn_fpn").train())
    found = as_numbers(predictor(picture(0)))
    for twin in (copy.deepcopy(predictor), pickle.loads(pickle.dumps(predictor))):
        assert twin.model is not predictor.model
        with torch.no_grad():
            twin.model.roi_heads.box_predictor.cls_score.bias.add_(torch.arange(4.0))
        assert as_numbers(twin(picture(0))) != found  # of its own model
    assert as_numbers(predictor(picture(0))) == found


def test_a_limit_of_pixels_holds_for_files_alone(tmp_path: Any) -> None:
    from PIL import Image

    predictor = Predictor(tiny_model("fasterrcnn_fpn"), max_pixels=48 * 64 - 1)
    Image.fromarray(picture(0)).save(tmp_path / "a.png")
    with pytest.raises(a2fpn.data.ImageError, match="64 x 48 = 3072 pixels exceed the limit of 3071"):
        predictor(tmp_path / "a.png")
    assert predictor(picture(0)).size == (48, 64)
    with pytest.raises(ValueError, match="max_pixels must be at least 1 or None, got 0"):
        Predictor(predictor.model, max_pixels=0)
