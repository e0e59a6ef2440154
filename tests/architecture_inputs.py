"""Example inputs of the tiny models in `architectures.py`, from their configurations."""

from typing import Any

import torch
from torch import Tensor

TWO = {0: "batch", 1: "seq"}


def _ids(batch: int = 2, length: int = 7) -> Tensor:
    return torch.randint(3, 90, (batch, length), generator=torch.Generator().manual_seed(1))


def _padded(ids: Tensor) -> Tensor:
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    return mask


def text_inputs(config: Any) -> Any:
    """Token ids and a padding mask."""
    ids = _ids()
    return {"input_ids": ids, "attention_mask": _padded(ids)}, {"input_ids": TWO, "attention_mask": TWO}


def causal_inputs(config: Any) -> Any:
    """Token ids; no cache."""
    return {"input_ids": _ids(), "use_cache": False}, {"input_ids": TWO}


def plain_inputs(config: Any) -> Any:
    """Token ids only."""
    return {"input_ids": _ids()}, {"input_ids": TWO}


def batch_inputs(config: Any) -> Any:
    """Token ids of a fixed length: the model walks over them in Python."""
    return {"input_ids": _ids(), "use_cache": False}, {"input_ids": {0: "batch"}}


def pair_inputs(config: Any) -> Any:
    """Token ids for the encoder and the decoder."""
    inputs = {"input_ids": _ids(), "decoder_input_ids": _ids(length=5), "use_cache": False}
    return inputs, {"input_ids": {0: "batch", 1: "source"}, "decoder_input_ids": {0: "batch", 1: "target"}}


def image_inputs(config: Any) -> Any:
    """Images `[batch, 3, size, size]`."""
    size = getattr(config, "image_size", None) or 32
    size = size if isinstance(size, int) else size[0]
    pixels = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    return {"pixel_values": pixels}, {"pixel_values": {0: "batch"}}


def wave_inputs(config: Any) -> Any:
    """Sound `[batch, samples]`."""
    wave = torch.randn(2, 1600, generator=torch.Generator().manual_seed(1))
    return {"input_values": wave}, {"input_values": {0: "batch"}}


def whisper_inputs(config: Any) -> Any:
    """Log-mel features for the encoder, token ids for the decoder."""
    features = torch.randn(
        2, config.num_mel_bins, 2 * config.max_source_positions, generator=torch.Generator().manual_seed(1)
    )
    inputs = {"input_features": features, "decoder_input_ids": _ids(length=5), "use_cache": False}
    return inputs, {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "target"}}


def speech_inputs(config: Any) -> Any:
    """Features `[batch, time, bins]` for the encoder, token ids for the decoder."""
    features = torch.randn(2, 32, config.input_feat_per_channel, generator=torch.Generator().manual_seed(1))
    inputs = {"input_features": features, "decoder_input_ids": _ids(length=5), "use_cache": False}
    return inputs, {"input_features": {0: "batch"}, "decoder_input_ids": {0: "batch", 1: "target"}}


def spectrogram_inputs(config: Any) -> Any:
    """Spectrograms `[batch, time, bins]`."""
    values = torch.randn(2, config.max_length, config.num_mel_bins, generator=torch.Generator().manual_seed(1))
    return {"input_values": values}, {"input_values": {0: "batch"}}


def clip_inputs(config: Any) -> Any:
    """Texts and images."""
    text, text_dynamic = text_inputs(config)
    images, _ = image_inputs(config.vision_config)
    return {**text, **images}, {**text_dynamic, "pixel_values": {0: "images"}}


def character_inputs(config: Any) -> Any:
    """Characters of a fixed number: chunks and buckets divide it."""
    return {"input_ids": _ids(length=16)}, {"input_ids": {0: "batch"}}


def video_inputs(config: Any) -> Any:
    """Frames `[batch, frames, 3, size, size]`."""
    shape = (2, config.num_frames, 3, config.image_size, config.image_size)
    return {"pixel_values": torch.randn(shape, generator=torch.Generator().manual_seed(1))}, {
        "pixel_values": {0: "batch"}
    }


def series_inputs(config: Any) -> Any:
    """Series `[batch, time, channels]`."""
    shape = (2, config.context_length, config.num_input_channels)
    return {"past_values": torch.randn(shape, generator=torch.Generator().manual_seed(1))}, {
        "past_values": {0: "batch"}
    }


def sound_inputs(config: Any) -> Any:
    """Sound `[batch, channel, samples]`."""
    wave, dynamic = wave_inputs(config)
    return {"input_values": wave["input_values"][:, None]}, dynamic


def moonshine_inputs(config: Any) -> Any:
    """Sound for the encoder, token ids for the decoder."""
    wave, dynamic = wave_inputs(config)
    inputs = {**wave, "decoder_input_ids": _ids(length=5), "use_cache": False}
    return inputs, {**dynamic, "decoder_input_ids": {0: "batch", 1: "target"}}


def vilt_inputs(config: Any) -> Any:
    """One text for each image."""
    text, dynamic = text_inputs(config)
    images, more = image_inputs(config)
    return {**text, **images}, {**dynamic, **more}
