"""`accelerate` on models of other libraries: they compute what they did, wherever they leave the path it swaps."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, WIDTH, build, cast, keep, random, tokens, why_no_models
from torch import nn

from mmkernels.integrations import _blocks, accelerate, restore
from mmkernels.integrations.torch import modules as of_torch
from mmkernels.ops.concat_linear import concat_linear
from mmkernels.testing import same_bits

NO_MODELS = why_no_models()
pytestmark = pytest.mark.skipif(NO_MODELS is not None, reason=str(NO_MODELS))
DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


@pytest.fixture(autouse=True)
def _products_of_every_size_on_every_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small models would not reach this library's products, nor would large ones where torch's are the better ones."""
    monkeypatch.setattr(_blocks, "_FEWEST_PRODUCTS", 0)
    monkeypatch.setattr(_blocks, "products_pay", lambda: True)
    monkeypatch.setattr(_blocks, "torch_lacks_kernel", lambda dtype: False)


def run(model, inputs, outputs):
    torch.manual_seed(0)  # ViLT draws the order of its patches
    model.zero_grad(set_to_none=True)
    picked = outputs(model(**inputs))
    loss = 0
    for i, x in enumerate(picked):
        finite = torch.where(x.isfinite(), x, 0.0).double()
        loss = loss + (finite * random(*x.shape, seed=i)).sum()
    loss.backward()
    gradient = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
    return [x.detach().double() for x in picked], gradient


def distance(a, b):
    finite = b.isfinite()
    assert torch.equal(a.isfinite(), finite)
    return float(torch.linalg.vector_norm(a[finite] - b[finite]))


def joined(gradient, names):
    return torch.cat([gradient[name].flatten() for name in names])


@DTYPES
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_outputs_and_gradients_are_as_exact_as_eager_s_and_restored_ones_are_eager_s(name, dtype):
    model, inputs, outputs = build(name, dtype)
    plain, plain_gradient = run(model, inputs, outputs)
    keys = list(model.state_dict())
    report = accelerate(model)
    assert report.replaced and not report.left
    assert list(model.state_dict()) == keys
    ours, our_gradient = run(model, inputs, outputs)
    restore(model)
    assert same_bits(run(model, inputs, outputs)[0], plain)
    exact, exact_gradient = run(copy.deepcopy(model).double(), cast(inputs, torch.float64), outputs)
    unit = torch.finfo(dtype).eps
    assert plain_gradient.keys() == our_gradient.keys()
    gradients = [joined(g, sorted(plain_gradient)) for g in (our_gradient, plain_gradient, exact_gradient)]
    for got, same, oracle in [*zip(ours, plain, exact, strict=True), gradients]:
        norm = float(torch.linalg.vector_norm(oracle[oracle.isfinite()]))
        assert distance(got, oracle) <= 2 * distance(same, oracle) + 2 * unit * norm


LANGUAGE = ["llama", "mistral_with_windows", "gemma_2_with_softcap_and_windows", "gpt_oss_with_sinks"]
WITH_IMAGES = [
    "llava",
    "qwen_2_vl",
    "qwen_2_5_vl_with_windows",
    "mllama",
    "idefics",
    "idefics_2",
    "gemma_3_with_windows",
]


@pytest.mark.parametrize("name", [*LANGUAGE, *WITH_IMAGES])
def test_real_tokens_do_not_see_padding_on_the_left(name):
    model, inputs, outputs = build(name)
    if name in LANGUAGE:
        real = inputs["attention_mask"].flip(1).bool()
        inputs["position_ids"] = (real.cumsum(1) - 1).clamp_min(0)
    else:
        real = torch.ones_like(inputs["input_ids"], dtype=torch.bool)
        real[1, :2] = False  # before the image
    inputs["attention_mask"] = real.long()
    plain = run(model, inputs, outputs)[0][0]
    accelerate(model)
    torch.testing.assert_close(run(model, inputs, outputs)[0][0][real], plain[real], rtol=1e-4, atol=1e-4)


