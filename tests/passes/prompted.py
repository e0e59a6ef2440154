"""Decoders with a soft prompt in front."""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from tests.architectures import ARCHITECTURES

PLACES = 3


class Decoder(nn.Module):
    """Attention to a prompt and to what stands before, once for each layer."""

    def __init__(self, layers: int = 1, *, causal: bool = True, width: int = 8, heads: int = 2) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.prompt = nn.Parameter(torch.randn(PLACES, width))
        self.table = nn.Embedding(20, width)
        self.project = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(layers))
        self.back = nn.ModuleList(nn.Linear(width, width) for _ in range(layers))

    def attend(self, x: Tensor, layer: int, mask: Tensor | None = None) -> Tensor:
        shape = (x.shape[0], x.shape[1], self.heads, -1)
        q, k, v = (each.reshape(shape).transpose(1, 2) for each in self.project[layer](x).chunk(3, -1))
        causal = self.causal and mask is None
        seen = nn.functional.scaled_dot_product_attention(q, k, v, mask, is_causal=causal)
        return x + torch.tanh(self.back[layer](seen.transpose(1, 2).reshape(x.shape)))

    def between(self, x: Tensor) -> Tensor:
        """What stands between two layers."""
        return x

    def end(self, x: Tensor) -> Tensor:
        """What is made of the last hidden states."""
        return x[:, PLACES:]

    def start(self, ids: Tensor) -> Tensor:
        """The prompt, and the text."""
        return torch.cat([self.prompt.expand(ids.shape[0], -1, -1), self.table(ids)], 1)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.attend(self.start(ids), 0)
        for layer in range(1, len(self.project)):
            x = self.attend(self.between(x), layer)
        return self.end(x)


class Masked(Decoder):
    """With a mask that is given; `form` says which."""

    def __init__(self, form: str) -> None:
        super().__init__()
        self.form = form

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:  # type: ignore[override]
        x = self.start(ids)
        places = torch.arange(x.shape[1])
        causal = places[:, None] >= places[None]
        if self.form == "unknown":
            return self.end(self.attend(x, 0, nn.functional.pad(mask, (PLACES, 0))[:, None, None] + causal))
        whole = torch.cat([torch.ones(ids.shape[0], PLACES), mask], 1).bool()[:, None, None]
        seen = whole.expand(-1, 1, x.shape[1], -1) if self.form == "padding" else whole & causal
        if self.form == "additive":
            seen = torch.where(seen, 0.0, -torch.inf)  # type: ignore[assignment]
        return self.end(self.attend(x, 0, seen))


class Plain(nn.Module):
    """A language model of transformers with a prompt in front."""

    def __init__(self, model: Any, width: int) -> None:
        super().__init__()
        self.model, self.prompt = model, nn.Parameter(torch.randn(PLACES, width))

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.model.get_input_embeddings()(input_ids)
        whole = torch.cat([self.prompt.expand(x.shape[0], -1, -1), x], 1)
        logits: Tensor = self.model(inputs_embeds=whole, use_cache=False).logits
        return logits[:, PLACES:]


class Tuned(nn.Module):
    """PEFT's prompt tuning; the result has logits at the prompt as well."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        import peft

        options = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=PLACES)
        self.model = peft.get_peft_model(model, options)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        logits: Tensor = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return logits


def language_model(name: str, key_value_heads: int = 4) -> nn.Module:
    """A tiny language model."""
    architecture = ARCHITECTURES[name]
    options = {**architecture.options}
    if "num_key_value_heads" in options:
        options["num_key_value_heads"] = key_value_heads
    return replace(architecture, options=options).build().enlivened().model
