"""detectron2's state dicts and files: every tensor in its place, and nothing but tensors."""

import codecs
import collections
import functools
import io
import os
import pickle
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import a2fpn
from a2fpn.convert import from_detectron2, load_array_pickle, read_state_dict
from a2fpn.preprocess import Preprocess
from a2fpn.pretrained.checkpoint import read_checkpoint
from benchmarks import parity
from tests.helpers import randomize, run_hub

NAMES = ["fasterrcnn_fpn_r18", "maskrcnn_fpn_r18", "cascadercnn_fpn_r18", "cascademaskrcnn_fpn_r18"]
SMALL: dict[str, Any] = {
    "num_classes": 3,
    "norm": "frozen",
    "neck_args": {"out_channels": 8},
    "box_channels": 12,
    "box_pool_size": 5,
    "mask_channels": 10,
    "mask_layers": 2,
}
"""Sizes that a conversion must find in the tensors."""
RULES: dict[str, Any] = {
    "roi_aligned": True,
    "roi_sampling_ratio": 0,
    "anchor_rounding": False,
    "mean": [103.53 / 255, 116.28 / 255, 123.675 / 255][::-1],
    "std": [1 / 255] * 3,
    "rpn_post_nms_top_n_train": 1000,
}
CASCADE_RULES = {
    "rpn_post_nms_top_n_train": 2000,
    "stage_loss_weights": (1, 1, 1),
    "stage_masks": "first",
    "stage_resampling": False,
    "scale_gradients": True,
    "box_loss_beta": 0,
}


@functools.cache
def small(name: str) -> a2fpn.detectors.RCNN:
    """A detector as detectron2 configures it, with random weights; not to be changed."""
    return random_detector(name, **RULES | (CASCADE_RULES if name.startswith("cascade") else {}))


