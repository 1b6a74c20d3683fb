# SPDX-License-Identifier: Apache-2.0
"""What stands behind the attention in a decoder layer: a gated MLP, or a mixture of them."""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from marlin_jax.models.config import ModelConfig, MoEConfig
from marlin_jax.models.residual import add_norm, onto, read
from pallas_kernels import DeferredNorm, resolved


class MLP(nnx.Module):
  """down(silu(gate(x)) * up(x)): SwiGLU, "GLU Variants Improve Transformer", section 2 (arXiv 2002.05202).

  After `fuse` the projections gate and up are one: `gate_up_proj`, or `swiglu`, which does all but the last product.
  """

  def __init__(self, config: ModelConfig, intermediate_size: int, *, dtype, param_dtype, rngs: nnx.Rngs):
    options = {"use_bias": config.mlp_bias, "dtype": dtype, "param_dtype": param_dtype, "rngs": rngs}
    self.gate_proj = nnx.Linear(config.hidden_size, intermediate_size, **options)
    self.up_proj = nnx.Linear(config.hidden_size, intermediate_size, **options)
    self.down_proj = nnx.Linear(intermediate_size, config.hidden_size, **options)

  def __call__(self, x: Float[Array, "*B E"]) -> Float[Array, "*B E"]:
    return self.down_proj(self.gated(x))

  def onto(
    self,
    residual: Float[Array, "B T E"],
    x: Float[Array, "B T E"] | DeferredNorm,
    norm: nnx.RMSNorm | None,
    *,
    fused: bool,
  ) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"] | DeferredNorm | None]:
    """(s, norm(s)) with s = residual + self(x), as of `residual.onto`."""
    return onto(self.down_proj, self.gated(x), residual, norm, fused=fused)

  def gated(self, x: Float[Array, "*B E"] | DeferredNorm) -> Float[Array, "*B I"]:
    """silu(gate(x)) * up(x), which `down_proj` reads."""
    if hasattr(self, "swiglu"):
      return self.swiglu(x)
    if hasattr(self, "gate_up_proj"):
      gate, up = jnp.split(read(self.gate_up_proj, x), 2, axis=-1)
    else:
      gate, up = read(self.gate_proj, x), read(self.up_proj, x)
    return jax.nn.silu(gate) * up


class MoE(nnx.Module):
  """sum_e p_e(x) expert_e(x) over the experts e that the router chooses for a token, a few of many.

  p(x) = softmax(router(x)) over all experts, in float32; the `num_experts_per_tok` largest are taken and, with
  `norm_topk_prob`, divided by their sum. "Outrageously Large Neural Networks", section 2 (arXiv 1701.06538), without
  its noise, as in Qwen3-MoE (arXiv 2505.09388).

  `experts` is an MLP whose arrays have a leading axis, one entry an expert, and a scan runs over it: the program is as
  large for 128 experts as for one, and the products in it are those of any other layer, quantized or not. It runs over
  no more experts than the tokens can have chosen, the chosen ones first, and skips one that no token chose: of the
  weights only those of chosen experts are read, each copied out of the stack first.

  What the form costs: a chosen expert computes all tokens, also those that did not choose it. That is free as long as
  launches and reading weights are the limit, as in decoding; a long prompt pays up to num_experts / num_experts_per_tok
  times the arithmetic. Products over the tokens of each expert alone need a grouped kernel (docs/architecture.md).
  """

  def __init__(self, config: ModelConfig, moe: MoEConfig, *, dtype, param_dtype, rngs: nnx.Rngs):
    dtypes = {"dtype": dtype, "param_dtype": param_dtype}

    @nnx.split_rngs(splits=moe.num_experts)
    @nnx.vmap
    def experts(rngs: nnx.Rngs) -> MLP:
      return MLP(config, moe.moe_intermediate_size, **dtypes, rngs=rngs)

    # float32 out of the product: rounded, the scores of two experts may tie.
    self.router = nnx.Linear(
      config.hidden_size,
      moe.num_experts,
      use_bias=False,
      preferred_element_type=jnp.float32,
      **dtypes,
      rngs=rngs,
    )
    self.experts = experts(rngs)
    self.moe = moe

  def route(self, x: Float[Array, "T E"]) -> tuple[Int[Array, "T k"], Float[Array, "T k"]]:
    """The experts of each token, the most probable first, and what their outputs are multiplied with, in x's dtype."""
    probabilities = jax.nn.softmax(self.router(x).astype(jnp.float32), axis=-1)
    weights, experts = jax.lax.top_k(probabilities, self.moe.num_experts_per_tok)
    if self.moe.norm_topk_prob:
      weights /= weights.sum(axis=-1, keepdims=True)
    return experts, weights.astype(x.dtype)

  def onto(
    self,
    residual: Float[Array, "B T E"],
    x: Float[Array, "B T E"] | DeferredNorm,
    norm: nnx.RMSNorm | None,
    *,
    fused: bool,
  ) -> tuple[Float[Array, "B T E"], Float[Array, "B T E"] | None]:
    """(s, norm(s)) with s = residual + self(x), as of `residual.add_norm`: the router and all experts read x."""
    return add_norm(residual, self(resolved(x)), norm, fused=fused)

  def __call__(self, x: Float[Array, "B T E"]) -> Float[Array, "B T E"]:
    tokens = x.reshape(-1, x.shape[-1])
    chosen, weights = self.route(tokens)
    shape = (self.moe.num_experts, len(tokens))
    weight_of = jnp.zeros(shape, x.dtype).at[chosen, jnp.arange(len(tokens))[:, None]].set(weights)
    is_chosen = jnp.zeros(self.moe.num_experts, bool).at[chosen].set(True)
    graphdef, stack = nnx.split(self.experts)

    def add(total: Float[Array, "T E"], expert: Int[Array, ""]) -> tuple[Float[Array, "T E"], None]:
      def add_chosen(total: Float[Array, "T E"]) -> Float[Array, "T E"]:
        # The slice is taken in here, not by the scan: that would read the experts that are skipped, too.
        mlp = nnx.merge(graphdef, jax.tree.map(lambda array: array[expert], stack))
        weight = weight_of[expert][:, None]
        # A token that did not choose the expert gets nothing of it, not even a NaN from an overflow.
        return total + jnp.where(weight != 0, weight * mlp(tokens), 0).astype(jnp.float32)

      if len(tokens) == 1:
        return add_chosen(total), None  # all candidates are chosen, and on a GPU a condition waits for the host
      return jax.lax.cond(is_chosen[expert], add_chosen, lambda total: total, total), None

    candidates = jnp.argsort(~is_chosen)[: min(self.moe.num_experts, chosen.size)]
    total, _ = jax.lax.scan(add, jnp.zeros(tokens.shape, jnp.float32), candidates)
    return total.astype(x.dtype).reshape(x.shape)
