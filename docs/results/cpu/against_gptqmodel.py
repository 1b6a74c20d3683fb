# SPDX-License-Identifier: Apache-2.0
"""Our GPTQ against GPTQModel's: the demo model, the same calibration tokens, the same held-out tokens, on a CPU.

    GPTQMODEL_CPU_WORKERS=2 python docs/results/cpu/against_gptqmodel.py TABLE.csv

Needs marlin_jax and gptqmodel in one environment, and the variable where there are fewer than three cores. Writes a row
a quantization, all of 4 bits, symmetric, in groups of 128. What GPTQModel quantizes is saved by it and read by our own
loader, so that one program scores both, in float32. GPTQModel calibrates in float32 too (PyTorch's bfloat16 is slow on
most CPUs), marlin_jax in the model's bfloat16.

`output_error` is |x w - x v|^2 / |x w|^2 of the quantized weights v, on what the layers of the float model read on the
calibration text, mean over the layers.
"""

import csv
import sys
import tempfile
from importlib.metadata import version

import gptqmodel
import jax
import jax.numpy as jnp
import numpy as np
import torch
from flax import nnx

from marlin_jax.calibration import Gptq, quantize_calibrated
from marlin_jax.calibration.inputs import LayerInputs, find
from marlin_jax.calibration.text import calibration_sequences
from marlin_jax.checkpoint import load_model, save_model
from marlin_jax.demo import calibration_texts, heldout_text, model_path
from marlin_jax.generation.scoring import perplexity
from marlin_jax.packing import unpack
from marlin_jax.quantizers.awq import output_error

BITS, GROUP_SIZE, WINDOWS = 4, 128, 32


def by_gptqmodel(sequences, settings):
  config = gptqmodel.QuantizeConfig(bits=BITS, group_size=GROUP_SIZE, device="cpu", **settings)
  model = gptqmodel.GPTQModel.load(str(model_path()), config, dtype=torch.float32)
  model.quantize([{"input_ids": s, "attention_mask": [1] * len(s)} for s in sequences], batch_size=8)
  with tempfile.TemporaryDirectory() as folder:
    model.save(folder)
    return load_model(folder, dtype=jnp.float32)


def by_marlin_jax(sequences, settings):
  model = load_model(model_path())
  quantize_calibrated(model, sequences, Gptq(**settings))
  with tempfile.TemporaryDirectory() as folder:
    save_model(model, f"{folder}/model")
    return load_model(f"{folder}/model", dtype=jnp.float32)


RUNS = [
  (by_marlin_jax, {"damping": 0.01}),
  (by_gptqmodel, {"damp_percent": 0.01}),
  (by_gptqmodel, {}),
  (by_gptqmodel, {"damp_percent": 0.01, "act_group_aware": False}),
  (by_gptqmodel, {"damp_percent": 0.01, "mse": 2.4}),
]


def grams_of(model, sequences):
  """(layer, path below it) -> (kernel, sum of x x^T over what it reads) of every dense layer of a float model."""
  inputs, grams = LayerInputs(model, sequences, jax.devices()[0]), {}
  for i, layer in enumerate(model.layers):
    paths = [path for path, module in nnx.iter_modules(layer) if isinstance(module, nnx.Linear)]
    for path, moments in zip(paths, inputs.moments(layer, paths), strict=True):
      grams[i, path] = find(layer, path).kernel[...], moments.gram
    inputs.advance(layer)
  return grams


def main(table: str) -> None:
  model = load_model(model_path())
  window = model.config.max_position_embeddings
  tokens = np.asarray(model.tokenizer.encode(heldout_text())[: WINDOWS * window], np.int32)
  sequences = calibration_sequences(model.tokenizer, calibration_texts(), count=64, length=512)
  grams = grams_of(model, sequences)
  before = perplexity(load_model(model_path(), dtype=jnp.float32), tokens, window=window)
  common = {"tokens": len(tokens), "calibration_tokens": sum(map(len, sequences)), "jax_version": jax.__version__}
  rows = [{"tool": "", "settings": "float", "perplexity": round(before, 4)} | common]
  for quantize, settings in RUNS:
    model = quantize(sequences, settings)
    errors = []
    for (i, path), (w, gram) in grams.items():
      v = unpack(find(model.layers[i], path).packed).dequantize()
      errors.append(output_error(w, v, gram) / output_error(w, jnp.zeros_like(w), gram))
    after = perplexity(model, tokens, window=window)
    described = " ".join(f"{name}={value}" for name, value in settings.items()) or "defaults"
    measured = {"perplexity": round(after, 4), "change_percent": round(100 * (after / before - 1), 3)}
    measured["output_error"] = f"{np.mean(errors):.3e}"
    tool = "marlin_jax" if quantize is by_marlin_jax else f"gptqmodel {version('gptqmodel')}"
    rows.append({"tool": tool, "settings": described} | measured | common)
    print(rows[-1], flush=True)
    with open(table, "w", newline="") as file:
      writer = csv.DictWriter(file, list(rows[-1]))
      writer.writeheader()
      writer.writerows(rows)


if __name__ == "__main__":
  main(*sys.argv[1:])
