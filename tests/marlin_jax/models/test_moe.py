# SPDX-License-Identifier: Apache-2.0
"""The mixture of experts against its slow twin: a loop over tokens and the experts that each chose."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from marlin_jax import QuantLinear, QuantSpec, convert, quantize, unpack
from marlin_jax.models import fuse, mlp, unfuse
from marlin_jax.models.mlp import MoE
from marlin_jax.packing import unstack
from tests.marlin_jax.small_moe import SMALL_MOE, small_moe

call = nnx.jit(lambda module, x: module(x))


def moe_of(**changes) -> MoE:
  config = dataclasses.replace(SMALL_MOE, moe=dataclasses.replace(SMALL_MOE.moe, **changes))
  return MoE(config, config.moe, dtype=jnp.float32, param_dtype=jnp.float32, rngs=nnx.Rngs(0))


def forward(model):
  return nnx.jit(lambda model: model(jnp.arange(6)[None]))(model)


def inputs(*shape) -> jax.Array:
  return 4 * jax.random.normal(jax.random.key(1), (*shape, SMALL_MOE.hidden_size))


def kernels_of(layer) -> np.ndarray:
  """[num_experts, K, N]"""
  if isinstance(layer, QuantLinear):
    return np.stack([unpack(w).dequantize() for w in unstack(layer.packed)]).astype(np.float64)
  return np.asarray(layer.kernel[...], np.float64)


def token_by_token(moe: MoE, x: jax.Array) -> np.ndarray:
  """What the paper says, in float64, for each token its experts and no others."""
  experts = moe.experts
  gate, up, down = map(kernels_of, (experts.gate_proj, experts.up_proj, experts.down_proj))
  tokens = np.asarray(x, np.float64).reshape(-1, x.shape[-1])
  total = np.zeros_like(tokens)
  for t, token in enumerate(tokens):
    scores = np.exp(token @ np.asarray(moe.router.kernel[...], np.float64))
    probabilities = scores / scores.sum()
    chosen = np.argsort(-probabilities)[: moe.moe.num_experts_per_tok]
    norm = probabilities[chosen].sum() if moe.moe.norm_topk_prob else 1
    for e in chosen:
      gated = token @ gate[e]
      total[t] += probabilities[e] / norm * ((gated / (1 + np.exp(-gated)) * (token @ up[e])) @ down[e])
  return total.reshape(x.shape)


# 1, 2 and 24 tokens choose at most 2, 4 and all 6 of the experts.
@pytest.mark.parametrize("shape", [(1, 1), (2, 1), (3, 8)])
@pytest.mark.parametrize("norm_topk_prob", [True, False])
def test_a_token_gets_what_the_loop_over_its_experts_gives(shape, norm_topk_prob):
  moe, x = moe_of(norm_topk_prob=norm_topk_prob), inputs(*shape)
  np.testing.assert_allclose(call(moe, x), token_by_token(moe, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("num_experts, num_experts_per_tok", [(6, 1), (6, 6), (1, 1)])
def test_one_expert_or_all_of_them_may_be_chosen(num_experts, num_experts_per_tok):
  moe, x = moe_of(num_experts=num_experts, num_experts_per_tok=num_experts_per_tok), inputs(2, 3)
  np.testing.assert_allclose(call(moe, x), token_by_token(moe, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
  "options",
  [
    dict(group_size=32),
    dict(bits=8, group_size=None, symmetric=False),
    dict(group_size=32, sparse24=True),
    dict(method="hqq", group_size=32),
  ],
  ids=str,
)
def test_quantized_experts_give_what_their_codes_stand_for(options):
  moe, x = moe_of(), inputs(2, 3)
  quantize(moe, progress=False, **options)
  assert isinstance(moe.experts.down_proj, QuantLinear) and moe.experts.down_proj.packed.stack == (6,)
  np.testing.assert_allclose(call(moe, x), token_by_token(moe, x), rtol=1e-4, atol=1e-3)


def test_an_expert_is_quantized_as_it_is_alone():
  stack = moe_of().experts.up_proj
  alone = nnx.Linear(64, 32, use_bias=False, rngs=nnx.Rngs(0))
  packed = QuantLinear.from_linear(stack, QuantSpec(group_size=32)).packed
  for kernel, one in zip(stack.kernel[...], unstack(packed), strict=True):
    alone.kernel = nnx.Param(kernel)
    jax.tree.map(np.testing.assert_array_equal, QuantLinear.from_linear(alone, QuantSpec(group_size=32)).packed, one)


@pytest.mark.parametrize("shape", [(1, 1), (3, 1), (2, 9)])
def test_only_chosen_experts_are_computed(shape, monkeypatch):
  moe, x, calls = moe_of(num_experts=16), inputs(*shape), []
  plain = mlp.MLP.__call__

  def counted(self, x):
    jax.debug.callback(lambda: calls.append(1))
    return plain(self, x)

  monkeypatch.setattr(mlp.MLP, "__call__", counted)
  jax.block_until_ready(jax.jit(lambda x: moe(x))(x))
  jax.effects_barrier()
  chosen, _ = moe.route(x.reshape(-1, x.shape[-1]))
  assert len(calls) == len(np.unique(chosen)) < 16


def test_a_token_gets_nothing_of_an_expert_that_it_did_not_choose():
  moe, x = moe_of(), inputs(2, 1)
  first, second = (set(row.tolist()) for row in moe.route(x[:, 0])[0])
  assert first != second
  expected = call(moe, x)
  (bad, *_) = second - first
  moe.experts.down_proj.kernel[...] = moe.experts.down_proj.kernel[...].at[bad].set(jnp.nan)
  y = call(moe, x)
  np.testing.assert_array_equal(y[0], expected[0])
  assert jnp.isnan(y[1]).all()


def test_the_program_is_no_larger_for_more_experts():
  def jaxpr(num_experts):
    graphdef, state = nnx.split(moe_of(num_experts=num_experts))
    return str(jax.make_jaxpr(lambda state, x: nnx.merge(graphdef, state)(x))(state, inputs(2, 1)))

  small, large = jaxpr(6), jaxpr(64)
  assert small.count("dot_general[") == large.count("dot_general[") == 4  # router, gate, up, down
  assert small.count(" = ") == large.count(" = ")


@pytest.mark.parametrize("bits, sparse24", [(None, False), (4, False), (8, False), (4, True)])
def test_gate_and_up_of_experts_are_fused_and_come_apart_again(bits, sparse24):
  model = small_moe()
  if bits:
    quantize(model, bits=bits, group_size=32, sparse24=sparse24, progress=False)
  before, expected = nnx.state(nnx.merge(*nnx.split(model))), forward(model)
  assert fuse(fuse(model)) is model
  moe = model.layers[0].mlp
  names = {path[-1] for path, child in nnx.iter_modules(moe) if isinstance(child, nnx.Linear | QuantLinear)}
  assert names == {"router", "swiglu" if bits else "gate_up_proj", "down_proj"}
  np.testing.assert_allclose(forward(model), expected, rtol=1e-5, atol=1e-5)
  jax.tree.map(np.testing.assert_array_equal, nnx.state(unfuse(model)), before)


def test_the_router_and_the_head_stay_float():
  model = small_moe()
  report = convert(model, QuantSpec(group_size=32))
  assert {layer.path for layer in report.skipped} == {("lm_head",), ("layers", 0, "mlp", "router")}
  down = next(layer for layer in report.quantized if layer.path == ("layers", 0, "mlp", "experts", "down_proj"))
  assert (down.bytes_before, down.bytes_after) == (6 * 4 * 32 * 64, 6 * (128 * 64 // 2 + 4 * 64))  # K is padded to 128


def test_a_group_size_that_does_not_divide_is_named_as_elsewhere():
  with pytest.raises(ValueError, match=r"layer layers\.0\.mlp\.experts\.down_proj: group_size=64 does not divide k=32"):
    convert(small_moe(), QuantSpec(group_size=64), predicate=lambda path, layer: "experts" in path)


def test_gradients_reach_every_parameter():
  def loss(model):
    return -jax.nn.log_softmax(model(jnp.arange(24)[None]))[..., 3].mean()

  for path, gradient in nnx.to_flat_state(nnx.jit(nnx.grad(loss))(small_moe())):
    assert np.isfinite(gradient[...]).all() and (gradient[...] != 0).any(), path


def test_on_an_h200_experts_take_the_kernel(lower_for_h200):
  model = quantize(small_moe(jnp.bfloat16), group_size=32, progress=False)
  graphdef, state = nnx.split(model.layers[0].mlp)
  text = lower_for_h200(lambda state, x: nnx.merge(graphdef, state)(x), state, jnp.zeros((2, 1, 64), jnp.bfloat16))
  assert text.count("w4a16") >= 3 and "stablehlo.while" in text and "stablehlo.case" in text
