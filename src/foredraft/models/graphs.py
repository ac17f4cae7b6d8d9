"""CUDA graphs of narrow passes: a pass of a known shape is captured once and replayed, without Python or launches.

Owns the static buffers that a captured graph reads and writes. Knows nothing of models: a body is any function from
tensors to a tensor that allocates only through torch and never waits for the device.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from typing import Protocol

import torch

Body = Callable[..., torch.Tensor]
WARM_UPS = 2  # kernels choose their algorithms, and libraries allocate their workspaces, before anything is captured


class Replay(Protocol):
    """A captured computation: reads its inputs where they were at capture, writes `output` anew."""

    output: torch.Tensor

    def replay(self) -> None: ...


class CudaReplay:
    """`work` as one CUDA graph."""

    def __init__(self, work: Callable[[], torch.Tensor]) -> None:
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(WARM_UPS):
                work()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.output = work()

    def replay(self) -> None:
        self.graph.replay()


@dataclass(frozen=True, slots=True)
class Captured:
    inputs: tuple[torch.Tensor, ...]
    replay: Replay


class GraphPool:
    """Captured passes by key, the least recently used one dropped beyond `capacity`.

    A key must name everything that the body reads besides its inputs: shapes, and the memory that cache and tables
    occupy.
    """

    def __init__(
        self, capacity: int = 64, capture: Callable[[Callable[[], torch.Tensor]], Replay] = CudaReplay
    ) -> None:
        self.capacity = capacity
        self.capture = capture
        self.captured: OrderedDict[Hashable, Captured] = OrderedDict()

    def run(self, key: Hashable, body: Body, *inputs: torch.Tensor) -> torch.Tensor:
        """`body(*inputs)`, from the graph of that key; the result is the caller's own."""
        found = self.captured.get(key)
        if found is None:
            static = tuple(tensor.clone() for tensor in inputs)
            found = Captured(static, self.capture(lambda: body(*static)))
            self.captured[key] = found
            if len(self.captured) > self.capacity:
                self.captured.popitem(last=False)
        self.captured.move_to_end(key)
        for buffer, tensor in zip(found.inputs, inputs, strict=True):
            buffer.copy_(tensor)
        found.replay.replay()
        return found.replay.output.clone()
