"""The dropout of attention: the generator behind its masks, and the share that they drop."""

from __future__ import annotations

import torch
from torch import Tensor

import mmkernels as mmk
from mmkernels.ops.cross_attention import reference


def test_philox_gives_the_known_answers() -> None:
    """Vectors of the Random123 distribution (kat_vectors, philox4x32 with 10 rounds)."""
    known = [
        ((0, 0), (0, 0, 0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 2, (0xFFFFFFFF,) * 4, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0xA4093822, 0x299F31D0),
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ]
    for key, counter, words in known:
        got = reference.philox4x32(tuple(map(torch.tensor, key)), tuple(map(torch.tensor, counter)))
        assert tuple(int(w) for w in got) == words


def test_dropout_drops_the_share_it_is_asked_to_and_follows_the_generator(backend: str) -> None:
    q = torch.zeros(2, 3, 64, 4)
    v = torch.eye(64).expand(2, 3, 64, 64)

    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return mmk.cross_attention(q, q, v, dropout_p=0.3)  # the probabilities themselves, 1/64 each before dropout

    first = draw(0)
    dropped = first == 0
    assert abs(float(dropped.float().mean()) - 0.3) < 0.01
    torch.testing.assert_close(first[~dropped], torch.full_like(first[~dropped], 1 / 64 / 0.7))
    assert torch.equal(first, draw(0))
    assert not torch.equal(first, draw(1))
    assert not torch.equal(dropped[0, 0], dropped[0, 1])
    assert not torch.equal(dropped[0], dropped[1])
