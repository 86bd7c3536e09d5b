"""The script that users with a GPU run once, with a stand-in for Python: it asks for what exists, and packs it."""

import json
import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from benchmarks.engines import Setup, speculative_config
from benchmarks.throughput import parsed

ROOT = Path(__file__).parents[2]
STAND_IN = """#!/usr/bin/env bash
printf '%s\\0' "$0" "$@" >>"$CALLS"; printf '\\n' >>"$CALLS"
if [ "$2" = venv ]; then mkdir -p "$3/bin"; cp "$0" "$3/bin/python"; cp "$0" "$3/bin/vllm-earlyexit"; fi
[ "$2" != pytest ] || [ "${@: -1}" != "${FAILING:-}" ]
"""


def check(folder: Path, *arguments: str, failing: str = "") -> tuple[subprocess.CompletedProcess[str], list[list[str]]]:
    """Run the script in a copy of what it needs of the repository; return it and the commands that it ran."""
    (folder / "benchmarks").mkdir(parents=True)
    script = folder / "benchmarks" / "gpu_check.sh"
    script.write_bytes((ROOT / "benchmarks" / "gpu_check.sh").read_bytes())
    python, calls = folder / "python", folder / "calls"
    python.write_text(STAND_IN)
    python.chmod(0o755)
    environment = os.environ | {"PYTHON": str(python), "CALLS": str(calls), "FAILING": failing}
    done = subprocess.run(["bash", str(script), *arguments], env=environment, capture_output=True, text=True)
    return done, [line.split("\0")[1:-1] for line in calls.read_text().splitlines()]


@pytest.mark.parametrize("arguments", [(), ("org/model", "org/heads", "prompts.jsonl", "org/eagle3")])
def test_it_measures_what_the_benchmark_knows(tmp_path: Path, arguments: tuple[str, ...]):
    _, ran = check(tmp_path / "here", *arguments)
    (measuring,) = [call for call in ran if call[:2] == ["-m", "benchmarks.throughput"]]
    options = parsed(measuring[2:])
    assert options.concurrency == [1, 8, 32]
    setup = Setup(options.model, options.heads, options.dtype, True, options.max_tokens, 32, options.max_model_len)
    wanted = {name: speculative_config(name, setup) for name in options.configs}
    assert wanted["ar"] is None
    if arguments:
        assert (options.model, options.heads, str(options.prompts)) == arguments[:3]
        assert wanted["eagle3:4:org/eagle3"] == {"method": "eagle3", "num_speculative_tokens": 4, "model": "org/eagle3"}
    else:
        assert (ROOT / options.prompts).is_file()
    (extras,) = [call[-1] for call in ran if "install" in call]
    known = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}":' in known for extra in extras[2:-1].split(","))
    tests = [path for call in ran if call[:2] == ["-m", "pytest"] for path in call[2:]]
    assert len(tests) == 4
    assert all((ROOT / path).exists() for path in tests)


def test_what_fails_is_noted_and_the_rest_still_runs_and_is_packed(tmp_path: Path):
    done, ran = check(tmp_path / "here", failing="tests/v2")
    assert done.returncode != 0
    with tarfile.open(tmp_path / "here" / "gpu-check.tar.gz") as packed:
        summary = packed.extractfile("gpu-check/summary.txt")
        assert summary is not None
        noted = summary.read().decode().splitlines()
        assert "gpu-check/throughput.log" in packed.getnames()
    assert any(line.startswith("FAILED  lossless-v2") for line in noted)
    assert "ok      lossless-v1" in noted
    assert json.dumps(ran).count("benchmarks.throughput") == 1
