"""What the examples share: data made on first use, the ops written in plain torch, and the frame of an example."""

from common import data, plain, words
from common.example import Example, accuracy

__all__ = ["Example", "accuracy", "data", "plain", "words"]
