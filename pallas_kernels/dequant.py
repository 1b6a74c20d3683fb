# SPDX-License-Identifier: Apache-2.0
"""Nibbles and bytes -> bf16 / fp16 without a conversion instruction.

A bfloat16 whose exponent is 0 or 1 is its bits * 2^-133, so a mask alone makes a number of a nibble in bits 0 to 3, and
of one in bits 4 to 7, 16 times as large. No other factor than 2^133, which is no bfloat16, would make integers of them:
codes come out multiplied by a power of two, DECODED, by which sums or scales are divided. The ten mantissa bits of a
float16 hold both places beside a constant: 0x6400 | nibble is 1024 + nibble, 0x6400 | nibble << 4 is 1024 + 16 nibble
(MARLIN, arXiv 2408.11743, section 3.4; Kim et al., arXiv 2211.10017). One fused multiply-add per pair does the rest.
For nibbles 0 to 3 of a pair of words a Triton-lowered kernel has

    shr.u32   t, pair, 8                                           (nibbles 2 and 3, which share it)
    lop3.b32  t, t, 0x000F000F or 0x00F000F0, constant, (a & b) | c
    fma.rn    t, t, factor, offset                                 = (nibble - zero) * DECODED

nine instructions for eight codes. Eight codes of 8 bits, whose nibbles lie in two words, take eighteen:

    fma.rn    h, h, 16 factor, offset
    fma.rn    h, l, factor, h                                      = (16 high + low - zero) * DECODED_BYTE

Every intermediate is a whole number (times a power of two) of at most eleven significant bits in fp16 and, in bf16, one
of at most eight, so nothing is rounded.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int16

# What decoded codes of 4 and of 8 bits are multiplied by.
DECODED = {jnp.dtype(jnp.bfloat16): 2.0**-6, jnp.dtype(jnp.float16): 1.0}
DECODED_BYTE = {jnp.dtype(jnp.bfloat16): 2.0**-10, jnp.dtype(jnp.float16): 1.0}
# (factor, offset) for nibbles in bits 0 to 3 and for those in bits 4 to 7, with which they become nibble * DECODED.
OF_BITS = {
  jnp.dtype(jnp.bfloat16): ((2.0**127, 0.0), (2.0**123, 0.0)),
  jnp.dtype(jnp.float16): ((1.0, -1024.0), (1 / 16, -64.0)),
}
# PTX type, and the constant that a masked nibble is written into. fma runs on sm_80 as well, with subnormal operands.
_PTX = {jnp.dtype(jnp.bfloat16): ("bf16x2", "0x00000000"), jnp.dtype(jnp.float16): ("f16x2", "0x64006400")}


def pair_literal(value: int | float, dtype) -> str:
  """A PTX literal of two 16-bit floats in a register."""
  bits = int(np.asarray(value, dtype).view(np.uint16))
  return f"0x{bits << 16 | bits:08X}"


def nibble_plane(
  words: Int16[Array, "R C"], p: int, dtype, *, zero: int | Float[Array, "R C"], use_asm: bool
) -> Float[Array, "R C"]:
  """((words >> 4p & 15) - zero) * DECODED in `dtype` (bfloat16 or float16), rounded once: exact for whole zeros.

  Args:
    words: four codes each.
    p: which nibble, 0..3.
    dtype: of the result.
    zero: 8, or 0 where another zero point is subtracted later. In bfloat16 also one for each word, of that dtype and
      perhaps a fraction; beside float16's 1024 there is no room for that.
    use_asm: inline PTX, for the GPU; otherwise its plain twin, for interpret mode, which has no inline assembly.
  """
  dtype = jnp.dtype(dtype)
  if not use_asm:
    return ((words >> (4 * p) & 15) - zero).astype(dtype) * dtype.type(DECODED[dtype])
  ptx_type, _ = _PTX[dtype]
  factor, offset = OF_BITS[dtype][p % 2]
  if isinstance(zero, int):
    operands, offset = [words], pair_literal(offset - zero * DECODED[dtype], dtype)
  else:  # bfloat16, whose offset is 0
    operands, offset = [words, zero * dtype.type(-DECODED[dtype])], "$2"
  asm = f"""{{ .reg .b32 t, factor, offset;
    {_masked("t", "$1", p, dtype)}
    mov.b32 factor, {pair_literal(factor, dtype)};
    mov.b32 offset, {offset};
    fma.rn.{ptx_type} $0, t, factor, offset; }}"""
  return _elementwise(asm, operands, "=r" + ",r" * len(operands), dtype)


def byte_plane(
  high: Int16[Array, "R C"], low: Int16[Array, "R C"], p: int, dtype, *, zero: int, use_asm: bool
) -> Float[Array, "R C"]:
  """(16 (high >> 4p & 15) + (low >> 4p & 15) - zero) * DECODED_BYTE in `dtype`, exact; zero is 128 or 0, all else as
  for nibbles.
  """
  dtype = jnp.dtype(dtype)
  decoded = DECODED_BYTE[dtype]
  if not use_asm:
    return (16 * (high >> (4 * p) & 15) + (low >> (4 * p) & 15) - zero).astype(dtype) * dtype.type(decoded)
  ptx_type, _ = _PTX[dtype]
  factor, offset = (part * decoded / DECODED[dtype] for part in OF_BITS[dtype][p % 2])
  asm = f"""{{ .reg .b32 h, l, factor_h, factor_l, offset;
    {_masked("h", "$1", p, dtype)}
    {_masked("l", "$2", p, dtype)}
    mov.b32 factor_h, {pair_literal(16 * factor, dtype)};
    mov.b32 factor_l, {pair_literal(factor, dtype)};
    mov.b32 offset, {pair_literal(17 * offset - zero * decoded, dtype)};
    fma.rn.{ptx_type} h, h, factor_h, offset;
    fma.rn.{ptx_type} $0, l, factor_l, h; }}"""
  return _elementwise(asm, [high, low], "=r,r,r", dtype)


def _masked(out: str, word: str, p: int, dtype) -> str:
  """PTX that leaves in `out` nibble p of both halves of `word`, in the constant's bits 0 to 3 or 4 to 7."""
  return f"""shr.u32 {out}, {word}, {p // 2 * 8};
    lop3.b32 {out}, {out}, 0x{0x000F000F << p % 2 * 4:08X}, {_PTX[dtype][1]}, 0xEA;"""


def _elementwise(asm: str, operands: list, constraints: str, dtype):
  out = jax.ShapeDtypeStruct(operands[0].shape, dtype)
  # pack=2: Triton hands over two neighbouring operands in one 32-bit register.
  return plt.elementwise_inline_asm(asm, args=operands, constraints=constraints, pack=2, result_shape_dtypes=[out])[0]
