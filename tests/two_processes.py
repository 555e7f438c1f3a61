"""Two real processes that are kept for many tests, and the runs that they make together."""

import contextlib
import datetime
import math
import os
import signal
import tempfile
import traceback
import warnings
from dataclasses import asdict

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import torch.multiprocessing as mp
from live_tasks import data, network
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import mse_loss
from torch.nn.parallel import DistributedDataParallel

import koopt
from koopt.exchange import counting

SECONDS = 20  # after which a process that waits gives up
OPTIONS = {"cycle": 12, "tail": 8, "window": 8, "max_overhead": 0.5}


class Pair:
    """Two processes with one process group; `both(function, ...)` runs it in each, and returns what each returned."""

    def __init__(self, size=2, backend="gloo"):
        self.folder = tempfile.TemporaryDirectory()
        context = mp.get_context("spawn")
        self.pipes, self.processes = [], []
        for rank in range(size):
            own, other = context.Pipe()
            process = context.Process(target=_serve, args=(rank, size, backend, self.folder.name, other), daemon=True)
            process.start()
            other.close()
            self.pipes.append(own)
            self.processes.append(process)

    def start(self, function, *args, **kwargs):
        for pipe in self.pipes:
            pipe.send((function, args, kwargs))

    def answers(self):
        """What each returned: ("returned", value), ("raised", traceback), or None of a process that is gone."""
        found = []
        for pipe in self.pipes:
            answer = None
            with contextlib.suppress(EOFError):
                answer = pipe.recv() if pipe.poll(3 * SECONDS) else None
            found.append(answer)
        return found

    def both(self, function, *args, **kwargs):
        self.start(function, *args, **kwargs)
        answers = self.answers()
        assert all(answer is not None and answer[0] == "returned" for answer in answers), answers
        return [answer[1] for answer in answers]

    def close(self):
        for pipe in self.pipes:
            pipe.close()
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


def _serve(rank, size, backend, folder, pipe):
    os.environ.update(GLOO_SOCKET_IFNAME="lo", RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    timeout = datetime.timedelta(seconds=SECONDS)
    dist.init_process_group(backend, init_method=f"file://{folder}/meet", rank=rank, world_size=size, timeout=timeout)
    with contextlib.suppress(EOFError, BrokenPipeError):
        while True:
            function, args, kwargs = pipe.recv()
            try:
                pipe.send(("returned", function(*args, **kwargs)))
            except Exception:
                pipe.send(("raised", traceback.format_exc()))


class Training:
    """A small network, trained alone or by several processes in one of the ways that PyTorch has for that."""

    def __init__(self, kind, width=8, dtype=torch.float64, own_data=False, device="cpu", **options):
        self.kind = kind
        self.model = network(dtype)
        if width != 8:
            torch.manual_seed(0)
            self.model = torch.nn.Sequential(torch.nn.Linear(3, width), torch.nn.Tanh(), torch.nn.Linear(width, 1))
            self.model = self.model.to(dtype)
        self.model.to(device)
        if kind == "ddp":
            self.model = DistributedDataParallel(self.model)
        elif kind == "fsdp":
            mesh = init_device_mesh(device, (dist.get_world_size(),))
            fully_shard(self.model[0], mesh=mesh)
            fully_shard(self.model, mesh=mesh)  # the root keeps whole weights after a forward pass
        self.optimizer = torch.optim.Adam(self.model.parameters(), lr=0.01)
        self.x, self.y = (part.to(device) for part in data(dtype, seed=1 + (dist.get_rank() if own_data else 0)))
        guard = options.pop("guard", self.loss)
        self.koop = koopt.attach(self.optimizer, self.model, guard, **({"mode": "jump"} | OPTIONS | options))

    def loss(self):
        return mse_loss(self.model(self.x), self.y)

    def step(self):
        self.optimizer.zero_grad()
        self.loss().backward()
        if self.kind == "torchrun":  # gradients averaged by hand
            for parameter in self.model.parameters():
                dist.all_reduce(parameter.grad)
                parameter.grad /= dist.get_world_size()
        self.optimizer.step()

    def run(self, steps=60):
        for _ in range(steps):
            self.step()
        return self

    @property
    def weights(self):
        whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in self.model.parameters()]
        return torch.cat([tensor.detach().flatten() for tensor in whole])

    @property
    def jumps(self):
        return [{k: v for k, v in asdict(jump).items() if k != "seconds"} for jump in self.koop.jumps]