def random_detector(name: str, **options: Any) -> a2fpn.detectors.RCNN:
    """A detector whose weights are all random, but for those of the background that nothing reads."""
    sizes = {key: value for key, value in SMALL.items() if "mask" not in key or "mask" in name or "htc" in name}
    model = a2fpn.create_model(name, **(sizes | options)).eval()
    randomize(model)
    for key, x in model.state_dict().items():
        if "mask_fcn_logits" in key or ("box_predictor.bbox_pred" in key and len(x) > 4):
            x[: len(x) // 4] = 0
    return model


def background_last(key: str, x: Tensor) -> Tensor:
    """A tensor as the other frameworks order it."""
    if "cls_score" in key:
        return torch.cat([x[1:], x[:1]])
    if "mask_fcn_logits" in key or ("box_predictor.bbox_pred" in key and len(x) > 4):
        return x[len(x) // 4 :]
    return x


def detectron2_state(model: a2fpn.detectors.RCNN) -> dict[str, Tensor]:
    """The state dict that detectron2 has of the same detector."""
    state = {}
    for key, x in model.state_dict().items():
        parts = key.split(".")
        tensor = parts[-1]
        if parts[0] == "backbone":
            name = ".".join(parts[2:-1])
            for i in range(1, 5):
                name = name.replace(f"layer{i}.", f"res{i + 1}.").replace(f"bn{i}", f"conv{i}.norm")
            name = name.replace("downsample.0", "shortcut").replace("downsample.1", "shortcut.norm")
            stem = "" if name.startswith("res") else "stem."
            state[f"backbone.bottom_up.{stem}{name}.{tensor}"] = x.flip(1) if name == "conv1" else x
        elif parts[0] == "neck":
            state[f"backbone.fpn_{parts[1]}{parts[2][1:]}.{tensor}"] = x
        elif parts[0] == "rpn":
            name = {"conv": "conv", "cls_logits": "objectness_logits", "bbox_pred": "anchor_deltas"}[parts[2]]
            state[f"proposal_generator.rpn_head.{name}.{tensor}"] = x
        else:
            stage = f"{parts[2]}." if parts[1] == "stages" else ""
            module, layer = parts[-3:-1] if "mask_head" not in key else ("mask_head", parts[-3])
            name = {
                "fc6": f"box_head.{stage}fc1",
                "fc7": f"box_head.{stage}fc2",
                "cls_score": f"box_predictor.{stage}cls_score",
                "bbox_pred": f"box_predictor.{stage}bbox_pred",
                "conv5_mask": "mask_head.deconv",
                "mask_fcn_logits": "mask_head.predictor",
            }.get(layer)
            state[f"roi_heads.{name or f'{module}.mask_fcn{int(layer) + 1}'}.{tensor}"] = background_last(key, x)
    return state


def source(name: str) -> dict[str, Tensor]:
    """What :func:`detectron2_state` gives of :func:`small`."""
    return detectron2_state(small(name))


def convert(name: str, state: dict[str, Tensor], **options: Any) -> Any:
    return from_detectron2(state, name, stride_in_1x1=False, **options)


@pytest.mark.parametrize("name", NAMES)
def test_a_detector_comes_back_with_its_sizes_and_rules(name: str) -> None:
    config, state = convert(name, source(name))
    model = small(name)
    assert config == model.config
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(x, state[key]) for key, x in model.state_dict().items())


def test_the_background_comes_first_and_colors_are_swapped() -> None:
    state = source("maskrcnn_fpn_r18")
    state["roi_heads.box_predictor.cls_score.bias"] = torch.tensor([10.0, 20, 30, 99])
    state["roi_heads.box_predictor.bbox_pred.bias"] = torch.arange(12.0)
    state["roi_heads.mask_head.predictor.bias"] = torch.tensor([1.0, 2, 3])
    state["backbone.bottom_up.stem.conv1.weight"] = torch.arange(3.0).view(1, 3, 1, 1).expand(64, 3, 7, 7)
    _, ours = convert("maskrcnn_fpn_r18", state)
    assert ours["roi_heads.box_predictor.cls_score.bias"].tolist() == [99, 10, 20, 30]
    assert ours["roi_heads.box_predictor.bbox_pred.bias"].tolist() == [0] * 4 + list(range(12))
    assert ours["roi_heads.mask_predictor.mask_fcn_logits.bias"].tolist() == [0, 1, 2, 3]
    assert ours["backbone.body.conv1.weight"][5, :, 3, 2].tolist() == [2, 1, 0]
    _, rgb = convert("maskrcnn_fpn_r18", state, input_format="RGB")
    assert rgb["backbone.body.conv1.weight"][5, :, 3, 2].tolist() == [0, 1, 2]


@pytest.mark.parametrize("own", [False, True], ids=["argument", "in the state dict"])
def test_the_network_sees_what_detectron2s_sees(own: bool) -> None:
    mean, std = (100.0, 110.0, 120.0), (1.0, 2.0, 4.0)
    state = source("fasterrcnn_fpn_r18")
    statistics: dict[str, Any] = {"pixel_mean": mean, "pixel_std": std}
    if own:
        state |= {key: torch.tensor(x)[:, None, None] for key, x in statistics.items()}
        statistics = {}
    config, _ = convert("fasterrcnn_fpn_r18", state, resize="none", **statistics)
    image = torch.randint(0, 256, (3, 32, 32), dtype=torch.uint8)
    theirs = (image.flip(0) - torch.tensor(mean)[:, None, None]) / torch.tensor(std)[:, None, None]
    ours = Preprocess(config.preprocess, divisor=32)([image]).tensor[0]
    torch.testing.assert_close(ours.flip(0), theirs, rtol=1e-5, atol=1e-4)


def test_what_carries_no_weights_is_left_out_and_batch_norm_can_be_trained() -> None:
    state = source("fasterrcnn_fpn_r18")
    state["proposal_generator.anchor_generator.cell_anchors.0"] = torch.zeros(3, 4)
    state["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"] = torch.tensor(7)
    convert("fasterrcnn_fpn_r18", state)
    _, trained = convert("fasterrcnn_fpn_r18", state, norm="bn")
    assert trained["backbone.body.bn1.num_batches_tracked"] == 7
    assert trained["backbone.body.layer1.0.bn1.num_batches_tracked"] == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"backbone.fpn_lateral3.bias": None},
            r"maskrcnn_fpn_r18: tensors missing \(1\): backbone\.fpn_lateral3\.bias\.",
        ),
        ({"roi_heads.keypoint_head.x": torch.zeros(1)}, r"tensors left over \(1\): roi_heads\.keypoint_head\.x\."),
        (
            {"proposal_generator.rpn_head.anchor_deltas.bias": torch.zeros(4)},
            r"shape \(1\): proposal_generator\.rpn_head\.anchor_deltas\.bias \(4,\), maskrcnn\w+ has \(12,\)",
        ),
        (
            {"roi_heads.box_predictor.cls_score.weight": None},
            r"it has no 'roi_heads\.box_predictor\.cls_score\.weight'; its first tensors are backbone\.bottom_up\.",
        ),
        (
            {"roi_heads.mask_head.predictor.weight": torch.zeros(1, 10, 1, 1)},  # one mask for all classes
            r"roi_heads\.mask_head\.predictor\.weight \(1, 10, 1, 1\), maskrcnn_fpn_r18 has \(4, 10, 1, 1\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_as_detectron2_names_them(
    change: dict[str, Tensor | None], message: str
) -> None:
    state = source("maskrcnn_fpn_r18") | change
    with pytest.raises(ValueError, match=message):
        convert("maskrcnn_fpn_r18", {key: x for key, x in state.items() if x is not None})


