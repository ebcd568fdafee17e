"""Whatever is done to a run's files, what reads them is right, or says that it is not.

The named subset of bench/fuzz_inspect.py.
"""

from __future__ import annotations

import random

import pytest
from harness.inspect_damage import KINDS, Truth, damaged, meet
from harness.inspect_run import write_run


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> Truth:
    return Truth.of(write_run(tmp_path_factory.mktemp("run")))


@pytest.mark.parametrize("kind", KINDS)
def test_only_errors_of_our_own_and_no_false_exact(truth: Truth, kind: str) -> None:
    outcomes = set()
    for number in range(60):
        rng = random.Random(f"{kind} {number}")
        with damaged(truth, kind, rng):
            outcomes.add(meet(truth, kind, rng))
    # A description that fits no more is passed over, and the order computed anew.
    assert len(outcomes) > 1 or kind == "description"
