# SPDX-License-Identifier: Apache-2.0
import pytest

from marlin_jax.bench.layers import parse_shapes, shapes_of_model
from marlin_jax.bench.shapes import read_shape


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


def test_shapes_are_sizes_or_names():
  assert parse_shapes("4096x12288") == ((4096, 12288),)
  assert parse_shapes("paper-65b")[-1] == (21760, 8192)


@pytest.mark.parametrize("text", ["4096", "4096x", "x4096", "0x64", "4096x-64", "llama"])
def test_what_is_neither_is_refused(text):
  with pytest.raises(ValueError, match=rf"shape '{text}' must be KxN.*llama-2-7b"):
    parse_shapes(text)
