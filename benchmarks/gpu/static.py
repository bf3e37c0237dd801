"""The part of a detector whose shapes depend on the image alone, compiled or replayed as a CUDA graph."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from a2fpn.detectors import Detector
from a2fpn.preprocess import Batch
from a2fpn.pyramid import Features

Static = Callable[[Tensor], tuple[Features, Any]]


class _Given(nn.Module):
    """Stands for the dense head whose outputs the static part has computed already."""

    outputs: Any = None

    def forward(self, _: list[Tensor]) -> Any:
        """The outputs of the batch that the pyramid belongs to."""
        return self.outputs


def accelerated(detector: Detector, how: str) -> None:
    """Change a detector that only detects: backbone, neck and dense head run as one.

    Args:
        detector: The detector; its :meth:`~a2fpn.detectors.Detector.features` is replaced.
        how: ``"graphs"`` records a CUDA graph for every size, ``"compiled"`` calls torch's compiler.
    """
    head, given = detector.dense_head, _Given()
    features = detector.features
    if not hasattr(detector, "rpn"):
        raise ValueError("Only two-stage detectors here.")
    detector.rpn.head = given
    made: dict[Any, Static] = {}

    def static(self: Detector, batch: Batch) -> Features:
        key = (tuple(batch.tensor.shape), tuple(batch.sizes))
        if key not in made:

            def once(tensor: Tensor) -> tuple[Features, Any]:
                maps = features(Batch(tensor, batch.sizes, batch.original_sizes))
                return maps, head(list(maps.values()))

            made[key] = torch.compile(once, dynamic=False) if how == "compiled" else _graph(once, batch.tensor)
        maps, given.outputs = made[key](batch.tensor)
        return maps

    detector.features = types.MethodType(static, detector)  # type: ignore[method-assign]


class _KeptConstants(TorchFunctionMode):
    """Gives the tensors that are made of Python's numbers once and again: a graph can't record their way here."""

    def __init__(self) -> None:
        super().__init__()
        self._kept: dict[str, Any] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is not torch.tensor:
            return func(*args, **kwargs)
        key = repr((args, sorted(kwargs.items())))
        if key not in self._kept:
            self._kept[key] = func(*args, **kwargs)
        return self._kept[key]


def _graph(once: Static, sample: Tensor) -> Static:
    if sample.device.type != "cuda":
        return once
    inputs = sample.clone()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    constants = _KeptConstants()
    with torch.cuda.stream(stream), constants:
        for _ in range(3):
            once(inputs)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph), constants:
        outputs = once(inputs)

    def replay(tensor: Tensor) -> tuple[Features, Any]:
        inputs.copy_(tensor)
        assert constants  # what the graph reads lives as long as the graph
        graph.replay()
        return outputs

    return replay
