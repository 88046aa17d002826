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
    """Apply a plan to a pipeline, which computes its attention by the plan from its next call on.

    The plan replaces an earlier one. ``remove_plan`` removes it. Dense layers, heads and steps run
    the attention backend that the pipeline has without a plan.

    Several threads or asyncio tasks can call the pipeline at the same time. Inside ``guide`` and
    ``steer`` only one of them can. A copy (``copy.deepcopy``) has its own plan. A pickle
    (``torch.save``, a spawned process) has none.

    Args:
        pipe: a diffusers pipeline, or a denoiser of one, which then has the role ``transformer``.
            The denoiser may be compiled, or wrapped by DistributedDataParallel,
            FullyShardedDataParallel, DeepSpeed or PEFT. visattn must know its model family.
        plan: a Plan; a pattern, for all heads of all layers; the path or hub id of a plan;
            a pattern in written form; or ``"auto"``, the plan file next to the model's weights.
        backend: the backend of ``sparse_attention``.
        audit: query rows of each sparse head for which exact attention is also computed, at
            ``audit / tokens`` of its cost; ``summary`` then shows what sparse attention missed.
            0 computes none.
        guard: whether heads run dense if their static pattern is predicted to take longer than
            dense attention. This is logged once. The first call on a device measures it for about
            two seconds (``visattn.cost``). Only with ``backend="auto"``. Default: True, unless the
            environment has ``VISATTN_GUARD=0``.

    Returns:
        The plan.

    Raises:
        TypeError: ``plan`` has another type.
        ValueError: the plan cannot be read or is for another model; the pipeline is then
            unchanged. If a plan does not fit the grid of a generation, its first step raises this.
        OSError: the file of the plan cannot be read.
        BackendUnavailable: an explicit backend cannot run on this machine.

    Example:
        >>> from visattn import apply_plan, remove_plan, summary
        >>> from visattn.patterns import Diagonal
        >>> plan = apply_plan(pipe, Diagonal(3))
        >>> len(summary(pipe).layers)
        3
        >>> remove_plan(pipe)
    """
    known = known_denoisers(pipe)
    read_plan = as_plan(plan, _path_of(pipe))
    for rule in read_plan.rules:
        if rule.role != "any" and rule.role not in known:
            raise ValueError(
                f"plan is for another model: it has a rule for {rule.role}, and "
                f"{type(pipe).__name__} has {', '.join(known)}"
            )
    missing_roles = set(read_plan.denoisers) - set(known)
    if missing_roles:
        raise ValueError(
            f"plan is for another model: it is made for {', '.join(sorted(missing_roles))} too, "
            f"and {type(pipe).__name__} has {', '.join(known)}"
        )
    if audit:
        check_count("audit", audit, 1)
    checked_backend = _check_backend(backend, [model for model, _ in known.values()])
    check_kernels(backend, (head for rule in read_plan.rules for head in rule.heads))
    attachments = []
    for role, (model, family) in known.items():
        check_dispatch(model, role)
        read_plan.fits(role, describe(model, family), tuple(attention_layers(model, family)))
        attachments.append(
            _attachment(
                pipe,
                role,
                model,
                family,
                plan=read_plan,
                backend=checked_backend,
                audit=audit,
                guard=guard,
            )
        )
    _exchange([attached(attachment.model) for attachment in attachments], attachments)
    if read_plan.rules and not any(layer.table for one in attachments for layer in one.layers):
        attachments[0].tell("nothing sparse runs, as the plan keeps all heads of all layers dense")
    models = {attachment.role: weakref.ref(attachment.model) for attachment in attachments}
    note_planned(pipe, models)
    return read_plan


def remove_plan(pipe: Any) -> None:
    """Remove the plan of a pipeline; its results are then bit-identical to those before the plan.

    A pipeline without a plan stays as it is.

    Args:
        pipe: a diffusers pipeline, or a denoiser of one.

    Example:
        >>> from visattn import apply_plan, remove_plan, summary
        >>> plan = apply_plan(pipe, "diagonal(3)")
        >>> remove_plan(pipe)
        >>> print(summary(pipe))
        no layer has a plan: all attention is dense
    """
    for model in models_of(pipe).values():
        attachment = attached(model)
        if attachment is not None:
            attachment.remove()
            without_plan = attachment.changed(plan=Plan(), backend="auto", audit=0, guard=None)
            if not without_plan.idle:  # it is observed or edited
                without_plan.install()
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
    """Apply a plan to a pipeline inside a ``with`` block.

    After the block the pipeline has its earlier plan again, or none.

    Args:
        pipe: as in ``apply_plan``.
        plan: as in ``apply_plan``.
        backend: as in ``apply_plan``.
        audit: as in ``apply_plan``.
        guard: as in ``apply_plan``.

    Yields:
        The plan.

    Raises:
        TypeError: as ``apply_plan``.
        ValueError: as ``apply_plan``.
        OSError: as ``apply_plan``.
        BackendUnavailable: as ``apply_plan``.

    Example:
        >>> from visattn import sparse, summary
        >>> from visattn.patterns import Diagonal
        >>> with sparse(pipe, Diagonal(3)):
        ...     video = pipe("a cat", height=32, width=32, num_frames=5, num_inference_steps=1)
        ...     print(summary(pipe).layers[0].sparse_calls > 0)
        True
        >>> summary(pipe).layers
        ()
    """
    before = {role: attached(model) for role, model in models_of(pipe).items()}
    planned_before = planned(pipe)
    applied = apply_plan(pipe, plan, backend=backend, audit=audit, guard=guard)
    try:
        yield applied
    finally:
        remove_plan(pipe)
        known = [attachment for attachment in before.values() if attachment is not None]
        _exchange([attached(attachment.model) for attachment in known], known)
        note_planned(pipe, planned_before)


