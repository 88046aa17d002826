"""Perturbed attention by its definition, in float64 with the whole map, and the loop of a pipeline
with guidance written out."""

from contextlib import contextmanager

import torch
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode


def attention_map(q, k, factor=None, seen=None):
    """``softmax(q k^T)``, float64 ``[B, H, L, L]``; seen: the keys that are, or None."""
    factor = q.shape[-1] ** -0.5 if factor is None else factor
    logits = q.double() @ k.double().mT * factor
    return (logits if seen is None else logits.masked_fill(~seen, -torch.inf)).softmax(-1)


def target_map(q, k, layout, policy="all", target="value", seen=None):
    """The map that attention is moved towards, and which rows are moved, bool ``[L]``."""
    start, grid = layout.grids[0]
    index = torch.arange(layout.length)
    image = (index >= start) & (index < start + grid.numel)
    text = torch.zeros(layout.length, dtype=torch.bool)
    for first, length in layout.texts:
        text[first : first + length] = True
    rows = torch.ones_like(image) if policy == "all" else image
    own, eye = attention_map(q, k, seen=seen), torch.eye(layout.length, dtype=torch.float64)
    if policy == "ii_identity":
        logits = q.double() @ k.double().mT * q.shape[-1] ** -0.5
        moved = logits.masked_fill(~(text | eye.bool()), -torch.inf).softmax(-1)
    elif policy == "ii_renorm":
        kept = own * text
        moved = kept + eye * (1 - kept.sum(-1, keepdim=True))
    elif target == "uniform":
        moved = torch.full_like(own, 1 / layout.length)
    elif target == "mean_query":
        mean = q.double()[:, :, rows].mean(2, keepdim=True)
        moved = attention_map(mean, k).expand_as(own)
    else:
        moved = eye.expand_as(own)
    return own, moved, rows


def perturbed_attention(q, k, v, layout, strengths, policy="all", target="value", seen=None):
    """``((1 - u) A + u T) v``, float64 ``[B, H, L, D]``; strengths ``u``: ``[H]``."""
    own, moved, rows = target_map(q, k, layout, policy, target, seen)
    u = strengths.double()[None, :, None, None] * rows[:, None]
    return ((1 - u) * own + u * moved) @ v.double()


class Perturbed(TorchFunctionMode):
    """torch's attention is the perturbed one."""

    def __init__(self, layout, strengths, **kind):
        super().__init__()
        self.given = layout, strengths, kind

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = [*args, *((kwargs or {}).get(n) for n in ("query", "key", "value")[len(args) :])]
        layout, strengths, kind = self.given
        seen = (kwargs or {}).get("attn_mask")
        return perturbed_attention(q, k, v, layout, strengths, **kind, seen=seen).to(q.dtype)


@contextmanager
def perturbing(model, layout, strengths, **kind):
    """Inside, the attention of some layers of a denoiser is perturbed; strengths: by path."""
    handles = []
    for path, own in strengths.items():
        module, mode = model.get_submodule(path), Perturbed(layout, own, **kind)
        handles += [
            module.register_forward_pre_hook(lambda *_, mode=mode: mode.__enter__() and None),
            module.register_forward_hook(lambda *_, mode=mode: mode.__exit__(None, None, None)),
        ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class Written:
    """A pipeline's loop written out: at every step the untouched denoiser is called for ``c``,
    ``u`` and ``p``, and the scheduler gets what ``combine`` makes of them, whatever the pipeline
    would have given it.

    Args:
        pipe: an untouched pipeline; batched: whether its uncond and cond pass are one call.
        perturb: gives the context in which the denoiser is perturbed.
        combine: ``(c, u, p, call) -> prediction``, where ``u`` is None without guidance and
            ``call`` has the denoiser's arguments, its role and the step.
    """

    def __init__(self, pipe, batched, perturb, combine):
        self.batched, self.perturb, self.combine = batched, perturb, combine
        self.seen, self.number, self.busy = [], 0, False
        self.differences = []
        for role in ("transformer", "transformer_2"):
            model = getattr(pipe, role, None)
            if model is not None:
                model.register_forward_pre_hook(self.hook(role), with_kwargs=True)
        own = pipe.scheduler.step

        def step(prediction, *args, **kwargs):
            new = self.predict()
            self.differences.append(float((new - prediction).abs().max()))
            self.number += 1
            self.seen.clear()
            return own(new.to(prediction.dtype), *args, **kwargs)

        pipe.scheduler.step = step

    def hook(self, role):
        def keep(model, args, kwargs):
            assert not args
            if not self.busy and kwargs.get("skip_layers") is None:
                self.seen.append((role, model, dict(kwargs)))

        return keep

    def call(self, model, kwargs, perturbed=False):
        self.busy = True
        try:
            if not perturbed:
                return model(**kwargs)[0]
            with self.perturb(model):
                return model(**kwargs)[0]
        finally:
            self.busy = False

    def predict(self):
        role, model, first = self.seen[0]
        other = None
        if self.batched:
            batch = len(first["hidden_states"])
            halves = [
                {
                    name: value[part]
                    if isinstance(value, torch.Tensor) and len(value) == batch
                    else value
                    for name, value in first.items()
                }
                for part in (slice(0, batch // 2), slice(batch // 2, batch))
            ]
            other, first = halves if self.batched == "guided" else (None, first)
        elif len(self.seen) > 1:
            assert self.seen[1][0] == role
            other = self.seen[1][2]
        c = self.call(model, first)
        p = self.call(model, first, perturbed=True)
        u = None if other is None else self.call(model, other)
        return self.combine(c, u, p, (role, self.number, first))
