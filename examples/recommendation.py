"""What to show next: a user's history, stated interests and the picture on the cover.

Sixty items each have a topic and a cover, a digit image of that topic; a thousand users each like two topics, state one
of them, and have clicked eight items of both. Popularity knows none of this. Attention from the candidate item to the
history weighs the clicks that matter for it (Zhou et al., Deep Interest Network, 2018); a low-rank bilinear product of
user and item (Kim et al., MLB, 2017) scores the pair. Hit rate and NDCG at 10 (Järvelin & Kekäläinen, 2002) say how
high the next clicked item stands among those not clicked yet; a dozen of the sixty are of the user's two topics, and
which of them comes next is left to chance and popularity.

    python examples/recommendation.py
"""

from __future__ import annotations

import sys
from functools import partial

import torch
from common import Example, data, words
from torch import Tensor, nn

WIDTH, HEADS, RANK, PER_TOPIC, USERS, CLICKS, TOP = 32, 2, 2, 6, 1000, 8, 10


class Recommender(nn.Module):
    def __init__(self, ops, covers: Tensor) -> None:
        super().__init__()
        self.ops, self.covers = ops, covers  # [items, 64]
        self.see = nn.Sequential(nn.Linear(covers.shape[1], WIDTH), nn.ReLU(), nn.Linear(WIDTH, WIDTH))
        self.query, self.key_value = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, 2 * WIDTH)
        self.interest = nn.Linear(words.WIDTH, WIDTH)
        self.x, self.y = nn.Linear(2 * WIDTH, RANK * WIDTH, bias=False), nn.Linear(WIDTH, RANK * WIDTH, bias=False)
        self.score = nn.Linear(WIDTH, 1)

    def forward(self, clicks, interest):
        """A score of every item for every user, [B, items]."""
        item = self.see(self.covers)  # [items, WIDTH]
        history = self.key_value(item[clicks]).unflatten(-1, (2, HEADS, -1)).permute(2, 0, 3, 1, 4)
        query = self.query(item).unflatten(-1, (HEADS, -1)).transpose(0, 1).expand(len(clicks), -1, -1, -1)
        read = self.ops.cross_attention(query, *history).transpose(1, 2).flatten(2)  # [B, items, WIDTH]
        stated = self.interest(interest)[:, None].expand_as(read)
        user, item = torch.cat([read, stated], -1).flatten(0, 1), item.repeat(len(clicks), 1)
        pair = self.ops.bilinear_fusion(
            user, item, self.x.weight, self.y.weight, rank=RANK, out_weight=self.score.weight, out_bias=self.score.bias
        )
        return pair.view(len(clicks), -1)

    def loss(self, clicks, interest, following):
        return nn.functional.cross_entropy(self(clicks, interest), following)


def draw_users(popular: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Clicks (USERS, CLICKS), the embedded name of one liked topic, and the item clicked next; by popularity."""
    topic = torch.arange(10).repeat_interleave(PER_TOPIC)
    likes = torch.rand(USERS, 10).topk(2).indices
    liked = (topic == likes[:, :1]) | (topic == likes[:, 1:])  # [USERS, items]
    drawn = torch.multinomial(liked * popular, CLICKS + 1)
    return drawn[:, :CLICKS], words.embed(data.speech.WORDS)[likes[:, 0]], drawn[:, CLICKS]


def ranked(scores: Tensor, clicks: Tensor, following: Tensor) -> tuple[float, float]:
    """Hit rate and NDCG at TOP among the items not clicked yet."""
    scores = scores.scatter(1, clicks, -torch.inf)
    place = (scores > scores.gather(1, following[:, None])).sum(1)
    hit = place < TOP
    return hit.float().mean().item(), (hit / torch.log2(place + 2.0)).mean().item()


def main(argv: list[str] | None = None) -> int:
    example = Example(__doc__, argv)
    events = data.draw_events()
    covers = torch.cat([events.image[events.label == topic][:PER_TOPIC] for topic in range(10)])
    popular = torch.rand(len(covers)) + 0.2
    train, test = draw_users(popular), draw_users(popular)

    def batch(step: int):
        rows = torch.randperm(USERS)[:64]
        return tuple(part[rows] for part in train)

    model = example.train("recommender", partial(Recommender, covers=covers), batch, example.steps(300, quick=120))
    clicks, interest, following = test
    counted = torch.bincount(torch.cat([train[0].flatten(), train[2]]), minlength=len(covers)).float()
    with torch.no_grad():
        scores = {
            "popularity": counted.expand(USERS, -1),
            "stated interest withheld": model(clicks, torch.zeros_like(interest)),
            "history and interest": model(clicks, interest),
        }
    rows = [[name, *ranked(score, clicks, following)] for name, score in scores.items()]
    example.table(["ranked by", f"hit rate at {TOP}", f"NDCG at {TOP}"], rows)
    example.check("the model finds the next click more often than popularity", rows[2][1] > 2 * rows[0][1])
    example.check("and ranks it higher", rows[2][2] > rows[0][2])
    with example.picture(2, 12, size=(8, 2)) as axes:
        best = scores["history and interest"].scatter(1, clicks, -torch.inf)[0].topk(12).indices
        for title, line, items in (("clicked", axes[0], clicks[0]), ("recommended,\nbest first", axes[1], best)):
            line[0].set_ylabel(title, rotation=0, ha="right")
            for axis in line:
                axis.set(xticks=[], yticks=[], frame_on=False)
            for axis, item in zip(line, items.tolist(), strict=False):
                axis.imshow(covers[item].view(8, 8).tolist(), cmap="gray_r")
    return example.finish()


if __name__ == "__main__":
    sys.exit(main())
