"""The hardware counters of kernels, as ncu prints them."""

import csv
import re

COUNTERS = {
    "gpu__time_duration.sum": "us",
    "sm__inst_issued.avg.pct_of_peak_sustained_elapsed": "issue, %",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_elapsed": "tensor cores, %",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory, %",
    "l1tex__data_bank_conflicts_pipe_lsu.sum": "bank conflicts",
    "smsp__inst_executed.sum": "warp instructions",
}


def counters(log: str) -> list[dict[str, str]]:
    """Rows of ncu's CSV in base units: a kernel each, with the counters under short names, and what
    bounds it. A counter that this GPU has not stays as ncu prints it."""
    lines = [line for line in log.splitlines() if line.startswith('"')]
    rows: dict[str, dict[str, str]] = {}
    for line in csv.DictReader(lines):
        # Of "void f<(int)7>(float *)" what is before the parameters.
        name = re.sub(r"\(anonymous namespace\)::|\((int|bool)\)", "", line["Kernel Name"])
        name = name.partition("(")[0]
        row = rows.setdefault(line["ID"], {"kernel": name})
        if short := COUNTERS.get(line["Metric Name"]):
            value = _number(line["Metric Value"])
            if value is not None and short == "us":
                value /= 1e3  # from nanoseconds
            row[short] = line["Metric Value"] if value is None else f"{value:.4g}"
    for row in rows.values():
        shares = {name: _number(row[name]) or 0.0 for name in row if name.endswith("%")}
        row["bound"] = max(shares, key=shares.__getitem__).partition(",")[0] if shares else ""
    return list(rows.values())


def _number(text: str) -> float | None:
    try:
        return float(text.replace(",", ""))
    except ValueError:
        return None


def table_of(log: str) -> str:
    """What ncu printed as a table in Markdown."""
    rows = counters(log)
    if not rows:
        return ""
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [" | ".join(names), "|".join(["---"] * len(names))]
    lines += [" | ".join(row.get(name, "") for name in names) for row in rows]
    return "\n".join(f"| {line} |" for line in lines)
