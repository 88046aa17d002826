"""Each edit of a call against the map written out, dense and within a sparse pattern."""

import math

import pytest
import torch
import torch.nn.functional as F
from support.edited import (
    DIM,
    FIRST,
    GRID,
    HEADS,
    LAST,
    VIDEO,
    WORDS,
    attention,
    caught,
    edited,
    image_of,
    logits,
    softmax,
    tensors,
    text_of,
)

from visattn import Grid, TokenLayout
from visattn.attention.backends.reference import pattern_mask
from visattn.guidance import (
    BlurQueries,
    BorrowKeys,
    LabelBias,
    Perturb,
    RegionMask,
    ReplaceQueries,
    ScaleHeads,
    ScaleTokens,
    ShareKV,
    Temperature,
)
from visattn.guidance.edits.query_edits import blur_matrix
from visattn.guidance.edits.state import State
from visattn.guidance.edits.steer import apply_edits
from visattn.patterns import Neighborhood
from visattn.selectors import TopBlocks

LAYOUTS = {"video": VIDEO, "text first": FIRST, "text last": LAST}
JOINT = {"text first": FIRST, "text last": LAST}
NEAR = Neighborhood((1, 3, 3))
PATTERNS = {"dense": None, "sparse": NEAR}


def close(found, wanted, bound=1e-9):
    assert (found.double() - wanted).abs().max() < bound


layouts = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
joint = pytest.mark.parametrize("layout", JOINT.values(), ids=JOINT)
patterns = pytest.mark.parametrize("pattern", PATTERNS.values(), ids=PATTERNS)


# ---- logit biases by labels


@layouts
@patterns
def test_label_bias(layout, pattern):
    q, k, v = tensors(layout)
    random = torch.Generator().manual_seed(3)
    table = torch.tensor([[0.0, 0.7, -math.inf], [-2.0, 0.0, 0.3]])
    q_labels = torch.randint(0, 2, (layout.length,), generator=random)
    k_labels = torch.randint(0, 3, (2, layout.length), generator=random)
    edit = LabelBias(table=table, q_labels=q_labels, k_labels=k_labels, heads=[0, 2])
    bias = table.double()[q_labels[None, :, None], k_labels[:, None, :]][:, None]
    wanted = attention(q, k, v, layout, pattern, bias)
    # a table's numbers are float32
    close(edited(edit, q, k, v, layout, pattern)[:, [0, 2]], wanted[:, [0, 2]], 1e-6)
    close(edited(edit, q, k, v, layout, pattern)[:, 1], attention(q, k, v, layout, pattern)[:, 1])


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
def test_label_bias_in_half_precision(dtype, bound):
    q, k, v = tensors(FIRST, dtype=dtype)
    table = torch.tensor([[0.0, 0.7, -math.inf], [-1.3, 0.0, 0.3]])
    q_labels = torch.arange(FIRST.length) % 2
    k_labels = torch.arange(FIRST.length) % 3
    edit = LabelBias(table=table, q_labels=q_labels, k_labels=k_labels)
    bias = table.double()[q_labels[:, None], k_labels]
    found = edited(edit, q, k, v, FIRST)
    close(found, attention(q, k, v, FIRST, bias=bias), bound)
    plain = attention(q, k, v, FIRST)
    assert (found.double() - plain).abs().max() > 10 * bound  # the bias is seen


def regions(layout):
    """Two regions that overlap and a background; each text token is one's, the last everyone's."""
    bits = torch.zeros(layout.length, dtype=torch.int64)
    image = image_of(layout)
    place = torch.arange(GRID.numel) % GRID.width
    bits[image] = torch.tensor([1, 3, 4])[place]
    if layout.texts:
        bits[text_of(layout)] = torch.tensor([1, 2, 2, 4, 7])
    return bits


@layouts
@patterns
def test_region_mask(layout, pattern):
    q, k, v = tensors(layout)
    bits = regions(layout)
    allowed = (bits[:, None] & bits) != 0
    mask = allowed if pattern is None else allowed & pattern_mask(pattern, layout)
    assert mask.any(1).all()
    wanted = logits(q, k).masked_fill(~mask, -math.inf).softmax(-1) @ v
    close(edited(RegionMask(q_bits=bits), q, k, v, layout, pattern), wanted)


