# SPDX-License-Identifier: Apache-2.0
"""The dense layers that are measured and tuned, (K, N) of each: named sets, and those of a model."""

from marlin_jax.models.config import ModelConfig

Shape = tuple[int, int]

# A large MLP and the layers of a 7B model: the shapes for which every rival kernel was measured.
SHAPES: tuple[Shape, ...] = ((8192, 28672), (4096, 12288), (14336, 4096), (4096, 4096))

# Attention's fused q, k and v, its output, the MLP's fused gate and up, and down.
NAMED_SHAPES: dict[str, tuple[Shape, ...]] = {
  "four": SHAPES,
  "llama-2-7b": ((4096, 12288), (4096, 4096), (4096, 22016), (11008, 4096)),
  "llama-2-13b": ((5120, 15360), (5120, 5120), (5120, 27648), (13824, 5120)),
  # As in the benchmark of the MARLIN paper, whose MLPs are 256 narrower than the models'.
  "paper-7b": ((4096, 12288), (4096, 4096), (4096, 21504), (10752, 4096)),
  "paper-13b": ((5120, 15360), (5120, 5120), (5120, 27136), (13568, 5120)),
  "paper-33b": ((6656, 19968), (6656, 6656), (6656, 35328), (17664, 6656)),
  "paper-65b": ((8192, 24576), (8192, 8192), (8192, 43520), (21760, 8192)),
  "paper-falcon-180b": ((14848, 75264), (74240, 14848)),
}


def shapes_of_model(config: ModelConfig) -> tuple[Shape, ...]:
  """The (K, N) of every dense layer but the head, each once: q, k, v, gate and up one by one and fused, the others.

  Of experts, too; not of their routers, which stay float.
  """
  hidden, moe = config.hidden_size, config.moe
  inners = [] if moe is None else [moe.moe_intermediate_size]
  if moe is None or len(moe.layers) < config.num_layers:
    inners.append(config.intermediate_size)
  q, kv = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
  shapes = [(hidden, q + 2 * kv), (hidden, q), (hidden, kv), (q, hidden)]
  for inner in inners:
    shapes += [(hidden, 2 * inner), (hidden, inner), (inner, hidden)]
  return tuple(dict.fromkeys(shapes))


def parse_shapes(text: str) -> tuple[Shape, ...]:
  """ "8192x28672" or the name of a set.

  Raises:
    ValueError: it is neither.
  """
  if text in NAMED_SHAPES:
    return NAMED_SHAPES[text]
  k, x, n = text.partition("x")
  if not (x and k.isdecimal() and n.isdecimal() and int(k) and int(n)):
    raise ValueError(f"shape {text!r} must be KxN, as 4096x12288, or one of {', '.join(NAMED_SHAPES)}")
  return ((int(k), int(n)),)
