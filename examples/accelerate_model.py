"""Two models of Hugging Face's transformers with random weights, CLIP and Grounding DINO, made faster by one line.

usage: python examples/accelerate_model.py [--small]

For each: what `accelerate` replaced and what it left, how far outputs move, and the times of both. Needs the packages
of requirements-models.txt, downloads nothing.
"""

from __future__ import annotations

import argparse
import copy
import os
import sys
import time
import types
from collections.abc import Callable
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
sys.modules.setdefault("torchvision._meta_registrations", types.ModuleType("torchvision._meta_registrations"))

import torch  # noqa: E402
from torch import Tensor, nn  # noqa: E402

from mmkernels.integrations import accelerate  # noqa: E402

Model = tuple[nn.Module, dict[str, Any], str]


def clip(width: int, size: int) -> Model:
    from transformers import CLIPConfig, CLIPModel

    shared = {"intermediate_size": 4 * width, "num_hidden_layers": 2, "num_attention_heads": width // 64}
    config = CLIPConfig(
        text_config={**shared, "hidden_size": width, "vocab_size": 2000, "eos_token_id": 3},
        vision_config={**shared, "hidden_size": width, "image_size": size, "patch_size": 16},
    )
    words = torch.randint(5, 2000, (4, 77))
    words[:, -1] = 3
    lengths = torch.tensor([77, 60, 40, 20])
    mask = (torch.arange(77) < lengths[:, None]).long()
    inputs = {"input_ids": words, "attention_mask": mask, "pixel_values": torch.randn(4, 3, size, size)}
    return CLIPModel(config), inputs, "logits_per_image"


def grounding_dino(width: int, size: int) -> Model:
    from transformers import GroundingDinoConfig, GroundingDinoForObjectDetection, SwinConfig

    backbone = SwinConfig(image_size=size, embed_dim=48, depths=[1] * 4, num_heads=[3, 6, 12, 24])
    backbone.set_output_features_output_indices(["stage2", "stage3", "stage4"], None)
    bert = {"model_type": "bert", "hidden_size": width, "num_hidden_layers": 1, "num_attention_heads": width // 64}
    config = GroundingDinoConfig(
        backbone_config=backbone,
        text_config={**bert, "intermediate_size": 4 * width, "vocab_size": 2000},
        encoder_layers=2,
        decoder_layers=2,
        num_queries=100,
        disable_custom_kernels=True,
    )
    words = torch.randint(5, 1000, (2, 32))
    words[:, 0], words[:, 8::8] = 101, 1012  # [CLS], full stops between the phrases
    inputs = {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "pixel_values": torch.randn(2, 3, size, size),
    }
    return GroundingDinoForObjectDetection(config), inputs, "encoder_last_hidden_state_vision"


def milliseconds(call: Callable[[], Any], other: Callable[[], Any], rounds: int) -> tuple[float, float]:
    """The best times of two calls, made in turn."""
    best = [float("inf")] * 2
    for _ in range(rounds + 1):
        for i, run in enumerate((call, other)):
            start = time.perf_counter()
            run()
            best[i] = min(best[i], 1e3 * (time.perf_counter() - start))
    return best[0], best[1]


def show(name: str, model: nn.Module, inputs: dict[str, Any], output: str, rounds: int) -> None:
    def run(m: nn.Module) -> Tensor:
        with torch.no_grad():
            return getattr(m(**inputs), output)

    faster = copy.deepcopy(model)
    report = accelerate(faster)
    print(f"{name}\n{report}")
    plain = run(model)
    moved = (run(faster) - plain).norm() / plain.norm()
    before, after = milliseconds(lambda: run(model), lambda: run(faster), rounds)
    print(f"{output} moved by {moved:.1e} of its norm; {before:.1f} ms before, {after:.1f} ms after\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="narrow models and small images, once each")
    small = parser.parse_args().small
    torch.manual_seed(0)
    for build in (clip, grounding_dino):
        model, inputs, output = build(64, 128) if small else build(768, 224 if build is clip else 320)
        show(build.__name__, model.eval(), inputs, output, rounds=1 if small else 5)


if __name__ == "__main__":
    main()
