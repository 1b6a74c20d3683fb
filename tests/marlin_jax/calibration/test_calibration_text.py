# SPDX-License-Identifier: Apache-2.0
from pathlib import Path

import pytest

from marlin_jax.calibration.text import calibration_sequences, read_texts
from marlin_jax.demo import calibration_texts, heldout_text
from marlin_jax.tokenizer import Tokenizer

TOKENIZER = Tokenizer.from_folder(Path(__file__).parents[2] / "data" / "llama-bf16")
TEXTS = ["the quick brown fox jumps over the lazy dog " * 40, "short", "once upon a time " * 5]


def test_windows_do_not_overlap_and_texts_are_not_joined():
  windows = calibration_sequences(TOKENIZER, TEXTS, count=1000, length=32)
  whole = [TOKENIZER.encode(text) for text in TEXTS]
  want = [ids[start : start + 32] for ids in whole for start in range(0, len(ids), 32)]
  assert sorted(windows) == sorted(window for window in want if len(window) >= 16)


def test_the_choice_is_the_same_every_time_and_another_one_for_another_seed():
  first, again, other = (calibration_sequences(TOKENIZER, TEXTS, count=4, length=16, seed=s) for s in (0, 0, 1))
  assert first == again != other and len(first) == 4


@pytest.mark.parametrize(
  "texts, options, message",
  [
    (TEXTS, dict(count=0), "count=0 must be at least 1"),
    (TEXTS, dict(length=8), "length=8 must be at least 16"),
    (["short"], {}, "texts hold no window of 16 tokens"),
    ([], {}, "texts hold no window"),
  ],
)
def test_what_gives_no_window_is_refused(texts, options, message):
  with pytest.raises(ValueError, match=message):
    calibration_sequences(TOKENIZER, texts, **options)


def test_files_are_read_as_they_are(tmp_path):
  (tmp_path / "a.txt").write_bytes("é\r\n".encode())
  assert read_texts([tmp_path / "a.txt"]) == ["é\r\n"]


@pytest.mark.parametrize("content", [None, b"\xff\xfe\x00"])
def test_a_file_that_is_no_text_is_refused(tmp_path, content):
  file = tmp_path / "file"
  if content is not None:
    file.write_bytes(content)
  with pytest.raises(ValueError, match=r"calibration file .* is no text that can be read"):
    read_texts([file])


def test_the_demo_texts_are_source_and_not_the_held_out_files():
  texts = calibration_texts()
  assert len(texts) > 100 and any("import " in text for text in texts)
  held_out = heldout_text()
  assert not any(len(text) > 500 and text in held_out for text in texts)
