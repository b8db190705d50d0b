import json
from pathlib import Path

import pytest

from dataset.text import pre_caption, pre_question

GOLDEN = json.loads((Path(__file__).parent / "golden" / "text.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["captions"], ids=lambda case: case["raw"][:20])
def test_captions_match_the_released_clean_up(case):
    assert pre_caption(case["raw"], case["max_words"]) == case["text"]


@pytest.mark.parametrize(
    "case", GOLDEN["questions"], ids=lambda case: f"{case['raw'][:20]}, {case['max_words']}"
)
def test_questions_match_the_released_clean_up(case):
    assert pre_question(case["raw"], case["max_words"]) == case["text"]


def test_caption_is_cut_after_white_space_is_collapsed():
    assert pre_caption("one -- two / three four", 3) == "one two three"


def test_question_counts_repeated_blanks_as_words():
    assert pre_question("one  two three", 3) == "one  two"
