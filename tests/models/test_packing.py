"""Packed rows give what rows alone give, in every family that mixes tokens by attention alone."""

import pytest
import torch
from families import FAMILIES, LATENT, ROUTED, build

from pomona.models.packing import ATTENTION, can_pack, packed_arguments, packing_of

# Attention sinks are eager only; state spaces and convolutions run on from row to row.
APART = {"gpt_oss", "jamba", "lfm2_moe"}
LENGTHS = [[5, 12], [1], [7, 7, 3]]


def rows() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    flat = [length for own in LENGTHS for length in own]
    return [torch.randint(3, 60, (length,), generator=generator) for length in flat]


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_packed_give_what_they_give_alone(family):
    model = FAMILIES[family]()
    before = model.config._attn_implementation
    assert can_pack(model, 16) == (family not in APART)
    if family in APART:
        assert model.config._attn_implementation == before
        return
    packing = packing_of(LENGTHS, torch.device("cpu"))
    with torch.no_grad():
        packed = model(**packed_arguments(torch.cat(rows()), packing)).logits[0]
        for found, row in zip(packed.split([len(r) for r in rows()]), rows(), strict=True):
            alone = model(input_ids=row.unsqueeze(0), use_cache=False).logits[0]
            torch.testing.assert_close(found, alone, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [6, 12, 15])
def test_a_window_that_is_shorter_than_a_row_is_seen(window):
    model = build("Mistral", {"intermediate_size": 48, "sliding_window": window})
    assert not can_pack(model, 16)
    assert model.config._attn_implementation == "sdpa"
    assert can_pack(model, window)
    packing = packing_of([[window + 1]], torch.device("cpu"))
    with pytest.raises(
        ValueError, match=f"{window + 1} tokens, and attention a window of {window}"
    ):
        model(**packed_arguments(torch.arange(window + 1), packing))


@pytest.mark.parametrize("family", sorted(set(FAMILIES)))
def test_bfloat16_tells_the_same_families_apart(family):
    """A convolution's leak is at the beginning of a row alone, and rounding everywhere."""
    model = FAMILIES[family]().bfloat16()
    assert can_pack(model, 128) == (family not in APART)


def test_a_family_that_looks_at_the_name_of_its_attention_is_left_alone():
    """DeepSeek-V3.2 has its sparse mask only if attention is called eager or SDPA."""
    sparse = {"index_topk": 4, "index_n_heads": 2, "index_head_dim": 16}
    model = build("DeepseekV32", LATENT | ROUTED | sparse | {"n_group": 1, "topk_group": 1})
    ids_BT = torch.cat(rows())[:16].unsqueeze(0)
    with torch.no_grad():
        before = model(input_ids=ids_BT).logits
        assert not can_pack(model, 16)
        assert torch.equal(model(input_ids=ids_BT).logits, before)


def test_a_model_that_can_pack_still_takes_padded_rows_and_generates():
    model, plain = FAMILIES["mixtral"](), FAMILIES["mixtral"]()
    assert can_pack(model, 16)
    assert model.config._attn_implementation == ATTENTION
    ids_BT = torch.stack([row[:5] for row in rows() if len(row) >= 5])
    mask_BT = torch.ones_like(ids_BT)
    mask_BT[0, 3:] = 0
    for given in ({}, {"attention_mask": mask_BT}):
        with torch.no_grad():
            found, expected = (m(input_ids=ids_BT, **given).logits for m in (model, plain))
        assert torch.equal(found, expected)
    asked = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    assert torch.equal(model.generate(ids_BT, **asked), plain.generate(ids_BT, **asked))


def test_rows_of_like_length_are_side_by_side():
    """Longest first; a row joins while it has four fifths of the longest."""
    packing = packing_of([[10, 3], [9, 3, 8]], torch.device("cpu"))
    assert packing.shapes == ((3, 10), (2, 3))
    assert packing.split.sizes == (13, 20)
    assert packing.position_N.tolist() == [*range(10), *range(3), *range(9), *range(3), *range(8)]
    assert len(set(packing.place_N.tolist())) == 33
    assert packing.place_N.max() < 36
