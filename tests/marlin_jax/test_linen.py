# SPDX-License-Identifier: Apache-2.0
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import linen as nn
from flax import traverse_util
from safetensors.numpy import load_file, save_file

from marlin_jax import QuantDense, QuantSpec, SparsePackedTensor, quant_matmul, quantize_variables
from marlin_jax.quantized import PackedTensor


class MLP(nn.Module):
  """A user's model: the dense layer is an argument, so that the quantized one can take its place."""

  dense: type[nn.Module] = nn.Dense

  @nn.compact
  def __call__(self, x):
    return self.dense(32, name="down")(nn.silu(self.dense(256, name="up")(x)))


X = jax.random.normal(jax.random.key(0), (2, 3, 128))


@pytest.fixture(scope="module")
def trained():
  return MLP().init(jax.random.key(1), X)


def test_constructor_words_are_those_of_dense():
  ours, theirs = inspect.signature(QuantDense).parameters, inspect.signature(nn.Dense).parameters
  assert set(theirs) - set(ours) == {"precision", "dot_general", "dot_general_cls", "promote_dtype"}
  assert set(ours) - set(theirs) == {"spec"}
  for name in ("use_bias", "dtype"):
    assert ours[name].default == theirs[name].default


def test_converted_model_computes_nearly_the_same(trained):
  variables, report = quantize_variables(trained)
  y, want = MLP(QuantDense).apply(variables, X), MLP().apply(trained, X)
  # One 4-bit layer is off by about 8 %, two in a row by about 11 %.
  assert float(jnp.linalg.norm(y - want) / jnp.linalg.norm(want)) < 0.15
  assert {layer.path for layer in report.quantized} == {("down",), ("up",)} and not report.skipped
  assert sum(layer.bytes_before for layer in report.quantized) == 4 * (128 * 256 + 256 * 32)


def test_a_layer_computes_exactly_its_packed_weight(trained):
  variables, _ = quantize_variables(trained)
  quant, bias = variables["quant"]["up"], variables["params"]["up"]["bias"]
  y = QuantDense(256).apply({"quant": quant, "params": {"bias": bias}}, X)
  np.testing.assert_array_equal(y, quant_matmul(X, PackedTensor(**quant, k=128), bias))


def test_init_gives_a_quantized_random_kernel_of_the_same_structure(trained):
  fresh = MLP(QuantDense).init(jax.random.key(1), X)
  converted, _ = quantize_variables(trained)
  assert jax.tree.map(lambda a: (a.shape, a.dtype), fresh) == jax.tree.map(lambda a: (a.shape, a.dtype), converted)
  assert float(jnp.abs(MLP(QuantDense).apply(fresh, X)).max()) > 0.01


def test_dtype_and_group_size_are_honoured():
  layer = QuantDense(64, use_bias=False, dtype=jnp.bfloat16, param_dtype=jnp.bfloat16, spec=QuantSpec(group_size=32))
  variables = layer.init(jax.random.key(0), X)
  assert set(variables) == {"quant"}
  assert variables["quant"]["scales"].shape == (4, 64) and variables["quant"]["scales"].dtype == jnp.bfloat16
  assert layer.apply(variables, X).dtype == jnp.bfloat16


@pytest.mark.parametrize("spec", [QuantSpec(bits=8), QuantSpec(symmetric=False)], ids=["8 bits", "asymmetric"])
def test_bits_and_zeros_travel_in_the_variables(trained, spec):
  variables, _ = quantize_variables({"params": {"up": trained["params"]["up"]}}, spec)
  quant, params = variables["quant"]["up"], variables["params"]["up"]
  fresh = QuantDense(256, spec=spec).init(jax.random.key(0), X)
  assert jax.tree.map(jnp.shape, fresh["quant"]) == jax.tree.map(jnp.shape, quant)
  assert ("zeros" in quant) == (not spec.symmetric)
  y = QuantDense(256).apply({"quant": quant, "params": params}, X)
  np.testing.assert_array_equal(y, quant_matmul(X, PackedTensor(**quant, k=128), params["bias"]))


def test_sparse_weights_travel_in_the_variables(trained):
  spec = QuantSpec(sparse24=True)
  variables, report = quantize_variables({"params": {"up": trained["params"]["up"]}}, spec)
  quant, params = variables["quant"]["up"], variables["params"]["up"]
  assert set(quant) == {"qweight", "meta", "scales"}
  fresh = jax.jit(QuantDense(256, spec=spec).init)(jax.random.key(0), X)
  assert jax.tree.map(jnp.shape, fresh["quant"]) == jax.tree.map(jnp.shape, quant)
  y = QuantDense(256).apply({"quant": quant, "params": params}, X)
  np.testing.assert_array_equal(y, quant_matmul(X, SparsePackedTensor(**quant, k=128), params["bias"]))
  assert report.quantized[0].bytes_after == sum(array.nbytes for array in quant.values())


def test_an_optimizer_of_params_does_not_see_the_weight(trained):
  variables, _ = quantize_variables(trained)
  state = optax.adam(0.1).init(variables["params"])
  assert not any(leaf.dtype == jnp.int16 for leaf in jax.tree.leaves(state))
  assert set(traverse_util.flatten_dict(variables["params"], sep="/")) == {"up/bias", "down/bias"}


def test_other_kernels_are_skipped_with_a_reason():
  class Mixed(nn.Module):
    @nn.compact
    def __call__(self, x):
      x = nn.Conv(4, (3,), name="conv")(x)
      return nn.Dense(8, name="lm_head")(nn.Dense(64, name="dense")(x))

  variables = Mixed().init(jax.random.key(0), jnp.ones((1, 5, 32)))
  _, report = quantize_variables(variables, QuantSpec(group_size=None))
  assert {layer.path: layer.skipped for layer in report.skipped} == {
    ("conv",): "its kernel has 3 axes",
    ("lm_head",): "the predicate says so",
  }
  assert "skipped conv: its kernel has 3 axes" in str(report)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_nan_and_inf_are_refused_by_name(trained, bad):
  broken = jax.tree.map(lambda a: a, trained)
  broken["params"]["up"]["kernel"] = broken["params"]["up"]["kernel"].at[3, 4].set(bad)
  with pytest.raises(ValueError, match="layer up: the kernel holds NaN or Inf"):
    quantize_variables(broken)


def test_a_group_size_that_does_not_divide_is_refused_by_name():
  variables = nn.Dense(8).init(jax.random.key(0), jnp.ones((1, 96)))
  with pytest.raises(ValueError, match="group_size=128 does not divide k=96"):
    quantize_variables({"params": {"dense": variables["params"]}})


def test_variables_survive_orbax_and_safetensors(trained, tmp_path):
  variables, _ = quantize_variables(trained)
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "orbax", variables)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "orbax", variables)
  flat = {name: np.asarray(value) for name, value in traverse_util.flatten_dict(variables, sep="/").items()}
  save_file(flat, tmp_path / "flat.safetensors")
  from_file = traverse_util.unflatten_dict(load_file(tmp_path / "flat.safetensors"), sep="/")
  for other in (restored, from_file):
    jax.tree.map(np.testing.assert_array_equal, other, variables)
