"""The prompts of a detailer's masks: parts for one mask each, blanks and words that stand for the main prompt.

Source: pipelines.md §d.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

SEPARATOR = re.compile(r"\s*\[SEP\]\s*")
MAIN = "[PROMPT]"
SKIP = "[SKIP]"


def prompts_of(text: str, main_prompts: Sequence[str], index: int, default: str) -> tuple[str, ...]:
    """One prompt for each mask, the last for all that follow.

    Args:
        text: parts between ``[SEP]``. An empty part is the main prompt, which also takes the place of ``[PROMPT]``.
        main_prompts: of all pictures; that of ``index`` counts, around and around.
        default: the main prompt where there are none.
    """
    main = main_prompts[index % len(main_prompts)] if main_prompts else default
    return tuple(part.replace(MAIN, main) if part else main for part in SEPARATOR.split(text))


def is_skipped(prompt: str) -> bool:
    """Whether a mask with this prompt is left as it is."""
    return prompt.strip() == SKIP
