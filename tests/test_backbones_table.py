"""How timm's architectures are attached: the shipped table, the probe behind it, and the sweep that makes it."""

import csv
import dataclasses
import re
from pathlib import Path

import pytest
import timm
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import a2fpn
from a2fpn.backbones import BackboneInfo, TimmBackbone, UnsupportedBackboneError, attach, find_backbone_info
from a2fpn.backbones.create import create_network
from a2fpn.backbones.freezing import contributors
from a2fpn.backbones.info import PYRAMID, TABLE, read_table
from a2fpn.backbones.probe import measure, probe
from a2fpn.config import BackboneConfig
from a2fpn.device import without_values
from benchmarks import backbones as sweep

same_timm = pytest.mark.skipif(
    timm.__version__ != next(iter(read_table().values())).timm,
    reason="the table was made with another version of timm",
)


def smallest_of_families() -> list[str]:
    return sorted(sweep.smallest())


# One for every word of BackboneInfo.adaptations, and the plain one.
KINDS = {
    "test_resnet": "native",
    "test_mambaout": "permuted",
    "test_vit2": "simple_fpn",
    "swin_s3_tiny_224": "permuted+switched",
    "maxvit_tiny_tf_224": "padded",
    "test_vit_relpos": "fixed+simple_fpn",
    "pit_ti_224": "fixed+resized+completed",
    "convmixer_768_32": "padded+resized+simple_fpn",
}


@pytest.fixture
def fresh_lookups() -> None:
    """Nothing that a test looked up is remembered by the next one."""
    yield
    find_backbone_info.cache_clear()


# The table


@same_timm
def test_the_table_knows_every_architecture_and_almost_all_attach() -> None:
    table = read_table()
    assert set(table) == set(timm.list_models())
    attached = [name for name, found in table.items() if not found.reason]
    assert len(attached) >= 0.995 * len(table)


def test_the_table_is_what_attachments_write() -> None:
    text = (Path(a2fpn.__file__).parent / TABLE).read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["architecture"] for row in rows] == sorted(read_table())
    for row in rows:
        found = read_table()[row["architecture"]]
        assert {key: row[key] for key in found.to_row()} == found.to_row()
        assert BackboneInfo.from_row(found.to_row()) == found
        assert len(found.strides) == len(found.channels) == len(found.indices)
        assert list(found.indices) == sorted(set(found.indices))
        assert (found.size is None) or found.divisor == found.size


@same_timm
@pytest.mark.parametrize(("name", "adaptations"), KINDS.items())
def test_adaptations_say_what_had_to_be_done(name: str, adaptations: str) -> None:
    assert read_table()[name].adaptations == adaptations


def test_backbones_are_listed_by_pattern() -> None:
    assert a2fpn.list_backbones("resnet18*") == ["resnet18", "resnet18d"]
    every, pyramids = a2fpn.list_backbones(), a2fpn.list_backbones(pyramid=True)
    assert set(pyramids) < set(every)
    assert {"test_vit", "test_resnet"} <= set(every)
    assert "test_resnet" in pyramids
    assert all(set(PYRAMID) <= set(read_table()[name].strides) for name in pyramids)
    assert a2fpn.list_backbones("no such*") == []


@pytest.mark.parametrize(
    ("strides", "wanted", "source"),
    [
        ((2, 4, 8, 16, 32), 8, 2),
        ((16,), 4, 0),
        ((8, 16), 4, 0),
        ((8, 16), 64, 1),
        # Of two equally near ones the coarser.
        ((4, 16), 8, 1),
    ],
)
def test_the_nearest_stride_is_the_source(strides: tuple[int, ...], wanted: int, source: int) -> None:
    assert BackboneInfo("x", strides=strides).source(wanted) == source


# The probe


@same_timm
@pytest.mark.parametrize("name", ["test_resnet", "test_mambaout", "test_vit", "test_convnext", "test_vit_relpos"])
def test_the_probe_finds_what_the_table_says(name: str) -> None:
    known = read_table()[name]
    assert dataclasses.replace(probe(name), unused=known.unused, unused_from_8=known.unused_from_8) == known


def test_an_architecture_outside_the_table_is_probed(monkeypatch: pytest.MonkeyPatch, fresh_lookups: None) -> None:
    expected = read_table()["test_byobnet"]
    table = {name: found for name, found in read_table().items() if name != "test_byobnet"}
    monkeypatch.setattr(attach, "read_table", lambda: table)
    find_backbone_info.cache_clear()
    found = find_backbone_info("test_byobnet")
    assert found.strides == expected.strides
    maps = TimmBackbone(BackboneConfig("test_byobnet")).eval()(torch.zeros(1, 3, 64, 64))
    assert [x.shape[2] for x in maps.values()] == [16, 8, 4, 2]


