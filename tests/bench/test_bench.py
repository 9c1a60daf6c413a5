"""``make bench`` in its short form: whole lines, and nothing badly slower than its comparator."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).with_name("run.py")


def test_the_short_form_finds_no_gross_regression(tmp_path):
    out = tmp_path / "bench.jsonl"
    said = subprocess.run(
        [sys.executable, str(RUN), "--short", "--out", str(out)], capture_output=True, text=True, timeout=300
    )
    assert said.returncode == 0, said.stdout + said.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["bench"] for line in lines] == ["knn", "backends", "mix", "mix_memory", "cache", "scoring"]
    for line in lines:
        assert line["ratio"] == line["comparator_value"] / line["value"] > line["target"] / 3
        assert line["spread"][0] <= line["value"] <= line["spread"][1]
    assert lines[1]["peak_mb"] < 200  # of arithmetic on a bank of 25 MB
    assert lines[4]["saved_mb"] > 1


def test_an_unknown_benchmark_is_refused():
    said = subprocess.run([sys.executable, str(RUN), "knm"], capture_output=True, text=True)
    assert said.returncode == 2
    assert said.stderr.startswith("error: knm: no such benchmark; allowed are knn, ")
