"""Runs every example of the gallery and writes docs/gallery.md: what each teaches, what it printed, and its picture.

python examples/gallery.py [--seconds N]    N for the trainings of each
"""

from __future__ import annotations

import argparse
import ast
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent
DOCS = HERE.parent / "docs"

# In the order in which they are read.
TOPICS = {
    "data_types": "Data types",
    "fusion_levels": "Fusion levels",
    "attention_kinds": "Kinds of attention",
    "losses": "Losses",
    "questions": "Questions about a picture",
    "captions": "Captions",
    "lip_reading": "Lip reading",
    "vision": "Vision",
    "medicine": "Medicine",
    "recommendation": "Recommendation",
    "preprocessing": "Preprocessing",
    "metrics": "Metrics",
    "real_time": "Real time",
    "augmented_reality": "Augmented reality",
    "driving": "Driving",
    "customer_service": "Customer service",
    "gates": "Cross-modal transfer",
    "transfer": "Transfer",
    "few_shots": "Few shots",
    "adversarial": "Adversarial inputs",
    "distillation": "Distillation",
}

# These are started by torchrun, two processes each.
PROCESSES = {
    "distributed_training": "Training spread over the batch",
    "pipeline_training": "Training in a pipeline",
    "staged_training": "Training in stages",
}

CAPTIONS = {
    "data_types": "Five events: frames of a video laid over one another, and the word's sound with what pads it.",
    "fusion_levels": "Accuracy of each way to fuse; grey is one modality alone.",
    "attention_kinds": "The weight of each modality (columns) in events where one of them (rows) is noise.",
    "losses": "Left: the modalities' shares of the gradient, early in training. Right: what false labels cost.",
    "questions": "A question of each kind, and what the model answers.",
    "captions": "Scenes, and the captions that the model writes.",
    "lip_reading": "Left: with lips to read, noise costs less. Right: four frames of three mouths.",
    "vision": "Above: the box that the model draws for the words. Below: the pixels that it says they mean.",
    "medicine": "Left: how often a diagnosis of some confidence is right. Right: a patient's risk, visit by visit.",
    "recommendation": "What a user clicked, and what the model would show next.",
    "preprocessing": "Accuracy as each step is added to those above it.",
    "metrics": "Left: what each digit is taken for; 8 and 9 were rare in training. Right: F1 with a sense missing.",
    "real_time": "The share of the frames that are answered within so long: the further left a curve, the faster.",
    "augmented_reality": "Six views: one digit says its name (triangle); the curve is what the model believes.",
    "driving": "One scene: a car as three sensors see it (the blue square is us), and where it goes relative to us.",
    "customer_service": "Accuracy of what is wanted and of the mood, for requests that are whole, cut off or misspelt.",
    "gates": "Left: accuracy as the image drowns in noise. Right: how far the gates let the image through.",
    "transfer": "Accuracy on the digits that the encoders have not learnt before.",
    "few_shots": "Left: accuracy by the examples of a class. Right: the fused embeddings, two principal components.",
    "adversarial": "Accuracy under attack of a model trained plainly and of one trained on attacked inputs.",
    "distillation": "Accuracy of a teacher, and of a student without it and with it.",
}

INTRODUCTION = """\
# The gallery

Each example trains a small model twice, with this library's ops and with the same ops written in plain torch
([plain.py](../examples/common/plain.py)), from one seed: both must lose the same. It ends in checks that fail loudly.
The events are scikit-learn's handwritten digits; the same digits spoken by {speaker};
and the digit's name typed, as {reader} reads it ([words.py](../examples/common/words.py)).
What else there is, scenes of shapes or a road, is drawn by a rule in the file.
Times are of one thread and of tiny models, where calls cost more than arithmetic; [measured](generated/measured.md)
has real sizes. `make gallery` runs all of it and writes this page.
"""


def section(name: str, title: str, options: Sequence[str] = ()) -> tuple[str, bool]:
    """The part of the page that an example fills, and whether its checks held."""
    path = HERE / f"{name}.py"
    picture = DOCS / "gallery" / f"{name}.png"
    start = time.perf_counter()
    command = [path, "--picture", picture, *options]
    if name in PROCESSES:
        command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", path]
    run = subprocess.run([sys.executable, *command], stdout=subprocess.PIPE, text=True)
    print(f"{name}: {'ok' if run.returncode == 0 else 'FAILED'}, {time.perf_counter() - start:.0f} s", flush=True)
    if run.returncode:
        print(run.stdout)
    doc = ast.get_docstring(ast.parse(path.read_text())).split("\n\n")
    text = [f"## {title}", f"**{doc[0]}**", *doc[1:-1], f"[{name}.py](../examples/{name}.py)"]
    if picture.exists():
        text += [f"![{title}](gallery/{name}.png)", f"*{CAPTIONS[name]}*"]
    return "\n\n".join([*text, f"```text\n{run.stdout.strip()}\n```\n"]), run.returncode == 0


def main() -> int:
    from common import data, words

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, help="stop the trainings of an example when they are over")
    seconds = parser.parse_args().seconds
    options = [] if seconds is None else ["--seconds", str(seconds)]
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    if sys.platform == "linux":
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")  # the processes are all here
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])
    (DOCS / "gallery").mkdir(exist_ok=True)
    sections = [section(name, title, options) for name, title in {**TOPICS, **PROCESSES}.items()]
    page = [INTRODUCTION.format(speaker=data.spoken()[1], reader=words.READER), *(text for text, _ in sections)]
    (DOCS / "gallery.md").write_text("\n".join(page))
    return 0 if all(held for _, held in sections) else 1


if __name__ == "__main__":
    sys.exit(main())
