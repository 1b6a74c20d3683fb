# SPDX-License-Identifier: Apache-2.0
import dataclasses
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from safetensors.numpy import load_file, save_file

from marlin_jax import QuantLinear, QuantParam, QuantSpec, SparsePackedTensor, quant_matmul, unpack

X = jax.random.normal(jax.random.key(0), (4, 128))


def test_constructor_words_are_those_of_linear():
  ours, theirs = (inspect.signature(kind.__init__).parameters for kind in (QuantLinear, nnx.Linear))
  assert set(ours) - set(theirs) == {"spec"}
  for name in ("use_bias", "dtype", "param_dtype"):
    assert ours[name].default == theirs[name].default
    assert ours[name].kind == theirs[name].kind
  assert list(ours)[1:3] == list(theirs)[1:3] == ["in_features", "out_features"]


@pytest.mark.parametrize("use_bias", [True, False])
def test_fresh_layer_works_like_linear(use_bias):
  layer = QuantLinear(128, 48, use_bias=use_bias, rngs=nnx.Rngs(0))
  y = layer(X)
  assert y.shape == (4, 48) and y.dtype == jnp.float32
  assert 0.3 < float(jnp.std(y)) < 3  # lecun_normal keeps the variance of a standard normal x


def test_from_linear_takes_weight_bias_and_dtype_over():
  linear = nnx.Linear(128, 48, dtype=jnp.bfloat16, bias_init=nnx.initializers.normal(), rngs=nnx.Rngs(0))
  layer = QuantLinear.from_linear(linear)
  assert layer.bias is linear.bias and layer(X).dtype == jnp.bfloat16
  # 4 bits in groups of 128: a relative error of about 8 % of the product, which is that of the weight.
  want = X @ linear.kernel[...]
  error = jnp.linalg.norm(X @ unpack(layer.packed).dequantize() - want) / jnp.linalg.norm(want)
  assert 0.01 < float(error) < 0.12
  np.testing.assert_array_equal(layer(X), quant_matmul(X.astype(jnp.bfloat16), layer.packed, linear.bias[...]))


def test_scales_have_the_dtype_of_the_weight():
  linear = nnx.Linear(128, 8, param_dtype=jnp.bfloat16, rngs=nnx.Rngs(0))
  assert QuantLinear.from_linear(linear).scales[...].dtype == jnp.bfloat16


def test_a_sparse_layer_holds_half_the_codes_and_their_positions():
  linear = nnx.Linear(256, 48, rngs=nnx.Rngs(0))
  layer = QuantLinear.from_linear(linear, QuantSpec(sparse24=True))
  assert isinstance(layer.packed, SparsePackedTensor) and layer.meta[...].shape == (1, 2, 32, 16)
  w = unpack(layer.packed).dequantize()
  kept = np.asarray(w).reshape(64, 4, 48) != 0
  assert kept.sum(1).max() == 2 and kept.mean() > 0.4
  x = jnp.tile(X, (1, 2))
  np.testing.assert_allclose(layer(x), x @ w, rtol=1e-5, atol=1e-5)
  fresh = QuantLinear(256, 48, spec=QuantSpec(sparse24=True), rngs=nnx.Rngs(0))
  assert jax.tree.structure(nnx.state(fresh)) == jax.tree.structure(nnx.state(layer))
  assert QuantLinear(256, 48, rngs=nnx.Rngs(0)).meta is None
  state = jax.jit(lambda: nnx.state(QuantLinear(256, 48, spec=QuantSpec(sparse24=True), rngs=nnx.Rngs(0))))()
  np.testing.assert_array_equal(state["meta"][...], fresh.meta[...])


