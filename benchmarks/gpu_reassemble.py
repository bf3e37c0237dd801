"""``a2fpn.layers.reassemble`` on a CUDA device: the Triton kernels beside other forms of the op and beside a copy.

Every form reads the map and the weights and writes the result; a copy of as many bytes is the floor. Target: at most
2 times the copy's time, forward and backward, at 2 x 256 x 100 x 168 -> 200 x 336, k = 5.
"""

from __future__ import annotations

import functools
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor

from a2fpn.layers.reassemble import _Reassemble, _reassemble_by_shifts
from benchmarks import _measure as measure

K, BATCH, CHANNELS = 5, 2, 256
SIZES = (((100, 168), (200, 336)), ((50, 84), (100, 168)))
TARGET = 2.0

Size = tuple[int, int]
Form = Callable[[Tensor, Tensor], Tensor]


def ours(x: Tensor, kernels: Tensor) -> Tensor:
    """Run ``reassemble`` as it runs on CUDA."""
    from a2fpn.layers.reassemble_triton import reassemble_triton

    return reassemble_triton(x, kernels)


def bags(x: Tensor, kernels: Tensor) -> Tensor:
    """Weighted bags: ``embedding_bag``."""
    result: Tensor = _Reassemble.apply(x, kernels.to(x.dtype), K)
    return result


def shifts(x: Tensor, kernels: Tensor) -> Tensor:
    """A shifted product for each place of the window."""
    return _reassemble_by_shifts(x, kernels.to(x.dtype), K)


def compiled() -> Form:
    """Shifts under ``torch.compile``, whose buffers stay for a backward pass that runs again and again."""
    torch._functorch.config.donated_buffer = False
    return torch.compile(shifts, dynamic=False)


FORMS: dict[str, Callable[[], Form]] = {
    "triton": lambda: ours,
    "embedding_bag": lambda: bags,
    "shifts": lambda: shifts,
    "shifts, compiled": compiled,
}


def inputs(source: Size, target: Size, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """Map and direction channels-last, as detectors have them, and float32 weights."""
    generator = torch.Generator("cuda").manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device="cuda")
    x, direction = (
        random(BATCH, CHANNELS, *size).to(dtype, memory_format=torch.channels_last) for size in (source, target)
    )
    return x.requires_grad_(), random(BATCH, K * K, *target).softmax(1).requires_grad_(), direction


def copy_seconds(size: int) -> float:
    """Seconds of a copy that reads and writes ``size`` bytes in all."""
    source = torch.empty(size // 2, dtype=torch.uint8, device="cuda")
    return seconds(functools.partial(torch.empty_like(source).copy_, source))


def seconds(call: measure.Call) -> float:
    """Median by CUDA events, the cache flushed before every call."""
    from triton.testing import do_bench

    return float(do_bench(call, warmup=20, rep=100, return_mode="median")) / 1000


def errors(got: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> list[float]:
    """Relative rms errors."""
    return [float((a.double() - b).norm() / b.norm()) for a, b in zip(got, expected, strict=True)]


def compare(source: Size, target: Size, dtype: torch.dtype) -> list[dict[str, Any]]:
    """Time every form, forward and backward, with its errors against float64; a form that fails says why."""
    x, kernels, direction = inputs(source, target, dtype)
    wide = [y.detach().to(dtype).double().requires_grad_() for y in (x, kernels)]
    exact = bags(*wide)
    expected = (exact.detach(), *torch.autograd.grad(exact, wide, direction.double()))
    operands = x.nbytes + kernels.nbytes
    moved = {"forward": operands + direction.nbytes, "backward": 2 * operands + direction.nbytes}
    common = {"source": source, "target": target, "dtype": str(dtype).removeprefix("torch.")}
    floor = {key: copy_seconds(size) for key, size in moved.items()}
    rows = [
        {"form": "copy", "pass": key, "seconds": floor[key], "GB/s": moved[key] / floor[key] / 1e9, "over copy": 1.0}
        for key in moved
    ]
    for name, make in FORMS.items():
        if make is compiled and (source, target) != SIZES[0]:
            continue  # compiling takes longer than all the rest
        try:
            form = make()
            out = form(x, kernels)
            found = errors((out.detach(), *torch.autograd.grad(out, (x, kernels), direction)), expected)
            out = form(x, kernels)
            backward = functools.partial(torch.autograd.grad, out, (x, kernels), direction, retain_graph=True)
            calls = {"forward": functools.partial(form, x, kernels), "backward": backward}
            for key, call in calls.items():
                took = seconds(call)
                rows.append(
                    {
                        "form": name,
                        "pass": key,
                        "seconds": took,
                        "GB/s": moved[key] / took / 1e9,
                        "over copy": took / floor[key],
                        "errors": found[:1] if key == "forward" else found[1:],
                    }
                )
        except Exception as error:  # one form must not cost the figures of the others
            rows.append({"form": name, "pass": "forward", "failed": f"{type(error).__name__}: {error}"[:500]})
    return [common | row for row in rows]


def main(output: Annotated[Path | None, typer.Option(help="Writes the figures there as JSON.")] = None) -> None:
    """Print time, bytes per second and errors; without a CUDA device, a line that says so."""
    if not torch.cuda.is_available():
        measure.console().print("No CUDA device: nothing to measure.")
        return
    rows = []
    for source, target in SIZES:
        for dtype in (torch.bfloat16, torch.float32):
            found = compare(source, target, dtype)
            rows += found
            title = f"{BATCH} x {CHANNELS} x {source[0]}x{source[1]} -> {target[0]}x{target[1]}, k = {K}, {dtype}"
            columns = ["form", "pass", "µs", "GB/s", "over copy", "target", "errors"]
            measure.print_table(title, columns, map(_cells, found))
    if output is not None:
        import triton as library

        device = {
            "device": torch.cuda.get_device_name(),
            "torch": torch.__version__,
            "triton": library.__version__,
            "cuda": torch.version.cuda,
            "python": platform.python_version(),
        }
        output.write_text(json.dumps(device | {"rows": rows}, indent=1) + "\n", encoding="utf-8")


def _cells(row: dict[str, Any]) -> list[str]:
    if "failed" in row:
        return [row["form"], row["failed"].splitlines()[0][:60], *[""] * 5]
    target = TARGET if row["form"] == "triton" else None
    return [
        row["form"],
        row["pass"],
        f"{1e6 * row['seconds']:.0f}",
        f"{row['GB/s']:.0f}",
        f"{row['over copy']:.2f}",
        measure.against(row["over copy"], target),
        " ".join(f"{error:.0e}" for error in row.get("errors", [])),
    ]


if __name__ == "__main__":
    typer.run(main)
