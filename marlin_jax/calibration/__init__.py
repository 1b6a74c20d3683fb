# SPDX-License-Identifier: Apache-2.0
"""Quantizers that look at what a model reads: GPTQ, AWQ and Wanda on a decoder, layer by layer."""

from marlin_jax.calibration.layerwise import quantize_calibrated
from marlin_jax.calibration.methods import Awq, Gptq, Wanda

__all__ = ["Awq", "Gptq", "Wanda", "quantize_calibrated"]
