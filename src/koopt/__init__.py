"""koopt: Koopman training for PyTorch."""

from koopt.operator import Operator, fit
from koopt.partitions import Partition, partition
from koopt.trajectory import Trajectory, load_into

__all__ = ["Operator", "Partition", "Trajectory", "fit", "load_into", "partition"]
__version__ = "0.1.0"
