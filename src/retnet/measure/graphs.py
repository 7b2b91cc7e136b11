"""CUDA graphs: a GPU's work without the time that Python takes to ask for it."""

from __future__ import annotations

from collections.abc import Callable

import torch

WARMUP = 3  # calls before the capture: kernels are compiled and memory is found in them


def captured(run: Callable[[], object], device: torch.device) -> Callable[[], object]:
    """The same work as one CUDA graph, which a call replays; on a CPU, which has none, the function itself.

    Whatever `run` reads must stay where it is in memory, and what it makes lies in the same place at every replay.

    Args:
        run: the work, which must not wait for the device or look at its numbers.
        device: that does it.

    Raises:
        RuntimeError: it cannot be captured.
    """
    if device.type != "cuda":
        return run
    # of warm-up and capture: what a call leaves behind belongs to a stream
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.device(device), torch.cuda.stream(stream):
        for _ in range(WARMUP):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.graph(graph, stream=stream):
        run()

    def replay() -> None:  # holds the graph, and `run` with all that it reads
        graph.replay()

    return replay
