"""Common parts of the converters: safe file reading, renaming of tensors, reordering of classes."""

from __future__ import annotations

import math
import pickle
import pickletools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import functional as F

from a2fpn._text import count_of
from a2fpn.build import build_model
from a2fpn.compose import compose
from a2fpn.config import ModelConfig
from a2fpn.device import without_values
from a2fpn.errors import ConfigError, MissingFileError
from a2fpn.layers import positional_keys

POOLING = {"roi_aligned": True, "roi_sampling_ratio": 0, "anchor_rounding": False}
"""RoI pooling and anchors of detectron2 and mmdetection."""
WRAPPERS = ("model", "state_dict")
"""Keys under which training frameworks store the state dict in their files."""
_TORCH_SUFFIXES = (".pth", ".pt", ".bin", ".ckpt")
_TRACKED = ".num_batches_tracked"


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict from a file of another framework, without executing code in it.

    Args:
        path: ``.pth``, ``.pt``, ``.bin`` or ``.ckpt``, read by ``torch.load(weights_only=True)``; ``.pkl``, a pickle
            of numpy arrays as published by detectron2, read by :func:`load_array_pickle`; or ``.safetensors``.

    Returns:
        The tensors, from ``model`` or ``state_dict`` if the file has such a key.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: For another kind of file, or one with anything but plain data.
    """
    path = Path(path)
    if not path.is_file():
        raise MissingFileError(f"File not found: {str(path)!r}.")
    if path.suffix == ".safetensors":
        return load_file(path)
    if path.suffix == ".pkl":
        content = load_array_pickle(path)
    elif path.suffix in _TORCH_SUFFIXES:
        try:
            content = torch.load(path, map_location="cpu", weights_only=True)
        except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
            reason = str(error).partition("\n")[0]
            raise ConfigError(
                f"{str(path)!r} holds more than tensors and plain data, or is damaged: {reason} "
                "If you trust it, load it with the framework that wrote it and save its state dict alone: "
                "torch.save(model.state_dict(), 'weights.pth')."
            ) from error
    else:
        known = ", ".join((*_TORCH_SUFFIXES, ".pkl", ".safetensors"))
        raise ConfigError(f"{str(path)!r}: expected a file that ends in {known}.")
    for key in WRAPPERS:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    wrong = (
        [str(key) for key, x in content.items() if not isinstance(x, Tensor)]
        if isinstance(content, Mapping)
        else [f"a {type(content).__name__}"]
    )
    if wrong:
        raise ConfigError(f"{str(path)!r} holds no state dict; not a tensor: {', '.join(wrong[:5])}.")
    return dict(content)


def load_array_pickle(path: str | Path) -> Any:
    """Read a pickle of numpy arrays, text, numbers and containers of them only.

    No name in the pickle is ever imported: the few that numpy uses for arrays are mapped to functions of this module
    that build tensors, and any other is an error.

    Raises:
        ValueError: For any other content.
    """
    with Path(path).open("rb") as file:
        try:
            _check_memo(file)
            file.seek(0)
            return _tensors(_ArrayUnpickler(file, encoding="latin1").load())
        # A malicious pickle can make the unpickler raise any exception.
        except Exception as error:
            raise ConfigError(
                f"{str(path)!r} is not a pickle of numpy arrays only; others are refused, since a pickle can run "
                f"arbitrary code: {error}"
            ) from error


def _check_memo(file: BinaryIO) -> None:
    """Reject memo indices that no pickle of this length needs: the unpickler allocates all places before one."""
    for count, (opcode, place, _) in enumerate(pickletools.genops(file)):
        if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT") and not (place is not None and 0 <= place <= count):
            raise pickle.UnpicklingError(f"it stores memo index {place:,} after {count_of(count, 'step')}")


class _ArrayUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        for root in ("numpy.core.", "numpy._core.", "numpy."):
            if module.startswith(root):
                module = f"numpy:{module.removeprefix(root)}"
                break
        if (module, name) not in _MEANINGS:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}")
        return _MEANINGS[module, name]


class _Array:
    """An array during unpickling, which numpy's state turns into a tensor."""

    __slots__ = ("tensor",)

    def __init__(self) -> None:
        self.tensor: Tensor | None = None

    def __setstate__(self, state: tuple[int, tuple[int, ...], _DType, bool, bytes | str]) -> None:
        _, shape, dtype, fortran, raw = state
        self.tensor = _tensor(raw, dtype, shape, fortran=fortran)


