# SPDX-License-Identifier: Apache-2.0
"""Nibbles and bytes -> bf16 / fp16 without a conversion instruction, for Triton-lowered kernels.

Writing a nibble into the low mantissa bits of a constant gives an exact float: 0x4300 | v is the bf16 128 + v,
0x6400 | v the fp16 1024 + v. One fused multiply-add per pair then takes the offset and the zero point away (MARLIN,
arXiv 2408.11743, section 3.4; Kim et al., arXiv 2211.10017). Two codes of 4 bits cost three instructions:

    shr.u32   t, pair, 4p
    lop3.b32  t, t, 0x000F000F, magic, (a & b) | c
    fma.rn    t, t, 1, -(offset + zero)

Two codes of 8 bits, whose nibbles lie in two words, cost twice that. Every intermediate is a whole number of at most
eleven significant bits in fp16 and, in bf16, one of at most eight, so nothing is rounded:

    h, l = offset + high nibble, offset + low nibble               (shr and lop3 each)
    fma.rn    h, h, 16, -(17 offset + zero)                        = 16 high - offset - zero
    fma.rn    h, l, 1, h                                           = 16 high + low - zero
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int16

# dtype -> (PTX type, bits of the offset, the offset). fma and not sub: sub.bf16x2 needs sm_90, fma.rn.bf16x2 runs on
# sm_80 as well, at the same rate.
_MAGIC = {
  jnp.dtype(jnp.bfloat16): ("bf16x2", 0x4300, 128),
  jnp.dtype(jnp.float16): ("f16x2", 0x6400, 1024),
}


def nibble_plane(words: Int16[Array, "R C"], p: int, dtype, *, zero: int, use_asm: bool) -> Float[Array, "R C"]:
  """(words >> 4p & 15) - zero in `dtype` (bfloat16 or float16), exact.

  Args:
    words: four codes each.
    p: which nibble, 0..3.
    dtype: of the result.
    zero: 8, or 0 where another zero point is subtracted later.
    use_asm: inline PTX, for the GPU; otherwise its plain twin, for interpret mode, which has no inline assembly.
  """
  if not use_asm:
    return ((words >> (4 * p) & 15) - zero).astype(dtype)
  ptx_type, magic, offset = _MAGIC[jnp.dtype(dtype)]
  asm = f"""{{ .reg .b32 t, one, offset;
    shr.u32 t, $1, {4 * p};
    lop3.b32 t, t, 0x000F000F, 0x{magic << 16 | magic:08X}, 0xEA;
    mov.b32 one, {_pair(1, dtype)};
    mov.b32 offset, {_pair(-(offset + zero), dtype)};
    fma.rn.{ptx_type} $0, t, one, offset; }}"""
  return _elementwise(asm, [words], "=r,r", dtype)


def byte_plane(
  high: Int16[Array, "R C"], low: Int16[Array, "R C"], p: int, dtype, *, zero: int, use_asm: bool
) -> Float[Array, "R C"]:
  """16 (high >> 4p & 15) + (low >> 4p & 15) - zero in `dtype`, exact; zero is 128 or 0, all else as for nibbles."""
  if not use_asm:
    return (16 * (high >> (4 * p) & 15) + (low >> (4 * p) & 15) - zero).astype(dtype)
  ptx_type, magic, offset = _MAGIC[jnp.dtype(dtype)]
  asm = f"""{{ .reg .b32 h, l, one, sixteen, offset;
    shr.u32 h, $1, {4 * p};
    shr.u32 l, $2, {4 * p};
    lop3.b32 h, h, 0x000F000F, 0x{magic << 16 | magic:08X}, 0xEA;
    lop3.b32 l, l, 0x000F000F, 0x{magic << 16 | magic:08X}, 0xEA;
    mov.b32 one, {_pair(1, dtype)};
    mov.b32 sixteen, {_pair(16, dtype)};
    mov.b32 offset, {_pair(-(17 * offset + zero), dtype)};
    fma.rn.{ptx_type} h, h, sixteen, offset;
    fma.rn.{ptx_type} $0, l, one, h; }}"""
  return _elementwise(asm, [high, low], "=r,r,r", dtype)


def _pair(value: int, dtype) -> str:
  """The bits of two equal values in one register."""
  bits = int(np.asarray(value, dtype).view(np.uint16))
  return f"0x{bits << 16 | bits:08X}"


def _elementwise(asm: str, words: list, constraints: str, dtype):
  out = jax.ShapeDtypeStruct(words[0].shape, dtype)
  # pack=2: Triton hands over two neighbouring words in one 32-bit register.
  return plt.elementwise_inline_asm(asm, args=words, constraints=constraints, pack=2, result_shape_dtypes=[out])[0]
