"""Packed bit tiles, and the lists that the kernel for Hopper reads, against the rules."""

import pytest
import torch
from support.cases import LAYOUTS, draw
from support.kernel_cases import UNIONS

from visattn.attention.lowering import lower_cached
from visattn.blocks import bit_masks as bittiles
from visattn.blocks.bank import MapBank
from visattn.blocks.bit_masks import packed_words
from visattn.blocks.device_lists import BITS, DeviceMaps, device_maps
from visattn.patterns import PATTERNS, Dense, Neighborhood, Pattern, Skip

CPU = torch.device("cpu")
NAMES = ["video_7x4x6", "video_7x5x3_text_31", "two_grids_text_between", "prefix_and_text"]


def kept_pairs(packed: DeviceMaps, head: int, length_q: int, length_k: int) -> torch.Tensor:
    """What the kernel keeps of a head, from the tensors that it reads: bool ``[Lq, Lk]``."""
    lists, (block_q, block_k) = packed.lists, packed.block
    out = torch.zeros(length_q, length_k, dtype=torch.bool)
    q_index, k_index = lists["q_index"], lists["k_index"]
    shifts = torch.arange(32)
    for row in lists["work"].tolist():
        if row[0] != head:
            continue
        place = torch.arange(row[4], row[4] + row[5])
        queries = q_index[row[12]][place].long() if packed.ordered[0] else place
        for j in range(row[7], row[11]):
            number = int(lists["tile_of"][j])
            tile = torch.ones(block_q, block_k, dtype=torch.bool)
            if number >= 0:
                bits = (lists["bits"][number][:, :, None] >> shifts) & 1
                tile = bits.flatten(1)[:, :block_k].bool()
            first = int(lists["firsts"][j])
            keys = torch.arange(first, min(first + block_k, length_k))
            tile = tile[: row[5], : len(keys)]
            if packed.ordered[1]:
                keys = k_index[row[13]][keys].long()
            assert not bool(out[queries[:, None], keys][tile].any()), "a pair that is visited twice"
            out[queries[:, None], keys] |= tile
    return out


@pytest.mark.sampled(4)
@pytest.mark.parametrize("layout_name", NAMES)
@pytest.mark.parametrize("name", [*PATTERNS, *UNIONS])
def test_the_lists_keep_what_the_rule_keeps(name: str, layout_name: str) -> None:
    layout = LAYOUTS[layout_name]
    if name in UNIONS:
        if len(layout.grids) > 1 or layout.grids[0][1].numel < 41:
            pytest.skip("these rules name columns of one grid")
        pattern: Pattern = UNIONS[name]
    else:
        pattern = draw(name, layout, 1)
    own = lower_cached(pattern, layout, None, 16, 32)
    packed = device_maps([own, own], 1, CPU, 2, words=True)
    assert packed.kinds == (BITS, 0)
    places = torch.arange(layout.length)
    expected = pattern.allows(places[:, None], places, layout)
    for head in (0, 1):
        assert torch.equal(kept_pairs(packed, head, len(places), len(places)), expected)


def test_tiles_are_stored_once_and_within_the_limit() -> None:
    layout = LAYOUTS["video_8x8x8_aligned"]
    maps = [lower_cached(p, layout, None, 16, 32) for p in (Neighborhood(3), Dense(), Skip())]
    bank = MapBank.of(maps)
    found = packed_words(bank, CPU, 1 << 20)
    assert found is not None
    tile_of, words = found
    assert len(tile_of) == len(bank.columns) + 1
    assert len(words.unique(dim=0)) == len(words) < maps[0].num_partial
    assert packed_words(bank, CPU, 4 * words.numel()) is not None
    assert packed_words(bank, CPU, 4 * words.numel() - 1) is None
    assert device_maps(maps, 3, CPU, words=True).lists["firsts"].shape == tile_of.shape


def test_lists_of_maps_that_visit_nothing_have_a_place() -> None:
    layout = LAYOUTS["video_7x5x3_text_31"]
    maps = [lower_cached(Skip(), layout, None, 16, 32)] * 2
    lists = device_maps(maps, 2, CPU, words=True).lists
    for name in ("columns", "firsts", "tile_of", "bits"):
        assert len(lists[name]) >= 1, name


def test_tiles_of_equal_sums_are_kept_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bittiles.torch, "randint", lambda *args, **kwargs: torch.zeros(2, 1).long())
    words = torch.tensor([[[0, 3]], [[3, 0]], [[0, 3]]], dtype=torch.int32)
    found, number = bittiles._distinct(words)
    assert torch.equal(found[number], words)


def test_a_map_past_the_limit_keeps_its_predicates(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("visattn.blocks.device_lists.WORDS_LIMIT", 0)
    layout = LAYOUTS["video_8x8x8_aligned"]
    maps = [lower_cached(Neighborhood(3), layout, None, 16, 32)]
    packed = device_maps(maps, 1, CPU, words=True)
    assert packed.kinds != (BITS, 0) and "firsts" not in packed.lists
