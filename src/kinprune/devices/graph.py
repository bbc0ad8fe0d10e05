"""An ONNX graph to look things up in: who makes and who reads a tensor, and what a weight is."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from kinprune.devices.runtime import package


class Graph:
    """A view of an ``onnx.ModelProto``, which ``replace`` changes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.nodes: tuple[Any, ...] = tuple(model.graph.node)
        self.answers = {value.name for value in model.graph.output}
        self.maker = {name: node for node in self.nodes for name in node.output}
        self._weights = {tensor.name: tensor for tensor in model.graph.initializer}
        self._readers: dict[str, list[Any]] = {}
        for node in self.nodes:
            for name in dict.fromkeys(node.input):
                self._readers.setdefault(name, []).append(node)

    def readers(self, tensor: str) -> list[Any]:
        """The nodes that take a tensor in."""
        return self._readers.get(tensor, [])

    def is_weight(self, tensor: str) -> bool:
        """Whether a tensor is stored in the file."""
        return tensor in self._weights

    def value(self, node: Any, place: int) -> NDArray[np.float32]:
        """The stored weight that a node takes in at a place."""
        found: NDArray[np.float32] = package("onnx.numpy_helper").to_array(self._weights[node.input[place]])
        return found

    def replace(self, node: Any, place: int, value: NDArray[np.float32]) -> None:
        """Give a node another weight at a place. Others that read the old one keep it: files share equal weights."""
        name = node.input[place]
        users = self.readers(name)
        if len(users) > 1:
            users.remove(node)
            name = f"{name}_of_{node.name}"
            node.input[place] = name
            self._weights[name] = self.model.graph.initializer.add()
            self._readers[name] = [node]
        self._weights[name].CopyFrom(package("onnx.numpy_helper").from_array(value.astype(np.float32), name))
