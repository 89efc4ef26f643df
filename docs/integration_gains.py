"""What `accelerate` gains on whole models of other libraries: the table of integrations.md.

    python docs/integration_gains.py                     # measures all and prints the table
    python docs/integration_gains.py "CLIP ViT-B/32"     # some of them
    python docs/integration_gains.py --update            # and writes what it measured into integrations.md

Random weights of released models' widths. One thread, its CPU time, eager and accelerated in turn, the best of several.
Needs the packages of requirements-models.txt, downloads nothing; some minutes.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import sys
import time
import types
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmkernels import _native  # noqa: E402
from mmkernels.integrations import accelerate  # noqa: E402

PAGE = Path(__file__).with_name("integrations.md")
BEGIN, END = "<!-- integration_gains.py: begin -->\n", "<!-- integration_gains.py: end -->\n"
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS = 2

Model = tuple[nn.Module, dict[str, Any], Callable[[Any], Tensor]]


def _words(batch: int, length: int) -> dict[str, Tensor]:
    """Texts of which the last is half as long as the first."""
    lengths = torch.linspace(length, length // 2, batch).long()
    words = torch.randint(5, 1000, (batch, length))
    words[:, -1] = 3
    return {"input_ids": words, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def clip() -> Model:
    from transformers import CLIPConfig, CLIPModel

    config = CLIPConfig(text_config={"eos_token_id": 3}, vision_config={"patch_size": 32})
    inputs = {**_words(2, 77), "pixel_values": torch.randn(2, 3, 224, 224)}
    return CLIPModel(config), inputs, lambda out: out.logits_per_image


def siglip() -> Model:
    from transformers import SiglipConfig, SiglipModel

    inputs = {"input_ids": _words(1, 64)["input_ids"], "pixel_values": torch.randn(1, 3, 224, 224)}
    return SiglipModel(SiglipConfig()), inputs, lambda out: out.logits_per_image


def blip() -> Model:
    from transformers import BlipConfig, BlipForImageTextRetrieval

    of_text = {"encoder_hidden_size": 768, "num_hidden_layers": 4}
    config = BlipConfig(text_config=of_text, vision_config={"image_size": 384, "num_hidden_layers": 4})
    inputs = {**_words(1, 35), "pixel_values": torch.randn(1, 3, 384, 384)}
    return BlipForImageTextRetrieval(config), inputs, lambda out: out.itm_score


def lxmert() -> Model:
    from transformers import LxmertConfig, LxmertModel

    inputs = {**_words(2, 20), "visual_feats": torch.randn(2, 36, 2048), "visual_pos": torch.rand(2, 36, 4)}
    return LxmertModel(LxmertConfig()), inputs, lambda out: out.pooled_output


def whisper() -> Model:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    sizes = {"d_model": 512, "encoder_attention_heads": 8, "decoder_attention_heads": 8}
    sizes |= {"encoder_ffn_dim": 2048, "decoder_ffn_dim": 2048, "encoder_layers": 2, "decoder_layers": 2}
    inputs = {"input_features": torch.randn(1, 80, 3000), "decoder_input_ids": torch.randint(5, 1000, (1, 64))}
    model = WhisperForConditionalGeneration(WhisperConfig(**sizes))
    return model, {**inputs, "use_cache": False}, lambda out: out.logits


def llava() -> Model:
    from transformers import LlavaConfig, LlavaForConditionalGeneration

    image = 999
    of_images = {"model_type": "clip_vision_model", "hidden_size": 1024, "intermediate_size": 4096, "patch_size": 14}
    of_images |= {"num_hidden_layers": 3, "num_attention_heads": 16, "image_size": 336}
    of_text = {"model_type": "llama", "hidden_size": 2048, "intermediate_size": 5632, "num_hidden_layers": 2}
    of_text |= {"num_attention_heads": 32, "num_key_value_heads": 4, "vocab_size": 1000}
    config = LlavaConfig(vision_config=of_images, text_config=of_text, image_token_index=image)
    words = torch.randint(5, 900, (1, 640))
    words[:, 4:580] = image
    inputs = {"input_ids": words, "pixel_values": torch.randn(1, 3, 336, 336), "use_cache": False}
    return LlavaForConditionalGeneration(config), inputs, lambda out: out.logits


def decoder() -> Model:
    layer = nn.TransformerDecoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    lengths = torch.tensor([577, 505, 433, 361])
    inputs = {"tgt": torch.randn(4, 77, 512), "memory": torch.randn(4, 577, 512)}
    inputs["memory_key_padding_mask"] = torch.arange(577) >= lengths[:, None]
    return nn.TransformerDecoder(layer, 6), inputs, lambda out: out


MODELS: dict[str, Callable[[], Model]] = {
    "CLIP ViT-B/32, 2 pairs": clip,
    "SigLIP base/16, 1 pair": siglip,
    "BLIP base, 4 layers of text and 4 of image, matching at 384²": blip,
    "LXMERT, 2 texts with 36 objects": lxmert,
    "Whisper base, 2 layers each, 30 s and 64 tokens": whisper,
    "LLaVA, 3 layers of CLIP-L at 336² and 2 of a 1B language model": llava,
    "nn.TransformerDecoder, 6 layers, 77 tokens to 577 padded ones": decoder,
}


def seconds(calls: Iterable[Callable[[], object]]) -> list[float]:
    """The best times of calls, made in turn."""
    calls = list(calls)
    best = [float("inf")] * len(calls)
    for i in range(ROUNDS + 1):
        for j, call in enumerate(calls):
            start = time.thread_time()
            call()
            if i > 0:
                best[j] = min(best[j], time.thread_time() - start)
    return best


def row(name: str, build: Callable[[], Model]) -> str:
    """A line of the table: times of eager and times faster, forward and training, of each dtype."""
    cells = []
    for dtype in DTYPES:
        torch.manual_seed(0)
        model, inputs, output = build()
        model = model.to(dtype).eval()
        inputs = {k: v.to(dtype) if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in inputs.items()}
        faster = copy.deepcopy(model)
        accelerate(faster)

        def forward(m: nn.Module, inputs: dict[str, Any] = inputs) -> None:
            with torch.no_grad():
                m(**inputs)

        def train(m: nn.Module, inputs: dict[str, Any] = inputs, output: Any = output) -> None:
            m.zero_grad()
            output(m(**inputs)).float().square().mean().backward()

        for run in (forward, train):
            plain, ours = seconds([functools.partial(run, model), functools.partial(run, faster)])
            cells += [f"{1e3 * plain:.0f} ms", f"{plain / ours:.2f}×"]
    return f"| {name} | {' | '.join(cells)} |"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    kernels = f"mmkernels on {_native.isa()}" if _native.available() else "mmkernels without its library"
    return f"{names[0] if names else 'CPU'}, one thread; {kernels}, torch {torch.__version__}."


def table(models: dict[str, Callable[[], Model]]) -> str:
    head = "| | float32 forward, eager | | training | | bfloat16 forward | | training | |"
    lines = [machine(), "", head, "|---|" + "---:|---:|" * 2 * len(DTYPES)]
    for name, build in models.items():
        lines.append(row(name, build))
        print(lines[-1], file=sys.stderr, flush=True)
    return "\n".join(lines) + "\n"


def updated(page: str, table: str) -> str:
    """The page with another table; rows of models that the new one has not stay."""
    before, _, rest = page.partition(BEGIN)
    old, _, after = rest.partition(END)
    rows = {line.split(" | ")[0]: line for line in (*old.splitlines(), *table.splitlines())}
    names = [f"| {name}" for name in MODELS]
    kept = [line for line in table.splitlines() if line.split(" | ")[0] not in names]
    lines = "\n".join([*kept, *(rows[name] for name in names if name in rows)])
    return f"{before}{BEGIN}{lines}\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="only models whose name begins so")
    parser.add_argument("--update", action="store_true", help="write the table into integrations.md")
    options = parser.parse_args()
    chosen = {n: b for n, b in MODELS.items() if not options.model or n.startswith(tuple(options.model))}
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    found = table(chosen)
    if options.update:
        PAGE.write_text(updated(PAGE.read_text(encoding="utf-8"), found), encoding="utf-8")
    else:
        print(found, end="")


if __name__ == "__main__":
    main()
