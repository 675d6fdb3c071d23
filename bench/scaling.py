"""What sharding costs a GPU, from one host to 128: memory, bytes moved, and where the bound is. Computed, not measured.

    python -m groupwise.bench.scaling docs/scaling.md

writes the tables between the marks of that page, and the picture beside it. Memory is the planner's and bytes are those
of ``engine/traffic.py``; the times are bytes and operations over the rates that the page states with their sources.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
from pathlib import Path

import matplotlib

from groupwise.engine.config import Config, load_config
from groupwise.engine.planner import FROZEN, layout_of, plan_memory
from groupwise.engine.traffic import count_traffic

matplotlib.use("Agg")
import matplotlib.pyplot as plt

MARKS = "<!-- computed by groupwise.bench.scaling -->", "<!-- end -->"
HOST = 8  # GPUs
GPUS = [HOST << i for i in range(8)]
FLOPS, NVLINK, FAST, SLOW = 989e12, 450e9, 50e9, 100e9 / 8 / HOST  # of a GPU, a second; bytes received


def sharded(config: Config, shard_size: int) -> Config:
    """The configuration with so many ranks for a copy of the model, 0 for all."""
    return dataclasses.replace(config, run=dataclasses.replace(config.run, shard_size=shard_size))


def operations(config: Config) -> float:
    """Of the matrix products of a full micro-batch: forward, backward, and the blocks' forward once more."""
    model = config.model
    blocks = sum(layout_of(model, 1, 0).whole[1:])
    recomputed = config.optimizer.activation_checkpointing == "block"
    head = model.vocab_size * model.hidden_size
    return config.optimizer.tokens_per_microbatch * ((8 if recomputed else 6) * blocks + 6 * head)


def memory_table(config: Config) -> str:
    """GB of a GPU, and of the host's memory for each GPU, by number of GPUs."""
    lines = [
        "| GPUs | kept, one copy | rollout | update | snapshot | kept, a copy a host | rollout | update | snapshot |",
        "| --- |" + " --- |" * 8,
    ]
    for gpus in GPUS:
        cells = []
        for shard_size in (0, HOST):
            plan = plan_memory(sharded(config, shard_size), gpus, "cuda")
            phases = {phase.name: phase for phase in plan.phases}
            held = phases["log-probabilities"].device
            kept = sum(held.get(item, 0) for item in ("weights", "moments", *FROZEN))
            snapshot = phases["checkpoint"].host["snapshot"]
            cells += [kept, phases["rollout"].device_bytes, phases["update"].device_bytes, snapshot]
        lines.append(f"| {gpus:,} | " + " | ".join(f"{cell / 1e9:.1f}" for cell in cells) + " |")
    return "\n".join(lines)


def traffic_table(config: Config) -> str:
    """What a GPU receives for a micro-batch, the seconds that takes, and the tokens whose products take as long."""
    products = operations(config) / FLOPS
    tokens = config.optimizer.tokens_per_microbatch
    lines = [
        "| GPUs | model in | within a host, GB | ms | between hosts, GB | ms, 8 x 400 Gb/s | tokens that hide it "
        "| ms, 1 x 100 Gb/s | tokens |",
        "| --- | --- |" + " --- |" * 7,
    ]
    for gpus in GPUS:
        for shard_size, name in ((0, "one copy"), (HOST, "a copy a host")):
            if gpus == HOST and shard_size:
                continue  # the same
            traffic = count_traffic(sharded(config, shard_size), gpus, HOST, "cuda")
            near, fast, slow = traffic.within / NVLINK, traffic.between / FAST, traffic.between / SLOW
            hide = [f"{tokens * max(near, far) / products:,.0f}" for far in (fast, slow)]
            cells = [f"{traffic.within / 1e9:.1f}", f"{near * 1e3:.0f}", f"{traffic.between / 1e9:.1f}"]
            cells += [f"{fast * 1e3:,.0f}", hide[0], f"{slow * 1e3:,.0f}", hide[1]]
            lines.append(f"| {gpus:,} | {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def tables(config: Config) -> str:
    """What stands between the marks of the page."""
    tokens, products = config.optimizer.tokens_per_microbatch, operations(config)
    compute = (
        f"A full micro-batch of {tokens:,} tokens is {products / 1e12:,.0f} TFLOP of matrix products, "
        f"{products / FLOPS * 1e3:,.0f} ms at 989 TFLOP/s."
    )
    return f"{memory_table(config)}\n\n{compute}\n\n{traffic_table(config)}"


def draw(config: Config, file: Path) -> None:
    """The two figures beside each other: memory of a GPU, and the time of what it receives."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2))
    for shard_size, name, colour in ((0, "one copy of the model", "C0"), (HOST, "a copy a host", "C1")):
        chosen = sharded(config, shard_size)
        plans = [plan_memory(chosen, gpus, "cuda") for gpus in GPUS]
        for phase, style in (("rollout", "-"), ("update", "--")):
            sizes = [next(p.device_bytes for p in plan.phases if p.name == phase) / 1e9 for plan in plans]
            left.plot(GPUS, sizes, style, color=colour, marker="o", markersize=3, label=f"{phase}, {name}")
        between = [count_traffic(chosen, gpus, HOST, "cuda").between for gpus in GPUS[1:]]
        for rate, style, network in ((FAST, "-", "8 x 400 Gb/s"), (SLOW, "--", "1 x 100 Gb/s")):
            times = [size / rate for size in between]
            right.plot(GPUS[1:], times, style, color=colour, marker="o", markersize=3, label=f"{network}, {name}")
    within = count_traffic(sharded(config, HOST), GPUS[-1], HOST, "cuda").within / NVLINK
    right.axhline(operations(config) / FLOPS, color="black", linewidth=1, label="matrix products")
    right.axhline(within, color="grey", linewidth=1, linestyle=":", label="NVLink")
    left.set(xscale="log", xlabel="GPUs", ylabel="GB of a GPU", ylim=(0, None), title="memory, as planned")
    right.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="s", title="a full micro-batch, as computed")
    for axes in (left, right):
        axes.set_xticks(GPUS, [str(gpus) for gpus in GPUS])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, handlelength=3.5)
    figure.tight_layout()
    figure.savefig(file, dpi=130)


def main() -> None:
    own = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    own.add_argument("page", type=Path, help="docs/scaling.md; scaling.png is written beside it")
    page = own.parse_args().page
    config = load_config("datarus")
    first, last = MARKS
    between = re.compile(f"{re.escape(first)}.*{re.escape(last)}", re.DOTALL)
    page.write_text(between.sub(f"{first}\n{tables(config)}\n{last}", page.read_text()))
    draw(config, page.with_suffix(".png"))


if __name__ == "__main__":
    main()
