# SPDX-License-Identifier: Apache-2.0
"""What we write in the compressed-tensors format, read by the compressed-tensors library, where that is installed."""

import json
from pathlib import Path

import numpy as np
import pytest

from marlin_jax.checkpoint import load_model, quantize_tensors
from marlin_jax.packing import unpack
from marlin_jax.quantized import QuantSpec
from tests.marlin_jax.checkpoint.test_foreign_formats import quantized_layers

library = pytest.importorskip("compressed_tensors", reason="the compressed-tensors library is not installed")
SOURCE = Path(__file__).parents[2] / "data" / "llama3rope-tied-bf16"


@pytest.mark.parametrize("group_size", [32, 128, None])
@pytest.mark.parametrize("bits, symmetric", [(4, True), (4, False), (8, True), (8, False)])
def test_the_library_reads_back_the_same_weights(tmp_path, bits, symmetric, group_size):
  import torch
  from compressed_tensors.compressors.pack_quantized import PackedQuantizationCompressor
  from compressed_tensors.quantization import QuantizationConfig
  from safetensors.torch import load_file

  spec = QuantSpec(bits=bits, group_size=group_size, symmetric=symmetric)
  quantize_tensors(SOURCE, tmp_path / "out", spec, format="compressed-tensors", progress=False)
  settings = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
  config = QuantizationConfig.model_validate(settings)
  (scheme,) = config.config_groups.values()
  assert config.format == "pack-quantized" and scheme.weights.num_bits == bits
  tensors = load_file(tmp_path / "out" / "model.safetensors")
  for name, layer in quantized_layers(load_model(tmp_path / "out")).items():
    parts = {key.rpartition(".")[2]: t for key, t in tensors.items() if key.startswith(f"{name}.")}
    parts["weight_scale"] = parts["weight_scale"].to(torch.float32)  # its arithmetic is in the dtype of the scales
    weight = PackedQuantizationCompressor.decompress(parts, scheme)["weight"]
    np.testing.assert_array_equal(weight.numpy(), np.asarray(unpack(layer.packed).dequantize()).T, err_msg=name)
