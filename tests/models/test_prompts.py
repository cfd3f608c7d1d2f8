# SPDX-License-Identifier: Apache-2.0
from __future__ import annotations

import pytest

from drseg_core.models.prompts import class_prompt, class_prompts


def test_template_and_synonyms() -> None:
    assert class_prompt("bare soil") == "A photo of a bare soil in the scene"
    assert class_prompt("car, automobile, vehicle") == "A photo of a car in the scene"
    assert class_prompt("Clutter/background") == "A photo of a Clutter/background in the scene"
    # a comma without a space belongs to the name
    assert class_prompt("a,b") == "A photo of a a,b in the scene"
    # braces in a name are text, not a field
    assert class_prompt("{0}", "the {}") == "the {0}"
    assert class_prompts(["a", "b, c"], "{}") == ["a", "b"]


def test_bad_names() -> None:
    for name in ("", "  ", ", car"):
        with pytest.raises(ValueError, match="name is empty"):
            class_prompt(name)
    for template in ("no field", "{} and {}"):
        with pytest.raises(ValueError, match="template is not usable"):
            class_prompt("car", template)
    with pytest.raises(TypeError, match="got the text"):
        class_prompts("car")
