"""Whether a plan leaves all that runs dense, which is said once."""

from __future__ import annotations

from typing import TYPE_CHECKING

from visattn.inject.hooks.running import run_of
from visattn.plan import ANY

if TYPE_CHECKING:
    from visattn.inject.attachment import Attachment

__all__ = ["judge_steps", "judge_unguided"]


def judge_steps(own: Attachment, step: int, steps: int) -> None:
    """Say, at the first step of a run, that none of its steps has anything sparse."""
    state, plan = own.call, own.plan
    last, state.last = state.last, (step, steps)
    if last is not None and steps == last[1] and step >= last[0]:
        return  # not the first
    phases = {plan.phase_at(number, steps) for number in range(step, steps)}
    if phases & {phase for phase, _ in own.sparse_moments} or not callable(own.pipe()):
        return
    first = f"all {steps} steps" if step == 0 else f"steps {step} to {steps - 1} of {steps}"
    why = f"dense_steps={plan.dense_steps} of the plan"
    if phases != {None}:
        why = f"dense_steps={plan.dense_steps} and the phases of the plan"
    own.tell(
        f"nothing sparse runs, as {why} keep {first} dense; use more steps, or shares of "
        "the steps, such as dense_steps=(0.2, 0)"
    )


def judge_unguided(own: Attachment) -> None:
    """Say, where the conditional pass is all there is, that it has nothing sparse."""
    pipe, name = own.pipe(), "cond" if "cond" in own.plan.passes else ANY
    if any(pass_ == name for _, pass_ in own.sparse_moments) or not callable(pipe):
        return
    run = run_of(pipe)
    guided = getattr(pipe, "do_classifier_free_guidance", None) if run is None else run.guided()
    off = guided is False or bool(own.family.cfg_batch_order)  # which is not doubled
    if off and not any(layer.sparse_calls for layer in own.layers):
        own.tell(
            "nothing sparse runs, as guidance is off and the plan keeps all heads of the "
            "conditional pass dense; use a plan with patterns for the conditional pass"
        )
