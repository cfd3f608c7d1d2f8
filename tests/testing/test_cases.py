# SPDX-License-Identifier: Apache-2.0
"""The list of sizes: what is measured has the hidden width that PDGR has by default, or says so in its name."""

from __future__ import annotations

import dataclasses
import inspect

from drseg_core.nn import PDGR
from drseg_core.testing import CASES

LARGE = {case.name: case for case in CASES if case.large}


def test_names_are_of_one_case_each():
    assert len({case.name for case in CASES}) == len(CASES)
    assert len({dataclasses.replace(case, name="") for case in CASES}) == len(CASES)


def test_the_hidden_width_is_that_of_pdgr_or_in_the_name():
    default = inspect.signature(PDGR).parameters["edge_hidden"].default
    wide = [name for name in LARGE if name.endswith("_e256")]
    assert "paper_vitl_24x24_e256" in wide
    assert {LARGE[name].hidden for name in LARGE if name not in wide} == {default}
    for name in wide:
        plain = LARGE[name.removesuffix("_e256")]
        assert LARGE[name] == dataclasses.replace(plain, name=name, hidden=256)
