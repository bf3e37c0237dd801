"""mmdetection's state dicts: every tensor in its place."""

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import a2fpn
from a2fpn.cli.hub import main
from a2fpn.convert import from_mmdet
from a2fpn.preprocess import Preprocess
from tests.test_convert_detectron2 import SMALL, background_last, random_detector

NAMES = [
    "fasterrcnn_fpn_r18",
    "maskrcnn_fpn_r18",
    "cascadercnn_fpn_r18",
    "cascademaskrcnn_fpn_r18",
    "htc_fpn_r18",
    "maskrcnn_carafe_fpn_r18",
]
RULES: dict[str, Any] = {
    "roi_aligned": True,
    "roi_sampling_ratio": 0,
    "anchor_rounding": False,
    "mean": [123.675 / 255, 116.28 / 255, 103.53 / 255],
    "std": [58.395 / 255, 57.12 / 255, 57.375 / 255],
    "rpn_post_nms_top_n_train": 1000,
}
CASCADE_RULES: dict[str, Any] = {
    "rpn_post_nms_top_n_train": 2000,
    "stage_average": "logits",
    "stage_box_weights": [[1 / xy] * 2 + [1 / wh] * 2 for xy, wh in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))],
}
SEMANTIC = {"semantic": "stuff", "semantic_classes": 7, "semantic_channels": 6, "semantic_layers": 2}


@functools.cache
def small(name: str, *, semantic: bool = False) -> a2fpn.detectors.RCNN:
    """A detector as mmdetection configures it, with random weights; not to be changed."""
    htc = {"score_threshold": 0.001} if name.startswith("htc") else {}
    cascade = CASCADE_RULES if name.startswith(("cascade", "htc")) else {}
    options = RULES | cascade | htc | (SEMANTIC if semantic else {})
    if "carafe" in name:
        options |= {"neck_args": SMALL["neck_args"] | {"extra_source": "backbone"}}
        options |= {"mask_upsample": "carafe", "size_divisor": 64}
    return random_detector(name, **options)


def mmdet_state(model: a2fpn.detectors.RCNN) -> dict[str, Tensor]:
    """The state dict that mmdetection has of the same detector."""
    state = {}
    for key, x in model.state_dict().items():
        parts = key.split(".")
        tensor = parts[-1]
        if parts[0] == "backbone":
            name = ".".join(parts[2:-1])
            state[f"backbone.{name}.{tensor}"] = x
            if tensor == "running_var":
                state[f"backbone.{name}.num_batches_tracked"] = torch.tensor(5)
        elif "compress" in parts or "kernels" in parts:
            layer = "channel_compressor" if "compress" in parts else "content_encoder"
            module = (
                f"neck.upsample_modules.{int(parts[2][1:]) - 2}"
                if parts[0] == "neck"
                else "roi_head.mask_head.upsample"
            )
            state[f"{module}.{layer}.{tensor}"] = x
        elif parts[0] == "neck":
            kind = {"lateral": "lateral_convs", "output": "fpn_convs"}[parts[1]]
            state[f"neck.{kind}.{int(parts[2][1:]) - 2}.conv.{tensor}"] = x
        elif parts[0] == "rpn":
            name = {"conv": "rpn_conv", "cls_logits": "rpn_cls", "bbox_pred": "rpn_reg"}[parts[2]]
            state[f"rpn_head.{name}.{tensor}"] = x
        elif parts[1] == "mask_flow":
            state[f"roi_head.mask_head.{int(parts[2]) + 1}.conv_res.conv.{tensor}"] = x
        elif parts[1] == "semantic":
            level = int(parts[3][1:]) - 2 if parts[2] == "lateral" else None
            layer = {
                "lateral": f"lateral_convs.{level}.conv",
                "convs": f"convs.{parts[3]}.conv",
                "embedding": "conv_embedding.conv",
                "logits": "conv_logits",
            }[parts[2]]
            state[f"roi_head.semantic_head.{layer}.{tensor}"] = x
        else:
            stage = f"{parts[2]}." if parts[1] == "stages" else ""
            name = {
                "fc6": f"bbox_head.{stage}shared_fcs.0",
                "fc7": f"bbox_head.{stage}shared_fcs.1",
                "cls_score": f"bbox_head.{stage}fc_cls",
                "bbox_pred": f"bbox_head.{stage}fc_reg",
                "conv5_mask": f"mask_head.{stage}upsample",
                "mask_fcn_logits": f"mask_head.{stage}conv_logits",
            }.get(parts[-2], f"mask_head.{stage}convs.{parts[-3]}.conv")
            state[f"roi_head.{name}.{tensor}"] = background_last(key, x)
    return state


