"""Give a rank's end the exit code that launchers act on, without a traceback where a person or time
can help."""

from __future__ import annotations

import errno
import io
import os
import signal

import pytest
import torch

from launch.progress import ProgressView
from launch.signed import VARIABLE
from wm_train import trainer
from wm_train.checkpoint import store, writer
from wm_train.checkpoint.manifest import CheckpointError, TakenError
from wm_train.checkpoint.saver import Saver
from wm_train.config.schema import TrainerConfig
from wm_train.console import Progress, take_token
from wm_train.errors import NO_STORAGE, USER_ERROR, StorageError
from wm_train.worker import main
from wm_train.world import World, leave_world


@pytest.fixture
def end(monkeypatch, worker_config, tmp_path, capsys):
    """end(error): exit code and errors of a worker whose training ends so."""
    signals = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in signals}
    threads = torch.get_num_threads()

    def run(error: Exception) -> tuple[int, str]:
        def fail(*_):
            raise error

        monkeypatch.setattr(trainer, "train_stage", fail)
        config = worker_config(tmp_path, "launcher.preflight=false")
        code = main(["--config", str(config)])
        leave_world()
        return code, capsys.readouterr().err

    yield run
    torch.set_num_threads(threads)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (StorageError("no room for the last checkpoint", passing=False), USER_ERROR),
        (StorageError("the store is away", passing=True), NO_STORAGE),
        (TakenError("step 5 is there already"), USER_ERROR),
    ],
)
def test_a_failure_that_is_understood_ends_with_its_code_and_one_line(end, error, expected):
    code, said = end(error)
    assert code == expected
    assert "Traceback" not in said
    assert str(error) in said


@pytest.mark.parametrize(
    ("code", "passing"),
    [(errno.ENOSPC, False), (errno.EROFS, False), (errno.EDQUOT, False), (errno.EIO, True)],
)
def test_a_failed_save_knows_if_it_may_pass_by_itself(tmp_path, monkeypatch, code, passing):
    def fail(*_):
        raise OSError(code, "no")

    monkeypatch.setattr(writer, "write_tensors", fail)
    alone, said = World(0, 1), []
    with pytest.raises(CheckpointError) as caught:
        writer.save(tmp_path, 1, "short", {"model/a": torch.zeros(2)}, {}, alone)
    assert caught.value.passing == passing
    saver = Saver(tmp_path, "short", TrainerConfig(async_checkpoint=True), alone, said.append)
    saver.save(1, [("model/a", torch.zeros(2))], {})
    assert not saver.wait()
    assert saver.passing == passing


@pytest.mark.full
def test_a_run_whose_last_checkpoint_finds_no_room_says_so_and_goes_on_later(
    train_here, tmp_path, monkeypatch
):
    steps = ("recipe.stages.short.steps=4", "trainer.checkpoint_every=2")
    true = writer.write_tensors

    def full(path, tensors):
        if "00000004" in str(path):
            raise OSError(errno.ENOSPC, "No space left on device")
        return true(path, tensors)

    with monkeypatch.context() as patch:
        patch.setattr(writer, "write_tensors", full)
        with pytest.raises(StorageError, match="goes on from the checkpoint before") as caught:
            train_here(tmp_path, *steps)
    assert not caught.value.passing
    root = tmp_path / "demo" / "short" / "checkpoints"
    assert [folder.name for folder in store.committed(root)] == ["step_00000002"]
    train_here(tmp_path, *steps)
    assert store.committed(root)[-1].name == "step_00000004"


def test_progress_is_signed_and_nothing_else_in_the_process_can_sign(monkeypatch, capsys):
    view = ProgressView(io.StringIO())
    monkeypatch.setenv(VARIABLE, view.token)
    progress = Progress(speaks=True, token=take_token())
    assert VARIABLE not in os.environ, "what the worker starts or prints could hold it"
    progress.step("short", 3, 9, loss=0.5)
    *_, line = capsys.readouterr().out.splitlines()
    view.feed(line)
    assert (view.step, view.last["loss"]) == (3, 0.5)
    Progress(speaks=True).step("short", 4, 9)  # nobody listens
    view.feed(capsys.readouterr().out.splitlines()[-1])
    assert view.step == 3


def test_a_worker_takes_the_token_before_anything_else(end, monkeypatch):
    monkeypatch.setenv(VARIABLE, "0123456789abcdef")
    code, said = end(TakenError("step 5 is there already"))
    assert (code, os.environ.get(VARIABLE)) == (USER_ERROR, None)
    assert "0123456789abcdef" not in said
