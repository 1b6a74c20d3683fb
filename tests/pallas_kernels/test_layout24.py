# SPDX-License-Identifier: Apache-2.0
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import layout, layout24
from tests.pallas_kernels import problems


@jax.jit
def _round_trip(codes):
  qweight, meta = layout24.pack_codes(codes)
  sound = layout24.meta_is_sound(meta) & ~layout24.surplus(codes).any()
  return qweight, meta, sound, layout24.unpack_codes(qweight, meta, *codes.shape)


# Few shapes, because each is compiled anew: parts of a quad, of a tile, and one more than a tile either way.
@pytest.mark.parametrize("k, n", [(1, 1), (130, 63), (255, 64), (257, 65)])
@settings(deadline=None, max_examples=5)
@given(density=st.sampled_from([0, 1, 2, None]), seed=st.integers(0, 999))
def test_round_trip_is_exact_for_every_shape_and_every_number_of_kept_codes(k, n, density, seed):
  codes = problems.sparse24_codes(np.random.default_rng(seed), k, n, density)
  qweight, meta, sound, back = _round_trip(codes)
  assert qweight.dtype == meta.dtype == jnp.int16
  assert qweight.shape == layout24.qweight_shape(k, n) and meta.shape == layout24.meta_shape(k, n)
  assert sound
  np.testing.assert_array_equal(back, codes)


def test_every_quad_of_two_codes_or_fewer_comes_back():
  quads = [q for q in itertools.product((0, 7, 8, 9, 15), repeat=4) if sum(code != 8 for code in q) <= 2]
  codes = jnp.asarray(np.array(quads, np.uint8).T.reshape(4, -1))
  assert {sum(code != 8 for code in q) for q in quads} == {0, 1, 2} and len(quads) == 1 + 4 * 4 + 6 * 16
  qweight, meta = layout24.pack_codes(codes)
  assert layout24.meta_is_sound(meta)
  np.testing.assert_array_equal(layout24.unpack_codes(qweight, meta, *codes.shape), codes)


def test_three_bits_a_weight():
  qweight, meta = (np.prod(shape(4096, 1024)) * 16 for shape in (layout24.qweight_shape, layout24.meta_shape))
  assert qweight + meta == 3 * 4096 * 1024


