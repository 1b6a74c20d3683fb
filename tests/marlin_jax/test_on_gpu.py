# SPDX-License-Identifier: Apache-2.0
"""The whole path on a GPU: the kernel is in the program, and the text is the one the specification gives."""

import functools

import jax
import numpy as np
import pytest

from marlin_jax import convert, generate, load_model, ops
from marlin_jax.console import describe_matmuls
from marlin_jax.demo import heldout_text, model_path
from marlin_jax.demo.run import PROMPT
from marlin_jax.generation.scoring import perplexity
from pallas_kernels import matmul

pytestmark = pytest.mark.gpu

PROMPTS = [PROMPT, "def read_lines(path):\n", "class TestCounter(unittest.TestCase):\n\n    def test_"]


@pytest.fixture
def model():
  model = load_model(model_path())
  convert(model)
  return model


@pytest.fixture
def by_reference(monkeypatch):
  """Calls a function with every quantized product computed by the reference, on the same GPU."""

  def call(function):
    with monkeypatch.context() as patch:
      patch.setattr(ops, "matmul", functools.partial(matmul, implementation="reference"))
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
