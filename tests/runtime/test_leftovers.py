"""What is not whole is removed: by its process, or by the next one after a kill."""

import os
import signal
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from support import tiny
from support.cli import GENERATE, run

from visattn._atomic import write_whole
from visattn.generation import Item, Job, Loading, Result, batch, read_record
from visattn.media.video import check_target, encode_video, read_video, write_video
from visattn.runtime import temporary_files as leftovers
from visattn.runtime.temporary_files import clear_leftovers, old_of, part_of, temporary_folder

FRAMES = torch.rand(3, 16, 16, 3, generator=torch.Generator().manual_seed(0))

pytestmark = [
    pytest.mark.usefixtures("alone", "anew"),
    pytest.mark.skipif(os.name != "posix", reason="needs processes of POSIX"),
]


@pytest.fixture
def anew():
    """Folders are looked at as by a process that begins."""
    leftovers._clear.cache_clear()


def killed_in(call, *, by=signal.SIGKILL):
    """The number of a process that was killed in a call."""
    pid = os.fork()
    if not pid:
        try:
            call()
        finally:
            os._exit(0)
    assert os.WTERMSIG(os.waitpid(pid, 0)[1]) == by
    return pid


def kill(*args, **options):
    os.kill(os.getpid(), signal.SIGKILL)


def left():
    return sorted(os.listdir())


@pytest.mark.parametrize("name", ["clip", "still.png", "clip.mp4"])
def test_a_kill_while_writing_leaves_nothing_to_the_next_start(monkeypatch, name):
    frames = FRAMES[:1] if name == "still.png" else FRAMES
    write_video(FRAMES.flip(0)[: len(frames)], name)
    before = read_video(name)

    def write():
        monkeypatch.setattr(Path, "replace", kill)
        monkeypatch.setattr(Path, "rename", kill)
        write_video(frames, name)

    pid = killed_in(write)
    (part,) = set(left()) - {name}
    assert str(pid) in part and ".part" in part
    assert torch.equal(read_video(name), before)  # never half of the new one
    leftovers._clear.cache_clear()
    check_target(name)
    assert left() == [name]


def test_a_kill_between_two_folders_of_frames_gives_the_old_one_back(monkeypatch):
    write_video(FRAMES, "run.5/")
    before = read_video("run.5/")

    def write():
        rename = Path.rename
        monkeypatch.setattr(
            Path, "rename", lambda a, b: rename(a, b) if str(b).endswith(".old") else kill()
        )
        write_video(FRAMES[:1], "run.5/")

    killed_in(write)
    assert not os.path.exists("run.5") and len(left()) == 2
    leftovers._clear.cache_clear()
    check_target("run.5/")
    assert left() == ["run.5"] and torch.equal(read_video("run.5/"), before)


WRITES = ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.link", "os.truncate")


@pytest.mark.parametrize("name", ["clip", "clip.mp4"])
def test_generate_killed_at_any_of_its_writes_leaves_whole_frames_and_their_record(
    monkeypatch, alone, name
):
    pipe, output = tiny.wan21(), Path("out", name)
    monkeypatch.setattr(batch, "load_pipeline", lambda loading: pipe)

    def make(pipe, job, **options):
        torch.manual_seed(job.seed)
        frames = torch.randint(0, 256, (1, 16, 16, 3)).float() / 255
        return Result(frames, 1.0, (), {}, (str(job.seed),))

    def generate(seed, **options):
        job = Job("a", seed=seed, num_frames=1)
        items = [Item("", output, job)]
        return batch.generate_all(items, Loading("m"), None, new_folders=True, **options)

    def killed_at(number, seed):
        """Whether there are so many writes."""
        pid = os.fork()
        if not pid:
            seen = []

            def hook(event, args):
                if event in WRITES and str(args[0]).startswith(("out/", f"{alone}/out/")):
                    seen.append(event)
                    if len(seen) == number:
                        os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            try:
                generate(seed)
            finally:
                os._exit(0)
        return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

    monkeypatch.setattr(batch, "run_job", make)
    generate(7)
    frames = {7: read_video(output)}
    generate(8)
    frames[8] = read_video(output)
    kills = 0
    while killed_at(kills + 1, 7):
        kills += 1
        leftovers._clear.cache_clear()
        clear_leftovers(Path("out"))
        here = read_video(output)  # there, and whole
        seeds = [seed for seed, own in frames.items() if torch.equal(own, here)]
        record = read_record(output)
        assert len(seeds) == 1
        assert record is None or record["notes"] == [str(seeds[0])]
        (outcome,) = generate(8, skip_existing=True)
        assert outcome.status == ("kept" if seeds == [8] and record else "made")
        assert sorted(os.listdir("out")) == [name, f"{name}.json"]
    assert kills > 5


