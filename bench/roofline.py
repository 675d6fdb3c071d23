"""A roofline of what other benchmarks recorded: each kernel's rate beside what its arithmetic intensity allows.

    python -m groupwise.bench.roofline bench/results/h200/*.json --out bench/results/h200/roofline.png

Rates are shares of a large matrix product's on the same device in the same run, a CPU's too. The roof is 1 for a kernel
of more operations a byte than the device's balance (the rate of the product over the bandwidth of a copy), and falls
with the intensity below it. Rows without an intensity are left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

import matplotlib

from groupwise.bench.common import Row

matplotlib.use("Agg")
import matplotlib.pyplot as plt


def draw(records: list[Row], file: Path) -> int:
    """Write the picture; returns how many rows it shows."""
    figure, axes = plt.subplots(figsize=(9, 5.5))
    shown = 0
    for number, record in enumerate(records):
        balance = record["balance_flops_per_byte"]
        colour = f"C{number}"
        points = [
            (row["flops_per_byte"], row["share_of_limit"] * min(1.0, row["flops_per_byte"] / balance))
            for row in record["rows"]
            if row.get("flops_per_byte") and row.get("share_of_limit")
        ]
        shown += len(points)
        if points:
            intensities, shares = zip(*points, strict=True)
            axes.scatter(intensities, shares, s=36, color=colour, label=record["bench"], zorder=3)
        ends = (0.05, balance, 1e5)
        axes.plot(ends, [min(1.0, x / balance) for x in ends], color=colour, linewidth=0.8, alpha=0.6)
    axes.set(
        xscale="log", yscale="log", ylim=(1e-4, 2), xlabel="operations a byte",
        ylabel="share of the matrix product's rate", title=records[0]["device"],
    )  # fmt: skip
    axes.grid(alpha=0.3)
    axes.legend()
    file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(file, dpi=150, bbox_inches="tight")
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("records", nargs="+", type=Path, help="JSON records written by other benchmarks with --out")
    parser.add_argument("--out", type=Path, required=True, help="the picture, .png")
    args = parser.parse_args()
    records = [json.loads(file.read_text()) for file in args.records]
    records = [record for record in records if "balance_flops_per_byte" in record]
    devices = {record["device"] for record in records}
    if len(devices) > 1:
        sys.exit(f"roofline: the records are of {', '.join(sorted(devices))}; give those of one device")
    shown = draw(records, args.out) if records else 0
    if not shown:
        sys.exit("roofline: no row has flops_per_byte and share_of_limit; give records of kernel benchmarks")
    print(f"{args.out}: {shown} rows of {', '.join(record['bench'] for record in records)}")


if __name__ == "__main__":
    main()
