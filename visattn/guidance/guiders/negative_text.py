"""The negative text of NAG: its embeddings, and its keys and values in cross-attention."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from visattn.guidance.guiders.cfg_slope import call_arguments
from visattn.inject.hooks.class_swap import Next
from visattn.inject.models.denoisers import cross_layers, known_denoisers

__all__ = ["NegativeText", "for_samples"]

KeysAndValues = tuple[torch.Tensor, torch.Tensor]


class NegativeText:
    """The negative text of a pipeline: its embeddings, and its keys and values in each
    cross-attention, which are computed once for each call of the pipeline.

    It handles the pipeline's calls, and encodes the text at the start of each.

    Args:
        pipe: the pipeline, or a denoiser.
        models: the denoisers by role.
        prompt: the text or texts, or None.
        embeds: embeddings ``[1 or prompts, tokens, C]``, or None.

    Raises:
        ValueError: ``prompt`` is a text, and ``pipe`` cannot encode it.
    """

    def __init__(
        self,
        pipe: Any,
        models: Mapping[str, torch.nn.Module],
        prompt: str | Sequence[str] | None,
        embeds: torch.Tensor | None,
    ) -> None:
        self.pipe, self.models, self.prompt, self.embeds = pipe, models, prompt, embeds
        # looked up once, because caches may replace the blocks of a running model
        self.modules = {
            (role, path): module
            for role, (model, family) in known_denoisers(pipe).items()
            for path, module in cross_layers(model, family).items()
        }
        self.hidden: dict[str, torch.Tensor] = {}
        self.computed: dict[tuple[str, str], KeysAndValues] = {}
        if prompt is not None and not hasattr(pipe, "encode_prompt"):
            raise ValueError(
                f"NAG(negative_prompt=...): {type(pipe).__name__} has no encode_prompt; give "
                "negative_prompt_embeds"
            )

    def __call__(self, _: Any, inner: Next, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.prompt is not None:
            self.embeds = _encoded(self.pipe, self.prompt, call_arguments(self.pipe, args, kwargs))
        try:
            return inner(*args, **kwargs)
        finally:
            self.hidden.clear()
            self.computed.clear()

    def embeddings(self, role: str, like: torch.Tensor) -> torch.Tensor:
        """Return the embeddings ``[1 or prompts, tokens, C]`` in the dtype of a denoiser.

        Args:
            role: of the denoiser.
            like: a tensor on the device.

        Raises:
            ValueError: the text is not encoded yet.
        """
        if self.embeds is None:
            raise ValueError(
                "NAG(negative_prompt=...) is encoded when the pipeline is called, but only its "
                f"{role} was called; call the pipeline, or give negative_prompt_embeds"
            )
        dtype = getattr(self.models[role], "dtype", like.dtype)
        return self.embeds.to(device=like.device, dtype=dtype)

    def keys_and_values(self, role: str, path: str, q: torch.Tensor) -> KeysAndValues:
        """Return keys and values of the text in a cross-attention, each ``[b, H, tokens, D]``.

        Args:
            role: of the denoiser.
            path: of the cross-attention.
            q: the queries ``[b, H, L, D]``.
        """
        if (role, path) not in self.computed:
            if role not in self.hidden:
                self.hidden[role] = _hidden(self.models[role], self.embeddings(role, q))
            module = self.modules[role, path]
            self.computed[role, path] = _keys_and_values(module, self.hidden[role])
        k, v = self.computed[role, path]
        return for_samples(k, q.shape[0]).to(q), for_samples(v, q.shape[0]).to(q)


def _encoded(pipe: Any, text: object, call: Mapping[str, Any]) -> torch.Tensor:
    """Return the embeddings of a text, ``[texts, tokens, C]``, as the pipeline encodes it with the
    arguments of its call."""
    known = inspect.signature(pipe.encode_prompt).parameters
    options = {"prompt": text, "prompt_2": None, "prompt_3": None}
    options |= {"do_classifier_free_guidance": False}
    if call.get("max_sequence_length") is not None:
        options["max_sequence_length"] = call["max_sequence_length"]
    with torch.no_grad():
        encoded = pipe.encode_prompt(**{name: x for name, x in options.items() if name in known})
    out = encoded[0] if isinstance(encoded, tuple) else encoded
    assert isinstance(out, torch.Tensor)
    return out


def for_samples(x: torch.Tensor, samples: int) -> torch.Tensor:
    """Repeat the rows of each prompt for each of its samples, which are consecutive in the batch.

    Args:
        x: ``[1 or prompts, ...]``.
        samples: number of samples in a pass.

    Returns:
        ``[samples, ...]``.

    Raises:
        ValueError: ``samples`` is no multiple of the rows of ``x``.
    """
    if x.shape[0] == 1:
        return x.expand(samples, *x.shape[1:])
    if samples % x.shape[0]:
        raise ValueError(
            f"NAG has {x.shape[0]} negative texts, and a pass has {samples} samples; give one "
            "text, or one for each prompt"
        )
    return x.repeat_interleave(samples // x.shape[0], 0)


def _hidden(model: Any, embeds: torch.Tensor) -> torch.Tensor:
    """Return a text as an input of the blocks of Wan. It does not depend on the step."""
    out = model.condition_embedder.text_embedder(embeds)
    assert isinstance(out, torch.Tensor)
    return out


def _keys_and_values(module: Any, hidden: torch.Tensor) -> KeysAndValues:
    """Return keys and values of a cross-attention of Wan, ``[b, H, tokens, D]``."""
    if getattr(module, "fused_projections", False):
        k, v = module.to_kv(hidden).chunk(2, -1)
    else:
        k, v = module.to_k(hidden), module.to_v(hidden)
    k, v = (x.unflatten(2, (module.heads, -1)).transpose(1, 2) for x in (module.norm_k(k), v))
    return k, v
