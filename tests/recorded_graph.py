"""CUDA graphs on the CPU: a capture records operations, and a replay repeats them in place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


def tensors_of(values: Any) -> list[Tensor]:
    return [x for x in tree_leaves(values) if isinstance(x, Tensor)]


class RecordedGraph:
    """In place of torch.cuda.CUDAGraph."""

    def __init__(self) -> None:
        self.operations: list[tuple[Any, Any, Any, list[Tensor]]] = []
        self.replays = 0

    def pool(self) -> tuple[int, int]:
        return 0, 0

    def replay(self) -> None:
        """Compute again from what is now in the memory that the capture used."""
        self.replays += 1
        with torch.no_grad():
            for function, args, kwargs, results in self.operations:
                computed = zip(results, tensors_of(function(*args, **kwargs)), strict=True)
                # The others are views, or were changed in place.
                new = [pair for pair in computed if pair[0].data_ptr() != pair[1].data_ptr()]
                for old, x in new:
                    old.copy_(x)


class Capture(TorchDispatchMode):
    """In place of torch.cuda.graph: like a GPU, it changes nothing that existed before."""

    def __init__(self, graph: RecordedGraph, pool: Any, capture_error_mode: str) -> None:
        super().__init__()
        assert pool in (None, (0, 0)) and capture_error_mode == "thread_local"
        self.graph, self.before = graph, dict[int, tuple[Tensor, Tensor]]()

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if function is torch.ops.aten._local_scalar_dense.default:
            raise RuntimeError("operation not permitted when stream is capturing")
        if function._schema.is_mutable:
            for argument, x in zip(function._schema.arguments, args, strict=False):
                if argument.alias_info and argument.alias_info.is_write:
                    self.before.setdefault(x.data_ptr(), (x, x.clone()))
        result = function(*args, **kwargs)
        self.graph.operations.append((function, args, kwargs, tensors_of(result)))
        return result

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        with torch.no_grad():
            for x, old in self.before.values():
                x.copy_(old)
