# SPDX-License-Identifier: Apache-2.0
"""A checkpoint in, 4 bits out, and text: load, quantize, generate for a batch, save, load again, stream.

    python examples/03_quantize_and_generate.py              # the demo model that ships
    python examples/03_quantize_and_generate.py path/to/hf   # any Llama, Mistral, Qwen2 or Qwen3 checkpoint

Most of its time goes into compiling: on a CPU about 20 seconds for the demo model.
"""

import argparse
import tempfile
from pathlib import Path

from marlin_jax import generate, load_model, quantize, save_model, stream
from marlin_jax.demo import model_path

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("checkpoint", nargs="?", type=Path, default=model_path(), help="a Hugging Face checkpoint folder")
checkpoint = parser.parse_args().checkpoint

prompts = [
  "import argparse\n\n\ndef main():\n    parser =",
  "class Stack:\n    def __init__(self):\n        self.",
  "for i in",
]
model = load_model(checkpoint)  # bfloat16, Flax NNX
model = quantize(model, bits=4, group_size=128)  # its dense layers, in place; says what it did
continuations = generate(model, prompts, max_new_tokens=16)
for prompt, text in zip(prompts, continuations, strict=True):
  print(f"--- {prompt!r}\n{prompt}{text}")

with tempfile.TemporaryDirectory() as folder:
  saved = Path(folder) / "model-4bit"
  save_model(model, saved)
  size_before, size_after = (sum(f.stat().st_size for f in path.glob("*.safetensors")) for path in (checkpoint, saved))
  print(f"--- saved: {size_before / 1e6:.1f} MB -> {size_after / 1e6:.1f} MB; loaded again:")
  model = load_model(saved)  # config.json says that it is quantized

# The same programs run: the reloaded model compiles nothing. Text comes in chunks of a few tokens, row by row.
streamed = [""] * len(prompts)
for row, text in stream(model, prompts, max_new_tokens=16):
  print(f"row {row}: {text!r}")
  streamed[row] += text
print(f"the same text as before saving: {streamed == continuations}")
