"""What torch's profiler wrote about some rounds, read: the time and the FLOPs of each region.

FLOPs follow from the shapes of an operator's tensors and its other arguments, as the trace has them. torch's
FlopCounterMode would have to run between the operators, and takes the backward pass of grouped convolutions for that of
dense ones; the profiler's own ``with_flops`` leaves backward convolutions out.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_right
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sophon.protect.regions import REGIONS

ROUND = "round "  # a recorded round's name begins with it
ELSE = "else"  # what no region covers

Event = Mapping[str, Any]


@dataclass
class Cost:
    """What a part of the recorded rounds took.

    Attributes:
        calls: how often it was entered.
        seconds: on the clock of the host.
        device_seconds: that the CUDA device worked on what was launched there; 0 without one.
        flop: of its matrix products, convolutions and attention, a multiply-add being two.
    """

    calls: int = 0
    seconds: float = 0.0
    device_seconds: float = 0.0
    flop: int = 0


@dataclass(frozen=True)
class Summary:
    """What a trace says.

    Attributes:
        rounds: names of the recorded rounds.
        seconds: that they took.
        costs: by region, in the order of `REGIONS`, then `ELSE`; their ``seconds`` sum to ``seconds``.
        operators: self seconds by operator, on the CUDA device if the trace has one.
        on_device: whether it has.
    """

    rounds: list[str]
    seconds: float
    costs: dict[str, Cost]
    operators: dict[str, float]
    on_device: bool


def summarise(trace: Mapping[str, Any]) -> Summary:
    """Read a trace in Chrome's format as torch's profiler writes it.

    What other threads do (the backward pass on a CUDA device) belongs to the region of its moment; what a CUDA device
    does, to the region that launched it. Of regions that nest the outer one counts.
    """
    kinds: dict[str, list[Event]] = {}
    for event in trace["traceEvents"]:
        if event.get("ph") == "X":
            kinds.setdefault(event.get("cat", ""), []).append(event)
    marks = kinds.get("user_annotation", [])
    rounds = [mark for mark in marks if mark["name"].startswith(ROUND)]
    seconds = math.fsum(map(_seconds, rounds))
    costs, cost_at = _costs_of((mark for mark in marks if mark["name"] in REGIONS), seconds)
    on_host = _host_work(kinds, cost_at)
    on_device = _device_work(kinds, cost_at)
    names = [mark["name"] for mark in rounds]
    return Summary(names, seconds, costs, on_device or on_host, bool(on_device))


def _seconds(event: Event) -> float:
    return float(event["dur"]) / 1e6


def _costs_of(regions: Iterable[Event], seconds: float) -> tuple[dict[str, Cost], Callable[[float], Cost]]:
    """Return the cost of each region so far, and a function that finds the one of a moment."""
    starts, ends, names = [-math.inf], [-math.inf], [ELSE]
    costs = {name: Cost() for name in (*REGIONS, ELSE)}
    costs[ELSE].seconds = seconds
    for mark in sorted(regions, key=lambda mark: (mark["ts"], -mark["dur"])):
        if mark["ts"] < ends[-1]:
            continue
        costs[mark["name"]].calls += 1
        costs[mark["name"]].seconds += _seconds(mark)
        costs[ELSE].seconds -= _seconds(mark)
        starts.append(mark["ts"])
        ends.append(mark["ts"] + mark["dur"])
        names.append(mark["name"])

    def cost_at(moment: float) -> Cost:
        index = bisect_right(starts, moment) - 1
        return costs[names[index] if moment < ends[index] else ELSE]

    return costs, cost_at


def _host_work(kinds: Mapping[str, list[Event]], cost_at: Callable[[float], Cost]) -> dict[str, float]:
    """Add the FLOPs to the costs; return the self seconds by operator."""
    spent: dict[str, float] = defaultdict(float)
    for op, callers in _with_callers(kinds.get("cpu_op", [])):
        spent[op["name"]] += _seconds(op)
        if callers:
            spent[callers[-1]["name"]] -= _seconds(op)
        if op["name"] in FLOP and not any(caller["name"] in FLOP for caller in callers):
            cost_at(op["ts"]).flop += FLOP[op["name"]](op["args"]["Input Dims"], op["args"]["Concrete Inputs"])
    return spent


def _device_work(kinds: Mapping[str, list[Event]], cost_at: Callable[[float], Cost]) -> dict[str, float]:
    """Add the device's seconds to the costs; return them by operator (by kernel where none launched it)."""
    work = [event for kind in ("kernel", "gpu_memcpy", "gpu_memset") for event in kinds.get(kind, [])]
    calls = [event for kind in ("cuda_runtime", "cuda_driver") for event in kinds.get(kind, [])]
    launched = {event["args"].get("correlation"): event["ts"] for event in calls}
    names = {op["args"].get("External id"): op["name"] for op in kinds.get("cpu_op", [])}
    spent: dict[str, float] = defaultdict(float)
    for event in work:
        cost_at(launched.get(event["args"].get("correlation"), -math.inf)).device_seconds += _seconds(event)
        spent[str(names.get(event["args"].get("External id"), event["name"]))] += _seconds(event)
    return spent