@layouts
def test_mask_within_a_chosen_pattern(layout):
    """Blocks chosen at run time, and the mask with them: forbidden keys weigh nothing."""
    q, k, v = tensors(layout)
    bits = regions(layout)
    v[:, :, bits == 4] = 1e6  # would be seen
    edit = RegionMask(q_bits=torch.where(bits == 4, 4, 8))
    found = edited(edit, q, k, v, layout, TopBlocks(keep=1, block=8))
    assert found[:, :, bits != 4].abs().max() < 1e3
    assert not found.isnan().any()


@layouts
@patterns
def test_row_without_a_key_sees_itself_and_its_text(layout, pattern):
    q, k, v = tensors(layout)
    image = image_of(layout)
    lonely = image[4]
    q_bits = torch.ones(layout.length, dtype=torch.int64)
    k_bits = torch.ones(layout.length, dtype=torch.int64)
    q_bits[lonely] = 2
    own = [int(lonely)]
    if layout.texts:
        k_bits[text_of(layout)[:2]] = 3
        own += text_of(layout)[:2].tolist()
    else:
        k_bits[lonely] = 4
    found = edited(RegionMask(q_bits=q_bits, k_bits=k_bits), q, k, v, layout, pattern)
    assert not found.isnan().any()
    row = logits(q, k)[:, :, lonely]
    if layout.texts:  # the text is a key: no rescue is needed, and itself is not seen
        own = own[1:]
    wanted = (row[..., own].softmax(-1)[..., None] * v[:, :, own]).sum(2)
    close(found[:, :, lonely], wanted)


@patterns
def test_text_row_without_a_key_sees_itself_where_image_rows_have_a_gain(pattern):
    q, k, v = tensors(FIRST)
    k_bits = torch.ones(FIRST.length, dtype=torch.int64)
    q_bits = k_bits.clone()
    q_bits[1] = 2
    gain = Temperature(temperature=1.5, keys="text", stream="image")
    found = edited([RegionMask(q_bits=q_bits, k_bits=k_bits), gain], q, k, v, FIRST, pattern)
    close(found[:, :, 1], v[:, :, 1])


# ---- columns


@pytest.mark.parametrize("scale", [0.0, 0.4, 2.5, -1.0])
@joint
@patterns
def test_scaled_tokens_of_joint_attention(layout, pattern, scale):
    q, k, v = tensors(layout)
    weights = softmax(q, k, layout, pattern)
    columns = text_of(layout)[[1, 3]]
    factor = torch.ones(layout.length, dtype=torch.float64)
    factor[columns] = scale
    image = image_of(layout)
    changed = weights.clone()
    changed[:, :, image] = (weights * factor)[:, :, image]
    edit = ScaleTokens(tokens=(1, 3), scale=scale, stream="image")
    close(edited(edit, q, k, v, layout, pattern), changed @ v)
    changed = weights * factor
    both = changed.clone()
    both[:, :, columns[:, None], image] *= scale
    edit = ScaleTokens(tokens=(1, 3), scale=scale, both_ways=True)
    changed[:, :, text_of(layout)] = weights[:, :, text_of(layout)] * factor
    close(edited(edit, q, k, v, layout, pattern), both @ v)


@pytest.mark.parametrize("scale", [0.0, 0.4, 2.5])
@patterns
def test_scaled_tokens_renormalised(pattern, scale):
    q, k, v = tensors(FIRST)
    bias = torch.zeros(FIRST.length, dtype=torch.float64)
    bias[[1, 3]] = math.log(scale) if scale else -math.inf
    edit = ScaleTokens(tokens=(1, 3), scale=scale, renormalise=True)
    close(edited(edit, q, k, v, FIRST, pattern), attention(q, k, v, FIRST, pattern, bias), 1e-6)


def test_scaled_tokens_of_cross_attention():
    q, k, v = tensors(VIDEO, WORDS)
    weights = softmax(q, k, VIDEO)
    weights[..., 2] *= 3
    edit = ScaleTokens(tokens=(2,), scale=3.0, attention="cross")
    close(edited(edit, q, k, v, VIDEO, kv_layout=WORDS), weights @ v)


