# SPDX-License-Identifier: Apache-2.0
"""The demo model's text: the Python standard library, split by whole files, tokenized by its own byte-level BPE.

    folder of .py files -> training / validation / sample files -> tokenizer (training files only) -> token streams

The sample ships beside the model and is scored once, at the end. Choosing among checkpoints uses the validation files,
so the shipped text has no part in any decision.
"""

import dataclasses
import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from jaxtyping import UInt16

END_OF_TEXT = "<|endoftext|>"

# Not the library's own hand-written code: other projects, files the build writes (they hold machine paths), tables and
# documentation that a program generated.
SKIPPED_FOLDERS = ("site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data", "config-*")
SKIPPED_FILES = ("_sysconfigdata*.py",)

# A stripped line this long is rarely shared by accident; shorter ones ("return None", "try:") are everywhere.
DISTINCTIVE_LENGTH = 20
MAX_SHARED_LINES = 0.2


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Split:
  """Three disjoint groups of whole files, each a mapping from relative path to text."""

  training: Mapping[str, str]
  validation: Mapping[str, str]
  sample: Mapping[str, str]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Corpus:
  """Everything training needs, in one file: token streams, the tokenizer, the held-out sample.

  Each stream starts with the end-of-text token and has one after every file; ids are below 65536, so uint16 holds them.
  """

  training: UInt16[np.ndarray, " n"]
  validation: UInt16[np.ndarray, " v"]
  sample: str
  tokenizer: str  # the text of tokenizer.json
  facts: Mapping[str, Any]  # what the text is: source, number of files and bytes, the held-out paths

  def save(self, path: Path) -> None:
    """Writes the corpus as one compressed .npz file."""
    texts = {"sample": self.sample, "tokenizer": self.tokenizer, "facts": json.dumps(self.facts)}
    arrays = {name: np.frombuffer(text.encode(), np.uint8) for name, text in texts.items()}
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
      np.savez_compressed(file, training=self.training, validation=self.validation, **arrays)

  @classmethod
  def load(cls, path: Path) -> "Corpus":
    """Reads a corpus that `save` wrote."""
    with np.load(path) as arrays:
      texts = {name: arrays[name].tobytes().decode() for name in ("sample", "tokenizer", "facts")}
      return cls(
        training=arrays["training"],
        validation=arrays["validation"],
        sample=texts["sample"],
        tokenizer=texts["tokenizer"],
        facts=json.loads(texts["facts"]),
      )


def read_sources(folder: Path) -> dict[str, str]:
  """Reads every hand-written UTF-8 .py file under a folder, once: path relative to the folder -> text.

  Empty files, files that are not UTF-8 and byte-for-byte copies of a file already read are left out.

  Raises:
    ValueError: the folder does not exist or holds no such file.
  """
  if not folder.is_dir():
    raise ValueError(f"source must be a folder of Python files, got {str(folder)!r}, which is not a folder")
  sources: dict[str, str] = {}
  seen: set[str] = set()
  for path in sorted(folder.rglob("*.py")):
    relative = path.relative_to(folder)
    if any(part.match(pattern) for pattern in SKIPPED_FOLDERS for part in map(Path, relative.parts[:-1])):
      continue
    if any(relative.match(pattern) for pattern in SKIPPED_FILES):
      continue
    try:
      # Bytes, not read_text(): line ends stay as they are, and the tokenizer has to give them back exactly.
      text = path.read_bytes().decode("utf-8")
    except UnicodeDecodeError:
      continue
    if text.strip() and text not in seen:
      seen.add(text)
      sources[relative.as_posix()] = text
  if not sources:
    raise ValueError(f"source must hold UTF-8 .py files, got {str(folder)!r}, which has none")
  return sources


def shared_line_share(sources: Mapping[str, str]) -> dict[str, float]:
  """For each file, the share of its distinctive lines that some other file has too; 1 where it has none."""
  lines = {
    path: {line.strip() for line in text.splitlines() if len(line.strip()) >= DISTINCTIVE_LENGTH}
    for path, text in sources.items()
  }
  files_with = Counter(line for own in lines.values() for line in own)
  return {path: sum(files_with[line] > 1 for line in own) / len(own) if own else 1.0 for path, own in lines.items()}


