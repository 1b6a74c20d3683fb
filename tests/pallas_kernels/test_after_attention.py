# SPDX-License-Identifier: Apache-2.0
"""Four products in one launch compute what they compute one after the other."""

import dataclasses
import functools
import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import after_attention, heuristics, hopper_grid, layout, layout24, matmul, resolved
from pallas_kernels.deferred_norm import DeferredNorm
from pallas_kernels.hardware import Device
from pallas_kernels.hopper_chain import after_attention_hopper, problems_of
from pallas_kernels.hopper_config import ChainConfig, HopperConfig
from pallas_kernels.reference import rms_norm
from tests.pallas_kernels import problems

separate_reason = importlib.import_module("pallas_kernels.after_attention").separate_reason
BF16 = jnp.dtype(jnp.bfloat16)
H200 = Device(platform="cuda", kind="NVIDIA H200", num_sms=132)
KINDS = [
  dict(),
  dict(zeros=True),
  dict(sparse24=True),
  dict(bits=8),
  dict(group_size=64),
  dict(group_size=32),
  dict(group_size=None),
]
# What attention makes, the layer has, the MLP has, the reader makes. A small one, in which K is split in some products;
# Llama-3-8B; Qwen2.5-1.5B; one in which programs have two blocks of gate and up, as in Qwen2.5-32B and Llama-3-70B; one
# in which three programs share the K of down as well, as in Qwen2.5-32B.
SIZES = [
  (512, 1024, 3072, 768),
  (4096, 4096, 14336, 6144),
  (1536, 1536, 8960, 2048),
  (512, 1280, 17408, 1536),
  (512, 5120, 27648, 768),
]
needs_jax_0_11 = pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the kernel needs JAX 0.11")


def products(sizes):
  """(k, n) of each."""
  attention, features, hidden, read = sizes
  return (attention, features), (features, 2 * hidden), (hidden, features), (features, read)


