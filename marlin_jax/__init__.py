# SPDX-License-Identifier: Apache-2.0
"""4-bit inference for JAX: a float model goes in, a quantized Flax model that generates text comes out."""

from marlin_jax.calibration import Awq, Gptq, Wanda
from marlin_jax.checkpoint import CheckpointError, load_model, save_model
from marlin_jax.convert import convert, quantize_variables
from marlin_jax.linen import QuantDense
from marlin_jax.nnx import QuantLinear, QuantParam
from marlin_jax.ops import quant_matmul
from marlin_jax.packing import pack, pack24, unpack
from marlin_jax.quantization import quantize, quantize_checkpoint
from marlin_jax.quantized import PackedTensor, QuantizedTensor, QuantSpec, SparsePackedTensor
from marlin_jax.quantizers.rtn import quantize_rtn
from marlin_jax.text import generate, stream

__all__ = [
  "Awq",
  "CheckpointError",
  "Gptq",
  "PackedTensor",
  "QuantDense",
  "QuantLinear",
  "QuantParam",
  "QuantSpec",
  "QuantizedTensor",
  "SparsePackedTensor",
  "Wanda",
  "convert",
  "generate",
  "load_model",
  "pack",
  "pack24",
  "quant_matmul",
  "quantize",
  "quantize_checkpoint",
  "quantize_rtn",
  "quantize_variables",
  "save_model",
  "stream",
  "unpack",
]
