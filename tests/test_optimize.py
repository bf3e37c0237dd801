"""An optimized detector gives what the detector gives, and is nothing to save or to train."""

import copy
import pickle

import numpy as np
import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torchvision.ops import FrozenBatchNorm2d

import a2fpn
from a2fpn.detectors import DETECTORS, Detector
from a2fpn.heads import PostprocessConfig
from a2fpn.inference.folding import fold_norms
from a2fpn.inference.fused import ActivatedConv, ResidualBlock
from a2fpn.inference.optimize import optimize_for_inference
from tests.helpers import tiny_model

NORMS = (nn.BatchNorm2d, FrozenBatchNorm2d)


def lived_in(model: Detector) -> Detector:
    """Statistics and weights of the norms as after a training."""
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        if isinstance(module, NORMS):
            assert module.running_mean is not None
            module.running_mean.normal_(std=0.1, generator=generator)
            module.running_var.uniform_(0.5, 1.5, generator=generator)
            with torch.no_grad():
                module.weight.uniform_(0.5, 1.5, generator=generator)
                module.bias.normal_(std=0.1, generator=generator)
    return model.eval()


def create(name: str, **overrides: object) -> Detector:
    torch.manual_seed(0)
    if name in ("retinanet", "fcos"):
        overrides["neck_args"] = {"extra_levels": 0}
        if name == "retinanet":
            overrides["anchor_sizes"] = [[size] * 3 for size in (8, 16, 32, 64, 128)]
    if name != "fcos":
        return lived_in(tiny_model(f"{name}_fpn", **overrides))
    options = {"num_classes": 3, "resize": "none", "score_threshold": 0.0, "detections_per_image": 10}
    return lived_in(
        a2fpn.create_model(
            "fcos_fpn",
            **{"backbone": "test_efficientnet", **options, **overrides, "neck_args": {"out_channels": 16}},
        )
    )


def image(height: int = 72, width: int = 104) -> Tensor:
    return torch.rand(3, height, width, generator=torch.Generator().manual_seed(1))


def detect(model: nn.Module, *images: Tensor, **options: object) -> list[dict[str, Tensor]]:
    with torch.inference_mode():
        found: list[dict[str, Tensor]] = model(list(images), **options)
    return found


def assert_same(found: list[dict[str, Tensor]], expected: list[dict[str, Tensor]]) -> None:
    for a, b in zip(found, expected, strict=True):
        assert a.keys() == b.keys()
        torch.testing.assert_close(a["scores"], b["scores"], rtol=0, atol=1e-5)
        for key in a.keys() - {"scores"}:
            torch.testing.assert_close(a[key], b[key], rtol=0, atol=1e-3, msg=key)


@pytest.mark.parametrize("backbone", ["test_efficientnet", "test_resnet"])
@pytest.mark.parametrize("name", list(DETECTORS))
def test_every_detector_gives_the_same(name: str, backbone: str) -> None:
    model = create(name, backbone=backbone)
    optimized = optimize_for_inference(model)
    assert any(isinstance(module, NORMS) for module in model.modules())
    assert not any(isinstance(module, NORMS) for module in optimized.modules())
    images = image(), image(64, 96), image()
    assert_same(detect(optimized, *images), detect(model, *images))
    assert_same(detect(optimized, image(), paste_masks=False), detect(model, image(), paste_masks=False))


@pytest.mark.parametrize("neck", ["pafpn", "a2fpn", "carafe_fpn"])
def test_necks_with_norms_are_folded_too(neck: str) -> None:
    model = create("fasterrcnn", neck=neck, neck_args={"norm_layer": "batchnorm2d", "act_layer": "relu"})
    assert any(isinstance(module, NORMS) for module in model.neck.modules())
    optimized = optimize_for_inference(model)
    assert not any(isinstance(module, NORMS) for module in optimized.modules())
    assert any(isinstance(module, ActivatedConv) for module in optimized.detector.neck.modules())
    assert_same(detect(optimized, image()), detect(model, image()))


@pytest.mark.parametrize("overrides", [{"norm": "frozen"}, {"trainable_layers": 2}, {"roi_aligned": True}])
def test_frozen_norms_and_other_settings(overrides: dict[str, object]) -> None:
    model = create("maskrcnn", backbone="test_resnet", **overrides)
    optimized = optimize_for_inference(model)
    assert not any(isinstance(module, NORMS) for module in optimized.modules())
    assert_same(detect(optimized, image()), detect(model, image()))


@pytest.mark.parametrize("backbone", ["test_vit", "test_convnext", "test_nfnet", "test_byobnet", "test_mambaout"])
def test_backbones_without_or_with_other_norms(backbone: str) -> None:
    try:
        model = create("fasterrcnn", backbone=backbone)
    except ValueError as error:
        pytest.skip(f"not a pyramid: {error}")
    assert_same(detect(optimize_for_inference(model), image(64, 96)), detect(model, image(64, 96)))


