# SPDX-License-Identifier: Apache-2.0
"""The Triton-lowered kernel: runs on every NVIDIA GPU since Ampere and on both JAX lines."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float, Int16

from pallas_kernels import layout
from pallas_kernels.dequant import DECODED, DECODED_BYTE, byte_plane, nibble_plane
from pallas_kernels.hardware import Device
from pallas_kernels.problem import MatmulProblem

# Element offsets inside the kernel are 32-bit; Pallas widens them only above 2^32 elements.
MAX_ELEMENTS = 2**31 - 1

# Bits of the word's coordinates, in memory order, and of the nibble: p = 2 half + odd (see layout.py).
_WORD_AXES = ("n_tile", "k_tile", "warp", "lane", "quad", "j", "e", "half", "odd")
# The same bits in the order of n = (n_tile, warp, odd, lane) and k = (k_tile, j, half, quad, e).
_WEIGHT_AXES = ("n_tile", "warp", "odd", "lane", "k_tile", "j", "half", "quad", "e")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TritonConfig:
  """What one program computes, and how.

  Attributes:
    block_m: rows of x, the narrow side of the matrix instruction; a power of two, at least 16.
    block_n: columns, a multiple of the layout's 64 that is a power of two.
    block_k: k per loop step, 64 or 128.
    programs: so many share the steps of all columns equally, in whatever columns these begin and end, for each block of
      rows; a second pass adds the parts of a column in the order of K. 0: one program for each block of columns.
    num_warps, num_stages: Triton's threads / 32 and depth of its load pipeline.
  """

  block_m: int
  block_n: int
  block_k: int
  programs: int
  num_warps: int
  num_stages: int

  def __post_init__(self):
    for name, allowed in dict(
      block_m=(16, 32, 64, 128, 256), block_n=(64, 128, 256), block_k=(64, 128), num_warps=(1, 2, 4, 8, 16)
    ).items():
      if getattr(self, name) not in allowed:
        raise ValueError(f"{name}={getattr(self, name)} must be one of {allowed}")
    if self.programs < 0 or self.num_stages < 1:
      raise ValueError(f"programs={self.programs} must not be negative, and num_stages={self.num_stages} at least 1")


def unsupported_reason(problem: MatmulProblem, device: Device) -> str | None:
  """Why this kernel cannot take `problem` on `device`; None if it can."""
  if problem.sparse24:
    return "it takes dense weights, not 2:4 sparse ones"
  if device.platform != "cuda":
    return f"it runs on NVIDIA GPUs, not on {device.platform}"
  if problem.dtype not in (jnp.bfloat16, jnp.float16):
    return f"x must be bfloat16 or float16, not {problem.dtype}"
  if 64 % problem.group_size and problem.group_size % 64 and problem.group_size != problem.k:
    return f"group_size={problem.group_size} must divide 64, be a multiple of it, or be the whole column"
  k, n = layout.padded_shape(problem.k, problem.n)
  if max(k * n * problem.bits // 16, problem.m * k, problem.m * n) > MAX_ELEMENTS:
    return f"a {problem.m} x {k} x {n} product has an operand of more than 2^31 elements"
  return None


def _zeros_of_words(zeros, shape):
  """Zero points of [64 n_tiles] columns for each word, [n_tiles, k_tiles * 1024], of even and of odd planes.

  Columns are of (n_tile, warp, odd, lane), words of (n_tile, k_tile, warp, lane) and eight of a thread (layout.py).
  """
  n_tiles, k_tiles = shape[0], shape[1] // layout.TILE_WORDS
  of_odd = jnp.split(zeros.reshape(n_tiles, 4, 2, 8).transpose(0, 1, 3, 2), 2, axis=-1)
  return [
    jnp.broadcast_to(part.reshape(n_tiles, 1, 4, 8, 1), (n_tiles, k_tiles, 4, 8, 8 * 4)).reshape(shape)
    for part in of_odd
  ]


def _dequantize(words, dtype, *, zero, use_asm: bool):
  """Words [n_tiles, k_tiles * 1024], one array or one of each nibble, -> codes - zero, times `decoded_factor`, as
  [64 n_tiles, 64 k_tiles]. `zero` is an int, or an array of a zero point for each of 64 n_tiles columns.

  The result is in the natural order of n and k. A thread that loaded 16 bytes holds its own fragment of the matrix
  instruction (layout.py), so joining the planes and transposing the bits of the index moves no data between threads:
  Triton turns it into a renaming of registers.
  """
  n_tiles, k_tiles = words[0].shape[0], words[0].shape[1] // layout.TILE_WORDS
  plane = nibble_plane if len(words) == 1 else byte_plane
  zero_of_odd = (zero, zero) if isinstance(zero, int) else _zeros_of_words(zero, words[0].shape)
  planes = [plane(*words, p, dtype, zero=zero_of_odd[p % 2], use_asm=use_asm) for p in range(4)]
  low, high = (jnp.stack(planes[2 * half : 2 * half + 2], axis=-1) for half in range(2))
  w = jnp.stack([low, high], axis=-1)  # [..., odd, half]
  sizes = dict(n_tile=n_tiles, k_tile=k_tiles, warp=4, lane=8, quad=4, j=4, e=2, odd=2, half=2)
  axes = (*_WORD_AXES[:-2], "odd", "half")
  w = w.reshape([sizes[axis] for axis in axes]).transpose([axes.index(axis) for axis in _WEIGHT_AXES])
  return w.reshape(n_tiles * layout.TILE, k_tiles * layout.TILE)


def decoded_factor(problem: MatmulProblem) -> float:
  """What `load_weights` has multiplied codes by, a power of two."""
  return (DECODED if problem.bits == 4 else DECODED_BYTE)[problem.dtype]


def subtracts_zeros(problem: MatmulProblem) -> bool:
  """Whether decoding can subtract zero points: it is free in the decoder's fma, but bfloat16's alone has room for them,
  and with codes of 8 bits a fraction would be rounded twice.
  """
  return problem.zeros and problem.bits == 4 and problem.dtype == jnp.bfloat16


def word_rows(qweight):
  """Words as `load_weights` takes them: [n_tiles, words] of 4 bits, [n_tiles, k_tiles, 2, 1024] of 8 bits.

  4 bits: a stream for each 64 columns; 8 bits: tiles of high and of low nibbles take turns in it.
  """
  n_tiles, k_tiles, rows, _ = qweight.shape
  return qweight.reshape(n_tiles, -1) if rows == 32 else qweight.reshape(n_tiles, k_tiles, 2, layout.TILE_WORDS)


def load_weights(w_ref, column, step, zeros=None, *, problem, config, use_asm):
  """Codes of block (column, step) in problem.dtype, [block_n, block_k] in natural order; times `decoded_factor`.

  Less the middle code if the problem has no zeros, or less `zeros`, one for each column, of which `subtracts_zeros`.
  """
  n_tiles, k_tiles = config.block_n // layout.TILE, config.block_k // layout.TILE
  tiles = pl.ds(column * n_tiles, n_tiles)
  if problem.bits == 4:
    words = k_tiles * layout.TILE_WORDS
    blocks = [w_ref.at[tiles, pl.ds(step * words, words)]]
  else:
    blocks = [w_ref.at[tiles, pl.ds(step * k_tiles, k_tiles), pl.ds(nibble, 1)] for nibble in range(2)]
  words = [plt.load(block, eviction_policy="evict_first").reshape(n_tiles, -1) for block in blocks]
  zero = zeros
  if zeros is None:
    zero = 0 if problem.zeros else layout.zero_code(problem.bits)
  return _dequantize(words, problem.dtype, zero=zero, use_asm=use_asm)


def _kernel(x_ref, w_ref, *refs, problem, config, use_asm):
  """y[part, m, n] = sum over a part of k of x[m, k] * s[k // group, n] * (code[k, n] - z[k // group, n]).

  `sum_product` with dense weights; a step decodes four nibble planes, joined to w [block_n, block_k], in registers.
  """
  *group_refs, y_ref = refs  # scales, zeros and bias, those that there are
  bias_ref = group_refs.pop() if len(group_refs) > 1 + problem.zeros else None

  def load(column, i, zeros=None):
    return load_weights(w_ref, column, i, zeros, problem=problem, config=config, use_asm=use_asm)

  sum_product(x_ref, group_refs, bias_ref, y_ref, load, problem=problem, config=config)


def run_of_steps(config: TritonConfig, problem: MatmulProblem) -> tuple[int, int, int]:
  """(steps of a column, blocks of columns, steps of a program)."""
  steps, columns = -(-problem.k // config.block_k), layout.padded_shape(problem.k, problem.n)[1] // config.block_n
  return steps, columns, -(-columns * steps // (config.programs or columns))


def loops_of_columns(config: TritonConfig, problem: MatmulProblem) -> int:
  """How many loops over steps there are, one for each block of columns that a program may have or one for all.

  One after the other they count pointers up, one within a loop over columns computes them at every step, 20 of 316
  instructions: 38.9 and 40.1 us at M=16 of 8192 x 28672. But with 16 rows four programs must fit beside each other,
  which takes 128 registers, and ptxas gives those to two loops only where steps are a power of two and the run even,
  else 167: 57.6 and 40.1 us at M=16 of 6656 x 35328.
  """
  steps, _, run = run_of_steps(config, problem)
  few_registers = steps & (steps - 1) == 0 and run % 2 == 0
  if steps % run == 0 or (config.block_m == 16 and not few_registers):
    return 1
  return -(-run // steps) + 1


def sum_product(x_ref, group_refs, bias_ref, y_ref, load, *, problem, config):
  """y[part, m, n] = sum over a part of k of x[m, k] * s[k // group, n] * (w[k, n] - z[k // group, n]).

  A program sums an equal share of the steps of all columns, which may begin in one block of columns and end in another:

    programs = 4    columns 0   |0 . . . .|1 . . . .|    columns 1   |2 . . . .|3 . . . .|
    programs = 3    columns 0   |0 . . . . . .|1 . .     columns 1   . . . .|2 . . . . . .|

  Of 448 programs on 132 multiprocessors some have four and some three, and all wait for those with four; 512 are even.
  One loop over all steps of a program, which stores where a block ends, takes 5 to 22 % longer: it works out at every
  step in which block it is.
  """
  steps, columns, run = run_of_steps(config, problem)
  row, program = pl.program_id(0), pl.program_id(1)

  def sum_part(**of_part):
    _sum_part(x_ref, group_refs, bias_ref, y_ref, load, problem=problem, config=config, row=row, **of_part)

  if steps % run == 0:
    parts = steps // run
    part = lax.rem(program, parts)
    sum_part(column=lax.div(program, parts), part=part, first=part * run, end=(part + 1) * run)
    return
  begin = program * run
  stop = jnp.minimum(begin + run, columns * steps)

  def of_column(column, _=None):
    first, end = jnp.maximum(begin - column * steps, 0), jnp.minimum(stop - column * steps, steps)
    sum_part(column=column, part=program - lax.div(column * steps, run), first=first, end=end)

  first_column, past_column = lax.div(begin, steps), lax.div(stop + steps - 1, steps)
  loops = loops_of_columns(config, problem)
  if loops == 1:
    lax.fori_loop(first_column, past_column, of_column, None)
  else:
    for column in (first_column + i for i in range(loops)):
      pl.when(column < past_column)(functools.partial(of_column, column))


def _sum_part(x_ref, group_refs, bias_ref, y_ref, load, *, problem, config, row, column, part, first, end):
  """Steps first to end, at most all, of a block of columns. The first part's sums begin with the bias, if there is one.

  One program: block_n columns x block_m rows. A step:

    load    words of block_n x block_k codes and x [block_m, block_k]     (num_stages deep, 16 bytes a thread)
            the scales and zeros of the next step                         (a step ahead, by hand: Triton pipelines
                                                                          only what feeds a dot)
    decode  w [block_n, block_k] = load(column, i), in natural order of n and k, times `decoded_factor`; less the
            zeros, if there are any, times the same: by load(column, i, zeros) in a step of one group, if
            `subtracts_zeros`
    dot     partial [block_n, block_m] = w . x^T    weights on the left: on Hopper the register operand of wgmma, and
                                                    few rows of x cost a narrow instruction instead of padding to 64
    scale   acc += partial * s, in float32: block_m multiplications a column instead of block_k

  The sums, with the bias in them, are divided by `decoded_factor` at the end, outside the loop: exact.
  """
  c, group_size, decoded = config, problem.group_size, decoded_factor(problem)
  m0, n0 = row * c.block_m, column * c.block_n
  # A step inside one group has one scale a column; a step over several groups one dot for each, x masked to its k.
  groups_per_step = max(1, min(c.block_k, problem.k) // group_size)
  last_group = problem.k // group_size - 1
  m, n = m0 + jnp.arange(c.block_m, dtype=jnp.int32), n0 + jnp.arange(c.block_n, dtype=jnp.int32)
  # Where nothing sticks out there is no mask at all, so that loads stay 16 bytes wide.
  m_inside = None if problem.m % c.block_m == 0 else m < problem.m
  n_inside = None if problem.n % c.block_n == 0 else n < problem.n

  def load_groups(i):
    # Beyond the last group (the step after the last) x is zero: any finite scale and zero will do.
    groups = [jnp.minimum(lax.div(i * c.block_k, group_size) + g, last_group) for g in range(groups_per_step)]
    fill = None if n_inside is None else 0.0
    return tuple(
      tuple(plt.load(ref.at[g, pl.ds(n0, c.block_n)], mask=n_inside, other=fill) for ref in group_refs) for g in groups
    )

  def load_x(k0, group):
    k = jnp.arange(c.block_k, dtype=jnp.int32)
    k_inside = [] if problem.k % c.block_k == 0 else [k0 + k < problem.k]
    if groups_per_step > 1:
      k_inside += [k >= group * group_size, k < (group + 1) * group_size]
    masks = [mask[None, :] for mask in k_inside] + ([] if m_inside is None else [m_inside[:, None]])
    index = x_ref.at[pl.ds(m0, c.block_m), pl.ds(k0, c.block_k)]
    if not masks:
      return plt.load(index)
    mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), (c.block_m, c.block_k))
    return plt.load(index, mask=mask, other=0.0)

  def step(i, carry):
    acc, groups = carry
    next_groups = load_groups(i + 1)
    groups = [(scale, *(points.astype(x_ref.dtype) for points in zeros)) for scale, *zeros in groups]
    decoder_subtracts = groups_per_step == 1 and subtracts_zeros(problem)
    weights = load(column, i, groups[0][1]) if decoder_subtracts else load(column, i)
    for group, (scale, *zeros) in enumerate(groups):
      w = weights
      if zeros and not decoder_subtracts:
        w = weights - (zeros[0] * x_ref.dtype.type(decoded))[:, None]
      x = load_x(i * c.block_k, group)
      partial = lax.dot_general(w, x, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32)
      acc += partial * scale.astype(jnp.float32)[:, None]
    return acc, next_groups

  beginning = jnp.zeros((c.block_n, c.block_m), jnp.float32)
  if bias_ref is not None:
    fill = None if n_inside is None else 0.0
    bias = plt.load(bias_ref.at[pl.ds(n0, c.block_n)], mask=n_inside, other=fill).astype(jnp.float32)
    beginning += jnp.where(first == 0, bias * decoded, 0.0)[:, None]
  acc, _ = lax.fori_loop(first, end, step, (beginning, load_groups(first)))
  masks = ([] if m_inside is None else [m_inside[:, None]]) + ([] if n_inside is None else [n_inside[None, :]])
  mask = jnp.broadcast_to(functools.reduce(jnp.logical_and, masks), (c.block_m, c.block_n)) if masks else None
  index = y_ref.at[part, pl.ds(m0, c.block_m), pl.ds(n0, c.block_n)]
  plt.store(index, (acc * (1 / decoded)).T.astype(y_ref.dtype), mask=mask)


# A jit of its own: the layers of a model that are of one shape then share one trace and one lowering of the kernel.
@functools.partial(jax.jit, static_argnames=("config", "interpret"))
def matmul_triton(
  x: Float[Array, "M K"],
  qweight: Int16[Array, "N_tiles K_tiles rows 32"],
  scales: Float[Array, "G N"],
  zeros: Float[Array, "G N"] | None = None,
  bias: Float[Array, " N"] | None = None,
  *,
  config: TritonConfig,
  interpret: bool = False,
) -> Float[Array, "M N"]:
  """y = x @ (scales * (codes - zeros)) + bias, dequantized in registers, summed in float32.

  The same bits at every call.

  Args:
    x: bfloat16 or float16; M at least 1.
    qweight: packed codes of 4 or 8 bits (layout.py).
    scales: G = K / group_size rows, G = 1 for one group per column.
    zeros: zero points, as scales; None is the middle code. codes - zeros is rounded to x's dtype: exact for integers.
    bias: added in float32, before rounding.
    config: block sizes; see TritonConfig.
    interpret: run the kernel's body on the CPU, for tests.

  Raises:
    ValueError: block_k and the group size do not fit each other, or block_n does not divide the padded N.
  """
  (m, k), (groups, n) = x.shape, scales.shape
  bits = qweight.shape[2] // 8
  problem = MatmulProblem(m=m, n=n, k=k, group_size=k // groups, dtype=x.dtype, bits=bits, zeros=zeros is not None)
  kernel = functools.partial(_kernel, problem=problem, config=config, use_asm=not interpret)
  operands = x, word_rows(qweight), *(operand for operand in (scales, zeros, bias) if operand is not None)
  return launch(kernel, operands, problem=problem, config=config, interpret=interpret, name=f"w{bits}a16_triton")


def unfit_reason(config, problem: MatmulProblem) -> str | None:
  """Why blocks of `config`, block_n x block_k, are not of whole tiles and groups of `problem`; None if they are."""
  block_n, block_k, group_size = config.block_n, config.block_k, problem.group_size
  if problem.sparse24 and block_k != problem.tile_k:
    return f"block_k={block_k} must be {problem.tile_k}, the k of a tile"
  if block_k % group_size and group_size % block_k and group_size < problem.k:
    return f"block_k={block_k} and group_size={group_size}: one must divide the other"
  n_padded = layout.padded_shape(problem.k, problem.n)[1]
  if n_padded % block_n:
    return f"block_n={block_n} must divide the padded N={n_padded}"
  return None


def launch(kernel, operands, *, problem: MatmulProblem, config: TritonConfig, interpret: bool, name: str):
  """y [m, n] by a kernel that writes [parts, m, n] with `sum_product`.

  Raises:
    ValueError: config does not fit the problem; see `unfit_reason`.
  """
  if reason := unfit_reason(config, problem):
    raise ValueError(reason)
  m, n, x = problem.m, problem.n, operands[0]
  steps, columns, run = run_of_steps(config, problem)
  # Of each block of columns: the programs from the one that has its first step to the one that has its last.
  parts = np.array([((i + 1) * steps - 1) // run - i * steps // run + 1 for i in range(columns)])
  most = int(parts.max())
  partials = pl.pallas_call(
    kernel,
    out_shape=jax.ShapeDtypeStruct((most, m, n), jnp.float32 if most > 1 else x.dtype),
    grid=(-(-m // config.block_m), -(-columns * steps // run)),
    compiler_params=plt.CompilerParams(num_warps=config.num_warps, num_stages=config.num_stages),
    interpret=interpret,
    name=name,
  )(*operands)
  if most == 1:
    return partials[0]
  if parts.min() < most:
    there = np.arange(most)[:, None] < np.repeat(parts, config.block_n)[:n]
    partials = jnp.where(there[:, None], partials, 0.0)
  # In the order of K, so that the result is the same at every call; XLA fuses it with what follows.
  return partials.sum(0).astype(x.dtype)
