# SPDX-License-Identifier: Apache-2.0
"""4- and 8-bit weight matmul kernels for JAX: arrays in, arrays out."""

from pallas_kernels.after_attention import after_attention
from pallas_kernels.deferred_norm import DeferredNorm, resolved
from pallas_kernels.hardware import Device, current_device
from pallas_kernels.layout import pack_codes, qweight_shape, unpack_codes
from pallas_kernels.matmul import IMPLEMENTATIONS, choose_implementation, matmul
from pallas_kernels.problem import MatmulProblem

__all__ = [
  "IMPLEMENTATIONS",
  "DeferredNorm",
  "Device",
  "MatmulProblem",
  "after_attention",
  "choose_implementation",
  "current_device",
  "matmul",
  "pack_codes",
  "qweight_shape",
  "resolved",
  "unpack_codes",
]
