"""A worker that is stopped, killed or crashes in mid-run: the others leave within the time-out and
two seconds, and say who it was."""

import re
import threading
import time

import pytest

TIMEOUT_S = 6
AT = 4  # the step after which it happens


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param("stop", marks=pytest.mark.drill),
        pytest.param("die", marks=pytest.mark.drill),
        pytest.param("segfault", marks=pytest.mark.drill),
    ],
)
def test_a_rank_that_falls_silent_ends_the_run_and_is_named(
    worker_config, tmp_path, start_ranks, kind
):
    config = worker_config(
        tmp_path,
        "parallel.cp=2",
        f"backend.collective_timeout_s={TIMEOUT_S}",
        "recipe.stages.short.steps=5000",
    )
    ranks = start_ranks(config, 2, (kind, 1, AT))
    assert ranks[0].stdout is not None
    last, said = [0.0], []

    def listen():
        for line in ranks[0].stdout:
            said.append(line)
            if line.startswith("@progress"):
                last[0] = time.monotonic()

    listener = threading.Thread(target=listen)
    listener.start()
    code = ranks[0].wait(timeout=120)
    took = (
        time.monotonic() - last[0]
    )  # since the last step that both took, so more than since the fault
    listener.join()
    output = "".join(said)
    assert code == 1, output
    how = r"has been silent for \d+ s" if kind == "stop" else r"is dead \(process \d+\)"
    found = re.search(rf"rank 1 {how}, last seen in step \d+, section \w+", output)
    assert found, output
    assert "rank 0 has been silent" not in output
    assert took < TIMEOUT_S + 2, "on a machine with nothing else to do"
    print(
        f"{kind}: rank 0 left {took:.1f} s after the last common step, with a time-out of"
        f" {TIMEOUT_S} s: {found[0]}"
    )
