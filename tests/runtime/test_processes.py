"""Several processes: who is who, a device each, and commands that share their work or refuse."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from support.cli import ROOT, SIZE, refused, run

from visattn.generation.loading import Loading, load_pipeline, pick_device
from visattn.runtime import processes as module
from visattn.runtime.processes import Processes, device_of_process, join, processes

NAMES = {name for names in module.STARTERS.values() for name in names} | {"MASTER_ADDR"}


@pytest.fixture(autouse=True)
def started(monkeypatch):
    """Sets the environment that a starter of processes gives; first that of none."""

    def start(**environment):
        for name in NAMES:
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)

    start()
    return start


@pytest.mark.parametrize(
    ("environment", "own"),
    [
        ({}, (0, 1, 0)),
        ({"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1"}, (5, 8, 1)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, (1, 2, 0)),  # one on each machine
        ({"WORLD_SIZE": "2"}, (0, 1, 0)),
        (
            {
                "OMPI_COMM_WORLD_RANK": "3",
                "OMPI_COMM_WORLD_SIZE": "4",
                "OMPI_COMM_WORLD_LOCAL_RANK": "1",
            },
            (3, 4, 1),
        ),
        ({"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1"}, (1, 2, 1)),
        ({"SLURM_PROCID": "2", "SLURM_STEP_NUM_TASKS": "4", "SLURM_LOCALID": "0"}, (2, 4, 0)),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "4", "SLURM_LOCALID": "0"}, (0, 1, 0)),  # sbatch
        (  # torchrun inside srun
            {
                "SLURM_PROCID": "1",
                "SLURM_STEP_NUM_TASKS": "2",
                "RANK": "9",
                "WORLD_SIZE": "16",
                "LOCAL_RANK": "1",
            },
            (9, 16, 1),
        ),
    ],
    ids=str,
)
def test_who_is_who(started, environment, own):
    started(**environment)
    assert processes()[:3] == own
    assert processes().first == (own[0] == 0)


@pytest.mark.parametrize("rank", ["2", "-1", "x"])
def test_numbers_that_cannot_be(started, rank):
    started(RANK=rank, WORLD_SIZE="2")
    with pytest.raises(ValueError, match=f"RANK='{rank}', WORLD_SIZE='2'"):
        processes()


def test_processes_that_cannot_meet(started):
    """Search needs them to; others are alone in their group, with their number."""
    started(PMI_RANK="1", PMI_SIZE="2")
    needs = pytest.raises(ValueError, match="a search in 2 processes needs MASTER_ADDR")
    with needs, join("a search"):
        pass
    with join() as group:
        assert group.process == Processes(1, 2, 0, "mpirun of MPICH")
        assert group.gather("x") == ["x"]


def test_a_device_each(started, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 4)
    assert pick_device(None) == pick_device("cuda") == torch.device("cuda")
    started(RANK="6", WORLD_SIZE="8", LOCAL_RANK="2")
    assert pick_device(None) == pick_device("cuda") == torch.device("cuda", 2)
    assert pick_device("cuda:1") == torch.device("cuda", 1)  # as it is said
    assert pick_device("cpu") == device_of_process(torch.device("cpu")) == torch.device("cpu")
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)  # the others are hidden
    assert pick_device(None) == torch.device("cuda", 0)
    with pytest.raises(ValueError, match="balanced over all devices runs in one process"):
        load_pipeline(Loading("model", device="balanced"))


@pytest.mark.parametrize(
    "argv",
    [
        ("compare", "a.mp4", "b.mp4", "-o", "page.html"),
        ("inspect", "a red square", "-o", "heads.png"),
        ("bench", "attention"),
        ("show", "radial()"),
    ],
    ids=lambda argv: argv[0],
)
def test_other_commands_are_refused(capsys, alone, started, argv):
    """Or each process would write the same file."""
    started(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    (line,) = refused(capsys, *argv)
    assert f"visattn {argv[0]} runs in one process only, but this is process 1 of 2" in line
    assert "started by torchrun" in line
    assert run(capsys, "env")[0] == 0


def test_one_prompt_is_made_by_the_first(capsys, folder, started):
    argv = ["generate", "a red square", "--model", "wan", *SIZE, "-o", "clip"]
    started(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert run(capsys, *argv) == (0, "", "")
    assert not Path("clip").exists()
    started(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    assert run(capsys, *argv)[1].startswith("wrote clip")


@pytest.mark.parametrize("command", ["search", "search-heads"])
def test_the_first_process_writes(capsys, folder, monkeypatch, started, command):
    class Found:
        """Nothing that could be saved or told."""

    heads = command == "search-heads"
    part = "visattn.cli.search_heads.search_heads" if heads else "visattn.search.search"
    monkeypatch.setattr(part, lambda *args, **options: Found())
    output = "out.json" if heads else "out"
    argv = [command, "a red square", "--model", "wan", "-o", output]
    argv += ["--objective", "scorer"] if heads else []
    started(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1")
    assert run(capsys, *argv) == (0, "", "")
    assert not list(folder.glob("out*"))
    started(RANK="0", WORLD_SIZE="2", LOCAL_RANK="0")
    code, _, err = run(capsys, *argv)
    assert code == 2 and "'Found' object has no attribute 'save'" in err


def test_generate_makes_each_output_once(folder):
    """With torchrun, which ends all processes when one of them ends with an error: a line that
    fails early ends none, and both know of it at the end."""
    lines = [{"prompt": "a", "seed": n, "output": f"{n}"} for n in range(5)]
    lines[1]["height"] = 95  # of the second process, which has no more than one other line
    Path("p.jsonl").write_text("\n".join(map(json.dumps, lines)))
    size = [*SIZE[:-1], "1"]
    argv = ["generate", "--prompts", "p.jsonl", "--model", "wan", *size, "-o", "all"]
    done = torchrun(argv)
    made = Counter(line.split(":")[0] for line in done.stdout.splitlines())
    assert made == {f"wrote all/{n}": 1 for n in (0, 2, 3, 4)}, done.stderr
    failed = [line for line in done.stderr.splitlines() if "visattn: error" in line]
    assert len(failed) == 1 and "line 2: " in failed[0] and "height" in failed[0]
    assert done.returncode != 0
    assert sorted(os.listdir("all")) == sorted(
        name for n in (0, 2, 3, 4) for name in (f"{n}", f"{n}.json")
    )


def torchrun(argv):
    """A command in two processes of its own, with torch's starter."""
    env = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    env |= {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    starter = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *starter, "-m", "visattn", *argv]
    return subprocess.run(command, env=env, capture_output=True, text=True, check=False)
