# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers

from marlin_jax.tokenizer import Tokenizer

FOLDER = Path(__file__).parents[1] / "data" / "llama-bf16"
CASES = json.loads((FOLDER / "tokenizer_cases.json").read_text(encoding="utf-8"))["cases"]
BYTE_LEVEL = Tokenizer.from_folder(FOLDER)


def sentencepiece_like() -> Tokenizer:
  """A word-boundary tokenizer with byte fallback, as Llama 2 and Mistral have, whose decoder strips a leading space."""
  words = ["<unk>", "▁", "▁a", "b", "▁b", "c", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
  tokenizer = tokenizers.Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=0, byte_fallback=True))
  tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
  tokenizer.decoder = decoders.Sequence(
    [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
  )
  return Tokenizer({"tokenizer.json": tokenizer.to_str()})


WITH_BYTE_FALLBACK = sentencepiece_like()


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["text"])
def test_recorded_cases(case):
  assert BYTE_LEVEL.encode(case["text"]) == case["ids"]
  assert BYTE_LEVEL.encode(case["text"], add_special_tokens=False) == case["ids_no_special"]
  assert BYTE_LEVEL.decode(case["ids"]) == case["decoded_skip_special"]


def test_nothing_is_cut_or_filled_though_the_file_says_so():
  raw = tokenizers.Tokenizer.from_file(str(FOLDER / "tokenizer.json"))
  raw.enable_truncation(4)
  raw.enable_padding(length=16)
  tokenizer = Tokenizer({"tokenizer.json": raw.to_str()})
  texts = ["a", "def main():\n  return 1\n"]
  assert raw.encode(texts[0]).ids != BYTE_LEVEL.encode(texts[0])
  assert raw.encode(texts[1]).ids != BYTE_LEVEL.encode(texts[1])
  assert [tokenizer.encode(text) for text in texts] == [BYTE_LEVEL.encode(text) for text in texts]
  assert tokenizer.encode_batch(texts) == [BYTE_LEVEL.encode(text) for text in texts]


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, WITH_BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
def test_a_batch_has_the_ids_of_each_text(tokenizer):
  texts = [case["text"] for case in CASES] + ["", "a b " * 50]
  assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
  assert tokenizer.encode_batch([]) == []


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, WITH_BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
@given(data=st.data())
def test_streamed_pieces_join_to_the_whole_text(tokenizer, data):
  ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), max_size=30))
  stream = tokenizer.stream()
  pieces = [stream.add([token]) for token in ids]
  assert "".join(pieces) + stream.finish() == tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, WITH_BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
def test_a_character_spread_over_tokens_comes_out_whole(tokenizer):
  text = "a 🙂 é b"
  ids = tokenizer.encode(text, add_special_tokens=False)
  assert len(ids) > len(text)
  stream = tokenizer.stream()
  pieces = [stream.add([token]) for token in ids]
  assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)
  assert sum("🙂" in piece for piece in pieces) == 1
  assert "".join(pieces) == text and stream.finish() == ""


def test_byte_tokens_wait_for_the_end_of_their_run():
  ids = WITH_BYTE_FALLBACK.encode("c🙂", add_special_tokens=False)
  stream = WITH_BYTE_FALLBACK.stream()
  assert stream.add(ids[:-1]) == "c" and stream.add(ids[-1:]) == ""
  assert stream.finish() == "🙂"


def test_special_tokens_between_the_bytes_of_a_character_are_passed_over():
  ids = BYTE_LEVEL.encode("x🙂y", add_special_tokens=False)
  ids.insert(3, BYTE_LEVEL.token_id("</s>"))
  stream = BYTE_LEVEL.stream()
  assert stream.add(ids) == BYTE_LEVEL.decode(ids) == "x🙂y"


def test_bytes_that_never_became_a_character_come_out_at_the_end():
  ids = BYTE_LEVEL.encode("x🙂", add_special_tokens=False)[:-1]
  stream = BYTE_LEVEL.stream()
  assert stream.add(ids) == "x"
  assert stream.finish() == "\N{REPLACEMENT CHARACTER}"


def test_equal_by_content_and_saved_unchanged(tmp_path):
  BYTE_LEVEL.save(tmp_path)
  again = Tokenizer.from_folder(tmp_path)
  assert again == BYTE_LEVEL and hash(again) == hash(BYTE_LEVEL) and again is not BYTE_LEVEL
  assert again != WITH_BYTE_FALLBACK
  for file in tmp_path.iterdir():
    assert file.read_bytes() == (FOLDER / file.name).read_bytes()
  assert {file.name for file in tmp_path.iterdir()} == {
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
  }


def test_vocabulary():
  assert BYTE_LEVEL.vocab_size == 512
  assert BYTE_LEVEL.token_id("</s>") == 2 and BYTE_LEVEL.token_id("no such token") is None


def test_a_missing_or_malformed_file_is_named(tmp_path):
  with pytest.raises(ValueError, match=r"tokenizer\.json is missing"):
    Tokenizer.from_folder(tmp_path)
  (tmp_path / "tokenizer.json").write_text("{}")
  with pytest.raises(ValueError, match=r"tokenizer\.json is not a tokenizer"):
    Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("tokenizer", [BYTE_LEVEL, WITH_BYTE_FALLBACK], ids=["byte-level", "byte-fallback"])
@pytest.mark.parametrize("text", ["a b", "c 🙂 é b", " a a", "日本"])
def test_the_bytes_of_tokens_join_to_the_text(tokenizer, text):
  ids = tokenizer.encode(text, add_special_tokens=False)
  # A word-boundary tokenizer puts a space before the first word.
  assert b"".join(map(tokenizer.token_bytes, ids)).decode().lstrip() == text.lstrip()


def test_the_bytes_of_special_and_unknown_tokens():
  assert BYTE_LEVEL.token_bytes(2) == b"</s>" and BYTE_LEVEL.token_bytes(10_000) == b""
  assert {BYTE_LEVEL.token_bytes(token) for token in range(512)} >= {bytes([byte]) for byte in range(256)}
