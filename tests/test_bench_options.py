"""What the benchmark measures and against whom: shapes, providers, passes, threads, latency, memory, plugins."""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
import types
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from bench_toys import run, toy_benchmarks
from torch import Tensor

from mmkernels import _native
from mmkernels.bench import Suite, Workload, memory, options, plugin, providers, shapes, summary, timing
from mmkernels.bench.compare import NOISE, below, changes, read, words
from mmkernels.bench.engine import Row, disagreement, within
from mmkernels.bench.libraries import LIBRARIES
from mmkernels.bench.suite import available_ops, load

ROOT = Path(__file__).resolve().parents[1]
BENCHMARKS = {op: load(ROOT / "benchmarks", op) for op in available_ops(ROOT / "benchmarks")}


@pytest.fixture
def toy_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    return toy_benchmarks(tmp_path, monkeypatch)


def latest(folder: Path, op: str = "toy") -> list[dict]:
    return json.loads((folder.parent / "results" / "latest.json").read_text())["ops"][op]["rows"]


def row(op: str = "toy", ours: float = 0.01, torch: float | None = 0.02, **changes: object) -> Row:
    seconds = {"ours": ours} | ({} if torch is None else {"torch": torch})
    settings = {"group": "forward", "shape": "8x8", "note": "toy", "dtype": "float32"} | changes
    return Row(op=op, flops=2e9, bytes=1e6, peak=2e11, bound=0.005, seconds=seconds, **settings)


# --- which rows -------------------------------------------------------------------------------------------------------


def test_sizes_are_given_by_letter_or_field_and_the_rest_is_the_first_workloads() -> None:
    suite = BENCHMARKS["cross_attention"]
    given = shapes.of_suite(suite, "", ["B=3,Lq=5,Lk=7,D=16,causal=top_left,padded=true,softcap=2.5"])
    (work,), (training,) = given.forward["given"], given.training["given, training"]
    first = suite.forward["forward"][0]
    assert (work.batch, work.queries, work.keys, work.dim) == (3, 5, 7, 16)
    assert (work.causal, work.padded, work.softcap, work.heads) == ("top_left", True, 2.5, first.heads)
    assert work == training and work.note == "given" and not work.gpu
    fused = shapes.of_suite(BENCHMARKS["concat_tokens"], "", ["lengths=3+4+5,norm=none"]).forward["given"][0]
    assert fused.lengths == (3, 4, 5) and fused.norm is None
    sampled = shapes.of_suite(BENCHMARKS["deformable_attention"], "", ["levels=8x6+4x3"]).forward["given"][0]
    assert sampled.levels == ((8, 6), (4, 3))


def test_stacks_of_models_are_measured_where_they_are_asked_for_alone(toy_folder: Path) -> None:
    stacks = (toy_folder / "toy.py").read_text().replace('Shape("toy"', 'Shape("a model"')
    (toy_folder / "workloads.py").write_text(stacks)
    for asked, measured in (([], ["toy"]), (["workloads"], ["workloads"]), (["--workload", "a model"], ["workloads"])):
        run(toy_folder, "--quick", *asked)
        assert list(json.loads((toy_folder.parent / "results" / "latest.json").read_text())["ops"]) == measured


@pytest.mark.parametrize("op", BENCHMARKS)
def test_every_size_of_every_op_can_be_given_as_it_is_written(op: str) -> None:
    first = next(iter(BENCHMARKS[op].forward.values()))[0]
    sizes = ",".join(f"{name}={shapes.written(getattr(first, name))}" for name in shapes.field_names(first))
    assert str(shapes.of_suite(BENCHMARKS[op], "", [sizes]).forward["given"][0]) == str(first)


def test_a_size_of_the_wrong_kind_is_refused_in_words() -> None:
    suite = BENCHMARKS["cross_attention"]
    for sizes, said in {
        "padded=maybe": "padded: expected true or false; got maybe",
        "causal=sideways": "causal: expected none, top_left, bottom_right; got sideways",
        "B=two": "batch: expected a value such as",
    }.items():
        with pytest.raises(ValueError, match=said):
            shapes.of_suite(suite, "", [sizes])