def trained(kind, steps=60, **options):
    task = Training(kind, **options).run(steps)
    forecast = task.koop.forecast()
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in forecast.values()]
    return {
        "jumps": task.jumps,
        "weights": task.weights.cpu(),
        "forecast": torch.cat([p.flatten() for p in whole]).cpu(),
    }


def in_eigenbases(kind, steps=30, unlike=None, **options):
    """A run whose moves are made in eigenbases; after step `unlike` weights differ by rounding."""
    task = Training(kind, **({"mode": "auto", "history": 0, "precondition": 16} | options))
    alike = []
    for step in range(steps):
        task.step()
        if step == unlike and dist.get_rank() == 1:
            with torch.no_grad():
                task.model.module[0].weight *= 1 + 2**-52
        alike.append(koopt.distributed.fingerprint(task.model.parameters()))
    return {"weights": task.weights, "count": task.koop.preconditioned, "prints": alike}


def under_noise(steps=60, **options):
    """How many moves are made in eigenbases by default, on batches of each process's own; the weights."""
    generator = torch.Generator().manual_seed(dist.get_rank())
    scales = torch.logspace(0, -2, 12)
    torch.manual_seed(0)
    model = DistributedDataParallel(torch.nn.Linear(12, 4, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.02)

    def loss(count, noise):
        x = torch.randn(count, 12, generator=generator) * scales
        y = x.sum(1, keepdim=True) + noise * torch.randn(count, 4, generator=generator)
        return mse_loss(model(x), y)

    koop = koopt.attach(optimizer, model, guard=lambda: loss(100, 0.0), **options)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(4, 0.3).backward()
        optimizer.step()
    return {"count": koop.preconditioned, "weights": model.module.weight.detach(), "reason": koop.jumps[-1].reason}


def longer_sides(examples):
    """The weights that have bases after two steps with so many examples in each process."""
    model = DistributedDataParallel(torch.nn.Linear(300, 300))
    optimizer = torch.optim.Adam(model.parameters())
    koop = koopt.attach(optimizer, model, guard=lambda: 1.0)
    for _ in range(2):
        model(torch.ones(examples[dist.get_rank()], 300)).sum().backward()
        optimizer.step()
    return list(koop._bases.matrices)


def tensor_parallel():
    """The loss and jumps of a network whose layers are split over the processes."""
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    task = Training("one", group=None)
    task.koop.detach()
    plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
    task.model = parallelize_module(task.model, init_device_mesh("cpu", (dist.get_world_size(),)), plan)
    task.optimizer = torch.optim.Adam(task.model.parameters(), lr=0.01)
    task.koop = koopt.attach(task.optimizer, task.model, task.loss, mode="jump", **OPTIONS)
    task.run(30)
    return {"jumps": task.jumps, "weights": task.weights}


def bowed(kind, steps=30, at=None, what=None):
    """A run whose guard adds the process's number, and at one call does what is asked, in the second process only."""
    calls, rank = [], dist.get_rank()

    def guard():
        calls.append(None)
        loss = task.loss() + rank  # first, since under FSDP2 it needs the other process
        if len(calls) == at and rank == 1:
            what()
        return loss + (math.nan if len(calls) == at and rank == 1 and what is nothing else 0.0)

    task = Training(kind, guard=guard)
    error = None
    try:
        task.run(steps)
    except (ValueError, LookupError, RuntimeError) as caught:
        error = f"{type(caught).__name__}: {caught}"
    return {"jumps": task.jumps, "weights": task.weights, "error": error, "held": task.koop._weights.holder}


def nothing():
    """The guard is not a number then."""


def fail():
    raise LookupError("no such batch")


def die():
    os.kill(os.getpid(), signal.SIGKILL)


def survives(kind, folder):
    """Save, and then lose the other process in the middle of a jump: what it says, and whether the weights are back."""
    calls, now = [], []

    def guard():
        calls.append(None)
        if len(calls) == 1:
            now.extend(tensor.clone() for tensor in task.koop._weights.parameters)
        if len(calls) == 4 and dist.get_rank() == 1:
            die()
        return 1.0 / len(calls)

    task = Training(kind, guard=guard)
    task.run(11)
    save(task, folder)
    try:
        task.step()
    except RuntimeError as caught:
        return str(caught), all(map(torch.equal, now, task.koop._weights.parameters)), len(calls)
    return "no error", False, len(calls)


def state_of(task):
    model, optimizer = get_state_dict(task.model, task.optimizer)
    return {"model": model, "optimizer": optimizer, "koop": task.koop}


def save(task, folder):
    dcp.save(state_of(task), checkpoint_id=str(folder), no_dist=not dist.is_initialized())


def resume(task, folder):
    state = state_of(task)
    dcp.load(state, checkpoint_id=str(folder), no_dist=not dist.is_initialized())
    set_state_dict(task.model, task.optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])
    return task


