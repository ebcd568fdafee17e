"""One cluster for all tests of a worker, idle again before each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from harness.corpus import model_argv
from harness.slurm_cluster import SlurmCluster, owned_cluster, why_not
from harness.slurm_job import SlurmRun, write_recipe

NewRun = Callable[..., SlurmRun]


@pytest.fixture(scope="session")
def cluster_of_the_worker() -> Iterator[SlurmCluster]:
    if reason := why_not():
        pytest.skip(reason)
    with owned_cluster(nodes=3) as cluster:
        yield cluster


@pytest.fixture
def cluster(cluster_of_the_worker: SlurmCluster) -> Iterator[SlurmCluster]:
    """Three idle nodes; whatever a test leaves on them is ended."""
    yield cluster_of_the_worker
    cluster_of_the_worker.clear()


@pytest.fixture
def new_run(cluster: SlurmCluster, corpus: Path, tmp_path: Path) -> NewRun:
    """A run of the tests' small model on two nodes: ``(flagscale={}, **Megatron arguments)``."""

    def new_run(
        flagscale: dict[str, object] | None = None, nodes: int = 2, **arguments: object
    ) -> SlurmRun:
        argv = model_argv(corpus, **{"save_interval": 1000, **arguments})
        keys = {"health_check": "none", **(flagscale or {})}
        recipe = write_recipe(tmp_path / "small.yaml", argv, nodes=nodes, nproc=1, **keys)
        return SlurmRun(cluster, recipe, tmp_path / "run")

    return new_run
