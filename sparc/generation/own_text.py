"""What a language model writes itself: data to calibrate on where the user gave none."""

from typing import Any

import torch
from torch import Tensor, nn

from sparc.generation.decoder import context_length, run_model

_SEQUENCES, _LENGTH, _AT_ONCE = 8, 64, 2


def own_text(model: nn.Module, seed: int = 0) -> list[Tensor]:
    """Tokens that a causal language model draws from its own distribution, each sequence behind a random first token.

    Random tokens are like no text: what the model computes on them says little about which columns and layers matter.
    After LLM-QAT (Liu et al. 2023, section 3.1), but drawn from the first token on.

    Args:
        model: of transformers, with a `DynamicCache`.
        seed: of the random numbers.

    Returns:
        int64 tokens, each `[2, 64]`, shorter where the model knows fewer positions.

    Raises:
        CaptureError: SPARC112 when the model does not run.
    """
    from transformers import DynamicCache

    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    vocabulary = int(config.get_text_config(decoder=True).vocab_size)
    tokens = torch.randint(vocabulary, (_SEQUENCES, 1), generator=generator)
    cache = DynamicCache()
    for _ in range(min(_LENGTH, context_length(config)) - 1):
        mask = torch.ones_like(tokens)
        result = run_model(model, input_ids=tokens[:, -1:], attention_mask=mask, past_key_values=cache, use_cache=True)
        chances = result.logits[:, -1].float().nan_to_num().softmax(-1).cpu()
        tokens = torch.cat([tokens, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return list(tokens.split(_AT_ONCE))
