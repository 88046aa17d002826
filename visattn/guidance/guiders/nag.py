"""Normalized attention guidance: attention is moved away from that to a negative text."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from visattn._arguments import check_number, check_window
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import State
from visattn.guidance.edits.steer import Steering, check_touched, enter, place
from visattn.guidance.guiders.cfg_slope import call_arguments
from visattn.guidance.guiders.denoiser_io import part_of, sample_of, with_sample
from visattn.guidance.guiders.guidance import InPass, Window
from visattn.inject.apply import known_denoisers
from visattn.inject.attachment import Attachment, attached, cross_layers
from visattn.inject.hooks.class_swap import Next, add_handler, remove_handler
from visattn.inject.hooks.run_state import Context

__all__ = ["NAG", "CrossNAG", "JointNAG"]

CHUNK = 1 << 24  # numbers of a tensor that are there at a time
LIMITS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "scale": ("a finite number", math.isfinite),
    "tau": ("a number above 0", lambda tau: 0 < tau < math.inf),
    "alpha": ("a number from 0 to 1", lambda alpha: 0 <= alpha <= 1),
}
Pair = tuple[torch.Tensor, torch.Tensor]


@dataclass(frozen=True, kw_only=True, eq=False)
class NAG(Window, InPass):
    """``(1 - alpha) z+ + alpha c z~`` with ``z~ = s z+ - (s - 1) z-`` in place of ``z+`` in every
    attention to text: ``z+`` and ``z-`` are the attention of a token to the prompt and to a
    negative text, and ``c`` keeps the norm of ``z~``, over the heads and their dimensions, at no
    more than ``tau`` times that of ``z+`` (normalized attention guidance, Chen et al. 2025, arXiv
    2505.21179). It works without classifier-free guidance too, and so with models of few steps.

    Where a model has cross-attention to text, there is one more of these, and no further pass; that
    to an image, which Wan 2.1 has beside it, is left. Where text is part of the sequence, the
    negative text goes through the blocks beside the prompt, which doubles the guided pass: image
    tokens are the same for both texts, and the text tokens of each are its own. Pooled text
    embeddings are those of the prompt.

    Args:
        negative_prompt: one, or one for each prompt; the pipeline encodes it when it is called.
        negative_prompt_embeds: ``[1 or prompts, tokens, C]`` in place of it.
        scale: ``s``.
        tau: of the norm, above 0.
        alpha: from 0, which changes nothing and costs nothing, to 1.
        norm: ``l2`` (the authors' code for Flux) or ``l1`` (the paper's).
        formulation: ``official`` (the authors' code), or ``extrapolate`` for ``z~ = z+ + s (z+ -
            z-)``, whose scale is smaller by 1. The authors' scale, tau and alpha: 4, 2.5, 0.25 for
            Flux; 4, 2.5, 0.125 for SD3.5; 11, 2.5, 0.25 for Wan.
        passes: of ``cond`` and ``uncond``. The perturbed pass of another guidance is guided as the
            conditional one is; what is perturbed is so before, unless NAG was there first.
        start, stop: the steps, from ``start`` on and up to before ``stop``: an int is a step, a
            float a share of the steps.

    Source:
        Chen et al. (2025), "Normalized Attention Guidance", arXiv 2505.21179. Code:
        github.com/ChenDarYen/Normalized-Attention-Guidance (commit 69159ca).
    Default:
        code. Its processor for Flux; the paper has ``norm="l1"``.
    Differences:
        - Where attention is 0 the code gives NaN, this gives 0.
    """

    negative_prompt: str | Sequence[str] | None = field(default=None, kw_only=False)
    negative_prompt_embeds: torch.Tensor | None = None
    scale: float = 4.0
    tau: float = 2.5
    alpha: float = 0.25
    norm: Literal["l1", "l2"] = "l2"
    formulation: Literal["extrapolate", "official"] = "official"
    passes: tuple[str, ...] = ("cond",)

    def __post_init__(self) -> None:
        if (self.negative_prompt is None) == (self.negative_prompt_embeds is None):
            raise ValueError(
                "NAG has to be given either negative_prompt, a text, or negative_prompt_embeds"
            )
        embeds = self.negative_prompt_embeds
        if embeds is not None and (not isinstance(embeds, torch.Tensor) or embeds.ndim != 3):
            found = list(embeds.shape) if isinstance(embeds, torch.Tensor) else embeds
            raise ValueError(
                f"NAG(negative_prompt_embeds=...) is {found!r}; it must be a tensor [1 or prompts, "
                "tokens, channels]"
            )
        prompt = self.negative_prompt
        if prompt is not None and not isinstance(prompt, str):
            texts = list(prompt) if isinstance(prompt, Sequence) else []
            if not texts or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"NAG(negative_prompt={prompt!r}) must be a text, or one or more")
            object.__setattr__(self, "negative_prompt", texts)
        for name, (meant, fine) in LIMITS.items():
            check_number("NAG", name, getattr(self, name), meant, fine)
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"NAG(norm={self.norm!r}) must be l1 or l2")
        if self.formulation not in ("extrapolate", "official"):
            raise ValueError(
                f"NAG(formulation={self.formulation!r}) must be extrapolate or official"
            )
        passes = (self.passes,) if isinstance(self.passes, str) else tuple(self.passes)
        if not passes or not set(passes) <= {"cond", "uncond"}:
            raise ValueError(f"NAG(passes={self.passes!r}) must be of cond and uncond")
        object.__setattr__(self, "passes", passes)
        check_window("NAG", self.start, self.stop)

    @property
    def gain(self) -> float:
        """``s`` of ``z+ + s (z+ - z-)``."""
        return self.scale - (self.formulation == "official")

    @property
    def guided(self) -> tuple[str, ...]:
        """The passes that are guided, perturbed ones too."""
        return (*self.passes, "perturbed") if "cond" in self.passes else self.passes

    def away(self, plus: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
        """Attention away from that to the negative text, ``[b, H, L, D]`` like both."""
        out = torch.empty_like(plus)
        wide = torch.promote_types(plus.dtype, torch.float32)
        order = 1 if self.norm == "l1" else 2
        step = max(1, CHUNK // (plus.shape[0] * plus.shape[1] * plus.shape[3]))
        for first in range(0, plus.shape[2], step):
            rows = slice(first, first + step)
            own, other = plus[:, :, rows].to(wide), minus[:, :, rows].to(wide)
            moved = own + self.gain * (own - other)
            length, usual = (
                torch.linalg.vector_norm(x, order, dim=(1, 3), keepdim=True) for x in (moved, own)
            )
            clipped = torch.where(length > self.tau * usual, self.tau * usual / length, 1.0)
            out[:, :, rows] = torch.lerp(own, clipped * moved, self.alpha).to(out.dtype)
        return out

    def put(self, stack: ExitStack, pipe: Any) -> Callable[[], None]:
        if self.alpha == 0 or (self.gain == 0 and self.tau >= 1):
            return _nothing
        known = known_denoisers(pipe)
        alone = isinstance(pipe, torch.nn.Module)
        for _, family in known.values():
            if family.masks_text_padding:
                raise ValueError(
                    f"NAG doubles a call for a second text, and those of {family.name} have "
                    "lengths of their own, which it does not give; take negative_prompt with "
                    "true_cfg_scale above 1"
                )
        crossed = all(family.cross for _, family in known.values())
        models = {role: model for role, (model, _) in known.items()}
        text = _Text(self, pipe, models)
        window: dict[str, Any] = {}
        if crossed:
            for _, family in known.values():
                if family.name != "Wan":
                    raise ValueError(
                        f"NAG knows how Wan makes keys of a text, and not how {family.name} does; "
                        "it cannot guide its cross-attention"
                    )
            window = {"start": self.start, "stop": self.stop}
            window["passes"] = None if alone and "cond" in self.passes else self.guided
        edit = (CrossNAG if crossed else JointNAG)(nag=self, text=text, **window)
        steerings = enter(stack, pipe, place(pipe, [edit]), on=crossed)
        fronts: list[tuple[Any, Any]] = [(pipe, text)]
        if not crossed:
            for role, model in models.items():
                target = pipe if alone else getattr(pipe, role)
                fronts.insert(0, (target, _Doubled(self, text, model, steerings[role], alone)))
        for target, front in fronts:
            add_handler(target, front)
            stack.callback(remove_handler, target, front)
        return lambda: check_touched([edit], steerings.values())


def _nothing() -> None:
    """Of a guidance that changes nothing."""


class _Text:
    """The negative text of a pipeline that is called: what it is to the denoisers, and to their
    cross-attention, which is worked out once for a call of the pipeline."""

    def __init__(self, nag: NAG, pipe: Any, models: Mapping[str, torch.nn.Module]) -> None:
        self.nag, self.pipe, self.models = nag, pipe, models
        # kept, as caches may put other blocks in the place of those of a model that runs
        self.modules = {
            (role, path): module
            for role, (model, family) in known_denoisers(pipe).items()
            for path, module in cross_layers(model, family).items()
        }
        self.embeds = nag.negative_prompt_embeds
        self.hidden: dict[str, torch.Tensor] = {}
        self.kept: dict[tuple[str, str], Pair] = {}
        if nag.negative_prompt is not None and not hasattr(pipe, "encode_prompt"):
            raise ValueError(
                f"NAG(negative_prompt=...): {type(pipe).__name__} has nothing that encodes it; "
                "give negative_prompt_embeds"
            )

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.nag.negative_prompt is not None:
            given = call_arguments(self.pipe, args, kwargs)
            self.embeds = _encoded(self.pipe, self.nag.negative_prompt, given)
        try:
            return inner(*args, **kwargs)
        finally:
            self.hidden.clear()
            self.kept.clear()

    def of(self, role: str, like: torch.Tensor) -> torch.Tensor:
        """The embeddings ``[1 or prompts, tokens, C]`` on the device of a tensor, in the dtype of a
        denoiser."""
        if self.embeds is None:
            raise ValueError(
                "NAG(negative_prompt=...) is encoded when the pipeline is called, and here its "
                f"{role} is; call the pipeline, or give negative_prompt_embeds"
            )
        dtype = getattr(self.models[role], "dtype", like.dtype)
        return self.embeds.to(device=like.device, dtype=dtype)

    def pair(self, role: str, path: str, q: torch.Tensor) -> Pair:
        """Its keys and values in a cross-attention, ``[b, H, tokens, D]`` for ``b`` queries."""
        if (role, path) not in self.kept:
            model = self.models[role]
            if role not in self.hidden:
                self.hidden[role] = _hidden(model, self.of(role, q))
            self.kept[role, path] = _keys_and_values(self.modules[role, path], self.hidden[role])
        k, v = self.kept[role, path]
        return for_samples(k, q.shape[0]).to(q), for_samples(v, q.shape[0]).to(q)


def _encoded(pipe: Any, text: object, given: Mapping[str, Any]) -> torch.Tensor:
    """A text as a pipeline encodes it: ``[texts, tokens, C]``."""
    known = inspect.signature(pipe.encode_prompt).parameters
    options = {"prompt": text, "prompt_2": None, "prompt_3": None}
    options |= {"do_classifier_free_guidance": False}
    if given.get("max_sequence_length") is not None:
        options["max_sequence_length"] = given["max_sequence_length"]
    with torch.no_grad():
        found = pipe.encode_prompt(**{name: x for name, x in options.items() if name in known})
    out = found[0] if isinstance(found, tuple) else found
    assert isinstance(out, torch.Tensor)
    return out


def for_samples(x: torch.Tensor, samples: int) -> torch.Tensor:
    """What there is for each prompt, for each sample: a pipeline puts those of a prompt side by
    side.

    Raises:
        ValueError: there is not one for each prompt.
    """
    if x.shape[0] == 1:
        return x.expand(samples, *x.shape[1:])
    if samples % x.shape[0]:
        raise ValueError(
            f"NAG has {x.shape[0]} negative texts, and a pass has {samples} samples; give one, or "
            "one for each prompt"
        )
    return x.repeat_interleave(samples // x.shape[0], 0)


def _hidden(model: Any, embeds: torch.Tensor) -> torch.Tensor:
    """A text as the blocks of Wan are given it, which does not depend on the step."""
    out = model.condition_embedder.text_embedder(embeds)
    assert isinstance(out, torch.Tensor)
    return out


def _keys_and_values(module: Any, hidden: torch.Tensor) -> Pair:
    """Keys and values of a cross-attention of Wan, ``[b, H, tokens, D]``."""
    if getattr(module, "fused_projections", False):
        k, v = module.to_kv(hidden).chunk(2, -1)
    else:
        k, v = module.to_k(hidden), module.to_v(hidden)
    k, v = (x.unflatten(2, (module.heads, -1)).transpose(1, 2) for x in (module.norm_k(k), v))
    return k, v


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossNAG(Edit):
    """NAG at a cross-attention, which is asked for once more, with the negative text."""

    nag: NAG
    text: _Text
    attention: Literal["self", "cross"] = "cross"
    stage: ClassVar[str] = "lerp"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        call = state.call
        if call.masked:
            raise ValueError(
                f"NAG does not know the attention mask of its own text that {call.layer} would need"
            )
        k, v = self.text.pair(call.role, call.layer, state.q)
        minus, _ = call.kernel(state.part, state.q, k, v)
        state.out = self.nag.away(state.out, minus)


@dataclass(frozen=True, kw_only=True, eq=False)
class JointNAG(Edit):
    """NAG at a joint attention, whose samples are there twice: with the prompt, and with the
    negative text. Rows of grids are guided, and the same for both."""

    nag: NAG
    text: _Text
    stage: ClassVar[str] = "lerp"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        new = state.out.clone()
        for start, grid in state.call.layout.grids:
            rows = slice(start, start + grid.numel)
            plus, minus = state.out[:, :, rows].chunk(2)
            new[:, :, rows] = self.nag.away(plus, minus).repeat(2, 1, 1, 1)
        state.out = new


class _Doubled:
    """Calls of a denoiser, the guided passes of which are run with both texts."""

    def __init__(
        self, nag: NAG, text: _Text, model: torch.nn.Module, steering: Steering, alone: bool
    ) -> None:
        self.nag, self.text, self.model = nag, text, model
        self.steering, self.alone = steering, alone
        before = [entry.edit for entry in steering.entries if entry.steering is not steering]
        if any(isinstance(edit, JointNAG) for edit in before):
            raise ValueError("NAG is on this pipeline already, and goes there once")

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        own = attached(self.model)
        assert own is not None
        with own.turn.taken():
            return self._call(own, inner, args, kwargs)

    def _call(
        self, own: Attachment, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        arguments = {**dict(zip(own.names, args, strict=False)), **kwargs}
        own.note(arguments)
        batch = arguments["hidden_states"].shape[0]
        passes = own.passes(batch) or (("cond",) if self.alone else None)
        if passes is None:
            raise ValueError(
                "NAG cannot guide, as "
                + own.unknown("pass", "another pipeline of the family", "guide")
            )
        guided = [pass_ for pass_ in passes if pass_ in self.nag.guided]
        step, steps = own.step()
        if not guided or not self.nag.active(step, steps):
            return inner(*args, **kwargs)
        each, out = batch // len(passes), None
        found = {}
        # the conditional pass first, as others may be scaled by it
        for pass_ in sorted(passes, key=lambda name: name != "cond"):
            at = passes.index(pass_) * each
            rows = [*range(at, at + each)] * (2 if pass_ in guided else 1)
            mine = {name: part_of(name, x, batch, rows) for name, x in arguments.items()}
            with ExitStack() as stack:
                stack.enter_context(_within(own, pass_, step, steps, pass_ in guided))
                if pass_ in guided:
                    stack.enter_context(self._on())
                    text = for_samples(self.text.of(own.role, arguments["hidden_states"]), each)
                    _put_text(mine, text)
                out = inner(**mine)
            found[pass_] = sample_of(out)[:each]
        own.note(arguments)  # as after a call that was made whole
        return with_sample(out, torch.cat([found[pass_] for pass_ in passes]))

    @contextmanager
    def _on(self) -> Iterator[None]:
        before, self.steering.on = self.steering.on, True
        try:
            yield
        finally:
            self.steering.on = before


@contextmanager
def _within(
    own: Attachment, pass_: str, step: int | None, steps: int | None, doubled: bool
) -> Iterator[None]:
    """Inside, a denoiser runs a pass alone. Caches of steps keep it apart from whole batches."""
    before = own.context
    with ExitStack() as stack:
        kind: Any = type(own.model)
        if hasattr(kind, "cache_context"):
            name = f"{pass_} {'doubled' if doubled else 'alone'}"
            stack.enter_context(kind.cache_context(own.model, name))
        stack.callback(setattr, own, "context", before)
        own.context = Context(pass_, step, steps)
        yield


def _put_text(arguments: dict[str, Any], text: torch.Tensor) -> None:
    """Give the second half of a doubled batch a text of its own."""
    own = arguments["encoder_hidden_states"]
    if own.shape[1:] != text.shape[1:]:
        raise ValueError(
            f"the negative text of NAG has the shape {list(text.shape[1:])}, and the prompt "
            f"{list(own.shape[1:])}; encode both with the same max_sequence_length"
        )
    arguments["encoder_hidden_states"] = torch.cat([own[: len(text)], text.to(own.dtype)])
