"""HunyuanVideo masks the padding of its text: plans and edits go by the valid tokens."""

from dataclasses import replace

import pytest
import torch
from support import tiny
from torch.nn.functional import scaled_dot_product_attention

from visattn.guidance import NAG, BorrowKeys, Edit, Perturb, SoftPAG, guide, steer
from visattn.inject import apply_plan, observe, remove_plan, summary
from visattn.inject.attachment import attached
from visattn.inject.layers import memories
from visattn.patterns import Dense, Diagonal, Neighborhood
from visattn.plan import Plan, Rule
from visattn.selectors import TopBlocks

PLAN = Plan((Rule((Diagonal(3), Dense(), Neighborhood((1, 3, 3)), Diagonal(9))),))
PROMPTS = ["a red square moves right", "blue circle"]  # 6 and 3 tokens with the one at the end


def generate(pipe, prompt, latents, **options):
    return tiny.generate(pipe, prompt=prompt, negative_prompt=None, latents=latents, **options)


@pytest.fixture
def latents():
    return torch.randn(2, 4, 3, 12, 8, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("plan", [PLAN, Plan((Rule(TopBlocks(0.5)),))], ids=["static", "dynamic"])
def test_prompts_of_different_lengths_in_a_batch_are_what_they_are_alone(plan, latents):
    pipe = tiny.hunyuanvideo()
    apply_plan(pipe, plan, guard=False)
    both = generate(pipe, PROMPTS, latents)
    assert all(row.sparse_calls == 3 and row.reason is None for row in summary(pipe).layers)
    alone = [generate(pipe, p, x[None]) for p, x in zip(PROMPTS, latents, strict=True)]
    torch.testing.assert_close(both, torch.cat(alone), rtol=0, atol=1e-5)
    remove_plan(pipe)
    assert (generate(pipe, PROMPTS, latents) - both).abs().max() > 1e-3


@pytest.mark.parametrize("planned", [False, True], ids=["dense", "plan"])
def test_what_the_padding_holds_changes_nothing(planned, latents, monkeypatch):
    """Here of the text as the blocks get it."""
    pipe = tiny.hunyuanvideo()
    if planned:
        apply_plan(pipe, PLAN)
    expected = generate(pipe, PROMPTS, latents)
    own = pipe.transformer.context_embedder.forward

    def other(text, timestep, mask):
        out = own(text, timestep, mask)
        return torch.where(mask[..., None] > 0, out, out + 100.0)

    monkeypatch.setattr(pipe.transformer.context_embedder, "forward", other)
    assert (generate(pipe, PROMPTS, latents) - expected).abs().max() < 1e-6


def test_another_mask_stays_dense_and_says_so(caplog, latents):
    pipe = tiny.hunyuanvideo()
    module = pipe.transformer.transformer_blocks[0].attn

    def per_query(module, args, kwargs):
        mask = kwargs["attention_mask"]
        return args, kwargs | {"attention_mask": mask.expand(-1, -1, mask.shape[-1], -1)}

    module.register_forward_pre_hook(per_query, with_kwargs=True)
    dense = generate(pipe, PROMPTS[0], latents[:1])
    apply_plan(pipe, Plan((Rule(PLAN.rules[0].patterns, layer="transformer_blocks.0.attn"),)))
    assert torch.equal(generate(pipe, PROMPTS[0], latents[:1]), dense)
    (row,) = summary(pipe).layers
    assert (row.sparse_calls, row.reason) == (0, "it is given an attention mask")
    assert "transformer_blocks.0.attn stays dense: it is given an attention mask" in caplog.text


def test_audit_does_not_count_what_is_masked(latents):
    """It is that of the text without padding, 3 tokens."""
    found = []
    for room in (10, 3):
        pipe = tiny.hunyuanvideo()
        apply_plan(pipe, Neighborhood((3, 5, 4)), audit=8)
        generate(pipe, PROMPTS[1], latents[:1], max_sequence_length=room)
        found.append([(row.dropped, row.error) for row in summary(pipe).layers])
    assert min(min(row) for row in found[0]) > 1e-3
    torch.testing.assert_close(torch.tensor(found[0]), torch.tensor(found[1]), rtol=1e-4, atol=1e-6)


# ---- edits


def edited(pipe, prompt, latents, edits, plan=None):
    if plan is not None:
        apply_plan(pipe, plan)
    with steer(pipe, edits):
        return generate(pipe, prompt, latents, steps=1)


@pytest.mark.parametrize("plan", [None, PLAN], ids=["dense", "plan"])
def test_an_edit_sees_the_valid_tokens_alone(plan, latents):
    """The same as with a text that has no padding at all."""
    mean, query = Perturb(target="mean", heads={0: 1.0, 3: 0.5}), Perturb(target="mean_query")
    edits = [mean, replace(query, heads=[2])]
    found = edited(tiny.hunyuanvideo(), PROMPTS[0], latents[:1], edits, plan)
    pipe = tiny.hunyuanvideo()
    if plan is not None:
        apply_plan(pipe, plan)
    with steer(pipe, edits):
        short = generate(pipe, PROMPTS[0], latents[:1], steps=1, max_sequence_length=6)
    torch.testing.assert_close(found, short, rtol=0, atol=1e-5)
    plain = generate(pipe, PROMPTS[0], latents[:1], steps=1)
    assert (found - plain).abs().max() > 1e-3


def test_an_edit_of_texts_of_different_lengths_is_refused(latents):
    with pytest.raises(ValueError, match="batch have 3 and 6 valid tokens") as refusal:
        edited(tiny.hunyuanvideo(), PROMPTS, latents, [Perturb(heads=[1])])
    assert "use prompts of equal token length, or batch size 1" in str(refusal.value)


def test_what_is_not_edited_may_have_texts_of_different_lengths(latents):
    """Steps and passes without an edit, and the uncond pass of a guided generation."""
    pipe = tiny.hunyuanvideo()
    plain = generate(pipe, PROMPTS, latents, steps=2)
    late = steer(pipe, [Perturb(heads=[1], start=2)])
    with pytest.raises(ValueError, match="no attention call"), late:
        assert torch.equal(generate(pipe, PROMPTS, latents, steps=2), plain)
    two = {"prompt": ["a red square", "a blue circle"], "negative_prompt": ["a", PROMPTS[0]]}
    with guide(pipe, SoftPAG({1: [0]}, scale=2.0)):
        found = tiny.generate(pipe, latents=latents, steps=2, **two)
    alone = []
    for n in range(2):
        one = {name: texts[n] for name, texts in two.items()}
        with guide(pipe, SoftPAG({1: [0]}, scale=2.0)):
            alone.append(tiny.generate(pipe, latents=latents[n : n + 1], steps=2, **one))
    torch.testing.assert_close(found, torch.cat(alone), rtol=0, atol=1e-5)


def test_texts_of_other_lengths_are_no_other_geometry(caplog, latents):
    pipe = tiny.hunyuanvideo()
    apply_plan(pipe, replace(PLAN, geometry=tiny.layout("hunyuanvideo")))
    with steer(pipe, [Perturb(heads=[1])]):
        for prompt in PROMPTS:
            generate(pipe, prompt, latents[:1], steps=1)
    assert "the plan was made at" not in caplog.text
    generate(pipe, PROMPTS[0], latents[:1, :, :2], steps=1)
    assert "the plan was made at 3x6x4 + text(10) and runs at 2x6x4 + text(10)" in caplog.text


def test_few_lengths_are_remembered(monkeypatch, latents):
    monkeypatch.setattr(memories, "MOST", 2)
    pipe = tiny.hunyuanvideo()
    apply_plan(pipe, TopBlocks(0.5), guard=False)
    with steer(pipe, [Perturb(heads=[1])]):
        found = [generate(pipe, " ".join(["a"] * n), latents[:1], steps=1) for n in range(1, 5)]
        again = generate(pipe, "a", latents[:1], steps=1)
    assert torch.equal(again, found[0])
    own = attached(pipe.transformer).layers
    assert [len(one.memories) for one in own] == [2] * tiny.LAYERS


def test_a_second_text_of_its_own_length_is_refused():
    pipe = tiny.hunyuanvideo()
    own = guide(pipe, NAG("blue circle"))
    with pytest.raises(ValueError, match="use negative_prompt with true_cfg_scale above 1"), own:
        pass


def test_keys_are_borrowed_without_padding(latents):
    """Of another sample with as long a text."""
    two = [PROMPTS[0], "a blue circle moves left"]
    pipe = tiny.hunyuanvideo()
    edits = [BorrowKeys(sources=(1,), samples=(0,))]
    with steer(pipe, edits):
        padded = generate(pipe, two, latents, steps=1)
        bare = generate(pipe, two, latents, steps=1, max_sequence_length=6)
    torch.testing.assert_close(padded, bare, rtol=0, atol=1e-5)
    assert (padded - generate(pipe, two, latents, steps=1))[0].abs().max() > 1e-3


def test_observed_lengths_say_what_the_layer_computes(latents):
    pipe = tiny.hunyuanvideo()
    module, outputs, seen = pipe.transformer.transformer_blocks[1].attn, [], []
    module.register_forward_hook(lambda *args: outputs.append(args[-1][0]))
    with observe(pipe, seen.append, ["transformer_blocks.1.attn"]):
        generate(pipe, PROMPTS, latents, steps=1)
    (o,), (output,) = seen, outputs
    assert o.text_lengths.tolist() == [[6], [3]]
    valid = torch.stack([o.valid(0), o.valid(1)])[:, None, None]
    heads = scaled_dot_product_attention(o.q, o.k, o.v, attn_mask=valid)
    video = heads.transpose(1, 2).flatten(2)[:, : o.layout.grids[0][1].numel]
    with torch.no_grad():
        assert torch.allclose(module.to_out[0](video), output, atol=1e-6)


def test_the_layout_without_padding_is_that_of_the_edited_call_alone(latents):
    """It goes with the call: the state of the denoiser keeps the tokens with the padding."""
    pipe, layouts = tiny.hunyuanvideo(), []

    class Noted(Edit):
        stage = "output"

        def apply(self, edited, strength):
            denoising = attached(pipe.transformer)
            layouts.append((edited.call.layout.length, denoising.layout.length))

    with steer(pipe, Noted()):
        generate(pipe, PROMPTS[:1], latents[:1], steps=1)
    assert layouts
    assert all(unpadded < padded for unpadded, padded in layouts)
