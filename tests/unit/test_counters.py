"""What workers count is on the metrics page of the process that serves."""

import multiprocessing
from pathlib import Path

import pytest
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector

from vllm_earlyexit.engine.counters import EARLY_TOKENS, SILENT_TOKENS, VLLM_FOLDER, Counters, folder

NAME = "vllm:self_exit_silent_tokens_total"


def count(where: str, tokens: int) -> None:
    counters = Counters(where)
    counters.add(SILENT_TOKENS, tokens)
    counters.add(SILENT_TOKENS, 1)


def test_counts_of_several_processes_are_added_up(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv(VLLM_FOLDER, raising=False)
    before = REGISTRY.get_sample_value(NAME) or 0
    spawn = multiprocessing.get_context("spawn")
    workers = [spawn.Process(target=count, args=(folder(), tokens)) for tokens in (3, 5)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert REGISTRY.get_sample_value(NAME) == before + 10


def test_engines_that_follow_one_another_go_on_counting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Also where vLLM has several API servers and thus a folder of its own."""
    monkeypatch.setenv(VLLM_FOLDER, str(tmp_path))
    for tokens in (2, 4):
        count(folder(), tokens)
    page = CollectorRegistry()
    MultiProcessCollector(page)
    assert page.get_sample_value(NAME) == 8
    assert b"not numbers" in generate_latest(page)


def test_tokens_that_left_are_counted_by_exit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv(VLLM_FOLDER, str(tmp_path))
    for layer, tokens in (("2", 3), ("8", 1), ("2", 4)):
        Counters(folder()).add(EARLY_TOKENS, tokens, exit_layer=layer)
    page = CollectorRegistry()
    MultiProcessCollector(page)
    found = [page.get_sample_value("vllm:self_exit_early_tokens_total", {"exit_layer": n}) for n in "28"]
    assert found == [7, 1]


def test_nothing_is_written_without_a_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    count("", 2)
    assert list(tmp_path.iterdir()) == []


def test_where_the_server_is_elsewhere_nothing_is_counted(tmp_path: Path):
    count(str(tmp_path / "elsewhere"), 2)
    assert list(tmp_path.iterdir()) == []
