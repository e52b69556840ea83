"""A network in inference, started on a GPU with one call for all its kernels."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from synmlops.learning.precision import autocast
from synmlops.params import Precision


@dataclass(frozen=True)
class _Recording:
    graph: torch.cuda.CUDAGraph
    image: Tensor
    logits: Tensor


class Replay:
    """Runs a network on batch after batch; on a GPU, from the second batch of a shape on, from a recording.

    To start some hundred kernels one by one takes Python as long as a GPU needs to run them.

    Parameters
    ----------
    network : nn.Module
        In evaluation mode.
    precision : {"auto", "bf16", "float32"}
    record : bool
        False for a network that may decide by what it sees which kernels it runs.
    """

    def __init__(self, network: nn.Module, precision: Precision, *, record: bool = True) -> None:
        self._network, self._precision, self._record = network, precision, record
        self._recordings: dict[torch.Size, _Recording | None] = {}

    @torch.inference_mode()
    def __call__(self, image: Tensor) -> Tensor:
        """Map (n, 1, z, y, x) to logits, which on a GPU the next call with this shape may overwrite."""
        if image.device.type != "cuda" or not self._record:
            return self._run(image)
        if image.shape not in self._recordings:  # kernels are compiled and chosen first
            self._recordings[image.shape] = None
            return self._run(image)
        recording = self._recordings[image.shape]
        if recording is None:
            recording = self._recordings[image.shape] = self._recorded(image)
        recording.image.copy_(image)
        recording.graph.replay()
        return recording.logits

    def forget(self) -> None:
        """Give back the memory of all recordings."""
        self._recordings.clear()

    def _recorded(self, image: Tensor) -> _Recording:
        image, graph = image.clone(), torch.cuda.CUDAGraph()
        # what other threads do meanwhile, to read and to write, is no part of it
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            logits = self._run(image)
        return _Recording(graph, image, logits)

    def _run(self, image: Tensor) -> Tensor:
        with autocast(image.device, self._precision):
            logits: Tensor = self._network(image)
        return logits