def test_packed_sequences_do_not_see_each_other():
    model, inputs, outputs = build("llama")
    del inputs["attention_mask"]
    inputs["position_ids"] = torch.cat([torch.arange(7), torch.arange(11)])[None].expand(2, -1)
    plain = run(model, inputs, outputs)[0]
    accelerate(model)
    torch.testing.assert_close(run(model, inputs, outputs)[0], plain, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "name", ["clip", "siglip", "blip", "lxmert", "visual_bert", "grounding_dino", *LANGUAGE, *WITH_IMAGES]
)
def test_attention_weights_that_are_asked_for_are_eager_s(name):
    def weights(output):
        kinds = [k for k in vars(output) if k.endswith("attentions")]
        found = [x for kind in kinds for x in _tensors(getattr(output, kind))]
        for part in ("text_model_output", "vision_model_output"):
            found += _tensors(getattr(getattr(output, part, None), "attentions", None))
        return found

    model, inputs, _ = build(name)
    inputs["output_attentions"] = True
    plain = copy.deepcopy(model)
    if name != "grounding_dino":  # which has its own weights always, and whose text encoder's masks eager misreads
        plain.set_attn_implementation("eager")  # sdpa has none to give
    with torch.no_grad():
        plain = weights(plain(**inputs))
        accelerate(model)
        ours = weights(model(**inputs))
    assert plain
    torch.testing.assert_close(ours, plain, rtol=1e-4, atol=1e-4)


def _tensors(x):
    return [x] if isinstance(x, torch.Tensor) else [t for y in x or () for t in _tensors(y)]


def dropping(name):
    """A model that drops attention weights, and nothing else."""
    model, inputs, outputs = build(name)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            is_of_attention = any("Attention" in type(m).__name__ and module in m.children() for m in model.modules())
            module.p = 0.4 if is_of_attention else 0.0
    model.train()
    return model, inputs, outputs


@pytest.mark.parametrize("name", ["flava", "lxmert", "visual_bert", "blip"])
def test_dropout_in_training_drops_weights_and_leaves_their_mean(name):
    model, inputs, outputs = dropping(name)
    accelerate(model)
    kinds = ("FlavaSelfAttention", "LxmertAttention", "VisualBertSelfAttention", "BlipTextSelfAttention")
    attention = next(m for m in model.modules() if type(m).__name__ in kinds)
    x = random(2, 7, WIDTH)
    more = (x,) if name == "lxmert" else ()
    with torch.no_grad():
        samples = torch.stack([attention(x, *more)[0] for _ in range(800)])
        attention.eval()
        exact = attention(x, *more)[0]
    spread = samples.std(0)
    assert (spread > 0).all()
    assert ((samples.mean(0) - exact).abs() < 6 * spread / 800**0.5).all()
    run(model, inputs, outputs)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


def test_dropout_of_attention_that_asks_the_interface_leaves_its_mean():
    model, _, _ = build("llama")
    attention = model.model.layers[0].self_attn
    attention.attention_dropout = 0.4
    accelerate(model)
    x, position = random(2, 7, WIDTH), model.model.rotary_emb(random(1), torch.arange(7)[None])
    with torch.no_grad():
        attention.train()
        samples = torch.stack([attention(x, position, None)[0] for _ in range(800)])
        attention.eval()
        exact = attention(x, position, None)[0]
    spread = samples.std(0)
    assert (spread[:, 1:] > 0).all()
    assert ((samples.mean(0) - exact).abs() < 6 * spread / 800**0.5 + 1e-4).all()


@pytest.mark.parametrize("name", ["flava", "lxmert", "blip"])
def test_dropout_before_a_residual_is_not_fused_away(name):
    model, _, _ = build(name)
    block = next(m for m in model.modules() if type(m).__name__ in ("FlavaOutput", "LxmertOutput", "BlipTextOutput"))
    block.train()
    block.dropout.p = 0.5
    args = (random(2, 7, block.dense.in_features), random(2, 7, WIDTH))

    def sample():
        torch.manual_seed(5)
        return block(*args)

    plain = sample()
    accelerate(model)
    assert "forward" in block.__dict__
    torch.testing.assert_close(sample(), plain, rtol=1e-4, atol=1e-4)
    block.eval()
    ours = sample()
    restore(model)
    torch.testing.assert_close(ours, sample(), rtol=1e-4, atol=1e-4)


