"""Frames on disk: an mp4 file, a folder of numbered PNG files, or one PNG file.

Frames in memory are ``[T, H, W, 3]``, RGB in [0, 1]. Both PNG forms store 8 bits a channel without
loss; an mp4 does not. Files are written atomically.
"""

from __future__ import annotations

import importlib
import math
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from visattn._atomic import check_writable
from visattn.draw.canvas import save_png
from visattn.runtime.temporary_files import old_of, part_of, remove, temporary_folder

__all__ = [
    "check_target",
    "encode_video",
    "kind_of",
    "read_picture",
    "read_rate",
    "read_video",
    "to_bytes",
    "write_video",
]

Kind = Literal["mp4", "png", "folder"]

FRAME_NAME = re.compile(r"\d{4,}\.png")
# H.264 at a constant quality that looks almost like the frames (0 is lossless, 51 the worst).
CRF = 16
PROBE = 1 << 20  # bytes
# Errors that imageio raises on files of other formats or truncated files.
UNREADABLE = (OSError, ValueError, RuntimeError, IndexError, KeyError, SyntaxError)


def kind_of(path: str | os.PathLike[str]) -> Kind:
    """Return the form that a name asks for: ``.mp4``, ``.png``, or a folder if it has no suffix,
    ends in a slash or is an existing folder.

    Raises:
        ValueError: the name has another suffix.
    """
    text = os.fspath(path)
    suffix = Path(text).suffix.lower()
    if suffix == ".mp4":
        return "mp4"
    if suffix == ".png":
        return "png"
    if not suffix or text.endswith(("/", os.sep)) or os.path.isdir(text):
        return "folder"
    raise ValueError(
        f"{text!r} must end in .mp4 or .png, or name a folder of PNG files (end it in / when its "
        f"name has a dot)"
    )


def check_target(path: str | os.PathLike[str], *, new_folders: bool = False) -> None:
    """Refuse a target that ``write_video`` could not write, before the frames are made.

    Args:
        path: the target.
        new_folders: whether the caller will make missing parent folders.

    Raises:
        ValueError: the suffix is unknown, or the folder contains other files than frames.
        OSError: the parent folder is missing or cannot be written, or there is no ffmpeg.
    """
    kind, target = kind_of(path), Path(path)
    if kind == "folder":
        if target.exists() and not target.is_dir():
            raise ValueError(f"{str(path)!r} is a file; name a folder, or a file .mp4 or .png")
        others = [] if not target.exists() else _not_frames(target)
        if others:
            raise ValueError(
                f"folder {str(path)!r} contains {others[0]!r}, which is no frame and would be "
                "lost; name a new folder"
            )
    elif target.is_dir():
        raise ValueError(f"{str(path)!r} is a folder; name a file")
    place = target
    while new_folders and not place.parent.exists():
        place = place.parent
    check_writable(place)
    if kind == "mp4":
        _ffmpeg()


def write_video(frames: torch.Tensor, path: str | os.PathLike[str], *, fps: float = 16.0) -> None:
    """Write frames in the form that the name of the file asks for (``kind_of``).

    A folder contains ``0000.png``, ``0001.png`` and so on. An existing folder is replaced if it
    contains nothing but frames.

    Args:
        frames: ``[T, H, W, 3]`` in [0, 1].
        path: the file or folder to write.
        fps: frames per second; for mp4 only.

    Raises:
        ValueError: the suffix is unknown, there are several frames for one PNG, an mp4 has an odd
            height or width, or the folder contains other files.
        OSError: the file cannot be written.
    """
    if not 0 < fps < math.inf:
        raise ValueError(f"fps={fps!r} must be a positive number of frames per second")
    check_target(path)
    kind, target, data = kind_of(path), Path(path), to_bytes(frames)
    if kind == "png":
        if len(data) != 1:
            raise ValueError(
                f"{str(path)!r} holds one frame, not {len(data)}; name a folder or a file .mp4"
            )
        save_png(Image.fromarray(data[0].numpy()), target)
    elif kind == "folder":
        with _replacing(target) as part:
            part.mkdir()
            for index, frame in enumerate(data):
                Image.fromarray(frame.numpy()).save(part / f"{index:04d}.png", "PNG")
    else:
        _write_mp4(data, target, fps)


