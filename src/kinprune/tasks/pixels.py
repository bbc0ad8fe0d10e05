"""One image: from a file to the pixels a backbone expects, before normalisation."""

from __future__ import annotations

import io
import math
import struct
import zlib
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError

from kinprune.errors import TaskError
from kinprune.preprocessing import Preprocessing
from kinprune.tasks.task import Payload

if TYPE_CHECKING:  # an exported model is used where there is no PyTorch
    from torch import Tensor

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "AVIF")  # none that starts another program, as EPS does
_RESAMPLING = {
    "nearest": Image.Resampling.NEAREST,
    "bilinear": Image.Resampling.BILINEAR,
    "bicubic": Image.Resampling.BICUBIC,
}
# What Pillow's decoders raise on damaged files, by the format.
_DAMAGE = (
    OSError,
    SyntaxError,
    ValueError,
    EOFError,
    IndexError,
    struct.error,
    zlib.error,
    Image.DecompressionBombError,
)


def decode_image(image: str | Payload, preprocessing: Preprocessing, *, where: str | None = None) -> Tensor:
    """Return one image as the backbone's pixels: uint8 [3, h, w], not normalised.

    ``image`` is a path, an encoded file's bytes, a PIL image or uint8 pixels [h, w(, c)]; ``where`` names it in
    messages. It is turned upright (EXIF), made RGB (transparency on white, 16-bit grey scaled to 8), resized and
    cropped as timm's evaluation transform does. Raises TaskError naming an image that cannot be read.
    """
    import torch

    payload = Path(image) if isinstance(image, str) else image
    where = where or (str(payload) if isinstance(payload, Path) else "the image")
    return torch.from_numpy(decode_pixels(payload, preprocessing, where)).permute(2, 0, 1).contiguous()


def decode_pixels(payload: Payload, preprocessing: Preprocessing, where: str) -> NDArray[np.uint8]:
    """Return one image as ``decode_image`` does, as an array uint8 [h, w, 3]."""
    return np.array(fit(_picture(payload, where), preprocessing))


def encoded(payload: Payload, where: str) -> bytes:
    """An image as a file's bytes that give the same pixels: its own where it is a file, else a PNG.

    Raises TaskError naming an image that cannot be read.
    """
    if isinstance(payload, bytes):
        return payload
    if isinstance(payload, Path):
        try:
            return payload.read_bytes()
        except OSError as error:
            raise TaskError(f"{where} cannot be read ({_short(error)}); replace or remove it") from error
    file = io.BytesIO()
    Image.fromarray(np.asarray(_picture(payload, where))).save(file, "PNG", compress_level=1)
    return file.getvalue()


def _picture(payload: Payload, where: str) -> Image.Image:
    """An image upright and RGB; TaskError naming it where it cannot be read."""
    try:
        if isinstance(payload, Path | bytes):
            with Image.open(io.BytesIO(payload) if isinstance(payload, bytes) else payload, formats=_formats()) as file:
                return _rgb(_upright(file))
        if isinstance(payload, Image.Image):
            return _rgb(_upright(payload))
        return _rgb(Image.fromarray(payload[..., 0] if payload.ndim == 3 and payload.shape[2] == 1 else payload))
    except _DAMAGE as error:
        raise TaskError(f"{where} cannot be read as an image ({_short(error)}); replace or remove it") from error


def _short(error: BaseException) -> str:
    if isinstance(error, UnidentifiedImageError):
        return f"its content is none of {', '.join(_formats())}"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error) or type(error).__name__


@cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _upright(picture: Image.Image) -> Image.Image:
    picture.load()
    try:
        return ImageOps.exif_transpose(picture)
    except (SyntaxError, ValueError, struct.error):  # a damaged EXIF block says nothing about the pixels
        return picture


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode == "RGB":
        return picture
    if picture.mode.startswith("I"):  # 16-bit grey; Pillow's own conversion would clip all above 255 to white
        values = np.asarray(picture).astype(np.int64)
        if values.min() < 0 or values.max() > 0xFFFF:
            raise ValueError("its 32-bit pixels are not within 0 to 65535; save it with 8 or 16 bits")
        return Image.fromarray((values // 257).astype(np.uint8)).convert("RGB")
    if picture.mode == "F":
        raise ValueError("its pixels are floating point, of unknown range; save it with 8 or 16 bits")
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        ground = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(ground, picture).convert("RGB")
    return picture.convert("RGB")


def fit(picture: Image.Image, preprocessing: Preprocessing) -> Image.Image:
    """Resize and centre-crop a picture to ``preprocessing``, as timm's ``transforms_imagenet_eval`` ("center") does.

    The shorter side is brought to image_size / crop_pct, rounded down, keeping the aspect; what the crop lacks
    (``crop_pct`` above 1) is black.
    """
    height, width = preprocessing.image_size
    size = _resized(picture.size, preprocessing)
    if size != picture.size:
        picture = picture.resize(size, _RESAMPLING[preprocessing.interpolation])
    if picture.size == (width, height):
        return picture
    left = _offset(picture.width, width)
    top = _offset(picture.height, height)
    return picture.crop((left, top, left + width, top + height))


def _offset(have: int, want: int) -> int:
    return -((want - have) // 2) if want > have else round((have - want) / 2)


def _resized(size: tuple[int, int], preprocessing: Preprocessing) -> tuple[int, int]:
    width, height = size
    target_h, target_w = (math.floor(side / preprocessing.crop_pct) for side in preprocessing.image_size)
    if target_h != target_w:
        ratio = min(height / target_h, width / target_w)
        return round(width / ratio), round(height / ratio)
    if width <= height:
        return target_w, int(target_w * height / width)
    return int(target_h * width / height), target_h
