"""The small CLIP tokenizer of tests/golden/tokenizer, written out as checkpoints hold it. Torch-free."""

import json
from pathlib import Path

GOLDEN = Path(__file__).parent / "golden" / "tokenizer"
KINDS = ("sd1", "sd2", "sdxl", "saved")  # SD 1.5, SD 2.1, SDXL's second tokenizer, saved without a special_tokens_map.json


def write_kind(folder: Path, kind: str) -> Path:
    """vocab.json, merges.txt, tokenizer_config.json and special_tokens_map.json in the new `folder`."""
    folder.mkdir()
    for name in ("vocab.json", "merges.txt"):
        (folder / name).write_bytes((GOLDEN / name).read_bytes())
    for name, document in json.loads((GOLDEN / "kinds.json").read_text("utf-8"))[kind].items():
        (folder / f"{name}.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


def golden_ids() -> dict:
    """`prompts`, and for each of `kinds` their ids by transformers: `whole` without start and end, `padded` to 77."""
    return json.loads((GOLDEN / "ids.json").read_text("utf-8"))
