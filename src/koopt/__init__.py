"""koopt: Koopman training for PyTorch."""

from koopt.horizon import Plan, plan
from koopt.operator import Operator, fit
from koopt.partitions import Partition, partition
from koopt.trajectory import Trajectory, load_into

__all__ = ["Operator", "Partition", "Plan", "Trajectory", "fit", "load_into", "partition", "plan"]
__version__ = "0.1.0"
