"""What `accelerate` gains on whole models of other libraries: the tables of the pages beside this file.

    python docs/integrations/measure.py                     # measures all and prints the rows
    python docs/integrations/measure.py timm "CLIP ViT"     # those of a library, or whose name begins so
    python docs/integrations/measure.py --update            # and writes each row into its library's page when it has it

Random weights of released models' widths. One thread, its CPU time, eager and accelerated in turn, the best of several.
Needs the packages of requirements-models.txt, downloads nothing; some ten minutes. Models of a library that is not
installed are skipped, and their rows stay.
"""

from __future__ import annotations

import argparse
import copy
import functools
import importlib.util
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
os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmkernels import _native  # noqa: E402
from mmkernels.integrations import accelerate  # noqa: E402

BEGIN, END = "<!-- measure.py: begin -->\n", "<!-- measure.py: end -->\n"
DTYPES = (torch.float32, torch.bfloat16)
ROUNDS, SECONDS = 2, 1.0  # at least; short calls are made more often

Model = tuple[nn.Module, dict[str, Any], Callable[[Any], Tensor]]


def _words(batch: int, length: int) -> dict[str, Tensor]:
    """Texts of which the last is half as long as the first."""
    lengths = torch.linspace(length, length // 2, batch).long()
    words = torch.randint(5, 1000, (batch, length))
    words[:, -1] = 3
    return {"input_ids": words, "attention_mask": (torch.arange(length) < lengths[:, None]).long()}


def decoder() -> Model:
    layer = nn.TransformerDecoderLayer(512, 8, 2048, dropout=0.0, batch_first=True)
    lengths = torch.tensor([577, 505, 433, 361])
    inputs = {"tgt": torch.randn(4, 77, 512), "memory": torch.randn(4, 577, 512)}
    inputs["memory_key_padding_mask"] = torch.arange(577) >= lengths[:, None]
    return nn.TransformerDecoder(layer, 6), inputs, lambda out: out


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


def grounding_dino() -> Model:
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    sizes = {"image_size": 512, "embed_dim": 96, "depths": [2, 2, 6, 2], "num_heads": [3, 6, 12, 24], "window_size": 7}
    bert = {"model_type": "bert", "hidden_size": 768, "num_hidden_layers": 2, "num_attention_heads": 12}
    config = GroundingDinoConfig(
        backbone_config=SwinConfig(**sizes, out_features=["stage2", "stage3", "stage4"]),
        text_config={**bert, "intermediate_size": 3072, "vocab_size": 2000},
        encoder_layers=2,
        decoder_layers=2,
        num_queries=300,
        disable_custom_kernels=True,
    )
    words = torch.randint(5, 1000, (1, 32))
    words[:, 0], words[:, 7::8] = 101, 1012
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words), "token_type_ids": torch.zeros_like(words)}
    inputs |= {"pixel_values": torch.randn(1, 3, 512, 512), "pixel_mask": torch.ones(1, 512, 512).long()}
    return GroundingDinoForObjectDetection(config), inputs, lambda out: out.last_hidden_state


def qwen_2_5_vl() -> Model:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    image = 999
    of_images = {"depth": 3, "hidden_size": 1280, "intermediate_size": 3420, "num_heads": 16, "out_hidden_size": 2048}
    of_text = {"hidden_size": 2048, "intermediate_size": 11008, "num_hidden_layers": 1, "vocab_size": 1000}
    of_text |= {"num_attention_heads": 16, "num_key_value_heads": 2, "pad_token_id": 0}
    rotation = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    config = Qwen2_5_VLConfig(
        vision_config={**of_images, "window_size": 112, "fullatt_block_indexes": [2]},
        text_config={**of_text, "rope_parameters": rotation},
        image_token_id=image,
        vision_start_token_id=996,
        vision_end_token_id=997,
        video_token_id=998,
    )
    grids = torch.tensor([[1, 20, 20], [1, 16, 16]])
    words = torch.randint(5, 900, (1, 224))
    words[:, 4:104] = words[:, 108:172] = image  # a quarter of the patches each
    inputs = {"input_ids": words, "attention_mask": torch.ones_like(words), "use_cache": False}
    inputs |= {"pixel_values": torch.randn(20 * 20 + 16 * 16, 3 * 2 * 14 * 14), "image_grid_thw": grids}
    inputs["mm_token_type_ids"] = (words == image).int()
    return Qwen2_5_VLForConditionalGeneration(config), inputs, lambda out: out.logits


