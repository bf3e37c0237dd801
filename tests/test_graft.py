import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torchvision.models.detection import fasterrcnn_resnet50_fpn

import a2fpn
from a2fpn.convert import TARGETS, graft, graft_model
from a2fpn.detectors import RCNN
from a2fpn.layers.fusion import KernelPredictor
from a2fpn.necks import Neck
from benchmarks.graft import learned
from tests.helpers import (
    build_neck,
    largest_difference,
    pyramid_spec,
    random_features,
    random_target,
    randomize,
    tiny_model,
    with_zero_gradient,
)

ASSEMBLING = ["a2fpn", "a2fpn_lite", "carafe_fpn"]
every_target = pytest.mark.parametrize("target", TARGETS)

# A softmax of this logit against zeros is exactly one-hot in float32.
ONE_HOT = 200.0


@pytest.fixture
def images() -> list[Tensor]:
    return [torch.rand(3, 64, 96), torch.rand(3, 50, 90)]


def fpn_detector(name: str = "maskrcnn_fpn", **overrides: Any) -> RCNN:
    model = tiny_model(name, **overrides).eval()
    randomize(model.neck)
    return model


def grafted_neck(fpn: Neck, target: str, **options: Any) -> Neck:
    state = graft({f"neck.{key}": x for key, x in fpn.state_dict().items()}, target=target, **options)
    neck = build_neck(target, fpn.in_spec, out_channels=fpn.out_channels)
    neck.load_state_dict({key.removeprefix("neck."): x for key, x in state.items()})
    return neck


def relative_rms(expected: Tensor, got: Tensor) -> float:
    return float((got - expected).square().mean().sqrt() / expected.std())


# What is kept


@pytest.mark.parametrize("target", ["pafpn", "pafpn_mgc"])
@torch.no_grad()
def test_context_and_bottom_up_path_change_nothing(target: str, images: list[Tensor]) -> None:
    model = fpn_detector()
    grafted = graft_model(model, target=target)
    batch = model.preprocess(images)
    assert largest_difference(model.features(batch), grafted.features(batch)) == 0.0
    for before, after in zip(model(images), grafted(images), strict=True):
        assert len(before["boxes"]) > 0
        assert largest_difference(before, after) == 0.0


@pytest.mark.parametrize("target", ASSEMBLING)
@pytest.mark.parametrize("size", [(64, 96), (65, 97), (33, 200)])
def test_only_the_reassembly_kernels_change_anything(target: str, size: tuple[int, int]) -> None:
    fpn = build_neck("fpn")
    randomize(fpn)
    features = random_features(pyramid_spec(), size)
    exact = grafted_neck(fpn, target, center_bias=ONE_HOT)
    # Processors differ in how they round convolutions of one layout and of another.
    assert largest_difference(fpn(features), exact(features)) < 1e-4
    assert largest_difference(fpn(features), grafted_neck(fpn, target)(features)) > 1e-2


@pytest.mark.parametrize("target", ASSEMBLING)
@torch.no_grad()
def test_features_move_by_less_than_a_percent(target: str, images: list[Tensor]) -> None:
    model = fpn_detector()
    grafted = graft_model(model, target=target)
    batch = model.preprocess(images)
    expected, got = model.features(batch), grafted.features(batch)
    # Beyond the border CARAFE has zeros, the others the edge.
    limit = 0.01 if target == "carafe_fpn" else 0.005
    assert 0 < max(relative_rms(expected[p], got[p]) for p in expected) <= limit


@torch.no_grad()
def test_a_larger_bias_is_closer() -> None:
    fpn = build_neck("fpn")
    randomize(fpn)
    features = random_features(pyramid_spec(), (64, 96))
    errors = [
        relative_rms(fpn(features)["p2"], grafted_neck(fpn, "a2fpn", center_bias=bias)(features)["p2"])
        for bias in (0.0, 4.0, 6.0, 8.0, 10.0)
    ]
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 0.1


