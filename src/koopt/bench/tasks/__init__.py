"""The benchmark's tasks."""

from dataclasses import replace

from koopt.bench.task import Task
from koopt.bench.tasks import burgers, de_solver, digits, shakespeare

TASKS: dict[str, Task] = {
    task.name: task for task in (de_solver.TASK, burgers.TASK, digits.MLP, digits.CNN, shakespeare.TASK)
}
QUICK: dict[str, Task] = {  # a run takes a second or two
    name: replace(task, steps=task.steps // 20, looks=10, rates=task.rates[1:3], schedules=("cosine",))
    for name, task in TASKS.items()
}