def sd_3() -> Model:
    from diffusers import SD3Transformer2DModel

    sizes = {"num_layers": 2, "attention_head_dim": 64, "num_attention_heads": 24, "caption_projection_dim": 1536}
    sizes |= {"in_channels": 16, "out_channels": 16, "joint_attention_dim": 4096, "pooled_projection_dim": 2048}
    model = SD3Transformer2DModel(
        **sizes, sample_size=40, pos_embed_max_size=96, qk_norm="rms_norm", dual_attention_layers=(0,)
    )
    inputs = {"hidden_states": torch.randn(1, 16, 40, 40), "encoder_hidden_states": torch.randn(1, 154, 4096)}
    inputs |= {"pooled_projections": torch.randn(1, 2048), "timestep": torch.tensor([500.0])}
    return model, inputs, lambda out: out.sample


def flux() -> Model:
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(num_layers=1, num_single_layers=2, num_attention_heads=12)
    height = width = 20
    places = torch.cartesian_prod(torch.zeros(1), torch.arange(float(height)), torch.arange(float(width)))
    inputs = {"hidden_states": torch.randn(1, height * width, 64), "encoder_hidden_states": torch.randn(1, 128, 4096)}
    inputs |= {"pooled_projections": torch.randn(1, 768), "timestep": torch.tensor([0.5])}
    return model, {**inputs, "img_ids": places, "txt_ids": torch.zeros(128, 3)}, lambda out: out.sample


def qwen_image() -> Model:
    from diffusers import QwenImageTransformer2DModel

    model = QwenImageTransformer2DModel(num_layers=2, num_attention_heads=12)
    inputs = {"hidden_states": torch.randn(1, 20 * 20, 64), "encoder_hidden_states": torch.randn(1, 128, 3584)}
    inputs |= {"encoder_hidden_states_mask": torch.ones(1, 128).bool(), "timestep": torch.tensor([0.5])}
    return model, {**inputs, "img_shapes": [[(1, 20, 20)]]}, lambda out: out.sample


def clip_of_open_clip() -> Model:
    from open_clip.model import CLIP

    of_images = {"image_size": 224, "layers": 4, "width": 768, "patch_size": 32}
    of_text = {"context_length": 77, "vocab_size": 1000, "width": 512, "heads": 8, "layers": 4}
    model = CLIP(512, vision_cfg=of_images, text_cfg=of_text, output_dict=True)
    inputs = {"image": torch.randn(4, 3, 224, 224), "text": _words(4, 77)["input_ids"]}
    return model, inputs, lambda out: out["image_features"] @ out["text_features"].mT


def coca() -> Model:
    from open_clip.coca_model import CoCa

    of_text = {"context_length": 76, "vocab_size": 1000, "width": 512, "heads": 8, "layers": 4}
    model = CoCa(
        512,
        multimodal_cfg={**of_text, "attn_pooler_heads": 8},
        text_cfg={**of_text, "embed_cls": True, "output_tokens": True},
        vision_cfg={
            **{"image_size": 224, "layers": 4, "width": 768, "patch_size": 32},
            **{"attentional_pool": True, "attn_pooler_heads": 8, "output_tokens": True},
        },
    )
    nn.init.normal_(model.text_decoder.text_projection, std=512**-0.5)  # which CoCa leaves as it found the memory
    words = _words(4, 76)
    inputs = {"image": torch.randn(4, 3, 224, 224), "text": words["input_ids"] * words["attention_mask"]}
    return model, inputs, lambda out: out["logits"]


def _pairs(count: int) -> dict[str, Tensor]:
    names = ("image_features", "text_features")
    return {name: nn.functional.normalize(torch.randn(count, 512), dim=-1).requires_grad_() for name in names}


def clip_loss() -> Model:
    from open_clip.loss import ClipLoss

    return ClipLoss(), {**_pairs(512), "logit_scale": torch.tensor(14.3)}, lambda out: out


def siglip_loss() -> Model:
    from open_clip.loss import SigLipLoss

    inputs = {**_pairs(512), "logit_scale": torch.tensor(10.0), "logit_bias": torch.tensor(-10.0)}
    return SigLipLoss(), inputs, lambda out: out


def vit() -> Model:
    from timm.models.vision_transformer import VisionTransformer

    return VisionTransformer(depth=4), {"x": torch.randn(2, 3, 224, 224)}, lambda out: out


