"""Images to data URIs, small enough that a report stays light."""

from __future__ import annotations

import base64
import io

from PIL import Image
from torch import Tensor

SIDE = 80
"""Pixels of a thumbnail's longer side at most: shown at half of it, sharp on a dense screen."""
QUALITY = 85


def thumbnail(image: Tensor, side: int = SIDE) -> str:
    """One image uint8 ``[3, h, w]`` as a ``data:`` URI of a JPEG of at most ``side`` pixels a side, never enlarged."""
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=QUALITY, subsampling=0)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode("ascii")