def test_a_file_of_shapes_has_one_a_line(toy_folder: Path) -> None:
    file = toy_folder / "shapes.txt"
    file.write_text("# small\nn=3\n\nN=4  # the toy has no such field\n")
    assert shapes.specifications(str(file)) == ["n=3", "N=4"]
    assert run(toy_folder, "--shapes", str(file), "--no-compile", "--dtypes", "float32") == 0
    assert [(r["shape"], r["group"]) for r in latest(toy_folder)] == [("3x3", "given"), ("3x3", "given, training")]
    file.write_text("# nothing\n")
    with pytest.raises(ValueError, match="expected a line of sizes"):
        shapes.specifications(str(file))


def test_presets_choose_quick_large_and_growing_shapes() -> None:
    suite = BENCHMARKS["cross_attention"]
    quick, large, grown = (shapes.of_suite(suite, name, []) for name in ("quick", "large", "lengths"))
    assert all(work.quick for works in quick.forward.values() for work in works)
    assert set(large.forward) == {"large forward"} and not any(w.gpu for w in large.forward["large forward"])
    works = grown.forward["by length"]
    assert [w.keys / works[0].keys for w in works] == list(shapes.FACTORS)
    assert len({work.series() for work in works}) == 1 and [w.total_length() for w in works] == [w.keys for w in works]
    assert BENCHMARKS["varlen_cross_attention"].forward["forward"][0].total_length() == sum(
        BENCHMARKS["varlen_cross_attention"].forward["forward"][0].keys
    )


@pytest.mark.parametrize("op", BENCHMARKS)
def test_every_op_has_a_length(op: str) -> None:
    grown = shapes.of_suite(BENCHMARKS[op], "lengths", [])
    lengths = [work.total_length() for work in grown.forward["by length"]]
    assert lengths == [factor * lengths[0] for factor in shapes.FACTORS] and lengths[0] > 0
    grown.forward["by length"][1].problem(False, torch.float32)


def test_passes_and_threads_are_chosen(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = torch.get_num_threads()
    assert run(toy_folder, "--quick", "--pass", "training", "--threads", "1,2") == 0
    rows = latest(toy_folder)
    assert [(r["dtype"], r["threads"], r["training"]) for r in rows] == [
        (dtype, threads, True) for dtype in ("float32", "bfloat16") for threads in (1, 2)
    ]
    printed = capsys.readouterr().out
    assert "toy, float32, 1 thread " in printed and "toy, float32, 2 threads" in printed
    assert "1 and 2 threads;" in printed and torch.get_num_threads() == before
    content = json.loads((toy_folder.parent / "results" / "latest.json").read_text())
    assert set(content["ceilings_by_threads"]) == {"1", "2"}


# --- who competes -----------------------------------------------------------------------------------------------------


def test_providers_are_measured_and_checked(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plug = toy_folder.parent / "plug.py"
    plug.write_text(
        "from mmkernels.bench import provider\n"
        "@provider('mine', ops=['toy'])\ndef mine(workload, ab, c):\n"
        "    assert workload.n == 6\n    return c + ab[0] @ ab[1]\n"
        "@provider('wrong')\ndef wrong(workload, ab, c):\n    return c - ab[0] @ ab[1]\n"
        "@provider('absent')\ndef absent(workload, ab, c):\n    raise RuntimeError('not here')\n"
        "@provider('elsewhere', ops=['other'])\ndef elsewhere(workload, ab, c):\n    raise AssertionError\n"
    )
    assert run(toy_folder, "--quick", "--plugin", str(plug)) == 0
    for one in latest(toy_folder):
        assert one["seconds"]["mine"] > 0 and one["speedup_over_mine"] > 0
        assert one["missing"]["wrong"].startswith("computes something else: output differs")
        assert one["missing"]["absent"] == "failed: RuntimeError" and "elsewhere" not in str(one)
    assert "x mine" in capsys.readouterr().out
    asked = "ours@reference,eager,mine,compiled@eager"
    assert run(toy_folder, "--workload", "training", "--no-compile", "--plugin", str(plug), "--providers", asked) == 0
    for one in latest(toy_folder):
        assert set(one["seconds"]) == {"ours", "ours@reference", "eager", "mine"}
        assert one["missing"] == {"compiled@eager": "not asked for"} and one["speedup_over_torch"] is None
    assert run(toy_folder, "--workload", "long", "--providers", "compiled@eager") == 0
    assert all(set(one["seconds"]) == {"ours", "compiled@eager"} for one in latest(toy_folder))


def test_all_providers_have_a_time_or_a_reason(toy_folder: Path) -> None:
    assert run(toy_folder, "--quick", "--providers", "all") == 0
    for one in latest(toy_folder):
        for name in ("torch", "eager", *providers.ours_elsewhere("cpu")):
            assert one["seconds"][name] > 0
        assert one["missing"]["compiled"] == "not asked for"


def test_ours_runs_where_it_was_asked_to_and_the_machine_is_left_as_it_was() -> None:
    before, seen = _native.isa(), []
    for name, context in providers.ours_elsewhere("cpu").items():
        within(context, lambda: (seen.append(_native.isa()), torch.ones(1))[1:])()
        assert name.partition("@")[2] in (seen[-1], "reference", "cpu") and _native.isa() == before
    with pytest.raises(KeyError), _native.use_isa(before):
        raise KeyError
    assert _native.isa() == before and len(seen) == len(providers.ours_elsewhere("cpu"))


class _Libraries:
    """Stand-ins for other libraries, with their signatures and layouts, computed by torch."""

    @staticmethod
    def attention(query, key, value):
        return F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (query, key, value))).transpose(1, 2)

    @staticmethod
    def jsd(log_q, log_p):
        m = (0.5 * log_p.exp() + 0.5 * log_q.exp()).log()
        return sum(0.5 * F.kl_div(m, x, reduction="batchmean", log_target=True) for x in (log_p, log_q))


