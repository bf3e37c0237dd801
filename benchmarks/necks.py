"""Every registered neck against ``fpn``, on ResNet-50's channels at 800x1088: parameters, GMACs, time, memory.

Targets: ``a2fpn`` at most 2.2 times the GMACs of ``fpn``, 2.5 times its forward time and its training memory;
``a2fpn_lite`` at most 1.8 times each.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import torch
import typer
from torch import Tensor, nn
from torch.profiler import profile as profile_operators
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

import a2fpn
from a2fpn.layers import ConvNormAct
from benchmarks import _measure as measure

BASE = "fpn"
CHANNELS = (256, 512, 1024, 2048)
TARGETS = {
    "a2fpn": {"GMACs": 2.2, "forward": 2.5, "training memory": 2.5},
    "a2fpn_lite": {"GMACs": 1.8, "forward": 1.8, "training memory": 1.8},
}

Size = tuple[int, int]


def make_neck(name: str, channels: Sequence[int]) -> a2fpn.Neck:
    """The neck with its default arguments."""
    torch.manual_seed(0)
    return a2fpn.create_neck(name, a2fpn.PyramidSpec.from_channels(channels))


def make_features(neck: a2fpn.Neck, size: Size) -> dict[str, Tensor]:
    """Random maps of an image of the given size."""
    maps = {
        name: torch.randn(1, level.channels, -(-size[0] // level.stride), -(-size[1] // level.stride))
        for name, level in neck.in_spec.items()
    }
    return {name: x.to(memory_format=torch.channels_last) for name, x in maps.items()}


def prepare(name: str, channels: Sequence[int], size: Size, training: bool) -> measure.Call:
    """Make neck and features; return a forward pass, or with ``training`` also the backward pass."""
    # Channels last, as training and prediction lay it out.
    neck = make_neck(name, channels).to(memory_format=torch.channels_last)
    features = make_features(neck, size)
    if not training:
        return torch.inference_mode()(lambda: neck.eval()(features))
    with torch.inference_mode():
        gradients = [torch.randn_like(x) for x in neck(features).values()]

    def step() -> None:
        leaves = {key: x.detach().requires_grad_() for key, x in features.items()}
        outputs = [*neck(leaves).values(), *neck.losses().values()]
        torch.autograd.backward(outputs, [*gradients, *(None for _ in neck.losses())])
        neck.zero_grad()

    return step


def gmacs(name: str, channels: Sequence[int], size: Size) -> float:
    """Multiplications and additions of convolutions, matrix products and weighted sums in a forward pass, 1e9."""
    return count_gmacs(prepare(name, channels, size, training=False))


def count_gmacs(call: measure.Call) -> float:
    """The same of any call."""
    # torch counts neither of these two on a CPU.
    unknown = {
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
        torch.ops.aten._embedding_bag_forward_only: _bag_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=unknown) as counter:
        call()
    return int(counter.get_total_flops()) / 2e9


def _attention_flops(query: Size, key: Size, value: Size, *args: object, **kwargs: object) -> int:
    return int(sdpa_flop_count(query, key, value))


def _bag_flops(rows: Size, index: Size, *args: object, **kwargs: object) -> int:
    return 2 * index[0] * rows[1]


def parts_of(neck: a2fpn.Neck) -> dict[str, list[nn.Module]]:
    """A neck's modules by name, levels taken together, two steps deep; what remains is named after the parent."""
    parts: dict[str, list[nn.Module]] = {"rest": [neck]}
    for name, child in neck.named_children():
        parts[name] = _levels(child)
        for module in parts[name]:
            if not isinstance(module, ConvNormAct):
                for inner, grandchild in module.named_children():
                    parts.setdefault(f"{name}.{inner}", []).extend(_levels(grandchild))
    return parts


def _levels(module: nn.Module) -> list[nn.Module]:
    return list(module) if isinstance(module, nn.ModuleList) else [module]


