"""Tests of measurements inside necks."""

import itertools
import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from torchvision.transforms.functional import to_pil_image

import a2fpn
from a2fpn.layers import ATTENTION_KINDS
from benchmarks import attention_maps
from benchmarks.attention_maps import diagnose
from tests.helpers import attention_weights, randomize, tiny_model

IMAGES = [torch.randint(0, 256, (3, 64, 96), dtype=torch.uint8), torch.rand(3, 50, 70)]
LEVELS = ["c2", "c3", "c4", "c5"]


def test_a_fresh_neck_is_orthogonal_and_changes_nothing() -> None:
    model = tiny_model("maskrcnn_a2fpn")
    report = diagnose(model, IMAGES)
    assert report.images == 2
    assert report.attention == "scaled_cosine"
    assert all(x < 1e-4 for x in report.orthogonality.values())
    assert list(report.orthogonality) == LEVELS
    assert set(report.context_size.values()) == {0.0}
    fusions = [*(f"top_down.p{i}" for i in (2, 3, 4)), *(f"bottom_up.p{i}" for i in (3, 4, 5))]
    assert sorted(report.gate_change) == sorted(report.kernel_center) == sorted(fusions)
    assert set(report.gate_change.values()) == {0.0}
    assert all(0.6 < x < 0.8 for x in report.kernel_center.values())  # e^4 / (e^4 + 24)


def test_distances_are_those_of_all_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_maps, "QUERIES", 10**6)
    model = tiny_model("fasterrcnn_pafpn_mgc", neck_args={"attention": "dot"}).eval()
    randomize(model.neck, std=0.3)
    report = diagnose(model, IMAGES[:1])
    maps = list(model.backbone(model.preprocess(IMAGES[:1]).tensor).values())
    mgc = model.neck.context
    nodes = mgc.nodes(maps)
    for kind in ATTENTION_KINDS:
        for i in (2, 3):
            query = mgc.query[i](maps[i]).flatten(2).transpose(1, 2)
            weights = attention_weights(query, nodes[i], kind)[0]
            pairs = list(itertools.combinations(weights, 2))
            distance = torch.stack([(a - b).abs().sum() / 2 for a, b in pairs]).mean()
            cosine = torch.stack([1 - torch.cosine_similarity(a, b, 0) for a, b in pairs]).mean()
            assert report.map_distance[kind][LEVELS[i]] == pytest.approx(distance.item(), rel=1e-3)
            assert report.map_cosine_distance[kind][LEVELS[i]] == pytest.approx(cosine.item(), rel=1e-2, abs=1e-5)
            assert 0 < distance <= 1
    assert all(x > 0 for x in report.context_size.values())


@torch.no_grad()
def test_equal_queries_have_equal_maps() -> None:
    model = tiny_model("fasterrcnn_a2fpn_lite")
    for query in model.neck.context.query:
        nn.init.zeros_(query.weight)
    report = diagnose(model, IMAGES)
    assert max(x for found in report.map_distance.values() for x in found.values()) < 1e-5


@torch.no_grad()
def test_gates_and_kernels_are_read_where_they_are_used() -> None:
    model = tiny_model("fasterrcnn_a2fpn")
    model.neck.top_down[1].gates.gate.bias.fill_(-100)
    model.neck.top_down[2].kernels.reset_center(1000)
    nn.init.zeros_(model.neck.bottom_up[0].kernels.conv.weight)
    model.neck.bottom_up[0].kernels.reset_center(0)
    report = diagnose(model, IMAGES)
    assert report.gate_change["top_down.p3"] == pytest.approx(1)
    assert report.gate_change["top_down.p2"] == 0
    assert (report.kernel_center["top_down.p4"], report.kernel_entropy["top_down.p4"]) == pytest.approx((1, 0))
    assert (report.kernel_center["bottom_up.p3"], report.kernel_entropy["bottom_up.p3"]) == pytest.approx((1 / 25, 1))


@pytest.mark.parametrize("neck", ["fpn", "pafpn", "dysample_fpn"])
def test_a_neck_without_such_parts_has_nothing_to_report(neck: str) -> None:
    report = diagnose(tiny_model(f"fasterrcnn_{neck}"), IMAGES)
    assert report.attention is None
    assert report.map_distance == report.gate_change == report.kernel_center == report.orthogonality == {}


def test_the_model_stays_as_it_was() -> None:
    model = tiny_model("maskrcnn_a2fpn").train()
    model.backbone.eval()
    flags = [module.training for module in model.modules()]
    first = diagnose(model, IMAGES)
    assert [module.training for module in model.modules()] == flags
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.neck.modules())
    assert diagnose(model, IMAGES) == first


def test_no_image_is_an_error() -> None:
    with pytest.raises(ValueError, match="no image"):
        diagnose(tiny_model("fasterrcnn_a2fpn"), [])


def test_the_command_writes_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a2fpn.save_pretrained(tiny_model("maskrcnn_a2fpn"), tmp_path / "model")
    (tmp_path / "images").mkdir()
    for i in range(3):
        image: Tensor = torch.randint(0, 256, (3, 64, 80), dtype=torch.uint8)
        to_pil_image(image).save(tmp_path / "images" / f"{i}.png")
    output = tmp_path / "maps.json"
    attention_maps.main(str(tmp_path / "model"), tmp_path / "images", output, limit=2)
    report = json.loads(output.read_text(encoding="utf-8"))
    assert report["images"] == 2
    assert set(report["map_distance"]) == set(ATTENTION_KINDS)
    assert list(report["map_distance"]["scaled_dot"]) == LEVELS
    assert "scaled_cosine (its own)" in capsys.readouterr().out
