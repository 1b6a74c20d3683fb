# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back, by the `tokenizers` library and the tokenizer.json of a checkpoint."""

import json
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import tokenizers

# The character that stands for each byte in a byte-level vocabulary: itself where it is printable, and one from U+0100
# on, in order, where it is not (Radford et al., Language Models are Unsupervised Multitask Learners, 2.2).
_PRINTABLE = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
_BYTE_OF_CHARACTER = {chr(byte): byte for byte in _PRINTABLE} | {
  chr(0x100 + i): byte for i, byte in enumerate(sorted(set(range(256)) - _PRINTABLE))
}

TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


class Tokenizer:
  """The tokenizer of a model; equal and hashed by content, because a Flax model keeps it as static data.

  Holds the checkpoint's tokenizer files as they were, so that saving a model writes them back unchanged.
  """

  def __init__(self, files: Mapping[str, str]):
    self._files = tuple(sorted(files.items()))
    try:
      self._tokenizer = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    except Exception as error:  # the library raises plain Exception
      raise ValueError(f"tokenizer.json is not a tokenizer that the tokenizers library reads: {error}") from None
    # A file may say how its last user cut and filled batches; a prompt is neither cut nor filled.
    self._tokenizer.no_truncation()
    self._tokenizer.no_padding()
    added = self._tokenizer.get_added_tokens_decoder()
    self._special_ids = frozenset(token for token, entry in added.items() if entry.special)
    self._added_ids = frozenset(added)
    self._byte_level = '"ByteLevel"' in json.dumps(json.loads(files["tokenizer.json"]).get("decoder"))

  @classmethod
  def from_folder(cls, folder: str | os.PathLike[str]) -> "Tokenizer":
    """The tokenizer in a checkpoint folder.

    Raises:
      ValueError: tokenizer.json is missing or malformed.
    """
    files = {name: Path(folder, name) for name in TOKENIZER_FILES}
    if not files["tokenizer.json"].is_file():
      raise ValueError(f"{files['tokenizer.json']} is missing")
    return cls({name: file.read_text(encoding="utf-8") for name, file in files.items() if file.is_file()})

  def save(self, folder: str | os.PathLike[str]) -> None:
    """Write the tokenizer files into `folder`."""
    for name, text in self._files:
      Path(folder, name).write_text(text, encoding="utf-8")

  @property
  def vocab_size(self) -> int:
    """One more than the largest token id, special tokens included."""
    return max(self._tokenizer.get_vocab(with_added_tokens=True).values()) + 1

  def token_id(self, token: str) -> int | None:
    """The id of one token given as it is written in the vocabulary, such as "</s>", or None."""
    return self._tokenizer.token_to_id(token)

  def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
    """Token ids of `text`, with what the tokenizer's template puts around it (usually a beginning-of-text token)."""
    return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

  def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
    """The token ids of each text as `encode` gives them, by as many threads as there are processors."""
    return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(list(texts))]

  def decode(self, ids: Iterable[int]) -> str:
    """The text of `ids` without special tokens; bytes that form no character become U+FFFD."""
    return self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=True)

  def is_visible(self, token: int) -> bool:
    """Whether a token id takes part in `decode`: it is in the vocabulary and not special."""
    return token not in self._special_ids and self._tokenizer.id_to_token(token) is not None

  def is_byte(self, token: int) -> bool:
    """Whether a token id is a byte-fallback token, <0x00> to <0xFF>: one byte of a character not in the vocabulary."""
    return re.fullmatch("<0x[0-9A-F]{2}>", self._tokenizer.id_to_token(token) or "") is not None

  def token_bytes(self, token: int) -> bytes:
    """The bytes that a token stands for within a text, a leading space included; a special token's own spelling."""
    word = self._tokenizer.id_to_token(token)
    if word is None:
      return b""
    if token in self._added_ids:
      return word.encode()
    if self.is_byte(token):
      return bytes([int(word[3:5], 16)])
    if self._byte_level:
      return bytes(_BYTE_OF_CHARACTER[character] for character in word)
    # Twice in a row, because many decoders drop the space before the first word.
    return self.decode([token, token])[len(self.decode([token])) :].encode()

  def file(self, name: str) -> str | None:
    """The content of one of TOKENIZER_FILES, or None if the checkpoint has no such file."""
    return dict(self._files).get(name)

  def stream(self) -> "TextStream":
    """A decoder that takes ids as they come."""
    return TextStream(self)

  def __eq__(self, other: object) -> bool:
    return isinstance(other, Tokenizer) and self._files == other._files

  def __hash__(self) -> int:
    return hash(self._files)

  def __repr__(self) -> str:
    return f"Tokenizer(vocab_size={self.vocab_size})"


class TextStream:
  """Decodes one row of ids piece by piece: the joined pieces of `add` and `finish` are `decode` of all ids.

  A character whose bytes are spread over several tokens comes out with the last of them. Byte tokens such as <0xF0>
  are held until another kind of token follows: one byte that fits nowhere spoils the whole run of them.
  """

  def __init__(self, tokenizer: Tokenizer):
    self._tokenizer = tokenizer
    # Decoders treat the first token in their own way (a leading space goes), so a piece is decoded after its neighbour.
    self._previous: list[int] = []
    self._pending: list[int] = []

  def add(self, ids: Iterable[int]) -> str:
    """The text that these further ids complete; may be empty."""
    pieces = []
    for token in map(int, ids):
      if not self._tokenizer.is_visible(token):
        continue
      self._pending.append(token)
      text = self._pending_text()
      if text and not text.endswith("\N{REPLACEMENT CHARACTER}") and not self._tokenizer.is_byte(token):
        pieces.append(text)
        self._previous, self._pending = self._pending, []
    return "".join(pieces)

  def finish(self) -> str:
    """The text still held back."""
    return self._pending_text()

  def _pending_text(self) -> str:
    before = self._tokenizer.decode(self._previous)
    return self._tokenizer.decode(self._previous + self._pending)[len(before) :]
