"""The tables of the page on learning."""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

import learn_runs
from learn_runs import (
    MISSING,
    Result,
    Row,
    by_attention,
    curve,
    load,
    rows,
    runs,
    seconds_at,
    sentence_of_budget,
    tokens_until,
)

from bench.learn.insight import free_share
from flexnsa import NSAConfig

ORDER = (
    "full", "nsa", "nsa-shared-kv", "nsa-mean-pool", "nsa-no-window", "nsa-no-compressed", "nsa-no-selected", "moba",
    "window",
)  # fmt: skip


ENDS = {
    "finished": "finished",
    "interrupted": "ended with the time, before their planned steps",
    "out of time": "ended with the time, before their planned steps",
    "running": "were killed",
    "not begun": "wrote nothing in that time",
}


def plan() -> str:
    """When the comparison was made, in which calls, and how their runs ended."""
    calls = [found for found in (load(path.stem) for path in sorted(learn_runs.RUNS.glob("plan*.json"))) if found]
    if not calls:
        return MISSING
    lines = ["| made | GPU | runs side by side | minutes | of these |", "|---|---|---|--:|---|"]
    for call in calls:
        kept = {name: state for name, state in call["runs"].items() if _stands(call, name, state)}
        ends = ", ".join(f"{count} {ENDS[state]}" for state, count in Counter(kept.values()).items())
        lines.append(
            f"| {call['date'][:16].replace('T', ' ')} | {call['device']} | {', '.join(kept)} | "
            f"{call['seconds'] / 60:.1f} | {ends} |"
        )
    first = calls[0]
    return "\n".join(
        [*lines, "", f"torch {first['torch']}, triton {first['triton']}; the minutes hold start and compilation."]
    )


def _stands(call: Result, name: str, state: str) -> bool:
    """Whether the record of that name is of that call, or there is none because the call made none."""
    found = load(name)
    return state == "not begun" if found is None else found["commit"] == call["commit"]


def mqar(tokens: int) -> str:
    """A row for each attention: accuracy by seed, and the share of answers in a selected block."""
    results = runs(f"mqar-{tokens}-")
    if not results:
        return MISSING
    lines = [
        "| attention | accuracy, by seed | bits an answer | answers in a selected block | parameters |",
        "|---|--:|--:|--:|--:|",
    ]
    found = by_attention(results)
    for name in sorted(found, key=ORDER.index):
        seeds = [row for _, row in found[name]]
        accuracy = ", ".join(f"{row['accuracy'][-1][1]:.4f}" for row in seeds)
        bits = mean(row["bits_per_token"] for row in seeds)
        lines.append(f"| {name} | {accuracy} | {bits:.3f} | {_hits(seeds)} | {seeds[0]['parameters']:,} |")
    return "\n".join([_geometry(results[0]), "", *lines, "", _margin(found), "", sentence_of_budget(results)])


def _geometry(result: Result) -> str:
    config, nsa = result["config"], NSAConfig(**result["config"]["attention"]["nsa"])
    pairs = result["data"]["pairs"]
    return (
        f"**{config['context']:,} tokens, {pairs} pairs.** Blocks of {nsa.select_block}, of which a query attends to "
        f"{nsa.num_selected}, {nsa.num_initial + nsa.num_local} of them forced: the others cover "
        f"{free_share(nsa, 2 * pairs):.0%} of the {2 * pairs} tokens that hold pairs. Compressed blocks of "
        f"{nsa.compress_block}, window {nsa.window}. A selector that fills its free slots at random has "
        f"**{result['random_hits']:.1%}** of the answers in a selected block, forced blocks counted."
    )


def _hits(seeds: Sequence[Row]) -> str:
    """The best layer's share, the mean over the seeds."""
    best = [max(row["insights"][-1]["hits"]) for row in seeds if row["insights"] and "hits" in row["insights"][-1]]
    return f"{mean(best):.1%}" if best else ""


def _margin(found: Mapping[str, Sequence[tuple[Result, Row]]]) -> str:
    """NSA beside full attention, in the words that the numbers allow."""
    means = {name: mean(row["accuracy"][-1][1] for _, row in seeds) for name, seeds in found.items()}
    if not {"nsa", "full"} <= means.keys():
        return ""
    distance = means["full"] - means["nsa"]
    verdict = "within 0.01 of it" if distance <= 0.01 else f"{distance:.2f} below it"
    others = "".join(
        f", {label} {means[name]:.4f}"
        for name, label in (("nsa-no-selected", "without the selected branch"), ("window", "a window alone"))
        if name in means
    )
    full = [row["accuracy"][-1][1] for _, row in found["full"]]
    solved = sum(accuracy >= 0.99 for accuracy in full)
    if solved < len(full):
        verdict = f"full attention itself reached 0.99 in {solved} of {len(full)} runs, so nothing follows about NSA"
    return f"Mean accuracy: full attention {means['full']:.4f}, NSA {means['nsa']:.4f}{others}: {verdict}."


