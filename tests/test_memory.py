"""What memory there is: the machine's, or the container's or the service's where that is less."""

from pathlib import Path

import pytest
import torch

from foredraft import memory as owner
from foredraft.admission import free_memory
from foredraft.memory import Memory, memory


@pytest.fixture
def system(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A system that tells nothing yet, but that it has 4,096 pages of 16 KiB."""
    for name in ("MEMINFO", "CGROUP", "OWN_CGROUP"):
        monkeypatch.setattr(owner, name, tmp_path / name.lower())
    (tmp_path / "cgroup").mkdir()
    monkeypatch.setattr("os.sysconf", {"SC_PAGE_SIZE": 16384, "SC_PHYS_PAGES": 4096}.__getitem__)
    return tmp_path


def tell(system: Path) -> None:
    (system / "meminfo").write_text("MemTotal:       99 kB\nMemFree:  1 kB\nMemAvailable:   50 kB\n")


def limit(folder: Path, **files: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / f"memory.{name}").write_text(f"{text}\n")


def test_a_system_that_does_not_say_is_asked_for_its_pages(system: Path) -> None:
    assert memory() == Memory(4096 * 16384, None)
    assert free_memory(torch.device("cpu")) == 4096 * 16384


def test_a_system_that_tells_nothing_is_not_limited(system: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("os.sysconf")
    assert memory() == Memory(None, None)
    assert free_memory(torch.device("cpu")) > 2**60


def test_a_container_has_what_it_may_still_take(system: Path) -> None:
    tell(system)
    assert memory() == Memory(99 * 1024, 50 * 1024)
    limit(system / "cgroup", max="max", current="30000")
    assert memory() == Memory(99 * 1024, 50 * 1024)
    limit(system / "cgroup", max="40000")
    assert memory() == Memory(40000, 10000)
    assert free_memory(torch.device("cpu")) == 10000
    limit(system / "cgroup", stat="file 9\ninactive_file 2000\nactive_file 1000")  # what was read from files gives way
    assert memory() == Memory(40000, 13000)
    limit(system / "cgroup", max="20000")
    assert memory() == Memory(20000, 0)
    assert free_memory(torch.device("cpu")) == 0


def test_a_service_has_what_the_smallest_group_around_it_leaves(system: Path) -> None:
    """As systemd's MemoryMax= sets it, which the root of all groups does not show."""
    tell(system)
    (system / "own_cgroup").write_text("1:name=systemd:/else\n0::/system.slice/foredraft.service\n")
    limit(system / "cgroup/system.slice/foredraft.service", max="30000", current="1000")
    assert memory() == Memory(30000, 29000)
    limit(system / "cgroup/system.slice", max="20000", current="1000")
    assert memory() == Memory(20000, 19000)


def test_groups_of_the_first_kind(system: Path) -> None:
    """Each resource has a tree of its own there; a number near 2^63 is no limit."""
    tell(system)
    (system / "own_cgroup").write_text("9:cpu,cpuacct:/docker/1\n4:memory:/docker/1\n")
    limit(system / "cgroup/memory", limit_in_bytes="9223372036854771712", usage_in_bytes="90000")
    assert memory() == Memory(99 * 1024, 50 * 1024)
    limit(system / "cgroup/memory/docker/1", limit_in_bytes="30000", usage_in_bytes="9000")
    assert memory() == Memory(30000, 21000)
    limit(system / "cgroup/memory/docker/1", stat="active_file 1000\ninactive_file 2000")
    assert memory() == Memory(30000, 24000)