@every_target
def test_everything_but_the_neck_is_taken_over(target: str) -> None:
    model = fpn_detector()
    before = copy.deepcopy(model.state_dict())
    state = graft(model.state_dict(), target=target)
    assert all(torch.equal(state[key], x) for key, x in before.items())
    assert all(torch.equal(model.state_dict()[key], x) for key, x in before.items())
    assert all(key.startswith("neck.") for key in set(state) - set(before))
    tiny_model(f"maskrcnn_{target}").load_state_dict(state)


def test_a_norm_of_the_fpn_is_taken_over(images: list[Tensor]) -> None:
    model = fpn_detector(neck_args={"norm_layer": "batchnorm2d", "act_layer": "relu"})
    grafted = graft_model(model, target="a2fpn_lite", center_bias=ONE_HOT)
    batch = model.preprocess(images)
    assert largest_difference(model.features(batch), grafted.features(batch)) == 0.0


# What can learn


@every_target
def test_every_parameter_gets_a_gradient_within_two_steps(target: str) -> None:
    model = graft_model(fpn_detector().train(), target=target)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    targets = [random_target([[4, 4, 30, 40], [40, 10, 90, 60]], (64, 96))] * 2
    images = [torch.rand(3, 64, 96) for _ in targets]
    dead = {name for name, _ in model.named_parameters()}
    for _ in range(2):
        optimizer.zero_grad()
        sum(model(images, targets).values()).backward()
        dead &= set(with_zero_gradient(model))
        optimizer.step()
    assert dead == set()


def test_the_predictor_learns_thanks_to_its_scale() -> None:
    assert learned(8.0, scale=4.0) < 0.5
    assert learned(8.0, scale=1.0) > 0.9


@pytest.mark.parametrize("target", ASSEMBLING)
def test_kernels_start_on_the_nearest_pixel(target: str) -> None:
    neck = grafted_neck(build_neck("fpn"), target)
    predictors = [m for m in neck.top_down.modules() if isinstance(m, KernelPredictor)]
    assert len(predictors) == 3
    for predictor in predictors:
        (kernel,) = predictor(torch.zeros(1, predictor.conv.in_channels, 1, 1))[..., 0, 0]
        assert kernel.argmax() == 12
        assert kernel[12].item() == pytest.approx(0.992, abs=1e-3)
        assert predictor.conv.weight.any()


# The detector


@every_target
@torch.no_grad()
def test_a_grafted_detector_can_be_saved(target: str, tmp_path: Path, images: list[Tensor]) -> None:
    model = fpn_detector(
        "fasterrcnn_fpn", neck_args={"extra_levels": 2}, anchor_sizes=[[8], [16], [32], [64], [96], [128]]
    )
    grafted = graft_model(model, target=target)
    again = a2fpn.from_pretrained(a2fpn.save_pretrained(grafted, tmp_path))
    assert again.config == grafted.config
    assert again.config.neck.name == target
    assert again.config.neck.args == model.config.neck.args
    for before, after in zip(grafted(images), again(images), strict=True):
        assert largest_difference(before, after) == 0.0


def test_the_name_of_a_grafted_detector_says_so() -> None:
    model = tiny_model("fasterrcnn_fpn_lite0")
    assert graft_model(model).config.architecture == "fasterrcnn_a2fpn_lite0"


def test_a_detector_and_its_graft_share_nothing() -> None:
    model = fpn_detector()
    before = copy.deepcopy(model.state_dict())
    randomize(graft_model(model))
    assert largest_difference(model.state_dict(), before) == 0


@pytest.mark.parametrize("training", [True, False])
def test_a_graft_keeps_mode_type_and_frozen_parts(training: bool) -> None:
    model = tiny_model("maskrcnn_fpn", backbone="test_resnet", trainable_layers=2).double().train(training)
    grafted = graft_model(model)
    assert grafted.training is training
    assert {x.dtype for x in grafted.parameters()} == {torch.float64}
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    assert frozen
    assert [name for name, p in grafted.named_parameters() if not p.requires_grad] == frozen


