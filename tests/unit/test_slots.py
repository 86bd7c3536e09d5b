import torch

from vllm_earlyexit.engine.rounds import slots_of


def test_slots_follow_the_block_table():
    blocks = torch.tensor([[7, 3, 0], [4, 9, 2]], dtype=torch.int32)
    positions = torch.tensor([17, 40])
    assert slots_of(blocks, positions, 16).tolist() == [3 * 16 + 1, 2 * 16 + 8]
