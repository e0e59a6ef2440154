"""A function-equal twin of SmolLM2 whose weights lie on no 4-bit grid.

The original was stored in Q4_1, so a 4-bit encoding that happens to use the same blocks rounds it without loss. The
twin scales the input columns of the linear layers by factors within 10% of one and divides what feeds them by the same:

    q, k, v (one factor a column) / the gain of the norm before attention
    gate, up (one factor a column) / the gain of the norm before the MLP
    o (its columns repeat the value head that they read) / the rows of v
    down / the rows of up

The embedding is left alone: it is tied with the head, and the residual stream between them has no gain of its own.
"""

from typing import Any

import torch
from torch import Tensor, nn

from examples.models.smollm2 import FullSequence, compile_arguments, load, load_tokenizer

SEED = 0
_SPREAD = 0.1


def load_twin(seed: int = SEED) -> FullSequence:
    """Return a float32 model equal to `examples.models.smollm2.load` in function, with other weights."""
    return scale_columns(load(), seed)


def smollm2_twin() -> dict[str, Any]:
    """Return compile's arguments for the twin (see `examples.models.smollm2.smollm2`)."""
    return compile_arguments(load_twin(), load_tokenizer())


@torch.no_grad()
def scale_columns(model: FullSequence, seed: int = SEED) -> FullSequence:
    """Scale the linear layers' input columns in place and return the model; products are taken in float64."""
    generator = torch.Generator().manual_seed(seed)
    config = model.model.config
    repeats = config.num_attention_heads // config.num_key_value_heads
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        for norm, readers in (
            (layer.input_layernorm, (attention.q_proj, attention.k_proj, attention.v_proj)),
            (layer.post_attention_layernorm, (mlp.gate_proj, mlp.up_proj)),
        ):
            factors = column_factors(norm.weight.numel(), generator)
            _multiply(norm, 1 / factors)
            for reader in readers:
                _multiply(reader, factors)
        factors = column_factors(attention.v_proj.out_features, generator)
        _multiply(attention.v_proj, 1 / factors[:, None])
        heads = factors.reshape(config.num_key_value_heads, 1, -1).expand(-1, repeats, -1)
        _multiply(attention.o_proj, heads.reshape(-1))
        factors = column_factors(mlp.up_proj.out_features, generator)
        _multiply(mlp.up_proj, 1 / factors[:, None])
        _multiply(mlp.down_proj, factors)
    return model


def column_factors(count: int, generator: torch.Generator) -> Tensor:
    """Draw float64 [count] uniformly from [0.9, 1.1]."""
    return 1 + _SPREAD * (2 * torch.rand(count, generator=generator, dtype=torch.float64) - 1)


def _multiply(module: nn.Module, factors: Tensor) -> None:
    weight = module.get_parameter("weight")
    weight.copy_(weight.double() * factors)
