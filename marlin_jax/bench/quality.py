# SPDX-License-Identifier: Apache-2.0
"""`marlin-jax bench quality`: what each method of quantization costs in perplexity, and in bits a weight."""

import datetime
import os
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from marlin_jax.bench.table import write_rows
from marlin_jax.calibration import Awq, Gptq, Wanda, quantize_calibrated
from marlin_jax.calibration.inputs import LayerInputs, find
from marlin_jax.calibration.methods import kernels_and_grams
from marlin_jax.calibration.text import calibration_sequences
from marlin_jax.checkpoint import load_model
from marlin_jax.convert import Report, convert
from marlin_jax.generation.scoring import perplexity
from marlin_jax.models.decoder import Decoder
from marlin_jax.quantized import QuantSpec
from marlin_jax.quantizers.gptq import prune_sparsegpt
from marlin_jax.quantizers.hqq import quantize_hqq
from marlin_jax.quantizers.rtn import quantize_rtn
from marlin_jax.quantizers.sparse24 import magnitude_mask, wanda_mask
from pallas_kernels import current_device

# Without data: (w, spec) -> codes. "rtn-plain" has the scale that just holds the largest weight.
_QUANTIZERS = {
  "rtn-plain": partial(quantize_rtn, search=False),
  "rtn": quantize_rtn,
  "hqq": quantize_hqq,
  "sparse24-magnitude": quantize_rtn,
}
_CALIBRATED = {
  "awq": Awq(),
  "gptq": Gptq(),
  "gptq-act-order": Gptq(act_order=True),
  "sparse24-wanda": Wanda(),
  "sparse24-gptq": Gptq(fit=False),
  "sparse24-gptq-fit": Gptq(),
}
# 2:4 sparse, without rounding: (w, gram) -> w.
_PRUNERS = {
  "sparse24-magnitude": lambda w, gram: jnp.where(magnitude_mask(w), w, 0),
  "sparse24-wanda": lambda w, gram: jnp.where(wanda_mask(w, jnp.sqrt(jnp.diag(gram))), w, 0),
  "sparse24-gptq": partial(prune_sparsegpt, fit=False),
  "sparse24-gptq-fit": prune_sparsegpt,
}
SPARSE_METHODS = tuple(_PRUNERS)
METHODS = tuple(method for method in (*_QUANTIZERS, *_CALIBRATED) if method not in SPARSE_METHODS)
GROUP_SIZES = (32, 64, 128, None)