def test_what_cannot_be_converted_says_why() -> None:
    state = source("fasterrcnn_fpn_r18")
    with pytest.raises(ValueError, match="'htc_fpn_r18' has no counterpart in detectron2"):
        convert("htc_fpn_r18", state)
    with pytest.raises(ValueError, match="'fasterrcnn_pafpn_r18' has 'pafpn'"):
        convert("fasterrcnn_pafpn_r18", state)
    with pytest.raises(ValueError, match=r"missing \(\d+\): .*res2\.2\.conv1\.weight"):
        convert("fasterrcnn_fpn_r34", state)
    with pytest.raises(ValueError, match="Unknown argument 'min_sise'"):
        convert("fasterrcnn_fpn_r18", state, min_sise=4)
    with pytest.raises(ValueError, match=r"it has no .*first tensors are none"):
        convert("fasterrcnn_fpn_r18", {})


def test_strides_in_the_1x1_convolutions_need_bottlenecks() -> None:
    with pytest.raises(ValueError, match=r"'resnet18\.tv_in1k' has no ResNet bottlenecks; set stride_in_1x1=False"):
        from_detectron2(source("fasterrcnn_fpn_r18"), "fasterrcnn_fpn_r18")
    backbone = a2fpn.create_backbone("r50", stride_in_1x1=True)
    block = backbone.body.layer3[0]
    assert (block.conv1.stride, block.conv2.stride) == ((2, 2), (1, 1))
    assert [x.shape[-1] for x in backbone(torch.zeros(1, 3, 64, 64)).values()] == [16, 8, 4, 2]


# Files


ARRAYS = {
    "a": np.arange(24, dtype=np.float32).reshape(2, 3, 4),
    "fortran": np.asfortranarray(np.arange(6, dtype=np.float64).reshape(2, 3)),
    "half": np.ones((2, 1), dtype=np.float16),
    "scalar": np.array(3, dtype=np.int64),
    "empty": np.zeros((0, 4), dtype=np.float32),
    "bytes": np.arange(3, dtype=np.uint8),
    "flags": np.array([True, False]),
}


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [dict, collections.OrderedDict])
def test_a_pickle_of_arrays_is_read(protocol: int, kind: type, tmp_path: Path) -> None:
    content = {"model": kind(ARRAYS), "__author__": "Ann", "number": np.float32(0.5)}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(content, protocol))
    state = read_state_dict(tmp_path / "model.pkl")
    assert list(state) == list(ARRAYS)
    for key, x in ARRAYS.items():
        assert torch.equal(state[key], torch.from_numpy(x.copy())), key
        assert state[key].is_contiguous()
    loaded = load_array_pickle(tmp_path / "model.pkl")
    assert (loaded["__author__"], loaded["number"].item()) == ("Ann", 0.5)


def call(function: str, *arguments: bytes) -> bytes:
    """A pickle that calls ``module.name``."""
    module, _, name = function.rpartition(".")
    return b"c" + module.encode() + b"\n" + name.encode() + b"\n(" + b"".join(arguments) + b"tR."


def text(value: str) -> bytes:
    return b"V" + value.encode() + b"\n"


def array(shape: bytes, raw: bytes, kind: bytes = b"f4") -> bytes:
    """A pickle of an array as numpy writes it, with any shape and bytes."""
    dtype = b"cnumpy\ndtype\n(V" + kind + b"\ntR"
    state = b"(K\x01" + shape + dtype + b"\x89C" + bytes([len(raw)]) + raw + b"t"
    return b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tC\x01btR" + state + b"b."


def test_the_pickles_of_these_tests_are_pickles() -> None:
    (x,) = [pickle.loads(array(b"(K\x02t", struct.pack("<2f", 1, 2)))]
    assert x.tolist() == [1, 2]
    assert pickle.loads(call("builtins.len", text("abc"))) == 3


