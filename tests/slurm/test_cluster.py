"""The cluster itself: what the other tests take for granted."""

from __future__ import annotations

from harness.slurm_cluster import SlurmCluster


def test_a_job_of_two_nodes_runs_and_orphans_of_a_killed_node_end_with_the_test(
    cluster: SlurmCluster,
) -> None:
    said = cluster.ask("srun", "-N2", "--label", "printenv", "SLURMD_NODENAME")
    assert sorted(said.splitlines()) == ["0: 127.0.0.1", "1: 127.0.0.2"]
    job = int(cluster.ask("sbatch", "--parsable", "--output=/dev/null", "--wrap", "sleep 600"))
    name = cluster.wait_state(job, "RUNNING")["NodeList"]
    cluster.wait(lambda: len(cluster.on_node(name)) > 1, "sleeping process")
    cluster.kill_node(1 + cluster.nodes.index(name))
    assert len(cluster.stepds(name)) == 1
    assert any(process.command[0] == "sleep" for process in cluster.on_node(name))
    cluster.clear()
    assert cluster.on_node(name) == []
    assert cluster.stepds(name) == []