# ---- temperatures


@joint
@pytest.mark.parametrize("stream", ["all", "image", "text"])
@pytest.mark.parametrize("keys", ["all", "text", "image"])
def test_temperature(layout, stream, keys):
    q, k, v = tensors(layout)
    text, image = text_of(layout), image_of(layout)
    factor = torch.ones(layout.length, layout.length, dtype=torch.float64)
    rows = {"all": torch.arange(layout.length), "image": image, "text": text}
    factor[rows[stream][:, None], rows[keys]] = 1 / 0.6
    edit = Temperature(temperature=0.6, stream=stream, keys=keys, heads=[1])
    wanted = attention(q, k, v, layout)
    wanted[:, 1] = ((logits(q, k) * factor).softmax(-1) @ v)[:, 1]
    close(edited(edit, q, k, v, layout), wanted)


def test_entropy_grows_with_the_temperature():
    q, k, _ = tensors(VIDEO)
    one = torch.eye(VIDEO.length, dtype=torch.float64).expand(2, HEADS, -1, -1)
    entropies = []
    for temperature in (0.3, 0.7, 1.0, 1.5, 4.0):
        own = edited(Temperature(temperature=temperature), q, k, k, VIDEO)
        weights = attention(q / temperature, k, one, VIDEO)
        close(own, weights @ k)
        entropies.append(float(-(weights * weights.log()).sum(-1).mean()))
    assert entropies == sorted(entropies)


# ---- queries


