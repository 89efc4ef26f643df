"""What does the customer want, and how angry is he? From what he says and what he types, when half of it is lost.

A request names its subject (return, invoice, contract, router, tariff); "please" may stand beside it, or "again". The
subject is also spoken on a bad line, by an angry voice (high, fast, loud) or a calm one. Some are polite and angry, so
the mood, which counts how many of the two signs there are, needs both senses. Words attend to the sound frames that
were heard by `cross_attention` with `key_lengths`, so that speech cut off is a shorter key (Tsai et al., Multimodal
Transformer for Unaligned Multimodal Language Sequences, 2019), and `concat_norm_linear` joins what was read and heard.
Intent and mood are learnt together, from requests some of which are spoken alone (Neverova et al., ModDrop, 2016). Then
speech is cut off and words are misspelt, and each sense is tried alone.

    python examples/customer_service.py
"""

from __future__ import annotations

import sys
from functools import cache, partial

import torch
from common import Example, accuracy, data, words
from common.speech import BANDS, HOP, log_mel, synthesised
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

INTENTS = {"return": "ritarn", "invoice": "invois", "contract": "kontrakt", "router": "ruter", "tariff": "tarif"}
FORMS = {"polite": ["please", "thanks", "kindly"], "plain": ["my", "the", "a"], "rude": ["again", "finally", "useless"]}
MOODS = ["calm", "unhappy", "angry"]  # by how many of the two senses sound so
FRAMES, WIDTH, HEADS, CALLERS, NOISE, WAYS = 20, 32, 4, 12, 2.0, 100  # WAYS to mistype a word
CASES = {"whole": {}, "speech cut off": dict(lost=0.7), "misspelt": dict(errors=4)}
CASES["cut off and misspelt"] = CASES["speech cut off"] | CASES["misspelt"]
SENSES = ["text and speech", "text", "speech"]


@cache
def voices() -> list[list[list[Tensor]]]:
    """Each subject, said calmly and said angrily, by each caller."""
    generator = torch.Generator().manual_seed(0)
    spoken = []
    for sounds in INTENTS.values():
        spoken.append([])
        for angry in (0, 1):
            draws = [torch.rand(3, generator=generator).tolist() for _ in range(CALLERS)]
            waves = [
                synthesised(
                    sounds, (100 + 60 * p) * (1 + 0.6 * angry), 0.9 + 0.3 * s + 0.3 * angry, 0.9 + 0.25 * t, generator
                )
                for p, s, t in draws
            ]
            spoken[-1].append([wave / wave.square().mean().sqrt() * (1 + angry) for wave in waves])
    return spoken


@cache
def typed(errors: int, seed: int) -> dict[str, Tensor]:
    """[WAYS, words.WIDTH] of each word: it mistyped in `errors` letters."""
    generator = torch.Generator().manual_seed(seed)
    said = [*INTENTS, *(word for form in FORMS.values() for word in form)]
    ways = [data.misspelt(word, errors, generator) for word in said for _ in range(WAYS)]
    return dict(zip(said, words.embed(ways).split(WAYS), strict=True))