def test_a_graft_is_reproducible() -> None:
    state = fpn_detector().state_dict()
    random_state = torch.get_rng_state()
    first, again, other = (graft(state, seed=seed) for seed in (3, 3, 4))
    assert torch.equal(torch.get_rng_state(), random_state)
    assert largest_difference(first, again) == 0
    differing = {key for key in first if not torch.equal(first[key], other[key])}
    assert "neck.top_down.p2.kernels.conv.weight" in differing
    assert not differing & set(state)


def test_arguments_reach_the_neck() -> None:
    grafted = graft_model(fpn_detector(), target="pafpn_mgc", attention="dot", node_budget=2)
    assert grafted.neck.context.attention == "dot"
    assert [len(entities) for entities in grafted.neck.context.entities] == [8, 6, 4, 2]
    assert grafted.config.neck.args == {"out_channels": 16, "attention": "dot", "node_budget": 2}


@pytest.mark.parametrize(("finest", "nodes"), [(2, [8, 6, 4]), (3, [6, 4, 2])])
def test_names_of_levels_tell_their_strides(finest: int, nodes: list[int]) -> None:
    fpn = build_neck("fpn", pyramid_spec(3, finest=finest))
    state = {f"neck.{key}": x for key, x in fpn.state_dict().items()}
    grafted = graft(state, target="pafpn_mgc", node_budget=2)
    assert [len(grafted[f"neck.context.entities.p{finest + i}"]) for i in range(3)] == nodes


# Bad input


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("bifpn", r"An FPN cannot be grafted onto neck 'bifpn'\. Did you mean .*'a2fpn"),
        ("fpn", r"An FPN cannot be grafted onto neck 'fpn'\. Did you mean .*'a2fpn"),
        ("nearest", r"onto neck 'nearest'\. Known: a2fpn, a2fpn_lite, carafe_fpn, pafpn, pafpn_mgc\."),
    ],
)
def test_an_unknown_target_is_an_error(target: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        graft(fpn_detector().state_dict(), target=target)


@pytest.mark.parametrize("neck", ["pafpn", "a2fpn", "bifpn"])
def test_a_detector_with_another_neck_is_an_error(neck: str) -> None:
    message = (
        r"Expected the state dict of a detector .* with neck 'fpn': neck\.lateral.*it differs in \d+ tensors: neck\."
    )
    with pytest.raises(ValueError, match=message):
        graft(tiny_model(f"maskrcnn_{neck}").state_dict())


def test_a_foreign_state_is_an_error() -> None:
    with torch.device("meta"):
        foreign = fasterrcnn_resnet50_fpn(weights=None, weights_backbone=None).state_dict()
    for state in (foreign, {}, {"model": foreign}):
        with pytest.raises(ValueError, match=r"with neck 'fpn'.*it has no 'neck.lateral.p<i>.conv.weight'; its first"):
            graft(state)


@pytest.mark.parametrize("damage", ["missing", "shape"])
def test_an_incomplete_fpn_is_an_error(damage: str) -> None:
    state = fpn_detector().state_dict()
    bias = state.pop("neck.output.p4.conv.bias")
    if damage == "shape":
        state["neck.output.p4.conv.bias"] = bias[1:]
    with pytest.raises(ValueError, match=r"with neck 'fpn'.*it differs in 1 tensors: neck\.output\.p4\.conv\.bias\."):
        graft(state)


def test_a_norm_must_be_named_and_cannot_follow_a_bottom_up_path() -> None:
    model = fpn_detector(neck_args={"norm_layer": "batchnorm2d"})
    with pytest.raises(ValueError, match=r"norm_layer=, which must then be given.*neck\.lateral\.p2\.norm"):
        graft(model.state_dict(), target="a2fpn_lite")
    with pytest.raises(
        ValueError, match=r"cannot be initialized from an FPN with norm_layer or act_layer.*'a2fpn_lite'"
    ):
        graft_model(model, target="a2fpn")


def test_an_unknown_argument_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"Neck 'a2fpn' has no argument 'atention'\. Did you mean 'attention'"):
        graft(fpn_detector().state_dict(), atention="dot")