@contextmanager
def observe(
    pipe: Any, observer: Observer, layers: Collection[str] | None = None
) -> Iterator[None]:
    """Pass attention calls to a function inside a ``with`` block.

    This changes no result of the pipeline, with or without a plan.

    Args:
        pipe: a diffusers pipeline, or a denoiser of one.
        observer: called with an Observation before each attention call.
        layers: paths of attention modules. None means all that a plan can name.

    Raises:
        ValueError: visattn does not know the model family of the pipeline; it has no such layer;
            or ``enable_parallelism`` splits it over processes, before or inside the block.

    Example:
        >>> from visattn.inject import observe
        >>> passes = []
        >>> with observe(pipe, lambda call: passes.append(call.passes), ["blocks.0.attn1"]):
        ...     video = pipe("a cat", height=32, width=32, num_frames=5, num_inference_steps=1)
        >>> passes
        [('cond',), ('uncond',)]
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
        editors: by the role of the denoiser. Each replaces an earlier editor of the denoiser, which
            is restored after the block. Inside the block the denoiser belongs to this pipeline,
            even if another pipeline shares it and has a plan.
    """
    before: dict[str, tuple[Editor | None, PipeRef | None]] = {}
    try:
        for role, (model, family) in known_denoisers(pipe).items():
            if role in editors:
                check_whole(model, role)
                present = attached(model)
                before[role] = (
                    (None, None) if present is None else (present.editor, present.pipe)
                )
                attachment = present or _attachment(pipe, role, model, family)
                if not is_denoiser(pipe):
                    attachment.pipe = PipeRef(pipe)
                attachment.edit(editors[role])
        yield
    finally:
        for role, (model, _) in known_denoisers(pipe).items():
            present = attached(model)
            if role in before and present is not None:
                editor, earlier_pipe = before[role]
                if earlier_pipe is not None and present.pipe() is pipe:
                    present.pipe = earlier_pipe
                present.edit(editor)


def _attachment(
    pipe: Any, role: str, model: torch.nn.Module, family: Family, **arguments: Any
) -> Attachment:
    """Return a new attachment of a denoiser as part of a pipeline, with some arguments changed. It
    is not installed."""
    pipeline = None if is_denoiser(pipe) else pipe
    present = attached(model)
    if present is not None:
        return present.changed(pipe=pipeline, **arguments)
    plan, backend = arguments.pop("plan", Plan()), arguments.pop("backend", "auto")
    return Attachment(model, role, family, plan, backend, pipeline, **arguments)


def _exchange(old: Sequence[Attachment | None], new: Sequence[Attachment | None]) -> None:
    """Remove the old attachments and install the new ones."""
    for attachment in old:
        if attachment is not None:
            attachment.remove()
    for attachment in new:
        if attachment is not None:
            attachment.install()


def _path_of(pipe: Any) -> str | None:
    """Return the folder or hub id that a pipeline was loaded from."""
    config = getattr(pipe, "config", None)
    path = config.get("_name_or_path") if isinstance(config, Mapping) else None
    return path if isinstance(path, str) and path else None


def _check_backend(backend: str, models: Sequence[torch.nn.Module]) -> Backend:
    """Return a backend by its name. Raise an error if it cannot run on the devices of the models;
    an offloaded model runs on another device than the one that holds its weights."""
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} must be one of {', '.join(BACKENDS)}")
    for model in models if backend == "triton" else ():
        parameter = next(model.parameters())
        if torch.cuda.is_available() and parameter.device.type != "cuda":
            continue  # the model is moved to the GPU later
        dtype = parameter.dtype if parameter.dtype.itemsize > 1 else torch.float32
        choose_backend(backend, torch.empty(1, 1, 1, 64, dtype=dtype, device=parameter.device))
    return cast("Backend", backend)
