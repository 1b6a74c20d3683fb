# SPDX-License-Identifier: Apache-2.0
"""The whole path on a GPU: the kernel is in the program, and the text is the one the specification gives."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax import convert, generate, load_model, ops
from marlin_jax.console import describe_matmuls
from marlin_jax.demo import heldout_text, model_path
from marlin_jax.demo.run import PROMPT
from marlin_jax.generation.loop import generate_tokens
from marlin_jax.generation.sampling import GREEDY
from marlin_jax.generation.scoring import perplexity
from marlin_jax.quantization import quantize_checkpoint
from pallas_kernels import after_attention, matmul
from tests.marlin_jax.checkpoint.test_real_checkpoints import folder_of

pytestmark = pytest.mark.gpu

PROMPTS = [PROMPT, "def read_lines(path):\n", "class TestCounter(unittest.TestCase):\n\n    def test_"]


@pytest.fixture
def model():
  model = load_model(model_path())
  convert(model)
  return model


def matmul_by_reference(*args, **options):
  """In the place of `ops.matmul`, which is always told an implementation, if only None: that must not win."""
  return matmul(*args, **options | {"implementation": "reference"})


@pytest.fixture
def by_reference(monkeypatch):
  """Calls a function with every quantized product computed by the reference, on the same GPU."""

  def call(function):
    with monkeypatch.context() as patch:
      patch.setattr(ops, "matmul", matmul_by_reference)
      patch.setattr(ops, "after_attention", partial(after_attention, implementation="reference"))
      jax.clear_caches()
      result = function()
    jax.clear_caches()
    return result

  return call


def test_the_kernel_is_used_and_greedy_tokens_are_those_of_the_reference(model, by_reference):
  assert "Pallas kernel" in describe_matmuls(model)
  prompts = [model.tokenizer.encode(prompt) for prompt in PROMPTS]

  def tokens():
    return generate(model, prompts, max_new_tokens=64)

  assert tokens() == by_reference(tokens)


def test_perplexity_is_that_of_the_reference(model, by_reference):
  tokens = np.asarray(model.tokenizer.encode(heldout_text())[:8192], np.int32)

  def score():
    return perplexity(model, tokens, window=1024)

  # Both round every product once to bfloat16; what differs is the order of float32 additions before that.
  assert score() == pytest.approx(by_reference(score), rel=2e-3)


def test_experts_take_the_kernel_in_prefill_and_decode(tmp_path, by_reference):
  folder = folder_of("qwen3moe-bf16")
  quantize_checkpoint(folder, tmp_path / "quantized", group_size=64, progress=False)
  prompts = np.load(folder / "logits_fp32.npz")["input_ids"]
  model = load_model(tmp_path / "quantized")
  assert "Pallas kernel" in describe_matmuls(model)
  options = dict(max_new_tokens=16, sampling=GREEDY, eos_token_ids=())
  generated = np.concatenate(list(generate_tokens(model, prompts.tolist(), **options)), axis=1)
  rows = jnp.asarray(np.concatenate([prompts, generated], axis=1), jnp.int32)

  def logits(dtype):
    with jax.default_matmul_precision("highest"):
      return np.asarray(nnx.jit(lambda model: model(rows))(load_model(tmp_path / "quantized", dtype=dtype)))

  by_kernel, rounded = logits(jnp.bfloat16), by_reference(lambda: logits(jnp.bfloat16))
  exact = by_reference(lambda: logits(jnp.float32))

  def error(found):
    # The median over tokens: rounding may send a token that is between two experts to the other.
    return np.median(np.linalg.norm(found - exact, axis=-1) / np.linalg.norm(exact, axis=-1))

  assert error(by_kernel) < 1.25 * error(rounded) < 0.1
  # What decoding chose is the best, up to what two logits may be off by rounding.
  before = exact[:, prompts.shape[1] - 1 : -1]
  chosen = np.take_along_axis(before, generated[..., None], axis=-1)
  assert (before.max(axis=-1, keepdims=True) - chosen <= 2 * np.abs(rounded - exact).max()).all()
