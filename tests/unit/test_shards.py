"""Records on disk: whole or not there, and only of one model."""

import errno
from pathlib import Path

import pytest
import torch

from vllm_earlyexit.errors import EarlyExitError
from vllm_earlyexit.training.data import Window
from vllm_earlyexit.training.packs import Records
from vllm_earlyexit.training.shards import (
    Batch,
    RecordsConfig,
    Shard,
    is_held_out,
    open_records,
    shards,
    window_key,
    write_shard,
)

CONFIG = RecordsConfig(
    base_model="tiny", fingerprint="0" * 64, exit_layers=(1, 2), num_layers=4, hidden_size=8, vocab_size=32, top_k=3
)


def windows(count: int, length: int = 10) -> list[Window]:
    scored = [n % 2 == 0 for n in range(length)]
    return [Window([(7 * k + n) % 32 for n in range(length)], scored, f"document {k}") for k in range(count)]


def batch(items: list[Window], config: RecordsConfig = CONFIG) -> Batch:
    tokens, targets = sum(len(w.ids) for w in items), sum(sum(w.scored) for w in items)
    return Batch(
        windows=torch.tensor([window_key(w) for w in items]),
        lengths=torch.tensor([len(w.ids) for w in items]),
        ids=torch.tensor([i for w in items for i in w.ids], dtype=torch.int32),
        scored=torch.tensor([s for w in items for s in w.scored]),
        hidden={layer: torch.randn(tokens, config.hidden_size).bfloat16() for layer in config.layers},
        final=torch.randn(tokens, config.hidden_size).bfloat16(),
        top_ids=torch.randint(32, (targets, config.top_k), dtype=torch.int32),
        top_p=torch.rand(targets, config.top_k).half(),
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    open_records(tmp_path / "records", CONFIG)
    for number in range(3):
        write_shard(tmp_path / "records", number, CONFIG, batch(windows(20)))
    return tmp_path / "records"


def test_a_shard_reads_back_any_of_its_windows(tmp_path: Path):
    whole = batch(windows(5))
    shard = Shard(write_shard(tmp_path, 0, CONFIG, whole), CONFIG)
    part = shard.read(1, 3)
    assert torch.equal(part.ids, whole.ids[10:30])
    assert torch.equal(part.scored, whole.scored[10:30])
    assert torch.equal(part.hidden[3], whole.hidden[3][10:30])
    assert torch.equal(part.top_ids, whole.top_ids[5:15])
    assert torch.equal(part.windows, whole.windows[1:3])
    assert shard.read(0, 5, layers=()).hidden == {}


def test_every_window_is_either_trained_on_or_held_out(folder: Path):
    records = Records([folder])
    sides = [records.packs(25, (1,), 0.4, which) for which in (False, True)]
    keys = [[key for n in range(len(side)) for key in side[n].windows[:, 1].tolist()] for side in sides]
    documents = [{d for n in range(len(side)) for d in side[n].windows[:, 0].tolist()} for side in sides]
    assert len(keys[0]) + len(keys[1]) == 60
    assert documents[0]
    assert documents[1]
    assert documents[0].isdisjoint(documents[1])
    assert all(len(side[n].ids) <= 25 for side in sides for n in range(len(side)))
    assert all(set(side[n].hidden) == {1} for side in sides for n in range(len(side)))
    scored = torch.cat(list(records.choices(0.4, True)))
    assert len(scored) == sum(sides[1].scored_tokens())


def test_a_larger_held_out_share_only_adds_documents():
    keys = [window_key(w)[0] for w in windows(500)]
    small, large = ({k for k in keys if is_held_out(k, share)} for share in (0.05, 0.2))
    assert small < large
    assert 50 < len(large) < 150


def damage_truncate(path: Path) -> None:
    data = path.read_bytes()
    path.write_bytes(data[: len(data) // 2])


def damage_garbage(path: Path) -> None:
    path.write_bytes(b"\xff" * 500)


def damage_foreign(path: Path) -> None:
    other = CONFIG.model_copy(update={"fingerprint": "1" * 64})
    write_shard(path.parent, 1, other, batch(windows(3)))


def damage_shape(path: Path) -> None:
    short = CONFIG.model_copy(update={"hidden_size": 4})
    wrong = batch(windows(3), short)
    write_shard(path.parent, 1, CONFIG, wrong)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (damage_truncate, "damaged"),
        (damage_garbage, "damaged"),
        (damage_foreign, "foreign"),
        (damage_shape, "wrong size"),
    ],
)
def test_a_bad_shard_is_named_and_skipped(folder: Path, damage, word: str):
    damage(folder / "shard-00001.safetensors")
    said: list[str] = []
    records = Records([folder], said.append)
    assert len(records.shards) == 2
    assert len(said) == 1
    assert "shard-00001.safetensors" in said[0]
    assert word in said[0]


def test_a_full_disk_is_said_and_leaves_only_whole_shards(folder: Path, monkeypatch: pytest.MonkeyPatch):
    def full(tensors: object, path: Path, metadata: object) -> None:
        path.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vllm_earlyexit.training.shards.save_file", full)
    with pytest.raises(EarlyExitError, match="the disk is full; what is complete is kept"):
        write_shard(folder, 3, CONFIG, batch(windows(2)))
    assert sorted(path.name for path in folder.iterdir()) == [
        "records.json",
        *(f"shard-0000{n}.safetensors" for n in range(3)),
    ]
    assert all(isinstance(shard, Shard) for shard in shards(folder, CONFIG))


def test_a_shard_that_was_being_written_is_not_read(folder: Path):
    (folder / "shard-00003.partial").write_bytes(b"half a shard")
    assert len(Records([folder]).shards) == 3


def test_folders_that_hold_something_else_are_refused(folder: Path, tmp_path: Path):
    with pytest.raises(EarlyExitError, match="another fingerprint, top_k; choose another folder"):
        open_records(folder, CONFIG.model_copy(update={"fingerprint": "1" * 64, "top_k": 5}))
    (tmp_path / "thesis.tex").write_text("precious")
    with pytest.raises(EarlyExitError, match="not empty"):
        open_records(tmp_path, CONFIG)
    with pytest.raises(EarlyExitError, match="make them with 'vllm-earlyexit collect'"):
        Records([tmp_path / "nothing"])


def test_an_empty_records_folder_is_said(tmp_path: Path):
    open_records(tmp_path / "empty", CONFIG)
    with pytest.raises(EarlyExitError, match="no usable shard"):
        Records([tmp_path / "empty"])


def test_records_of_different_models_do_not_mix(folder: Path, tmp_path: Path):
    open_records(tmp_path / "other", CONFIG.model_copy(update={"top_k": 4}))
    with pytest.raises(EarlyExitError, match="different models, cuts or top_k"):
        Records([folder, tmp_path / "other"])
