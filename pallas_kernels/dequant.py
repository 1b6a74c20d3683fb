# SPDX-License-Identifier: Apache-2.0
"""Nibble -> bf16 / fp16 without a conversion instruction, for Triton-lowered kernels.

Writing a nibble into the low mantissa bits of a constant gives an exact float: 0x4300 | v is the bf16 128 + v,
0x6400 | v the fp16 1024 + v. One fused multiply-add per pair then takes the offset and the zero point 8 away
(MARLIN, arXiv 2408.11743, section 3.4; Kim et al., arXiv 2211.10017). Two codes cost three instructions:

    shr.u32   t, pair, 4p
    lop3.b32  t, t, 0x000F000F, magic, (a & b) | c
    fma.rn    t, t, 1, -(offset + 8)
"""

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int16

from pallas_kernels.layout import ZERO_CODE

# dtype -> (PTX type, bits of the offset, bits of 1.0, bits of -(offset + 8)). fma and not sub: sub.bf16x2 needs
# sm_90, fma.rn.bf16x2 runs on sm_80 as well, at the same rate; both are exact here.
_MAGIC = {
  jnp.dtype(jnp.bfloat16): ("bf16x2", 0x4300, 0x3F80, 0xC308),
  jnp.dtype(jnp.float16): ("f16x2", 0x6400, 0x3C00, 0xE408),
}


def nibble_plane(words: Int16[Array, "R C"], p: int, dtype, *, use_asm: bool) -> Float[Array, "R C"]:
  """(words >> 4p & 15) - 8 in `dtype` (bfloat16 or float16), exact.

  Args:
    words: four codes each.
    p: which nibble, 0..3.
    dtype: of the result.
    use_asm: inline PTX, for the GPU; otherwise its plain twin, for interpret mode, which has no inline assembly.
  """
  if not use_asm:
    return ((words >> (4 * p) & 15) - ZERO_CODE).astype(dtype)
  ptx_type, magic, one, offset = _MAGIC[jnp.dtype(dtype)]

  def pair(half):
    return f"0x{half << 16 | half:08X}"

  asm = f"""{{ .reg .b32 t, one, offset;
    shr.u32 t, $1, {4 * p};
    lop3.b32 t, t, 0x000F000F, {pair(magic)}, 0xEA;
    mov.b32 one, {pair(one)};
    mov.b32 offset, {pair(offset)};
    fma.rn.{ptx_type} $0, t, one, offset; }}"""
  out = jax.ShapeDtypeStruct(words.shape, dtype)
  # pack=2: Triton hands over two neighbouring words in one 32-bit register.
  return plt.elementwise_inline_asm(asm, args=[words], constraints="=r,r", pack=2, result_shape_dtypes=[out])[0]
