"""Decoding: the pixels timm would give, every kind of image file, damage named, memory asked first."""

from __future__ import annotations

import io
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from timm.data.transforms_factory import transforms_imagenet_eval

from kinprune.errors import TaskError
from kinprune.preprocessing import Interpolation, Preprocessing
from kinprune.tasks import decode, decode_image, decode_samples, decoded_bytes, load_task, task_from_arrays
from kinprune.tasks.memory import available_bytes

Make = Callable[..., Path]
PLAIN = Preprocessing(image_size=(8, 8))


def level_of(image: Image.Image, tmp_path: Path, name: str, **options: object) -> list[int]:
    """The one colour that an image of one colour decodes to."""
    image.save(tmp_path / name, **options)
    pixels = decode_image(tmp_path / name, PLAIN).flatten(1)
    assert torch.equal(pixels, pixels[:, :1].expand_as(pixels))
    return pixels[:, 0].tolist()


@given(
    size=st.tuples(st.integers(1, 90), st.integers(1, 90)),
    target=st.tuples(st.integers(4, 40), st.integers(4, 40)) | st.integers(4, 40).map(lambda side: (side, side)),
    crop_pct=st.sampled_from([0.7, 0.875, 0.95, 1.0, 1.1]),
    interpolation=st.sampled_from(["nearest", "bilinear", "bicubic"]),
)
@settings(max_examples=150, deadline=None)
def test_the_pixels_are_timms(
    size: tuple[int, int], target: tuple[int, int], crop_pct: float, interpolation: Interpolation
) -> None:
    if max(size) > 30 * min(size):  # strips whose long side would become thousands of pixels
        size = (size[0], size[0])
    image = Image.fromarray(np.random.default_rng(size[0]).integers(0, 256, (*size, 3), dtype=np.uint8))
    timms = transforms_imagenet_eval(target, crop_pct=crop_pct, interpolation=interpolation, normalize=False)
    ours = decode_image(image, Preprocessing(image_size=target, crop_pct=crop_pct, interpolation=interpolation))
    assert ours.dtype == torch.uint8
    assert torch.equal(ours, timms(image))


def test_kinds_of_images(tmp_path: Path) -> None:
    red = Image.new("RGB", (9, 9), (200, 30, 40))
    assert level_of(red, tmp_path, "rgb.png") == [200, 30, 40]
    assert level_of(red, tmp_path, "webp.webp", lossless=True) == [200, 30, 40]
    assert level_of(red.convert("P", palette=Image.Palette.ADAPTIVE), tmp_path, "palette.png") == [200, 30, 40]
    assert level_of(red.convert("P", palette=Image.Palette.ADAPTIVE), tmp_path, "palette.gif") == [200, 30, 40]
    assert level_of(Image.new("L", (9, 9), 77), tmp_path, "grey.png") == [77] * 3
    assert level_of(Image.new("1", (9, 9), 1), tmp_path, "bits.png") == [255] * 3
    cmyk = level_of(Image.new("CMYK", (9, 9), (255, 0, 0, 0)), tmp_path, "cmyk.jpg", quality=100)
    assert np.allclose(cmyk, [0, 255, 255], atol=3)


def test_transparency_lies_on_white(tmp_path: Path) -> None:
    assert level_of(Image.new("RGBA", (9, 9), (0, 0, 0, 0)), tmp_path, "clear.png") == [255] * 3
    assert level_of(Image.new("RGBA", (9, 9), (10, 20, 30, 255)), tmp_path, "opaque.png") == [10, 20, 30]
    assert level_of(Image.new("LA", (9, 9), (0, 0)), tmp_path, "grey.png") == [255] * 3
    palette = Image.new("P", (9, 9), 0)
    palette.putpalette([5, 5, 5])
    assert level_of(palette, tmp_path, "palette.png", transparency=0) == [255] * 3


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize(("level", "expected"), [(0, 0), (257, 1), (128 * 257, 128), (65535, 255)])
def test_sixteen_bits_become_eight(tmp_path: Path, suffix: str, level: int, expected: int) -> None:
    image = Image.fromarray(np.full((9, 9), level, dtype=np.uint16))
    assert level_of(image, tmp_path, f"deep.{suffix}") == [expected] * 3


def test_deeper_pixels_are_refused(tmp_path: Path) -> None:
    Image.fromarray(np.full((9, 9), 70000, dtype=np.int32)).save(tmp_path / "int.tif")
    Image.fromarray(np.full((9, 9), 0.5, dtype=np.float32)).save(tmp_path / "float.tif")
    for name in ("int.tif", "float.tif"):
        with pytest.raises(TaskError, match=rf"{name} cannot be read as an image.*8 or 16 bits"):
            decode_image(tmp_path / name, PLAIN)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int) -> None:
    pixels = np.zeros((8, 8, 3), dtype=np.uint8)
    pixels[:4, :4] = 255  # where the camera's top left is
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(pixels).save(tmp_path / "turned.png", exif=exif)
    upright = decode_image(tmp_path / "turned.png", PLAIN)[0]
    corners = [bool(upright[row, column]) for row, column in ((0, 0), (0, 7), (7, 7), (7, 0))]
    assert corners.index(True) == {1: 0, 2: 1, 3: 2, 4: 3, 5: 0, 6: 1, 7: 2, 8: 3}[orientation]


