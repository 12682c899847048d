"""A Ray cluster of two nodes on the loopback interface: `python tests/sweep/two_nodes.py`.

Prints its address once both nodes are there, ends with its standard input. A line "remove" takes the second
node away, as a machine that loses its power.
"""

from __future__ import annotations

import os
import sys

os.environ["RAY_USAGE_STATS_ENABLED"] = "0"

from ray.cluster_utils import Cluster

_NODE = {
    "num_cpus": 1,
    "num_gpus": 0,
    "object_store_memory": 100 << 20,  # bytes; rows are small, the default is a third of main memory
    "include_dashboard": False,
}


def main() -> None:
    """Start, say where, wait."""
    cluster = Cluster(initialize_head=True, head_node_args=_NODE)
    second = cluster.add_node(**_NODE)
    cluster.wait_for_nodes()
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line.strip() == "remove":
            cluster.remove_node(second, allow_graceful=False)
            print("removed", flush=True)
    cluster.shutdown()


if __name__ == "__main__":
    main()