def test_only_what_is_ours_and_of_an_ended_process_is_removed():
    pid = killed_in(kill)
    kept = [part_of(Path("a.mp4")), old_of(Path("a"))]  # of this process, which lives
    own = str(os.getpid())
    kept += [Path(kept[0].name.replace(own, str(os.getppid())))]
    kept += [Path(f".a.{pid}-{'0' * 8}.part"), Path(f".a.{pid}.part"), Path("visattn-notes")]
    gone = [Path(path.name.replace(own, str(pid))) for path in kept[:2]]
    for path in (*kept, *gone):
        path.write_text("x")
    Path("target").mkdir()
    Path("target/file").touch()
    Path(gone[0].name.replace(".a.", ".link.")).symlink_to("target")
    Path("a").touch()
    clear_leftovers(Path())
    assert left() == sorted(["a", "target", *(path.name for path in kept)])
    assert os.listdir("target") == ["file"]  # a link is removed and not followed


def test_temporary_folders_of_killed_processes_are_removed(monkeypatch, alone):
    Path("tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(alone / "tmp"))

    def make():
        with temporary_folder() as folder:
            (folder / "file").touch()
            kill()

    killed_in(make)
    assert len(os.listdir("tmp")) == 1
    leftovers._clear.cache_clear()
    assert len(encode_video(FRAMES)) > 100
    assert os.listdir("tmp") == []


def test_written_files_of_killed_processes_are_removed(monkeypatch):
    def write():
        monkeypatch.setattr(Path, "replace", kill)
        write_whole("plan.json", b"{}")

    killed_in(write)
    assert len(left()) == 1
    leftovers._clear.cache_clear()
    write_whole("other.json", b"{}")
    assert left() == ["other.json"]


def test_sigterm_while_writing_leaves_nothing(capsys, monkeypatch):
    save, saved = Image.Image.save, []

    def terminated(self, *args, **options):
        saved.append(save(self, *args, **options))
        if len(saved) == 5:
            os.kill(os.getpid(), signal.SIGTERM)

    write_video(FRAMES, "a")
    write_video(FRAMES, "b")
    monkeypatch.setattr(Image.Image, "save", terminated)
    code, out, err = run(capsys, "compare", "a", "b", "-o", "both")
    assert code == 0
    saved.append(None)
    code, out, err = run(capsys, "compare", "a", "b", "-o", "again")
    assert (code, out, err) == (143, "", "")
    assert left() == ["a", "b", "both"]
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


def test_a_folder_that_vanishes_is_one_line(capsys, folder, monkeypatch):
    Path("out").mkdir()
    run_of = batch.run_job

    def vanish(*args, **options):
        Path("out").rmdir()
        return run_of(*args, **options)

    monkeypatch.setattr(batch, "run_job", vanish)
    for name in ("a.mp4", "a.png", "a"):
        Path("out").mkdir(exist_ok=True)
        argv = [*GENERATE, "--num-frames", "1", "-o", f"out/{name}"]
        code, out, err = run(capsys, *argv)
        assert (code, out) == (2, "")
        last = err.splitlines()[-1]
        assert last == f"visattn: error: [Errno 2] No such file or directory: 'out/{name}'"


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs a folder that takes no file")
def test_outputs_that_cannot_be_written_are_refused_before_the_work(capsys, folder, monkeypatch):
    def loaded(*args, **options):
        raise AssertionError("loaded")

    for module in ("search", "search_heads"):
        monkeypatch.setattr(f"visattn.cli.{module}.load_pipeline", loaded)
    write_video(FRAMES, "a")
    commands = {
        "/proc/plan": ("search", "a", "--model", "wan", "--target-speedup", "1.1"),
        "/proc/heads.json": ("search-heads", "a", "--model", "wan", "--objective", "os:getcwd"),
        "/proc/page.html": ("compare", "a", "a"),
    }
    for output, argv in commands.items():
        code, out, err = run(capsys, *argv, "--output", output)
        assert (code, out) == (2, "")
        assert err == f"visattn: error: [Errno 2] No such file or directory: '{output}'\n"
