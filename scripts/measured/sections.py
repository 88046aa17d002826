"""What is asked of a GPU, section by section: each sends rows of numbers, and verdicts on those
that have a limit."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from measured.gradients import check_gradients
from measured.running import ROOT, Send, reason
from visattn import Grid, TokenLayout, sparse_attention
from visattn.attention.lowering import lower_cached
from visattn.bench import (
    SHAPES,
    AttentionTime,
    Scattered,
    Shape,
    time_attention,
    time_selection,
)
from visattn.bench.measure_attention import check
from visattn.bench.timing import take_turns
from visattn.flex import to_block_mask
from visattn.kernels.launch import backward_launch_of, launch_of
from visattn.patterns import Dense, Neighborhood, Pattern, Radial, SlidingTile, parse_pattern
from visattn.selectors import SELECTORS, Reuse, Selector, SkipList, TopBlocks

__all__ = ["SECTIONS", "Report", "Section", "judged", "small_run"]

CUDA = torch.device("cuda")
HUNYUAN = TokenLayout(Grid(30, 48, 80))
SMALL = TokenLayout(Grid(4, 9, 8), text_after=5)  # what a sanitizer runs


def judged(
    what: str,
    value: float | None,
    *,
    at_least: float | None = None,
    at_most: float | None = None,
    why: str | None = None,
) -> dict[str, Any]:
    """A verdict: a value that is missing, or NaN, does not hold; one at its limit does."""
    sense, limit = (">=", at_least) if at_most is None else ("<=", at_most)
    assert limit is not None
    holds = value is not None and (value >= limit if sense == ">=" else value <= limit)
    return {"what": what, "value": value, "sense": sense, "limit": limit, "holds": holds} | (
        {} if why is None else {"why": why}
    )


class Report:
    """Sends what a section finds, as it finds it.

    Args:
        seconds: that the section has.
    """

    def __init__(self, send: Send, seconds: float) -> None:
        self._send, self.seconds = send, seconds

    def row(self, name: str, numbers: Mapping[str, Any]) -> None:
        self._send(("rows", {"name": name} | dict(numbers)))

    def must(self, what: str, value: float | None, **limit: Any) -> None:
        self._send(("musts", judged(what, value, **limit)))

    @contextmanager
    def case(self, name: str) -> Iterator[None]:
        """What goes wrong within is told, as a limit that does not hold; the section goes on."""
        try:
            yield
        except Exception as error:  # whatever compilers, drivers and checks raise
            self.row(name, {"not run": reason(error)})
            self.must(f"{name} is measured", None, at_least=1, why=reason(error))
            if "CUDA error" in str(error):  # nothing runs in this process any more
                raise


def timed(
    report: Report, name: str, pattern: Pattern, shape: Shape, *, repeats: int, flex: bool = False
) -> AttentionTime:
    """Times of a pattern in bfloat16, which become a row."""
    found = time_attention(
        pattern, shape, dtype=torch.bfloat16, device=CUDA, repeats=repeats, flex=flex
    )
    report.row(name, found.numbers())
    torch.cuda.empty_cache()
    return found


def environment(report: Report) -> None:
    """Device, versions, clocks as they are found."""
    from visattn.cli.env import environment as versions

    report.row("versions", versions())
    capability = torch.cuda.get_device_capability()
    own = torch.cuda.get_device_properties(CUDA)
    report.row(
        "device",
        {
            "device": own.name,
            "capability": capability,
            "processors": own.multi_processor_count,
            "cudnn": torch.backends.cudnn.version(),
        },
    )
    wanted = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,power.limit"
    if tool := shutil.which("nvidia-smi"):
        asked = [tool, f"--query-gpu={wanted}", "--format=csv,noheader"]
        done = subprocess.run(asked, capture_output=True, text=True, timeout=20)
        values = done.stdout.strip().split(", ")
        report.row("clocks, idle", dict(zip(wanted.split(","), values, strict=False)))
    else:
        report.row("clocks", {"not run": "nvidia-smi is not installed"})


def density_one(report: Report) -> None:
    """Our dense attention beside the fastest of the others."""
    for name in ("wan-1.3b-480p", "wan-1.3b-720p"):
        with report.case(name):
            found = timed(report, name, Dense(), SHAPES[name], repeats=7)
            report.must(
                f"rate at density 1 over the fastest dense attention, {found.tokens} tokens",
                found.efficiency.median,
                at_least=0.8,
            )


def aligned(report: Report) -> None:
    """Maps of whole blocks of 128 tokens beside our own density 1."""
    for frames, heads in ((16, 12), (36, 8), (58, 8)):
        shape = Shape(TokenLayout(Grid(frames, 32, 64)), heads, 128)
        patterns: list[Pattern] = [Scattered(share) for share in (0.05, 0.1, 0.25, 0.5)]
        patterns.append(SlidingTile((2, 8, 8), (3, 3, 3)))
        for pattern in patterns:
            name = f"{pattern.name} {pattern.density(shape.layout):.3f}, {shape.layout.length}"
            with report.case(name):
                found = timed(report, name, pattern, shape, repeats=5 if frames == 16 else 3)
                report.must(
                    f"time over density x time at density 1, {name} tokens",
                    found.sparse.median / (found.density * found.own_dense.median),
                    at_most=1.1,
                )


def hunyuan(report: Report) -> None:
    """Windows of 18x24x24 in HunyuanVideo's grid, with all that is permuted."""
    shape = SHAPES["hunyuan-768p"]
    for stride, least in (((16, 8, 8), 8.5), ((1, 1, 1), 5.0)):
        name = f"window 18x24x24, stride {'x'.join(map(str, stride))}"
        with report.case(name):
            found = timed(report, name, Neighborhood((18, 24, 24), stride=stride), shape, repeats=3)
            cudnn = found.all_dense.get("cudnn")
            report.must(
                f"speedup over cuDNN, {name}",
                None if cudnn is None else cudnn.median / found.sparse.median,
                at_least=least,
                why=found.missing.get("cudnn"),
            )


