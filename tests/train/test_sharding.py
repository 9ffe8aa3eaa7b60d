"""FSDP2: a sharded student and its sharded teacher, on two processes."""

import json

import pytest
import torch
from torch import distributed, multiprocessing
from torch.distributed import checkpoint
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_state_dict,
    set_state_dict,
)
from torch.distributed.fsdp import fully_shard

from bitlm import Training
from bitlm.quantizers import initialise
from bitlm.scheme import Scheme
from bitlm.train import finish, prepare
from tests import zoo
from tests.train.models import batch, lively

RATE = 1e-3


def student():
    """Return a student whose quantizers have seen a batch, on each process the same."""
    model = prepare(lively("llama_tied"), Scheme(planes=2, group_size="row"), skip=["lm_head"],
                    training=Training(learned=True), placement=("tbt", 1),
                    embeddings=Scheme("ternary", group_size="row"))
    initialise(model, **batch("llama_tied"))
    return model.train()


def sharded(model):
    """Shard a model, block by block, in place."""
    for block in model.model.layers:
        fully_shard(block)
    fully_shard(model)
    return model


def distil(model, teacher, optimizer, steps, rank):
    """Train some steps on the rows of this process; return the losses."""
    ids, losses = batch("llama_tied")["input_ids"][rank::2], []
    for _ in range(steps):
        optimizer.zero_grad()
        with torch.no_grad():
            wanted = teacher(ids).logits
        loss = (model(ids).logits - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def work(rank, directory):
    """Train 2 steps, save, train 2 more; then resume from what was saved. Run on each process."""
    distributed.init_process_group("gloo", init_method=f"file://{directory}/meet", rank=rank,
                                   world_size=2)
    torch.set_num_threads(1)
    teacher = sharded(lively("llama_tied").requires_grad_(False))
    model = sharded(student())
    optimizer = torch.optim.AdamW(model.parameters(), RATE)
    first = distil(model, teacher, optimizer, 2, rank)
    states = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer)))
    checkpoint.save(states, checkpoint_id=f"{directory}/saved")
    whole = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True,
                                                                 cpu_offload=True))
    if rank == 0:
        model.save_pretrained(f"{directory}/training", state_dict=whole)
    losses = distil(model, teacher, optimizer, 2, rank)

    again = sharded(student())
    optimizer = torch.optim.AdamW(again.parameters(), RATE)
    states = dict(zip(("model", "optimizer"), get_state_dict(again, optimizer)))
    checkpoint.load(states, checkpoint_id=f"{directory}/saved")
    set_state_dict(again, optimizer, model_state_dict=states["model"],
                   optim_state_dict=states["optimizer"])
    resumed = distil(again, teacher, optimizer, 2, rank)
    with pytest.raises(ValueError, match="are sharded: save it"):
        finish(again)
    with open(f"{directory}/losses{rank}.json", "w") as file:
        json.dump({"first": first, "whole": losses, "resumed": resumed}, file)
    distributed.destroy_process_group()


def test_a_sharded_student_resumes_with_the_same_losses(tmp_path):
    multiprocessing.spawn(work, args=(str(tmp_path),), nprocs=2)
    found = [json.loads((tmp_path / f"losses{rank}.json").read_text()) for rank in range(2)]
    for own in found:
        assert own["whole"] == own["resumed"] and len(own["whole"]) == 2
    # One process does the same: each of the two had half of the rows.
    alone, teacher, ids = student(), lively("llama_tied"), batch("llama_tied")["input_ids"]
    optimizer, losses = torch.optim.AdamW(alone.parameters(), RATE), []
    with torch.no_grad():
        wanted = teacher(ids).logits
    for _ in range(2):
        optimizer.zero_grad()
        loss = (alone(ids).logits - wanted).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    means = [sum(pair) / 2 for pair in zip(*(own["first"] for own in found))]
    assert losses == pytest.approx(means, rel=0.01)
    # What was saved is a checkpoint like any other.
    model = zoo.auto_class("llama_tied").from_pretrained(tmp_path / "training")
    with torch.no_grad():
        loss = (model.train()(ids[::2]).logits - wanted[::2]).square().mean()
    assert loss.item() == pytest.approx(found[0]["whole"][0], rel=1e-5)
    assert finish(model)(ids).logits.isfinite().all()
