"""The plugin leaves plain vLLM alone, and refuses what it cannot serve before anything is loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

from tests.engine.conftest import engine, runner_of
from tests.engine.tiny import tiny_model
from vllm_earlyexit.config import CONFIG_KEY, EarlyExitConfig
from vllm_earlyexit.engine import seams
from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.plugin import ACTIVE_VARIABLE, register

GENERATE = """
import json, sys
from vllm import LLM, SamplingParams
llm = LLM(sys.argv[1], dtype="float32", enforce_eager=True, max_model_len=1024, max_num_seqs=8, seed=0)
messages = [[{"role": "user", "content": prompt}] for prompt in json.loads(sys.argv[2])]
outputs = llm.chat(messages, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
print("@" + json.dumps([list(output.outputs[0].token_ids) for output in outputs]))
print("@" + json.dumps([name for name in sys.modules if name.startswith("vllm_earlyexit")]))
"""


def engine_targets() -> dict[str, Any]:
    """What the engine seams change, as it is in this process now."""
    return {seam.target: seam.original() for seam in seams.SEAMS if seam.stage != "door"}


def current(target: str) -> Any:
    owner, name = next(seam for seam in seams.SEAMS if seam.target == target).holder()
    return vars(owner)[name]


def test_plain_vllm_with_the_plugin_is_plain_vllm(smollm2: Path, prompts: list[str]):
    from vllm import SamplingParams

    asked = prompts[:4]
    with engine(smollm2) as llm:
        before = {target: current(target) for target in engine_targets() if not target.endswith("_PP")}
        messages: list[Any] = [[{"role": "user", "content": prompt}] for prompt in asked]
        outputs = llm.chat(messages, SamplingParams(temperature=0, max_tokens=32), use_tqdm=False)
        ours = [list(output.outputs[0].token_ids) for output in outputs]
        assert seams.applied("engine") == []
        assert all(seams._originals.get(target) is None for target in before)
        assert {target: current(target) for target in before} == before
        assert type(runner_of(llm).model).__name__ == "LlamaForCausalLM"
        assert ACTIVE_VARIABLE not in os.environ
    command = [sys.executable, "-c", GENERATE, str(smollm2), json.dumps(asked)]
    without = subprocess.run(command, env=os.environ | {"VLLM_PLUGINS": ""}, capture_output=True, text=True, check=True)
    answers, modules = (json.loads(line[1:]) for line in without.stdout.splitlines() if line.startswith("@"))
    assert modules == [], "the comparison must run without the plugin"
    assert ours == answers


def test_the_plugin_can_be_turned_off(smollm2: Path):
    script = "import vllm.plugins as p, sys; p.load_general_plugins(); print('vllm_earlyexit.engine' in sys.modules)"
    for value, loaded in (("1", "False"), ("0", "True")):
        env = os.environ | {"VLLM_EARLYEXIT_DISABLE": value}
        run = subprocess.run([sys.executable, "-c", script], env=env, capture_output=True, text=True, check=True)
        assert run.stdout.split()[-1] == loaded


def test_registering_again_changes_nothing():
    register()
    doors = {seam.target: current(seam.target) for seam in seams.SEAMS if seam.stage == "door"}
    register()
    assert {target: current(target) for target in doors} == doors
    assert seams.applied() == list(doors)


def test_every_seam_finds_its_target_as_expected():
    assert [seam.problem() for seam in seams.SEAMS] == [None] * len(seams.SEAMS)
    assert len({seam.target for seam in seams.SEAMS}) == len(seams.SEAMS)


def test_a_changed_target_is_reported(monkeypatch: pytest.MonkeyPatch):
    from vllm.engine.arg_utils import EngineArgs

    seam = next(seam for seam in seams.SEAMS if seam.target.endswith("create_speculative_config"))
    monkeypatch.setitem(seams._originals, seam.target, lambda self, something_new: None)
    assert "has changed: expected self, target_model_config, target_parallel_config" in str(seam.problem())
    monkeypatch.undo()
    gone = seams.Seam(f"{EngineArgs.__module__}:EngineArgs.nothing", "engine", "", "", "", ())
    assert "is gone" in str(gone.problem())


@pytest.mark.parametrize(
    ("arguments", "cause"),
    [
        ({"exit_layer": 0}, "exit_layer=0 does not work"),
        ({"exit_layer": 30}, "beyond the stack; this model has 30 layers"),
        ({"num_speculative_tokens": 0}, "num_speculative_tokens=0 does not work"),
        ({"depth": 3}, "no knob 'depth'"),
        ({"model": "no/such/folder"}, "no heads folder"),
    ],
)
def test_bad_knobs_fail_before_the_model_loads(
    smollm2: Path, arguments: dict[str, Any], cause: str, monkeypatch: pytest.MonkeyPatch
):
    from vllm import LLM
    from vllm.v1.engine.llm_engine import LLMEngine

    monkeypatch.setattr(LLMEngine, "from_vllm_config", lambda *a, **k: pytest.fail("an engine was built"))
    with pytest.raises(EarlyExitError, match=cause):
        LLM(str(smollm2), max_model_len=512, speculative_config={"method": "self_exit", **arguments})


def refused(model: Path, **arguments: Any) -> str:
    from vllm import LLM

    with pytest.raises(EarlyExitError) as caught:
        LLM(str(model), max_model_len=512, **arguments)
    assert seams.applied("engine") == []
    return str(caught.value)


def test_models_and_settings_that_cannot_be_served_are_refused(tmp_path: Path, smollm2: Path):
    tiny = tiny_model(tmp_path / "tiny")
    shared = {"method": "self_exit", "head": "shared", "exit_layer": 1}
    assert "no exit heads come with this model" in refused(tiny, speculative_config={"method": "self_exit"})
    assert "pipeline parallelism" in refused(tiny, speculative_config=shared, pipeline_parallel_size=2)
    assert "do not generate" in refused(tiny, speculative_config=shared, runner="pooling")
    config = tiny / "config.json"
    config.write_text(config.read_text().replace("LlamaForCausalLM", "GPTNeoXForCausalLM"))
    message = refused(tiny, speculative_config=shared)
    assert "GPTNeoXForCausalLM is not supported; supported are LlamaForCausalLM, Qwen2ForCausalLM" in message


def test_what_workers_on_other_machines_need_travels_with_ray(smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    """On CPUs vLLM has no Ray executor ("current platform cpu does not support ray"), so none is started here."""
    from vllm.engine.arg_utils import EngineArgs
    from vllm.ray.ray_env import get_env_vars_to_copy

    monkeypatch.delenv(ACTIVE_VARIABLE, raising=False)
    try:
        config = EngineArgs(str(smollm2), speculative_config={"method": "self_exit"}).create_engine_config()
        assert ACTIVE_VARIABLE in get_env_vars_to_copy(), "it makes workers apply the seams"
        arrived = cloudpickle.loads(cloudpickle.dumps(config))
    finally:
        seams.remove("engine")
    assert EarlyExitConfig(**arrived.additional_config[CONFIG_KEY]) == EarlyExitConfig(
        **config.additional_config[CONFIG_KEY]
    )
    assert arrived.model_config.architecture == "ExitLlamaForCausalLM"


def test_another_vllm_version_is_refused(smollm2: Path, monkeypatch: pytest.MonkeyPatch):
    from vllm_earlyexit import plugin

    monkeypatch.setattr(plugin, "installed_vllm", lambda: "0.33.1")
    message = refused(smollm2, speculative_config={"method": "self_exit"})
    assert "works with vLLM <0.33,>=0.32, but 0.33.1 is installed; install a matching pair" in message


def test_doctor_finds_no_problem_here_and_says_what_is_wrong_elsewhere(monkeypatch: pytest.MonkeyPatch):
    from vllm_earlyexit import doctor, plugin

    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    monkeypatch.delenv("VLLM_EARLYEXIT_DISABLE", raising=False)
    findings = doctor.examine()
    assert findings.problems == []
    assert [row.target for row in findings.seams] == [seam.target for seam in seams.SEAMS]
    monkeypatch.setenv("VLLM_PLUGINS", "something")
    monkeypatch.setenv("VLLM_EARLYEXIT_DISABLE", "1")
    monkeypatch.setattr(plugin, "installed_vllm", lambda: "0.31.0")
    monkeypatch.setattr(doctor, "alias_missing", lambda: True)
    problems = " ".join(doctor.examine().problems)
    for words in ("add 'earlyexit' to it", "unset it", "0.31.0 is installed", "the command 'vllm' does not start"):
        assert words in problems
