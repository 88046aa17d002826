"""Plans and edits under the context and tensor parallelism of diffusers, on two processes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.second

TESTS = Path(__file__).resolve().parents[1]
SPLIT = [[0, 4, "context parallelism splits its sequence"]]
KINDS = ("observe", "edit", "block edit", "guidance", "nag")
FAMILIES = ("wan", "flux")


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What ``ranks.py`` has found in both processes."""
    folder = tmp_path_factory.mktemp("ranks")
    own = {
        "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent)]),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "VISATTN_GUARD": "0",
    }
    ranks = [
        subprocess.Popen(
            [sys.executable, str(TESTS / "support" / "ranks.py"), str(rank), str(folder)],
            env={**os.environ, **own},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in (0, 1)
    ]
    try:
        for rank in ranks:
            said, _ = rank.communicate(timeout=600)
            assert rank.returncode == 0, said
    finally:
        for rank in ranks:
            rank.kill()
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in (0, 1)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_leaves_context_parallelism_dense(
    found: list[dict[str, Any]], family: str
) -> None:
    for own in found:
        # the sums of Flux, whose text is split too, are of other runs of tokens
        assert own[f"{family} without a plan"] <= (0 if family == "wan" else 1e-5)
        for case in ("split, then plan", "plan, then split", "compiled"):
            assert own[f"{family} {case}"] == [0, SPLIT], case
        for case in ("without its plan again", "without its first plan"):
            assert own[f"{family} {case}"] == 0, case


def test_a_model_compiled_as_a_whole_stays_dense(found: list[dict[str, Any]]) -> None:
    for own in found:
        assert own["whole model compiled"] == [0, SPLIT]


def test_a_backend_without_context_parallelism_is_refused(found: list[dict[str, Any]]) -> None:
    for own in found:
        for case in ("an active backend", "a backend of its own"):
            said = own[f"{case} without it"]
            assert said.startswith("ValueError: Context parallelism is enabled but"), said
            assert "_native_math' which does not" in said or "_native_math' does not" in said


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
def test_edits_are_refused_in_either_order(
    found: list[dict[str, Any]], family: str, kind: str
) -> None:
    for own in found:
        cases = [f"{family} split, then {kind}", f"{family} {kind}, then split"]
        for case in cases if family == "wan" or kind == "nag" else cases[:1]:
            assert own[case].startswith(
                "ValueError: transformer runs under context parallelism (enable_parallelism)"
            ), own[case]
        assert own[f"{family} left"] == []


def test_searches_are_refused(found: list[dict[str, Any]]) -> None:
    for own in found:
        for case in ("search", "search_heads"):
            said = "ValueError: transformer of pipe is parallel over processes"
            assert own[case].startswith(said), own[case]


def test_tensor_parallelism_stays_dense_and_is_not_edited(found: list[dict[str, Any]]) -> None:
    for own in found:
        for case in ("plan, then heads", "heads, then plan"):
            off, calls = own[case]
            assert off <= 1e-5
            assert calls == [[0, 4, "it has 2 heads, but the plan has 4"]]
        for kind in KINDS:
            assert own[f"heads, then {kind}"].startswith(
                "ValueError: transformer runs under tensor parallelism (enable_parallelism)"
            ), own[f"heads, then {kind}"]
