# SPDX-License-Identifier: Apache-2.0
"""The calibrated methods on a whole decoder, one layer after the other: the model need not fit the accelerator.

    embeddings -> layer 0: moments of inputs, quantize, outputs -> layer 1: ... -> head

Every layer is quantized on what it will read: the outputs of the layers before it as they are quantized.
"""

from collections.abc import Callable, Sequence
from numbers import Integral

import jax
import numpy as np
from flax import nnx
from tqdm import tqdm

from marlin_jax.calibration.inputs import LayerInputs, find
from marlin_jax.calibration.inputs import Path as LayerPath
from marlin_jax.calibration.methods import Method
from marlin_jax.convert import LayerReport, Path, Report, keep_head_and_routers, reason_to_skip
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.fuse import unfuse
from marlin_jax.nnx import QuantLinear
from marlin_jax.quantized import QuantSpec


class _Head(nnx.Module):
  """The last norm and the head, called as a layer is."""

  def __init__(self, model: Decoder):
    self.input_norm, self.lm_head = model.norm, model.lm_head

  def project(self, x):
    return self.input_norm(x)

  def __call__(self, x, projected, positions, rope, cached):
    return self.lm_head(projected), None, None, cached


def quantize_calibrated(
  model: Decoder,
  sequences: Sequence[Sequence[int]],
  method: Method,
  spec: QuantSpec = QuantSpec(),
  *,
  predicate: Callable[[Path, nnx.Linear], bool] = keep_head_and_routers,
  device: jax.Device | None = None,
  progress: bool = False,
) -> Report:
  """Replaces the dense layers of a float `model`, in place, by QuantLinear layers made for what these sequences make
  them read.

  Args:
    model: a float Decoder; in host memory if it does not fit the accelerator.
    sequences: token ids, of any lengths up to the model's context. As a rule 128 sequences of 2048 tokens suffice.
    method: and its settings.
    spec: bits, group size, symmetry and sparsity.
    predicate: (path, layer) -> whether to quantize it.
    device: where the arithmetic is done and the quantized model lies; None is JAX's default device.
    progress: show a progress bar, with the device's memory, on stderr.

  Raises:
    NotImplementedError: a 2:4 sparse spec with Awq; a model with experts.
    ValueError: another spec that the method does not go with; a model that is quantized already; no sequence, an empty
      one, one longer than the context, a token id outside the vocabulary; a layer, which is named, whose K the group
      size does not divide, whose kernel holds NaN or Inf, or that reads such numbers. Layers before it are already
      replaced.
  """
  method.check(spec)
  if model.config.moe is not None:
    # An expert reads only the tokens that choose it: a Hessian for each, and text enough for the rarest.
    raise NotImplementedError(
      f"{type(method).__name__} is not implemented for a mixture of experts, only the methods without calibration are"
    )
  _check(sequences, model)
  if any(isinstance(module, QuantLinear) for _, module in nnx.iter_modules(model)):
    raise ValueError("the model has quantized layers already, must be a float model")
  device = device or jax.local_devices()[0]
  unfuse(model)
  inputs = LayerInputs(model, sequences, device)
  parts = [(("layers", i), layer) for i, layer in enumerate(model.layers)]
  head = None if model.config.tie_word_embeddings else _Head(model)
  reports: list[LayerReport] = []
  bar = tqdm([*parts, *([] if head is None else [((), head)])], desc="calibrate", unit="layer", disable=not progress)
  for path, layer in bar:
    _move(layer, device)
    reports += _quantize_layer(path, layer, inputs, method, spec, predicate)
    if layer is not head:
      inputs.advance(layer)
    if memory := device.memory_stats():
      bar.set_postfix_str(f"{memory['bytes_in_use'] / 1e9:.1f} GB on the device")
  if head is not None:
    model.lm_head = head.lm_head
  _move(model, device)
  return Report(tuple(reports))


def _move(module: nnx.Module, device: jax.Device) -> None:
  nnx.update(module, jax.device_put(nnx.state(module), device))


def _quantize_layer(path: Path, layer, inputs: LayerInputs, method: Method, spec, predicate) -> list[LayerReport]:
  dense: dict[LayerPath, nnx.Linear] = {
    below: module for below, module in nnx.iter_modules(layer) if isinstance(module, nnx.Linear)
  }
  skipped = {below: reason_to_skip((*path, *below), linear, predicate) for below, linear in dense.items()}
  chosen = [below for below, reason in skipped.items() if reason is None]
  sizes = {below: linear.kernel[...].nbytes for below, linear in dense.items()}
  for below in chosen:
    name = ".".join(map(str, (*path, *below)))
    try:
      spec.groups(dense[below].in_features)
    except ValueError as error:
      raise ValueError(f"layer {name}: {error}") from None
    if not np.isfinite(np.asarray(dense[below].kernel[...], np.float32)).all():
      raise ValueError(f"layer {name}: the kernel holds NaN or Inf, which no codes can represent")
  try:
    done = {what.path: what for what in method.quantize(layer, inputs, chosen, spec)} if chosen else {}
  except ValueError as error:
    raise ValueError(f"layer {'.'.join(map(str, path))}: {error}") from error
  return [
    LayerReport(
      path=(*path, *below),
      skipped=skipped[below],
      bytes_before=sizes[below],
      bytes_after=find(layer, below).packed.nbytes if below in done else sizes[below],
      output_error=done[below].error if below in done else None,
      note=done[below].note if below in done else None,
    )
    for below in dense
  ]


def _check(sequences: Sequence[Sequence[int]], model: Decoder) -> None:
  if not sequences:
    raise ValueError("sequences is empty: calibration needs at least one sequence of token ids")
  context, vocab_size = model.config.max_position_embeddings, model.config.vocab_size
  for i, sequence in enumerate(sequences):
    if not 1 <= len(sequence) <= context:
      raise ValueError(f"sequences[{i}] has {len(sequence)} tokens, must have 1 .. {context}, the model's context")
    for token in sequence:
      if not isinstance(token, Integral) or not 0 <= token < vocab_size:
        raise ValueError(
          f"sequences[{i}] has the token id {token!r}, which must be an integer in 0 .. {vocab_size - 1}"
        )
