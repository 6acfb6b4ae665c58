import pytest
import torch


@pytest.fixture(autouse=True)
def one_thread():
    """The models here are tiny; more threads only wait for one another."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