@pytest.mark.filterwarnings("ignore:Corrupt EXIF:UserWarning")
def test_damaged_exif_is_no_damage(tmp_path: Path) -> None:
    image = Image.fromarray(np.full((8, 8, 3), 90, dtype=np.uint8))
    image.save(tmp_path / "x.png", exif=b"Exif\0\0MM\0\x2a" + struct.pack(">IH", 8, 500))
    assert decode_image(tmp_path / "x.png", PLAIN).unique().tolist() == [90]


def test_bytes_and_pictures_and_paths_agree(tmp_path: Path, make_pixels: Callable[..., np.ndarray]) -> None:
    pixels = make_pixels("x", 0, (30, 20))
    image = Image.fromarray(pixels)
    image.save(tmp_path / "x.png")
    expected = decode_image(tmp_path / "x.png", PLAIN)
    assert expected.shape == (3, 8, 8)
    for other in (str(tmp_path / "x.png"), (tmp_path / "x.png").read_bytes(), image, pixels):
        assert torch.equal(decode_image(other, PLAIN), expected)


def test_threads_and_repetition_change_nothing(tmp_path: Path, make_folder: Make) -> None:
    task = load_task(make_folder(tmp_path, ["a", "b"], 100, (12, 17)))
    first, second = decode(task, PLAIN, threads=1), decode(task, PLAIN, threads=7, progress=True)
    assert first.train.images.shape == (160, 3, 8, 8)
    assert torch.equal(first.train.images, second.train.images) and torch.equal(first.test.images, second.test.images)
    for row, image in zip(task.test.rows, first.test.images, strict=True):
        assert torch.equal(image, decode_image(task.test.reader.where(row), PLAIN))
    assert (first.name, first.classes, first.digest, first.preprocessing) == (
        task.name,
        task.classes,
        task.digest,
        PLAIN,
    )
    with pytest.raises(TaskError, match="threads=0"):
        decode(task, PLAIN, threads=0)


def test_samples_are_the_first_training_images_of_the_classes_that_are_there(tmp_path: Path, make_folder: Make) -> None:
    task = load_task(make_folder(tmp_path, ["a", "b", "c"], 6, (12, 17)))
    whole = decode(task, PLAIN)
    found = decode_samples(task, {"c", "a", "elsewhere"}, PLAIN, each=2)
    assert list(found) == ["a", "c"]
    for label, name in ((0, "a"), (2, "c")):
        assert torch.equal(found[name], whole.train.images[whole.train.labels == label][:2])
    assert decode_samples(task, {"elsewhere"}, PLAIN) == {}


def test_unreadable_images_are_named(tmp_path: Path, make_folder: Make) -> None:
    root = make_folder(tmp_path, ["a", "b"], 10, 64)
    whole = (root / "a" / "0003.png").read_bytes()
    (root / "a" / "0003.png").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        TaskError, match=r"^\S*a/0003\.png cannot be read as an image \(.*truncated.*\); replace or remove"
    ):
        decode(load_task(root), PLAIN)
    for number in range(7):
        (root / "b" / f"{number:04d}.png").write_text("<html>404</html>")
    with pytest.raises(TaskError, match=r"\d images cannot be read") as caught:
        decode(load_task(root, test_fraction=0.05), PLAIN)
    assert "none of JPEG, PNG" in str(caught.value) and "more" in str(caught.value)


@pytest.mark.filterwarnings("ignore:(Corrupt EXIF|Truncated File):UserWarning")
@pytest.mark.parametrize("cut", [0, 4, 30, 60, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "gif", "bmp", "tif", "ppm"])
def test_truncation_is_never_silent(suffix: str, cut: float) -> None:
    buffer = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(buffer, format={"jpg": "JPEG", "tif": "TIFF"}.get(suffix, suffix))
    whole = buffer.getvalue()
    end = int(cut * len(whole)) if isinstance(cut, float) else cut
    with pytest.raises(TaskError, match=r"^upload 7 cannot be read as an image"):
        decode_image(whole[:end], PLAIN, where="upload 7")


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(TaskError, match=r"gone\.jpg cannot be read as an image \(No such file"):
        decode_image(tmp_path / "gone.jpg", PLAIN)


def test_no_format_that_runs_programs(tmp_path: Path) -> None:
    Image.new("RGB", (9, 9)).save(tmp_path / "page.eps")
    (tmp_path / "page.eps").rename(tmp_path / "page.jpg")
    with pytest.raises(TaskError, match="its content is none of"):
        decode_image(tmp_path / "page.jpg", PLAIN)


def test_memory_is_asked_first() -> None:
    pixels = np.zeros((1000, 1, 1), dtype=np.uint8)
    task = task_from_arrays(pixels, np.arange(1000) % 2)
    huge = Preprocessing(image_size=(60000, 60000))
    assert decoded_bytes(task, huge) == 1000 * 3 * 60000**2
    with pytest.raises(TaskError, match=r"1000 images at 60000 x 60000 need .* MiB .*--shots.*--classes.*--image-size"):
        decode(task, huge)


def test_available_memory_is_plausible() -> None:
    available = available_bytes()
    assert available is None or 2**20 < available < 2**46
