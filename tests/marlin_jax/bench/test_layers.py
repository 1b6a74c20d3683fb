# SPDX-License-Identifier: Apache-2.0
import dataclasses

import pytest

from marlin_jax.bench.layers import parse_shapes, shapes_of_model
from marlin_jax.bench.shapes import read_shape
from tests.marlin_jax.small_moe import SMALL_MOE


def test_layers_of_a_model():
  # q and the output projection are of one shape.
  assert shapes_of_model(read_shape("llama-3-8b")) == (
    (4096, 6144),
    (4096, 4096),
    (4096, 1024),
    (4096, 28672),
    (4096, 14336),
    (14336, 4096),
  )


def test_experts_are_layers_of_a_model():
  # q, k, v fused, q, k and v alone, o; then the experts' and the dense layers' gate and up, one of them, and down.
  attention = ((64, 128), (64, 64), (64, 32))
  experts, dense = ((64, 64), (64, 32), (32, 64)), ((64, 192), (64, 96), (96, 64))
  assert shapes_of_model(SMALL_MOE) == tuple(dict.fromkeys(attention + experts + dense))
  everywhere = dataclasses.replace(SMALL_MOE, moe=dataclasses.replace(SMALL_MOE.moe, layers=(0, 1)))
  assert shapes_of_model(everywhere) == tuple(dict.fromkeys(attention + experts))


def test_shapes_are_sizes_or_names():
  assert parse_shapes("4096x12288") == ((4096, 12288),)
  assert parse_shapes("paper-65b")[-1] == (21760, 8192)


@pytest.mark.parametrize("text", ["4096", "4096x", "x4096", "0x64", "4096x-64", "llama"])
def test_what_is_neither_is_refused(text):
  with pytest.raises(ValueError, match=rf"shape '{text}' must be KxN.*llama-2-7b"):
    parse_shapes(text)