def published(report: Report) -> None:
    """Patterns at the densities that their authors publish, in HunyuanVideo's grid."""
    shape = Shape(HUNYUAN, 8, 128)
    cases: list[tuple[str, Pattern, float]] = [
        ("radial, decay 0.95", Radial(0.95), 0.2746),  # as counted; 0.269 by the authors' FLOPs
        ("sliding tile 3x3x3 of 5x6x10", SlidingTile((6, 8, 8), (3, 3, 3)), 0.09),
        ("sliding tile 5x5x5 of 5x6x10", SlidingTile((6, 8, 8), (5, 5, 5)), 5 / 12),
    ]
    for name, pattern, density in cases:
        with report.case(name):
            found = timed(report, name, pattern, shape, repeats=3)
            off = abs(found.density - density)
            report.must(f"density less {density:.4f}, {name}", off, at_most=1e-3)
            report.must(f"efficiency, {name}", found.efficiency.median, at_least=0.9)


def flex(report: Report) -> None:
    """FlexAttention with the same rule in raster order, and with the same blocks on tensors that
    are already in our order, which we permute ourselves."""
    shape = Shape(TokenLayout(Grid(16, 32, 64)), 12, 128)
    for pattern in (Neighborhood((10, 16, 20)), Scattered(0.25), Radial(0.2)):
        with report.case(pattern.name):
            beside_flex(report, pattern, shape)


