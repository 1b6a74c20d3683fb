# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax demo`: the whole path on the model that ships, and what it costs in quality."""

import sys
import time

import numpy as np

from marlin_jax.checkpoint import load_model
from marlin_jax.console import describe_matmuls, write_continuation
from marlin_jax.convert import convert
from marlin_jax.demo import heldout_text, model_path
from marlin_jax.generation.scoring import perplexity
from marlin_jax.quantized import QuantSpec
from pallas_kernels import current_device

PROMPT = "import argparse\nimport os\n\n\ndef main():\n    parser ="


def run_demo(*, prompt: str = PROMPT, max_new_tokens: int = 64, windows: int = 8) -> None:
  """Loads, scores, quantizes, scores again and lets the quantized model write; prints each step to stdout.

  Args:
    prompt: Python source to continue.
    max_new_tokens: how many tokens of it.
    windows: how many windows of the model's context to take from the start of the held-out text for the perplexity.
  """
  model = load_model(model_path())
  context = model.config.max_position_embeddings
  tokens = np.asarray(model.tokenizer.encode(heldout_text())[: windows * context], np.int32)
  print(f"scoring {len(tokens)} tokens of held-out Python source on {current_device().kind}", flush=True)
  before = perplexity(model, tokens, window=context)
  began = time.perf_counter()
  report = convert(model, QuantSpec(bits=4, group_size=128), progress=sys.stderr.isatty())
  print(f"{report}\nquantized in {time.perf_counter() - began:.1f} s", flush=True)
  after = perplexity(model, tokens, window=context)
  print(f"perplexity {before:.3f} in bfloat16, {after:.3f} in 4 bits ({100 * (after / before - 1):+.2f} %)")
  print(describe_matmuls(model))

  def write(text: str) -> None:
    print(text, end="", flush=True)

  print(f"\n{prompt}", end="", flush=True)
  print("\n\n" + write_continuation(model, prompt, write, max_new_tokens=max_new_tokens))
