"""Which tokens end a text (EOS), as a ``tokenizer.json`` names them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# names of special tokens that end a text or a turn, without the signs around them
_KNOWN_ENDS = ("/s", "eos", "endoftext", "end_of_text", "eot_id", "im_end", "end_of_turn")


def end_ids(plan: Mapping[str, Any], bos_id: int) -> tuple[int, ...]:
    """BOS, which begins the next text, and what models of others write at an end (EOS).

    Args:
        plan: the JSON of a tokenizer.
        bos_id: the id that starts every document.
    """
    ends = (
        t["id"] for t in plan["added_tokens"] if t["special"] and t["content"].strip("<|>") in _KNOWN_ENDS
    )
    return tuple(dict.fromkeys([bos_id, *ends]))
