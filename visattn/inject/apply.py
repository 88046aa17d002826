"""``apply_plan``, ``remove_plan`` and ``sparse``."""

from __future__ import annotations

import os
import weakref
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, cast

import torch

from visattn._arguments import check_count
from visattn.attention import Backend, choose_backend
from visattn.attention.choice import BACKENDS, check_kernels
from visattn.inject.attachment import Attachment, attached
from visattn.inject.editor import Editor
from visattn.inject.hooks.run_state import PipeRef
from visattn.inject.models.denoisers import (
    attention_layers,
    describe,
    is_denoiser,
    known_denoisers,
    models_of,
)
from visattn.inject.models.parallel import check_dispatch, check_whole
from visattn.inject.observation import Observer
from visattn.inject.planned import note_planned, planned
from visattn.patterns import HeadPattern
from visattn.pipelines.family import Family
from visattn.plan import Plan
from visattn.plan.read import as_plan

__all__ = [
    "apply_plan",
    "editing",
    "observe",
    "remove_plan",
    "sparse",
]


def apply_plan(
    pipe: Any,
    plan: Plan | HeadPattern | str | os.PathLike[str],
    *,
    backend: str = "auto",
    audit: int = 0,
    guard: bool | None = None,
) -> Plan:
    """Let a pipeline compute its attention as a plan says, from its next call on.

    Args:
        pipe: a diffusers pipeline, or a denoiser of one, which is then its ``transformer``;
            compiled or not, and wrapped or not by DistributedDataParallel,
            FullyShardedDataParallel, DeepSpeed or PEFT. Its model family must be one that visattn
            knows.
        plan: a Plan; a pattern, for all heads of all layers; the path or hub id of a plan;
            a pattern in written form; or ``"auto"``, the plan that lies beside the model's weights.
        backend: of ``sparse_attention``.
        audit: query rows of each sparse head whose exact attention is computed beside, at
            ``audit / tokens`` of its cost; ``summary`` then says what was missed. 0: none.
        guard: whether heads whose static pattern is predicted to take longer than dense attention
            run dense, which is said once; the first time on a device it is measured for about two
            seconds (``visattn.cost``). Only with ``backend="auto"``. Default: True, unless the
            environment has ``VISATTN_GUARD=0``.

    Returns:
        The plan. An earlier one is replaced. Dense layers, heads and steps run the attention
        backend that the pipeline has without a plan; ``remove_plan`` takes the plan off.
        Calls in several threads or asyncio tasks do not meet (inside ``guide`` and ``steer`` one of
        them runs at a time). A copy (``copy.deepcopy``) has a plan
        of its own; a pickle (``torch.save``, a process that is spawned) has none.

    Raises:
        TypeError, ValueError, OSError: no such plan, or it is for another model; the pipeline is
            then as it was. A plan that does not fit the grid of a generation raises ValueError in
            its first step.
        BackendUnavailable: an explicit backend cannot run here.
    """
    known = known_denoisers(pipe)
    own = as_plan(plan, _path_of(pipe))
    for rule in own.rules:
        if rule.role != "any" and rule.role not in known:
            raise ValueError(
                f"plan is for another model: it has a rule for {rule.role}, and "
                f"{type(pipe).__name__} has {', '.join(known)}"
            )
    made_for = set(own.denoisers) - set(known)
    if made_for:
        raise ValueError(
            f"plan is for another model: it is made for {', '.join(sorted(made_for))} too, and "
            f"{type(pipe).__name__} has {', '.join(known)}"
        )
    if audit:
        check_count("audit", audit, 1)
    chosen = _check_backend(backend, [model for model, _ in known.values()])
    check_kernels(backend, (head for rule in own.rules for head in rule.heads))
    new = []
    for role, (model, family) in known.items():
        check_dispatch(model, role)
        own.fits(role, describe(model, family), tuple(attention_layers(model, family)))
        new.append(
            _attachment(
                pipe,
                role,
                model,
                family,
                plan=own,
                backend=chosen,
                audit=audit,
                guard=guard,
            )
        )
    _exchange([attached(attachment.model) for attachment in new], new)
    if own.rules and not any(layer.table for attachment in new for layer in attachment.layers):
        new[0].tell("nothing sparse runs, as the plan keeps all heads of all layers dense")
    note_planned(pipe, {own.role: weakref.ref(own.model) for own in new})
    return own


def remove_plan(pipe: Any) -> None:
    """Take the plan off a pipeline or denoiser, which then computes what it did before, to the bit.
    Without a plan nothing happens."""
    for model in models_of(pipe).values():
        attachment = attached(model)
        if attachment is not None:
            attachment.remove()
            left = attachment.changed(plan=Plan(), backend="auto", audit=0, guard=None)
            if not left.idle:  # it is observed or edited
                left.install()
    note_planned(pipe, None)