def test_dropout_that_the_op_has_not_is_left_to_the_original():
    model, inputs, outputs = build("grounding_dino")
    model.train()
    fusion = model.model.encoder.layers[0].fusion_layer.attn
    fusion.dropout = 0.3
    args = (random(2, 9, fusion.vision_dim), random(2, 5, fusion.text_dim))

    def sample():
        torch.manual_seed(3)
        (image, _), (words, _) = fusion(*args)
        return [image, words]

    plain = sample()
    accelerate(model, skip="Linear")
    assert same_bits(sample(), plain)
    fusion.dropout = 0.0
    assert not same_bits(sample(), plain)


class Scaled(nn.Module):
    """A linear wrapped as adapters wrap it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return 2.0 * self.linear(x)


@pytest.mark.parametrize("name", ["blip", "lxmert", "grounding_dino", "clip", "coca"])
def test_hooks_and_wrappers_of_children_are_run(name):
    model, inputs, outputs = build(name)
    for path, module in list(model.named_modules()):
        parent, _, child = path.rpartition(".")
        if "Activation" in type(module).__name__:
            module.register_forward_hook(lambda module, args, out: out + 0.25)
        if type(module) is not nn.Linear or isinstance(model.get_submodule(parent), nn.MultiheadAttention):
            continue
        if child in ("query", "q_proj", "vision_proj", "0"):
            setattr(model.get_submodule(parent), child, Scaled(module))
        else:
            module.register_forward_hook(lambda module, args, out: out * 1.5)
            module.register_forward_pre_hook(lambda module, args: (args[0] * 0.5,))
    plain, plain_gradient = run(model, inputs, outputs)
    accelerate(model)
    ours, our_gradient = run(model, inputs, outputs)
    for got, same in [*zip(ours, plain, strict=True), [joined(g, sorted(g)) for g in (our_gradient, plain_gradient)]]:
        assert distance(got, same) <= 1e-3 * float(torch.linalg.vector_norm(same[same.isfinite()]))


@DTYPES
@pytest.mark.parametrize("size", [(32, 32), (35, 55), (7, 32)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_a_convolution_of_patches_is_a_product(dtype, size, bias, monkeypatch):
    monkeypatch.setattr(of_torch, "_LARGE_PATCH", 0)
    model = nn.Sequential(nn.Conv2d(3, 24, (8, 16), (8, 16), bias=bias)).to(dtype)
    plain, exact = copy.deepcopy(model), copy.deepcopy(model).double()
    assert [entry.with_ for entry in accelerate(model).replaced] == ["concat_linear"]
    if size[0] < 8:
        with pytest.raises(RuntimeError, match="Kernel size"):
            model(random(2, 3, *size).to(dtype))
        return
    seen = []
    monkeypatch.setattr(of_torch, "concat_linear", lambda *args: seen.append(args) or concat_linear(*args))
    results = []
    for m, kind in ((model, dtype), (plain, dtype), (exact, torch.float64)):
        x = random(2, 3, *size).to(dtype).to(kind).requires_grad_()
        out = m(x)
        out.backward(random(*out.shape, seed=3).to(dtype).to(kind))
        results.append([t.double() for t in (out.detach(), x.grad, *(p.grad for p in m.parameters()))])
    assert len(seen) == 1
    for got, same, oracle in zip(*results, strict=True):
        norm = float(torch.linalg.vector_norm(oracle))
        assert distance(got, oracle) <= 2 * distance(same, oracle) + torch.finfo(dtype).eps * norm


def test_other_convolutions_are_no_entries_of_the_report():
    kinds = [{"stride": 4}, {"stride": 8, "padding": 1}, {"stride": 8, "groups": 2}, {"stride": 8, "dilation": 2}]
    model = nn.Sequential(*[nn.Conv2d(4, 4, 8, **kind) for kind in kinds], nn.Conv2d(4, 4, 1))
    assert list(accelerate(model, strict=True)) == []


LAYERS = {
    "clip": "CLIPEncoderLayer",
    "siglip": "SiglipEncoderLayer",
    "blip": "BlipEncoderLayer",
    "llama": "LlamaDecoderLayer",
    "whisper": "WhisperEncoderLayer",
    "coca": "ResidualAttentionBlock",
}


@pytest.mark.parametrize("name", LAYERS)
def test_the_last_residual_of_a_layer_joins_its_feed_forward_network(name, monkeypatch):
    model, inputs, outputs = build(name)
    report = accelerate(model)
    layers = [entry.path for entry in report.replaced if entry.what == LAYERS[name]]
    assert layers and not any(entry.what == LAYERS[name] for entry in report.left)
    seen = []
    monkeypatch.setattr(
        _blocks, "concat_linear", lambda *args, **options: seen.append(options) or concat_linear(*args, **options)
    )
    run(model, inputs, outputs)
    assert sum(options.get("residual") is not None for options in seen) >= len(layers)
    assert any(options.get("activation") is not None for options in seen)


@pytest.mark.parametrize("name", ["clip", "llama", "whisper", "coca"])
def test_hooks_of_feed_forward_networks_are_run(name):
    model, inputs, outputs = build(name)
    for path, module in model.named_modules():
        if path.endswith((".mlp", ".fc2", ".mlp.gelu")):
            module.register_forward_hook(lambda module, args, out: out * 1.5)
    plain = run(model, inputs, outputs)[0]
    accelerate(model)
    for got, same in zip(run(model, inputs, outputs)[0], plain, strict=True):
        assert distance(got, same) <= 1e-3 * float(torch.linalg.vector_norm(same))


@pytest.mark.parametrize("name", ["clip", "llama", "whisper"])
def test_layers_still_checkpoint(name):
    model, inputs, outputs = build(name)
    model.train()
    if name == "whisper":
        model.config.dropout = 0.0
        for module in model.modules():
            module.__dict__.update(
                {k: 0.0 for k in ("dropout", "layerdrop") if isinstance(module.__dict__.get(k), float)}
            )
    plain, plain_gradient = run(model, inputs, outputs)
    accelerate(model)
    model.activation_checkpointing_enable()
    passes = []
    layer = next(m for m in model.modules() if type(m).__name__ == LAYERS[name])
    norm = layer.layer_norm1 if name == "clip" else layer.input_layernorm if name == "llama" else layer.final_layer_norm
    norm.register_forward_hook(lambda *_: passes.append(1))
    ours, our_gradient = run(model, inputs, outputs)
    assert len(passes) == 2, "once forward, once in the backward"
    for got, same in [*zip(ours, plain, strict=True), [joined(g, sorted(g)) for g in (our_gradient, plain_gradient)]]:
        assert distance(got, same) <= 1e-3 * float(torch.linalg.vector_norm(same[same.isfinite()]))


def test_an_activation_is_known_by_its_library_and_not_by_its_name_alone():
    from open_clip.transformer import QuickGELU as of_open_clip
    from transformers.activations import ACT2FN

    class QuickGELU(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x

    assert _blocks.activation_name(of_open_clip()) == _blocks.activation_name(ACT2FN["quick_gelu"]) == "quick_gelu"
    assert _blocks.activation_name(QuickGELU()) is None
    x = random(5, 7)
    torch.testing.assert_close(_blocks._ACTIVATIONS["quick_gelu"](x), of_open_clip()(x))


@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("name", [*LANGUAGE, *WITH_IMAGES, "pali_gemma", "whisper", "t5_with_position_bias"])
def test_greedy_generation_gives_eager_s_tokens(name, cache):
    model, inputs, _ = build(name)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "disable_compile": True}
    if cache == "static":
        options["cache_implementation"] = "static"
    if name in LANGUAGE:
        inputs["attention_mask"] = inputs["attention_mask"].flip(1)
    inputs = {k: v for k, v in inputs.items() if k not in ("use_cache", "labels", "decoder_input_ids")}
    plain = model.generate(**inputs, **options)
    accelerate(model)
    assert torch.equal(model.generate(**inputs, **options), plain)


@pytest.mark.parametrize("name", ["clip", "siglip", "lxmert", "flava", "t5_with_position_bias", *LANGUAGE[:3]])
def test_an_accelerated_model_compiles_into_one_graph(name):
    model, inputs, outputs = build(name)
    accelerate(model)
    with torch.no_grad():
        expected = outputs(model(**inputs))
        compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
        torch.testing.assert_close(outputs(compiled(**inputs)), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ["clip", "lxmert"])
def test_copies_and_pickles_of_an_accelerated_model_compute_the_same(name):
    model, inputs, outputs = build(name)
    accelerate(model)
    expected = [x.detach() for x in outputs(model(**inputs))]
    plain = copy.deepcopy(model)
    restore(plain)
    assert all("forward" not in m.__dict__ for m in plain.modules())
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits([x.detach() for x in outputs(twin(**inputs))], expected)
        restore(twin)
        assert same_bits([x.detach() for x in outputs(twin(**inputs))], [x.detach() for x in outputs(plain(**inputs))])
    assert same_bits([x.detach() for x in outputs(model(**inputs))], expected)


def test_a_pickle_opens_where_nothing_has_registered_the_attention(tmp_path):
    model, inputs, _ = build("llama")
    accelerate(model)
    torch.save((model, inputs, model(**inputs).logits.detach()), tmp_path / "model.pt")
    code = (
        f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import torch, architectures\n"
        "model, inputs, expected = torch.load(sys.argv[1], weights_only=False)\n"
        "torch.testing.assert_close(model(**inputs).logits, expected, rtol=1e-4, atol=1e-4)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code, str(tmp_path / "model.pt")], check=True)


def test_twice_is_once_and_blocks_restore_at_their_end():
    from transformers import AttentionInterface

    model, inputs, outputs = build("clip")
    plain = run(model, inputs, outputs)[0]
    with accelerate(model) as report:
        assert model.config.vision_config._attn_implementation == "mmkernels"
        assert "mmkernels" in AttentionInterface().valid_keys()
        ours = run(model, inputs, outputs)[0]
        assert list(accelerate(model)) == list(report)
        with restore(model):
            assert same_bits(run(model, inputs, outputs)[0], plain)
        assert same_bits(run(model, inputs, outputs)[0], ours)
    assert model.config.vision_config._attn_implementation == "sdpa"
    assert same_bits(run(model, inputs, outputs)[0], plain)


def test_a_choice_within_a_model_of_one_attention_leaves_all_of_it():
    model, _, _ = build("clip")
    report = accelerate(model, skip="vision_model.encoder.layers.0.self_attn")
    left = {entry.path: entry.reason for entry in report.left}
    assert left == {"vision_model.encoder.layers.0.self_attn": "in skip=('vision_model.encoder.layers.0.self_attn',)"}
    assert model.config.text_config._attn_implementation == "mmkernels"
    assert model.config.vision_config._attn_implementation == "sdpa"
    restore(model)
    accelerate(model, strict=True)


def test_registered_attention_can_be_asked_for_by_name():
    from transformers import AutoModel, CLIPTextConfig

    from mmkernels.integrations.transformers import register

    register()
    config = CLIPTextConfig(hidden_size=WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4)
    config.vocab_size, config.eos_token_id = 100, 3
    torch.manual_seed(0)
    ours = AutoModel.from_config(config, attn_implementation="mmkernels").eval()
    assert ours.config._attn_implementation == "mmkernels"
    plain = AutoModel.from_config(config, attn_implementation="sdpa").eval()
    plain.load_state_dict(ours.state_dict())
    inputs = {"input_ids": tokens(2, 9), "attention_mask": keep(2, 9)}
    inputs["input_ids"][:, -1] = 3
    got, expected = (model(**inputs).last_hidden_state for model in (ours, plain))
    torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def test_the_example_prints_reports_and_times():
    code = (
        "import sys, runpy; sys.argv[1:] = ['--small']; runpy.run_path('examples/accelerate_model.py', {}, '__main__')"
    )
    root = Path(__file__).parents[1]
    command = [sys.executable, "-W", "ignore", "-c", code]  # which finds the package that these tests do
    printed = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    assert printed.count("replaced, 0 left") == printed.count("ms before") == 2
    assert "CLIPAttention with cross_attention" in printed
    assert "BiMultiHeadAttention with bidirectional_cross_attention" in printed


@pytest.mark.parametrize("kind, said", [("flex_attention", "is"), ("eager", "was chosen to be")])
def test_models_with_an_attention_of_another_kind_are_left(kind, said):
    model, _, _ = build("llama")
    model.config._attn_implementation_internal = kind
    report = accelerate(model, skip="Linear")
    assert {e.reason for e in report.left if e.what == "LlamaAttention"} == {f'its attention {said} "{kind}"'}
    assert model.config._attn_implementation == kind