@pytest.mark.parametrize("grid", [Grid(1, 5, 8), Grid(3, 4, 5), Grid(1, 2, 3)])
@pytest.mark.parametrize("sigma", [0.4, 1.0, 2.5])
@pytest.mark.parametrize("whole", [False, True])
def test_blur_is_a_convolution_with_reflected_borders(grid, sigma, whole):
    """By default with no more taps than an axis has tokens, or one more where that is even, as the
    authors' code on square images."""
    layout = TokenLayout(grid, text_before=3)
    q, k, v = tensors(layout)
    image = q[:, :, 3:].unflatten(2, grid.shape)
    for axis, size in enumerate(grid.shape):
        taps = math.ceil(6 * sigma)
        taps += taps % 2 == 0
        taps = taps if whole else min(taps, size + (size % 2 == 0))
        at = torch.arange(taps, dtype=torch.float64) - taps // 2
        kernel = (-0.5 * (at / sigma) ** 2).exp()
        kernel = kernel / kernel.sum()
        own = image.movedim(2 + axis, -1)
        inside = [min(n % period, -n % period) for n in range(-(taps // 2), size + taps // 2)] if (
            period := 2 * (size - 1)
        ) else [0] * (size + taps - 1)
        padded = own[..., inside].reshape(-1, 1, len(inside))
        image = F.conv1d(padded, kernel[None, None]).reshape(own.shape).movedim(-1, 2 + axis)
    new = q.clone()
    new[:, :, 3:] = image.flatten(2, 4)
    blur = BlurQueries(sigma=sigma, whole_kernel=whole)
    close(edited(blur, q, k, v, layout), attention(new, k, v, layout))


@layouts
def test_blur_at_its_ends(layout):
    q, k, v = tensors(layout)
    plain = edited([], q, k, v, layout)
    assert edited(BlurQueries(sigma=0), q, k, v, layout).equal(plain)
    close(edited(BlurQueries(sigma=1e-3), q, k, v, layout), plain.double(), 1e-12)
    image = image_of(layout)
    found = edited(BlurQueries(sigma=1e5), q, k, v, layout)
    row = attention(q[:, :, image].mean(2, keepdim=True), k, v, layout)
    close(found[:, :, image], row.expand_as(found[:, :, image]))
    if layout.texts:
        assert found[:, :, text_of(layout)].equal(plain[:, :, text_of(layout)])
    assert blur_matrix(4, 40.0, True).sum(1).sub(1).abs().max() < 1e-12


def test_queries_of_another_sample():
    q, k, v = tensors(VIDEO)
    mine = q.clone()
    mine[1] = q[0]
    close(
        edited(ReplaceQueries(source=0, samples=(1,)), q, k, v, VIDEO),
        attention(mine, k, v, VIDEO),
    )


# ---- keys and values of other samples


@layouts
@patterns
@pytest.mark.parametrize("what", ["both", "keys", "values"])
def test_shared_keys(layout, pattern, what):
    q, k, v = tensors(layout, batch=3)
    edit = ShareKV(source=0, samples=(2,), what=what, heads=[0, 1])
    new_k, new_v = k.clone(), v.clone()
    if what != "values":
        new_k[2, :2] = k[0, :2]
    if what != "keys":
        new_v[2, :2] = v[0, :2]
    wanted = attention(q, new_k, new_v, layout, pattern)
    close(edited(edit, q, k, v, layout, pattern), wanted)
    same = edited(ShareKV(source=2, samples=(2,)), q, k, v, layout, pattern)
    assert same.equal(edited([], q, k, v, layout, pattern))


@layouts
@patterns
def test_borrowed_keys_are_one_softmax_with_ones_own(layout, pattern):
    q, k, v = tensors(layout, batch=3)
    random = torch.Generator().manual_seed(1)
    image = image_of(layout)
    tokens = torch.rand(3, GRID.numel, generator=random) < 0.5
    edit = BorrowKeys(sources=(0, 1), samples=(1, 2), tokens=tokens, heads=[0, 2])
    found = edited(edit, q, k, v, layout, pattern)
    wanted = attention(q, k, v, layout, pattern)
    own = logits(q, k)
    if pattern is not None:
        own = own.masked_fill(~pattern_mask(pattern, layout), -math.inf)
    for sample in (1, 2):
        others = [s for s in (0, 1) if s != sample]
        more_k = torch.cat([k[s][:, image[tokens[s]]] for s in others], 1)
        more_v = torch.cat([v[s][:, image[tokens[s]]] for s in others], 1)
        both = torch.cat([own[sample], q[sample] @ more_k.mT * DIM**-0.5], -1).softmax(-1)
        mine = both @ torch.cat([v[sample], more_v], 1)
        wanted[sample, [0, 2]] = mine[[0, 2]]
    close(found, wanted)


def test_strength_is_what_a_borrowed_key_weighs():
    q, k, v = tensors(VIDEO)
    found = edited(BorrowKeys(sources=(0,), samples=(1,), heads={0: 0.3}), q, k, v, VIDEO)
    own, other = (x[1, 0] @ y[0].mT * DIM**-0.5 for x, y in ((q, k[1]), (q, k[0])))
    both = torch.cat([own, other + math.log(0.3)], -1).softmax(-1)
    close(found[1, 0], both @ torch.cat([v[1, 0], v[0, 0]]), 1e-7)  # it is float32


@patterns
def test_policy_of_image_rows_goes_by_the_logits_as_they_are_edited(pattern):
    """A text token that a row may not see is in neither target."""
    q, k, v = tensors(FIRST)
    table = torch.tensor([[0.0, -torch.inf, 0.7]])
    k_labels = torch.zeros(FIRST.length, dtype=torch.int64)
    k_labels[2], k_labels[4] = 1, 2
    q_labels = torch.zeros(FIRST.length, dtype=torch.int64)
    bias = LabelBias(table=table, q_labels=q_labels, k_labels=k_labels)
    text, image = text_of(FIRST), image_of(FIRST)
    own = softmax(q, k, FIRST, pattern, table[0, k_labels].double())
    apart = own.clone()  # the text's weights are kept
    apart[..., image] = 0
    eye = torch.eye(FIRST.length, dtype=torch.float64)
    kept = eye.bool() | (torch.arange(FIRST.length) < len(text))  # the text, and the token itself
    alone = (logits(q, k) + table[0, k_labels]).masked_fill(~kept, -torch.inf).softmax(-1)
    wanted = {
        "self_for_image": apart + eye * (1 - apart.sum(-1, keepdim=True)),
        "self_and_text": alone,
    }
    for target, map_ in wanted.items():
        found = edited([bias, Perturb(target=target)], q, k, v, FIRST, pattern)
        close(found[:, :, image], (map_ @ v)[:, :, image])
        close(found[:, :, text], (own @ v)[:, :, text])


def test_drawn_tokens_are_seeded():
    q, k, v = tensors(VIDEO)

    def drawn(seed, step=0):
        edit = BorrowKeys(sources=(0,), samples=(1,), share=0.5, seed=seed)
        return edited(edit, q, k, v, VIDEO, step=step)

    assert drawn(0).equal(drawn(0))
    assert not drawn(0).equal(drawn(1))
    assert not drawn(0).equal(drawn(0, step=1))


# ---- the output


def test_scaled_heads():
    q, k, v = tensors(FIRST)
    found = edited(ScaleHeads(scale=2.5, heads={0: 1.0, 2: 0.5}, stream="image"), q, k, v, FIRST)
    wanted = attention(q, k, v, FIRST)
    wanted[:, 0, 5:] *= 2.5
    wanted[:, 2, 5:] *= 1.75
    close(found, wanted)


def test_head_at_strength_one_is_its_target_whatever_it_was():
    q, k, v = tensors(VIDEO)
    q[:, 1] = math.nan
    found = edited(Perturb(heads=[1]), q, k, v, VIDEO)
    assert found[:, 1].equal(v[:, 1])
    assert not found.isnan().any()


def test_strengths_may_differ_by_sample():
    q, k, v = tensors(VIDEO)
    strength = torch.tensor([[0.0, 1.0, 0.5], [0.25, 0.0, 0.0]])
    out = apply_edits(State(caught(q, k, v, VIDEO), 0, None, q, k, v), [(Perturb(), strength)])
    own = strength.double()[..., None, None]
    close(out, (1 - own) * attention(q, k, v, VIDEO) + own * v)


# ---- together


NOTHING = {
    "scale tokens": ScaleTokens(tokens=(0,), scale=1.0),
    "renormalised": ScaleTokens(tokens=(0,), scale=1.0, renormalise=True),
    "scale heads": ScaleHeads(scale=1.0),
    "temperature": Temperature(temperature=1.0),
    "blur": BlurQueries(sigma=0.0),
    "perturb": Perturb(heads=0.0),
    "mean": Perturb(heads=0.0, target="mean"),
    "no heads": ScaleHeads(scale=3.0, heads=0.0),
    "borrowed": BorrowKeys(sources=(0,), samples=(0,)),
}


@pytest.mark.parametrize("edit", NOTHING.values(), ids=NOTHING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@patterns
def test_edits_of_nothing_are_equal_to_the_bit(edit, dtype, pattern):
    q, k, v = tensors(FIRST, dtype=dtype)
    assert edited(edit, q, k, v, FIRST, pattern).equal(edited([], q, k, v, FIRST, pattern))


@patterns
def test_stages_have_one_order(pattern):
    """Queries, keys, bias, kernel, columns, lerp, output: whatever the order of the list."""
    q, k, v = tensors(FIRST)
    bits = regions(FIRST)
    edits = [
        ScaleHeads(scale=2.0, heads=[0]),
        Perturb(heads={0: 0.5, 1: 0.25}, stream="image"),
        ScaleTokens(tokens=(2,), scale=0.5),
        RegionMask(q_bits=bits),
        ShareKV(source=0, samples=(1,)),
        Temperature(temperature=2.0),
    ]
    k, v = k.clone(), v.clone()
    allowed = (bits[:, None] & bits) != 0
    if pattern is not None:
        allowed = allowed & pattern_mask(pattern, FIRST)
    shared_k, shared_v = k[:1].expand_as(k), v[:1].expand_as(v)
    weights = (logits(q, shared_k) / 2).masked_fill(~allowed, -math.inf).softmax(-1)
    weights[..., 2] *= 0.5
    out = weights @ shared_v
    strength = torch.tensor([0.5, 0.25, 0.0]).double()[:, None, None]
    image = image_of(FIRST)
    moved = out[:, :, image] * (1 - strength) + shared_v[:, :, image] * strength
    out[:, :, image] = moved
    out[:, 0] *= 2
    close(edited(edits, q, k, v, FIRST, pattern), out)
    close(edited(edits[::-1], q, k, v, FIRST, pattern), out)