def beside_flex(report: Report, pattern: Pattern, shape: Shape) -> None:
    """A pattern beside both of them."""
    name, layout = pattern.name, shape.layout
    found = timed(report, name, pattern, shape, repeats=5, flex=True)
    size = (1, shape.heads, layout.length, shape.head_size)
    q, k, v = (torch.randn(size, device=CUDA).bfloat16() for _ in range(3))
    own = lower_cached(pattern, layout, None, *launch_of(q)[:2])
    partial = own.num_partial / own.num_visited
    ratios, missing = {}, dict(found.missing)
    if found.flex is not None:
        ratios["in raster order"] = found.flex.median / found.sparse.median
    try:
        run = flex_in_order(q, k, v, pattern, layout)
        both = [functools.partial(sparse_attention, q, k, v, pattern, layout), run]
        with torch.no_grad():
            ours, theirs = take_turns(both, 5, CUDA)
        ratios["in our order"] = theirs.median / ours.median
    except Exception as error:  # whatever compiling may raise: it is reported
        missing["flex in our order"] = reason(error)
    numbers = {"ratios": ratios, "partial": partial, "missing": missing}
    report.row(f"{name}: flex over ours", numbers)
    report.must(
        f"flex over ours, {name}, {partial:.0%} of the blocks partial",
        min(ratios.values(), default=None),
        at_least=1.3 if partial > 0.5 else 1.0,
    )


def flex_in_order(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, pattern: Pattern, layout: TokenLayout
) -> Callable[[], Any]:
    """Compiled FlexAttention over a map in the pattern's own order.

    Raises:
        ValueError: its blocks are not of equal length.
    """
    from torch.nn.attention.flex_attention import flex_attention

    block_map = pattern.lower(layout, 128, 128)
    mask = to_block_mask(block_map, q.device)
    indices = (block_map.q_blocks.index, block_map.k_blocks.index, block_map.k_blocks.index)
    ordered = [
        x if index is None else x[:, :, index.to(x.device)]
        for x, index in zip((q, k, v), indices, strict=True)
    ]
    run = functools.partial(torch.compile(flex_attention), *ordered, block_mask=mask)
    with torch.no_grad():
        run()
    return run


def gradients(report: Report) -> None:
    """Gradients beside those of flash attention, per kept block."""
    layout, heads = TokenLayout(Grid(16, 32, 64)), 8
    patterns = (Dense(), Scattered(0.25), Neighborhood((10, 16, 20)), SlidingTile((4, 8, 8), 3))
    generator = torch.Generator(CUDA).manual_seed(0)
    q, k, v, grad_out = (
        torch.randn(1, heads, layout.length, 128, generator=generator, device=CUDA).bfloat16()
        for _ in range(4)
    )
    leaves = tuple(x.requires_grad_() for x in (q, k, v))

    def backward_of(out: torch.Tensor) -> Callable[[], tuple[torch.Tensor, ...]]:
        return lambda: torch.autograd.grad(out, leaves, grad_out, retain_graph=True)

    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        flash = backward_of(scaled_dot_product_attention(q, k, v))
    for pattern in patterns:
        name = f"{pattern}, {layout.length} tokens"
        with report.case(name):
            out, lse = sparse_attention(*leaves, pattern, layout, return_lse=True)
            run, plain = backward_of(out), tuple(x.detach() for x in leaves)
            with torch.no_grad():
                check(out.detach(), *plain, pattern, layout)
                given = (out.detach(), lse.detach(), grad_out, pattern, layout)
                check_gradients(run(), plain, *given)
            blocks = backward_launch_of(q)[0]
            executed = lower_cached(pattern, layout, None, *blocks).block_density
            theirs, ours = take_turns([flash, run], 5, CUDA)
            ratio = theirs.median * executed / ours.median
            numbers = {"executed": executed, "flash": theirs, "ours": ours, "ratio": ratio}
            report.row(name, numbers)
            report.must(f"rate per kept block over flash's, {pattern.name}", ratio, at_least=0.7)


