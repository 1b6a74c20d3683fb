# SPDX-License-Identifier: Apache-2.0
"""`quantize` and `quantize_checkpoint`: every method behind one word, for a model in memory and for a folder."""

import os
from collections.abc import Callable, Sequence
from typing import Any, cast

import jax
from flax import nnx
from tqdm import tqdm

from marlin_jax.calibration import Awq, Gptq, Wanda, quantize_calibrated
from marlin_jax.calibration.text import calibration_sequences
from marlin_jax.checkpoint import load_model, quantize_tensors, save_model
from marlin_jax.checkpoint.save import Format
from marlin_jax.convert import Path, Report, convert, keep_head_and_routers
from marlin_jax.models.decoder import Decoder
from marlin_jax.quantized import QuantSpec
from marlin_jax.quantizers import Quantizer
from marlin_jax.quantizers.hqq import quantize_hqq
from marlin_jax.quantizers.rtn import quantize_rtn

# What needs no data, and what does.
QUANTIZERS: dict[str, Quantizer] = {"rtn": quantize_rtn, "hqq": quantize_hqq}
CALIBRATED: dict[str, Gptq | Awq | Wanda] = {"gptq": Gptq(), "awq": Awq(), "wanda": Wanda()}

Method = str | Gptq | Awq | Wanda
Calibration = Sequence[str] | Sequence[Sequence[int]]


def quantize(
  model: nnx.Module,
  *,
  bits: int = 4,
  group_size: int | None = 128,
  symmetric: bool | None = None,
  sparse24: bool = False,
  method: Method = "rtn",
  calibration: Calibration | None = None,
  calibration_count: int = 128,
  calibration_length: int = 2048,
  predicate: Callable[[Path, nnx.Linear], bool] = keep_head_and_routers,
  progress: bool = True,
) -> nnx.Module:
  """Quantizes the dense layers of `model` in place, prints what it did and returns the model.

  Args:
    model: any tree of NNX modules; for "gptq", "awq" and "wanda" a float Decoder from `load_model`.
    bits: 4 or 8.
    group_size: consecutive input features that share a scale; None for one scale a column.
    symmetric: whether the zero point is the middle code everywhere; None is what the method is made for: no for "hqq",
      which chooses zero points, yes for the others.
    sparse24: two of every four weights are kept and the others become zero: 3 bits a weight. Which two, the method
      decides: "rtn" keeps the largest, "wanda" those that contribute most, and "gptq" chooses and corrects the others.
    method: "rtn" (round to nearest, searched scales) and "hqq" need no data; "gptq", "awq" and "wanda" (for sparse24
      only), or `Gptq(...)` with settings of its own, need `calibration`.
    calibration: texts of the kind that the model will read, or sequences of token ids.
    calibration_count: windows that are taken from texts.
    calibration_length: tokens of a window, cut to the model's context.
    predicate: (path, layer) -> whether to quantize it; the default leaves the output head and the routers of experts.
    progress: show a progress bar on stderr, and print the report.

  Raises:
    NotImplementedError: sparse24 with "hqq" or "awq"; a method that is calibrated on a model with experts.
    ValueError: an unknown method, calibration that is missing or given for nothing; see also `convert` and
      `calibration.quantize_calibrated`.
  """
  spec = QuantSpec(bits=bits, group_size=group_size, symmetric=_symmetric(symmetric, method), sparse24=sparse24)
  method = _method(method, calibration)
  window = calibration_count, calibration_length
  report = _quantize(model, spec, method, calibration, window, predicate, progress)
  if progress:
    tqdm.write(str(report))
  return model


def quantize_checkpoint(
  source: str | os.PathLike[str],
  destination: str | os.PathLike[str],
  *,
  bits: int = 4,
  group_size: int | None = 128,
  symmetric: bool | None = None,
  sparse24: bool = False,
  method: Method = "rtn",
  calibration: Calibration | None = None,
  calibration_count: int = 128,
  calibration_length: int = 2048,
  predicate: Callable[[Path, nnx.Linear], bool] = keep_head_and_routers,
  format: Format = "native",
  progress: bool = True,
) -> None:
  """Quantizes a float checkpoint into a new folder.

  Without calibration one weight is in memory at a time. With it the float model must fit host memory, in bfloat16, and
  a layer of it the accelerator.

  Args:
    source: a float checkpoint folder, or a Hub model in the local cache.
    destination: a folder that does not exist yet, or is empty. It appears when it is complete.
    bits, group_size, symmetric, sparse24, method, calibration..., predicate: as for `quantize`.
    format: "native", or "compressed-tensors", which other tools read.
    progress: show a progress bar on stderr.

  Raises:
    CheckpointError: the source is not a whole and sound float checkpoint, or the destination cannot be written.
    NotImplementedError: the source's config asks for something that is not covered.
    ValueError: as for `quantize`.
  """
  spec = QuantSpec(bits=bits, group_size=group_size, symmetric=_symmetric(symmetric, method), sparse24=sparse24)
  method = _method(method, calibration)
  if isinstance(method, str):
    options: dict[str, Any] = {"predicate": predicate, "format": format, "progress": progress}
    quantize_tensors(source, destination, spec, quantizer=QUANTIZERS[method], **options)
    return
  model = load_model(source, device=jax.local_devices(backend="cpu")[0])
  window = calibration_count, calibration_length
  report = _quantize(model, spec, method, calibration, window, predicate, progress)
  if progress:
    tqdm.write(str(report))
  save_model(model, destination, format=format)


def _symmetric(symmetric: bool | None, method: Method) -> bool:
  return method != "hqq" if symmetric is None else symmetric


def _method(method: Method, calibration: Calibration | None) -> Method:
  """A name of QUANTIZERS, or the settings of a method that is calibrated."""
  if isinstance(method, str) and method not in QUANTIZERS | CALIBRATED:
    raise ValueError(f"{method=} must be one of {', '.join(QUANTIZERS | CALIBRATED)}, or Gptq(...), Awq() or Wanda()")
  if isinstance(method, str) and method in QUANTIZERS:
    if calibration is not None:
      raise ValueError(f"{method=} looks at no data: calibration must be None")
    return method
  if calibration is None:
    raise ValueError(f"{method=} needs calibration: texts, or sequences of token ids, that the model reads")
  return CALIBRATED[method] if isinstance(method, str) else method


def _quantize(model, spec: QuantSpec, method: Method, calibration, window, predicate, progress: bool) -> Report:
  if isinstance(method, str):
    return convert(model, spec, quantizer=QUANTIZERS[method], predicate=predicate, progress=progress)
  if not isinstance(model, Decoder):
    raise ValueError(f"model is a {type(model).__name__}, must be a Decoder from load_model for {method}")
  if isinstance(calibration, str):
    raise ValueError("calibration is one string, must be a list of texts or of sequences of token ids")
  sequences = calibration
  if calibration and isinstance(calibration[0], str):
    if model.tokenizer is None:
      raise ValueError("model.tokenizer is None, so calibration must be sequences of token ids")
    count, length = window[0], min(window[1], model.config.max_position_embeddings)
    sequences = calibration_sequences(model.tokenizer, calibration, count=count, length=length)
  return quantize_calibrated(
    model, cast(Sequence[Sequence[int]], sequences), method, spec, predicate=predicate, progress=progress
  )
