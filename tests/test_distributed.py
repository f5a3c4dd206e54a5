"""Two processes on the CPU: the same gradients as one, with adapters that are switched off, and whole files."""

from __future__ import annotations

import os
import socket

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from veneer import LoraConfig, get_peft_model
from veneer.core import checkpoint
from veneer.core.state import state_of

from . import models
from .cases import ONE_EACH, without_dropout

OF_THE_BATCH = ("poly", "pvera", "lily", "velora", "monteclora")
"""Methods that draw at random in training, or look at all rows together: two processes cannot agree with one."""
CASES = [without_dropout(c) for c in ONE_EACH if c.model == "llama" and c.method not in ("xlora", *OF_THE_BATCH)]


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def run(rank: int, work, port: int, *args) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), TRANSFORMERS_VERBOSITY="error")
    dist.init_process_group("gloo", rank=rank, world_size=2)
    try:
        work(rank, *args)
    finally:
        dist.destroy_process_group()


def both(work, *args) -> None:
    mp.start_processes(run, (work, free_port(), *args), nprocs=2, start_method="fork")


def train(model, inner, rows, case, steps: int = 3) -> list[torch.Tensor]:
    """A few steps; returns the adapter."""
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(learned, lr=0.05)
    facts = {name: values[rows] for name, values in case.facts_of(4).items()}
    for step in range(steps):
        ids = torch.randint(3, 67, (4, 6), generator=torch.Generator().manual_seed(step))[rows]
        model(input_ids=ids, labels=ids, **facts).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return [whole(p) for p in state_of(inner.get_base_model()).parameters("default")]


def whole(t: torch.Tensor) -> torch.Tensor:
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).detach().clone()


def of_file(model) -> list[torch.Tensor]:
    """What the file holds: made of the parameters, where it is not the parameters themselves."""
    return [whole(t) for t in checkpoint.slots(state_of(model.get_base_model()), "default").values()]


def alone(case):
    """The model that one process trains, and its adapter."""
    model = case.build().train()
    model.add_adapter("idle", LoraConfig(r=3))
    return model, train(model, model, slice(None), case)


def with_ddp(rank: int) -> None:
    from torch.nn.parallel import DistributedDataParallel

    for case in CASES:
        model = case.build().train()
        model.add_adapter("idle", LoraConfig(r=3))
        found = train(DistributedDataParallel(model), model, slice(2 * rank, 2 * rank + 2), case)
        for a, b in zip(found, alone(case)[1], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}")


def with_fsdp(rank: int, where: str) -> None:
    from torch.distributed.fsdp import fully_shard

    for case in CASES:
        if case.method in ("adalora", "kasa"):
            continue  # their losses, and AdaLoRA's allocation, look at whole factors, which are sharded here
        model = case.build().train()
        model.add_adapter("idle", LoraConfig(r=3))
        base = model.get_base_model()
        for layer in base.model.layers:
            fully_shard(layer)
        fully_shard(base)
        found = train(model, model, slice(2 * rank, 2 * rank + 2), case)
        single, expected = alone(case)
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}")
        model.save_pretrained(f"{where}/{case}", selected_adapters=["default"], is_main_process=rank == 0)
        dist.barrier()
        if rank == 0:
            loaded = case.load(f"{where}/{case}")
            for a, b in zip(of_file(loaded), of_file(single), strict=True):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, msg=lambda m, c=case: f"{c}: {m}")
            if case.method != "p_tuning":  # its file holds what the encoder made of them
                for a, b in zip(state_of(loaded.get_base_model()).parameters("default"), found, strict=True):
                    assert torch.equal(a, b), case


@pytest.mark.filterwarnings("ignore")
def test_ddp_equals_one_process_with_an_idle_adapter():
    both(with_ddp)


@pytest.mark.filterwarnings("ignore")
def test_fsdp2_equals_one_process_and_saves_whole_files(tmp_path):
    both(with_fsdp, str(tmp_path))


def test_the_idle_adapter_asks_for_no_gradient():
    model = get_peft_model(models.build("llama"), LoraConfig(r=4), "one")
    model.add_adapter("two", LoraConfig(r=3))
    state = state_of(model.get_base_model())
    assert all(p.requires_grad for p in state.parameters("one"))
    assert not any(p.requires_grad for p in state.parameters("two"))
    model.set_adapter("two")
    assert not any(p.requires_grad for p in state.parameters("one"))
    assert all(p.requires_grad for p in state.parameters("two"))
    model.set_requires_grad("two", False)
    model.set_adapter("one")
    model.set_adapter("two")
    assert not any(p.requires_grad for p in state.parameters("two"))