def encode_video(frames: torch.Tensor, *, fps: float = 16.0) -> bytes:
    """Return the bytes of the mp4 file that ``write_video`` would write.

    Raises:
        TypeError, ValueError, OSError: as ``write_video``.
    """
    with temporary_folder() as folder:
        path = folder / "clip.mp4"
        write_video(frames, path, fps=fps)
        return path.read_bytes()


def read_video(path: str | os.PathLike[str]) -> torch.Tensor:
    """Read an mp4, a PNG file, or a folder of PNG files in the order of the numbers in their names.

    Returns:
        Frames, float32 ``[T, H, W, 3]`` in [0, 1].

    Raises:
        ValueError: the suffix is unknown, the folder is empty, the frames have several sizes, or a
            file cannot be decoded.
        OSError: the file is missing or cannot be read.
    """
    kind, source = kind_of(path), Path(path)
    if kind == "mp4":
        return _read_mp4(source)
    if kind == "png":
        return _stack([read_picture(source)], source)
    pictures = [file for file in source.iterdir() if file.suffix.lower() == ".png"]
    files = sorted(pictures, key=_natural)
    if not files:
        raise ValueError(f"folder {str(path)!r} contains no PNG file")
    return _stack([read_picture(file) for file in files], source)


def read_rate(path: str | os.PathLike[str]) -> float | None:
    """Return the frames per second of an mp4; None for PNG files and if the rate is not known.

    Raises:
        OSError: the file is missing or cannot be read.
    """
    if kind_of(path) != "mp4":
        return None
    ffmpeg = _ffmpeg()
    with _ffmpeg_errors(Path(path), "read as a video"), ffmpeg.get_reader(path) as reader:
        return float(reader.get_meta_data()["fps"]) or None


def read_picture(path: str | os.PathLike[str]) -> Image.Image:
    """Read an image file as RGB and apply its EXIF orientation, as ``diffusers.utils.load_image``
    does.

    Images with 16 bits a channel are scaled to 8 bits. Pillow and diffusers clip them instead,
    which makes them white.

    Raises:
        ValueError: the file is no image, or is truncated.
        OSError: the file is missing or cannot be read.
    """
    with open(path, "rb") as file:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("error", Image.DecompressionBombWarning)
                picture = Image.open(file)
                return _rgb(ImageOps.exif_transpose(picture), picture.format)
        except UnidentifiedImageError:
            raise ValueError(f"{os.fspath(path)!r} is no image") from None
        except Exception as error:  # decoders raise errors of many types on damaged files
            raise ValueError(f"{os.fspath(path)!r} is no image that can be read: {error}") from None