def weight_shapes(k, n, *, group_size=128, bits=4, zeros=False, sparse24=False, scales_dtype=BF16):
  shape = jax.ShapeDtypeStruct
  words = layout24.qweight_shape(k, n) if sparse24 else layout.qweight_shape(k, n, bits)
  scales = shape((k // (group_size or k), n), scales_dtype)
  meta = shape(layout24.meta_shape(k, n), jnp.int16) if sparse24 else None
  return shape(words, jnp.int16), scales, scales if zeros else None, meta


def layer_shapes(sizes, **kind):
  return tuple(weight_shapes(k, n, **kind) for k, n in products(sizes))


def random_weight(rng, k, n, *, group_size=128, bits=4, zeros=False, sparse24=False):
  """Of such a size that a product has about that of x."""
  groups = k // (group_size or k)
  scales = jnp.asarray(rng.uniform(0.5, 1.5, (groups, n)) / (0.3 * 2**bits * k**0.5), BF16)
  if sparse24:
    qweight, meta = layout24.pack_codes(problems.sparse24_codes(rng, k, n))
    return qweight, scales, None, meta
  points = jnp.asarray(rng.integers(0, 2**bits, (groups, n)), BF16) if zeros else None
  words = rng.integers(-(2**15), 2**15, layout.qweight_shape(k, n, bits), dtype=np.int16)
  return jnp.asarray(words), scales, points, None


def layer(rng, m, sizes, dtype=BF16, **kind):
  weights = tuple(random_weight(rng, k, n, **kind) for k, n in products(sizes))
  x, residual = (jnp.asarray(rng.normal(size=(m, size)), dtype) for size in sizes[:2])
  norms = tuple((jnp.asarray(rng.uniform(0.5, 2, sizes[1]), dtype), epsilon) for epsilon in (1e-5, 1e-3))
  return x, residual, weights, norms, jnp.asarray(rng.normal(size=sizes[3]), dtype)


@pytest.mark.parametrize("m", [0, 1, 5])
def test_it_is_what_a_layer_does_after_its_attention(rng, m):
  x, residual, weights, norms, bias = layer(rng, m, (64, 128, 192, 96), jnp.float32, group_size=32)
  s, normed, y = after_attention(x, residual, weights, norms, bias)
  output, gate_up, down, reader = (
    np.asarray(matmul(jnp.eye(w[1].shape[0] * 32, dtype=jnp.float32), *w), np.float64) for w in weights
  )
  both = np.empty_like(gate_up)
  both[:, layout.gated_order(2 * 192)] = gate_up  # gates first, then ups
  total = np.asarray(residual, np.float64) + np.asarray(x, np.float64) @ output

  def norm(y, scale, epsilon):
    return y / np.sqrt((y**2).mean(axis=1, keepdims=True) + epsilon) * np.asarray(scale, np.float64)

  gate, up = np.split(norm(total, *norms[0]) @ both, 2, axis=1)
  total += gate / (1 + np.exp(-gate)) * up @ down
  after = norm(total, *norms[1])
  for ours, theirs in ((s, total), (resolved(normed), after), (y, after @ reader + np.asarray(bias))):
    np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-4)


def test_it_says_which_weight_is_wrong(rng):
  x, residual, (output, gate_up, down, reader), norms, _ = layer(rng, 2, (64, 128, 192, 96), group_size=32)
  with pytest.raises(ValueError, match="6 groups, which must divide k=128"):
    after_attention(x, residual, (output, down, down, reader), norms)
  with pytest.raises(ValueError, match="must divide k=192"):
    after_attention(x, residual, (output, gate_up, (down[0], down[1][:5], None, None), reader), norms)
  wide = random_weight(rng, 64, 192, group_size=32)
  with pytest.raises(ValueError, match=r"output has scales \(2, 192\), must have the residual's 128 columns"):
    after_attention(x, residual, (wide, gate_up, down, reader), norms)


def test_it_says_which_other_operand_is_wrong(rng):
  x, residual, weights, norms, bias = layer(rng, 2, (64, 128, 192, 96), group_size=32)
  with pytest.raises(ValueError, match=r"bias\.shape=\(95,\) must be \(96,\)"):
    after_attention(x, residual, weights, norms, bias[1:])
  with pytest.raises(ValueError, match=r"residual is float32 \(2, 128\), must be bfloat16 \(2, 128\)"):
    after_attention(x, residual.astype(jnp.float32), weights, norms)


def of_shapes(function, *shapes):
  """What `function` of such arrays returns, which is none."""
  found = []
  jax.eval_shape(lambda *arrays: found.append(function(*arrays)), *shapes)
  return found[0]


def shipped(m, sizes, **kind):
  """The products of a layer, and the config of their launch."""
  found = of_shapes(problems_of, jax.ShapeDtypeStruct((m, sizes[0]), BF16), layer_shapes(sizes, **kind))
  return found, heuristics.chain_config(found, num_sms=132)


def reason(m=1, sizes=SIZES[1], device=H200, dtype=BF16, norm_dtype=BF16, **kind):
  shape = jax.ShapeDtypeStruct

  def ask(x, weights, scale):
    return separate_reason(x, weights, ((scale, 1e-5), (scale, 1e-5)), device)

  return of_shapes(ask, shape((m, sizes[0]), dtype), layer_shapes(sizes, **kind), shape((sizes[1],), norm_dtype))


@needs_jax_0_11
@pytest.mark.parametrize("m", [1, 8, 16])
@pytest.mark.parametrize("sizes", SIZES)
def test_up_to_sixteen_rows_are_one_launch(m, sizes):
  assert reason(m, sizes) is None


@needs_jax_0_11
@pytest.mark.parametrize("asked, why", [
  (dict(m=17), "17 rows are too many"),
  (dict(sizes=(4096, 4096, 14368, 6144), group_size=32), "14368, 4096, 4096, 6144. must be multiples of 64"),
  (dict(sizes=(512, 40960, 1024, 768)), "n=40960 are too many columns"),
  (dict(sizes=(512, 512, 17408, 768)), "blocks of columns"),
  (dict(scales_dtype=jnp.float32), "scales must be of 16 bits, not float32"),
  (dict(dtype=jnp.dtype(jnp.float16)), "must be bfloat16, not float16"),
  (dict(norm_dtype=jnp.float32), "bfloat16, bfloat16, float32|bfloat16, float32, float32"),
  (dict(device=Device(platform="cuda", kind="NVIDIA A100", num_sms=108)), "Hopper"),
  (dict(device=Device(platform="cpu", kind="cpu", num_sms=0)), "not on cpu"),
])  # fmt: skip
def test_else_it_says_why_there_are_four(asked, why):
  with pytest.raises(AssertionError, match=why):
    assert reason(**asked) is None, reason(**asked)


def test_programs_are_no_more_than_can_be_there_at_once():
  for m in (1, 16):
    for sizes in SIZES:
      found, config = shipped(m, sizes)
      assert 2 * config.clusters <= 132
      for i, (problem, c) in enumerate(zip(found, config.products, strict=True)):
        turns = 2 if sizes in SIZES[3:] and i == 1 else 1
        assert turns * (2 * config.clusters // c.split_k) * c.block_n >= problem.n  # every column has one
  found, config = shipped(1, SIZES[1])
  assert "more than 62 blocks" in dataclasses.replace(config, clusters=62).unfit_reason(found)


@pytest.mark.parametrize("change, message", [
  (dict(clusters=0), "clusters=0 must be at least 1"),
  (dict(warpgroups_n=3), "as many warpgroups"),
  (dict(num_stages=3), "as many warpgroups and stages"),
  (dict(block_m=16), "one block_m"),
  (dict(split_k=4), "by more than 3"),
])  # fmt: skip
def test_a_config_that_cannot_be_launched_is_refused(change, message):
  config = HopperConfig(block_m=8, warpgroups_n=4, block_k=128, num_stages=4)
  clusters = change.pop("clusters", 66)
  with pytest.raises(ValueError, match=message):
    ChainConfig(products=(config, dataclasses.replace(config, **change)), clusters=clusters)


def in_three_runs(m, sizes, **kind):
  """The shipped config, but for three programs that share the K of down, and these products."""
  found, config = shipped(m, sizes, **kind)
  of_down = dict(warpgroups_n=2, warpgroups_k=2, split_k=3, block_k=512 if found[2].sparse24 else 256)
  products = list(config.products)
  products[2] = dataclasses.replace(products[2], **of_down)
  return found, dataclasses.replace(config, products=tuple(products), clusters=66)


def test_three_runs_of_k_are_for_what_is_not_gated():
  assert [c.split_k for c in shipped(16, (5120, 5120, 27648, 7168))[1].products] == [1, 1, 3, 1]  # Qwen2.5-32B
  found, config = in_three_runs(16, SIZES[0])
  assert config.unfit_reason(found) is None
  gated = dataclasses.replace(config, products=tuple(config.products[i] for i in (0, 2, 2, 3)))
  assert "must not split the K of gated columns by 3" in gated.unfit_reason(found)


def test_shared_memory_is_that_of_the_largest_stages():
  wide = HopperConfig(block_m=16, warpgroups_n=4, block_k=256, num_stages=4)
  deep = HopperConfig(block_m=16, warpgroups_n=1, warpgroups_k=4, block_k=512, num_stages=4)
  found, _ = shipped(16, SIZES[1])
  assert ChainConfig(products=(wide,) * 4, clusters=66).unfit_reason(found) is None
  config = ChainConfig(products=(deep, wide, deep, wide), clusters=66)
  assert config.unfit_reason(found) is None
  zeros, groups = (tuple(dataclasses.replace(problem, **kind) for problem in found) for kind in (
    dict(zeros=True), dict(zeros=True, group_size=32)
  ))  # fmt: skip
  assert config.unfit_reason(zeros) is None
  assert "shared memory" in config.unfit_reason(groups)  # 8 KB of scales and zero points a stage
  more, _ = shipped(17, SIZES[1])
  assert "more than block_m=16 rows" in config.unfit_reason(more)


def test_weights_are_of_one_kind():
  found, config = shipped(16, SIZES[1])
  assert config.unfit_reason(found) is None
  assert "of one kind" in config.unfit_reason((dataclasses.replace(found[0], zeros=True), *found[1:]))


def test_counts_begin_with_zero():
  *counts, last = hopper_grid.counts(4)
  assert counts == [0] * 4 and last  # or XLA would fill it anew before every launch


@needs_jax_0_11
@pytest.mark.parametrize("m", [1, 13, 16])
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_lowers_to_one_kernel_for_an_h200(lower_for_h200, m, kind):
  sizes, shape = SIZES[0], jax.ShapeDtypeStruct
  x, residual = shape((m, sizes[0]), BF16), shape((m, sizes[1]), BF16)
  weights, scale = layer_shapes(sizes, **kind), shape((sizes[1],), BF16)

  def layer_end(x, residual, weights, scale, bias):
    s, normed, y = after_attention(x, residual, weights, ((scale, 1e-5), (scale, 1e-5)), bias)
    return s, normed.scaled, normed.squares, y

  text = lower_for_h200(layer_end, x, residual, weights, scale, shape((sizes[3],), BF16))
  assert text.count("mosaic_gpu_v2") == 1 and "gpu.triton" not in text
  assert "red.release.gpu" in text and "ld.acquire.gpu" in text
  assert "dense<[0, 0, 0, 0, 0, 1]>" in text  # a constant, which nothing makes anew


@needs_jax_0_11
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_three_runs_of_k_lower_for_an_h200(lower_for_h200, kind):
  found, config = in_three_runs(16, SIZES[0], **kind)
  assert config.unfit_reason(found) is None
  shape, sizes = jax.ShapeDtypeStruct, SIZES[0]
  run = functools.partial(after_attention_hopper, epsilons=(1e-5, 1e-5), config=config)
  x, residual = shape((16, sizes[0]), BF16), shape((16, sizes[1]), BF16)
  lower_for_h200(run, x, residual, layer_shapes(sizes, **kind), (shape((sizes[1],), BF16),) * 2)


@needs_jax_0_11
@pytest.mark.parametrize("sizes", SIZES)
def test_shipped_sizes_lower_for_an_h200(lower_for_h200, sizes):
  shape = jax.ShapeDtypeStruct
  run = functools.partial(after_attention_hopper, epsilons=(1e-5, 1e-5), config=shipped(16, sizes)[1])
  x, residual = shape((16, sizes[0]), BF16), shape((16, sizes[1]), BF16)
  lower_for_h200(run, x, residual, layer_shapes(sizes), (shape((sizes[1],), BF16),) * 2)


def run(x, residual, weights, norms, bias, implementation=None):
  """s, its norm and what is read of it, by a compiled program."""

  @jax.jit
  def compiled(x, residual, weights):
    s, normed, y = after_attention(x, residual, weights, norms, bias, implementation=implementation)
    return s, resolved(normed), y

  return compiled(x, residual, weights)


def error(found, expected):
  """In the 2-norm."""
  found, expected = (np.asarray(y, np.float32) for y in (found, expected))
  return np.linalg.norm(found - expected) / np.linalg.norm(expected)


@pytest.mark.gpu
@needs_jax_0_11
@pytest.mark.parametrize("m", [1, 5, 8, 9, 16])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_it_computes_what_four_products_do(rng, m, sizes, kind):
  if sizes != SIZES[0] and kind:
    pytest.skip("kinds are for the small layer")
  x, residual, weights, norms, bias = layer(rng, m, sizes, **kind)
  assert separate_reason(x, weights, norms, H200) is None
  found, expected = (run(x, residual, weights, norms, bias, implementation=name) for name in (None, "hopper"))
  # Sums in another order, which now and then rounds t or h to its neighbour.
  for ours, theirs in zip(found, expected, strict=True):
    assert error(ours, theirs) < 2**-9


@pytest.mark.gpu
@needs_jax_0_11
@pytest.mark.parametrize("m", [1, 9, 16])
@pytest.mark.parametrize(
  "sizes, kind", [*((SIZES[0], kind) for kind in KINDS), ((512, 1088, 3072, 768), dict(group_size=64))], ids=str
)
def test_three_runs_of_k_are_added_up(rng, m, sizes, kind):
  x, residual, weights, norms, bias = layer(rng, m, sizes, **kind)
  expected = run(x, residual, weights, norms, bias, implementation="hopper")
  epsilons, config = tuple(epsilon for _, epsilon in norms), in_three_runs(m, sizes, **kind)[1]
  scales = tuple(scale for scale, _ in norms)
  for _ in range(20):  # of which each finds the counts as the one before has left them
    s, scaled, squares, y = after_attention_hopper(x, residual, weights, scales, bias, epsilons=epsilons, config=config)
  normed = resolved(DeferredNorm(scaled=scaled, squares=squares, epsilon=epsilons[1]))
  for ours, theirs in zip((s, normed, y), expected, strict=True):
    assert error(ours, theirs) < 2**-9


@pytest.mark.gpu
@needs_jax_0_11
@pytest.mark.parametrize("m, sizes", [(1, SIZES[1]), (16, SIZES[0]), (16, SIZES[1]), (16, SIZES[4])])
def test_it_has_the_same_bits_two_hundred_times(rng, m, sizes):
  x, residual, weights, norms, bias = layer(rng, m, sizes)

  @jax.jit
  def compiled(x, residual, weights):
    s, normed, y = after_attention(x, residual, weights, norms, bias)
    return s, normed.scaled, normed.squares, y

  first = compiled(x, residual, weights)
  for again in [compiled(x, residual, weights) for _ in range(200)]:  # one right after the other
    for ours, theirs in zip(again, first, strict=True):
      np.testing.assert_array_equal(ours, theirs)


@pytest.mark.gpu
@needs_jax_0_11
def test_without_weights_the_residual_is_left(rng):
  """With weights of zero the residual is left, normed."""
  x, residual, weights, norms, bias = layer(rng, 3, SIZES[0])
  nothing = tuple((jnp.zeros_like(q), jnp.zeros_like(s), None, None) for q, s, *_ in weights)
  s, normed, y = run(x, residual, nothing, norms, bias)
  np.testing.assert_array_equal(s, residual)
  np.testing.assert_array_equal(y, jnp.broadcast_to(bias, y.shape))
  expected = rms_norm(residual, *norms[1])
  np.testing.assert_allclose(normed.astype(jnp.float32), expected.astype(jnp.float32), rtol=2**-7)
