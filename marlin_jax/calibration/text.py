# SPDX-License-Identifier: Apache-2.0
"""Calibration sequences from text: windows of token ids, picked at random but the same every time."""

import random
from collections.abc import Iterable, Sequence
from pathlib import Path

from marlin_jax.tokenizer import Tokenizer

_SHORTEST = 16
_BATCH = 256  # texts that are tokenized at a time


def read_texts(files: Sequence[Path]) -> list[str]:
  """The texts of UTF-8 files, one each.

  Raises:
    ValueError: a file does not exist, is a folder, or is not UTF-8.
  """
  texts = []
  for file in files:
    try:
      texts.append(file.read_bytes().decode("utf-8"))
    except (OSError, UnicodeDecodeError) as error:
      raise ValueError(f"calibration file {file} is no text that can be read: {error}") from None
  return texts


def calibration_sequences(
  tokenizer: Tokenizer, texts: Iterable[str], *, count: int = 128, length: int = 2048, seed: int = 0
) -> list[list[int]]:
  """`count` windows of `length` tokens, without overlap, from all places of the texts.

  Texts are not joined: the last window of each, or the only one, is shorter, and left out below 16 tokens.

  Args:
    tokenizer: of the model.
    texts: of the kind that the model will read.
    count: windows at the most; fewer if the texts hold no more.
    length: tokens of a window, at most the model's context.
    seed: of the choice.

  Raises:
    ValueError: `count` is below 1, `length` below 16, or the texts hold no window.
  """
  if count < 1:
    raise ValueError(f"{count=} must be at least 1")
  if length < _SHORTEST:
    raise ValueError(f"{length=} must be at least {_SHORTEST}")
  texts, windows = list(texts), []
  for first in range(0, len(texts), _BATCH):
    for ids in tokenizer.encode_batch(texts[first : first + _BATCH]):
      windows += [ids[start : start + length] for start in range(0, len(ids), length)]
  windows = [window for window in windows if len(window) >= _SHORTEST]
  if not windows:
    raise ValueError(f"texts hold no window of {_SHORTEST} tokens to calibrate on")
  return random.Random(seed).sample(windows, min(count, len(windows)))
