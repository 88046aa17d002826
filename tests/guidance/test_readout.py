"""Readouts of text tokens from running pipelines: the dense map of the same call says what they
are."""

from dataclasses import dataclass, field
from typing import ClassVar

import pytest
import torch
from support import tiny
from support.allocations import check_linear, joint_state
from support.guided_pipelines import generate, pipeline
from tokenizers.processors import TemplateProcessing

import visattn
from visattn.guidance import BorrowKeys, Edit, LabelBias, ScaleTokens, Temperature
from visattn.guidance.edits.read_tokens import ReadTokens
from visattn.guidance.edits.steer import apply_edits
from visattn.guidance.token_maps.prompt_tokens import phrase_tokens, real_tokens
from visattn.guidance.token_maps.token_readout import TokenReadout, frame_minmax, token_masks
from visattn.patterns import Diagonal
from visattn.plan import Plan, Rule

# SD3 has the image in front of the text
KINDS = {"wan21": "cross", "cogvideox": "self", "sd3": "self"}
GRIDS = {"wan21": (3, 6, 4), "cogvideox": (3, 6, 4), "sd3": (1, 6, 4)}
TOKENS = (1, (2, 3))
REAL = (0, 1, 2, 3, 4)  # "a red square moves right"; then the end, then padding


@dataclass(frozen=True, kw_only=True, eq=False)
class Spy(Edit):
    """Keeps the tensors of calls."""

    seen: list = field(default_factory=list)
    stage: ClassVar[str] = "read"

    def apply(self, state, strength):
        self.seen.append((state.call, state.pass_, state.q, state.k, state.texts))


def dense_columns(call, q, k, texts, tokens=TOKENS, weights=None, bias=0.0):
    """Text columns of the dense map, the mean over heads: ``[b, image tokens, tokens]``."""
    share = (q.double() @ k.double().mT * call.factor + bias).softmax(-1)
    heads = torch.ones(share.shape[1]) if weights is None else weights
    mean = (share * (heads / heads.sum())[:, None, None]).sum(1)
    first, grid = call.layout.grids[0]
    groups = [[token] if isinstance(token, int) else list(token) for token in tokens]
    text = texts[0][0]
    rows = mean[:, first : first + grid.numel]
    return torch.stack([rows[..., [text + n for n in group]].sum(-1) for group in groups], -1)


def read(pipe, kind, *more, readout=None, plan=None, **options):
    """A readout and what the calls were, of a short generation."""
    readout = readout or TokenReadout()
    spy = Spy(attention=KINDS[kind], layers=options.get("layers"))
    given = {"tokens": TOKENS, "attention": KINDS[kind], "sink": readout, **options}
    edit = ReadTokens(**given)
    plan = visattn.Plan() if plan is None else plan
    with visattn.sparse(pipe, plan), visattn.steer(pipe, [*more, edit, spy]):
        out = generate(pipe, steps=2)
    return readout, spy.seen, out


@pytest.mark.parametrize("kind", KINDS)
def test_columns_equal_the_dense_map_and_change_nothing(kind):
    pipe = pipeline(kind)
    readout, seen, out = read(pipe, kind)
    assert torch.equal(out, generate(pipe, steps=2))
    assert readout.steps == (0, 1)
    assert set(readout.passes) == {"cond", "uncond"}
    assert (seen[0][4][0][0] > 0) == (kind == "sd3")  # where the text begins
    for pass_ in readout.passes:
        for step in readout.steps:
            layers = [
                dense_columns(call, q, k, texts)
                for call, whose, q, k, texts in seen
                if (whose, call.step) == (pass_, step)
            ]
            assert len(layers) == tiny.LAYERS
            own = readout.maps(pass_, step)
            assert own.shape == (1, 2, *GRIDS[kind])
            expected = torch.stack(layers).mean(0).mT.unflatten(2, GRIDS[kind])
            torch.testing.assert_close(own.double(), expected, atol=1e-6, rtol=1e-5)
    mean = torch.stack([readout.maps("cond", step) for step in (0, 1)]).mean(0)
    torch.testing.assert_close(readout.maps(), mean)


