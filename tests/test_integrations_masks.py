"""Masks of transformers' attention interface: in their compact form they mean what the dense ones do."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from architectures import keep, random, why_no_models
from torch import nn

NO_MODELS = why_no_models()
pytestmark = pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))

MASKS = {  # what transformers builds its masks of, and whether ours says it without the dense form
    "causal": ("causal", None, 0, True),
    "causal, padded on the right": ("causal", "right", 0, True),
    "causal, padded on the left": ("causal", "left", 0, False),
    "causal after a cache": ("causal", None, 5, True),
    "causal after a cache, padded on the left": ("causal", "left", 5, False),
    "causal into a static cache": ("causal", None, 2, False),
    "bidirectional, padded on the right": ("bidirectional", "right", 0, True),
    "bidirectional, padded on the left": ("bidirectional", "left", 0, False),
    "window": ("window", None, 0, True),
    "window after a cache": ("window", None, 5, True),
    "window, padded on the right": ("window", "right", 0, True),
    "packed": ("packed", None, 0, False),
    "chunked": ("chunked", None, 0, False),
}


@pytest.fixture
def bert() -> Iterator[nn.Module]:
    module = nn.Module()
    module.is_causal = True  # a mask decides, not this
    yield module


@pytest.mark.parametrize("name", MASKS)
def test_masks_in_their_compact_form_are_the_dense_ones(name, bert):
    from transformers import masking_utils as utils

    from mmkernels.integrations.transformers.interface import _COMPACT, attention, attention_mask

    kind, padding, before, is_compact = MASKS[name]
    queries, keys = (8, 8 + before) if "static" not in name else (4, 8)
    function = {
        "causal": utils.causal_mask_function,
        "bidirectional": utils.bidirectional_mask_function,
        "window": utils.sliding_window_causal_mask_function(3),
        "packed": utils.and_masks(
            utils.causal_mask_function, utils.packed_sequence_mask_function(torch.tensor([[0] * 3 + [1] * 5] * 3))
        ),
        "chunked": utils.chunked_causal_mask_function(3, torch.zeros(3, dtype=torch.int)),
    }[kind]
    mask = None if padding is None else keep(3, keys).bool()
    if padding == "left":
        mask = mask.flip(1)
    arguments = (3, queries, keys, before, 0, function, mask)
    dense = utils.sdpa_mask(*arguments, allow_is_causal_skip=False)
    ours = attention_mask(*arguments)
    assert torch.equal(ours, dense)
    assert hasattr(ours, _COMPACT) == is_compact
    q, k, v = random(3, 4, queries, 16), random(3, 2, keys, 16, seed=3), random(3, 2, keys, 16, seed=4)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, enable_gqa=True).transpose(1, 2)
    got, weights = attention(bert, q, k, v, ours)
    assert weights is None
    seen = dense.any(-1)[:, 0, :, None, None]  # what sdpa gives for rows that see nothing is its own
    torch.testing.assert_close(torch.where(seen, got, 0.0), torch.where(seen, expected, 0.0))
    assert not torch.where(seen, 0.0, got).any()
    if is_compact and padding is not None:
        ours[:, :, :, 0] = False  # the dense form has changed, and decides
        changed = attention(bert, q, k, v, ours)[0]
        expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=ours, enable_gqa=True).transpose(1, 2)
        seen = ours.any(-1)[:, 0, :, None, None]
        torch.testing.assert_close(torch.where(seen, changed, 0.0), torch.where(seen, expected, 0.0))


def test_a_mask_that_is_absent_means_what_the_module_says(bert):
    from mmkernels.integrations.transformers.interface import attention

    q, k, v = (random(2, 4, 6, 16, seed=i) for i in range(3))
    for module, given, causal in (
        (bert, None, True),
        (bert, False, False),
        (nn.Module(), None, False),  # Mllama's image encoder says nothing, and is not causal
        (nn.Module(), True, True),
    ):
        expected = nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal).transpose(1, 2)
        torch.testing.assert_close(attention(module, q, k, v, None, is_causal=given)[0], expected)


@pytest.mark.parametrize("kind", ["bool", "additive"])
def test_one_mask_of_padding_may_serve_a_batch(kind, bert):
    from mmkernels.integrations.transformers.interface import attention

    q, k, v = (random(2, 4, 6, 16, seed=i) for i in range(3))
    mask = (torch.arange(6) < 4)[None, None, None]
    if kind == "additive":
        mask = torch.where(mask, 0.0, torch.finfo(torch.float32).min)
    expected = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask).transpose(1, 2)
    torch.testing.assert_close(attention(bert, q, k, v, mask)[0], expected)
