"""bench/client.py against a server: what it counts, and which adapters it asks for."""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

import client
import pytest
from http_serving import serving


def test_popularities() -> None:
    names = ["a", "b", "c", "d"]

    def counts(popularity: str) -> list[int]:
        found = list(itertools.islice(client.chosen(names, popularity, random.Random(0)), 1000))
        return [found.count(name) for name in names]

    assert counts("distinct") == [250] * 4
    assert max(counts("uniform")) < 300 < 400 < counts("zipf")[0] and counts("zipf") == sorted(
        counts("zipf"), reverse=True
    )


def test_a_load(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(tmp_path / "adapters") as served:
        options = [
            "--rates",
            "50",
            "200",
            "--requests",
            "12",
            "--prompt",
            "3",
            "--new",
            "4",
            "--popularity",
            "distinct",
        ]
        files = ["--out", str(tmp_path / "out.jsonl"), "--plot", str(tmp_path / "out.png")]
        line = ["client.py", "--base-url", served.url, "--adapters", "a", "b", "nobody", *options, *files]
        monkeypatch.setattr(sys, "argv", line)
        client.main()
    records = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [(record["served"], record["failed"]) for record in records] == [(8, 4), (8, 4)]
    assert all("404" in record["why"][0] and record["first_ms"][0] > 0 for record in records)
    assert all(record["tokens_per_s"] == pytest.approx(4 * record["requests_per_s"]) for record in records)
    assert (tmp_path / "out.png").stat().st_size > 1000 and "nobody" in capsys.readouterr().out