class _DType:
    """A dtype during unpickling: its code, followed by its byte order."""

    __slots__ = ("code",)

    def __init__(self, code: str) -> None:
        if code.lstrip("<|=") not in _DTYPES:
            raise pickle.UnpicklingError(f"it has an array of dtype {code!r}")
        self.code = code.lstrip("<|=")

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        if state[1] not in ("<", "|", "=") or any(part is not None for part in state[2:5]):
            raise pickle.UnpicklingError(f"it has an array of dtype {self.code!r} in another layout")


@dataclass(frozen=True)
class _Meaning:
    """Inert stand-in for one of numpy's names, which supports calls only."""

    call: Callable[..., Any]

    def __call__(self, *args: Any) -> Any:
        return self.call(*args)

    def __setstate__(self, state: object) -> NoReturn:
        raise pickle.UnpicklingError("it sets the state of a function")


def _tensor(raw: bytes | bytearray | str, dtype: _DType, shape: Sequence[int], *, fortran: bool) -> Tensor:
    data = bytearray(raw.encode("latin1") if isinstance(raw, str) else raw)
    kind = _DTYPES[dtype.code]
    if any(side < 0 for side in shape) or math.prod(shape) * kind.itemsize != len(data):
        raise pickle.UnpicklingError(f"it has an array of shape {tuple(shape)} with {len(data)} bytes")
    flat = torch.frombuffer(data, dtype=kind) if data else torch.zeros(0, dtype=kind)
    if fortran:
        return flat.reshape(tuple(reversed(shape))).permute(tuple(reversed(range(len(shape))))).contiguous()
    return flat.reshape(tuple(shape))


def _encode(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"it encodes text as {encoding!r}")
    return text.encode("latin1")


_DTYPES = {
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "b1": torch.bool,
}
_NDARRAY = _Meaning(lambda *_: _Array())
_MEANINGS = {
    ("numpy:multiarray", "_reconstruct"): _Meaning(lambda *_: _Array()),
    ("numpy:multiarray", "scalar"): _Meaning(lambda dtype, raw: _tensor(raw, dtype, (), fortran=False)),
    ("numpy:numeric", "_frombuffer"): _Meaning(
        lambda raw, dtype, shape, order: _tensor(raw, dtype, shape, fortran=order == "F")
    ),
    ("numpy", "ndarray"): _NDARRAY,
    ("numpy", "dtype"): _Meaning(lambda code, *_: _DType(code)),
    ("collections", "OrderedDict"): _Meaning(lambda *_: {}),
    ("_codecs", "encode"): _Meaning(_encode),
    # Empty bytes in protocols below 3, called without arguments.
    ("__builtin__", "bytes"): _Meaning(lambda: b""),
}


def _tensors(value: Any) -> Any:
    """Replace arrays by tensors, inside dictionaries."""
    if isinstance(value, dict):
        return {key: _tensors(item) for key, item in value.items()}
    return value.tensor if isinstance(value, _Array) else value


@dataclass(frozen=True)
class Layout:
    """Names and order of a framework's tensors, relative to ours.

    Args:
        framework: Its name in messages.
        rename: Maps a name in our state dict, with the levels' positions, to the framework's.
        ignored: Prefixes or suffixes of names without weights.
        necks: Its necks, by our names.
    """

    framework: str
    rename: Callable[[str], str]
    ignored: tuple[str, ...] = field(default=())
    necks: tuple[str, ...] = ("fpn",)


@dataclass(frozen=True)
class Pixels:
    """Pixel format of the source's network.

    Args:
        mean: Mean per channel in the source's order, in 0..255.
        std: Standard deviation likewise.
        bgr: Whether the source's order is BGR.
    """

    mean: tuple[float, ...]
    std: tuple[float, ...]
    bgr: bool

    def overrides(self) -> dict[str, tuple[float, ...]]:
        """Mean and std for :func:`a2fpn.create_model`: for images in [0, 1], in RGB order."""
        step = -1 if self.bgr else 1
        return {"mean": tuple(x / 255 for x in self.mean)[::step], "std": tuple(x / 255 for x in self.std)[::step]}