MODELS: dict[str, dict[str, Callable[[], Model]]] = {
    "torch": {
        "nn.TransformerDecoder, 6 layers, 77 tokens to 577 padded ones": decoder,
    },
    "transformers": {
        "CLIP ViT-B/32, 2 pairs": clip,
        "SigLIP base/16, 1 pair": siglip,
        "BLIP base, 4 layers of text and 4 of image, matching at 384²": blip,
        "LXMERT, 2 texts with 36 objects": lxmert,
        "Whisper base, 2 layers each, 30 s and 64 tokens": whisper,
        "LLaVA, 3 layers of CLIP-L at 336² and 2 of a 1B language model": llava,
        "Qwen2.5-VL 3B, 3 layers of images of 280² and 224² and 1 of language": qwen_2_5_vl,
        "Grounding DINO, Swin-T at 512², 2 layers of text, 2 of fusion and 2 of queries": grounding_dino,
    },
    "diffusers": {
        "SD3 medium, 2 layers, 320² and 154 tokens": sd_3,
        "FLUX of half its width, 1 double layer and 2 single ones, 320² and 128 tokens": flux,
        "Qwen-Image of half its width, 2 layers, 320² and 128 tokens": qwen_image,
    },
    "open_clip": {
        "CLIP ViT-B/32, 4 layers each, 4 pairs": clip_of_open_clip,
        "CoCa ViT-B/32, 4 layers each, 4 pairs": coca,
        "ClipLoss, 512 pairs": clip_loss,
        "SigLipLoss, 512 pairs": siglip_loss,
    },
    "timm": {
        "ViT-B/16, 4 layers, 2 images": vit,
    },
}


def seconds(calls: Iterable[Callable[[], object]]) -> list[float]:
    """The best times of calls, made in turn."""
    calls = list(calls)
    best = [float("inf")] * len(calls)
    begin, rounds = time.thread_time(), -1  # the first one warms up
    while rounds < ROUNDS or time.thread_time() - begin < SECONDS:
        for j, call in enumerate(calls):
            start = time.thread_time()
            call()
            if rounds >= 0:
                best[j] = min(best[j], time.thread_time() - start)
        rounds += 1
    return best


def _cast(x: Any, dtype: torch.dtype) -> Any:
    floats = isinstance(x, Tensor) and x.is_floating_point()
    return x.detach().to(dtype).requires_grad_(x.requires_grad) if floats else x


def _milliseconds(time: float) -> str:
    return f"{1e3 * time:.0f} ms" if time >= 0.01 else f"{1e3 * time:.2g} ms"


def row(name: str, build: Callable[[], Model]) -> str:
    """A line of the table: times of eager and times faster, forward and training, of each dtype."""
    cells = []
    for dtype in DTYPES:
        torch.manual_seed(0)
        model, inputs, output = build()
        model = model.to(dtype).eval()
        inputs = {k: _cast(v, dtype) for k, v in inputs.items()}
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
            cells += [_milliseconds(plain), f"{plain / ours:.2f}×"]
    return f"| {name} | {' | '.join(cells)} |"


def machine() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.partition(": ")[2] for line in info.read_text().splitlines() if line.startswith("model name")]
    kernels = f"mmkernels on {_native.isa()}" if _native.available() else "mmkernels without its library"
    return f"{names[0] if names else 'CPU'}, one thread; {kernels}, torch {torch.__version__}."


def page(library: str) -> Path:
    return Path(__file__).with_name(f"{library}.md")


def updated(text: str, names: Iterable[str], measured: list[str], machine: str) -> str:
    """A page with rows of models in the order of names; rows that were not measured stay if the machine is the same."""
    before, _, rest = text.partition(BEGIN)
    old, _, after = rest.partition(END)
    of, *lines = old.splitlines() or [machine]
    kept = lines[3:] if of == machine else []
    rows = {line.split(" | ")[0]: line for line in (*kept, *measured)}
    head = "| | float32 forward, eager | | training | | bfloat16 forward | | training | |"
    lines = [machine, "", head, "|---|" + "---:|---:|" * 2 * len(DTYPES)]
    lines += [rows[f"| {name}"] for name in names if f"| {name}" in rows]
    return f"{before}{BEGIN}" + "\n".join(lines) + f"\n{END}{after}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="*", help="only models of this library, or whose name begins so")
    parser.add_argument("--update", action="store_true", help="write the rows into the libraries' pages")
    options = parser.parse_args()
    chosen = [
        (library, name)
        for library, models in MODELS.items()
        for name in models
        if not options.model or library in options.model or name.startswith(tuple(options.model))
    ]
    if not chosen:
        parser.error(f"model: expected {', '.join(MODELS)} or how a model's name begins; got {options.model}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    for library, name in chosen:
        if importlib.util.find_spec(library) is None:
            print(f"{name}: skipped, {library} is not installed", file=sys.stderr, flush=True)
            continue
        measured = row(name, MODELS[library][name])
        print(measured, flush=True)
        if options.update:
            text = page(library).read_text(encoding="utf-8")
            page(library).write_text(updated(text, MODELS[library], [measured], machine()), encoding="utf-8")


if __name__ == "__main__":
    main()
