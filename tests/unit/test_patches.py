import importlib.util
import shutil
from pathlib import Path

import pytest
import torch

from tests.patched import PATCHES, apply, changed, installed

FILE = Path("vllm/v1/sample/rejection_sampler.py")


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """The files of the installed vLLM that patches change, in a source tree of their own."""
    for name in changed():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(installed() / name, tmp_path / name)
    return tmp_path


def content(tree: Path) -> dict[str, bytes]:
    return {str(path.relative_to(tree)): path.read_bytes() for path in tree.rglob("*") if path.is_file()}


def test_patches_apply_once_and_are_taken_back_to_the_byte(tree: Path):
    before = content(tree)
    assert apply(tree).returncode == 0
    after = content(tree)
    assert all(after[name] != before[name] for name in before)
    again = apply(tree)
    assert again.returncode == 1
    assert "as asked for already; nothing was changed" in again.stderr
    assert content(tree) == after
    assert apply(tree, "--reverse").returncode == 0
    assert content(tree) == before
    assert "as asked for already" in apply(tree, "--reverse").stderr


def test_an_unknown_state_is_left_alone(tree: Path):
    """Half of it done, or a file changed otherwise."""
    before = content(tree)
    changed_by_hand = tree / "vllm/sampling_params.py"
    changed_by_hand.write_text(
        changed_by_hand.read_text().replace("Some sampling parameters are", "Few sampling parameters are")
    )
    edited = content(tree)
    assert "was changed otherwise; nothing was changed" in apply(tree).stderr
    assert content(tree) == edited != before


def test_the_readme_says_how_large_the_patch_is():
    lines = (PATCHES / "vllm-0.32.0" / "self-exit.patch").read_text().splitlines()
    added = sum(line.startswith("+") and not line.startswith("+++") for line in lines)
    removed = sum(line.startswith("-") and not line.startswith("---") for line in lines)
    files = sum(line.startswith("+++") for line in lines)
    said = " ".join((PATCHES / "README.md").read_text().split())
    assert f"{added} lines are added and {removed} taken away, in {files} files" in said


def test_a_folder_without_vllm_is_named(tmp_path: Path):
    assert "holds no folder vllm" in apply(tmp_path).stderr


def test_the_patched_function_expands_on_cpu(tree: Path):
    assert apply(tree).returncode == 0
    spec = importlib.util.spec_from_file_location("patched_rejection_sampler", tree / FILE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    cumulative = torch.tensor([2, 2, 5], dtype=torch.int32)
    temperature = torch.tensor([0.7, 9.0, 0.0])
    expanded = module.expand_batch_to_tokens(temperature, cumulative, 5, replace_from=0, replace_to=1)
    assert expanded.tolist() == pytest.approx([0.7, 0.7, 1.0, 1.0, 1.0])
