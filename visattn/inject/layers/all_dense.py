"""Explains why a plan has no effect on a run: all its calls are dense."""

from __future__ import annotations

from collections.abc import Set
from typing import Any

from visattn.inject.hooks.running import run_of
from visattn.plan import ANY, Plan

__all__ = ["why_steps_dense", "why_unguided_dense"]


def why_steps_dense(
    plan: Plan, sparse_moments: Set[tuple[int, str]], step: int, steps: int
) -> str | None:
    """Return why no step of a run has sparse attention; None where some step has.

    Args:
        plan: the plan.
        sparse_moments: the phases and passes in which some head is sparse.
        step: the first step of the run.
        steps: the number of steps of the schedule.
    """
    phases = {plan.phase_at(number, steps) for number in range(step, steps)}
    if phases & {phase for phase, _ in sparse_moments}:
        return None
    which = f"all {steps} steps" if step == 0 else f"steps {step} to {steps - 1} of {steps}"
    why = f"dense_steps={plan.dense_steps} of the plan"
    if phases != {None}:
        why = f"dense_steps={plan.dense_steps} and the phases of the plan"
    return (
        f"nothing sparse runs, as {why} keep {which} dense; use more steps, or shares of "
        "the steps, such as dense_steps=(0.2, 0)"
    )


def why_unguided_dense(
    pipe: Any, plan: Plan, sparse_moments: Set[tuple[int, str]], doubled: bool
) -> str | None:
    """Return why a run without guidance has no sparse attention; None where it has, or where it is
    not known that guidance is off.

    Args:
        pipe: the pipeline that runs.
        plan: the plan.
        sparse_moments: the phases and passes in which some head is sparse.
        doubled: whether guidance would double the batch.
    """
    name = "cond" if "cond" in plan.passes else ANY
    if any(pass_ == name for _, pass_ in sparse_moments):
        return None
    run = run_of(pipe)
    guided = getattr(pipe, "do_classifier_free_guidance", None) if run is None else run.guided()
    if guided is not False and not doubled:
        return None
    return (
        "nothing sparse runs, as guidance is off and the plan keeps all heads of the conditional "
        "pass dense; use a plan with patterns for the conditional pass"
    )
