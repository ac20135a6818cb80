"""Two processes (gloo) learn what one process would from the joined batch."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from helpers.samples import random_image, random_stage1, random_text
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from blip2_edu.objectives import gather
from blip2_edu.qformer import QFormerConfig
from blip2_edu.stage1 import OBJECTIVES, Blip2Stage1

PROCESSES, ON_EACH = 2, 3
TINY = QFormerConfig.tiny()
CASES = [[7, 8, 8, 9, 7, 6], None]  # image ids that repeat across the processes, and none


def stage1_for(objective: str) -> Blip2Stage1:
    """For ITM so cold that the hardest negative is drawn for certain, whoever draws."""
    model = random_stage1(TINY)
    if objective == "itm":
        model.temperature.data.fill_(1e-5)
    return model


def joined_batch(image_ids: list[int] | None) -> dict:
    count = PROCESSES * ON_EACH
    ids, mask = random_text(TINY, [5, 3, 4, 5, 2, 4])
    return {
        "image_features": random_image(TINY, count, 6),
        "text_ids": ids,
        "text_mask": mask,
        "image_ids": None if image_ids is None else torch.tensor(image_ids),
    }


def part_of(batch: dict, rank: int) -> dict:
    rows = slice(rank * ON_EACH, (rank + 1) * ON_EACH)
    return {name: x if x is None else x[rows] for name, x in batch.items()}


def gradients(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def learn(rank: int, folder: Path) -> None:
    """One process: each loss of its share of every case, the gradients as DDP averages them."""
    torch.set_num_threads(1)
    meeting = f"file://{folder}/meeting"
    dist.init_process_group("gloo", meeting, rank=rank, world_size=PROCESSES)
    results = []
    order = gather(torch.tensor([[10.0 * rank], [10.0 * rank + 1]]))
    whole = gather(torch.tensor([rank, rank + 5]))
    for image_ids in CASES:
        for objective in OBJECTIVES:
            model = DistributedDataParallel(stage1_for(objective), find_unused_parameters=True)
            part = part_of(joined_batch(image_ids), rank)
            loss = model(**part, objectives=[objective])[objective]
            loss.backward()
            results.append((loss.detach(), gradients(model.module)))
    torch.save((order, whole, results), folder / f"{rank}.pt")
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def processes(tmp_path_factory) -> list:
    """What both processes found."""
    folder = tmp_path_factory.mktemp("processes")
    torch.multiprocessing.spawn(learn, (folder,), nprocs=PROCESSES)
    return [torch.load(folder / f"{rank}.pt") for rank in range(PROCESSES)]


def test_gather_keeps_the_order_of_ranks(processes):
    for order, whole, _ in processes:
        assert order.flatten().tolist() == [0, 1, 10, 11]
        assert whole.tolist() == [0, 5, 1, 6] and whole.dtype == torch.int64


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize("case", range(len(CASES)), ids=["repeating ids", "no ids"])
def test_two_processes_equal_one(processes, case, objective):
    """Loss and gradients: of ITM too, whose negatives come from the batches of both."""
    model = stage1_for(objective)
    loss = model(**joined_batch(CASES[case]), objectives=[objective])[objective]
    loss.backward()
    expected = gradients(model)

    number = case * len(OBJECTIVES) + OBJECTIVES.index(objective)
    found = [results[number] for _, _, results in processes]
    mean = torch.stack([loss for loss, _ in found]).mean()
    torch.testing.assert_close(mean, loss.detach(), atol=1e-6, rtol=1e-6)
    for _, shared in found:
        assert shared.keys() >= expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(shared[name], gradient, atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_without_the_others_the_loss_would_differ(objective):
    """So the test above cannot pass by chance, each process looking at its own rows alone."""
    model, batch = stage1_for(objective), joined_batch(CASES[0])
    whole = model(**batch, objectives=[objective])[objective]
    alone = [model(**part_of(batch, rank), objectives=[objective])[objective] for rank in range(2)]
    assert (sum(alone) / 2 - whole).abs() > 1e-3
