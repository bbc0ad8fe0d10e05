"""Half precision: an ONNX file whose weights take two bytes each.

Only what is stored is halved: a Cast beside each weight makes it float32 again, which ONNX Runtime does once, when it
loads the file. Arithmetic in 16 bits has no kernels on ordinary CPUs; there every operation would be wrapped in casts
and the model be slower than in fp32. So it is as fast as fp32, and as exact as 11 bits of mantissa in the weights.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from kinprune.devices.runtime import package

FEWEST = 16
"""Smaller tensors are left: a Cast takes more bytes than it saves."""


def halve(model: Any) -> None:
    """Store the float32 weights of an ``onnx.ModelProto`` in half precision, in place, where all of them fit."""
    onnx, numpy_helper = package("onnx"), package("onnx.numpy_helper")
    casts = []
    for tensor in model.graph.initializer:
        if tensor.data_type != onnx.TensorProto.FLOAT:
            continue
        value = numpy_helper.to_array(tensor)
        if value.size < FEWEST or not float(np.abs(value).max()) <= float(np.finfo(np.float16).max):
            continue
        name = tensor.name
        tensor.CopyFrom(numpy_helper.from_array(value.astype(np.float16), f"{name}_half"))
        casts.append(
            onnx.helper.make_node("Cast", [tensor.name], [name], name=f"{name}_whole", to=onnx.TensorProto.FLOAT)
        )
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