@pytest.mark.parametrize(
    "data",
    [
        call("os.system", text("touch MARK")),
        call("posix.system", text("touch MARK")),
        call("subprocess.call", b"(", text("touch"), text("MARK"), b"l"),
        call("builtins.eval", text("open('MARK', 'w')")),
        call("builtins.open", text("MARK"), text("w")),
        call("builtins.getattr", b"cnumpy\nndarray\n", text("call")),
        call("numpy.testing._private.utils.runstring", text("open('MARK', 'w')"), b"}"),
        call("numpy.load", text("MARK")),
        call("numpy.core.multiarray.fromfile", text("MARK")),
        call("numpy.numeric._frombuffer"),  # no module of numpy's, though it looks like one inside
        call("torch.load", text("MARK")),
        call("torch._utils._rebuild_tensor_v2"),
        call("a2fpn.convert._common.read_state_dict", text("MARK")),
        call("_codecs.encode", text("abc"), text("rot13")),
        call("__builtin__.bytes", b"J\xff\xff\xff\x7f"),
        call("numpy.dtype", text("O")),
        call("numpy.dtype", text(">f4")),
        b"\x80\x04\x8c\x05posix\x8c\x06system\x93\x8c\x0atouch MARK\x85R.",
        b"(S'touch MARK'\nios\nsystem\n.",
        b"cnumpy\nndarray\n(N}V__call__\nV1\nstb.",  # changes a function that it may only call
        b"cnumpy\nndarray\n}b.",
        b"ccollections\nOrderedDict\n(tR(N}V__class__\nV1\nstb.",
        b"P0\n.",
        b"\x80\x02\x82\x01.",
        array(b"(K\x03t", struct.pack("<2f", 1, 2)),
        array(b"(J\x00\x00\x00\x7fJ\x00\x00\x00\x7ft", b""),
        array(b"(J\xff\xff\xff\xffJ\xfe\xff\xff\xfft", struct.pack("<2f", 1, 2)),
        array(b"(K\x01t", b"\0" * 8, b"O8"),
        pickle.dumps(np.array([{}, print], dtype=object)),
        pickle.dumps(np.array(["a"])),
        pickle.dumps(np.zeros(2, dtype=[("a", "f4")])),
        pickle.dumps(np.zeros(2, dtype=">f4")),
        pickle.dumps(torch.nn.Linear(1, 1)),
        pickle.dumps({"model": ARRAYS})[:-40],
        b"",
        b"not a pickle",
    ],
)
def test_a_pickle_of_anything_else_is_refused_and_runs_nothing(
    data: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model.pkl").write_bytes(data)
    with pytest.raises(ValueError, match=r"'model\.pkl' is not a pickle of numpy arrays only; others are refused"):
        read_state_dict("model.pkl")
    assert os.listdir() == ["model.pkl"]


def test_a_refused_pickle_leaves_the_reader_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "bad.pkl").write_bytes(b"cnumpy\nndarray\n(N}V__call__\nV1\nstb.")
    with pytest.raises(ValueError, match="it sets the state of a function"):
        load_array_pickle(tmp_path / "bad.pkl")
    (tmp_path / "good.pkl").write_bytes(pickle.dumps(ARRAYS))
    assert load_array_pickle(tmp_path / "good.pkl")["a"].shape == (2, 3, 4)


@pytest.mark.parametrize("put", [b"r\xff\xff\xff\x7f", b"p2147483647\n", b"p-1\n"])
def test_a_pickle_of_few_bytes_takes_no_gigabytes(tmp_path: Path, put: bytes) -> None:
    """The interpreter's own reader would make room for two thousand million objects."""
    (tmp_path / "bad.pkl").write_bytes(b"}" + put + b".")
    with pytest.raises(ValueError, match=r"it stores memo index (2,147,483,647|-1) after 1 step"):
        load_array_pickle(tmp_path / "bad.pkl")