@pytest.mark.parametrize("spec", [QuantSpec(bits=8), QuantSpec(symmetric=False), QuantSpec(bits=8, symmetric=False)])
def test_every_field_of_the_weight_is_held(spec):
  linear = nnx.Linear(128, 48, rngs=nnx.Rngs(0))
  layer = QuantLinear.from_linear(linear, spec)
  assert layer.packed.bits == spec.bits and (layer.zeros is None) == spec.symmetric and layer.permutation is None
  acting = QuantLinear.from_packed(
    dataclasses.replace(layer.packed, permutation=jnp.arange(128, dtype=jnp.int32)[::-1])
  )
  np.testing.assert_allclose(acting(X[:, ::-1]), layer(X), rtol=1e-5, atol=1e-6)
  graphdef, state = nnx.split(acting)
  np.testing.assert_array_equal(nnx.merge(graphdef, state)(X), acting(X))
  want = X @ linear.kernel[...]
  assert float(jnp.linalg.norm(layer(X) - want) / jnp.linalg.norm(want)) < (0.12 if spec.bits == 4 else 0.008)


@pytest.mark.parametrize("bad", [jnp.nan, -jnp.inf])
def test_nan_and_inf_are_refused(bad):
  linear = nnx.Linear(128, 8, rngs=nnx.Rngs(0))
  linear.kernel[...] = linear.kernel[...].at[5, 5].set(bad)
  with pytest.raises(ValueError, match="NaN or Inf"):
    QuantLinear.from_linear(linear)


def test_variables_tell_weights_and_parameters_apart():
  layer = QuantLinear(128, 48, rngs=nnx.Rngs(0))
  quant, params, rest = nnx.split(layer, QuantParam, nnx.Param, ...)[1:]
  paths = [{path for path, _ in nnx.to_flat_state(state)} for state in (quant, params, rest)]
  assert paths == [{("qweight",), ("scales",)}, {("bias",)}, set()]
  optimizer = nnx.Optimizer(layer, optax.sgd(1e-2), wrt=nnx.Param)
  assert not any(leaf.dtype == jnp.int16 for leaf in jax.tree.leaves(nnx.state(optimizer, nnx.optimizer.OptState)))


def test_split_and_merge_under_jit():
  layer = QuantLinear(128, 64, rngs=nnx.Rngs(0))
  graphdef, state = nnx.split(layer)
  np.testing.assert_allclose(jax.jit(lambda state, x: nnx.merge(graphdef, state)(x))(state, X), layer(X), rtol=1e-5)


def test_on_a_gpu_it_is_the_kernel_and_the_weights_are_arguments(lower_for_h200):
  graphdef, state = nnx.split(nnx.eval_shape(lambda: QuantLinear(1024, 1024, dtype=jnp.bfloat16, rngs=nnx.Rngs(0))))
  x = jax.ShapeDtypeStruct((4, 1024), jnp.bfloat16)
  text = lower_for_h200(lambda state, x: nnx.merge(graphdef, state)(x), state, x)
  assert "__gpu$xla.gpu.triton" in text or "mosaic_gpu_v2" in text
  assert len(text) < 250_000  # a captured weight of half a megabyte would stand there as a megabyte of text


def test_state_survives_orbax_and_safetensors(tmp_path):
  layer = QuantLinear(128, 48, spec=QuantSpec(group_size=32), rngs=nnx.Rngs(0))
  state = nnx.to_pure_dict(nnx.state(layer))
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / "orbax", state)
    checkpointer.wait_until_finished()
    restored = checkpointer.restore(tmp_path / "orbax", state)
  save_file({name: np.asarray(value) for name, value in state.items()}, tmp_path / "flat.safetensors")
  other = QuantLinear(128, 48, spec=QuantSpec(group_size=32), rngs=nnx.Rngs(1))
  assert not np.array_equal(other(X), layer(X))
  for source in (restored, load_file(tmp_path / "flat.safetensors")):
    abstract = nnx.state(other)
    nnx.replace_by_pure_dict(abstract, jax.tree.map(jnp.asarray, source))
    nnx.update(other, abstract)
    np.testing.assert_array_equal(other(X), layer(X))


def test_a_group_size_that_does_not_divide_is_refused():
  with pytest.raises(ValueError, match="group_size=128 does not divide k=96"):
    QuantLinear(96, 8, rngs=nnx.Rngs(0))