@pytest.mark.parametrize("kind", KINDS)
def test_heads_weigh_by_strength_and_layers_are_those_named(kind):
    readout, seen, _ = read(pipeline(kind), kind, layers=[-1], heads={0: 1.0, 2: 0.5})
    call, _, q, k, texts = next(one for one in seen if one[1] == "cond" and one[0].step == 1)
    weights = torch.tensor([1.0, 0.0, 0.5, 0.0])
    expected = dense_columns(call, q, k, texts, weights=weights).mT.unflatten(2, GRIDS[kind])
    torch.testing.assert_close(readout.maps("cond", -1).double(), expected, atol=1e-6, rtol=1e-5)


def test_tokens_behind_a_template_count_from_the_crop():
    """As HunyuanVideo's pipeline crops it, with the begin of the text."""
    own = tiny.tokenizer(32)
    begin = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
    own.backend_tokenizer.post_processor = begin
    template = {"template": "moves right {} moves", "crop_start": 3}
    prompt = "a red square moves"
    kept = own(template["template"].format(prompt))["input_ids"][3:]
    found = real_tokens(own, prompt, template)
    assert found == (0, 1, 2, 3)
    assert [tiny.WORDS[kept[n]] for n in found] == prompt.split()
    assert phrase_tokens(own, prompt, "square", template) == (2,)
    assert phrase_tokens(own, prompt, "square") == (3,)  # without it, behind the begin
    for wrong in ({"template": "no place", "crop_start": 3}, {"template": "{}"}):
        with pytest.raises(ValueError, match=r"must have the keys template, .* and crop_start"):
            real_tokens(own, prompt, wrong)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_end_are_not_in_the_normaliser(kind):
    pipe = pipeline(kind)
    prompt = "a red square moves right"
    assert real_tokens(pipe.tokenizer, prompt) == REAL
    assert phrase_tokens(pipe.tokenizer, prompt, "red square") == (1, 2)
    readout, seen, _ = read(pipe, kind, tokens=REAL, real=REAL, layers=[1])
    maps = readout.maps("cond", 0, "real")
    torch.testing.assert_close(maps.sum(1), torch.ones(1, *GRIDS[kind]))
    call, _, q, k, texts = next(one for one in seen if one[1] == "cond")
    columns = dense_columns(call, q, k, texts, tokens=REAL)
    expected = (columns / columns.sum(-1, keepdim=True)).mT.unflatten(2, GRIDS[kind])
    torch.testing.assert_close(maps.double(), expected, atol=1e-6, rtol=1e-5)
    assert float(readout.maps("cond", 0).sum(1).max()) < 0.9  # the rest had weight


