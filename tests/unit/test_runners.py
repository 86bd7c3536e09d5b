"""Both model runners' adapters are thin: what drafts, remembers, decides and learns is one and the same."""

import ast
import inspect
from types import ModuleType

import pytest

from vllm_earlyexit.engine import rounds, runner_v1, runner_v2

SHARED = ("load_model", "measure_on", "draft", "resume", "learn", "limit")


def imported(module: ModuleType) -> set[str]:
    """Return what a module's source imports of ours."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("vllm_earlyexit"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.startswith("vllm_earlyexit")}
    return found


@pytest.mark.parametrize("adapter", [runner_v1.SelfExitProposer, runner_v2.SelfExitSpeculator])
def test_adapters_share_drafter_frontier_policy_and_counts(adapter: type[rounds.SelfExit]):
    assert all(getattr(adapter, name) is getattr(rounds.SelfExit, name) for name in SHARED)
    module = inspect.getmodule(adapter)
    assert module is not None
    beside = {name for name in imported(module) if not name.startswith(f"{rounds.__name__}.")}
    verification = {f"vllm_earlyexit.engine.{name}" for name in ("verification", "verification_v2.PlainSampler")}
    verification |= {f"vllm_earlyexit.engine.verification.{name}" for name in ("is_greedy", "may_leave")}
    others = {"engine.ahead", "engine.early_exit.Left", "errors.EarlyExitError"}
    assert beside <= verification | {f"vllm_earlyexit.{name}" for name in others}
    shared = imported(rounds)
    for part in ("drafter.SelfExitDrafter", "frontier.Frontier", "policy.AutoPolicy", "lookup.repeat_in"):
        assert f"vllm_earlyexit.engine.{part}" in shared


def test_the_adapter_of_v2_is_small():
    assert len(inspect.getsource(runner_v2).splitlines()) < 400
