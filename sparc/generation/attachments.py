"""The files that lie beside a model in an artifact, under the names everybody uses: settings and tokenizer."""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sparc.artifact import Artifact

CONFIG, SETTINGS, GENAI_CONFIG = "config.json", "generation_config.json", "genai_config.json"
TOKENIZER, TOKENIZER_CONFIG, CHAT_TEMPLATE = "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
TOKENIZER_FILES = (TOKENIZER, TOKENIZER_CONFIG, "special_tokens_map.json", CHAT_TEMPLATE)
ATTACHMENTS = frozenset({CONFIG, SETTINGS, GENAI_CONFIG, *TOKENIZER_FILES})


def attached_json(artifact: "Artifact", name: str) -> dict[str, Any]:
    """An attachment's JSON object; where there is none, or it is damaged, an empty one."""
    return json_object(artifact.attachments, name)


def json_object(attachments: Mapping[str, bytes], name: str) -> dict[str, Any]:
    """The same of attachments alone."""
    try:
        found = json.loads(attachments.get(name, b"{}"))
    except (ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}