def convert(
    state: Mapping[str, Tensor], name: str, layout: Layout, pixels: Pixels, overrides: Mapping[str, Any]
) -> tuple[ModelConfig, dict[str, Tensor]]:
    """Convert another framework's state dict to a configuration and a state dict of ours.

    Sizes (classes, widths, layers) are inferred from the tensors. The background class moves from the last to the first
    position; if the source has none (per-class boxes, masks), it is filled with zeros, which are not used.

    Args:
        state: The source's tensors; not modified.
        name: The model to build, ``<detector>_<neck>_<backbone>``.
        layout: The source's names.
        pixels: The source's input.
        overrides: As in :func:`a2fpn.create_model`; they take precedence over sizes inferred from the tensors.

    Raises:
        ValueError: For missing, unexpected or mismatched tensors, with the source's names.
    """
    sizes = _sizes(state, name, layout)
    options = {"norm": "frozen", **pixels.overrides(), **sizes, **overrides}
    with without_values():
        model = build_model(compose(name, **options))
    if model.config.neck.name not in layout.necks:
        known = " or ".join(map(repr, layout.necks))
        raise ConfigError(f"{layout.framework} detectors have neck {known}, {name!r} has {model.config.neck.name!r}.")
    converted: dict[str, Tensor] = {}
    problems: dict[str, list[str]] = {"missing": [], "with another shape": []}
    used = set()
    positions = positional_keys(model)
    for key, own in model.state_dict().items():
        source = layout.rename(positions[key])
        used.add(source)
        if source not in state:
            if key.endswith(_TRACKED):
                converted[key] = torch.zeros((), dtype=own.dtype)
            else:
                problems["missing"].append(source)
            continue
        x = _reorder(key, state[source].detach(), own, pixels)
        if x.shape != own.shape:
            problems["with another shape"].append(
                f"{source} {tuple(state[source].shape)}, {name} has {tuple(own.shape)}"
            )
        converted[key] = x.to(own.dtype)
    problems["left over"] = [
        key for key in state if key not in used and not key.startswith(layout.ignored) and not key.endswith(_TRACKED)
    ]
    found = [f"{kind} ({len(names)}): {', '.join(names[:5])}" for kind, names in problems.items() if names]
    if found:
        raise ConfigError(f"The state dict is not that of {layout.framework}'s {name}: tensors {'; '.join(found)}.")
    return model.config, converted


def _reorder(key: str, x: Tensor, own: Tensor, pixels: Pixels) -> Tensor:
    """Reorder the background class and the color channels of a tensor to ours."""
    if key == "backbone.body.conv1.weight":
        return x.flip(1) if pixels.bgr else x
    if "box_predictor.cls_score." in key:
        return x.roll(1, 0)
    if "box_predictor.bbox_pred." in key and len(own) != 4:
        return _pad_front(x, 4)
    if "mask_predictor.mask_fcn_logits." in key:
        return _pad_front(x, 1)
    return x


def _pad_front(x: Tensor, rows: int) -> Tensor:
    return F.pad(x, (*(0, 0) * (x.ndim - 1), rows, 0))


def _sizes(state: Mapping[str, Tensor], name: str, layout: Layout) -> dict[str, Any]:
    """Infer overrides of :func:`a2fpn.create_model` from the shapes of tensors."""

    def has(key: str) -> bool:
        return layout.rename(key) in state

    def shape(key: str) -> tuple[int, ...]:
        source = layout.rename(key)
        if source not in state:
            raise ConfigError(
                f"The state dict is not that of {layout.framework}'s {name}: it has no {source!r}; its first tensors "
                f"are {', '.join(list(state)[:3]) or 'none'}."
            )
        return tuple(state[source].shape)

    def count(keys: Iterable[str]) -> int:
        return next(i for i, key in enumerate(keys) if not has(key))

    cascade = name.startswith(("cascade", "htc"))
    stage = "roi_heads.stages.0." if cascade else "roi_heads."
    rows, width = shape(f"{stage}box_predictor.cls_score.weight")
    channels = shape("neck.lateral.0.conv.weight")[0]
    sizes: dict[str, Any] = {
        "num_classes": rows - 1,
        "box_channels": width,
        "box_pool_size": math.isqrt(shape(f"{stage}box_head.fc6.weight")[1] // channels),
        "neck_args": {"out_channels": channels},
    }
    if has("neck.top_down.0.compress.weight"):
        sizes["neck_args"]["extra_source"] = "backbone"
    if name.startswith(("mask", "cascademask", "htc")):
        sizes["mask_layers"] = count(f"{stage}mask_head.{i}.0.weight" for i in range(len(state) + 1))
        upsample = f"{stage}mask_predictor.upsample.compress.weight"
        if has(upsample):
            sizes["mask_upsample"], sizes["mask_channels"] = "carafe", shape(upsample)[1]
        else:
            sizes["mask_channels"] = shape(f"{stage}mask_predictor.conv5_mask.weight")[0]
    if name.startswith("htc") and has("roi_heads.semantic.logits.weight"):
        sizes["semantic"] = "stuff"
        classes, sizes["semantic_channels"] = shape("roi_heads.semantic.logits.weight")[:2]
        sizes["semantic_classes"] = classes
        sizes["semantic_layers"] = count(f"roi_heads.semantic.convs.{i}.0.weight" for i in range(len(state) + 1))
    return sizes