@pytest.mark.parametrize(
    ("name", "semantic"), [*((name, False) for name in NAMES), ("htc_fpn_r18", True)], ids=lambda value: str(value)
)
def test_a_detector_comes_back_with_its_sizes_and_rules(name: str, semantic: bool) -> None:
    model = small(name, semantic=semantic)
    config, state = from_mmdet(mmdet_state(model), name)
    assert config == model.config
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


def test_carafe_has_the_names_and_shapes_of_the_published_detector() -> None:
    """Those of mask_rcnn_r50_fpn_carafe_1x_coco: an extra level of the backbone, CARAFE in neck and mask head."""
    with torch.device("meta"):
        args = {"extra_source": "backbone"}
        model = a2fpn.create_model("maskrcnn_carafe_fpn_r50", num_classes=80, neck_args=args,
                                   mask_upsample="carafe")  # fmt: skip
        theirs = mmdet_state(model)
    shapes = {key: tuple(x.shape) for key, x in theirs.items() if key.startswith("neck.") or "mask_head.u" in key}
    expected: dict[str, tuple[int, ...]] = {}
    for i, (channels, side) in enumerate([(256, 1), (512, 1), (1024, 1), (2048, 1), (2048, 3)]):
        expected[f"neck.lateral_convs.{i}.conv.weight"] = (256, channels, side, side)
        expected[f"neck.fpn_convs.{i}.conv.weight"] = (256, 256, 3, 3)
        expected |= {f"neck.{kind}.{i}.conv.bias": (256,) for kind in ("lateral_convs", "fpn_convs")}
    for module in (*(f"neck.upsample_modules.{i}" for i in range(4)), "roi_head.mask_head.upsample"):
        expected |= {f"{module}.channel_compressor.weight": (64, 256, 1, 1), f"{module}.channel_compressor.bias": (64,)}
        expected |= {f"{module}.content_encoder.weight": (100, 64, 3, 3), f"{module}.content_encoder.bias": (100,)}
    assert shapes == expected


def test_every_stage_has_its_own_place() -> None:
    state = mmdet_state(small("htc_fpn_r18"))
    for stage in range(3):
        state[f"roi_head.bbox_head.{stage}.fc_cls.bias"] = torch.tensor([1.0, 2, 3, 9]) + 10 * stage
        state[f"roi_head.mask_head.{stage}.conv_logits.bias"] = torch.tensor([4.0, 5, 6]) + 10 * stage
    _, ours = from_mmdet(state, "htc_fpn_r18")
    for stage in range(3):
        head = f"roi_heads.stages.{stage}"
        assert ours[f"{head}.box_predictor.cls_score.bias"].sub(10 * stage).tolist() == [9, 1, 2, 3]
        assert ours[f"{head}.mask_predictor.mask_fcn_logits.bias"].tolist() == [
            0,
            *(4 + i + 10 * stage for i in range(3)),
        ]
    assert torch.equal(ours["roi_heads.mask_flow.1.0.weight"], state["roi_head.mask_head.2.conv_res.conv.weight"])


