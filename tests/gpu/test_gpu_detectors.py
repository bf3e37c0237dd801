"""Detectors on the device against the CPU: maps and gradients in float64, losses, detections as sets."""

import copy

import pytest
import torch
from torch import Tensor

from a2fpn.detectors import Detector
from tests.gpu.gpu_cases import CASES, FEW, batch, error, gradients, leaves, lively, on, share_found

pytestmark = pytest.mark.gpu

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
FORWARD = {"fp32": 1e-4, "bf16": 6e-2, "fp16": 8e-3}
BACKWARD = {"fp32": 2e-3, "bf16": 0.25, "fp16": 6e-2}
LOOSER = {"bifpn": 3.0}  # many short convolutions with norms in a row, each of which rounds


def dense(model: Detector, dtype: torch.dtype) -> tuple[dict[str, Tensor], list[Tensor]]:
    """The pyramid of two images, and what the dense head says of it."""
    device = next(model.parameters()).device
    prepared = model.preprocess(on(device, batch(1, 1)[0]))
    tensor = prepared.tensor.double() if next(model.parameters()).dtype == torch.float64 else prepared.tensor
    prepared = type(prepared)(tensor, prepared.sizes, prepared.original_sizes)
    with torch.autocast(device.type, dtype, enabled=dtype not in (torch.float32, torch.float64)):
        maps = model.features(prepared)
        outputs = model.dense_head(list(maps.values()))
    return maps, leaves(outputs)


def backward(maps: dict[str, Tensor], outputs: list[Tensor]) -> None:
    """From a sum that depends on every value in its own way."""
    generator = torch.Generator().manual_seed(2)
    total = torch.zeros((), device=outputs[0].device)
    for x in [*maps.values(), *outputs]:
        weights = torch.randn(x.shape, generator=generator).to(x.device)
        total = total + (x.float() * weights).mean()
    total.backward()


@pytest.mark.parametrize("layout", ["nhwc", "nchw"])
@pytest.mark.parametrize("precision", list(DTYPES))
@pytest.mark.parametrize("name", CASES)
def test_pyramid_and_dense_head_are_those_of_float64(
    name: str, precision: str, layout: str, device: torch.device
) -> None:
    if name not in FEW and (precision, layout) not in (("fp32", "nhwc"), ("bf16", "nhwc")):
        pytest.skip("the other precisions and layouts run for a few detectors")
    model = lively(name).eval()
    reference = copy.deepcopy(model).double()
    expected, expected_outputs = dense(reference, torch.float64)
    backward(expected, expected_outputs)
    model.to(device)
    if layout == "nhwc":
        model.to(memory_format=torch.channels_last)
    maps, outputs = dense(model, DTYPES[precision])
    for level, x in expected.items():
        assert maps[level].device.type == device.type
        assert error([maps[level]], [x]) < FORWARD[precision], level
    assert error(outputs, expected_outputs) < FORWARD[precision]
    backward(maps, outputs)
    tolerance = BACKWARD[precision] * LOOSER.get(name.partition("_")[2], 1.0)
    assert error(gradients(model), gradients(reference)) < tolerance


@pytest.mark.parametrize("name", CASES)
def test_losses_are_those_of_the_cpu(name: str, device: torch.device) -> None:
    """In float32 with every sample; targets lie on the CPU, as loaders give them, or on the device."""
    model = lively(name).train()
    expected = model(*batch(4, 2))
    model.to(device).to(memory_format=torch.channels_last)
    for targets in (batch(4, 2)[1], on(device, batch(4, 2)[1])):
        losses = model(on(device, batch(4, 2)[0]), targets)
        assert losses.keys() == expected.keys()
        for key, value in expected.items():
            assert losses[key].item() == pytest.approx(value.item(), rel=2e-2, abs=1e-4), key
    model.zero_grad()
    torch.stack(list(losses.values())).sum().backward()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(model))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
@pytest.mark.parametrize(
    "name", ["maskrcnn_a2fpn", "keypointrcnn_fpn", "cascademaskrcnn_fpn", "htc_fpn", "retinanet_fpn"]
)
@pytest.mark.parametrize("counts", [(4, 0), (0, 0)])
def test_a_step_under_autocast_reaches_every_parameter(
    name: str, precision: str, counts: tuple[int, ...], device: torch.device
) -> None:
    model = lively(name).train().to(device).to(memory_format=torch.channels_last)
    images, targets = batch(*counts)
    with torch.autocast(device.type, DTYPES[precision]):
        losses = model(on(device, images), targets)
    torch.stack(list(losses.values())).sum().backward()
    assert all(loss.isfinite() for loss in losses.values())
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(model))


@pytest.mark.parametrize("name", CASES)
def test_detections_are_those_of_the_cpu_as_sets(name: str, device: torch.device) -> None:
    model = lively(name).eval()
    images = batch(1, 1)[0]
    with torch.inference_mode():
        expected = model(images, paste_masks=False)
        found = model.to(device)(on(device, images), paste_masks=False)
    for theirs, ours in zip(expected, found, strict=True):
        assert len(theirs["boxes"])
        assert ours["boxes"].device.type == device.type
        assert ours["boxes"].dtype == torch.float32
        assert share_found(theirs, ours, pixels=0.05, score=1e-3) >= 0.9
