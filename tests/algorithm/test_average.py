"""The moving average of tensors, computed by hand."""

import pytest
import torch

from utils.algorithm.average import lent, move_average


def test_three_steps_by_hand():
    values = [(1.0, 8.0), (3.0, 0.0), (5.0, 4.0)]
    average = None
    seen = []
    for a, b in values:
        tensors = {"a": torch.tensor([a], requires_grad=True), "b": torch.tensor([b])}
        average = move_average(average, tensors, 0.75)
        seen.append((float(average["a"]), float(average["b"])))
        assert (tensors["a"].item(), tensors["b"].item()) == (a, b)
    # first a copy, then 3/4 of the average and 1/4 of the new value
    assert seen == [(1.0, 8.0), (1.5, 6.0), (2.375, 5.5)]
    assert not average["a"].requires_grad


def test_the_first_average_is_a_copy_with_the_same_memory_format():
    weight = torch.rand(2, 3, 2, 2).contiguous(memory_format=torch.channels_last)
    average = move_average(None, {"weight": weight}, 0.9)
    assert average["weight"].data_ptr() != weight.data_ptr()
    assert average["weight"].stride() == weight.stride()


def test_lent_averages_leave_also_after_an_error():
    weight = torch.nn.Parameter(torch.ones(2))
    place, twos = weight.data_ptr(), torch.full((2,), 2.0)

    def evaluate_badly() -> None:
        with lent({"weight": weight, "other": torch.zeros(1)}, {"weight": twos}):
            assert weight.tolist() == [2, 2]
            raise KeyError

    with pytest.raises(KeyError):
        evaluate_badly()
    assert weight.tolist() == [1, 1]
    assert weight.data_ptr() == place
