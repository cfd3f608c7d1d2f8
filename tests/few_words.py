# SPDX-License-Identifier: Apache-2.0
"""The tiny models with a thousand words, where training and files are the matter and words are not.

Of their own 49408 tokens the embeddings are four fifths of all weights, which every step moves and every checkpoint
writes and hashes. A module has it by ``pytestmark = pytest.mark.usefixtures("few_words")``, or in its conftest.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from torch import Tensor

from drseg_core.models import clip

WORDS = 1024


class FewWords:
    """Tokens as they are, by the rest of a division; the end token stays the highest, and padding zero."""

    def __init__(self) -> None:
        self._all = clip._tokenizer()

    def encode(self, text: str) -> list[int]:
        return self._all.encode(text)

    def __call__(self, prompts: list[str], length: int) -> Tensor:
        tokens = self._all(prompts, length)
        few = 1 + tokens % (WORDS - 3)
        few[tokens == 0] = 0
        few[tokens == self._all.sot_token_id] = WORDS - 2
        few[tokens == self._all.eot_token_id] = WORDS - 1
        return few


@pytest.fixture(scope="module")
def few_words() -> Iterator[None]:
    words: Any = FewWords()
    with pytest.MonkeyPatch.context() as patch:
        for architecture in clip.ARCHITECTURES.values():
            patch.setitem(architecture["text_cfg"], "vocab_size", WORDS)
        patch.setattr(clip, "_tokenizer", lambda: words)
        yield
