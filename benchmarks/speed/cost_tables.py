"""Tables of docs/performance.md and docs/sparse.md on what single things cost: one for each results file."""

from __future__ import annotations

from typing import Any

Results = dict[str, dict[str, Any]]


def compile_time(results: Results) -> str:
    """Cold compilation, a row for each model of `compile_time.py`."""
    head = ["model", "once", "dense", "reduced", "ratio", "without once", "goal", "kernels", "passes", "of dense"]
    rows = [
        [
            f"{row['model']} `{row['recipe']}`",
            *(f"{row[key]:.1f} s" for key in ("once", "dense", "reduced")),
            f"{row['ratio']:.2f}x",
            f"{row['ratio_without_once']:.2f}x",
            _verdict(max(row["ratio"], row["ratio_without_once"]), 2.0, "2.0x"),
            f"{row['kernels_reduced']} ({row['kernels_dense']} dense)",
            f"{row['passes']:.2f} s",
            f"{row['passes_of_dense']:.1%}, {_verdict(row['passes_of_dense'], 0.05, '5%')}",
        ]
        for row in results.values()
    ]
    return _table(head, rows, results)


def large_file(results: Results) -> str:
    """Memory and time of a large model's way to a file, a row for each way of `large_file.py`."""
    head = ["way", "peak, MB", "of the file", "goal", "seconds", "of torch.onnx.export", "goal", "without checks"]
    rows = [
        [
            row["way"],
            f"{row['peak_mb']:.0f}",
            f"{row['peak_of_file']:.2f}x",
            _verdict(row["peak_of_file"], 3.0, "3x"),
            f"{row['seconds']:.1f}",
            f"{row['time_of_torch']:.2f}x",
            _verdict(row["time_of_torch"], 2.0, "2x"),
            f"{row['unchecked_of_torch']:.2f}x",
        ]
        for row in results.values()
    ]
    return _table(head, rows, results)


def ops(results: Results) -> str:
    """Every op compiled against eager, a row for each case of `ops.py`; ratios differ by 5 % from run to run."""
    head = ["op", "shape", "eager, ms", "compiled alone", "as tamis compiles it", "how", "goal", "once, ms"]
    rows = [
        [
            f"`{row['op']}`",
            row["shape"],
            f"{row['eager_ms']:.3f}",
            *(
                f"{row[kind]:.2f}x ({row[kind + '_from']:.2f} to {row[kind + '_to']:.2f})"
                for kind in ("inlined", "lowered")
            ),
            row["how"],
            _verdict(row["lowered"], 1.05, "1.0x"),
            f"{row['once_us'] / 1e3:.2f}",
        ]
        for row in results.values()
    ]
    return _table(head, rows, results)


def sparse_attention(results: Results) -> str:
    """Sparse attention over dense on a CPU, a row for each case of `sparse_attention.py`."""
    head = ["tokens", "tile", "pairs read", "of dense", "over pairs read", "choosing", "eager", "gathered", "goal"]
    rows = [
        [
            row["tokens"],
            row["block"],
            f"{row['read']:.1%}",
            f"{row['sparse']:.3f} ({row['low']:.3f} to {row['high']:.3f})",
            f"{row['sparse'] / row['read']:.2f}",
            f"{row['choosing']:.3f}",
            f"{row['eager']:.3f}",
            f"{row['gathered']:.3f}",
            _verdict(row["sparse"], 0.13, "0.13") if row["asked"] == 0.1 else "",
        ]
        for row in results.values()
    ]
    return _table(head, rows, results)


TABLES = {"compile": compile_time, "large_file": large_file, "ops": ops, "sparse": sparse_attention}


def _verdict(value: float, goal: float, shown: str) -> str:
    return f"{shown} {'met' if value <= goal else 'missed'}"


def _table(head: list[str], rows: list[list[Any]], results: Results) -> str:
    lines = [_line(head), "|---" * len(head) + "|", *map(_line, rows)]
    measured = sorted({f"{row['date']}: {row['machine']}; {row['versions']}." for row in results.values()})
    return "\n".join([*lines, *(["", *measured] if measured else [])])


def _line(cells: list[Any]) -> str:
    return f"| {' | '.join(map(str, cells))} |"