def _rgb(picture: Image.Image, form: str | None) -> Image.Image:
    """Convert a picture of any mode to RGB; ``form`` is the format of its file."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        extrema: Any = picture.getextrema()  # a pair, as there is one channel
        low, high = extrema
        if picture.mode.startswith("I;16") or (form == "PNG" and high <= 65535):
            picture = picture.convert("I").point(lambda value: value * (255 / 65535) + 0.5)
        elif not 0 <= low <= high <= 255:
            raise ValueError(
                f"it contains {picture.mode} values from {low} to {high}, not 0 to 255; save it "
                "with 8 bits a channel"
            )
        picture = picture.convert("L")
    return picture.convert("RGB")


def to_bytes(frames: torch.Tensor) -> torch.Tensor:
    """Convert frames ``[T, H, W, 3]`` in [0, 1] to uint8 on the CPU, rounded to the nearest value.

    Raises:
        TypeError: the frames are no floating-point tensor.
        ValueError: the shape is not ``[T, H, W, 3]``, the tensor is empty, or values are outside
            [0, 1].
    """
    if not frames.is_floating_point():
        raise TypeError(f"frames of {frames.dtype} must be floating-point with values in [0, 1]")
    if frames.ndim != 4 or frames.shape[3] != 3 or 0 in frames.shape:
        raise ValueError(f"frames of shape {list(frames.shape)} must be [T, H, W, 3], none empty")
    low, high = (float(value) for value in frames.aminmax())
    if not 0 <= low <= high <= 1:  # false for NaN as well
        raise ValueError(f"frames contain values from {low:g} to {high:g}; they must be in [0, 1]")
    return torch.stack([(frame.float() * 255).round().to(torch.uint8).cpu() for frame in frames])


def _not_frames(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir() if not FRAME_NAME.fullmatch(file.name))


def _natural(file: Path) -> tuple[list[int], str]:
    """Return the key that sorts 2.png before 10.png."""
    return [int(digits) for digits in re.findall(r"\d+", file.name)], file.name


def _stack(pictures: list[Image.Image], source: Path) -> torch.Tensor:
    sizes = sorted({picture.size for picture in pictures})
    if len(sizes) > 1:
        words = " and ".join(f"{height}x{width}" for width, height in sizes[:2])
        raise ValueError(f"{str(source)!r} contains frames of several sizes, {words}")
    width, height = sizes[0]
    frames = [torch.frombuffer(bytearray(p.tobytes()), dtype=torch.uint8) for p in pictures]
    return torch.stack(frames).view(-1, height, width, 3).float() / 255


@contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """Yield a temporary path next to ``target``, where the ``with`` block makes a file or a folder.
    It is renamed to ``target`` when the block ends, and removed if the block raises, also on
    Ctrl-C."""
    part = part_of(target)
    try:
        yield part
        if part.is_dir():
            _replace_folder(part, target)
        else:
            part.replace(target)
    except OSError as error:
        if error.errno is None:  # raised by this package
            raise
        raise OSError(error.errno, error.strerror, str(target)) from None
    finally:
        remove(part)


def _replace_folder(part: Path, target: Path) -> None:
    if not target.exists():
        part.rename(target)
        return
    old = old_of(target)
    target.rename(old)
    try:
        part.rename(target)
    except BaseException:
        old.rename(target)
        raise
    remove(old)


def _ffmpeg() -> Any:
    """Return imageio, which runs ffmpeg.

    Raises:
        OSError: ffmpeg is missing.
    """
    imageio: Any = importlib.import_module("imageio")
    try:
        imageio.plugins.ffmpeg.get_exe()
    except RuntimeError as error:
        raise OSError(f"an mp4 needs ffmpeg: {error}") from None
    return imageio.v2


@contextmanager
def _ffmpeg_errors(target: Path, doing: str) -> Iterator[None]:
    try:
        yield
    except UNREADABLE as error:
        first = str(error).strip().split("\n")[0]
        raise OSError(f"{str(target)!r} could not be {doing}: {first}") from None


@contextmanager
def _disk_full_reported(part: Path) -> Iterator[None]:
    """Raise the error of a full disk if that made ffmpeg fail: ffmpeg does not report its cause, so
    a failure is followed by an attempt to write more bytes to the file."""
    try:
        yield
    except OSError:
        with open(part, "ab", buffering=0) as file:
            remaining = PROBE
            while remaining:
                remaining -= file.write(bytes(remaining))
            os.fsync(file.fileno())
        raise


def _write_mp4(data: torch.Tensor, target: Path, fps: float) -> None:
    ffmpeg = _ffmpeg()
    count, height, width, _ = data.shape
    if height % 2 or width % 2:
        raise ValueError(
            f"an mp4 needs frames of even height and width, not {height}x{width}; name a folder of "
            f"PNG files"
        )
    with (
        _replacing(target) as part,
        _disk_full_reported(part),
        _ffmpeg_errors(target, "written by ffmpeg"),
    ):
        writer = ffmpeg.get_writer(
            part,
            format="FFMPEG",
            mode="I",
            fps=fps,
            codec="libx264",
            quality=None,
            pixelformat="yuv420p",
            macro_block_size=1,
            ffmpeg_log_level="quiet",
            output_params=["-crf", str(CRF), "-movflags", "+faststart"],
        )
        with writer:
            for frame in data:
                writer.append_data(frame.numpy())
        # imageio ignores the exit code of ffmpeg: a full disk would leave a shorter file
        with ffmpeg.get_reader(part, format="FFMPEG", mode="I") as reader:
            written = reader.count_frames()
        if written != count:
            raise OSError(f"{written} of {count} frames are in the file; is the disk full?")


def _read_mp4(source: Path) -> torch.Tensor:
    with open(source, "rb"):  # raises the usual error for a missing file
        pass
    ffmpeg = _ffmpeg()
    with _ffmpeg_errors(source, "read as a video"):
        reader = ffmpeg.get_reader(
            source,
            format="FFMPEG",
            mode="I",
            input_params=["-xerror", "-err_detect", "explode"],  # stop at damaged data
        )
        with reader:
            frames = [torch.from_numpy(frame.copy()) for frame in reader]
            meta = reader.get_meta_data()
        if not frames or len(frames) < round(meta["duration"] * meta["fps"]) - 1:
            raise OSError(f"only {len(frames)} frames can be decoded; it is damaged")
    return torch.stack(frames).float() / 255
