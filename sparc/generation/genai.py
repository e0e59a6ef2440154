"""The settings file of onnxruntime-genai, with which it loads an artifact's folder as it is."""

from typing import TYPE_CHECKING, Any

import torch

from sparc import codes
from sparc.cache import LOGITS, MASK, POSITIONS, TOKENS, Cache
from sparc.diag import LoweringError
from sparc.generation.artifact import cached_entry, vocabulary
from sparc.generation.attachments import CONFIG, GENAI_CONFIG, SETTINGS, attached_json
from sparc.program import Entry
from sparc.serialize import schema

if TYPE_CHECKING:
    from sparc.artifact import Artifact

_PAST, _PRESENT = "past_key_values.%d.{}", "present.%d.{}"


def attach_genai(artifact: "Artifact") -> None:
    """Make an artifact's folder one that onnxruntime-genai loads as it is; call it before `save`.

    That runtime makes room for the logits before it runs, so the model states that they have one place.

    Raises:
        ArtifactError: SPARC513 when it does not generate.
        LoweringError: SPARC509 when its target is not ONNX, or the model has an encoder.
    """
    artifact.attachments[GENAI_CONFIG] = genai_config(artifact)
    artifact.emission.declare_one_place(cached_entry(artifact)[0])  # type: ignore[attr-defined]


def genai_config(artifact: "Artifact") -> bytes:
    """What `genai_config.json` must say about an artifact.

    Args:
        artifact: compiled for an onnx target with `task="text-generation"`.

    Raises:
        ArtifactError: SPARC513 when it does not generate.
        LoweringError: SPARC509 when its target is not ONNX, the model has an encoder, or its layers have caches of
            different shapes.
    """
    if not artifact.target.startswith("onnx"):
        raise LoweringError(codes.NOT_EXPORTABLE, f"target {artifact.target!r} makes no ONNX model")
    name, entry = cached_entry(artifact)
    assert entry.cache is not None
    if entry.cache.source:
        raise LoweringError(codes.NOT_EXPORTABLE, "onnxruntime-genai takes no encoder-decoders of this form")
    given = {**attached_json(artifact, CONFIG), **attached_json(artifact, SETTINGS)}
    shares = getattr(artifact.emission, "shares_cache", None)
    heads, size = _cache_shape(entry, entry.cache)
    end = given.get("eos_token_id")
    described = {
        "model": {
            "bos_token_id": given.get("bos_token_id"),
            "eos_token_id": end,
            "pad_token_id": _pad(given.get("pad_token_id"), end),
            "context_length": entry.cache.length,
            "vocab_size": vocabulary(entry),
            "type": "decoder",
            "decoder": {
                "filename": artifact.emission.file_name(name),  # type: ignore[attr-defined]
                "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
                "head_size": size,
                "hidden_size": given.get("hidden_size", heads * size),
                "num_attention_heads": _query_heads(entry) or given.get("num_attention_heads", heads),
                "num_key_value_heads": heads,
                "num_hidden_layers": len(entry.cache.slots) // 2,
                "inputs": {
                    **{each: each for each in (TOKENS, MASK, POSITIONS) if each in entry.signature.input_names},
                    "past_key_names": _PAST.format("key"),
                    "past_value_names": _PAST.format("value"),
                },
                "outputs": {
                    "logits": LOGITS,
                    "present_key_names": _PRESENT.format("key"),
                    "present_value_names": _PRESENT.format("value"),
                },
            },
        },
        "search": {
            "max_length": entry.cache.length,
            "past_present_share_buffer": bool(shares is not None and shares(name)),
            "do_sample": bool(given.get("do_sample", False)),
            "temperature": float(given.get("temperature") or 1.0),
            "top_k": int(given.get("top_k") or 50),
            "top_p": float(given.get("top_p") or 1.0),
        },
    }
    return schema.to_json(_without_nothing(described))


def _cache_shape(entry: Entry, cache: Cache) -> tuple[int, int]:
    """How many heads of keys and values each layer has, and their size: one pair for the whole model."""
    given = dict(zip(entry.signature.input_names, entry.placeholders, strict=True))
    shapes = [given[slot.input].meta["val"].shape for slot in cache.slots]
    if len({(shape[1], shape[3]) for shape in shapes}) > 1:
        what, why = "onnxruntime-genai wants equal heads in all layers", "some were pruned more than others"
        raise LoweringError(codes.NOT_EXPORTABLE, what, why=why, hint='prune_units(ranking="group")')
    return shapes[0][1], shapes[0][3]


def _query_heads(entry: Entry) -> int:
    """How many heads of queries each layer has; 0 when no attention says."""
    attention = torch.ops.aten.scaled_dot_product_attention.default
    nodes = entry.graph.find_nodes(op="call_function", target=attention)
    return int(nodes[0].args[0].meta["val"].shape[-3]) if nodes else 0


def _pad(pad: Any, end: Any) -> Any:
    if pad is not None:
        return pad
    return end[0] if isinstance(end, list) and end else end


def _without_nothing(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    return {key: _without_nothing(each) for key, each in value.items() if each is not None}