def split_sources(sources: Mapping[str, str], *, held_out: float = 0.03, sample_bytes: int = 256 * 1024) -> Split:
  """Holds out whole files, in the order of a hash of their paths, until `held_out` of all bytes are held out.

  A file with more than a fifth of its distinctive lines in another file is never held out: its near-duplicate in the
  training text would flatter the score. Files of at most an eighth of `sample_bytes` go to the sample while they fit
  in `sample_bytes` together, so that no single file rules it; the other held-out files are the validation text.

  Raises:
    ValueError: too little text to fill both held-out groups.
  """
  size = {path: len(text.encode()) for path, text in sources.items()}
  wanted = held_out * sum(size.values())
  shared = shared_line_share(sources)
  sample: dict[str, str] = {}
  validation: dict[str, str] = {}
  sampled = held = 0
  for path in sorted(sources, key=lambda path: hashlib.sha256(path.encode()).digest()):
    if held >= wanted:
      break
    if shared[path] > MAX_SHARED_LINES:
      continue
    held += size[path]
    if size[path] <= sample_bytes // 8 and sampled + size[path] <= sample_bytes:
      sample[path] = sources[path]
      sampled += size[path]
    else:
      validation[path] = sources[path]
  if not sample or not validation:
    raise ValueError(
      f"source holds too little text to hold out {held_out:.0%} of: {len(sources)} files, {sum(size.values())} bytes"
    )
  training = {path: text for path, text in sources.items() if path not in sample and path not in validation}
  return Split(training=training, validation=validation, sample=sample)


def train_tokenizer(texts: Iterable[str], *, vocab_size: int) -> tokenizers.Tokenizer:
  """Trains a byte-level BPE tokenizer with GPT-2's pre-tokenizer: any text round-trips, none needs an unknown token.

  Id 0 is the end-of-text token. Nothing is added to what the user wrote: no token in front, no leading space.
  """
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=vocab_size,
    special_tokens=[END_OF_TEXT],
    initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(texts, trainer)
  return tokenizer


def token_stream(tokenizer: tokenizers.Tokenizer, texts: Iterable[str]) -> UInt16[np.ndarray, " n"]:
  """Concatenates the files' tokens: end of text, file, end of text, file, ..., end of text."""
  end = tokenizer.token_to_id(END_OF_TEXT)
  ids = [end]
  for encoding in tokenizer.encode_batch_fast(list(texts)):
    ids += encoding.ids
    ids.append(end)
  return np.array(ids, np.uint16)


def build_corpus(folder: Path, *, vocab_size: int, held_out: float = 0.03, sample_bytes: int = 256 * 1024) -> Corpus:
  """Reads a folder of sources, splits it, trains the tokenizer on the training files and tokenizes.

  Raises:
    ValueError: the folder has no usable text, or too little for the split or the vocabulary.
  """
  sources = read_sources(folder)
  split = split_sources(sources, held_out=held_out, sample_bytes=sample_bytes)
  tokenizer = train_tokenizer(split.training.values(), vocab_size=vocab_size)
  if tokenizer.get_vocab_size() != vocab_size:
    raise ValueError(f"source holds too little text for {vocab_size=}: it gives {tokenizer.get_vocab_size()} tokens")
  groups = {"training": split.training, "validation": split.validation, "sample": split.sample}
  facts = {
    "files": {name: len(group) for name, group in groups.items()},
    "bytes": {name: sum(len(text.encode()) for text in group.values()) for name, group in groups.items()},
    "sample_files": sorted(split.sample),
    "validation_files": sorted(split.validation),
  }
  return Corpus(
    training=token_stream(tokenizer, split.training.values()),
    validation=token_stream(tokenizer, split.validation.values()),
    sample="".join(split.sample.values()),
    tokenizer=tokenizer.to_str(),
    facts=facts,
  )
