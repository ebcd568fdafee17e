"""Five cells of the reshard matrix; ``bench/matrix.py`` runs all of them."""

from __future__ import annotations

import pytest
from harness.cells import TEST_CELLS, Cell, Workshop


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    # Upstream's own reshard, as a reference for the losses, would double the time.
    return Workshop(tmp_path_factory.mktemp("matrix"), online=False)


@pytest.mark.parametrize("cell", [pytest.param(cell, id=cell.name) for cell in TEST_CELLS])
def test_cell(workshop: Workshop, cell: Cell) -> None:
    outcome = workshop.check(cell, upstream=True)
    assert not outcome.problems
    assert outcome.upstream == []
    assert outcome.elements > 800_000
    assert outcome.loss_gaps["same-layout"] < 5e-4