def bench_quality(
  path: str | os.PathLike[str],
  heldout: str,
  calibration: Sequence[str],
  *,
  methods: Sequence[str] = METHODS,
  bits: Sequence[int] = (4, 8),
  group_sizes: Sequence[int | None] = GROUP_SIZES,
  windows: int = 32,
  calibration_count: int = 128,
  calibration_length: int = 512,
  output: Path | None = None,
) -> None:
  """Scores a float model and the same model quantized in every way; prints rows, and writes each to a CSV as it comes.

  All but the weights is the same: bfloat16, the same held-out windows of the model's context, the same calibration.
  The table gives perplexity, its change, bits a weight with scales and zero points, and for calibrated methods the mean
  over the layers of |x w - x v|^2 / |x w|^2 on the calibration text.

  Args:
    path: a float checkpoint with a tokenizer.
    heldout: text that is scored.
    calibration: texts that the calibrated methods read; not the held-out one.
    methods: names of METHODS or SPARSE_METHODS.
    bits: 4 and 8; 16, with SPARSE_METHODS only, prunes and rounds nothing.
    group_sizes: None is one scale a column.
    windows: how many windows of the held-out text, from its start.
    calibration_count, calibration_length: of the calibration windows, in tokens.
    output: CSV file to write.

  Raises:
    ValueError: an unknown method, one that does not go with 16 bits, or text too short for one window.
    NotImplementedError: SPARSE_METHODS with 8 bits.
  """
  known = SPARSE_METHODS if 16 in bits else (*METHODS, *SPARSE_METHODS)
  if unknown := set(methods) - set(known):
    raise ValueError(f"methods has {sorted(unknown)}, must be of {', '.join(known)} with bits={tuple(bits)}")
  model = load_model(path)
  if model.tokenizer is None:
    raise ValueError(f"{path} has no tokenizer.json, which scoring text needs")
  window = model.config.max_position_embeddings
  tokens = np.asarray(model.tokenizer.encode(heldout)[: windows * window], np.int32)
  length = min(calibration_length, window)
  sequences = calibration_sequences(model.tokenizer, calibration, count=calibration_count, length=length)
  common = {
    "tokens": len(tokens),
    "calibration_tokens": sum(map(len, sequences)),
    "device": current_device().kind,
    "jax_version": jax.__version__,
    "date": datetime.date.today().isoformat(),
  }
  before = perplexity(model, tokens, window=window)
  print(f"bf16: perplexity {before:.4f} on {len(tokens)} tokens, on {common['device']}")
  print("method              bits  group   bits/weight  perplexity   change  error of outputs  seconds", flush=True)
  rows: list[dict[str, Any]] = [
    dict(method="bf16", bits=16, group_size="", bits_per_weight=16.0, perplexity=round(before, 4), change_percent=0.0)
  ]
  for width in bits:
    for group_size in (None,) if width == 16 else group_sizes:
      for method in methods:
        model = load_model(path)
        began = time.perf_counter()
        if width == 16:
          _prune(model, method, sequences)
          row = dict(group_size="", bits_per_weight=16.0, output_error="")
        else:
          sparse24 = method in SPARSE_METHODS
          spec = QuantSpec(bits=width, group_size=group_size, symmetric=method != "hqq", sparse24=sparse24)
          row = _describe(_quantize(model, method, sequences, spec), spec)
        seconds = time.perf_counter() - began
        after = perplexity(model, tokens, window=window)
        row |= dict(method=method, bits=width, perplexity=round(after, 4), seconds=round(seconds, 1))
        rows.append(row | {"change_percent": round(100 * (after / before - 1), 3)})
        _print(rows[-1])
        if output is not None:
          write_rows(output, [row | common for row in rows])


def _quantize(model: Decoder, method: str, sequences: Sequence[Sequence[int]], spec: QuantSpec) -> Report:
  if method in _QUANTIZERS:
    return convert(model, spec, quantizer=_QUANTIZERS[method])
  return quantize_calibrated(model, sequences, _CALIBRATED[method], spec)


def _prune(model: Decoder, method: str, sequences: Sequence[Sequence[int]]) -> None:
  """Prunes in the order in which a calibrated method quantizes, each dense layer on what the pruned ones give."""
  inputs = LayerInputs(model, sequences, jax.local_devices()[0])
  for layer in model.layers:
    dense = [path for path, module in nnx.iter_modules(layer) if isinstance(module, nnx.Linear)]
    for paths, kernels, gram in kernels_and_grams(layer, inputs, dense):
      for path, kernel in zip(paths, kernels, strict=True):
        find(layer, path).kernel[...] = _PRUNERS[method](kernel, gram).astype(kernel.dtype)
    inputs.advance(layer)


def _describe(report: Report, spec: QuantSpec) -> dict[str, Any]:
  errors = [layer.output_error for layer in report.quantized if layer.output_error is not None]
  nbytes_before, nbytes_after = (
    sum(getattr(l, f"bytes_{when}") for l in report.quantized) for when in ("before", "after")
  )
  return {
    "group_size": spec.group_size or "column",
    "bits_per_weight": round(16 * nbytes_after / nbytes_before, 3),
    "output_error": f"{np.mean(errors):.3e}" if errors else "",
  }


def _print(row: dict[str, Any]) -> None:
  print(
    f"{row['method']:<19} {row['bits']:>4}  {row['group_size']!s:>6}  {row['bits_per_weight']:>11.3f}  "
    f"{row['perplexity']:>10.4f}  {row['change_percent']:>+6.2f}%  {row['output_error']:>16}  {row['seconds']:>7.1f}",
    flush=True,
  )