def requests(count: int, seed: int, lost: float = 0.0, errors: int = 0) -> dict[str, Tensor]:
    """Typed and spoken requests; speech stops after all but `lost` of it, `errors` letters a word are mistyped."""
    intent = torch.randint(len(INTENTS), (count,))
    form, angry = torch.randint(3, (count,)), torch.randint(2, (count,))
    written, waves = [], []
    for i, f, a in zip(intent.tolist(), form.tolist(), angry.tolist(), strict=True):
        beside = list(FORMS.values())[f][int(torch.randint(3, ()))]
        said = [list(INTENTS)[i], beside]
        written.append(torch.stack([typed(errors, seed)[word][int(torch.randint(WAYS, ()))] for word in said]))
        waves.append(voices()[i][a][int(torch.randint(CALLERS, ()))])
    frames = torch.tensor([len(wave) // HOP + 1 for wave in waves]).clamp_max(FRAMES)
    sound = pad_sequence(waves, batch_first=True)
    mel = log_mel(sound + NOISE * torch.randn(sound.shape))[:, :FRAMES] / 5
    heard = (frames * (1 - lost)).long().clamp_min(1)
    mel = F.pad(mel, (0, 0, 0, FRAMES - mel.shape[1]))
    return dict(written=torch.stack(written), sound=mel, heard=heard, intent=intent, mood=angry + (form == 2))


class Service(nn.Module):
    def __init__(self, ops, senses: str) -> None:
        super().__init__()
        self.ops, self.senses = ops, senses
        self.read, self.hear = nn.Linear(words.WIDTH, WIDTH), nn.Linear(BANDS, WIDTH)
        self.asked, self.time = (nn.Parameter(0.3 * torch.randn(n, WIDTH)) for n in (2, FRAMES))
        self.query, self.key_value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.norm, self.join = nn.LayerNorm(4 * WIDTH), nn.Linear(4 * WIDTH, 2 * WIDTH)
        self.intent, self.mood = nn.Linear(2 * WIDTH, len(INTENTS)), nn.Linear(2 * WIDTH, len(MOODS))

    def forward(self, written, sound, heard):
        """Logits of the intent [B, 5] and of the mood [B, 3]."""
        asked = self.read(written if "text" in self.senses else torch.zeros_like(written)).relu() + self.asked
        frames = (self.hear(sound) + self.time[: sound.shape[1]]).relu()
        query = self.query(asked).unflatten(-1, (HEADS, -1)).transpose(1, 2)
        key, value = self.key_value(frames).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        read = self.ops.cross_attention(query, key, value, key_lengths=heard).transpose(1, 2).flatten(2)
        read = read if "speech" in self.senses else torch.zeros_like(read)
        xs = [asked.flatten(1), read.flatten(1)]
        layers = self.norm.weight, self.norm.bias, self.join.weight, self.join.bias
        joined = self.ops.concat_norm_linear(xs, *layers, activation="gelu")
        return self.intent(joined), self.mood(joined)

    def loss(self, written, sound, heard, intent, mood):
        said = self(written, sound, heard)
        return sum(F.cross_entropy(logits, label) for logits, label in zip(said, (intent, mood), strict=True))


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv, trainings=len(SENSES))
    parts = [requests(1000 if example.quick else 1500, 0, **case).values() for case in CASES.values()]
    train = [torch.cat(part) for part in zip(*parts, strict=True)]
    tests = {name: requests(500, 1, **case).values() for name, case in CASES.items()}

    def batch(step: int):
        rows = torch.randint(len(train[0]), (64,))
        written, *others = (x[rows] for x in train)
        return [written * (torch.rand(64, 1, 1) > 0.2), *others]  # some type nothing, so that all learn to listen

    rows, scores = [], {}
    for senses in SENSES:
        model = example.train(senses, partial(Service, senses=senses), batch, example.steps(900, quick=600))
        for name, (*asked, intent, mood) in tests.items():
            with torch.no_grad():
                logits = model(*asked)
            scores[senses, name] = accuracy(logits[0], intent), accuracy(logits[1], mood)
            rows.append([senses, name, *scores[senses, name]])
    example.table(["senses", "request", "intent", "mood"], rows)
    both, text, speech = (scores[senses, "whole"][1] for senses in SENSES)
    example.check("the mood needs both senses", both > max(text, speech) + 0.05)
    both, text, speech = ([scores[senses, name][0] for name in CASES] for senses in SENSES)
    example.check("one sense lost, the other still tells the intent", both[1] > speech[1] and both[2] > text[2])
    both, text, speech = (scores[senses, "cut off and misspelt"][1] for senses in SENSES)
    example.check("both spoilt, two senses still know the mood better than one", both > max(text, speech) + 0.03)
    with example.picture(1, 2, size=(8, 3)) as axes:
        for axis, title, which in zip(axes, ("intent", "mood"), (0, 1), strict=True):
            for i, senses in enumerate(SENSES):
                heights = [scores[senses, name][which] for name in CASES]
                axis.bar(
                    [x + 0.27 * (i - 1) for x in range(4)], heights, 0.25, label=senses, color=["C2", "C0", "C1"][i]
                )
            axis.set_xticks(range(4), [name.replace(" and ", "\nand ").replace("h c", "h\nc") for name in CASES])
            axis.set(title=title, ylim=(0, 1.2), yticks=[0, 0.25, 0.5, 0.75, 1])
        axes[0].set_ylabel("accuracy")
        axes[1].legend(loc="upper center", ncols=3, fontsize="small", columnspacing=1)
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
