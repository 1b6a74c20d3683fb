# SPDX-License-Identifier: Apache-2.0
"""Text as it may be sent: what comes in pieces is what one decode gives, and nothing of a stop string gets out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from marlin_jax.serving.continuation import Continuation, StopStrings
from marlin_jax.serving.request import TokenEvent, TokenLogprobs

EOS = 2
TEXTS = [
  "plain words",
  "héllo wörld — ça va?",
  "日本語のテキスト",
  "🙂🙃 👩\u200d👩\u200d👧 emoji",
  "e\u0301 combining",
  "tab\tand\nline\r\n",
]


def cut_by_definition(text, stop):
  """`text` before the stop string that is complete first, of those the longest, found one character at a time."""
  for end in range(1, len(text) + 1):
    complete = [s for s in stop if text[:end].endswith(s)]
    if complete:
      return text[: end - max(map(len, complete))], True
  return text, False


def partition(data, sequence):
  cuts = sorted(data.draw(st.lists(st.integers(0, len(sequence)), max_size=6)))
  return [sequence[a:b] for a, b in zip([0, *cuts], [*cuts, len(sequence)], strict=True)]


@given(data=st.data())
def test_stop_strings_cut_where_the_definition_says_however_the_text_comes(data):
  text = data.draw(st.text("ab🙂", max_size=14))
  stop = data.draw(st.lists(st.text("ab🙂", min_size=1, max_size=4), max_size=4))
  stops, sent = StopStrings(stop), ""
  for piece in partition(data, text):
    sent += stops.add(piece)
    # What was sent is final, and nothing is held back without need.
    want, found = cut_by_definition(text, stop)
    assert want.startswith(sent) and (not stops.found or found)
  sent += stops.finish()
  assert (sent, stops.found) == cut_by_definition(text, stop)


def test_only_what_may_become_a_stop_string_is_held_back():
  stops = StopStrings(["END", "\n\n"])
  assert [stops.add(piece) for piece in ("a E", "N", "Cb\n", "c", "\n")] == ["a ", "", "ENCb", "\nc", ""]
  assert stops.finish() == "\n"


def continuation(tokenizer, stop=(), prompt=()):
  stream = tokenizer.stream()
  stream.add(prompt)
  return Continuation(stream, stop, (EOS,))


def said(tokens):
  return [TokenLogprobs(-float(token), [token], [-float(token)]) for token in tokens]


def take_all(choice, tokens, chunks, reason="length"):
  """The pieces of tokens that come in chunks; it ends with the last."""
  pieces = []
  for i, chunk in enumerate(chunks):
    last = i == len(chunks) - 1
    pieces.append(choice.take(TokenEvent(chunk, said(chunk), reason if last else None)))
    if choice.ended:
      break
  return pieces


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize("size", [1, 3, 100])
def test_pieces_join_to_the_whole_text_and_no_piece_ends_within_a_character(tokenizer, text, size):
  tokens = tokenizer.encode(text, add_special_tokens=False)
  chunks = [tokens[i : i + size] for i in range(0, len(tokens), size)]
  pieces = take_all(continuation(tokenizer), tokens, chunks)
  assert "".join(piece.text for piece in pieces) == text
  assert not any("\N{REPLACEMENT CHARACTER}" in piece.text for piece in pieces)
  assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
  assert pieces[-1].finish_reason == "length"


@given(data=st.data())
def test_any_tokens_in_any_chunks_give_the_decoded_text_up_to_the_stop_string(tokenizer, data):
  tokens = data.draw(st.lists(st.integers(3, 511), max_size=25))
  whole = tokenizer.decode(tokens)
  inside = [whole[i : i + n] for i in range(len(whole)) for n in (1, 2, 5)]
  stop = data.draw(st.lists(st.sampled_from([*inside, "zzz"]), max_size=3))
  choice = continuation(tokenizer, stop)
  pieces = take_all(choice, tokens, partition(data, tokens))
  want, found = cut_by_definition(whole, stop)
  assert "".join(piece.text for piece in pieces) == want
  assert pieces[-1].finish_reason == ("stop" if found else "length")
  # Tokens are reported in order, each with the text it belongs to, and none that lies beyond the cut.
  entries = [entry for piece in pieces for entry in piece.tokens]
  assert [entry.token for entry in entries] == tokens[: len(entries)]
  assert all(entry.offset <= len(want) for entry in entries)
  assert [entry.logprobs.logprob for entry in entries] == [-entry.token for entry in entries]
  if not found:
    assert len(entries) == len(tokens)


def test_a_stop_string_across_chunks_ends_it_and_later_tokens_do_not_count(tokenizer):
  tokens = tokenizer.encode("one STOP two three", add_special_tokens=False)
  at = next(i for i in range(len(tokens)) if "STOP" in tokenizer.decode(tokens[: i + 1])) + 1
  choice = continuation(tokenizer, ["STOP"])
  pieces = take_all(choice, tokens, [tokens[: at - 2], tokens[at - 2 : at - 1], tokens[at - 1 :]])
  assert "".join(piece.text for piece in pieces) == "one "
  assert pieces[-1].finish_reason == "stop" and choice.ended and choice.token_count == at


def test_the_text_ends_before_eos_which_counts_as_a_token(tokenizer):
  tokens = [*tokenizer.encode("done", add_special_tokens=False), EOS]
  choice = continuation(tokenizer)
  piece = choice.take(TokenEvent(tokens, said(tokens), "stop"))
  assert (piece.text, piece.finish_reason, choice.token_count) == ("done", "stop", len(tokens))
  assert EOS not in [entry.token for entry in piece.tokens]


def test_offsets_are_places_in_the_text(tokenizer):
  tokens = tokenizer.encode("aé🙂 b", add_special_tokens=False)
  piece = continuation(tokenizer).take(TokenEvent(tokens, said(tokens), "length"))
  assert piece.text == "aé🙂 b"
  assert b"".join(tokenizer.token_bytes(entry.token) for entry in piece.tokens).decode() == piece.text
  read = b""
  for entry in piece.tokens:
    assert entry.offset == len(read.decode(errors="ignore"))
    read += tokenizer.token_bytes(entry.token)


def test_the_prompt_is_not_part_of_it(tokenizer):
  prompt, tokens = tokenizer.encode("Hello"), tokenizer.encode(" world", add_special_tokens=False)
  piece = continuation(tokenizer, prompt=prompt).take(TokenEvent(tokens, None, "length"))
  assert (piece.text, piece.tokens) == (" world", [])