def test_a_table_of_another_timm_is_not_believed(monkeypatch: pytest.MonkeyPatch, fresh_lookups: None) -> None:
    wrong = dataclasses.replace(read_table()["test_resnet"], timm="0.9", strides=(4, 8, 16, 32, 64))
    monkeypatch.setattr(attach, "read_table", lambda: {"test_resnet": wrong})
    find_backbone_info.cache_clear()
    assert find_backbone_info("test_resnet").strides == (2, 4, 8, 16, 32)


def test_what_cannot_be_attached_says_why_and_names_three_that_can(
    monkeypatch: pytest.MonkeyPatch, fresh_lookups: None
) -> None:
    refused = dataclasses.replace(read_table()["test_resnet"], reason="It has no maps.")
    table = {**read_table(), "test_resnet": refused}
    monkeypatch.setattr(attach, "read_table", lambda: table)
    find_backbone_info.cache_clear()
    with pytest.raises(
        UnsupportedBackboneError, match=r"'test_resnet' can't be attached: It has no maps\. Supported"
    ) as info:
        a2fpn.create_model("maskrcnn_a2fpn", backbone="test_resnet")
    near = str(info.value).rpartition(": ")[2].rstrip(".").split(", ")
    assert len(near) == 3
    assert "test_resnet" not in near
    assert "test_resnet" not in a2fpn.list_backbones("test_*")
    for name in near:
        assert not find_backbone_info(name).reason


def test_a_constructor_that_fails_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: object, **options: object) -> None:
        raise RuntimeError("no such layer")

    monkeypatch.setattr(attach.timm, "create_model", broken)
    found = probe("test_resnet")
    assert found.adaptations == "unsupported"
    assert "RuntimeError: no such layer" in found.reason


@pytest.mark.parametrize(
    ("shapes", "strides", "exact", "channels_last"),
    [
        ([(1, 8, 16, 24), (1, 9, 8, 12)], (4, 8), True, False),
        ([(1, 16, 24, 8), (1, 8, 12, 9)], (4, 8), True, True),
        # Rounded down, where ceil is declared.
        ([(1, 8, 15, 24), (1, 9, 8, 12)], (4, 8), False, False),
        ([(1, 8, 9, 14), (1, 9, 4, 7)], (8, 16), False, False),
    ],
)
def test_strides_are_measured(
    shapes: list[tuple[int, ...]], strides: tuple[int, ...], exact: bool, channels_last: bool
) -> None:
    maps = measure([torch.zeros(shape) for shape in shapes], (64, 96), (8, 9))
    assert (maps.strides, maps.exact, maps.channels_last) == (strides, exact, channels_last)


@pytest.mark.parametrize(
    ("shapes", "message"),
    [
        ([(1, 8, 16, 24)], "expected 2 maps"),
        ([(1, 8, 384), (1, 9, 96)], "expected 2 maps"),
        ([(1, 8, 16, 24), (1, 7, 8, 12)], r"expected maps of \[8, 9\] channels"),
        # As of a network that resizes its image inside.
        ([(1, 8, 16, 16), (1, 9, 16, 16)], "has different strides in height and width"),
        ([(1, 8, 8, 12), (1, 9, 16, 24)], "strides decrease"),
    ],
)
def test_what_is_no_pyramid_is_an_error(shapes: list[tuple[int, ...]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        measure([torch.zeros(shape) for shape in shapes], (64, 96), (8, 9))


# Networks without values


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_mambaout", "test_vit_relpos", "pit_ti_224"])
def test_networks_on_the_meta_device_are_timms_with_nothing_drawn(name: str) -> None:
    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            called.add(func.overloadpacket)
            return func(*args, **(kwargs or {}))

    called: set[object] = set()
    drawing = {torch.ops.aten.uniform_, torch.ops.aten.normal_, torch.ops.aten.erfinv_}
    with torch.device("meta"), Recorder():
        ours = create_network(name, features_only=True)
    assert not called & drawing
    with torch.device("meta"), Recorder():
        theirs = timm.create_model(name, features_only=True)
    assert called & drawing
    facts = [
        [
            (key, x.shape, x.dtype, x.device, x.requires_grad)
            for key, x in [*net.named_parameters(), *net.named_buffers()]
        ]
        for net in (ours, theirs)
    ]
    assert facts[0] == facts[1]


def test_networks_elsewhere_are_drawn_as_timm_draws_them() -> None:
    states = []
    for create in (create_network, timm.create_model):
        torch.manual_seed(0)
        states.append(create("test_vit").state_dict())
    assert all(torch.equal(x, states[1][key]) for key, x in states[0].items())


def test_without_values_the_rest_is_computed() -> None:
    with without_values():
        weight = torch.nn.Parameter(torch.zeros(2))
        # A gradient has to reach what is added.
        assert contributors([torch.zeros(2).add_(weight)]) == [{weight}]
        assert torch.zeros(2, device="cpu").fill_(3).tolist() == [3, 3]
        assert torch.zeros(2).fill_(3).is_meta


# The sweep


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("test_resnet", {"strides": (2, 4, 8, 16, 64)}, "own strides are (4, 8, 16, 32), declared (4, 8, 16)"),
        ("test_resnet", {"strides": (4, 8, 16, 32), "indices": (0, 1, 2, 3)}, "own strides are (2, 4, 8, 16)"),
        ("test_resnet", {"channels_last": True}, "it declares"),
        ("test_mambaout", {"channels_last": False}, "it declares"),
        ("test_convnext", {"divisor": 1}, "it declares"),
        ("test_vit", {"divisor": 7}, "16"),
    ],
)
def test_the_sweep_finds_what_is_not_as_declared(name: str, change: dict[str, object], message: str) -> None:
    found = find_backbone_info(name)
    assert sweep._fault(found, train=False) is None
    fault = sweep._fault(dataclasses.replace(found, **change), train=False)
    assert message in str(fault)