def searching() -> str:
    """NSA that searches first beside one that has its selected branch from the start, at each size."""
    lines = [
        "| tokens | selected branch | accuracy of NSA, by seed | answers in a selected block | if it never joins |",
        "|--:|---|--:|--:|--:|",
    ]
    for tokens in (512, 2048):
        for label, folder in (("from the start", "reading-first/"), ("joins later", "")):
            found = by_attention(runs(f"{folder}mqar-{tokens}-"))
            if {"nsa", "nsa-no-selected"} <= found.keys():
                seeds, never = ([row for _, row in found[name]] for name in ("nsa", "nsa-no-selected"))
                accuracy = ", ".join(f"{row['accuracy'][-1][1]:.3f}" for row in seeds)
                lines.append(f"| {tokens:,} | {label} | {accuracy} | {_hits(seeds)} | {_hits(never)} |")
    return "\n".join(lines) if len(lines) > 2 else MISSING


def passkey() -> str:
    """A row for each attention and length: the share of keys found, over all depths."""
    results = runs("passkey")
    if not results:
        return MISSING
    lines = []
    for _, row in rows(results):
        cells = row["grid"] or ()
        lengths = sorted({cell["tokens"] for cell in cells})
        if not lines:
            lines = ["| attention | " + " | ".join(f"{length // 1024}k" for length in lengths) + " |"]
            lines.append("|---|" + "--:|" * len(lengths))
        shares = [mean(cell["keys"] for cell in cells if cell["tokens"] == length) for length in lengths]
        lines.append(f"| {row['attention']} | " + " | ".join(f"{share:.1%}" for share in shares) + " |")
    return "\n".join([*lines, "", sentence_of_budget(results)])


def text() -> str:
    """A row for each model and seed: bits a byte, and the time to what the slowest reached."""
    results = runs("text-seed")
    if not results:
        return MISSING
    level = max(curve(row)[-1][1] for _, row in rows(results))
    lines = [
        f"| attention | seed | validation, bits a byte | bytes seen | seconds | to {level:.3f} bits | parameters |",
        "|---|--:|--:|--:|--:|--:|--:|",
    ]
    for result, row in rows(results):
        until = tokens_until(row, level) or curve(row)[-1][0]
        lines.append(
            f"| {row['attention']} | {result['seed']} | {row['bits_per_token']:.4f} | {row['tokens']:,} | "
            f"{row['seconds']:.0f} | {seconds_at(row, until):.0f} | {row['parameters']:,} |"
        )
    data = results[0]["data"]
    files = data["train_files"] + data["validation_files"]
    size = data["train_bytes"] + data["validation_bytes"]
    seen = max(row["tokens"] for _, row in rows(results)) / data["train_bytes"]
    return "\n".join(
        [
            *lines,
            "",
            f"{files:,} files of {size / 1e6:,.0f} MB, SHA-256 of them all `{data['sha256'][:16]}…`; the bytes seen "
            f"are {seen:.0%} of the training part. Curves, and the time to a level, are over a quarter of the "
            f"validation rows. {sentence_of_budget(results)}",
        ]
    )


def stability() -> str:
    """A row for each NSA of each kind of run: gradient norms, and gates at the end."""
    found = [(result, row) for result, row in rows(runs("")) if row["attention"] == "nsa"]
    if not found:
        return MISSING
    lines = [
        "| task | seed | gradient norm, median | largest | not finite | gates at the end, least to largest mean |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for result, row in found:
        norm = row["gradient_norm"]
        gates = [mean(branch) for layer in row["insights"][-1]["gates"] for branch in zip(*layer, strict=True)]
        lines.append(
            f"| {result['task']}, {result['config']['context']:,} tokens | {result['seed']} | {norm['median']:.2f} | "
            f"{norm['max']:.2f} | {norm['not_finite']} | {min(gates):.2f} to {max(gates):.2f} |"
        )
    return "\n".join(lines)


def orders() -> str:
    """Whether the compiled losses stay among the eager ones."""
    found = load("orders") or load("../orders-cpu")
    if found is None:
        return MISSING
    count = len(found["losses"]["compiled"])
    verdict = "within what" if found["within"] else "**more than** what"
    return (
        f"Over the first {count} losses the eager orders come apart by up to {found['spread']:.1e} bits, and the "
        f"compiled run is up to {found['deviation']:.1e} from the nearest of them: {verdict} the order of sums alone "
        f"explains ({found['device']}, torch {found['torch']}, {found['config']['batch']} rows of "
        f"{found['config']['context']:,} tokens, float32)."
    )


TABLES: Mapping[str, Callable[[], str]] = {
    "learn plan": plan,
    "learn mqar 512": lambda: mqar(512),
    "learn mqar 2048": lambda: mqar(2048),
    "learn searching": searching,
    "learn passkey": passkey,
    "learn text": text,
    "learn stability": stability,
    "learn orders": orders,
}