def main(
    rounds: measure.Rounds = 7,
    quick: measure.Quick = False,
    threads: measure.Threads = 0,
    pattern: Annotated[str, typer.Option(help="Only necks whose name fits, and fpn.")] = "",
    profile: Annotated[bool, typer.Option(help="Print where the time goes, per neck and part.")] = False,
) -> None:
    """Measure the necks and print their ratios to fpn."""
    rounds = 1 if quick else rounds
    channels, size = ((64, 64, 64, 64), (64, 96)) if quick else (CHANNELS, (800, 1088))
    measure.start(threads, rounds)
    parameters = {}
    for name in [BASE, *(name for name in a2fpn.list_necks(pattern) if name != BASE)]:
        try:
            parameters[name] = sum(p.numel() for p in make_neck(name, channels).parameters())
        except ValueError as error:
            measure.console().print(f"{name} is left out: {error}")
    names = list(parameters)
    forward = measure.time_interleaved(
        {name: prepare(name, channels, size, False) for name in names}, rounds=rounds, title="forward"
    )
    training = measure.time_interleaved(
        {name: prepare(name, channels, size, True) for name in names}, rounds=rounds, title="training"
    )
    memory = measure.peak_memories(prepare, names, channels, size, True, quick=quick)
    work = {name: gmacs(name, channels, size) for name in names}
    ratios = {
        name: {
            "GMACs": work[name] / work[BASE],
            "forward": forward.ratio(name, BASE).value,
            "training": training.ratio(name, BASE).value,
            "training memory": memory[name] / memory[BASE],
        }
        for name in names
    }
    measure.print_table(
        f"Necks at {size[0]}x{size[1]}, one image; in brackets the ratio to {BASE}, for times with its range",
        ["neck", "parameters", "GMACs", "forward", "ratio", "forward + backward", "ratio", "training memory"],
        [
            [
                name,
                f"{parameters[name] / 1e6:.2f} M",
                f"{work[name]:.1f} ({ratios[name]['GMACs']:.2f})",
                measure.milliseconds(forward.median(name)),
                str(forward.ratio(name, BASE)),
                measure.milliseconds(training.median(name)),
                str(training.ratio(name, BASE)),
                f"{measure.mebibytes(memory[name])} ({ratios[name]['training memory']:.2f})",
            ]
            for name in names
        ],
    )
    measure.print_table(
        "Targets",
        ["neck", "figure", "ratio", "target"],
        [
            [name, figure, f"{ratios[name][figure]:.2f}", measure.against(ratios[name][figure], target)]
            for name in names
            for figure, target in TARGETS.get(name, {}).items()
        ],
    )
    if profile:
        for name in names:
            _profile(name, channels, size, rounds)


def _profile(name: str, channels: Sequence[int], size: Size, rounds: int) -> None:
    neck = make_neck(name, channels).to(memory_format=torch.channels_last).eval()
    features = make_features(neck, size)
    call = torch.inference_mode()(lambda: neck(features))
    seconds = measure.time_parts({name: (parts_of(neck), call)}, rounds=rounds, title=name)[name]
    total = sum(seconds.values())
    measure.print_table(
        f"{name}: forward by part, each without the parts inside it",
        ["part", "time", "share"],
        [
            [part, measure.milliseconds(t), f"{t / total:.0%}"]
            for part, t in sorted(seconds.items(), key=lambda item: -item[1])
            if t > 0.005 * total
        ],
    )
    step = prepare(name, channels, size, training=True)
    step()
    with profile_operators() as operators:
        step()
    averages = sorted(operators.key_averages(), key=lambda op: -op.self_cpu_time_total)
    total = sum(op.self_cpu_time_total for op in averages)
    measure.print_table(
        f"{name}: forward and backward by operator",
        ["operator", "time", "share", "calls"],
        [
            [
                op.key,
                measure.milliseconds(op.self_cpu_time_total / 1e6),
                f"{op.self_cpu_time_total / total:.0%}",
                str(op.count),
            ]
            for op in averages
            if op.self_cpu_time_total > 0.02 * total
        ],
    )


if __name__ == "__main__":
    typer.run(main)