def tests(report: Report) -> None:
    """The tests that need a GPU."""
    files = [
        path
        for path in sorted((ROOT / "tests").rglob("test_*.py"))
        if "mark.gpu" in path.read_text(encoding="utf-8")
    ]
    if importlib.util.find_spec("diffusers") is None:
        left_out = [path for path in files if path.parent.name != "kernels"]
        files = [path for path in files if path not in left_out]
        names = [path.name for path in left_out]
        report.row("left out", {"files": names, "why": "diffusers is not installed"})
    workers = ["-n", "6"] if importlib.util.find_spec("xdist") else []
    with tempfile.TemporaryDirectory() as folder:
        results = Path(folder) / "results.xml"
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["--continue-on-collection-errors", f"--junitxml={results}", *workers]
        command += [str(path.relative_to(ROOT)) for path in files]
        code, text = called(command, report.seconds)
        if not results.exists():
            report.row("pytest -m gpu", {"exit code": code, "output": text[-2000:]})
            report.must("tests that fail", None, at_most=0, why=f"pytest ended with {code}")
            return
        suite = ElementTree.parse(results).getroot().find("testsuite")
        assert suite is not None
        counts = {name: int(suite.get(name, 0)) for name in ("tests", "failures", "errors")}
        counts["skipped"] = int(suite.get("skipped", 0))
        failed = [
            f"{case.get('name')}: {(item.get('message') or '').strip()[:200]}"
            for case in suite.iter("testcase")
            for item in case
            if item.tag in ("failure", "error")
        ]
    report.row("pytest -m gpu", counts | {"failed": failed[:50]})
    report.must("tests that ran", counts["tests"] - counts["skipped"], at_least=1)
    report.must("tests that fail", counts["failures"] + counts["errors"], at_most=0)


def pipelines(report: Report) -> None:
    """A denoising step of large models with some of their layers, dense and at density 0.25."""
    bench = [sys.executable, "-m", "visattn", "bench", "pipeline"]
    wide = os.environ | {"COLUMNS": "10000"}  # or names are broken at their hyphens
    code, usage = called([*bench, "--help"], 60, environment=wide)
    if code != 0:
        report.row("visattn bench pipeline", {"not run": usage[-300:]})
        return
    models = {}
    for wanted, frames in (("wan2.1-14b", 81), ("hunyuan", 129)):
        if names := re.findall(rf"\b{re.escape(wanted)}[\w.-]*\b", usage):
            models[names[0]] = frames
        else:
            report.row(wanted, {"not run": "visattn bench pipeline has no such model"})
    plan = "neighborhood((1.0, 0.5, 0.5))"
    for name, frames in models.items():
        command = [*bench, "--model", name, "--height", "720", "--width", "1280"]
        command += ["--num-frames", str(frames), "--plan", plan, "--layers", "4", "--repeats", "2"]
        seconds = report.seconds / len(models) - 5
        code, text = called([*command, "--json"], seconds, errors=False)
        try:
            (model,) = json.loads(text)["models"].values()
            step = model["plans"][plan]["step"]
        except (ValueError, KeyError):
            report.row(name, {"not run": f"exit code {code}: {text[-300:]}"})
            continue
        row = {"command": " ".join(command[1:]), "all_layers": model["all_layers"]}
        report.row(name, row | step)
        report.must(f"speedup of a step, {name}", step["speedup"]["median"], at_least=1.0)


def selection(report: Report) -> None:
    """What choosing blocks costs, at 32k, 75k and 118k tokens."""
    grids = (Grid(21, 30, 52), Grid(21, 45, 80), Grid(33, 45, 80))
    for text in sorted(SELECTORS, key=lambda text: text != TopBlocks.name):
        selector = parse_pattern(text)
        if not isinstance(selector, Selector) or isinstance(selector, Reuse | SkipList):
            continue  # chooses nothing, or nothing at most steps
        for grid in grids:
            name = f"{text}, {grid.numel} tokens"
            with report.case(name):
                found = time_selection(
                    selector,
                    TokenLayout(grid),
                    dim=128,
                    dtype=torch.bfloat16,
                    device=CUDA,
                    repeats=3,
                )
                report.row(name, found.numbers())
                report.must(f"choice over dense attention, {name}", found.share, at_most=0.03)
            torch.cuda.empty_cache()


