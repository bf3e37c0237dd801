"""Tests of use on the device: Predictor, tiles, views, optimized detectors, exported necks."""

import copy

import numpy as np
import pytest
import torch

import a2fpn
from a2fpn.inference import Predictor, Result
from tests.gpu.gpu_cases import NECKS, SIZE, batch, error, lively, on, share_found
from tests.helpers import build_neck, pyramid_spec, random_features

pytestmark = pytest.mark.gpu

PIXELS = (batch(1)[0][0] * 255).to(torch.uint8).permute(1, 2, 0).numpy()
RULE = {"score_threshold": 0.01, "max_objects": 30}


def as_detection(result: Result) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(np.array(getattr(result, name))) for name in ("boxes", "scores", "labels")}


def assert_same_result(expected: Result, got: Result) -> None:
    assert len(expected)
    assert share_found(as_detection(expected), as_detection(got), pixels=0.1, score=1e-3) >= 0.9
    if expected.masks is not None and len(expected) == len(got):
        assert (expected.masks == got.masks).mean() > 0.97


@pytest.mark.parametrize("name", ["maskrcnn_a2fpn", "keypointrcnn_fpn", "retinanet_fpn", "htc_fpn"])
@pytest.mark.parametrize("options", [{}, {"soft_nms": "linear"}])
def test_predictor_gives_what_it_gives_on_the_cpu(name: str, options: dict[str, str], device: torch.device) -> None:
    model = lively(name).eval()
    expected = Predictor(copy.deepcopy(model), **RULE, **options)(PIXELS)
    assert_same_result(expected, Predictor(model, device=device, **RULE, **options)(PIXELS))


@pytest.mark.parametrize("options", [{"tile": 96}, {"tta": True}, {"tile": 96, "tta": True}])
def test_tiles_and_views(options: dict[str, int], device: torch.device) -> None:
    model = lively("maskrcnn_fpn").eval()
    expected = Predictor(copy.deepcopy(model), **RULE, **options)(PIXELS)
    result = Predictor(model, device=device, **RULE, **options)(PIXELS)
    assert len(expected)
    assert share_found(as_detection(expected), as_detection(result), pixels=0.2, score=2e-3) >= 0.8


@pytest.mark.parametrize("name", ["maskrcnn_a2fpn", "cascademaskrcnn_fpn", "fcos_fpn"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("tf32", [False, True])
def test_an_optimized_detector_finds_the_same(name: str, dtype: torch.dtype, tf32: bool, device: torch.device) -> None:
    """Folding runs with TF32 on as well, which is cuDNN's default."""
    torch.backends.cudnn.allow_tf32 = tf32
    model = lively(name).eval()
    with torch.inference_mode():
        expected = model(batch(1)[0], paste_masks=False)[0]
    optimized = a2fpn.optimize_for_inference(model.to(device), dtype=dtype)
    found = optimized(on(device, batch(1)[0]), paste_masks=False)[0]
    assert found["boxes"].dtype == torch.float32
    assert found["boxes"].device.type == device.type
    if dtype == torch.float32 and not tf32:
        assert share_found(expected, found, pixels=0.1, score=1e-3) >= 0.9
    else:
        assert len(found["boxes"])
        assert all(x.isfinite().all() for x in found.values())


@pytest.mark.parametrize("neck", NECKS)
def test_an_exported_neck_gives_the_same_maps(neck: str, device: torch.device) -> None:
    spec = pyramid_spec()
    module = build_neck(neck, spec).eval().to(device)
    features = on(device, random_features(spec, SIZE))
    with torch.no_grad():
        program = torch.export.export(module, (features,))
        expected = module(features)
        got = program.module()(features)
    assert error(list(got.values()), list(expected.values())) < 1e-4


def test_images_come_from_any_device_in_any_type(device: torch.device) -> None:
    model = lively("fasterrcnn_fpn").eval().to(device)
    image = batch(1)[0][0].mul(255).to(torch.uint8)
    with torch.inference_mode():
        (a,), (b,) = model([image]), model([image.to(device)])
    assert share_found(a, b, pixels=1e-3, score=1e-5) == 1
