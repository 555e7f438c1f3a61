"""Seconds that a piece of work took, on the CPU and on an accelerator."""

from __future__ import annotations

import time

import torch


def clock(device: torch.device) -> float:
    """By the clock, when the device has done all it was given."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def now(device: torch.device) -> float:
    """Of this thread's processor time, which what else runs changes least; on an accelerator by the clock."""
    return time.thread_time() if device.type == "cpu" else clock(device)
