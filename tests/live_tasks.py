"""Training runs in the forms that users give them, and a quadratic whose jumps are known."""

import io
import math

import torch
from torch import nn
from torch.nn.functional import mse_loss

import koopt

SHORT = {"history": 0, "cycle": 12, "tail": 8, "window": 8, "max_overhead": 0.2}


def network(dtype=torch.float32, extra=()):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 8), nn.Tanh(), *extra, nn.Linear(8, 1)).to(dtype)


def data(dtype=torch.float32, seed=1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(32, 3, generator=generator, dtype=torch.float64)
    return x.to(dtype), (x[:, :1] * x[:, 1:2]).sin().to(dtype)


def flat(model):
    return torch.cat([p.detach().double().flatten() for p in model.parameters()])


def bits(model, optimizer):
    """Everything that a run leaves behind, as bytes."""
    stream = io.BytesIO()
    tensors = [*model.state_dict().values()]
    for state in optimizer.state_dict()["state"].values():
        tensors += [value for value in state.values() if isinstance(value, torch.Tensor)]
    tensors += [torch.tensor([float(group["lr"]) for group in optimizer.param_groups]), torch.get_rng_state()]
    if torch.cuda.is_initialized():
        tensors.append(torch.cuda.get_rng_state())
    for tensor in tensors:
        stream.write(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return stream.getvalue()


class Task:
    """A training run by a user's own loop, in one of its many forms."""

    def __init__(self, make, extra=(), steps=60, compiled=None, device="cpu", **loop):
        self.make, self.steps, self.loop = make, steps, loop
        self.model = network(extra=[part() for part in extra]).to(device)
        if loop.get("frozen"):
            self.model[0].bias.requires_grad_(False)
        if loop.get("unused"):
            self.model.register_parameter("unused", nn.Parameter(torch.ones(2, device=device)))
            self.model.register_parameter("outside", nn.Parameter(torch.ones(2, device=device)))
        self.called = torch.compile(self.model, **compiled) if compiled else self.model
        self.optimizer = make(self.model)
        self.x, self.y = (tensor.to(device) for tensor in data())
        rate = torch.optim.lr_scheduler
        self.scheduler = rate.OneCycleLR(self.optimizer, 0.05, total_steps=steps + 1) if loop.get("onecycle") else None
        self.scaler = torch.amp.GradScaler(device, init_scale=2.0**8) if loop.get("scaler") else None

    def loss(self):
        with torch.autocast(self.x.device.type, self.loop.get("half"), enabled="half" in self.loop):
            return mse_loss(self.called(self.x), self.y)

    def closure(self):
        self.optimizer.zero_grad()
        loss = self.loss()
        loss.backward()
        return loss

    def run(self, steps=None):
        torch.manual_seed(5)
        for step in range(steps or self.steps):
            self.step(step)
        return self

    def step(self, step):
        if self.loop.get("closure"):
            self.optimizer.step(self.closure)
            return
        self.optimizer.zero_grad()
        for _ in range(self.loop.get("accumulate", 1)):
            loss = self.loss()
            if self.scaler:
                loss = self.scaler.scale(loss * (math.inf if step == 20 else 1.0))
            loss.backward()
        if self.loop.get("clip"):
            nn.utils.clip_grad_norm_(self.model.parameters(), 0.1)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        if self.scheduler:
            self.scheduler.step()

    @property
    def bits(self):
        return bits(self.model, self.optimizer)

    def attach(self, **options):
        return koopt.attach(self.optimizer, self.called, **(SHORT | options))


def sgd(model, **options):
    return torch.optim.SGD(model.parameters(), **({"lr": 0.05, "momentum": 0.9} | options))


def adam(model, **options):
    return torch.optim.Adam(model.parameters(), lr=0.01, **options)


def two_groups(model):
    first, last = model[0].parameters(), model[-1].parameters()
    return torch.optim.AdamW([{"params": first, "lr": 0.002}, {"params": last, "weight_decay": 0.1}], lr=0.01)


LOOPS = {
    "sgd": {"make": sgd},
    "sgd foreach": {"make": lambda m: sgd(m, foreach=True)},
    "sgd fused": {"make": lambda m: sgd(m, fused=True)},
    "adam single": {"make": lambda m: adam(m, foreach=False)},
    "adam foreach": {"make": lambda m: adam(m, foreach=True)},
    "adamw fused": {"make": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, fused=True)},
    "onecycle": {"make": adam, "onecycle": True},
    "accumulation": {"make": adam, "accumulate": 3},
    "clipping": {"make": sgd, "clip": True},
    "groups": {"make": two_groups},
    "frozen": {"make": adam, "frozen": True},
    "unused": {"make": lambda m: torch.optim.Adam([*m[0].parameters(), *m[-1].parameters(), m.unused]), "unused": True},
    "closure": {"make": lambda m: torch.optim.LBFGS(m.parameters(), lr=0.02, max_iter=1), "closure": True},
    "closure wolfe": {
        "make": lambda m: torch.optim.LBFGS(m.parameters(), max_iter=2, line_search_fn="strong_wolfe"),
        "closure": True,
    },
    "scaler": {"make": adam, "scaler": True},
    "scaler fused": {"make": lambda m: torch.optim.Adam(m.parameters(), lr=0.01, fused=True), "scaler": True},
    "compiled": {"make": adam, "compiled": {"backend": "eager"}},
}
STATEFUL = {"make": adam, "extra": (nn.Dropout, lambda: nn.BatchNorm1d(8))}


class Bowl:
    """A quadratic, whose gradient descent is a linear system: jumps have known answers."""

    def __init__(self, rates=(1.0, 0.1, 0.02), dtype=torch.float64, **options):
        self.model = nn.Linear(len(rates), 1, bias=False).to(dtype)
        nn.init.ones_(self.model.weight)
        self.rates = torch.tensor(rates, dtype=dtype)
        self.optimizer = torch.optim.SGD(self.model.parameters(), lr=0.2, momentum=options.pop("beta", 0.0))
        guard = options.pop("guard", self.loss)
        self.koop = koopt.attach(
            self.optimizer, self.model, guard, **({"mode": "jump", "max_overhead": 1.0, "history": 0} | options)
        )

    def loss(self):
        return (self.rates * self.model.weight.square()).sum()

    def step(self):
        self.optimizer.zero_grad()
        self.loss().backward()
        self.optimizer.step()

    def run(self, steps):
        for _ in range(steps):
            self.step()


def resumable(device="cpu", **options):
    task = Task(adam, onecycle=True, steps=200, device=device)
    koop = task.attach(guard=task.loss, mode="auto", **options)
    return task, koop


def parts(task, koop):
    """What has a state."""
    return {"model": task.model, "optimizer": task.optimizer, "scheduler": task.scheduler, "koop": koop}


def saved(task, koop):
    stream = io.BytesIO()
    torch.save({name: part.state_dict() for name, part in parts(task, koop).items()}, stream)
    stream.seek(0)
    return torch.load(stream, weights_only=True)


def resumed(state, device="cpu", **options):
    """Another run, and its handle, that go on from what `saved` returned."""
    task, koop = resumable(device, **options)
    for name, part in parts(task, koop).items():
        part.load_state_dict(state[name])
    return task, koop
