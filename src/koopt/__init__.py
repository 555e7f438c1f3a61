"""koopt: Koopman training for PyTorch."""

from koopt.checkpoint import forecast_checkpoints
from koopt.horizon import Plan, plan
from koopt.live import attach
from koopt.live.handle import Live
from koopt.live.jumps import Jump
from koopt.operator import Operator, fit
from koopt.partitions import Partition, partition
from koopt.trajectory import Trajectory, load_into

__all__ = [
    "Jump",
    "Live",
    "Operator",
    "Partition",
    "Plan",
    "Trajectory",
    "attach",
    "fit",
    "forecast_checkpoints",
    "load_into",
    "partition",
    "plan",
]
__version__ = "0.1.0"
