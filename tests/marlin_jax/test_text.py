# SPDX-License-Identifier: Apache-2.0
import jax.numpy as jnp
import jaxtyping
import pytest
import tokenizers
from flax import nnx

from marlin_jax.models.config import ModelConfig
from marlin_jax.models.decoder import Decoder
from marlin_jax.text import generate, stream
from marlin_jax.tokenizer import Tokenizer

EOS = tuple(range(240, 257))  # of 257 tokens, so that a random model meets one soon
SAMPLED = {"temperature": 1.5, "top_k": 250}


@pytest.fixture(scope="module")
def tokenizer():
  """One token a byte, so that a random model writes characters in pieces and bytes that are no character."""
  alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
  made = tokenizers.Tokenizer(tokenizers.models.BPE({byte: i for i, byte in enumerate(alphabet)}, merges=[]))
  made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
  made.decoder = tokenizers.decoders.ByteLevel()
  return Tokenizer({"tokenizer.json": made.to_str()})


@pytest.fixture(scope="module")
def bare_model():
  config = ModelConfig(
    vocab_size=257,
    hidden_size=32,
    intermediate_size=32,
    num_layers=1,
    num_heads=2,
    num_kv_heads=2,
    head_dim=16,
    max_position_embeddings=64,
    eos_token_ids=EOS,
  )
  return Decoder(config, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(1))


@pytest.fixture
def model(bare_model, tokenizer):
  bare_model.tokenizer = tokenizer
  return bare_model


def joined(pieces, rows):
  texts = [""] * rows
  for row, text in pieces:
    assert text
    texts[row] += text
  return texts


def test_the_answer_is_of_the_kind_of_the_prompt(model):
  batch = generate(model, ["def f", "x"], max_new_tokens=8)
  assert len(batch) == 2 and all(isinstance(text, str) and text for text in batch)
  assert generate(model, "def f", max_new_tokens=8) == batch[0]
  assert generate(model, ["x"], max_new_tokens=8) == [batch[1]]
  tokens = generate(model, [model.tokenizer.encode("def f"), model.tokenizer.encode("x")], max_new_tokens=8)
  assert [[type(token) for token in row] for row in tokens] == [[int] * len(row) for row in tokens]
  assert [model.tokenizer.decode(row) for row in tokens] == batch


def test_only_the_continuation_comes_back(model):
  assert not generate(model, "def f", max_new_tokens=8).startswith("def f")


@pytest.mark.parametrize("seed", range(6))
def test_the_pieces_of_the_stream_are_the_text(model, seed):
  prompts = ["é", "class A:\n"]
  settings = SAMPLED | {"max_new_tokens": 16, "seed": seed}
  texts = generate(model, prompts, **settings)
  assert joined(stream(model, prompts, **settings), 2) == texts
  tokens = generate(model, [model.tokenizer.encode(prompt) for prompt in prompts], **settings)
  for prompt, row, text in zip(prompts, tokens, texts, strict=True):
    kept = [token for token in row if token not in EOS]
    assert prompt + text == model.tokenizer.decode(model.tokenizer.encode(prompt) + kept)


def test_a_single_string_streams_as_row_0(model):
  assert joined(stream(model, "def", max_new_tokens=9), 1) == [generate(model, "def", max_new_tokens=9)]


def test_text_ends_before_eos_and_token_ids_with_it(model):
  prompt = model.tokenizer.encode("while")
  ended = 0
  for seed in range(6):
    (tokens,) = generate(model, [prompt], max_new_tokens=16, seed=seed, **SAMPLED)
    assert not set(tokens[:-1]) & set(EOS)
    if tokens[-1] in EOS:
      ended += 1
      text = generate(model, "while", max_new_tokens=16, seed=seed, **SAMPLED)
      assert "while" + text == model.tokenizer.decode(prompt + tokens[:-1])
    else:
      assert len(tokens) == 16
  assert ended >= 2


def test_the_space_before_the_first_new_word_is_kept(bare_model):
  """A metaspace tokenizer, as in Llama 2, drops the space at the start of whatever it decodes."""
  vocabulary = {f"▁w{i}": i for i in range(256)} | {"<unk>": 256}
  made = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
  made.pre_tokenizer = tokenizers.pre_tokenizers.Metaspace()
  made.decoder = tokenizers.decoders.Metaspace()
  bare_model.tokenizer = Tokenizer({"tokenizer.json": made.to_str()})
  (tokens,) = generate(bare_model, [[4, 2]], max_new_tokens=3, **SAMPLED)
  assert not set(tokens) & set(EOS)
  assert generate(bare_model, "w4 w2", max_new_tokens=3, **SAMPLED) == "".join(f" w{token}" for token in tokens)


def test_settings_reach_the_sampler(model):
  greedy = generate(model, "def f", max_new_tokens=16)
  assert generate(model, "def f", max_new_tokens=16, temperature=1.0, top_k=1) == greedy
  assert generate(model, "def f", max_new_tokens=16, temperature=1.0, top_p=1e-6) == greedy
  assert generate(model, "def f", max_new_tokens=16, temperature=1.0, seed=1) != greedy
  assert generate(model, "def f", max_new_tokens=16, repetition_penalty=5.0) != greedy


def test_text_needs_a_tokenizer_and_token_ids_do_not(bare_model):
  bare_model.tokenizer = None
  for ask in (generate, stream):
    with pytest.raises(ValueError, match=r"model\.tokenizer is None, so prompts must be lists of token ids"):
      ask(bare_model, "text")
  assert len(generate(bare_model, [[1, 2]], max_new_tokens=3)[0])


@pytest.mark.parametrize(
  ("prompts", "message"),
  [
    ("", r"prompts\[0\] is empty: it must hold at least one character"),
    (["a", ""], r"prompts\[1\] is empty: it must hold at least one character"),
    ("a" * 61, r"prompts\[0\] has 61 tokens and max_new_tokens=4, together 65, which must be at most 64"),
    ([], "prompts is empty"),
    ([[]], r"prompts\[0\] is empty: it must hold at least one token"),
    ([[300]], r"prompts\[0\] has the token id 300, which must be an integer in 0 \.\. 256"),
    (["a", [1]], r"prompts\[0\]='a' must be a list of token ids"),
    ([1, 2], r"prompts\[0\]=1 must be a list of token ids"),
    (7, "prompts=7 must be"),
  ],
  ids=str,
)
def test_bad_prompts_are_refused_by_name(monkeypatch, model, prompts, message):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  with pytest.raises(ValueError, match=message):
    generate(model, prompts, max_new_tokens=4)


def test_a_stream_refuses_bad_arguments_at_the_call(monkeypatch, model):
  monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)
  for arguments, message in (
    ({"prompts": [[1, 2]]}, r"prompts=\[\[1, 2\]\] must be a string or a list of strings"),
    ({"prompts": "a", "top_p": 2.0}, r"top_p=2\.0 must be in \(0, 1\]"),
    ({"prompts": "a", "max_new_tokens": 0}, "max_new_tokens=0 must be an integer, at least 1"),
  ):
    with pytest.raises(ValueError, match=message):
      stream(model, **arguments)
