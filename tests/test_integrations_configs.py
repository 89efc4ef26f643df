"""What `accelerate` does to a model of transformers is that model's alone, and leaves nothing behind."""

from __future__ import annotations

import copy
import gc
import pickle

import pytest
import torch
from architectures import ARCHITECTURES, build, why_no_models

from mmkernels.integrations import accelerate, restore
from mmkernels.testing import same_bits

NO_MODELS = why_no_models()
pytestmark = pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))


def two_of_one_config():
    from transformers import BertConfig, BertModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BertConfig(vocab_size=50, **sizes)
    return config, BertModel(config).eval(), BertModel(config).eval()


def test_another_model_of_the_same_config_stays_as_it_is():
    config, model, other = two_of_one_config()
    words = torch.randint(5, 50, (2, 9))
    before = other(words)[0]
    accelerate(model)
    assert model.config._attn_implementation == "mmkernels" and other.config._attn_implementation == "sdpa"
    assert same_bits(other(words)[0], before)
    accelerate(other)
    restore(model)
    assert model.config is config and config._attn_implementation == "sdpa"
    assert other.config._attn_implementation == "mmkernels"
    assert all(m.config._attn_implementation == "mmkernels" for m in other.modules() if hasattr(m, "config"))
    restore(other)
    assert all(m.config is config for m in other.modules() if hasattr(m, "config"))


def test_what_is_set_in_the_config_of_an_accelerated_model_is_set_in_a_restored_one():
    config, model, _ = two_of_one_config()
    with accelerate(model):
        model.config.use_cache = False
    assert model.config is config and config.use_cache is False
    accelerate(model)
    model.config.use_cache = True
    with restore(model):
        assert model.config is config and config.use_cache is True
    assert model.config is not config and model.config._attn_implementation == "mmkernels"
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert twin.config._attn_implementation == "mmkernels"
        restore(twin)
        assert twin.config._attn_implementation == "sdpa"
    assert model.config._attn_implementation == "mmkernels"


def test_a_mask_that_sdpa_forgets_is_left_to_it():
    from transformers import Aimv2TextConfig, Aimv2TextModel

    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = Aimv2TextModel(Aimv2TextConfig(vocab_size=50, eos_token_id=7, **sizes)).eval()
    inputs = {"input_ids": torch.randint(5, 50, (2, 9)), "attention_mask": torch.ones(2, 9, dtype=torch.int64)}
    before = model(**inputs).last_hidden_state
    report = accelerate(model)
    assert any("causal order" in (entry.reason or "") for entry in report.left)
    torch.testing.assert_close(model(**inputs).last_hidden_state, before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_forward_leaves_no_tensor_behind(name):
    model, inputs, _ = build(name)
    accelerate(model)

    def alive() -> int:
        with torch.no_grad():
            model(**{k: v.clone() if isinstance(v, torch.Tensor) else v for k, v in inputs.items()})
        gc.collect()
        return sum(isinstance(x, torch.Tensor) for x in gc.get_objects())

    alive()
    gc.freeze()  # what there is by now is neither looked through nor counted
    try:
        first = alive()
        assert alive() <= first
    finally:
        gc.unfreeze()
