"""``guide``: perturbed guidance on pipelines that know nothing of it, folded into their own."""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from visattn.guidance.edits.block_edits import (
    BlockEdit,
    BlockSwitch,
    block_numbers,
    block_paths,
    edit_blocks,
)
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.steer import Steering, check_switches, check_touched, enter, place
from visattn.guidance.guiders.block_cache import Prefix
from visattn.guidance.guiders.cfg_slope import call_arguments, not_linear, slope
from visattn.guidance.guiders.cfg_zero_star import CFGZeroStar
from visattn.guidance.guiders.denoiser_io import part_of, sample_of, with_sample
from visattn.guidance.guiders.guidance import Guidance, InPass
from visattn.inject.apply import known_denoisers
from visattn.inject.attachment import Attachment, attached, describe
from visattn.inject.hooks.call_state import caller
from visattn.inject.hooks.class_swap import Next, add_handler, handlers_of, remove_handler
from visattn.inject.hooks.run_state import Context
from visattn.pipelines.family import Family

__all__ = ["guide"]

logger = logging.getLogger("visattn")


class Perturbation:
    """A guidance on a pipeline: its edits, which are made in its own pass alone."""

    def __init__(self, stack: ExitStack, pipe: Any, guidance: Guidance, prefix: bool) -> None:
        self.guidance = guidance
        every = guidance.edits()
        self.edits = [edit for edit in every if isinstance(edit, Edit)]
        self.of_blocks = [edit for edit in every if isinstance(edit, BlockEdit)]
        self.steerings: dict[str, Steering] = enter(stack, pipe, place(pipe, self.edits), on=False)
        self.switches: list[BlockSwitch] = edit_blocks(stack, pipe, self.of_blocks)
        for switch in self.switches:
            switch.on = False
        placed = [u for own in self.steerings.values() for _, at in own.edits for u in at.values()]
        nothing = not self.of_blocks and not any(bool(u.any()) for u in placed)
        self.idle = guidance.scale == 0 or nothing  # p would be c, or does not count
        self.prefixes: dict[str, Prefix] = {}
        for role, (model, family) in known_denoisers(pipe).items() if prefix else ():
            stacks = block_paths(model, family)
            first = self._first(role, [path for own in stacks for path in own])
            self.prefixes[role] = Prefix(stack, model, stacks, first)

    def _first(self, role: str, paths: Sequence[str]) -> int:
        """Number of the first block that is edited."""
        found = [n for edit in self.of_blocks for n in block_numbers(edit, len(paths), role)]
        for _, where in self.steerings[role].edits:
            for layer in where:
                found += [n for n, path in enumerate(paths) if layer.startswith(path + ".")]
        return min(found, default=0)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the edits are made."""
        switches: list[Any] = [*self.steerings.values(), *self.switches]
        for switch in switches:
            switch.on = True
        try:
            yield
        finally:
            for switch in switches:
                switch.on = False

    def check(self) -> None:
        if not self.idle:
            check_touched(self.edits, self.steerings.values())
            check_switches(self.of_blocks, self.switches)


class _Guided:
    """The guidances of a denoiser: what its calls give in place of its own."""

    def __init__(
        self,
        pipe: Any,
        role: str,
        model: torch.nn.Module,
        family: Family,
        ones: Sequence[Perturbation],
        zero: CFGZeroStar | None,
        given: dict[str, Any],
    ) -> None:
        self.pipe, self.role, self.model, self.family = pipe, role, model, family
        self.ones, self.zero, self.given = ones, zero, given
        self.busy = False
        # the last one of each thread or task, for the unconditional pass after it
        self.conds: weakref.WeakKeyDictionary[Any, torch.Tensor] = weakref.WeakKeyDictionary()
        self.changed = False  # whether CFG-Zero* has changed a prediction

    @property
    def works(self) -> bool:
        """Whether it changes predictions."""
        return bool(self.ones) or self.zero is not None

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = attached(self.model)
        assert own is not None
        with own.turn.taken():
            if self.busy:
                return inner(*args, **kwargs)
            return self._call(own, inner, args, kwargs)

    def _call(
        self, own: Attachment, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        arguments = {**dict(zip(own.names, args, strict=False)), **kwargs}
        own.note(arguments)  # which code that is compiled as a whole does not
        with ExitStack() as stack:
            for one in self.ones:
                prefix = one.prefixes.get(self.role)
                if prefix is not None:
                    prefix.kept.clear()
                    if not one.idle and prefix.reusable(arguments):
                        stack.enter_context(prefix.keeping())
            out = inner(*args, **kwargs)
        own.note(arguments)  # a guidance inside has made calls of its own
        batch = arguments["hidden_states"].shape[0]
        passes = own.passes(batch)
        if passes is None and self.pipe is None:
            passes = ("cond",)  # a denoiser that is alone
        if passes is None:
            raise ValueError(
                "guidance cannot be added, as "
                + own.unknown("pass", "another pipeline of the family", "guide")
            )
        step, steps = own.step()
        sample = sample_of(out)
        new = self._perturbed(own, arguments, inner, sample, passes, step, steps)
        for one in self.ones:
            for prefix in one.prefixes.values():
                prefix.kept.clear()
        if self.zero is not None:
            new = self._zero_star(sample, new, passes, step, steps)
        return out if new is sample else with_sample(out, new)

    def _perturbed(
        self,
        own: Attachment,
        arguments: dict[str, Any],
        inner: Next,
        sample: torch.Tensor,
        passes: tuple[str, ...],
        step: int | None,
        steps: int | None,
    ) -> torch.Tensor:
        """The predictions with ``w (c - p)`` over the slope added to the conditional one."""
        used = [one for one in self.ones if not one.idle and one.guidance.active(step, steps)]
        if not used or "cond" not in passes:
            return sample
        each = sample.shape[0] // len(passes)
        at = passes.index("cond")
        rows = None if len(passes) == 1 else slice(at * each, (at + 1) * each)
        cond = sample if rows is None else sample[rows]
        wide = cond.to(torch.promote_types(cond.dtype, torch.float32))
        timestep = arguments.get("timestep")
        steepness = slope(self.pipe, self.role, self.given, timestep, step, steps)
        added = torch.zeros_like(wide)
        mine = {
            name: part_of(name, value, sample.shape[0], rows) for name, value in arguments.items()
        }
        for one in used:
            other = self._pass(own, one, mine, inner, rows, step, steps)
            added += one.guidance.scale / steepness * (wide - other.to(wide.dtype))
        new = (wide + added).to(cond.dtype)
        if rows is None:
            return new
        out = sample.clone()
        out[rows] = new
        return out

    def _pass(
        self,
        own: Attachment,
        one: Perturbation,
        arguments: dict[str, Any],
        inner: Next,
        rows: slice | None,
        step: int | None,
        steps: int | None,
    ) -> torch.Tensor:
        """The perturbed prediction."""
        before = own.context
        self.busy = True
        with ExitStack() as stack:
            stack.callback(setattr, self, "busy", False)
            apart = getattr(type(self.model), "cache_context", None)
            if apart is not None:  # caches of steps keep the pass apart
                stack.enter_context(apart(self.model, "perturbed"))
            stack.callback(setattr, own, "context", before)
            own.context = Context("perturbed", step, steps)
            stack.enter_context(one.on())
            if self.role in one.prefixes:
                stack.enter_context(one.prefixes[self.role].giving(rows))
            return sample_of(inner(**arguments))

    def _zero_star(
        self,
        sample: torch.Tensor,
        new: torch.Tensor,
        passes: tuple[str, ...],
        step: int | None,
        steps: int | None,
    ) -> torch.Tensor:
        """The predictions as CFG-Zero* has them: ``s u`` in place of ``u``."""
        assert self.zero is not None
        first = self.zero.zero_init
        if first and (step is None or steps is None):
            raise ValueError(
                "CFGZeroStar gives 0 at the first steps, and the step is not known; guide the "
                "pipeline that runs"
            )
        if first and (step or 0) < (first if isinstance(first, int) else first * (steps or 0)):
            self.changed = True
            return torch.zeros_like(new)
        halves = dict(zip(passes, sample.chunk(len(passes)), strict=True))
        if "uncond" not in halves:
            if "cond" in halves:
                self.conds[caller()] = halves["cond"]
            return new
        cond = halves.get("cond", self.conds.get(caller()))
        if cond is None:
            raise ValueError(
                f"CFGZeroStar: the unconditional pass of {type(self.pipe).__name__} comes before "
                "the conditional one, by which it is scaled"
            )
        uncond = halves["uncond"]
        each = uncond.shape[0]
        cond = cond[:each]  # what comes after the prompts' samples are those of other texts
        at = passes.index("uncond")
        self.changed = True
        out = new.clone()
        out[at * each : (at + 1) * each] = scaled(cond, uncond)
        return out


def _works(handler: object) -> bool:
    return isinstance(handler, _Guided) and handler.works


def scaled(cond: torch.Tensor, uncond: torch.Tensor) -> torch.Tensor:
    """``s u`` with ``s = <c, u> / |u|^2`` for each sample."""
    c, u = (x.flatten(1).to(torch.promote_types(x.dtype, torch.float32)) for x in (cond, uncond))
    s = (c * u).sum(1) / ((u * u).sum(1) + 1e-8)
    return (s.reshape(-1, *[1] * (uncond.ndim - 1)) * uncond).to(uncond.dtype)


@contextmanager
def guide(
    pipe: Any,
    guidances: Guidance | CFGZeroStar | InPass | Sequence[Guidance | CFGZeroStar | InPass],
    *,
    reuse_prefix: bool = True,
) -> Iterator[None]:
    """Guide a pipeline inside a ``with`` block, with classifier-free guidance or without; after it
    the pipeline computes what it did before, also when there was an error.

    The denoiser gives ``c + (w / slope) (c - p)`` for its conditional prediction ``c``, where the
    slope is what the pipeline multiplies ``c`` with; its own combination then makes it ``u + g (c -
    u) + w (c - p)``. The further pass has the conditional prompt, and computes only the blocks from
    the first perturbed one on.

    One thread or asyncio task at a time runs the denoiser meanwhile; another is refused.

    Args:
        pipe: a diffusers pipeline of a known family, or a denoiser of one, which is then guided
            without classifier-free guidance; with a plan or without. The perturbed pass runs the
            plan's patterns of the conditional one, unless the plan has its own.
        guidances: one or several, whose ``w (c - p)`` add up; with NAG, which is in all of them.
        reuse_prefix: False computes all blocks of the further pass. It does so anyway where a cache
            of steps is on, a control net adds to blocks, or the denoiser is compiled as a whole.

    Raises:
        ValueError: a guidance names what there is not, or is of another model; the pipeline is
            guided already by another ``guide``; on leaving, a guidance that has changed no call.
            Guidance of the pipeline's own that is not linear is warned about: the result is then
            approximate.
    """
    kinds = (Guidance, CFGZeroStar, InPass)
    every = list(guidances) if isinstance(guidances, Sequence) else [guidances]
    for one in every:
        if not isinstance(one, kinds):
            raise TypeError(
                f"guidances has {one!r}; it must be guidances of visattn.guidance, such as "
                "SoftPAG(heads) (edits such as Perturb go to visattn.steer)"
            )
    zero = next((one for one in every if isinstance(one, CFGZeroStar)), None)
    if sum(isinstance(one, CFGZeroStar) for one in every) > 1:
        raise ValueError("guidances has CFGZeroStar twice; give it once")
    perturbed = [one for one in every if isinstance(one, Guidance)]
    known = known_denoisers(pipe)
    for one in perturbed:
        one.fits({role: describe(model, family) for role, (model, family) in known.items()})
    alone = isinstance(pipe, torch.nn.Module)
    given: dict[str, Any] = {}
    with ExitStack() as stack:
        ones = [Perturbation(stack, pipe, one, reuse_prefix) for one in perturbed]
        if not ones:
            enter(stack, pipe, {})  # what knows the passes
        every_guided = []
        for role, (model, family) in known.items():
            target = pipe if alone else getattr(pipe, role)
            guided = _Guided(None if alone else pipe, role, model, family, ones, zero, given)
            every_guided.append(guided)
            if guided.works and any(_works(other) for other in handlers_of(target)):
                raise ValueError(
                    f"the {role} is guided already; give all guidances to one guide, as in "
                    "guide(pipe, [one, other])"
                )
            add_handler(target, guided)
            stack.callback(remove_handler, target, guided)
        if not alone:
            listener = _listener(pipe, given)
            add_handler(pipe, listener)
            stack.callback(remove_handler, pipe, listener)
        checks = [one.put(stack, pipe) for one in every if isinstance(one, InPass)]
        yield
        for check in (*(own.check for own in ones), *checks):
            check()
        if zero is not None and not any(guided.changed for guided in every_guided):
            raise ValueError(
                "CFGZeroStar has changed no prediction: the pipeline did not run, or without "
                "classifier-free guidance"
            )


def _listener(pipe: Any, given: dict[str, Any]) -> Any:
    """Notes the arguments of the pipeline's call."""
    told: set[str] = set()

    def listen(_: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        given.clear()
        given.update(call_arguments(pipe, args, kwargs))
        reason = not_linear(given)
        if reason is not None and reason not in told:
            told.add(reason)
            logger.warning("guidance is approximate: %s", reason)
        return inner(*args, **kwargs)

    return listen
