"""Frames on disk: what is written is read back, whole or not at all."""

import errno
import os

import pytest
import torch
from PIL import Image, ImageOps

from visattn.media import video
from visattn.media.video import (
    check_target,
    kind_of,
    read_picture,
    read_video,
    to_bytes,
    write_video,
)
from visattn.metrics import psnr


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def frames():
    """A wave that moves, [7, 48, 64, 3]."""
    t, y, x, c = (torch.arange(n, dtype=torch.float32) for n in (7, 48, 64, 3))
    wave = torch.sin(x[:, None] / 9 + y[:, None, None] / 7 + t[:, None, None, None] / 2 + c)
    return 0.5 + 0.5 * wave


def left():
    return sorted(os.listdir())


def test_kind_of_a_name(folder):
    (folder / "v1.5").mkdir()
    kinds = {"a.mp4": "mp4", "a.PNG": "png", "a": "folder", "b/": "folder", "v1.5": "folder"}
    assert {name: kind_of(name) for name in kinds} == kinds
    assert kind_of("run.5/") == "folder"
    for name in ("a.gif", "run.5", "a.mp4.json"):
        with pytest.raises(ValueError, match=r"must end in \.mp4 or \.png"):
            kind_of(name)


def test_folder_of_png_is_lossless(frames):
    write_video(frames, "clip")
    assert left() == ["clip"]
    assert sorted(os.listdir("clip")) == [f"{n:04d}.png" for n in range(7)]
    with Image.open("clip/0003.png") as image:
        assert (image.format, image.mode, image.size) == ("PNG", "RGB", (64, 48))
    back = read_video("clip")
    assert back.dtype == torch.float32
    assert torch.equal(to_bytes(back), to_bytes(frames))
    assert (back - frames).abs().max() <= 0.5 / 255 + 1e-6
    write_video(frames[:2], "clip")  # what was there is replaced
    assert sorted(os.listdir("clip")) == ["0000.png", "0001.png"]
    assert left() == ["clip"]


def test_one_frame_is_a_png(frames):
    write_video(frames[2:3], "frame.png")
    assert torch.equal(to_bytes(read_video("frame.png")), to_bytes(frames[2:3]))
    assert left() == ["frame.png"]


@pytest.mark.parametrize("fps", [8, 23.976])
def test_mp4_decodes_again(frames, fps):
    write_video(frames, "clip.mp4", fps=fps)
    assert left() == ["clip.mp4"]
    back = read_video("clip.mp4")
    assert back.shape == frames.shape
    assert psnr(back, frames).clip > 32
    for t, frame in enumerate(back):  # in its order
        assert (frame - frames).square().mean((1, 2, 3)).argmin() == t


def test_mp4_of_one_frame_and_of_many(frames):
    write_video(frames[:1], "one.mp4")
    assert len(read_video("one.mp4")) == 1
    write_video(frames.repeat(10, 1, 1, 1), "one.mp4")
    assert len(read_video("one.mp4")) == 70


def test_numbers_in_names_are_the_order(frames, folder):
    (folder / "clip").mkdir()
    for number in (10, 9, 2):
        Image.fromarray(to_bytes(frames)[number % 7].numpy()).save(f"clip/frame{number}.png")
    (folder / "clip" / "notes.txt").touch()
    assert torch.equal(to_bytes(read_video("clip")), to_bytes(frames)[[2, 2, 3]])


def test_pictures_of_other_kinds_become_rgb():
    for mode in ("L", "P", "RGBA", "1"):
        Image.new(mode, (5, 4)).save("a.png")
        assert read_picture("a.png").mode == "RGB"
        assert read_video("a.png").shape == (1, 4, 5, 3)


def test_bytes_are_the_nearest():
    values = torch.tensor([0.0, 0.4 / 255, 0.6 / 255, 1.0]).view(1, 2, 2, 1).expand(1, 2, 2, 3)
    assert to_bytes(values)[0, ..., 0].flatten().tolist() == [0, 0, 1, 255]
    for wrong in (values * 2, values - 1, values[0], values[..., :1], values * torch.nan):
        with pytest.raises(ValueError, match="frames"):
            to_bytes(wrong)
    with pytest.raises(TypeError, match="uint8"):
        to_bytes(values.to(torch.uint8))


