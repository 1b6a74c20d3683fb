# SPDX-License-Identifier: Apache-2.0
"""Models to measure: the shapes of well-known ones, with random weights that are made where they are needed."""

import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array

from marlin_jax.bench.operands import random_meta
from marlin_jax.checkpoint.folder import read_json
from marlin_jax.convert import keep_head_and_routers
from marlin_jax.models.config import ModelConfig
from marlin_jax.models.decoder import Decoder
from marlin_jax.models.fuse import fuse
from marlin_jax.models.huggingface_config import config_from_hf
from marlin_jax.nnx import QuantLinear
from marlin_jax.quantized import QuantSpec

# The numbers of the config.json that each model was published with.
SHAPES = {
  "llama-3-8b": ModelConfig(
    vocab_size=128256,
    hidden_size=4096,
    intermediate_size=14336,
    num_layers=32,
    num_heads=32,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
  ),
  "qwen2.5-32b": ModelConfig(
    architecture="Qwen2ForCausalLM",
    vocab_size=152064,
    hidden_size=5120,
    intermediate_size=27648,
    num_layers=64,
    num_heads=40,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=32768,
    rms_norm_eps=1e-6,
    rope_theta=1e6,
    qkv_bias=True,
  ),
  "llama-3-70b": ModelConfig(
    vocab_size=128256,
    hidden_size=8192,
    intermediate_size=28672,
    num_layers=80,
    num_heads=64,
    num_kv_heads=8,
    head_dim=128,
    max_position_embeddings=8192,
    rms_norm_eps=1e-5,
    rope_theta=5e5,
  ),
}


def read_shape(name: str) -> ModelConfig:
  """The config of a name in SHAPES, or of a config.json (or a folder that holds one).

  Raises:
    ValueError: it is neither, or the file holds nonsense.
    NotImplementedError: the config asks for something that the decoder does not do.
  """
  if name in SHAPES:
    return SHAPES[name]
  path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
  if not path.is_file():
    raise ValueError(f"{name!r} is neither a config.json nor one of {', '.join(SHAPES)}")
  return config_from_hf(read_json(path))


def abstract_model(config: ModelConfig, spec: QuantSpec | None, *, quantize_head: bool = False) -> Decoder:
  """A fused bfloat16 Decoder of shapes without values, its dense layers quantized by `spec` (None: none of them).

  Raises:
    NotImplementedError: the model has experts.
  """
  if config.moe is not None:
    # What a step must read depends on how many experts the tokens of a batch choose, and random weights do not tell.
    raise NotImplementedError("bench is not implemented for models with experts: random weights choose them at random")

  def build() -> Decoder:
    model = Decoder(config, rngs=nnx.Rngs(0))
    if spec is None:
      return fuse(model)
    for path, parent in list(nnx.iter_modules(model)):
      for name, child in list(nnx.iter_children(parent)):
        if isinstance(child, nnx.Linear) and (quantize_head or keep_head_and_routers((*path, name), child)):
          layer = QuantLinear(
            child.in_features,
            child.out_features,
            use_bias=child.use_bias,
            dtype=child.dtype,
            param_dtype=child.param_dtype,
            spec=spec,
            rngs=nnx.Rngs(0),
          )
          setattr(parent, name, layer)
    return fuse(model)

  return nnx.eval_shape(build)


def random_model(config: ModelConfig, spec: QuantSpec | None, *, quantize_head: bool = False) -> Decoder:
  """A Decoder with random weights of the size that training starts from; packed ones are drawn packed.

  So a model fits whose float form would not, and no tensor is ever quantized.
  """
  graphdef, state = nnx.split(abstract_model(config, spec, quantize_head=quantize_head))
  filled = []
  for i, (path, variable) in enumerate(nnx.to_flat_state(state)):
    leaf = str(path[-1])
    shape, dtype = tuple(variable.shape), jnp.dtype(variable.dtype)
    filled.append((path, variable.replace(_random_leaf(i, leaf, shape, dtype))))
  return nnx.merge(graphdef, nnx.from_flat_state(filled))


def nbytes(model: Decoder) -> int:
  """Bytes of all weights, abstract or not."""
  return sum(math.prod(leaf.shape) * jnp.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(nnx.state(model)))


@functools.partial(jax.jit, static_argnames=("leaf", "shape", "dtype"))
def _random_leaf(seed: int | Array, leaf: str, shape: tuple[int, ...], dtype: jnp.dtype) -> Array:
  key = jax.random.key(seed)
  if leaf == "meta":
    return random_meta(key, shape)
  if leaf == "qweight":
    return jax.lax.bitcast_convert_type(jax.random.bits(key, shape, jnp.uint16), jnp.int16)
  if leaf == "scales":
    # Codes are uniform, 4.6 their standard deviation; 1 / sqrt(4096) that of the weights.
    return jax.random.uniform(key, shape, jnp.float32, 0.002, 0.005).astype(dtype)
  if leaf in ("kernel", "embedding"):
    return (jax.random.normal(key, shape, jnp.float32) / 64).astype(dtype)
  return jnp.full(shape, {"scale": 1, "bias": 0, "zeros": 8}[leaf], dtype)