def _with_callers(operators: list[Event]) -> Iterator[tuple[Event, list[Event]]]:
    """Yield every operator with those that it runs inside of, the innermost last."""
    stack: list[Event] = []
    for op in sorted(operators, key=lambda op: (op["tid"], op["ts"], -op["dur"])):
        while stack and (stack[-1]["tid"] != op["tid"] or stack[-1]["ts"] + stack[-1]["dur"] <= op["ts"]):
            stack.pop()
        yield op, stack
        stack.append(op)


def _product(*shapes: Sequence[int]) -> int:
    (rows, inner), columns = shapes[0][-2:], shapes[1][-1]
    return 2 * math.prod(shapes[0][:-2]) * rows * inner * columns


def _convolution(dims: list[list[int]], arguments: list[str]) -> int:
    images, weight = dims[:2]
    stride, padding, dilation, transposed = (json.loads(argument.lower()) for argument in arguments[3:7])
    if transposed:
        places = math.prod(images[2:])
    else:
        places = math.prod(
            (size + 2 * p - d * (kernel - 1) - 1) // s + 1
            for size, kernel, s, p, d in zip(images[2:], weight[2:], stride, padding, dilation, strict=True)
        )
    return 2 * images[0] * places * math.prod(weight)


def _convolution_backward(dims: list[list[int]], arguments: list[str]) -> int:
    """Each of the two gradients, of the images and of the weight, costs what the forward pass does."""
    outputs, images, weight = dims[:3]
    transposed, asked = json.loads(arguments[7].lower()), json.loads(arguments[10].lower())
    gradients = sum(map(bool, asked[:2]))
    places = math.prod((images if transposed else outputs)[2:])
    return 2 * images[0] * places * math.prod(weight) * gradients


def _attention(dims: list[list[int]], arguments: list[str]) -> int:
    query, key, value = dims[:3]
    return 2 * math.prod(query[:-1]) * key[-2] * (query[-1] + value[-1])


def _attention_backward(dims: list[list[int]], arguments: list[str]) -> int:
    """The scores again, and the gradients of the query, the key, the value and the scores."""
    query, key, value = dims[1:4]
    return 2 * math.prod(query[:-1]) * key[-2] * (3 * query[-1] + 2 * value[-1])


FLOP: dict[str, Callable[[list[list[int]], list[str]], int]] = {
    "aten::mm": lambda dims, arguments: _product(*dims),
    "aten::bmm": lambda dims, arguments: _product(*dims),
    "aten::addmm": lambda dims, arguments: _product(*dims[1:]),
    "aten::baddbmm": lambda dims, arguments: _product(*dims[1:]),
    "aten::convolution": _convolution,
    "aten::convolution_backward": _convolution_backward,
}
for _kind in ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention"):
    FLOP[f"aten::_scaled_dot_product_{_kind}"] = _attention
    FLOP[f"aten::_scaled_dot_product_{_kind}_backward"] = _attention_backward
