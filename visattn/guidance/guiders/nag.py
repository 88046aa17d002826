"""Normalized attention guidance: attention is moved away from the attention to a negative text."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch

from visattn._arguments import check_number, check_window
from visattn.guidance.edits.edit import Edit
from visattn.guidance.edits.state import State
from visattn.guidance.edits.steer import Steering, check_touched, enter, place
from visattn.guidance.guiders.denoiser_io import part_of, sample_of, with_sample
from visattn.guidance.guiders.guidance import InPass, Window
from visattn.guidance.guiders.negative_text import NegativeText, for_samples
from visattn.inject.attachment import Attachment, attached
from visattn.inject.hooks.class_swap import Next, add_handler, remove_handler
from visattn.inject.hooks.run_state import Context
from visattn.inject.models.denoisers import known_denoisers

__all__ = ["NAG", "CrossNAG", "JointNAG"]

CHUNK = 1 << 24  # elements that are computed at once, to limit memory
LIMITS: dict[str, tuple[str, Callable[[float], bool]]] = {
    "scale": ("a finite number", math.isfinite),
    "tau": ("a number above 0", lambda tau: 0 < tau < math.inf),
    "alpha": ("a number from 0 to 1", lambda alpha: 0 <= alpha <= 1),
}


@dataclass(frozen=True, kw_only=True, eq=False)
class NAG(Window, InPass):
    """Normalized attention guidance: every attention to text is moved away from the attention to a
    negative text (Chen et al. 2025, arXiv 2505.21179). It needs no classifier-free guidance, so it
    also works with distilled models of few steps.

    ``z+`` is the attention output of a token with the prompt, ``z-`` with the negative text. ``z+``
    becomes ``(1 - alpha) z+ + alpha c z~`` with ``z~ = s z+ - (s - 1) z-``. The factor ``c`` limits
    the norm of ``z~`` over all heads and channels to ``tau`` times the norm of ``z+``.

    A model with cross-attention to text computes one more cross-attention in each block and needs
    no further pass. The cross-attention to an image in Wan 2.1 does not change. If text is part of
    the sequence, the blocks run twice in a guided pass, with the prompt and with the negative text.
    Both share the image tokens. Pooled text embeddings are those of the prompt.

    Args:
        negative_prompt: one text, or one for each prompt; encoded when the pipeline is called.
        negative_prompt_embeds: embeddings ``[1 or prompts, tokens, C]`` instead of a text.
        scale: ``s``. The authors use these values of scale, tau and alpha: 4, 2.5, 0.25 for Flux;
            4, 2.5, 0.125 for SD3.5; 11, 2.5, 0.25 for Wan.
        tau: the limit of the norm, above 0.
        alpha: from 0 to 1; with 0 nothing changes and nothing is computed.
        norm: ``l2`` (the authors' code for Flux) or ``l1`` (the paper).
        formulation: ``official`` (the authors' code), or ``extrapolate``, which is ``z~ = z+ + s
            (z+ - z-)``; its scale is smaller by 1.
        passes: ``cond``, ``uncond`` or both. The perturbed pass of another guidance is guided like
            the conditional one. Other edits apply before NAG, unless NAG was added first.
        start: the first step, as an int, or as a share of the steps.
        stop: the end of the steps, likewise.

    Raises:
        TypeError: ``negative_prompt`` is no text.
        ValueError: an argument is out of range, or not exactly one of negative_prompt and
            negative_prompt_embeds is given.

    Example:
        >>> from visattn.guidance import NAG, guide
        >>> with guide(pipe, NAG("blurry, distorted", scale=11.0)):
        ...     video = pipe("a cat", height=16, width=16, num_frames=5, num_inference_steps=1)

    Source:
        Chen et al. (2025), "Normalized Attention Guidance", arXiv 2505.21179. Code:
        github.com/ChenDarYen/Normalized-Attention-Guidance (commit 69159ca).
    Default:
        code. Its processor for Flux; the paper has ``norm="l1"``.
    Differences:
        - Where attention is 0 the code returns NaN; this returns 0.
    """

    negative_prompt: str | Sequence[str] | None = field(default=None, kw_only=False)
    negative_prompt_embeds: torch.Tensor | None = None
    scale: float = 4.0
    tau: float = 2.5
    alpha: float = 0.25
    norm: Literal["l1", "l2"] = "l2"
    formulation: Literal["extrapolate", "official"] = "official"
    passes: tuple[str, ...] = ("cond",)
    example: ClassVar[str] = (
        "NAG(negative_prompt='blurry, distorted', scale=11.0, tau=2.5, alpha=0.25)"
    )

    def __post_init__(self) -> None:
        if (self.negative_prompt is None) == (self.negative_prompt_embeds is None):
            raise ValueError(
                "NAG needs either negative_prompt, a text, or negative_prompt_embeds, not both"
            )
        embeds = self.negative_prompt_embeds
        if embeds is not None and (not isinstance(embeds, torch.Tensor) or embeds.ndim != 3):
            value = list(embeds.shape) if isinstance(embeds, torch.Tensor) else embeds
            raise ValueError(
                f"NAG(negative_prompt_embeds=...) is {value!r}; it must be a tensor [1 or prompts, "
                "tokens, channels]"
            )
        prompt = self.negative_prompt
        if prompt is not None and not isinstance(prompt, str):
            texts = list(prompt) if isinstance(prompt, Sequence) else []
            if not texts or not all(isinstance(text, str) for text in texts):
                raise TypeError(f"NAG(negative_prompt={prompt!r}) must be one or several texts")
            object.__setattr__(self, "negative_prompt", texts)
        for name, (allowed, is_allowed) in LIMITS.items():
            check_number("NAG", name, getattr(self, name), allowed, is_allowed)
        if self.norm not in ("l1", "l2"):
            raise ValueError(f"NAG(norm={self.norm!r}) must be l1 or l2")
        if self.formulation not in ("extrapolate", "official"):
            raise ValueError(
                f"NAG(formulation={self.formulation!r}) must be extrapolate or official"
            )
        passes = (self.passes,) if isinstance(self.passes, str) else tuple(self.passes)
        if not passes or not set(passes) <= {"cond", "uncond"}:
            raise ValueError(f"NAG(passes={self.passes!r}) must be cond, uncond or both")
        object.__setattr__(self, "passes", passes)
        check_window("NAG", self.start, self.stop)

    @property
    def gain(self) -> float:
        """``s`` of ``z+ + s (z+ - z-)``."""
        return self.scale - (self.formulation == "official")

    @property
    def guided(self) -> tuple[str, ...]:
        """The guided passes, with the perturbed one."""
        return (*self.passes, "perturbed") if "cond" in self.passes else self.passes

    def away(self, plus: torch.Tensor, minus: torch.Tensor) -> torch.Tensor:
        """Return the guided attention output.

        Args:
            plus: attention output with the prompt, ``[b, H, L, D]``.
            minus: attention output with the negative text, ``[b, H, L, D]``.
        """
        out = torch.empty_like(plus)
        acc_dtype = torch.promote_types(plus.dtype, torch.float32)
        order = 1 if self.norm == "l1" else 2
        step = max(1, CHUNK // (plus.shape[0] * plus.shape[1] * plus.shape[3]))
        for first in range(0, plus.shape[2], step):
            rows = slice(first, first + step)
            positive, negative = plus[:, :, rows].to(acc_dtype), minus[:, :, rows].to(acc_dtype)
            moved = positive + self.gain * (positive - negative)
            norm, norm_before = (
                torch.linalg.vector_norm(x, order, dim=(1, 3), keepdim=True)
                for x in (moved, positive)
            )
            max_norm = self.tau * norm_before
            factor = torch.where(norm > max_norm, max_norm / norm, 1.0)
            out[:, :, rows] = torch.lerp(positive, factor * moved, self.alpha).to(out.dtype)
        return out

    def put(self, stack: ExitStack, pipe: Any) -> Callable[[], None]:
        if self.alpha == 0 or (self.gain == 0 and self.tau >= 1):
            return _nothing
        known = known_denoisers(pipe)
        is_denoiser = isinstance(pipe, torch.nn.Module)
        for _, family in known.values():
            if family.masks_text_padding:
                raise ValueError(
                    f"NAG cannot guide {family.name}, which also needs the length of the second "
                    "text; use negative_prompt with true_cfg_scale above 1"
                )
        has_cross = all(family.cross for _, family in known.values())
        models = {role: model for role, (model, _) in known.items()}
        text = NegativeText(pipe, models, self.negative_prompt, self.negative_prompt_embeds)
        window: dict[str, Any] = {}
        if has_cross:
            for _, family in known.values():
                if family.name != "Wan":
                    raise ValueError(
                        f"NAG cannot guide the cross-attention of {family.name}: of the families "
                        "with cross-attention it supports Wan"
                    )
            window = {"start": self.start, "stop": self.stop}
            window["passes"] = None if is_denoiser and "cond" in self.passes else self.guided
        edit = (CrossNAG if has_cross else JointNAG)(nag=self, text=text, **window)
        steerings = enter(stack, pipe, place(pipe, [edit]), on=has_cross)
        handlers: list[tuple[Any, Any]] = [(pipe, text)]
        if not has_cross:
            for role, model in models.items():
                target = pipe if is_denoiser else getattr(pipe, role)
                handler = _Doubled(self, text, model, steerings[role], is_denoiser)
                handlers.insert(0, (target, handler))
        for target, handler in handlers:
            add_handler(target, handler)
            stack.callback(remove_handler, target, handler)
        return lambda: check_touched([edit], steerings.values())


def _nothing() -> None:
    """Check nothing, for a guidance that changes nothing."""


@dataclass(frozen=True, kw_only=True, eq=False)
class CrossNAG(Edit):
    """NAG at a cross-attention. The cross-attention is computed again with the negative text."""

    nag: NAG
    text: NegativeText
    attention: Literal["self", "cross"] = "cross"
    stage: ClassVar[str] = "lerp"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        call = state.call
        if call.masked:
            raise ValueError(
                f"NAG cannot make the attention mask of the negative text, which {call.layer} needs"
            )
        k, v = self.text.keys_and_values(call.role, call.layer, state.q)
        minus, _ = call.kernel(state.part, state.q, k, v)
        state.out = self.nag.away(state.out, minus)


@dataclass(frozen=True, kw_only=True, eq=False)
class JointNAG(Edit):
    """NAG at a joint attention whose batch is doubled: the first half has the prompt, the second
    has the negative text. The rows of grids get the guided output in both halves."""

    nag: NAG
    text: NegativeText
    stage: ClassVar[str] = "lerp"

    def apply(self, state: State, strength: torch.Tensor) -> None:
        out = state.out.clone()
        for start, grid in state.call.layout.grids:
            rows = slice(start, start + grid.numel)
            plus, minus = state.out[:, :, rows].chunk(2)
            out[:, :, rows] = self.nag.away(plus, minus).repeat(2, 1, 1, 1)
        state.out = out


class _Doubled:
    """Handles the calls of a denoiser: runs guided passes with both texts.

    Args:
        nag: the guidance.
        text: the negative text.
        model: the denoiser.
        steering: has the edit of NAG, and is switched on in guided passes.
        is_alone: whether the denoiser is used without a pipeline.
    """

    def __init__(
        self,
        nag: NAG,
        text: NegativeText,
        model: torch.nn.Module,
        steering: Steering,
        is_alone: bool,
    ) -> None:
        self.nag, self.text, self.model = nag, text, model
        self.steering, self.is_alone = steering, is_alone
        before = [entry.edit for entry in steering.entries if entry.steering is not steering]
        if any(isinstance(edit, JointNAG) for edit in before):
            raise ValueError("NAG guides this pipeline already; add it only once")

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        attachment = attached(self.model)
        assert attachment is not None
        with attachment.turn.taken():
            return self._call(attachment, inner, args, kwargs)

    def _call(
        self, attachment: Attachment, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        arguments = {**dict(zip(attachment.names, args, strict=False)), **kwargs}
        attachment.note(arguments)
        batch = arguments["hidden_states"].shape[0]
        passes = attachment.passes(batch) or (("cond",) if self.is_alone else None)
        if passes is None:
            raise ValueError(
                "NAG cannot guide, as "
                + attachment.unknown("pass", "another pipeline of the family", "guide")
            )
        guided = [pass_ for pass_ in passes if pass_ in self.nag.guided]
        step, steps = attachment.step()
        if not guided or not self.nag.active(step, steps):
            return inner(*args, **kwargs)
        num_samples, output = batch // len(passes), None
        predictions = {}
        # the conditional pass is first, because CFG-Zero* scales others by its prediction
        for pass_ in sorted(passes, key=lambda name: name != "cond"):
            first = passes.index(pass_) * num_samples
            rows = [*range(first, first + num_samples)] * (2 if pass_ in guided else 1)
            inputs = {name: part_of(name, x, batch, rows) for name, x in arguments.items()}
            with ExitStack() as stack:
                stack.enter_context(_within(attachment, pass_, step, steps, pass_ in guided))
                if pass_ in guided:
                    stack.enter_context(self._on())
                    embeddings = self.text.embeddings(attachment.role, arguments["hidden_states"])
                    _put_text(inputs, for_samples(embeddings, num_samples))
                output = inner(**inputs)
            predictions[pass_] = sample_of(output)[:num_samples]
        attachment.note(arguments)  # as after a call with all passes
        return with_sample(output, torch.cat([predictions[pass_] for pass_ in passes]))

    @contextmanager
    def _on(self) -> Iterator[None]:
        before, self.steering.on = self.steering.on, True
        try:
            yield
        finally:
            self.steering.on = before


@contextmanager
def _within(
    attachment: Attachment, pass_: str, step: int | None, steps: int | None, doubled: bool
) -> Iterator[None]:
    """Set the pass and step of a denoiser's calls. A cache of steps gets a separate state for the
    pass, as it has other rows than whole batches."""
    before = attachment.context
    with ExitStack() as stack:
        model_class: Any = type(attachment.model)
        if hasattr(model_class, "cache_context"):
            name = f"{pass_} {'doubled' if doubled else 'alone'}"
            stack.enter_context(model_class.cache_context(attachment.model, name))
        stack.callback(setattr, attachment, "context", before)
        attachment.context = Context(pass_, step, steps)
        yield


def _put_text(arguments: dict[str, Any], text: torch.Tensor) -> None:
    """Replace the text in the second half of a doubled batch."""
    prompt = arguments["encoder_hidden_states"]
    if prompt.shape[1:] != text.shape[1:]:
        raise ValueError(
            f"the negative text of NAG has the shape {list(text.shape[1:])}, and the prompt has "
            f"{list(prompt.shape[1:])}; encode both with the same max_sequence_length"
        )
    arguments["encoder_hidden_states"] = torch.cat([prompt[: len(text)], text.to(prompt.dtype)])