def sanitizer(report: Report) -> None:
    """Memory errors and races in a small run of each kind of kernel."""
    home = Path(os.environ.get("CUDA_HOME", "/usr/local/cuda"))
    tool = shutil.which("compute-sanitizer") or shutil.which(
        "compute-sanitizer", path=str(home / "bin")
    )
    if tool is None:
        report.row("compute-sanitizer", {"not run": "it is not installed"})
        return
    small = [sys.executable, str(ROOT / "scripts" / "gpu_table.py"), "--small-run"]
    no_cache = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    code, text = called(small, report.seconds / 3)  # compiles, so that the others do not
    if code != 0:
        report.row("small run", {"exit code": code, "output": text[-1000:]})
        report.must("small run: exit code", code, at_most=0)
        return
    for kind, summary in (
        ("memcheck", r"ERROR SUMMARY: (\d+) error"),
        ("racecheck", r"RACECHECK SUMMARY: (\d+) hazard"),
    ):
        command = [tool, "--tool", kind, *small]
        code, text = called(command, report.seconds / 3, environment=no_cache)
        counted = re.findall(summary, text)
        report.row(kind, {"exit code": code, "output": text[-1500:]})
        if not counted:
            report.row(f"{kind}: verdict", {"not run": "it gave no summary, see its output"})
            continue
        report.must(f"{kind}: errors", int(counted[-1]), at_most=0)


def small_run(device: torch.device = CUDA) -> None:
    """Kernels of each kind once, on few tokens."""
    generator = torch.Generator().manual_seed(0)
    leaves = [
        torch.randn(1, 2, SMALL.length, 64, generator=generator).to(device, torch.float16)
        for _ in range(3)
    ]
    lengths = torch.tensor([3], device=device)
    for pattern in (Dense(), Neighborhood(3), Radial(rule="token"), TopBlocks(0.4, rest="pooled")):
        q, k, v = (x.clone().requires_grad_() for x in leaves)
        out = sparse_attention(q, k, v, pattern, SMALL, text_lengths=lengths, backend="triton")
        torch.autograd.grad(out.float().square().sum(), (q, k, v))
    if device.type == "cuda":
        torch.cuda.synchronize()


def called(
    command: list[str],
    seconds: float,
    *,
    errors: bool = True,
    environment: Mapping[str, str] | None = None,
) -> tuple[int | None, str]:
    """Exit code and output of a command in the root of the repository, with what it writes on
    stderr, if ``errors`` or if nothing else; the code is None where it was stopped."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    own = dict(os.environ if environment is None else environment) | {"PYTHONPATH": path}
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env=own,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=max(1.0, seconds))
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)  # what it started, too
        out, err = process.communicate()
        return None, f"{out}{err}\nstopped after {seconds:.0f} s"
    return process.returncode, out + err if errors or not out.strip() else out


@dataclass(frozen=True)
class Section:
    """A part of the table; ``seconds`` is the most that it takes."""

    title: str
    seconds: float
    run: Callable[[Report], None]


# In the order in which they run: what is worth most comes first.
SECTIONS: dict[str, Section] = {
    "a": Section("environment", 30, environment),
    "c": Section("density 1 beside dense attention", 60, density_one),
    "e": Section("HunyuanVideo, window 18x24x24", 75, hunyuan),
    "d": Section("block-aligned maps beside density 1", 75, aligned),
    "h": Section("gradients beside flash attention's", 60, gradients),
    "g": Section("FlexAttention with the same map", 110, flex),
    "b": Section("tests that need a GPU", 200, tests),
    "i": Section("a denoising step of large models", 130, pipelines),
    "f": Section("published densities", 45, published),
    "k": Section("compute-sanitizer", 120, sanitizer),
    "j": Section("choosing blocks", 150, selection),
}
