"""Memory that a paused run gives back."""

import pytest
import torch

from nanochat.run.parking import in_host_memory


def test_tensors_come_back_as_the_same_objects_with_their_views():
    torch.manual_seed(0)
    whole = torch.randn(6, 5)
    tensors = {"whole": whole, "a view of it": whole[2:], "another": torch.arange(7)}
    tensors["parameter"] = torch.nn.Parameter(torch.randn(3, 3))
    expected = {name: tensor.detach().clone() for name, tensor in tensors.items()}
    addresses = {name: id(tensor) for name, tensor in tensors.items()}
    # any device but a CPU, whose memory is host memory
    with in_host_memory(tensors.values(), "mps"):
        assert [t.untyped_storage().nbytes() for t in tensors.values()] == [0, 0, 0, 0]
    assert {name: id(tensor) for name, tensor in tensors.items()} == addresses
    assert all(torch.equal(tensors[name], expected[name]) for name in tensors)
    whole[2:] = 1
    assert tensors["a view of it"].eq(1).all()


def test_tensors_come_back_after_an_exception():
    tensor = torch.arange(4)
    with pytest.raises(KeyboardInterrupt):
        with in_host_memory([tensor], "mps"):
            raise KeyboardInterrupt
    assert tensor.tolist() == [0, 1, 2, 3]


def test_on_a_cpu_nothing_moves():
    tensor = torch.arange(4)
    with in_host_memory([tensor], "cpu"):
        assert tensor.tolist() == [0, 1, 2, 3]