@pytest.mark.parametrize("kind", KINDS)
def test_biases_and_temperatures_of_other_edits_are_in_the_columns(kind):
    pipe, attention = pipeline(kind), KINDS[kind]
    table = torch.tensor([[0.0, 1.5], [0.0, -torch.inf]])
    more = [
        LabelBias(
            table=table,
            q_labels=lambda state: torch.arange(state.q.shape[2]) % 2,
            k_labels=lambda state: (torch.arange(state.k.shape[2]) == state.texts[0][0] + 1).long(),
            attention=attention,
        ),
        Temperature(temperature=0.5, keys="text", attention=attention),
    ]
    readout, seen, _ = read(pipe, kind, *more, layers=[0], passes=("cond",))
    call, _, q, k, texts = next(one for one in seen if one[1] == "cond")
    gain = torch.ones(k.shape[2])
    if attention == "self":  # in cross-attention the queries have it
        gain[texts[0][0] : texts[0][1]] = 2
    bias = torch.zeros(q.shape[2], k.shape[2])
    bias[0::2, texts[0][0] + 1], bias[1::2, texts[0][0] + 1] = 1.5, -torch.inf
    expected = dense_columns(call, q, k * gain[:, None], texts, bias=bias)
    own = readout.maps("cond", 0).double()
    torch.testing.assert_close(own, expected.mT.unflatten(2, GRIDS[kind]), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("both_ways", [False, True])
def test_scaled_tokens_count_the_biases_and_temperatures_of_other_edits(both_ways):
    pipe, outs = pipeline("cogvideox"), []

    class Out(Spy):
        def apply(self, state, strength):
            outs.append((state.call, state.image, state.q, state.k, state.v, state.out))

    token = 1
    table = torch.tensor([[0.0, 1.5], [0.0, -0.5]])
    edits = [
        LabelBias(
            table=table,
            q_labels=lambda state: torch.arange(state.q.shape[2]) % 2,
            k_labels=lambda state: (torch.arange(state.k.shape[2]) == token).long(),
        ),
        Temperature(temperature=0.5, keys="text", stream="image"),
        ScaleTokens(tokens=(token,), scale=3.0, both_ways=both_ways),
    ]
    with visattn.steer(pipe, [*edits, Out()]):
        tiny.generate(pipe, steps=1)
    for call, image, q, k, v, out in outs:
        q, k, v = (x.double() for x in (q, k, v))
        logits = q @ k.mT * call.factor
        logits[:, :, image, : image.start] *= 2
        logits[:, :, 0::2, token] += 1.5
        logits[:, :, 1::2, token] -= 0.5
        share = logits.softmax(-1)
        share[..., token] *= 3
        if both_ways:
            share[:, :, token, image] *= 3
        torch.testing.assert_close(out.double(), share @ v, atol=1e-6, rtol=1e-5)


def test_a_sparse_plan_inflates_columns_unless_they_are_exact():
    pipe = pipeline("cogvideox")
    plan = Plan((Rule(Diagonal(2)),))
    usual, seen, out = read(pipe, "cogvideox", layers=[0], plan=plan)
    exact, _, other = read(pipe, "cogvideox", layers=[0], plan=plan, exact=True)
    assert torch.equal(out, other)
    call, _, q, k, texts = next(one for one in seen if one[1] == "cond")
    expected = dense_columns(call, q, k, texts).mT.unflatten(2, (3, 6, 4))
    torch.testing.assert_close(exact.maps("cond", 0).double(), expected, atol=1e-6, rtol=1e-5)
    layout = call.layout
    kept = Diagonal(2).allows(
        torch.arange(layout.length)[:, None], torch.arange(layout.length), layout
    )
    share = (q.double() @ k.double().mT * call.factor).softmax(-1)
    start, grid = layout.grids[0]
    rows = slice(start, start + grid.numel)
    own = share / (share * kept).sum(-1, keepdim=True)
    inflated = own.mean(1)[:, rows, [texts[0][0] + 1]].mT.unflatten(2, (3, 6, 4))
    torch.testing.assert_close(usual.maps("cond", 0)[:, :1].double(), inflated)
    assert float((usual.maps("cond", 0) / exact.maps("cond", 0)).min()) > 1.05


def test_masks_of_the_step_before_serve_other_edits():
    pipe = pipeline("cogvideox")
    readout, used = TokenReadout(keep=2), []
    masks, labels = readout.masks(1, 0.6), readout.labels(0.6)

    def spied(state):
        used.append((state.call.step, masks(state)))
        return used[-1][1]

    prompts = ["a red square moves right", "a blue circle moves left"]
    edits = [
        ReadTokens(tokens=TOKENS, sink=readout),
        BorrowKeys(sources=(0,), samples=(1,), tokens=spied, start=1),
        LabelBias(
            table=torch.zeros(3, 1),
            q_labels=labels,
            k_labels=lambda state: torch.zeros(state.k.shape[2], dtype=torch.int64),
            start=1,
        ),
    ]
    with visattn.steer(pipe, edits):
        tiny.generate(pipe, prompt=prompts, negative_prompt=["", ""])
    assert {step for step, _ in used} == {1, 2}
    expected = token_masks(readout.maps("cond", 1)[:, 1], 0.6).flatten(1)
    assert expected.shape == (2, 72)
    assert 0 < int(expected.sum()) < 144
    assert all(torch.equal(mask, expected) for step, mask in used if step == 2)
    assert readout.steps == (1, 2)  # keep=2


def test_labels_are_of_the_largest_token_above_the_threshold():
    readout = TokenReadout()
    found = []
    now = readout.labels(0.5, when="now")
    pipe = pipeline("wan21")
    edits = [
        ReadTokens(tokens=TOKENS, sink=readout, attention="cross", layers=[0]),
        LabelBias(
            table=torch.zeros(3, 1),
            q_labels=lambda state: found.append(now(state)) or found[-1],
            k_labels=lambda state: torch.zeros(state.k.shape[2], dtype=torch.int64),
            attention="cross",
            layers=[2],
        ),
    ]
    with visattn.steer(pipe, edits):
        tiny.generate(pipe, steps=1)
    scaled = frame_minmax(readout.maps("cond")).flatten(2)[0]
    for label, values in zip(found[0][0].tolist(), scaled.mT, strict=True):
        above = float(values.max()) >= 0.5
        assert label == (int(values.argmax()) + 1 if above else 0)


def test_a_new_generation_begins_anew_and_samples_are_those_named():
    pipe, readout = pipeline("wan21"), TokenReadout()
    edit = ReadTokens(tokens=[2], attention="cross", sink=readout, samples=(1,), passes=("cond",))
    two = {"prompt": ["a red square", "a blue circle moves left"], "steps": 2}
    with visattn.steer(pipe, edit):
        tiny.generate(pipe, negative_prompt=["", ""], **two)
        first = readout.maps(step=0)
        tiny.generate(pipe, negative_prompt=["", ""], **two)
    assert first.shape == (1, 1, 3, 6, 4)
    assert torch.equal(readout.maps(step=0), first)
    readout.clear()
    with pytest.raises(ValueError, match="no maps of the cond pass"):
        readout.maps()


def test_memory_is_linear():
    def make(tokens):
        state = joint_state(tokens)
        edit = ReadTokens(tokens=TOKENS, real=REAL, sink=TokenReadout())
        return lambda: apply_edits(state, [(edit, torch.ones(1))])

    check_linear(make)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": ()}, "must be indices of text tokens"),
        ({"tokens": (1, ())}, "an empty group"),
        ({"real": ()}, "names no token"),
        ({"stream": "text"}, "reads the image rows only"),
    ],
)
def test_what_is_not_to_be_read_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        ReadTokens(**{"tokens": (1,), "sink": TokenReadout(), **options})


def test_refusals_say_what_is_missing():
    pipe = pipeline("wan21")
    sink = TokenReadout()
    with (
        pytest.raises(ValueError, match="use attention='cross'"),
        visattn.steer(pipe, ReadTokens(tokens=(1,), sink=sink)),
    ):
        tiny.generate(pipe, steps=1)
    with pytest.raises(TypeError, match="give a TokenReadout"):
        ReadTokens(tokens=(1,), sink=3)
    with pytest.raises(ValueError, match="a number of steps"):
        TokenReadout(keep=0)
    early = BorrowKeys(sources=(0,), tokens=sink.masks())
    with (
        pytest.raises(ValueError, match="start the edit at a later step"),
        visattn.steer(pipe, early),
    ):
        tiny.generate(pipe, steps=1)
    with pytest.raises(ValueError, match="needs the indices of the real tokens"):
        read(pipe, "wan21")[0].maps(normalise="real")
    with pytest.raises(ValueError, match="part of the prompt"):
        phrase_tokens(pipe.tokenizer, "a red square", "blue")
