"""Every number that is logged is that of one process: on two processes, and on two nodes of two processes, started by torchrun."""

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("whole_run.py")
SECONDS = 240


def free_port():
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]


def logged(folder: Path, nodes: int, processes: int):
    """Run the script; return what each process has written down."""
    folder.mkdir()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", processes, "--nnodes", nodes]
    command += ["--master_addr", "127.0.0.1", "--master_port", free_port()]
    made = []
    for node in range(nodes):
        start = [*command, "--node_rank", node] if nodes * processes > 1 else [sys.executable]
        with (folder / f"{node}.out").open("w") as out:
            line = [str(each) for each in (*start, SCRIPT, folder)]
            made.append(subprocess.Popen(line, stdout=out, stderr=out, env={**os.environ, "OMP_NUM_THREADS": "1"}))
    try:
        ended = [each.wait(SECONDS) for each in made]
    finally:
        for each in made:
            each.kill()
    assert not any(ended), (folder / "0.out").read_text()[-3000:]
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(nodes * processes)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    return logged(tmp_path_factory.mktemp("runs") / "alone", 1, 1)[0]


@pytest.mark.parametrize(("nodes", "processes"), [(1, 2), (2, 2)])
def test_each_number_is_that_of_one_process(nodes, processes, alone, tmp_path):
    found = logged(tmp_path / "ranks", nodes, processes)
    for each in found:
        assert each["phase"] == alone["phase"] == 2
        assert each["reason"] == alone["reason"]
    numbers, expected = found[0]["logged"], alone["logged"]
    assert {tag.split("/")[0] for tag in expected} >= {"kernel", "theory", "health", "guard"}
    assert numbers.keys() == expected.keys()
    for tag, of in expected.items():
        assert numbers[tag].keys() == of.keys(), tag
        for step, value in of.items():
            # Floors and departures are rounding themselves, and no more than that.
            assert numbers[tag][step] == pytest.approx(value, rel=1e-7, abs=1e-11, nan_ok=True), (tag, step)