@same_timm
@pytest.mark.parametrize(
    ("name", "unused", "unused_from_8"),
    [
        ("test_resnet", "", ""),
        ("pit_ti_224", "body.norm", "body.norm"),
        # Its finest map depends on layers that the others do not.
        ("hrnet_w18_small", "", "incre_modules.0 stage4.0.fuse_layers.0.1"),
    ],
)
def test_the_sweep_finds_unused_parameters(name: str, unused: str, unused_from_8: str) -> None:
    found = find_backbone_info(name)
    assert found.unused is not None
    assert found.unused_from_8 is not None
    assert (" ".join(found.unused), " ".join(found.unused_from_8)[: len(unused_from_8)]) == (unused, unused_from_8)
    nobody_looked = dataclasses.replace(found, unused=None, unused_from_8=None)
    assert sweep._on_meta(sweep._survey, nobody_looked) == found
    assert sweep._fault(found, train=False) is None
    if unused:
        fault = sweep._fault(dataclasses.replace(found, unused=()), train=False)
        assert str(fault) == "No gradient reaches 2 parameters: body.body.norm.weight, body.body.norm.bias."
    if unused_from_8 != unused:
        fault = sweep._fault(dataclasses.replace(found, unused_from_8=()), train=False)
        assert re.match(r"No gradient reaches \d+ parameters: stage4", str(fault))


@pytest.mark.parametrize(
    ("strides", "expected"),
    [
        ((4, 8, 16, 32), ("head",)),
        ((32, 4, 16, 8), ("head",)),
        ((8, 16, 32), ("head", "fuse.0")),
        ((8, 32), None),
        ((8, 16), None),
        ((2, 4, 8, 16, 32), None),
        ((4, 8, 16, 64), None),
    ],
)
def test_what_is_dead_is_known_for_the_usual_levels(strides: tuple[int, ...], expected: tuple[str, ...] | None) -> None:
    own = (2, 4, 8, 16, 32, 64)
    found = BackboneInfo("x", strides=own, unused=("head",), unused_from_8=("head", "fuse.0"))
    assert BackboneInfo.from_row(found.to_row()) == found
    assert found.unused_by([found.source(stride) for stride in strides]) == expected
    nobody_looked = BackboneInfo("x", strides=own)
    assert nobody_looked.unused_by([found.source(stride) for stride in strides]) is None
    assert BackboneInfo.from_row(nobody_looked.to_row()) == nobody_looked