def test_other_libraries_compete_where_they_are_installed(monkeypatch: pytest.MonkeyPatch) -> None:
    modules = {
        "flash_attn": {"flash_attn_func": _Libraries.attention},
        "xformers": {},
        "xformers.ops": {"memory_efficient_attention": _Libraries.attention},
        "liger_kernel": {},
        "liger_kernel.transformers": {},
        "liger_kernel.transformers.functional": {"liger_jsd": _Libraries.jsd, "liger_kl_div": F.kl_div},
    }
    for name, contents in modules.items():
        module = types.ModuleType(name)
        module.__spec__ = importlib.util.spec_from_loader(name, None)
        vars(module).update(contents)
        monkeypatch.setitem(sys.modules, name, module)
    for library, op in (("flash-attn", "cross_attention"), ("xformers", "cross_attention")):
        provider = providers.builtin("cuda")[library]
        assert provider.serves(op) and library not in providers.builtin("cpu")
        problem = BENCHMARKS[op].cases()[0].problem(torch.float32)
        assert problem.provided is not None
        torch.testing.assert_close(problem.provided(provider.run)(*problem.leaves), problem.torch(*problem.leaves))
    kinds = set()
    for case in BENCHMARKS["distillation_loss"].cases():
        if not re.fullmatch(r"(forward_kl|reverse_kl|jsd) \d+x\d+", case.shape) or case.training:
            continue
        problem = case.problem(torch.float32)
        assert problem.provided is not None
        got = problem.provided(providers.builtin("cuda")["liger-kernel"].run)(*problem.leaves)
        torch.testing.assert_close(got, problem.torch(*problem.leaves), rtol=1e-4, atol=1e-5)
        kinds.add(case.shape.split(" ")[0])
    assert kinds == {"forward_kl", "reverse_kl", "jsd"}


def test_a_library_that_is_absent_is_said_to_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    said = providers.presence()
    assert "not here: xformers, xformers not installed (pip install xformers)" in said
    assert "not here: onnxruntime, onnxruntime, onnx, onnxscript not installed" in said
    assert "not here: compiled@zentorch" in said and "here, on cpu: ours, torch, compiled" in said
    assert "not here: xformers" in options.build_parser().format_help()
    with pytest.raises(ValueError, match=r"^xformers: xformers not installed \(pip install xformers\)"):
        providers.selected(["xformers"], {}, {}, "cpu")


def test_torchs_attention_is_kept_to_one_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    problem = BENCHMARKS["cross_attention"].cases()[0].problem(torch.float32)
    expected = (problem.torch(*problem.leaves),)
    found = providers.builtin("cpu")
    assert {"eager", "sdpa@math", "sdpa@flash"} == set(found) - set(LIBRARIES)
    found = {name: provider for name, provider in found.items() if name not in LIBRARIES}
    for name in found:
        assert problem.provided is not None
        one = problem.provided(found[name].run)
        assert disagreement(lambda one=one: (one(*problem.leaves),), expected) is None, name
    assert not found["sdpa@math"].serves("modulated_norm") and found["eager"].serves("modulated_norm")


