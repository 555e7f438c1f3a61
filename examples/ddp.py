"""Train a small network on two processes under DistributedDataParallel, with koopt and without.

torchrun --nproc-per-node 2 examples/ddp.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import koopt

STEPS = 400


def data(rank):
    """Each process has points of its own."""
    x = torch.linspace(-3, 3, 128, dtype=torch.float64)[rank::2, None]
    return x, torch.sin(2 * x) + 0.5 * x


def train(jumping):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(1, 16), nn.Tanh(), nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1)).double()
    model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(model.parameters(), lr=0.004)
    x, y = data(dist.get_rank())
    koop = None
    if jumping:  # the guard sees the points of its process; koopt takes the mean over all of them
        koop = koopt.attach(optimizer, model, guard=lambda: mse_loss(model(x), y))
    losses = []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = mse_loss(model(x), y)
        loss.backward()
        optimizer.step()
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        losses.append(mean.item() / dist.get_world_size())
    return losses, koop


def main():
    dist.init_process_group("gloo")
    torch.set_num_threads(1)
    plain, _ = train(jumping=False)
    losses, koop = train(jumping=True)
    reached = next((step for step, loss in enumerate(losses, 1) if loss <= plain[-1]), None)
    if dist.get_rank() == 0:
        guards = sum(jump.evaluations for jump in koop.jumps)
        accepted = sum(jump.accepted for jump in koop.jumps)
        print(f"loss after {STEPS} steps: {plain[-1]:.2e} plain, {losses[-1]:.2e} with koopt")
        print(f"the plain run's loss is reached at step {reached}; {accepted} jumps, {guards} guard evaluations in all")
    dist.barrier()  # gloo may abort a process whose peer has gone before
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
