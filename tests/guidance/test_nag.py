"""Normalized attention guidance equals the doubled batch that is written out, and is nowhere else.

The oracle runs the whole guided pass twice, with the prompt and with the negative text, computes
attention densely in float64, and gives both samples the same guided rows: that is what NAG is, in
cross-attention as in joint attention.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from diffusers import FirstBlockCacheConfig, WanTransformer3DModel
from support import tiny, tiny_images
from support.allocations import check_linear
from support.planned import Stop, traces
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from visattn import Grid, TokenLayout
from visattn.guidance import CFGZeroStar, SoftPAG, guide, steer
from visattn.guidance.guiders import nag as module
from visattn.guidance.guiders.nag import NAG, CrossNAG, JointNAG
from visattn.inject import sparse
from visattn.patterns import Diagonal
from visattn.pipelines.families import FAMILIES
from visattn.plan import Plan, Rule

PIPELINES = {**tiny.PIPELINES, **tiny_images.IMAGES}
KINDS = ("wan21", "wan22", "cogvideox", "flux", "sd3")
VIDEO, IMAGE = slice(10, 82), slice(10, 34)
ROWS = {"cogvideox": VIDEO, "flux": IMAGE, "sd3": slice(24)}
BATCHED = ("cogvideox", "sd3")
IMAGE_KEYS = 5
SHARED = ("image_rotary_emb", "img_ids", "txt_ids")
STRONG = {"scale": 7.0, "tau": 1.5, "alpha": 0.6}
NEGATIVE = "blue circle moves"


def generate(pipe, guidance=True, steps=2, **options):
    if type(pipe).__name__.startswith(("Flux", "StableDiffusion3")):
        return tiny_images.generate(pipe, steps=steps, guidance=guidance, **options)
    scale = {} if guidance else {"guidance_scale": 1.0}
    return tiny.generate(pipe, steps=steps, **scale, **options)


def encode(pipe, text):
    """As the pipelines of ``generate`` encode it."""
    more = {} if type(pipe).__name__.startswith(("Wan", "Cog")) else {"prompt_2": None}
    if type(pipe).__name__.startswith("Stable"):
        more["prompt_3"] = None
    with torch.no_grad():
        return pipe.encode_prompt(text, **more, max_sequence_length=10)[0]


def rule(plus, minus, scale=4.0, tau=2.5, alpha=0.25, norm="l2", formulation="official"):
    """NAG of ``[b, H, L, D]``, token by token."""
    out = plus.clone()
    for b in range(plus.shape[0]):
        for row in range(plus.shape[2]):
            p, m = plus[b, :, row].flatten(), minus[b, :, row].flatten()
            z = p + scale * (p - m)
            if formulation == "official":
                z = scale * p - (scale - 1) * m
            size = {"l1": lambda x: x.abs().sum(), "l2": lambda x: x.pow(2).sum().sqrt()}[norm]
            ratio = float(size(z) / size(p))
            z = min(ratio, tau) / ratio * z
            out[b, :, row] = (alpha * z + (1 - alpha) * p).unflatten(0, plus.shape[1::2])
    return out


class Dense(TorchFunctionMode):
    """Attention of doubled batches by the map, in float64, with the rule in image rows."""

    def __init__(self, rows, options):
        super().__init__()
        self.rows, self.options = rows, options

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is not scaled_dot_product_attention:
            return func(*args, **(kwargs or {}))
        q, k, v = (x.double() for x in args[:3] or (kwargs[n] for n in ("query", "key", "value")))
        out = (q @ k.mT * q.shape[3] ** -0.5).softmax(-1) @ v
        if self.rows is not None or k.shape[2] not in (q.shape[2], IMAGE_KEYS):
            rows = self.rows or slice(None)
            plus, minus = out[:, :, rows].chunk(2)
            out[:, :, rows] = rule(plus, minus, **self.options).repeat(2, 1, 1, 1)
        return out.float()


def written(pipe, kind, negative, guidance=True, **options):
    """Put the oracle on a pipeline: guided rows of the batch, or every other call, are doubled."""
    for role in ("transformer", "transformer_2"):
        model = getattr(pipe, role, None)
        if model is not None:
            model.forward = _written(model, kind, negative, guidance, options)


def _written(model, kind, negative, guidance, options):
    plain, calls = model.forward, []

    def forward(**given):
        batch = given["hidden_states"].shape[0]
        calls.append(batch)
        if kind not in BATCHED and guidance and len(calls) % 2 == 0:
            return plain(**given)
        first = batch // 2 if kind in BATCHED and guidance else 0
        doubled = [*range(first, batch)] * 2
        mine = {
            name: x[doubled]
            if isinstance(x, torch.Tensor) and name not in SHARED and x.shape[:1] == (batch,)
            else x
            for name, x in given.items()
        }
        texts = mine["encoder_hidden_states"]
        mine["encoder_hidden_states"] = torch.cat([texts[: batch - first], negative])
        with Dense(ROWS.get(kind), options):
            out = plain(**mine)[0][: batch - first]
        if first:
            usual = {
                name: x[:first] if isinstance(x, torch.Tensor) and x.shape[:1] == (batch,) else x
                for name, x in given.items()
            }
            out = torch.cat([plain(**usual)[0], out])
        return (out,)

    return forward


def watched(monkeypatch):
    """The samples of each attention call that is guided, from here on."""
    seen, own = [], NAG.away

    def away(self, plus, minus):
        seen.append(len(plus))
        return own(self, plus, minus)

    monkeypatch.setattr(NAG, "away", away)
    return seen


def error(found, expected):
    return float((found - expected).abs().max() / expected.abs().max())


# ---- the rule


@pytest.mark.parametrize("norm", ["l1", "l2"])
@pytest.mark.parametrize("formulation", ["extrapolate", "official"])
def test_rule_equals_the_loop_over_tokens(norm, formulation, monkeypatch):
    monkeypatch.setattr(module, "CHUNK", 100)
    torch.manual_seed(0)
    plus, minus = torch.randn(2, 2, 3, 9, 4, dtype=torch.float64)
    options = {"scale": 3.0, "tau": 3.5, "alpha": 0.4, "norm": norm, "formulation": formulation}
    found = NAG("a", **options).away(plus, minus)
    torch.testing.assert_close(found, rule(plus, minus, **options), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize(("norm", "order"), [("l1", 1), ("l2", 2)])
def test_norm_is_held_at_tau_and_only_above_it(norm, order):
    torch.manual_seed(0)
    plus, minus = torch.randn(2, 2, 3, 50, 8)
    sizes = [
        torch.linalg.vector_norm(x, order, dim=(1, 3))
        for x in (NAG("a", tau=2.5, alpha=1.0, norm=norm).away(plus, minus), plus)
    ]
    ratio = sizes[0] / sizes[1]
    assert float(ratio.max()) == pytest.approx(2.5, rel=1e-5)
    free = torch.linalg.vector_norm(plus + 3 * (plus - minus), order, dim=(1, 3)) / sizes[1]
    assert bool((free > 2.5).any())
    torch.testing.assert_close(ratio, free.clamp(max=2.5), atol=1e-5, rtol=1e-5)


def test_norms_and_formulations_differ_as_they_say():
    torch.manual_seed(0)
    plus, minus = torch.randn(2, 1, 3, 9, 4)
    l1, l2 = (NAG("a", scale=9.0, norm=norm).away(plus, minus) for norm in ("l1", "l2"))
    assert not torch.allclose(l1, l2)
    shifted = NAG("a", scale=8.0, norm="l1", formulation="extrapolate").away(plus, minus)
    assert shifted.equal(l1)


def test_zero_attention_stays_zero():
    zeros = torch.zeros(1, 2, 3, 4)
    assert NAG("a").away(zeros, zeros).equal(zeros)
    assert NAG("a").away(zeros, torch.ones_like(zeros)).equal(zeros)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype):
    torch.manual_seed(0)
    plus, minus = torch.randn(2, 1, 3, 9, 4).to(dtype)
    found = NAG("a", scale=9.0).away(plus, minus)
    expected = rule(plus.double(), minus.double(), scale=9.0).to(dtype)
    torch.testing.assert_close(found, expected, atol=0, rtol=2 * torch.finfo(dtype).eps)


# ---- in pipelines


@pytest.mark.sampled(3)
@pytest.mark.parametrize("guidance", [True, False])
@pytest.mark.parametrize("kind", KINDS)
def test_generation_equals_the_oracle(kind, guidance):
    pipe = PIPELINES[kind]()
    plain = generate(pipe, guidance)
    written(pipe, kind, encode(pipe, NEGATIVE), guidance, **STRONG)
    expected = generate(pipe, guidance)
    pipe = PIPELINES[kind]()
    with guide(pipe, NAG(NEGATIVE, **STRONG)):
        found = generate(pipe, guidance)
    assert error(found, expected) < 1e-5
    assert error(found, plain) > 1e-3


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_changes_at_alpha_zero_and_at_the_neutral_scale(kind):
    pipe = PIPELINES[kind]()
    plain, before = generate(pipe), traces(pipe)
    neutral = {"scale": 0.0, "formulation": "extrapolate"}
    for options in ({"alpha": 0.0}, {"scale": 1.0}, neutral):
        with guide(pipe, NAG(NEGATIVE, **options)):
            assert generate(pipe).equal(plain)
    assert traces(pipe) == before


@pytest.mark.parametrize("kind", KINDS)
def test_the_prompt_as_its_own_negative_changes_nothing(kind):
    pipe = PIPELINES[kind]()
    plain = generate(pipe)
    with guide(pipe, NAG("a red square moves right", **STRONG)):
        assert error(generate(pipe), plain) < 1e-5


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "flux"])
def test_negative_text_counts_in_few_steps_without_cfg(kind):
    pipe = PIPELINES[kind]()
    found = []
    for text in (NEGATIVE, "red square right"):
        with guide(pipe, NAG(text, **STRONG)):
            found.append(generate(pipe, False))
    assert error(*found) > 1e-4
    with guide(pipe, NAG(negative_prompt_embeds=encode(pipe, NEGATIVE), **STRONG)):
        assert generate(pipe, False).equal(found[0])


@pytest.mark.parametrize(("kind", "videos"), [("wan21", 2), ("cogvideox", 1)])
def test_samples_have_their_own_negatives(kind, videos):
    pipe = PIPELINES[kind]()
    shape = (4, 3, 12, 8) if kind == "wan21" else (3, 4, 12, 8)
    latents = torch.randn(2 * videos, *shape, generator=torch.Generator().manual_seed(0))
    prompts, negatives = ["a red square", "blue circle"], ["right", "left moves"]
    several = {"negative_prompt": ["a", "a"], "num_videos_per_prompt": videos}
    with guide(pipe, NAG(negatives, **STRONG)):
        found = generate(pipe, prompt=prompts, latents=latents, **several)
    for n in (0, 2 * videos - 1):
        own = {"prompt": prompts[n // videos], "latents": latents[n : n + 1]}
        with guide(pipe, NAG(negatives[n // videos], **STRONG)):
            alone = generate(pipe, negative_prompt="a", **own)
        assert error(found[n : n + 1], alone) < 1e-5
    with (
        pytest.raises(ValueError, match="2 negative texts, and a pass has 1"),
        guide(pipe, NAG(negatives)),
    ):
        generate(pipe)


def test_keys_of_the_negative_text_are_made_once():
    pipe = tiny.wan21()
    made = []
    for block in pipe.transformer.blocks:
        block.attn2.to_k.register_forward_hook(lambda *_: made.append(1))
    for _ in range(2):
        made.clear()
        with guide(pipe, NAG(NEGATIVE)):
            generate(pipe, steps=3)
        assert len(made) == tiny.LAYERS * (3 * 2 + 1)


def test_fused_projections_give_the_same():
    pipe = tiny.wan21()
    with guide(pipe, NAG(NEGATIVE, **STRONG)):
        expected = generate(pipe)
        pipe.transformer.fuse_qkv_projections()
        assert error(generate(pipe), expected) < 1e-5


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "flux"])
def test_window_and_passes_are_kept_to(kind, monkeypatch):
    pipe = PIPELINES[kind]()
    text = encode(pipe, NEGATIVE)
    seen = watched(monkeypatch)
    layers = 4 if kind == "flux" else tiny.LAYERS
    for options, calls in (
        ({"start": 1}, 2),
        ({"stop": 1}, 1),
        ({"start": 1, "stop": 2}, 1),
        ({"passes": "uncond"}, 3),
        ({"passes": ("uncond", "cond")}, 6),
    ):
        seen.clear()
        with guide(pipe, NAG(negative_prompt_embeds=text, **options)):
            generate(pipe, steps=3)
        assert seen == [1] * (calls * layers), options


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "flux"])
def test_a_denoiser_alone_is_guided(kind):
    pipe = PIPELINES[kind]()
    given = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    generate(pipe, False, steps=1)
    hook.remove()
    model, text = pipe.transformer, encode(pipe, NEGATIVE)
    with torch.no_grad():
        plain = model(**given[0])[0]
        with guide(model, NAG(negative_prompt_embeds=text, **STRONG)):
            found = model(**given[0])[0]
        written(pipe, kind, text, False, **STRONG)
        expected = model(**given[0])[0]
    assert error(found, expected) < 1e-5 < error(found, plain)


def test_attention_to_an_image_is_left():
    own = {k: v for k, v in tiny.wan_transformer(0).config.items() if not k.startswith("_")}
    torch.manual_seed(0)
    model = WanTransformer3DModel(**{**own, "added_kv_proj_dim": 64, "image_dim": 16}).eval()
    given = {
        "hidden_states": torch.randn(1, 4, 3, 12, 8),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 512, 16),
        "encoder_hidden_states_image": torch.randn(1, IMAGE_KEYS, 16),
        "return_dict": False,
    }
    text = torch.randn(1, 512, 16)
    with torch.no_grad():
        (plain,) = model(**given)
        with guide(model, NAG(negative_prompt_embeds=text, **STRONG)):
            (found,) = model(**given)
        model.forward = _written(model, "wan21", text, False, STRONG)
        (expected,) = model(**given)
    assert error(found, expected) < 1e-5 < 1e-3 < error(found, plain)


def test_text_rows_are_left_and_image_rows_are_the_same_in_both():
    out = torch.randn(4, 2, 30, 8, generator=torch.Generator().manual_seed(0))
    layout = TokenLayout.from_tokens(
        (("text", 5), ("grid", 1, 2, 4), ("grid", 1, 3, 4), ("text", 5))
    )
    state = SimpleNamespace(out=out, call=SimpleNamespace(layout=layout))
    own = NAG("a", **STRONG)
    JointNAG(nag=own, text=None).apply(state, torch.ones(2))
    for rows in (slice(5), slice(25, 30)):
        assert state.out[:, :, rows].equal(out[:, :, rows])
    image = slice(5, 25)
    assert state.out[:2, :, image].equal(state.out[2:, :, image])
    expected = own.away(out[:2, :, image], out[2:, :, image])
    assert state.out[:2, :, image].equal(expected)


# ---- with others


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "sd3"])
def test_with_softpag_the_perturbed_pass_is_guided_as_well(kind):
    pipe = PIPELINES[kind]()
    soft, own = SoftPAG({1: [0, 2], 2: [3]}, scale=2.0), NAG(NEGATIVE, **STRONG)
    found = []
    for reuse in (True, False):
        with guide(pipe, [soft, own], reuse_prefix=reuse):
            found.append(generate(pipe))
    with guide(pipe, soft), guide(pipe, own):
        found.append(generate(pipe))
    assert found[0].equal(found[1])
    assert found[0].equal(found[2])
    for reuse in (True, False):  # the other way round heads are perturbed after NAG
        with guide(pipe, own), guide(pipe, soft, reuse_prefix=reuse):
            found.append(generate(pipe))
    assert found[3].equal(found[4])
    assert error(found[3], found[0]) < 1e-5 or kind != "wan21"
    with guide(pipe, soft):
        assert error(generate(pipe), found[0]) > 1e-3
    with guide(pipe, own):
        assert error(generate(pipe), found[0]) > 1e-3


@pytest.mark.parametrize("kind", ["wan21", "cogvideox"])
def test_every_layer_of_both_passes_is_guided_with_softpag(kind, monkeypatch):
    pipe, seen = PIPELINES[kind](), watched(monkeypatch)
    soft, own = SoftPAG({1: [0]}, scale=2.0), NAG(NEGATIVE)
    for outer, inner in ((soft, own), (own, soft)):
        seen.clear()
        with guide(pipe, outer, reuse_prefix=False), guide(pipe, inner, reuse_prefix=False):
            generate(pipe)
        assert seen == [1] * (2 * 2 * tiny.LAYERS)


@pytest.mark.parametrize("kind", ["wan21", "cogvideox", "flux"])
def test_with_softpag_it_is_c_plus_w_times_c_minus_p(kind):
    pipe = PIPELINES[kind]()
    soft = SoftPAG({1: [0, 2], 2: [3]}, scale=2.0)
    own = NAG(negative_prompt_embeds=encode(pipe, NEGATIVE), **STRONG)
    given = []
    hook = pipe.transformer.register_forward_pre_hook(
        lambda _, args, kwargs: given.append(kwargs), with_kwargs=True
    )
    generate(pipe, False, steps=1)
    hook.remove()
    model = pipe.transformer
    with torch.no_grad():
        with guide(model, own):
            c = model(**given[0])[0]
            with steer(model, soft.edits()):
                late = model(**given[0])[0]
        with steer(model, soft.edits()), guide(model, own):
            p = model(**given[0])[0]
        with guide(model, [own, soft]):
            found = model(**given[0])[0]
    assert error(found, c + 2 * (c - p)) < 1e-5
    assert error(late, c) > 1e-4


@pytest.mark.parametrize("kind", ["sd3", "wan21"])
def test_with_cfg_zero_star(kind):
    pipe = PIPELINES[kind]()
    zero, own = CFGZeroStar(zero_init=0), NAG(NEGATIVE, **STRONG)
    with guide(pipe, [zero, own]):
        found = generate(pipe)
    with guide(pipe, own), guide(pipe, zero):
        assert error(generate(pipe), found) < 1e-5
    with guide(pipe, own):
        assert error(generate(pipe), found) > 1e-3


@pytest.mark.parametrize("kind", ["wan21", "cogvideox"])
def test_with_a_plan_both_texts_run_its_patterns(kind):
    plan = Plan((Rule(Diagonal(9), pass_="cond"),))
    pipe = PIPELINES[kind]()
    with sparse(pipe, plan):
        planned = generate(pipe)
        with guide(pipe, NAG("a red square moves right", **STRONG)):
            assert error(generate(pipe), planned) < 1e-5
        with guide(pipe, NAG(NEGATIVE, **STRONG)):
            found = generate(pipe)
    with guide(pipe, NAG(NEGATIVE, **STRONG)):
        assert error(generate(pipe), found) > 1e-3


# ---- what cannot be


@pytest.mark.parametrize("kind", ["wan22", "cogvideox", "flux", "sd3"])
def test_errors_leave_the_pipeline_as_it_was(kind):
    pipe = PIPELINES[kind]()
    plain, before = generate(pipe), traces(pipe)

    def stop(*_):
        raise Stop

    with pytest.raises(Stop), guide(pipe, NAG(NEGATIVE)):
        generate(pipe, callback_on_step_end=stop)
    assert traces(pipe) == before
    block = next(path for path, _ in pipe.transformer.named_modules() if path.endswith("blocks.1"))
    hook = pipe.transformer.get_submodule(block).register_forward_pre_hook(stop)
    with pytest.raises(Stop), guide(pipe, [NAG(NEGATIVE), SoftPAG({1: [0]})]):
        generate(pipe)
    hook.remove()
    assert traces(pipe) == before
    assert generate(pipe).equal(plain)


@pytest.mark.parametrize("kind", ["wan21", "cogvideox"])
def test_what_changes_no_call_raises(kind):
    pipe = PIPELINES[kind]()
    own = CrossNAG if kind == "wan21" else JointNAG
    for options in ({"start": 5}, {"passes": "uncond"}):
        with (
            pytest.raises(ValueError, match=f"{own.__name__} has changed no attention call"),
            guide(pipe, NAG(NEGATIVE, **options)),
        ):
            generate(pipe, False)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "either negative_prompt, a text, or negative_prompt_embeds"),
        ({"negative_prompt_embeds": torch.zeros(3, 4)}, r"is \[3, 4\]; it must be a tensor"),
        ({"negative_prompt": "a", "scale": float("nan")}, r"scale=nan\) must be a finite"),
        ({"negative_prompt": "a", "tau": 0}, r"tau=0\) must be a number above 0"),
        ({"negative_prompt": "a", "alpha": 1.5}, r"alpha=1.5\) must be a number from 0 to 1"),
        ({"negative_prompt": "a", "scale": "4"}, r"scale='4'\) must be a finite"),
        ({"negative_prompt": "a", "alpha": True}, r"alpha=True\) must be a number from 0"),
        ({"negative_prompt": "a", "norm": "l3"}, "must be l1 or l2"),
        ({"negative_prompt": "a", "formulation": "no"}, "must be extrapolate or official"),
        ({"negative_prompt": "a", "passes": ()}, "must be cond, uncond or both"),
        ({"negative_prompt": "a", "passes": "perturbed"}, "must be cond, uncond or both"),
        ({"negative_prompt": "a", "start": -1}, "must be steps, or shares"),
    ],
)
def test_bad_arguments_are_told(options, message):
    with pytest.raises(ValueError, match=message):
        NAG(**options)


def test_bad_negative_prompts_are_told():
    for prompt in (3, [], ["a", 3]):
        with pytest.raises(TypeError, match="must be one or several texts"):
            NAG(prompt)


def test_what_nag_cannot_guide_is_told():
    pipe = tiny.cogvideox()
    with (
        pytest.raises(ValueError, match="has no encode_prompt; give negative_prompt_emb"),
        guide(pipe.transformer, NAG("a")),
    ):
        pass
    with (
        pytest.raises(ValueError, match="NAG guides this pipeline already"),
        guide(pipe, [NAG("a"), NAG("b")]),
    ):
        pass
    with (
        pytest.raises(ValueError, match=r"shape \[5, 16\], and the prompt has \[10, 16\]"),
        guide(pipe, NAG(negative_prompt_embeds=torch.zeros(1, 5, 16))),
    ):
        generate(pipe)


def test_a_family_that_is_not_known_is_told(monkeypatch):
    pipe = tiny.wan21()
    other = replace(FAMILIES["WanTransformer3DModel"], name="Other")
    monkeypatch.setitem(FAMILIES, "WanTransformer3DModel", other)
    with (
        pytest.raises(ValueError, match="cannot guide the cross-attention of Other"),
        guide(pipe, NAG("a")),
    ):
        pass


def test_a_text_that_is_not_encoded_is_told():
    pipe = tiny.wan21()
    model = pipe.transformer
    given = {
        "hidden_states": torch.zeros(1, 4, 3, 12, 8),
        "encoder_hidden_states": torch.zeros(1, 10, 16),
        "timestep": torch.zeros(1),
    }
    with (
        pytest.raises(ValueError, match="encoded when the pipeline is called"),
        guide(pipe, NAG("a")),
        model.cache_context("cond", step_index=0, num_inference_steps=1),
    ):
        model(**given)


@pytest.mark.parametrize("kind", ["wan22", "cogvideox"])
def test_offloaded_denoisers_are_guided(kind):
    pipe = PIPELINES[kind]()
    with guide(pipe, NAG(NEGATIVE, **STRONG)):
        expected = generate(pipe)
    models = [pipe.transformer, getattr(pipe, "transformer_2", pipe.transformer)]
    for model in dict.fromkeys(models):
        cpu_offload(model, torch.device("cpu"), offload_buffers=True)
    with guide(pipe, NAG(NEGATIVE, **STRONG)):
        assert generate(pipe).equal(expected)


def test_caches_of_steps_keep_doubled_calls_apart():
    pipe = tiny.cogvideox()
    plain = generate(pipe, steps=4)
    pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-6))
    for options in ({"start": 1, "stop": 3}, {}):  # nothing is alike enough to be reused
        own = NAG(NEGATIVE, **STRONG, **options)
        with guide(pipe, own):
            found = generate(pipe, steps=4)
        pipe.transformer.disable_cache()
        with guide(pipe, own):
            assert error(generate(pipe, steps=4), found) < 1e-5
        pipe.transformer.enable_cache(FirstBlockCacheConfig(threshold=1e-6))
    assert error(generate(pipe, steps=4), plain) < 1e-5


def test_memory_is_linear():
    own = NAG("a", **STRONG)

    def joint(tokens):
        out = torch.randn(2, 2, tokens + 8, 16)
        layout = TokenLayout(Grid(1, 32, tokens // 32), text_before=8)
        state = SimpleNamespace(out=out, call=SimpleNamespace(layout=layout))
        return lambda: JointNAG(nag=own, text=None).apply(state, torch.ones(2))

    def cross(tokens):
        q, k = torch.randn(2, 2, tokens, 16), torch.randn(2, 2, 32, 16)

        def kernel(part, q, k, v):
            return scaled_dot_product_attention(q, k, v), None

        call = SimpleNamespace(masked=False, role="", layer="", kernel=kernel)
        state = SimpleNamespace(q=q, out=torch.randn_like(q), part=0, call=call)
        text = SimpleNamespace(keys_and_values=lambda *_: (k, k))
        return lambda: CrossNAG(nag=own, text=text).apply(state, torch.ones(2))

    check_linear(joint, heads=2)
    check_linear(cross, heads=2)