def test_a_disagreement_names_what_differs() -> None:
    expected = (torch.ones(4), torch.ones(3))
    assert disagreement(lambda: expected, expected) is None
    assert disagreement(lambda: (torch.ones(4), 2 * torch.ones(3)), expected) == "gradient 0 differs by 1.0e+00"
    assert disagreement(lambda: (torch.ones(5), torch.ones(3)), expected) == "output has shape (5,), not (4,)"
    nan = (torch.full((4,), torch.nan), torch.ones(3))
    assert disagreement(lambda: nan, expected) == "output differs by nan"


def test_the_plugin_of_the_docs_runs(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = (ROOT / "docs" / "benchmarking.md").read_text().split("```python\n")[1].split("```")[0]
    code = [line for line in text.splitlines() if line.strip()]
    assert len(code) <= 26
    plug = toy_folder.parent / "docs_plugin.py"
    plug.write_text(text)
    assert run(toy_folder, "scaled_softmax", "--quick", "--plugin", str(plug)) == 0
    assert all(one["seconds"]["log"] > 0 for one in latest(toy_folder, "scaled_softmax"))
    assert run(toy_folder, "--quick", "--plugin", str(plug)) == 0  # beside the ops that are there anyway
    assert latest(toy_folder) and latest(toy_folder, "scaled_softmax")


@pytest.mark.parametrize(
    ("text", "said"), [("1 / 0", "fails when it is run: ZeroDivisionError"), ("", "decorates nothing")]
)
def test_a_plugin_that_fails_or_adds_nothing_is_refused(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "plug.py").write_text(text)
    with pytest.raises(ValueError, match=said):
        plugin.load(tmp_path / "plug.py")


# --- what of it -------------------------------------------------------------------------------------------------------


def test_percentiles_are_left_out_where_the_calls_are_too_few() -> None:
    taken = [float(i) for i in range(1, 101)]
    assert [timing.percentile(taken, p) for p in (50, 90, 99)] == [50.0, 90.0, 99.0]
    assert [timing.percentile(taken[:99], p) for p in (50, 90, 99)] == [50.0, 90.0, None]
    assert [timing.percentile(taken[:1], p) for p in (50, 90, 99)] == [None, None, None]


def test_latency_is_of_single_calls_with_a_batch_of_one(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for workloads in shapes.of_one(BENCHMARKS["cross_attention"]).forward.values():
        assert {work.batch for work in workloads} == {1} and len(set(workloads)) == len(workloads)
    assert {w.rows for w in shapes.of_one(BENCHMARKS["concat_linear"]).forward["forward"]} == {1}
    assert run(toy_folder, "--quick", "--latency") == 0
    for one in latest(toy_folder):
        for name in ("ours", "torch"):
            found = one["latency"][name]
            assert 0 < found["p50"] <= found["p90"] <= found["p99"]
    assert "Latency of single calls, ms:\n  toy forward 6x6 float32, ours: p50 " in capsys.readouterr().out


@dataclass(frozen=True)
class Product(Workload):
    def inputs(self) -> dict[str, Tensor]:
        return {"x": torch.randn(256, 256)}


def test_memory_at_the_peak_and_what_autograd_keeps() -> None:
    x = torch.randn(256, 256, requires_grad=True)
    size = x.numel() * 4
    few = 64  # bytes that the numbers take as tensors
    assert 0 <= memory.peak(lambda: x.detach() + 1, "cpu") - size < few
    assert 0 <= memory.peak(lambda: (x.detach() + 1) * 2, "cpu") - 2 * size < few
    assert memory.kept(lambda: x.exp(), [x]) == size  # its output
    assert memory.kept(lambda: x * x, [x]) == 0  # its input alone
    assert memory.kept(lambda: (x.exp(), x.exp()), [x]) == 2 * size


def test_memory_is_measured_where_it_is_asked_for(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(toy_folder, "--quick", "--memory") == 0
    for one in latest(toy_folder):
        for name in ("ours", "torch"):
            assert one["memory"][name]["peak"] > 0 and ("kept" in one["memory"][name]) is one["training"]
    assert "summed over an op's rows:\n  toy: peak " in capsys.readouterr().out
    assert run(toy_folder, "--quick") == 0
    assert all(one["memory"] == {} for one in latest(toy_folder))


# --- compared ---------------------------------------------------------------------------------------------------------


def test_a_run_is_compared_with_an_earlier_one(toy_folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(toy_folder, "--quick") == 0
    file = toy_folder.parent / "earlier.json"
    content = json.loads((toy_folder.parent / "results" / "latest.json").read_text())
    for one in content["ops"]["toy"]["rows"]:
        one["seconds"]["ours"] = 1e-9 if one["training"] else 1e3
    content["machine"]["machine"]["cpu"] = "another CPU"
    file.write_text(json.dumps(content))
    capsys.readouterr()
    assert run(toy_folder, "--quick", "--compare", str(file)) == 0
    printed = capsys.readouterr().out
    assert "4 rows: 2 faster, 0 the same within 5%, 2 slower" in printed and "another machine: another CPU" in printed
    now = json.loads((toy_folder.parent / "results" / "latest.json").read_text())
    assert [change["ratio"] < 1 for change in now["changes"]] == [True, True, False, False]
    assert run(toy_folder, "--quick", "--compare", str(file), "--fail-below", "0.5") == 1
    assert capsys.readouterr().out.count("Below 0.5: toy training 6x6") == 2
    one_op = next((toy_folder.parent / "results").glob("toy-*.json"))
    assert len(read(one_op).rows) == 4


def test_a_comparison_without_a_common_row_fails_where_it_should_guard(tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    head = {"machine": {"machine": {"cpu": "A", "threads": 1}}, "when": "2030"}
    file.write_text(json.dumps({**head, "ops": {"toy": {"rows": []}}}))
    baseline = read(file)
    assert changes([row()], baseline, 1) == [] and "no row in common" in words([], baseline, "A")[0]
    assert below([row()], [], 0.5) == ["no row in common with the earlier run"]


def test_rows_are_matched_by_their_threads_and_noise_is_no_change(tmp_path: Path) -> None:
    file = tmp_path / "earlier.json"
    rows = [row(ours=0.01 * (1 + NOISE / 2)).as_json(), row(shape="9x9", ours=0.02, threads=2).as_json()]
    head = {"machine": {"machine": {"cpu": "A", "threads": 1}}, "when": "2030"}
    file.write_text(json.dumps({**head, "ops": {"toy": {"rows": rows}}}))
    found = changes([row(), row(shape="9x9", threads=2), row(shape="9x9")], read(file), 1)
    assert [round(change.ratio, 3) for change in found] == [round(1 + NOISE / 2, 3), 2.0]
    assert "2 rows: 1 faster, 1 the same within 5%, 0 slower" in words(found, read(file), "A")[0]
    assert all(change.torch == 1.0 for change in found)


def test_fail_below_holds_rows_against_torch_without_an_earlier_run() -> None:
    assert below([row(), row(torch=None), row(ours=0.03)], None, 0.9) == ["toy forward 8x8 float32: 0.67x"]


def test_the_summary_names_ops_ahead_at_par_and_behind_and_the_worst_row() -> None:
    rows = [row("a"), row("b", 0.02), row("c", 0.04), row("d", torch=None), row("a", 0.05, shape="9x9", note="worst")]
    rows += [row("e", error="AssertionError: output")]
    rows[-1].seconds.clear()
    lines = summary.words(rows, dict.fromkeys("abcde", "torch SDPA"))
    assert lines[0].endswith("(mean of an op's rows): 0 ahead, 1 at par, 2 behind.") and lines[0].startswith("3 ops ")
    assert lines[1:3] == ["  at par: b 1.00x", "  behind: a 0.89x, c 0.50x"]
    assert lines[3] == (
        "Worst row: a, forward, 9x9 (worst), float32: 0.40x as fast as torch SDPA, which takes 60% less time."
    )
    assert lines[4] == "WRONG: e, forward, 8x8 (toy), float32: AssertionError: output"
    assert summary.against(row(), "SDPA") == "2.00x as fast as SDPA"
    assert summary.words([row(torch=None)], {"toy": "torch"}) == []


def test_make_bench_compare_measures_both_trees_and_refuses_what_is_no_commit() -> None:
    def make(*words: str) -> subprocess.CompletedProcess[str]:
        command = ["make", "--no-print-directory", "--dry-run", "PY=python", "bench-compare", *words]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    shown = make("BASE=HEAD", "ARGS=--quick").stdout
    assert "git worktree add" in shown and shown.count("-m mmkernels bench --quick") == 2
    assert "--compare bench_results/base/latest.json" in shown and "rev-parse --quiet --verify 'HEAD^{commit}'" in shown


def test_a_suite_whose_workloads_say_no_length_has_none() -> None:
    work = Product("toy")
    assert work.total_length() == 0.0 and work.length_field() is None
    assert shapes.of_suite(Suite("torch", {"forward": [work]}, {}), "lengths", []).forward == {}
