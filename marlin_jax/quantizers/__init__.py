# SPDX-License-Identifier: Apache-2.0
"""From float weights to codes; one method a file, matrices in and out."""

from collections.abc import Callable

from jax import Array

from marlin_jax.quantized import QuantizedTensor, QuantSpec

# What needs no more than the weight: quantize_rtn, quantize_hqq.
Quantizer = Callable[[Array, QuantSpec], QuantizedTensor]
