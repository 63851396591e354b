"""The table of one layer over two GPUs, from what ``python -m bench distributed`` recorded."""

import recorded


def table() -> str:
    """A row for each way to spread the layer, and where it was measured."""
    found = recorded.result("distributed/h200-x2")
    rows = ["| way | GPUs | forward, ms | with backward, ms | times one GPU | GiB a GPU |", "|---|--:|--:|--:|--:|--:|"]
    rows += [
        f"| `{row['way']}` | {row['gpus']} | {row['forward_ms']:.1f} | {row['forward_backward_ms']:.1f} "
        f"| {row.get('speed_up_forward_backward', 1):.2f} | {max(row['peak_gib']):.1f} |"
        for row in found["rows"]
    ]
    row = found["rows"][0]
    return "\n".join(rows) + (
        f"\n\n{row['tokens']:,} tokens, a layer {row['dim']:,} wide, {row['case']}, {found['dtype']}; "
        f"{found['gpus']} x {recorded.where(found)}."
    )
