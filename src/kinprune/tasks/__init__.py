"""Tasks: labelled image data sets with their classes and a train/test split."""

from kinprune.tasks.arrays import task_from_arrays
from kinprune.tasks.decoding import decode, decode_samples, decoded_bytes
from kinprune.tasks.folders import list_images
from kinprune.tasks.loading import load_task
from kinprune.tasks.pixels import decode_image
from kinprune.tasks.task import DecodedTask, Items, Split, Task
from kinprune.tasks.torchvision_sets import load_torchvision

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
