import pytest
import torch

from rorqual.errors import UserError
from rorqual.kernels.devices import find_device


@pytest.fixture
def gpus(monkeypatch):
    """Sets how many GPUs PyTorch finds, and for how many processes here."""

    def found(count, processes=1, place=0):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: count > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
        monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setenv("LOCAL_RANK", str(place))
        return chosen

    chosen = []
    return found


@pytest.mark.parametrize(
    ("name", "found", "expected"),
    [
        ("auto", (0,), "cpu"),
        ("auto", (1,), "cuda:0"),
        ("auto", (1, 2), "cpu"),  # one for each process, or none
        ("auto", (8, 4, 3), "cuda:3"),
        ("cuda", (2, 2, 1), "cuda:1"),
        ("cpu", (8,), "cpu"),
    ],
)
def test_a_process_takes_its_own_gpu(gpus, name, found, expected):
    chosen = gpus(*found)
    device = find_device(name)
    assert device == torch.device(expected)
    assert chosen == ([] if expected == "cpu" else [device.index])


@pytest.mark.parametrize(("found", "said"), [((0,), "PyTorch finds no GPU"), ((2, 4), "4 processes .* there are 2")])
def test_too_few_are_refused(gpus, found, said):
    gpus(*found)
    with pytest.raises(UserError, match=said):
        find_device("cuda")
