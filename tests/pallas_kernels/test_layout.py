# SPDX-License-Identifier: Apache-2.0
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels import layout


@settings(deadline=None, max_examples=25)
@given(k=st.integers(1, 200), n=st.integers(1, 140), bits=st.sampled_from([4, 8]), seed=st.integers(0, 2**32 - 1))
def test_round_trip_is_exact_for_every_shape(k, n, bits, seed):
  codes = np.random.default_rng(seed).integers(0, 2**bits, (k, n)).astype(np.uint8)
  packed = layout.pack_codes(jnp.asarray(codes), bits)
  assert packed.dtype == jnp.int16
  assert packed.shape == layout.qweight_shape(k, n, bits)
  np.testing.assert_array_equal(layout.unpack_codes(packed, k, n), codes)


def test_words_hold_the_codes_that_the_formula_says(rng):
  k, n = 128, 128
  codes = rng.integers(0, 16, (k, n))
  words = np.asarray(layout.pack_codes(jnp.asarray(codes, jnp.uint8))).view(np.uint16)
  for n_tile, k_tile, r, c in rng.integers(0, [2, 2, 32, 32], (200, 4)):
    for p in range(4):
      n_in_tile, k_in_tile = layout.plane_n(r, p % 2), layout.plane_k(c, p // 2)
      assert n_in_tile == 16 * (r // 8) + 8 * (p % 2) + r % 8
      assert k_in_tile == 16 * (c // 2 % 4) + 8 * (p // 2) + 2 * (c // 8) + c % 2
      nibble = words[n_tile, k_tile, r, c] >> (4 * p) & 15
      assert nibble == codes[64 * k_tile + k_in_tile, 64 * n_tile + n_in_tile]


def test_a_thread_s_sixteen_bytes_are_its_wgmma_fragment():
  # PTX ISA, wgmma A fragment of 64 x 16: register pair i of thread t holds row 16 (t // 32) + 8 (i % 2) + t % 32 // 4
  # and columns 8 (i // 2) + 2 (t % 4) + {0, 1}. A 64 x 64 operand is four of them; i runs from 0 to 15.
  position = np.arange(64 * 64).reshape(64, 64)  # [k, n]
  planes = [[position >> (4 * part) & 15 for part in range(3)]]  # twelve bits name a position, four bits a code
  words = [
    np.asarray(layout.pack_codes(jnp.asarray(p, jnp.uint8)))[0, 0].reshape(-1).view(np.uint16) for p in planes[0]
  ]
  for t in range(128):
    for i in range(16):
      j, p = i // 4, i % 4
      for e in range(2):
        word = 8 * t + 2 * j + e
        found = sum(int(w[word] >> (4 * p) & 15) << (4 * part) for part, w in enumerate(words))
        row = 16 * (t // 32) + 8 * (i % 2) + t % 32 // 4
        column = 8 * (i // 2) + 2 * (t % 4) + e
        assert found == position[column, row]


def test_eight_bits_are_a_tile_of_high_nibbles_and_a_tile_of_low_ones(rng):
  codes = jnp.asarray(rng.integers(0, 256, (192, 70)), jnp.uint8)
  words = layout.pack_codes(codes, 8)
  assert words.shape == (2, 4, 64, 32)
  inside = (slice(None, 192), slice(None, 70))
  for half, nibble in ((words[:, :, :32], codes >> 4), (words[:, :, 32:], codes & 15)):
    np.testing.assert_array_equal(layout.unpack_codes(half, *layout.padded_shape(192, 70))[inside], nibble)
  high, low = (np.asarray(part, np.int32) for part in (codes >> 4, codes & 15))
  np.testing.assert_array_equal(16 * (high - 8) + low, np.asarray(codes, np.int32) - 128)


@pytest.mark.parametrize("bits, zero", [(4, 8), (8, 128)])
def test_padding_dequantizes_to_zero(bits, zero):
  codes = jnp.full((65, 3), 15, jnp.uint8)
  whole = layout.unpack_codes(layout.pack_codes(codes, bits), *layout.padded_shape(65, 3))
  assert layout.zero_code(bits) == zero
  assert (whole[65:] == zero).all() and (whole[:, 3:] == zero).all()


def test_pack_and_unpack_are_jitable(rng):
  codes = jnp.asarray(rng.integers(0, 16, (64, 64)), jnp.uint8)
  packed = jax.jit(layout.pack_codes)(codes)
  np.testing.assert_array_equal(packed, layout.pack_codes(codes))
  np.testing.assert_array_equal(jax.jit(layout.unpack_codes, static_argnums=(1, 2))(packed, 64, 64), codes)


def test_unpack_refuses_a_buffer_of_another_shape():
  with pytest.raises(ValueError, match=r"\(1, 2, 32, 32\).*k=64, n=65"):
    layout.unpack_codes(jnp.zeros((1, 2, 32, 32), jnp.int16), 64, 65)
