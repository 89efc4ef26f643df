"""One event in four data types, and how batches of unequal length are read without waste.

A digit comes as an image, as a short video, as a spoken word (log-mel frames, as many as the word is long) and as typed
letters. Sound and text differ in length from row to row. A batch can be padded and the attention told how many keys are
real (`key_lengths`), or packed end to end with offsets (`varlen_cross_attention`, the layout of Dao et al.,
FlashAttention, 2022); what stands in the padding, even NaN, must not matter, and both layouts must agree. The streams
can also become one sequence with a type for each, as ViLT (Kim et al., 2021) does.

    python examples/data_types.py
"""

from __future__ import annotations

import sys

import torch
from common import Example, data, words
from torch.nn.utils.rnn import pad_sequence

import mmkernels as mmk

BATCH, HEADS, WIDTH = 16, 4, 32


def heads(x: torch.Tensor) -> torch.Tensor:
    """[B, L, HEADS * WIDTH] -> [B, HEADS, L, WIDTH]"""
    return x.unflatten(-1, (HEADS, WIDTH)).transpose(1, 2)


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv)
    events = data.draw_events()
    some = events[:BATCH]
    film = data.video(some.image)  # [B, frames, height, width]
    lengths = some.frames
    typed = [words.embed(data.speech.WORDS[digit]) for digit in some.label.tolist()]  # letter by letter
    letters, text = torch.tensor([len(word) for word in typed]), pad_sequence(typed, batch_first=True)
    rows = [
        ["image", tuple(some.image.shape), "8 x 8 pixels"],
        ["video", tuple(film.shape), f"{film.shape[1]} frames of 16 x 16"],
        ["sound", tuple(some.audio.shape), f"{int(lengths.min())} to {int(lengths.max())} frames are real"],
        ["text", tuple(text.shape), f"{int(letters.min())} to {int(letters.max())} letters are real"],
    ]
    example.table(["modality", "batch", "of which"], rows)

    frame, sound, letter = (torch.randn(n, HEADS * WIDTH) / n**0.5 for n in (64, some.audio.shape[-1], words.WIDTH))
    tokens = film.reshape(BATCH, film.shape[1] * 4, 64)  # four bands of 4 x 16 pixels a frame
    query, key = heads(tokens @ frame), heads(some.audio @ sound)
    spelt = heads(text @ letter)
    padding = torch.arange(data.FRAMES) >= lengths[:, None]
    spoilt = key.masked_fill(padding[:, None, :, None], torch.nan)

    example.time("video reads padded sound", lambda ops: ops.cross_attention(query, key, key, key_lengths=lengths))
    example.time("video reads padded text", lambda ops: ops.cross_attention(query, spelt, spelt, key_lengths=letters))
    padded = mmk.cross_attention(query, spoilt, spoilt, key_lengths=lengths)
    example.check("NaN in the padding does not reach the result", bool(padded.isfinite().all()))

    packed_query = query.transpose(1, 2).flatten(0, 1)  # [sum of Lq, HEADS, WIDTH]
    packed_key = key.transpose(1, 2)[~padding]  # [sum of lengths, HEADS, WIDTH]
    starts_query = torch.arange(0, len(packed_query) + 1, tokens.shape[1], dtype=torch.int32)
    starts_key = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)]).int()
    packed = mmk.varlen_cross_attention(
        packed_query, packed_key, packed_key, starts_query, starts_key, tokens.shape[1], int(lengths.max())
    )
    difference = (packed.unflatten(0, (BATCH, -1)).transpose(1, 2) - padded).abs().max().item()
    example.check(f"packed and padded batches agree (difference {difference:.0e})", difference < 1e-5)
    held = [key.shape[0] * key.shape[2], len(packed_key)]
    print(f"frames held: {held[0]} padded, {held[1]} packed")

    types = torch.randn(3, HEADS * WIDTH)
    streams = [tokens @ frame, some.audio @ sound, text @ letter]
    joined = mmk.concat_tokens(streams, type_embedding=types)
    expected = torch.cat([stream + kind for stream, kind in zip(streams, types, strict=True)], 1)
    example.check("one sequence of all three, each token marked with its type", torch.equal(joined, expected))

    with example.picture(3, 5, size=(8, 5)) as axes:
        for column, digit in enumerate((0, 3, 5, 7, 9)):
            row = int((events.label == digit).nonzero()[0])
            axes[0, column].imshow(events.image[row].view(8, 8).tolist(), cmap="gray_r")
            axes[1, column].imshow(data.video(events.image[row : row + 1], 3, 32)[0].amax(0).tolist(), cmap="gray_r")
            axes[2, column].imshow(events.audio[row].T.tolist(), origin="lower", aspect="auto", cmap="magma")
            axes[0, column].set_title(f"“{data.speech.WORDS[digit]}”")
            for axis in axes[:, column]:
                axis.set(xticks=[], yticks=[])
        for axis, name in zip(axes[:, 0], ("image", "video", "sound, then padding"), strict=True):
            axis.set_ylabel(name)
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