@same_timm
@pytest.mark.parametrize("strides", [(4, 8, 16, 32), (8, 16, 32)])
@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "pit_ti_224", "crossvit_tiny_240", "coat_tiny"])
def test_what_the_table_knows_is_not_tried(
    name: str, strides: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The network itself is not run at construction, and no second one is made."""
    built, run = [], []
    create = timm.create_model

    def counting(*args: object, **options: object) -> torch.nn.Module:
        body: torch.nn.Module = create(*args, **options)
        body.register_forward_pre_hook(lambda module, inputs: run.append(module))
        built.append(body)
        return body

    monkeypatch.setattr(timm, "create_model", counting)
    backbone = TimmBackbone(BackboneConfig(name, strides=strides))
    assert (len(built), run) == (1, [])
    known = read_table()[name]
    assert backbone.unused == (known.unused if 4 in strides else known.unused_from_8)
    # What was skipped is what a look at the network itself would leave out.
    nobody_looked = dataclasses.replace(backbone.info, unused=None, unused_from_8=None)
    looked = TimmBackbone(BackboneConfig(name, strides=strides), info=nobody_looked)
    assert len(run) > 0
    assert set(looked.unused) == set(backbone.unused)
    assert looked.state_dict().keys() == backbone.state_dict().keys()


def test_a_sweep_can_stop_and_go_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "rows.csv"
    first = sweep.sweep(["test_resnet"], output, {"test_resnet"})
    again = sweep.sweep(["test_resnet", "test_byobnet"], output, set())
    assert [row["architecture"] for row in again] == ["test_resnet", "test_byobnet"]
    assert again[0] == first[0]
    assert (first[0]["trained"], again[1]["trained"]) == ("True", "False")
    assert capsys.readouterr().out.count("test_resnet:") == 1
    assert BackboneInfo.from_row(again[1]).unused == ()


def test_the_shipped_table_can_be_tried_in_parts(
    monkeypatch: pytest.MonkeyPatch, fresh_lookups: None, capsys: pytest.CaptureFixture[str]
) -> None:
    sweep.main(pattern="test_convnext*", part="1/2", check=True)
    out = capsys.readouterr().out
    assert f"Part 1/2 of timm {timm.__version__}: 2 architectures." in out
    assert "2 of 2 attach as the table says; 1 also took a training step." in out
    wrong = dataclasses.replace(find_backbone_info("test_convnext"), divisor=1)
    monkeypatch.setattr(sweep, "find_backbone_info", lambda name: wrong)
    with pytest.raises(SystemExit, match=r"test_convnext: For an image of .* it declares"):
        sweep.main(pattern="test_convnext", part="1/3", check=True)


@pytest.mark.parametrize("wrong", ["0/10", "11/10", "1", "a/b", "", "/10", "today/10"])
def test_a_part_is_a_number_of_a_number(wrong: str) -> None:
    assert sweep.read_part("3/10") == (3, 10)
    with pytest.raises(ValueError, match="A part is written k/n"):
        sweep.read_part(wrong)


def test_parts_are_disjoint_and_complete(monkeypatch: pytest.MonkeyPatch, fresh_lookups: None) -> None:
    swept: list[str] = []
    monkeypatch.setattr(sweep, "_fault", lambda found, train: swept.append(found.architecture))
    for k in range(1, 8):
        sweep.main(pattern="test_*", part=f"{k}/7", check=True)
    assert sorted(swept) == timm.list_models("test_*")


@same_timm
@pytest.mark.parametrize("name", KINDS)
def test_a_member_of_each_kind_does_what_it_declares(name: str) -> None:
    assert sweep._fault(find_backbone_info(name), train=False) is None


@pytest.mark.slow  # KINDS above has a member of each kind, test_backbones.py trains some
@same_timm
@pytest.mark.parametrize("name", smallest_of_families())
def test_a_small_member_of_each_family_trains(name: str) -> None:
    assert sweep._fault(find_backbone_info(name), train=True) is None


@same_timm
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if place % 4 else ())
        for place, name in enumerate(smallest_of_families())
    ],
)
def test_every_parameter_of_each_family_has_a_layer(name: str) -> None:
    with without_values():
        backbone = TimmBackbone(BackboneConfig(name))
        ids = backbone.layer_ids()
    assert list(sorted(ids)) == sorted(name for name, _ in backbone.named_parameters())
    assert set(ids.values()) == set(range(max(ids.values()) + 1))
    # The network's own parameters are spread over its depth, and not all in the last layer for want of a match.
    own = [ids[f"body.{name}"] for name, _ in backbone.body.named_parameters()]
    assert min(own) == 0
    assert max(own) >= 2
    assert own.count(max(own)) < 0.7 * len(own)


@same_timm
@pytest.mark.parametrize(
    "name",
    [
        name if position % 12 == 0 else pytest.param(name, marks=pytest.mark.slow)
        for position, name in enumerate(smallest_of_families())
    ],
)
def test_the_early_part_of_each_family_can_be_frozen(name: str) -> None:
    with without_values():
        whole, backbone = TimmBackbone(BackboneConfig(name)), TimmBackbone(BackboneConfig(name, trainable_layers=3))
    ids = backbone.layer_ids()
    # timm itself freezes some.
    trainable = {name for name, p in whole.body.named_parameters() if p.requires_grad}
    own = {name: p for name, p in backbone.body.named_parameters() if name in trainable}
    frozen = [ids[f"body.{name}"] for name, p in own.items() if not p.requires_grad]
    trained = [ids[f"body.{name}"] for name, p in own.items() if p.requires_grad]
    assert min(frozen) == 0
    assert max(frozen) <= max(trained)
    assert all(p.requires_grad for p in backbone.made.parameters())