def interrupted(kind, folder, **options):
    """A run of 30 steps that is saved in the middle of a cycle."""
    task = Training(kind, **options).run(18)
    save(task, folder)
    task.run(12)
    return {"jumps": task.jumps, "weights": task.weights}


def resumed(kind, folder, **options):
    task = resume(Training(kind, **options), folder).run(12)
    return {"jumps": task.jumps, "weights": task.weights}


def exchanged(kind, width):
    """Bytes of one attempt at 40 snapshots, and of one forecast of 56 block means."""
    options = {"cycle": 80, "tail": 80, "window": 56, "max_overhead": 1.0}
    with counting() as recording:
        task = Training(kind, width=width, mode="auto", **options)
        task.optimizer.param_groups[0]["lr"] = 1e-4  # at a higher rate the wide network oscillates
        attached = recording.bytes
        task.run(79)
        recorded = recording.bytes - attached
    with counting() as forecast:
        task.koop.forecast()
        task.koop.forecast(10)
    with counting() as cycle:
        task.run(1)
    return {"recorded": recorded, "cycle": cycle.bytes, "forecast": forecast.bytes, "jump": task.jumps[-1]}


def exchanged_along_secants(kind, width):
    """Bytes of one step along secants; its record."""
    task = Training(kind, width=width, cycle=100, tail=30, max_overhead=1.0, history=50)
    while not task.jumps:
        with counting() as step:
            task.run(1)
    return {"bytes": step.bytes, "step": task.jumps[-1]}


def other_weights():
    model = network()
    with torch.no_grad():
        model[0].weight += dist.get_rank()
    return said(model)


def flat_parameters():
    from torch.distributed.fsdp import FullyShardedDataParallel

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return said(FullyShardedDataParallel(network(), device_id=torch.device("cpu")))


def other_options():
    return said(network(), cycle=100 + dist.get_rank())


def alone_of_shards():
    model = network()
    fully_shard(model)
    return said(model, group=None)


def bases_of_shards():
    model = network()
    fully_shard(model)
    return said(model, torch.optim.Adam, precondition=16)


def said(model, make=torch.optim.SGD, **options):
    """What attach() has against a model."""
    try:
        koopt.attach(make(model.parameters(), lr=0.1), model, **options)
    except ValueError as error:
        return str(error)
    return ""


def each_alone():
    """Processes that train models of their own."""
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 1 + dist.get_rank())
    koop = koopt.attach(torch.optim.SGD(model.parameters(), lr=0.1), model, group=None)
    return {name: tuple(weights.shape) for name, weights in koop.forecast().items()}
