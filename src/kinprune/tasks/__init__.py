"""Tasks: labelled image data sets with their classes and a train/test split.

Each name is imported when it is first used: reading one image needs no PyTorch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kinprune.tasks.arrays import task_from_arrays
    from kinprune.tasks.decoding import decode, decode_samples, decoded_bytes
    from kinprune.tasks.folders import list_images
    from kinprune.tasks.loading import load_task
    from kinprune.tasks.pixels import decode_image
    from kinprune.tasks.task import DecodedTask, Items, Split, Task
    from kinprune.tasks.torchvision_sets import load_torchvision

_HOMES = {
    "DecodedTask": "task",
    "Items": "task",
    "Split": "task",
    "Task": "task",
    "decode": "decoding",
    "decode_image": "pixels",
    "decode_samples": "decoding",
    "decoded_bytes": "decoding",
    "list_images": "folders",
    "load_task": "loading",
    "load_torchvision": "torchvision_sets",
    "task_from_arrays": "arrays",
}

__all__ = [
    "DecodedTask",
    "Items",
    "Split",
    "Task",
    "decode",
    "decode_image",
    "decode_samples",
    "decoded_bytes",
    "list_images",
    "load_task",
    "load_torchvision",
    "task_from_arrays",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'kinprune.tasks' has no attribute {name!r}")
    return getattr(import_module(f"kinprune.tasks.{_HOMES[name]}"), name)