@settings(deadline=None, database=None, max_examples=150, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_damaged_pickles_give_tensors_or_a_value_error(tmp_path_factory: pytest.TempPathFactory, data: Any) -> None:
    good = pickle.dumps({"model": ARRAYS}, data.draw(st.integers(0, 5)))
    at = data.draw(st.integers(0, len(good) - 1))
    junk = data.draw(st.binary(min_size=1, max_size=6))
    path = tmp_path_factory.getbasetemp() / "damaged.pkl"
    path.write_bytes(good[:at] + junk + good[at + len(junk) :])
    try:
        state = read_state_dict(path)
    except ValueError:
        return
    assert all(isinstance(x, Tensor) for x in state.values())


class Code:
    """Unpickled, it makes a file."""

    def __reduce__(self) -> Any:
        return open, ("MARK", "w")


def test_files_of_torch_are_read_with_weights_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {"a": torch.ones(2)}, "iteration": 5}, "d2.pth")
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": {"epoch": 3}}, "mm.pth")
    torch.save({"a": torch.ones(2)}, "plain.pt")
    for name in ("d2.pth", "mm.pth", "plain.pt"):
        assert read_state_dict(name)["a"].tolist() == [1, 1]
    torch.save({"state_dict": {"a": torch.ones(2)}, "meta": Code()}, "code.pth")
    with pytest.raises(ValueError, match=r"'code\.pth' holds more than tensors.*save its state dict alone"):
        read_state_dict("code.pth")
    assert not Path("MARK").exists()
    torch.save({"model": {"a": 3}}, "number.pth")
    with pytest.raises(ValueError, match=r"holds no state dict; not a tensor: a\."):
        read_state_dict("number.pth")
    torch.save([torch.ones(2)], "list.pth")
    with pytest.raises(ValueError, match=r"holds no state dict; not a tensor: a list\."):
        read_state_dict("list.pth")
    Path("empty.pth").write_bytes(b"")
    with pytest.raises(ValueError, match=r"'empty\.pth' holds more than tensors"):
        read_state_dict("empty.pth")
    Path("model.onnx").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected a file that ends in \.pth, .*\.pkl, \.safetensors"):
        read_state_dict("model.onnx")
    with pytest.raises(FileNotFoundError, match=r"File not found: 'gone\.pth'"):
        read_state_dict("gone.pth")


# The command line


def test_the_command_line_converts_a_pickle(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = random_detector("fasterrcnn_fpn_r18", roi_aligned=True, roi_sampling_ratio=0, anchor_rounding=False)
    file, folder = tmp_path / "model_final.pkl", tmp_path / "converted"
    buffer = io.BytesIO()
    pickle.dump({"model": {key: x.numpy() for key, x in detectron2_state(model).items()}}, buffer)
    file.write_bytes(buffer.getvalue())
    command = ("convert", file, "--from", "detectron2", "--model", "fasterrcnn_fpn_r18", "--output", folder)
    assert str(run_hub(*command)).endswith("set stride_in_1x1=False.")
    assert not folder.exists()
    options = ("--option", "stride_in_1x1=false", "--option", "resize=none", "--option", "pixel_std=[58, 57, 56]")
    assert run_hub(*command, *options) is None
    assert capsys.readouterr().out == f'Load it: a2fpn.from_pretrained("{folder}")\n'
    again = a2fpn.from_pretrained(folder)
    assert again.config.preprocess.resize == "none"
    assert all(torch.equal(x, again.state_dict()[key]) for key, x in model.state_dict().items())
    model.preprocess = again.preprocess
    image = torch.rand(3, 64, 64)
    with torch.no_grad():
        (ours,), (theirs,) = model([image]), again([image])
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    origin = read_checkpoint(folder).metadata["converted_from"]
    assert (origin["framework"], origin["file"], len(origin["sha256"])) == ("detectron2", "model_final.pkl", 64)
    assert run_hub(*command, *options) == f"hub: error: {str(folder)!r} holds a checkpoint; choose another folder."
    other = (*command[:-1], tmp_path / "other", "--option")
    assert run_hub(*other, "stride_in_1x1") == "hub: error: --option 'stride_in_1x1': expected KEY=VALUE."
    assert str(run_hub(*other, "stride_in_1x1=false", "--option", 'min_size="big"')).startswith(
        "hub: error: --option: "
    )


def test_parity_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(parity.importlib.util, "find_spec", lambda name: None)
    for source in ("detectron2", "mmdet"):
        parity.main(source=source)
        assert capsys.readouterr().out == f"{source} is not installed: nothing to compare with.\n"


def test_text_that_looks_like_bytes_is_what_python_2_wrote(tmp_path: Path) -> None:
    raw = struct.pack("<2f", 1.5, -2)
    data = b"\x80\x02cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    data += b"(K\x01(K\x02tcnumpy\ndtype\n(U\x02f4K\x00K\x01tR(K\x03U\x01<NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb"
    data += b"\x89U\x08" + raw + b"tb."
    assert pickle.loads(data, encoding="latin1").tolist() == [1.5, -2]
    (tmp_path / "old.pkl").write_bytes(data)
    assert load_array_pickle(tmp_path / "old.pkl").tolist() == [1.5, -2]
    assert codecs.encode("é", "latin1") == b"\xe9"