BAD_TARGETS = {
    "several frames in a png": ("a.png", "one frame, not 7"),
    "unknown suffix": ("a.avi", "must end in"),
    "no folder": ("no/a.mp4", "No such file"),
    "no folder for a folder": ("no/a", "No such file"),
    "in a file": ("file/a.mp4", "Not a directory"),
    "over a file": ("file", "is a file"),
    "over a folder": ("dir.mp4", "is a folder"),
    "over other files": ("full", r"contains 'notes\.txt'"),
    "null byte": ("a\0.mp4", "null"),
    "long name": ("a" * 300 + ".mp4", "too long"),
}


@pytest.mark.parametrize(("target", "words"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_wrong_target_leaves_nothing(frames, folder, target, words):
    (folder / "file").touch()
    (folder / "dir.mp4").mkdir()
    (folder / "full").mkdir()
    (folder / "full" / "notes.txt").touch()
    before = sorted(folder.rglob("*"))
    with pytest.raises((ValueError, OSError), match=words) as caught:
        write_video(frames, target)
    assert ".part" not in str(caught.value)
    assert sorted(folder.rglob("*")) == before
    if target != "a.png":
        with pytest.raises((ValueError, OSError), match=words):
            check_target(target)
    assert sorted(folder.rglob("*")) == before


def test_new_folders_are_no_fault_where_they_are_made(folder):
    check_target("x/y/a.mp4", new_folders=True)
    (folder / "file").touch()
    with pytest.raises(OSError, match="Not a directory"):
        check_target("file/y/a.mp4", new_folders=True)
    assert left() == ["file"]


def test_odd_sizes_and_rates_are_refused_for_mp4(frames):
    with pytest.raises(ValueError, match="even height and width, not 47x64"):
        write_video(frames[:, 1:], "a.mp4")
    for fps in (0, -1, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="fps"):
            write_video(frames, "a.mp4", fps=fps)
    assert left() == []


@pytest.mark.parametrize("target", ["clip", "clip.mp4"])
def test_what_was_there_stays_when_writing_fails(frames, target, monkeypatch):
    write_video(frames, target)
    before = read_video(target)

    def full(*args, **options):
        where = (".clip.part/0003.png",) if target == "clip" else ()
        raise OSError(errno.ENOSPC, "No space left on device", *where)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    for fault, error in ((full, OSError), (interrupted, KeyboardInterrupt)):
        with monkeypatch.context() as patch:
            if target == "clip":
                patch.setattr(video.Image.Image, "save", fault)
            else:
                patch.setattr("imageio.v2.get_writer", fault)
            with pytest.raises(error) as caught:
                write_video(frames[:3], target)
        assert ".part" not in str(caught.value)
        assert left() == [target]
        assert torch.equal(read_video(target), before)


def test_short_mp4_is_found_when_it_is_written(frames, monkeypatch):
    """imageio does not look at the exit code of ffmpeg."""
    from imageio.plugins.ffmpeg import FfmpegFormat

    monkeypatch.setattr(FfmpegFormat.Reader, "count_frames", lambda self: 3)
    with pytest.raises(OSError, match="3 of 7 frames"):
        write_video(frames, "a.mp4")
    assert left() == []


def test_without_ffmpeg_mp4_is_refused_before_frames_are_made(monkeypatch):
    def missing():
        raise RuntimeError("No ffmpeg exe could be found.")

    monkeypatch.setattr("imageio.plugins.ffmpeg.get_exe", missing)
    with pytest.raises(OSError, match="an mp4 needs ffmpeg"):
        check_target("a.mp4")
    check_target("a.png")


def test_unreadable_sources_are_one_sentence(frames, folder):
    write_video(frames, "a.mp4")
    write_video(frames[:1], "a.png")
    for name in ("mp4", "png"):
        whole = (folder / f"a.{name}").read_bytes()
        (folder / f"cut.{name}").write_bytes(whole[: len(whole) * 3 // 4])
    for name in ("text.mp4", "text.png"):
        (folder / name).write_text("hello")
    for name in ("empty.mp4", "empty.png"):
        (folder / name).touch()
    (folder / "none").mkdir()
    (folder / "mixed").mkdir()
    Image.new("RGB", (4, 4)).save("mixed/0.png")
    Image.new("RGB", (4, 6)).save("mixed/1.png")
    for name in (
        *("cut.mp4", "cut.png", "text.mp4", "text.png", "empty.mp4", "empty.png"),
        *("none", "mixed", "missing", "missing.png", "missing.mp4", "a.txt"),
    ):
        with pytest.raises((ValueError, OSError), match=name) as caught:
            read_video(name)
        assert "\n" not in str(caught.value)


def test_huge_picture_is_refused(monkeypatch):
    """Pillow warns of such a file or raises an error of its own kind."""
    Image.new("RGB", (64, 64)).save("a.png")
    for limit in (3000, 1000):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(ValueError, match=r"a\.png"):
            read_picture("a.png")


PICTURES = {  # modes and files as cameras and editors write them
    "turned.jpg": ("RGB", {"exif": 6}),
    "turned.png": ("RGB", {"exif": 3}),
    "mirrored.jpg": ("L", {"exif": 2}),
    "a.png": ("RGBA", {}),
    "la.png": ("LA", {}),
    "l.png": ("L", {}),
    "1.png": ("1", {}),
    "p.png": ("P", {}),
    "pt.png": ("P", {"transparency": 3}),
    "cmyk.jpg": ("CMYK", {}),
    "lab.tif": ("LAB", {}),
    "f.tif": ("F", {}),
    "moves.gif": ("P", {"save_all": True}),
}


@pytest.mark.parametrize("name", PICTURES)
def test_pictures_are_read_as_diffusers_reads_them(name):
    from diffusers.utils import load_image

    mode, options = PICTURES[name]
    noise = torch.randint(0, 256, (12, 8, 4), generator=torch.Generator().manual_seed(0))
    picture = Image.frombytes("RGBA", (8, 12), bytes(noise.flatten().tolist()))
    picture = picture.convert("RGB").convert(mode) if mode != "RGBA" else picture
    if "exif" in options:
        exif = Image.Exif()
        exif[0x0112] = options["exif"]
        options = {"exif": exif}
    if "save_all" in options:
        options = {**options, "append_images": [ImageOps.flip(picture)]}
    picture.save(name, **options)
    own, theirs = read_picture(name), load_image(name)
    assert own.mode == "RGB"
    assert own.size == theirs.size and own.tobytes() == theirs.tobytes()


def test_picture_of_16_bits_is_scaled_and_other_wide_ones_are_refused():
    """Pillow's own conversion cuts values off at 255."""
    values = torch.tensor([[0, 257, 32896], [65535, 128, 129]])
    wide = Image.frombytes("I;16", (3, 2), values.to(torch.uint16).numpy().tobytes())
    for name in ("wide.png", "wide.tif"):
        wide.save(name)
        levels = [0, 1, 128, 255, 0, 1]
        assert list(read_picture(name).tobytes()[::3]) == levels
    Image.frombytes("I", (3, 2), values.to(torch.int32).numpy().tobytes()).save("i.tif")
    with pytest.raises(ValueError, match=r"'i.tif' .* I values from 0 to 65535, not 0 to 255"):
        read_picture("i.tif")


def test_folder_that_is_a_link_is_replaced_and_nothing_is_left(frames, folder):
    (folder / "away").mkdir()
    (folder / "clip").symlink_to("away")
    write_video(frames[:1], "clip")
    assert left() == ["away", "clip"] and not (folder / "clip").is_symlink()
    assert os.listdir("away") == []


def test_mp4_on_a_full_disk_says_so(frames, folder, monkeypatch):
    """/dev/full refuses every byte as a full disk does."""
    monkeypatch.setattr(video, "part_of", lambda target: folder / ".full.mp4")
    monkeypatch.setattr(video, "check_writable", lambda target: None)
    (folder / ".full.mp4").symlink_to("/dev/full")
    with pytest.raises(OSError, match=r"No space left on device: 'clip.mp4'") as caught:
        write_video(frames, "clip.mp4")
    assert caught.value.errno == errno.ENOSPC
    assert left() == []
