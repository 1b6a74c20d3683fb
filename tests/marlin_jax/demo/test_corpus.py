# SPDX-License-Identifier: Apache-2.0
import json
from pathlib import Path

import numpy as np
import pytest

from marlin_jax.demo.corpus import (
  END_OF_TEXT,
  Corpus,
  build_corpus,
  read_sources,
  shared_line_share,
  split_sources,
  token_stream,
  train_tokenizer,
)

AWKWARD = "\tdef naïve(x):\r\n    return '😀\x00' + x  \n\n\n   # ﬁn — 東京\f\n"


def source_file(number: int, lines: int = 40) -> str:
  """A file whose every line is long and its own."""
  return "".join(f"value_{number}_{line} = compute_{number}({line}, {number * line})\n" for line in range(lines))


def test_sources_are_handwritten_utf8_files_once(tmp_path: Path):
  kept = {"a.py": AWKWARD, "package/b.py": "b = 1\n"}
  left_out = {
    "notes.txt": b"not Python",
    "empty.py": b"\n",
    "latin.py": "# caf\xe9\n".encode("latin-1"),
    "package/copy_of_a.py": AWKWARD.encode(),
    "site-packages/other.py": b"other = 1\n",
    "config-3.11-x86_64-linux-gnu/python-config.py": b"prefix = '/somewhere'\n",
    "_sysconfigdata__linux_x86_64-linux-gnu.py": b"build_time_vars = {}\n",
    "encodings/cp1252.py": b"table = 1\n",
  }
  for name, content in {**left_out, **{name: text.encode() for name, text in kept.items()}}.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_bytes(content)
  assert read_sources(tmp_path) == kept


def test_a_source_without_python_is_refused(tmp_path: Path):
  with pytest.raises(ValueError, match="which has none"):
    read_sources(tmp_path)
  with pytest.raises(ValueError, match=r"absent', which is not a folder"):
    read_sources(tmp_path / "absent")


def test_shared_lines_are_counted_over_distinctive_lines():
  own, common = "this_line_is_only_here = 1\n", "this_line_is_in_both_files = 1\n"
  shared = shared_line_share({"a.py": own + common + "x = 1\n", "b.py": common + "x = 1\n", "c.py": "x = 1\n"})
  assert shared == {"a.py": 0.5, "b.py": 1.0, "c.py": 1.0}


def test_split_partitions_whole_files_and_keeps_near_duplicates_in_training():
  sources = {f"{number}.py": source_file(number) for number in range(60)}
  twins = {f"twin{number}.py": source_file(100 + number // 2) + f"# {number}\n" for number in range(40)}
  split = split_sources(sources | twins, held_out=0.4, sample_bytes=12_000)
  groups = (split.training, split.validation, split.sample)
  assert {path: text for group in groups for path, text in group.items()} == sources | twins
  assert sum(map(len, groups)) == len(sources | twins)
  assert twins.keys() <= split.training.keys()
  total = sum(len(text) for text in (sources | twins).values())
  held_out = sum(len(text) for group in groups[1:] for text in group.values())
  assert 0.4 * total <= held_out <= 0.4 * total + max(map(len, sources.values()))
  assert 0 < sum(len(text) for text in split.sample.values()) <= 12_000


def test_split_does_not_depend_on_the_order_of_the_files():
  sources = {f"{number}.py": source_file(number) for number in range(60)}
  backwards = dict(reversed(sources.items()))
  first, second = (split_sources(files, held_out=0.4, sample_bytes=12_000) for files in (sources, backwards))
  assert (first.sample, first.validation) == (second.sample, second.validation)


def test_too_little_text_to_split_is_refused():
  with pytest.raises(ValueError, match="too little text to hold out 3% of: 1 files, 6 bytes"):
    split_sources({"a.py": "a = 1\n"})


def test_tokenizer_round_trips_any_text_and_adds_nothing():
  tokenizer = train_tokenizer([source_file(0)], vocab_size=300)
  assert tokenizer.token_to_id(END_OF_TEXT) == 0
  for text in (AWKWARD, " leading", "trailing ", "", "\n"):
    ids = tokenizer.encode(text).ids
    assert 0 not in ids
    assert tokenizer.decode(ids) == text


def test_stream_puts_end_of_text_around_every_file():
  tokenizer = train_tokenizer([source_file(0)], vocab_size=300)
  texts = ["a = 1\n", AWKWARD]
  first, second = (tokenizer.encode(text).ids for text in texts)
  np.testing.assert_array_equal(token_stream(tokenizer, texts), [0, *first, 0, *second, 0])


def test_corpus_survives_saving(tmp_path: Path):
  for number in range(40):
    (tmp_path / f"{number}.py").write_text(source_file(number))
  corpus = build_corpus(tmp_path, vocab_size=300, held_out=0.4, sample_bytes=12_000)
  corpus.save(tmp_path / "made" / "corpus.npz")
  loaded = Corpus.load(tmp_path / "made" / "corpus.npz")
  np.testing.assert_array_equal(loaded.training, corpus.training)
  np.testing.assert_array_equal(loaded.validation, corpus.validation)
  assert (loaded.sample, loaded.tokenizer) == (corpus.sample, corpus.tokenizer)
  assert loaded.facts == json.loads(json.dumps(corpus.facts))
  assert loaded.facts["files"] == {
    "training": 40 - sum(len(corpus.facts[f"{name}_files"]) for name in ("sample", "validation")),
    "validation": len(corpus.facts["validation_files"]),
    "sample": len(corpus.facts["sample_files"]),
  }


def test_a_vocabulary_larger_than_the_text_gives_is_refused(tmp_path: Path):
  for number in range(40):
    (tmp_path / f"{number}.py").write_text(source_file(number))
  with pytest.raises(ValueError, match="too little text for vocab_size=50000"):
    build_corpus(tmp_path, vocab_size=50_000, held_out=0.4, sample_bytes=12_000)
