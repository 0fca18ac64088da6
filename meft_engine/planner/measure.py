"""How fast this machine is, found in a second or two; what cannot be measured here is given or assumed, and said."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

# Stated, not measured: a card with 16 lanes of PCIe 4 in a node with 200 Gbit/s, of which half the peak is reached.
_ASSUMED = {"tflops": 60.0, "device_gbps": 700.0, "pcie_gbps": 20.0, "network_gbps": 12.0}
_COLD = 128 << 20  # bytes
_ENOUGH = 0.95  # share of a step's operations that is timed; the rest are many kinds of small products


@dataclass
class Speeds:
    """Of the machine that is planned for.

    ``tflops``: 10¹² operations a second in the base's products of matrices, in its dtype. ``host_gbps``: 10⁹ bytes a
    second that a copy in host memory reads and writes. ``device_gbps``: the same on the device (where device and host
    are one, ``host_gbps``). ``pcie_gbps``: between them, one way. ``network_gbps``: into and out of a node.
    """

    tflops: float
    host_gbps: float
    device_gbps: float
    pcie_gbps: float
    network_gbps: float
    pass_gbps: float | None = None
    """10⁹ bytes a second that an activation function reads and writes in the base's dtype: on a CPU it is no copy.
    ``None``: as ``device_gbps``."""
    sources: dict[str, str] = field(default_factory=dict)
    """Of each: ``measured here``, ``given`` or ``assumed``."""
    tflops_by_dtype: dict[str, float] = field(default_factory=dict)
    """Of the same products in fp32 and in bf16, where they were measured."""

    @property
    def bytes_per_second(self) -> float:
        """Of passes where the model computes."""
        return self.device_gbps * 1e9

    @property
    def flops_per_second(self) -> float:
        """Where the model computes."""
        return self.tflops * 1e12


def find_speeds(
    products: Sequence[tuple[int, int, int, int]],
    dtype: torch.dtype,
    *,
    device: str = "cpu",
    seconds: float = 2.0,
    **given: float | None,
) -> Speeds:
    """Measure what is not given, as far as it is here.

    Args:
        products: the base's (m, k, n, count), as :class:`BaseTrace` has them; none: of a common size.
        dtype: of the base. device: where it computes, ``"cpu"`` or ``"cuda"``. seconds: to spend, about.
        given: any of the fields of :class:`Speeds` that are numbers; ``None``: not given.
    """
    present = device == "cpu" or torch.cuda.is_available()
    found = {name: value for name, value in given.items() if value is not None}
    sources = dict.fromkeys(found, "given")
    by_dtype: dict[str, float] = {}

    def add(name: str, value: float) -> None:
        found[name], sources[name] = value, "measured here"

    if "host_gbps" not in found:
        add("host_gbps", copy_bandwidth("cpu") / 1e9)
    if device == "cpu":
        found["device_gbps"], sources["device_gbps"] = found["host_gbps"], sources["host_gbps"]
    elif present and "device_gbps" not in found:
        add("device_gbps", copy_bandwidth("cuda") / 1e9)
    if device != "cpu" and present and "pcie_gbps" not in found:
        add("pcie_gbps", _to_device() / 1e9)
    if device == "cpu" and "pass_gbps" not in found:
        add("pass_gbps", pass_bandwidth(dtype) / 1e9)
    if present and "tflops" not in found:
        shapes = products or [(512, 1024, 4096, 1)]
        for name, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
            share = 0.6 if kind == dtype else 0.3
            by_dtype[name] = product_rate(shapes, kind, device=device, seconds=share * seconds) / 1e12
        add("tflops", by_dtype["fp32" if dtype == torch.float32 else "bf16"])
    for name, value in _ASSUMED.items():
        if name not in found:
            found[name], sources[name] = value, "assumed"
    return Speeds(**found, sources=sources, tflops_by_dtype=by_dtype)


def copy_bandwidth(device: str, count: int = 1 << 26) -> float:
    """Bytes a second that a copy of ``count`` floats reads and writes."""
    source, target = torch.ones(count, device=device), torch.zeros(count, device=device)
    return 2 * source.nbytes / _typical(lambda: target.copy_(source), device)


def pass_bandwidth(dtype: torch.dtype, count: int = 1 << 21) -> float:
    """Bytes a second that SiLU of ``count`` numbers reads and writes on a CPU."""
    x = torch.ones(count, dtype=dtype)
    return 2 * x.nbytes / _typical(lambda: torch.nn.functional.silu(x), "cpu")


def product_rate(
    products: Sequence[tuple[int, int, int, int]], dtype: torch.dtype, *, device: str = "cpu", seconds: float = 1.0
) -> float:
    """Operations a second over products of these sizes, each of which is timed in turn until time is up."""
    whole = sum(2 * m * k * n * count for m, k, n, count in products)
    began, flops, took = time.perf_counter(), 0.0, 0.0
    for m, k, n, count in products:
        a = torch.ones(m, k, dtype=dtype, device=device)
        # As weights lie; so many that none is still in a cache when its turn comes, as in a model of many layers.
        copies = max(1, min(32, _COLD // (n * k * dtype.itemsize)))
        turn = itertools.cycle([torch.ones(n, k, dtype=dtype, device=device).T for _ in range(copies)])
        one = _typical(lambda a=a, turn=turn: a @ next(turn), device)
        flops, took = flops + 2 * m * k * n * count, took + one * count
        if flops > _ENOUGH * whole or time.perf_counter() - began > seconds:
            break
    return flops / took


def _to_device(count: int = 1 << 26) -> float:
    source = torch.ones(count, dtype=torch.uint8).pin_memory()
    target = torch.empty_like(source, device="cuda")
    return count / _typical(lambda: target.copy_(source, non_blocking=True), "cuda")


def _typical(work: Callable[[], object], device: str, least: float = 0.02) -> float:
    """Seconds of it: the median of several runs, after one that does not count."""
    _timed(work, device)
    seconds: list[float] = []
    while len(seconds) < 3 or (sum(seconds) < least and len(seconds) < 100):
        seconds.append(_timed(work, device))
    return sorted(seconds)[len(seconds) // 2]


def _timed(work: Callable[[], object], device: str) -> float:
    if device != "cpu":
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if device != "cpu":
        torch.cuda.synchronize()
    return time.perf_counter() - began