def test_the_network_sees_what_mmdetections_sees() -> None:
    state = mmdet_state(small("fasterrcnn_fpn_r18"))
    mean, std = (103.53, 116.28, 123.675), (1.0, 2.0, 4.0)
    config, ours = from_mmdet(state, "fasterrcnn_fpn_r18", bgr_to_rgb=False, mean=mean, std=std, resize="none")
    assert torch.equal(ours["backbone.body.conv1.weight"].flip(1), state["backbone.conv1.weight"])
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    theirs = (image.flip(0) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    seen = Preprocess(config.preprocess, divisor=32)([image]).tensor[0]
    torch.testing.assert_close(seen.flip(0), theirs, rtol=1e-5, atol=1e-4)
    _, rgb = from_mmdet(state, "fasterrcnn_fpn_r18")
    assert torch.equal(rgb["backbone.body.conv1.weight"], state["backbone.conv1.weight"])


def test_batch_norm_can_be_trained() -> None:
    _, ours = from_mmdet(mmdet_state(small("fasterrcnn_fpn_r18")), "fasterrcnn_fpn_r18", norm="bn")
    assert ours["backbone.body.layer2.0.bn1.num_batches_tracked"] == 5


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        (
            "htc_fpn_r18",
            {"roi_head.mask_head.1.conv_res.conv.bias": None},
            r"missing \(1\): .*mask_head\.1\.conv_res\.conv",
        ),
        (
            "cascademaskrcnn_fpn_r18",
            {"roi_head.mask_head.3.x": torch.zeros(1)},
            r"left over \(1\): roi_head\.mask_head\.3\.x",
        ),
        (
            "maskrcnn_fpn_r18",
            {"rpn_head.rpn_reg.bias": torch.zeros(4)},
            r"shape \(1\): rpn_head\.rpn_reg\.bias \(4,\), mask",
        ),
        (
            "fasterrcnn_fpn_r18",
            {"roi_head.bbox_head.fc_cls.weight": None},
            r"has no 'roi_head\.bbox_head\.fc_cls\.weight'",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_as_mmdetection_names_them(
    name: str, change: dict[str, Tensor | None], message: str
) -> None:
    state = mmdet_state(small(name)) | change
    with pytest.raises(ValueError, match=message):
        from_mmdet({key: x for key, x in state.items() if x is not None}, name)


def test_what_cannot_be_converted_says_why() -> None:
    state = mmdet_state(small("fasterrcnn_fpn_r18"))
    with pytest.raises(ValueError, match="'retinanet_fpn_r18' has no counterpart in mmdetection"):
        from_mmdet(state, "retinanet_fpn_r18")
    with pytest.raises(ValueError, match="has no ResNet bottlenecks; set stride_in_1x1=False"):
        from_mmdet(state, "fasterrcnn_fpn_r18", style="caffe")
    with pytest.raises(ValueError, match="neck 'fpn' or 'carafe_fpn', 'fasterrcnn_pafpn_r18' has 'pafpn'"):
        from_mmdet(state, "fasterrcnn_pafpn_r18")
    with pytest.raises(ValueError, match=r"has no 'roi_head\.bbox_head\.0\.fc_cls\.weight'"):
        from_mmdet(state, "htc_fpn_r18")


def test_the_command_line_converts_a_checkpoint(tmp_path: Path) -> None:
    model = small("htc_fpn_r18", semantic=True)
    torch.save({"state_dict": mmdet_state(model), "meta": {"epoch": 12}}, tmp_path / "epoch_12.pth")
    arguments = ("--from", "mmdet", "--model", "htc_fpn_r18", "--output", str(tmp_path / "htc"))
    with pytest.raises(SystemExit) as ended:
        main(["convert", str(tmp_path / "epoch_12.pth"), *arguments])
    assert ended.value.code == 0
    again = a2fpn.from_pretrained(tmp_path / "htc").state_dict()
    assert all(torch.equal(x, again[key]) for key, x in model.state_dict().items())
