"""What ships with the package: exit heads of the embedded model and the demo's prompts."""

import json
from pathlib import Path

ASSETS = Path(__file__).parent
DEMO_PROMPTS = ASSETS / "demo_prompts.jsonl"
SMOLLM2_HEADS = ASSETS / "smollm2-135m-instruct"


def shipped_heads(model_fingerprint: str) -> Path | None:
    """Return the folder of the shipped heads trained on the model with this fingerprint, or None."""
    for config in sorted(ASSETS.glob("*/config.json")):
        if json.loads(config.read_text(encoding="utf-8")).get("fingerprint") == model_fingerprint:
            return config.parent
    return None
