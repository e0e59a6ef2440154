"""Processes that calibrate together find what one process finds."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as distributed
from safetensors.torch import load_file

from sparc.diag import PassError
from sparc.ranks import Ranks
from tests.ranks_worker import BATCHES, found, main


def test_two_processes_find_what_one_finds(tmp_path: Path) -> None:
    worker = subprocess.Popen([sys.executable, "-m", "tests.ranks_worker", "1", "2", str(tmp_path)])
    expected = found()
    main(0, 2, tmp_path)
    assert worker.wait(timeout=120) == 0
    first, second = (load_file(tmp_path / f"{rank}.safetensors") for rank in range(2))
    assert first.keys() == second.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(first[name], second[name]), name
        assert first[name].dtype == tensor.dtype
        torch.testing.assert_close(first[name], tensor, rtol=1e-6, atol=1e-6)


def test_each_batch_is_one_processs() -> None:
    batches = list(range(BATCHES))
    shares = {batch: (rank, index) for rank in range(4) for index, batch in enumerate(Ranks(rank, 4).share(batches))}
    assert sorted(shares) == batches
    assert all(Ranks(rank, 4).number(index) == batch for batch, (rank, index) in shares.items())


def test_alone_without_torch_distributed() -> None:
    assert Ranks.current() == Ranks(0, 1)


def test_processes_that_cannot_exchange_tensors_of_the_cpu_are_told_so(tmp_path: Path) -> None:
    distributed.init_process_group(
        "cuda:gloo", store=distributed.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1
    )
    try:
        with pytest.raises(PassError, match="SPARC218") as error:
            Ranks.current()
        assert "cuda:gloo" in error.value.diagnostic.why
    finally:
        distributed.destroy_process_group()