def test_words_hold_the_positions_that_the_formula_says(rng):
  k, n = 512, 128
  codes = problems.sparse24_codes(rng, k, n, 2)
  qweight, meta = (np.asarray(part) for part in layout24.pack_codes(codes))
  kept = np.asarray(layout.unpack_codes(jnp.asarray(qweight), k // 2, n))
  for n_tile, k_tile, r, c, i in rng.integers(0, [2, 4, 32, 16, 4], (500, 5)):
    nibble = int(meta.view(np.uint16)[n_tile, k_tile, r, c]) >> (4 * i) & 15
    first, second = nibble & 3, nibble >> 2
    column = 64 * n_tile + 16 * (r // 8) + 8 * (c % 2) + r % 8
    row = 128 * k_tile + 64 * (c // 2 % 2) + 16 * (c // 4) + 4 * i
    quad = np.asarray(codes)[row : row + 4, column]
    np.testing.assert_array_equal(np.flatnonzero(quad != 8), [first, second])
    np.testing.assert_array_equal(kept[row // 2 : row // 2 + 2, column], quad[[first, second]])


@pytest.mark.parametrize("step", range(4))
def test_a_thread_s_registers_are_the_operands_of_sparse_wgmma(rng, step):
  # PTX ISA, wgmma.mma_async.sp.m64nNk32, .f16 and .bf16. Fragment A: register i (0..3) of thread t holds the two kept
  # values of row 16 (t // 32) + 8 (i % 2) + t % 32 // 4, columns 4 (t % 4) + 16 (i // 2) .. + 3. Metadata: of four
  # threads the pair that the selector names, the first of which has columns 0..15 and the second 16..31; row
  # t % 32 // 4 of the warp in the low half of the register and row + 8 in the high one, four bits a quad.
  codes = np.asarray(problems.sparse24_codes(rng, 128, 64, 2))
  qweight, meta = (
    np.asarray(part)[0, 0].reshape(-1).view(np.uint16) for part in layout24.pack_codes(jnp.asarray(codes))
  )
  registers, selector = meta.view(np.uint32).reshape(128, 2)[:, step // 2], step % 2
  operand = codes[32 * step : 32 * step + 32].T.astype(int) - 8  # [64, 32], what the instruction multiplies
  rebuilt = np.zeros((64, 32), int)
  for t, i in itertools.product(range(128), range(4)):
    row, column = 16 * (t // 32) + 8 * (i % 2) + t % 32 // 4, 4 * (t % 4) + 16 * (i // 2)
    values = [int(qweight[8 * t + 2 * step + e] >> (4 * i) & 15) - 8 for e in range(2)]
    source = t // 4 * 4 + 2 * selector + column // 16
    nibble = int(registers[source]) >> (16 * (i % 2) + 4 * (column % 16 // 4)) & 15
    assert nibble in layout24.POSITIONS
    rebuilt[row, column + (nibble & 3)], rebuilt[row, column + (nibble >> 2)] = values
  np.testing.assert_array_equal(rebuilt, operand)


def test_padding_is_quads_of_zeros_at_positions_0_and_1():
  codes = jnp.zeros((6, 3), jnp.uint8).at[jnp.array([1, 2])].set(8)  # the second quad has two codes inside K
  qweight, meta = layout24.pack_codes(codes.at[5].set(8))
  whole = np.asarray(layout24.unpack_codes(qweight, meta, *layout24.padded_shape(6, 3)))
  assert (whole[6:] == 8).all() and (whole[:, 3:] == 8).all() and (whole[:6, :3] != 8).sum() == 9
  assert meta.shape == (1, 2, 32, 16) and (np.asarray(meta[:, 1]).view(np.uint16) == 0x4444).all()


def test_surplus_is_the_third_code_of_a_quad():
  codes = np.full((10, 5), 8, np.uint8)
  codes[4:8, 2] = 1, 8, 2, 3  # a third in the fourth place
  codes[0:4, 4] = 1, 2, 3, 4
  codes[3:5, 0] = 1, 2  # neighbours in two quads
  np.testing.assert_array_equal(np.argwhere(layout24.surplus(jnp.asarray(codes))), [[2, 4], [3, 4], [7, 2]])


@pytest.mark.parametrize("nibble", range(16))
def test_only_two_ascending_positions_are_sound(nibble):
  meta = np.full((1, 2, 32, 16), 0x4444, np.uint16)
  meta[0, 1, 5, 3] = 0x4044 | nibble << 8
  assert bool(layout24.meta_is_sound(jnp.asarray(meta.view(np.int16)))) == (nibble in (0b0100, 8, 9, 12, 13, 14))
  assert (nibble in layout24.POSITIONS) == (nibble & 3 < nibble >> 2)


def test_pack_and_unpack_are_jitable(rng):
  codes = problems.sparse24_codes(rng, 300, 70)
  qweight, meta = jax.jit(layout24.pack_codes)(codes)
  np.testing.assert_array_equal(meta, layout24.pack_codes(codes)[1])
  np.testing.assert_array_equal(jax.jit(layout24.unpack_codes, static_argnums=(2, 3))(qweight, meta, 300, 70), codes)


def test_unpack_refuses_buffers_of_another_shape():
  qweight, meta = layout24.pack_codes(jnp.full((256, 64), 8, jnp.uint8))
  with pytest.raises(ValueError, match=r"qweight.shape=\(1, 2, 32, 32\) is not \(2, 2, 32, 32\).*k=256, n=65"):
    layout24.unpack_codes(qweight, meta, 256, 65)
  with pytest.raises(ValueError, match=r"meta.shape=\(1, 1, 32, 16\) is not \(1, 2, 32, 16\)"):
    layout24.unpack_codes(qweight, meta[:, :1], 256, 64)
