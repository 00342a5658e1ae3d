"""Communication of one iteration: a latency-bandwidth model, its predictions, and its check against measured gloo runs.

usage: python tests/benchmarks/scaling.py predict            tables for 8 to 1,024 GPUs
       python tests/benchmarks/scaling.py measure            two processes on this machine
       python tests/benchmarks/scaling.py measure --mbit 200 two network namespaces, each shaped by tc tbf (root)
"""
from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import time
from datetime import timedelta
from math import ceil, log2

import torch
import torch.distributed as dist

SIZES = (1_000, 10_000, 112_000, 500_000, 2_000_000)  # floats; 112,000 is the 4-convolution net
FIT = (1_000, 2_000_000)  # latency and bandwidth come from these two, the others test the model


def ring(size: float, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds of a ring all-reduce of `size` bytes: 2 (p - 1) messages of size / p each."""
    return 2 * (ranks - 1) * (latency + size / ranks / bandwidth)


def tree(size: float, ranks: int, latency: float, bandwidth: float) -> float:
    """Seconds of a pipelined double-tree all-reduce: 2 log2 p latencies, and every byte up and down once."""
    return 2 * ceil(log2(max(ranks, 2))) * latency + 2 * size / bandwidth


# Assumptions, not measurements: NVLink 4 within a node of 8, one 400 Gb/s adapter a GPU between nodes.
NVLINK = {"latency": 3e-6, "bandwidth": 350e9}
FABRIC = {"latency": 6e-6, "bandwidth": 45e9}
FLOPS = 100e12  # sustained by one GPU in TF32


def hierarchical(size: float, gpus: int) -> float:
    """Reduce-scatter and all-gather within nodes over NVLink, all-reduce of the eighth between nodes over the fabric, by
    ring or tree, whichever is faster."""
    nodes, inside = gpus // 8, ring(size, 8, **NVLINK)
    if nodes == 1:
        return inside
    return inside + min(ring(size / 8, nodes, **FABRIC), tree(size / 8, nodes, **FABRIC))


# (name, parameters, floating-point operations of one task's meta-gradient, tasks a GPU)
MODELS = (("4 convolutions, 20-way 1-shot, K = 1", 112_000, 1.4e9, 16),
          ("ResNet-12, 5-way 5-shot, 84 x 84, K = 5", 12_400_000, 4.5e12, 4),
          ("1 billion parameters, 4,096 tokens, K = 1", 1_000_000_000, 13 * 2 * 1e9 * 4096, 1))


def predict() -> None:
    print("| model | bytes an iteration | compute | GPUs | all-reduce | broadcast | efficiency | bytes a save |")
    print("|---|---|---|---|---|---|---|---|")
    for name, parameters, operations, tasks in MODELS:
        size, compute = 4 * parameters + 24, operations * tasks / FLOPS + 1e-3
        for gpus in (8, 64, 256, 1024):
            reduce, broadcast = hierarchical(size, gpus), ceil(log2(gpus)) * FABRIC["latency"]
            efficiency = compute / (compute + reduce + broadcast)
            print(f"| {name} | {size / 1e6:.3g} MB | {1000 * compute:.3g} ms | {gpus} | {1e6 * reduce:.0f} us | "
                  f"{1e6 * broadcast:.0f} us | {100 * efficiency:.1f} % | {16 * parameters / 1e6:.3g} MB |")


def child() -> None:
    """One of two ranks: medians of all-reduces of each size, and of the broadcast of eight float64."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for size in (8, *SIZES):
        buffer, seconds = torch.zeros(size), []
        for _ in range(30):
            dist.barrier()
            begun = time.perf_counter()
            dist.broadcast(buffer, 0) if size == 8 else dist.all_reduce(buffer)
            seconds.append(time.perf_counter() - begun)
        if dist.get_rank() == 0:
            print(size, statistics.median(seconds[5:]), flush=True)
    dist.barrier()


def measure(mbit: int | None) -> None:
    common = os.environ | {"WORLD_SIZE": "2", "MASTER_PORT": "29577", "OMP_NUM_THREADS": "1",
                           "MASTER_ADDR": "10.214.8.1" if mbit else "127.0.0.1"}
    prefix, names = [[], []], ("scaling0", "scaling1")
    try:
        if mbit:
            for name in names:
                subprocess.run(["ip", "netns", "add", name], check=True)
            subprocess.run(["ip", "link", "add", "cable", "netns", names[0], "type", "veth", "peer", "name", "cable", "netns",
                            names[1]], check=True)
            for i, name in enumerate(names):
                for words in (f"addr add 10.214.8.{i + 1}/24 dev cable", "link set cable up", "link set lo up"):
                    subprocess.run(["ip", "-n", name, *words.split()], check=True)
                shape = f"qdisc add dev cable root tbf rate {mbit}mbit burst 64kb latency 400ms"
                subprocess.run(["tc", "-n", name, *shape.split()], check=True)
            prefix, common["GLOO_SOCKET_IFNAME"] = [["ip", "netns", "exec", name] for name in names], "cable"
        ranks = [subprocess.Popen([*prefix[i], sys.executable, __file__, "child"], env=common | {"RANK": str(i)},
                                  stdout=subprocess.PIPE, text=True) for i in range(2)]
        lines = ranks[0].communicate()[0].split("\n")
        ranks[1].wait()
    finally:
        if mbit:
            for name in names:
                subprocess.run(["ip", "netns", "del", name])
    seconds = {int(line.split()[0]): float(line.split()[1]) for line in lines if line}
    small, large = (4 * n for n in FIT)
    slope = (seconds[FIT[1]] - seconds[FIT[0]]) / (large - small)  # two ranks: 2 latencies, and each byte once
    latency, bandwidth = (seconds[FIT[0]] - slope * small) / 2, 1 / slope
    print(f"fitted to {FIT[0]} and {FIT[1]} floats: latency {1e6 * latency:.0f} us, bandwidth "
          f"{8 * bandwidth / 1e6:.0f} Mbit/s; broadcast of 8 floats {1e6 * seconds[8]:.0f} us")
    print("| floats | measured | ring model | ratio |\n|---|---|---|---|")
    for size in SIZES:
        model = ring(4 * size, 2, latency, bandwidth)
        print(f"| {size:,} | {1000 * seconds[size]:.3f} ms | {1000 * model:.3f} ms | {seconds[size] / model:.2f} |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("verb", choices=("predict", "measure", "child"))
    parser.add_argument("--mbit", type=int)
    settings = parser.parse_args()
    {"predict": predict, "child": child, "measure": lambda: measure(settings.mbit)}[settings.verb]()


if __name__ == "__main__":
    main()