def test_what_is_read_twice_is_not_folded() -> None:
    class Twice(nn.Module):
        """Its convolution's result goes through the norm, and around it."""

        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 16, 3, padding=1), BatchNormAct2d(16)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.norm(y) + y

    model = create("fasterrcnn")
    model.neck.output[0] = nn.Sequential(Twice(), model.neck.output[0])
    model = lived_in(model)
    optimized = optimize_for_inference(model)
    assert sum(isinstance(module, NORMS) for module in optimized.modules()) == 1
    assert_same(detect(optimized, image()), detect(model, image()))


def test_a_convolution_with_two_norms_is_not_folded() -> None:
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norms = nn.Conv2d(16, 16, 1), nn.ModuleList(nn.BatchNorm2d(16) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            first, second = self.norms
            return second(self.conv(first(self.conv(x))))

    model = create("fasterrcnn")
    model.neck.output[0] = nn.Sequential(Shared(), model.neck.output[0])
    model = lived_in(model)
    optimized = optimize_for_inference(model)
    assert sum(isinstance(module, NORMS) for module in optimized.modules()) == 2
    assert_same(detect(optimized, image()), detect(model, image()))


def test_a_fold_that_changes_the_pyramid_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    model = copy.deepcopy(create("fasterrcnn"))
    monkeypatch.setattr("a2fpn.inference.folding._fold_norm", lambda conv, norm: None)
    with pytest.raises(RuntimeError, match="batch norms of test_efficientnet changed the level p2"), torch.no_grad():
        fold_norms(model)


@pytest.mark.parametrize("activation", [nn.ReLU(), nn.ReLU6()])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("number", [0, 2])
def test_a_convolution_with_its_activation(number: int, dtype: torch.dtype, activation: nn.Module) -> None:
    conv = nn.Conv2d(4, 8, 3, stride=2, padding=1, groups=2).requires_grad_(False)
    x = 10 * torch.randn(number, 4, 9, 7)
    fused = ActivatedConv(copy.deepcopy(conv).to(dtype), activation)(x)
    assert fused.dtype == dtype
    expected = activation(conv(x))
    assert fused.shape == expected.shape
    torch.testing.assert_close(fused.float(), expected, rtol=0, atol=1e-5 if dtype == torch.float32 else 0.2)


def test_without_the_fused_kernel_it_is_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    optimized = optimize_for_inference(create("maskrcnn", backbone="test_resnet"))
    expected = detect(optimized, image())
    monkeypatch.setattr("a2fpn.inference.fused._has_fused_convolution", lambda x: False)
    assert_same(detect(optimized, image()), expected)


@pytest.mark.parametrize(
    ("backbone", "fused"),
    [("resnet18", 8), ("resnet26d", 8), ("seresnet18", 0), ("resnext26ts", 0), ("resnetblur18", 8)],
)
@pytest.mark.parametrize("kernel", [True, False])
def test_residual_blocks_give_the_same_and_overwrite_nobodys_maps(
    backbone: str, fused: int, kernel: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not kernel:
        monkeypatch.setattr("a2fpn.inference.fused._has_fused_convolution", lambda x: False)
    model = create("fasterrcnn", backbone=backbone)
    optimized = optimize_for_inference(model)
    assert sum(isinstance(module, ResidualBlock) for module in optimized.modules()) == fused
    x = torch.randn(2, 3, 64, 96, generator=torch.Generator().manual_seed(2)).contiguous(
        memory_format=torch.channels_last
    )
    with torch.inference_mode():
        maps = [detector.backbone(x) for detector in (model, optimized.detector, optimized.detector)]
    for name, expected in maps[0].items():
        # Where blocks are not normalized anew, they may amplify; rounding is relative to the map.
        tolerance = 1e-5 * float(expected.abs().max())
        for again in maps[1:]:
            torch.testing.assert_close(again[name], expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize("own_input", [True, False])
def test_a_block_writes_into_its_input_only_where_that_is_its_own(own_input: bool) -> None:
    block = timm.create_model("resnet18").layer1[0].eval().requires_grad_(False)
    block.bn1, block.bn2 = nn.Identity(), nn.Identity()
    x = torch.randn(1, 64, 8, 8)
    given = x.clone()
    torch.testing.assert_close(ResidualBlock(block, own_input=own_input)(given), block(x))
    assert torch.equal(given, x) is not own_input


def test_a_block_that_somebody_listens_to_stays() -> None:
    model = create("fasterrcnn", backbone="resnet18")
    heard: list[Tensor] = []
    block = next(module for module in model.backbone.modules() if type(module).__name__ == "BasicBlock")
    block.register_forward_hook(lambda module, inputs, output: heard.append(output))
    optimized = optimize_for_inference(model)
    assert sum(isinstance(module, ResidualBlock) for module in optimized.modules()) == 7
    before = len(heard)
    detect(optimized, image())
    assert len(heard) == before + 1


def test_the_model_stays_as_it_was() -> None:
    model = create("maskrcnn")
    model.train()
    before = {name: (x.clone(), x.stride()) for name, x in model.state_dict().items()}
    optimize_for_inference(model)
    assert model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    for name, x in model.state_dict().items():
        assert torch.equal(x, before[name][0])
        assert x.stride() == before[name][1]


def test_it_cannot_be_saved_loaded_or_trained(tmp_path) -> None:
    model = create("maskrcnn")
    optimized = optimize_for_inference(model)
    with pytest.raises(ValueError, match=r"can't be saved: .* Save the original model"):
        a2fpn.save_pretrained(optimized, tmp_path)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="can't be saved"):
        optimized.state_dict()
    with pytest.raises(ValueError, match="can't load weights; load them into the original model"):
        optimized.load_state_dict(model.state_dict())
    with pytest.raises(ValueError, match="can't be trained; train the original model"):
        optimized.train()
    assert not optimized.eval().training
    assert not any(parameter.requires_grad for parameter in optimized.parameters())


def test_it_can_be_copied_and_sent_to_another_process() -> None:
    optimized = optimize_for_inference(create("maskrcnn"))
    expected = detect(optimized, image())
    assert_same(detect(copy.deepcopy(optimized), image()), expected)
    assert_same(detect(pickle.loads(pickle.dumps(optimized)), image()), expected)


@pytest.mark.parametrize("model", [nn.Identity(), "maskrcnn_fpn_r50"])
def test_only_detectors_are_optimized(model: object) -> None:
    with pytest.raises(TypeError, match=r"create_model.*got (Identity|str)"):
        optimize_for_inference(model)


def test_an_optimized_detector_is_not_optimized_again() -> None:
    with pytest.raises(TypeError, match="got OptimizedDetector"):
        optimize_for_inference(optimize_for_inference(create("fasterrcnn")))


def test_other_dtypes() -> None:
    with pytest.raises(ValueError, match=r"dtype must be one of torch\.float32, torch\.bfloat16, got torch\.float16"):
        optimize_for_inference(create("fasterrcnn"), dtype=torch.float16)


@pytest.mark.parametrize("name", list(DETECTORS))
def test_bfloat16_gives_float32_results_that_are_near(name: str) -> None:
    model = create(name)
    optimized = optimize_for_inference(model, dtype=torch.bfloat16)
    assert torch.bfloat16 in {x.dtype for x in optimized.parameters()}
    (found,), (expected,) = detect(optimized, image()), detect(model, image())
    assert found.keys() == expected.keys()
    for key, x in found.items():
        assert x.dtype == expected[key].dtype
    torch.testing.assert_close(found["scores"], expected["scores"], rtol=0.05, atol=0.01)
    assert not torch.equal(found["scores"], expected["scores"])
    # Anchors and decoding in bfloat16 would put corners on a grid of half a pixel.
    assert (found["boxes"] * 4 % 1 > 0).any()


@pytest.mark.parametrize("name", ["fasterrcnn", "cascadercnn"])
def test_in_bfloat16_the_box_predictor_stays_in_float32(name: str) -> None:
    optimised = optimize_for_inference(create(name), dtype=torch.bfloat16)
    heads = optimised.detector.roi_heads
    predictors = [module for key, module in heads.named_modules() if key.split(".")[-1] == "box_predictor"]
    layers = [layer for predictor in predictors for layer in predictor.modules() if isinstance(layer, nn.Linear)]
    seen: list[Tensor] = []
    for layer in layers:
        layer.register_forward_hook(lambda _, inputs, output: seen.extend([*inputs, output]))
    detect(optimised, image())
    assert len(layers) >= 2
    assert len(seen) >= 2 * len(layers)
    assert {x.dtype for x in [*seen, *(p for layer in layers for p in layer.parameters())]} == {torch.float32}
    # Its results are not those of bfloat16 in another type.
    assert not any(torch.equal(output, output.bfloat16().float()) for output in seen[1::2])


def test_the_predictor_and_its_options_take_it() -> None:
    model = create("maskrcnn")
    optimized = optimize_for_inference(model)
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    expected, found = a2fpn.Predictor(model)(pixels), a2fpn.Predictor(optimized)(pixels)
    assert len(found) == len(expected) == 10
    np.testing.assert_allclose(found.boxes, expected.boxes, atol=1e-3)
    np.testing.assert_array_equal(found.labels, expected.labels)
    assert (found.masks != expected.masks).mean() < 1e-3
    assert len(a2fpn.Predictor(optimized)(pixels, max_objects=3)) == 3
    assert len(detect(optimized, image(), rule=PostprocessConfig(detections_per_image=2))[0]["scores"]) == 2
