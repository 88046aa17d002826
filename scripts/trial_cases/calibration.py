"""The guard that keeps a plan from making a layer slower."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import torch

from trial_cases.case import Case
from visattn.cost import Calibration, calibration_cache, interleaved

__all__ = ["CASES"]


FAST = Calibration("planted", "blockwise", "float32", 16, (64, 64), 1, *([1e-12] * 6), 1e-3)


def damaged_files(folder: Path) -> str:
    os.environ["VISATTN_CACHE"] = str(folder)
    made: list[str] = []
    real = calibration_cache.calibrate

    def calibrate(device: torch.device, *_: object, **__: object) -> Calibration:
        made.append(str(device))
        return FAST

    calibration_cache.calibrate = calibrate  # type: ignore[assignment]
    try:
        calibration_cache._CALIBRATIONS.clear()
        calibration_cache.calibration_of("cpu")
        (path,) = folder.iterdir()
        for make in (lambda: path.write_text("[" * 30000), lambda: os.mkfifo(path)):
            path.unlink()
            make()
            calibration_cache._CALIBRATIONS.clear()
            assert calibration_cache.calibration_of("cpu") == FAST
    finally:
        calibration_cache.calibrate = real
        calibration_cache._CALIBRATIONS.clear()
    assert len(made) == 3, made
    return "deep JSON and a pipe in its place are measured again"


def other_backend(folder: Path) -> str:
    from diffusers.models.attention_dispatch import attention_backend
    from support import tiny

    import visattn
    from visattn.inject.layers import guard
    from visattn.patterns import Diagonal

    asked: set[str] = set()
    real = guard.calibration_of

    def own(*args: object) -> Calibration:
        asked.add(args[3].name)  # type: ignore[attr-defined]
        return FAST

    guard.calibration_of = own  # type: ignore[assignment]
    try:
        pipe = tiny.wan21()
        visattn.apply_plan(pipe, Diagonal(3), guard=True)
        with attention_backend("_native_math"):
            tiny.generate(pipe)
    finally:
        guard.calibration_of = real
    assert asked == {"_native_math"}, asked
    return "it asks for dense attention by the backend _native_math"


def busy_machine(folder: Path) -> str:
    a = torch.randn(512, 512)
    calls = {"long": lambda: [a @ a for _ in range(16)], "short": lambda: a @ a}
    stop = threading.Event()

    def disturb() -> None:
        b = torch.randn(400, 400)
        while not stop.is_set():
            b @ b

    threads = [threading.Thread(target=disturb) for _ in range(2 * (os.cpu_count() or 1))]
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    for thread in threads:
        thread.start()
    try:
        found = interleaved(calls, torch.device("cpu"), seconds=1.0)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        torch.set_num_threads(before)
    ratio = found["long"].seconds / found["short"].seconds
    assert 12 < ratio < 20, ratio
    return f"16 products take {ratio:.1f} times as long as one, beside {len(threads)} busy threads"


CASES = (
    Case("a damaged calibration file is measured again", damaged_files),
    Case("the guard compares with the pipeline's own attention backend", other_backend),
    Case("a busy machine does not make long calls look slow", busy_machine),
)