@contextmanager
def sparse(
    pipe: Any,
    plan: Plan | HeadPattern | str | os.PathLike[str],
    *,
    backend: str = "auto",
    audit: int = 0,
    guard: bool | None = None,
) -> Iterator[Plan]:
    """A plan on a pipeline inside a ``with`` block; after it the pipeline has the plan that it had
    before, or none. Arguments and errors as ``apply_plan``."""
    before = {role: attached(model) for role, model in models_of(pipe).items()}
    noted = planned(pipe)
    own = apply_plan(pipe, plan, backend=backend, audit=audit, guard=guard)
    try:
        yield own
    finally:
        remove_plan(pipe)
        known = [attachment for attachment in before.values() if attachment is not None]
        _exchange([attached(attachment.model) for attachment in known], known)
        note_planned(pipe, noted)


@contextmanager
def observe(
    pipe: Any, observer: Observer, layers: Collection[str] | None = None
) -> Iterator[None]:
    """Show attention calls to a function inside a ``with`` block. What a pipeline computes is what
    it computes without, by its plan if it has one.

    Args:
        pipe: a diffusers pipeline, or a denoiser of one.
        observer: is called with an Observation before each call.
        layers: paths of attention modules; default: all that plans speak of.

    Raises:
        ValueError: the pipeline is of no known family, has no such layer, or is split over
            processes by ``enable_parallelism``, before or inside the block.
    """
    before, new = [], []
    known = known_denoisers(pipe)
    paths = {path for model, family in known.values() for path in attention_layers(model, family)}
    for path in layers or ():
        if path not in paths:
            raise ValueError(
                f"layers holds {path!r}; the attention layers are {', '.join(sorted(paths)[:3])}..."
            )
    for role, (model, family) in known.items():
        check_whole(model, role)
        present = attached(model)
        before.append(present)
        shown = frozenset(paths if layers is None else layers)
        observers = () if present is None else present.observers
        observers = (*observers, (observer, shown))
        new.append(_attachment(pipe, role, model, family, observers=observers))
    _exchange(before, new)
    try:
        yield
    finally:
        _exchange(new, before)


@contextmanager
def editing(pipe: Any, editors: Mapping[str, Editor]) -> Iterator[None]:
    """Let editors compute attention calls inside a ``with`` block.

    Args:
        pipe: a diffusers pipeline, or a denoiser of one.
        editors: by the role of the denoiser; each replaces that which the denoiser had, and is
            replaced by it again. The denoiser is part of this pipeline meanwhile, also where
            another one shares it and has a plan on it.
    """
    before: dict[str, tuple[Editor | None, PipeRef | None]] = {}
    try:
        for role, (model, family) in known_denoisers(pipe).items():
            if role in editors:
                check_whole(model, role)
                own = attached(model)
                before[role] = (None, None) if own is None else (own.editor, own.pipe)
                own = own or _attachment(pipe, role, model, family)
                if not is_denoiser(pipe):
                    own.pipe = PipeRef(pipe)
                own.edit(editors[role])
        yield
    finally:
        for role, (model, _) in known_denoisers(pipe).items():
            own = attached(model)
            if role in before and own is not None:
                editor, its = before[role]
                if its is not None and own.pipe() is pipe:
                    own.pipe = its
                own.edit(editor)


def _attachment(
    pipe: Any, role: str, model: torch.nn.Module, family: Family, **arguments: Any
) -> Attachment:
    """Return the attachment of a denoiser, as part of a pipeline, with some arguments changed. It
    is built once, and not installed."""
    whole = None if is_denoiser(pipe) else pipe
    present = attached(model)
    if present is not None:
        return present.changed(pipe=whole, **arguments)
    plan, backend = arguments.pop("plan", Plan()), arguments.pop("backend", "auto")
    return Attachment(model, role, family, plan, backend, whole, **arguments)


def _exchange(out: Sequence[Attachment | None], new: Sequence[Attachment | None]) -> None:
    for attachment in out:
        if attachment is not None:
            attachment.remove()
    for attachment in new:
        if attachment is not None:
            attachment.install()


def _path_of(pipe: Any) -> str | None:
    """The folder or hub id that a pipeline was loaded from."""
    config = getattr(pipe, "config", None)
    path = config.get("_name_or_path") if isinstance(config, Mapping) else None
    return path if isinstance(path, str) and path else None


def _check_backend(backend: str, models: Sequence[torch.nn.Module]) -> Backend:
    """The backend that a word names; refused where it cannot run on the devices there are. A model
    that is offloaded runs elsewhere than it lies."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    for model in models if backend == "triton" else ():
        parameter = next(model.parameters())
        if torch.cuda.is_available() and parameter.device.type != "cuda":
            continue  # it will be moved
        dtype = parameter.dtype if parameter.dtype.itemsize > 1 else torch.float32
        choose_backend(backend, torch.empty(1, 1, 1, 64, dtype=dtype, device=parameter.device))
    return cast("Backend", backend)
