"""Free memory: what the machine has, and what a container's control groups leave of it."""

import pytest
import torch

from koopt import memory

GIB = 2**30


def group(folder, limit, used, cache, version):
    folder.mkdir(parents=True, exist_ok=True)
    names = {1: ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")}
    one, other, key = names.get(version, ("memory.max", "memory.current", "inactive_file"))
    (folder / one).write_text(f"{limit}\n")
    (folder / other).write_text(f"{used}\n")
    (folder / "memory.stat").write_text(f"anon 17\n{key} {cache}\nfile 3\n")


@pytest.mark.parametrize(
    ("version", "listed", "mount"), [(2, "0::/a/b", ""), (1, "5:cpu,cpuacct:/x\n4:memory:/a/b\n0::/", "memory")]
)
def test_the_tightest_group_counts_without_its_cache(tmp_path, version, listed, mount):
    own, root = tmp_path / "cgroup", tmp_path / "sys"
    own.write_text(listed + "\n")
    assert memory.allowed_by_groups(own, root) is None  # no such groups
    unlimited = 2**63 - 4096 if version == 1 else "max"
    group(root / mount / "a" / "b", unlimited, GIB, 0, version)
    free = memory.allowed_by_groups(own, root)
    assert free is None or free > 2**60
    group(root / mount / "a", 4 * GIB, 3 * GIB, GIB // 2, version)
    assert memory.allowed_by_groups(own, root) == 1.5 * GIB
    group(root / mount / "a" / "b", 2 * GIB, GIB, 0, version)
    assert memory.allowed_by_groups(own, root) == GIB
    group(root / mount / "a" / "b", GIB, 2 * GIB, 0, version)
    assert memory.allowed_by_groups(own, root) == 0


def test_seen_from_inside_a_container_the_limit_lies_at_the_mount(tmp_path):
    own, root = tmp_path / "cgroup", tmp_path / "sys"
    own.write_text("4:memory:/docker/0123\n")  # a path of the host's
    group(root / "memory", 3 * GIB, GIB, 0, 1)
    assert memory.allowed_by_groups(own, root) == 2 * GIB


@pytest.mark.parametrize(("machine", "groups", "free"), [(5, 3, 3), (2, 3, 2), (None, 3, 3), (5, None, 5), (5, 0, 0)])
def test_the_less_of_machine_and_groups_is_free(monkeypatch, machine, groups, free):
    monkeypatch.setattr(memory, "_of_machine", lambda: machine)
    monkeypatch.setattr(memory, "allowed_by_groups", lambda: groups)
    assert memory.free_memory(torch.device("cpu")) == free


def test_without_groups_nothing_is_known(tmp_path):
    assert memory.allowed_by_groups(tmp_path / "none", tmp_path) is None
    assert memory.free_memory(torch.device("meta")) is None
