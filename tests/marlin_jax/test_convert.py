# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax import QuantLinear, QuantSpec, convert, quantize


class Special(nnx.Linear):
  """A subclass that computes something else."""

  def __call__(self, x):
    return 2 * super().__call__(x)


class Block(nnx.Module):
  def __init__(self, rngs: nnx.Rngs):
    self.up = nnx.Linear(128, 256, rngs=rngs)
    self.down = nnx.Linear(256, 128, use_bias=False, rngs=rngs)

  def __call__(self, x):
    return x + self.down(jax.nn.silu(self.up(x)))


class Model(nnx.Module):
  """Layers in lists and dicts, a shared one, a subclass, and a head."""

  def __init__(self, rngs: nnx.Rngs):
    self.blocks = nnx.List([Block(rngs) for _ in range(3)])
    self.named = nnx.Dict(first=nnx.Linear(128, 128, rngs=rngs))
    self.special = Special(128, 128, rngs=rngs)
    self.again = self.named["first"]
    self.lm_head = nnx.Linear(128, 64, rngs=rngs)

  def __call__(self, x):
    for block in self.blocks:
      x = block(x)
    return self.lm_head(self.special(self.again(self.named["first"](x))))


X = jax.random.normal(jax.random.key(0), (5, 128))


@pytest.fixture
def model():
  return Model(nnx.Rngs(0))


def test_dense_layers_everywhere_are_replaced_and_the_rest_is_reported(model):
  want = model(X)
  report = convert(model)
  blocks = {("blocks", i, name) for i in range(3) for name in ("up", "down")}
  # The shared layer is one row, under the first of its two paths.
  (shared,) = {layer.path for layer in report.quantized} - blocks
  assert len(report.quantized) == 7 and shared in {("again",), ("named", "first")}
  assert {layer.path: layer.skipped for layer in report.skipped} == {
    ("lm_head",): "the predicate says so",
    ("special",): "Special is not nnx.Linear itself and may compute something else",
  }
  assert all(isinstance(block.up, QuantLinear) and isinstance(block.down, QuantLinear) for block in model.blocks)
  assert type(model.lm_head) is nnx.Linear and type(model.special) is Special
  assert model.again is model.named["first"] and isinstance(model.again, QuantLinear)  # shared before, shared after
  error = jnp.linalg.norm(model(X) - want) / jnp.linalg.norm(want)
  assert 0.01 < float(error) < 0.3  # eight 4-bit layers in a row


def test_report_counts_bytes(model):
  report = convert(model)
  up = next(layer for layer in report.quantized if layer.path == ("blocks", 0, "up"))
  assert up.bytes_before == 4 * 128 * 256 and up.bytes_after == 128 * 256 // 2 + 4 * 256
  assert str(report).splitlines()[0].startswith(f"quantized {len(report.quantized)} layers, ")


def test_predicate_chooses_by_path(model):
  report = convert(model, predicate=lambda path, layer: path[-1] == "up" and path[1] != 1)
  assert [layer.path for layer in report.quantized] == [("blocks", 0, "up"), ("blocks", 2, "up")]


def test_quantize_works_in_place_and_returns_the_model(model, capsys):
  assert quantize(model, group_size=32) is model
  assert model.blocks[0].up.packed.group_size == 32
  assert "quantized 7 layers" in "".join(capsys.readouterr())


def test_a_bad_layer_is_named(model):
  model.blocks[1].down.kernel[...] = model.blocks[1].down.kernel[...].at[0, 0].set(jnp.nan)
  with pytest.raises(ValueError, match=r"layer blocks\.1\.down: the kernel holds NaN or Inf"):
    convert(model)


def test_a_group_size_that_does_not_divide_is_named():
  class Odd(nnx.Module):
    def __init__(self):
      self.layer = nnx.Linear(96, 8, rngs=nnx.Rngs(0))

  with pytest.raises(ValueError, match="layer layer: group_size=64 does not divide k=96"):
    convert(Odd(), QuantSpec(group_size=64))


def test_an_own_dot_general_is_left_alone():
  class Own(nnx.Module):
    def __init__(self):
      self.layer = nnx.Linear(
        128, 8, dot_general=lambda *args, **kwargs: jax.lax.dot_general(*args, **kwargs), rngs=nnx.Rngs(0)
      )

  (layer,) = convert(Own()).layers
  assert layer.skipped == "it has a dot_general of its own"


def test_packed_weights_go_to_the_device_that_is_named(model):
  device = jax.devices()[0]
  convert(model, device=device)
  assert model.blocks[0].up.qweight[...].devices() == {device}


def test_a_converted_model_runs_under_jit_with_weights_as_arguments(model):
  convert(model)
  graphdef, state = nnx.split(model)
  np.testing.assert_allclose(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, X), model(X), rtol=1e-4)
