"""Checkpoints in a store without rename: whole or absent, verified, kept by the same rules; over a
real S3 server and in memory."""

from __future__ import annotations

import contextlib
import http.server
import json
import threading

import fsspec
import pytest
import torch

from wm_train.checkpoint import store, writer
from wm_train.checkpoint.__main__ import main
from wm_train.checkpoint.manifest import NAME, CheckpointError, TakenError, step_of
from wm_train.checkpoint.tensor_file import read_digest
from wm_train.errors import SetupError
from wm_train.resilience import store_lock
from wm_train.resilience.run_lock import OwnedError
from wm_train.storage import Remote, place
from wm_train.world import World

ALONE = World(0, 1)
SHAPE = (64, 48)


@pytest.fixture(scope="module")
def s3():
    """A bucket of a local S3 server."""
    from moto.server import ThreadedMotoServer

    environment = pytest.MonkeyPatch()
    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    address = f"http://127.0.0.1:{server.get_host_and_port()[1]}"
    settings = {
        "AWS_ENDPOINT_URL": address,
        "AWS_ACCESS_KEY_ID": "a",
        "AWS_SECRET_ACCESS_KEY": "b",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    for name, value in settings.items():
        environment.setenv(name, value)
    fsspec.filesystem("s3", use_listings_cache=False).mkdir("checkpoints")
    yield "s3://checkpoints"
    server.stop()
    environment.undo()


@pytest.fixture(params=["s3", "memory"])
def root(request) -> Remote:
    base = request.getfixturevalue("s3") if request.param == "s3" else "memory://checkpoints"
    folder = place(f"{base}/{request.node.name.replace('[', '-').strip(']')}/short")
    assert isinstance(folder, Remote)
    return folder


def state(step: int) -> dict[str, torch.Tensor]:
    draws = torch.Generator().manual_seed(step)
    weight = torch.randn(SHAPE, generator=draws)
    one = torch.tensor(1.0)
    return {
        "model/a": weight,
        "model/b": weight[0].to(torch.bfloat16),
        "model/empty": torch.zeros(0, 3),
        "optimizer/a/step": one,
    }


def save(root: Remote, step: int, loss: float | None = None) -> Remote:
    folder = writer.save(
        root, step, "short", state(step), {"validation_loss": loss, "world": 1}, ALONE
    )
    assert isinstance(folder, Remote)
    return folder


def flip(file: Remote) -> None:
    data = bytearray(file.read(None, None))
    data[len(data) // 2] ^= 1
    with file.open("wb") as handle:
        handle.write(bytes(data))


def steps(root: Remote) -> list[int]:
    return [step_of(folder) for folder in store.committed(root)]


def test_what_was_saved_comes_back_bit_for_bit(root):
    folder = save(root, 3)
    found = store.find_newest(root, ALONE, print)
    assert found is not None
    assert found[0] == folder
    targets = {name: torch.full_like(tensor, 7) for name, tensor in state(3).items()}
    store.load(*found, targets)
    assert all(torch.equal(targets[name], tensor) for name, tensor in state(3).items())
    assert (root / "latest").read_text() == folder.name + "\n"
    assert save(root, 3) == folder, "a step that is there is not written again"


def test_only_the_rows_that_are_asked_for_are_read(root, monkeypatch):
    folder = save(root, 1)
    manifest, asked = store.check(folder, ALONE), []
    read = Remote.read
    monkeypatch.setattr(
        Remote,
        "read",
        lambda file, start, stop: asked.append((start, stop)) or read(file, start, stop),
    )
    tensors = store.RemoteTensors(folder / next(iter(manifest.files)))
    assert torch.equal(
        tensors.get_slice("model/a")[slice(8, 16), slice(2, 5)], state(1)["model/a"][8:16, 2:5]
    )
    assert asked[-1][1] - asked[-1][0] == 8 * SHAPE[1] * 4


@pytest.mark.parametrize("damage", ["bit", "manifest", "missing", "no manifest"])
def test_a_damaged_one_is_found_set_aside_and_the_one_before_taken(root, damage):
    good, bad = save(root, 1), save(root, 2)
    file = bad / "rank_00000.safetensors"
    if damage == "bit":
        flip(file)
    elif damage == "manifest":
        flip(bad / NAME)
    elif damage == "missing":
        file.unlink()
    else:
        (bad / NAME).unlink()
    reports: list[str] = []
    found = store.find_newest(root, ALONE, reports.append, mine=True)
    assert found is not None
    assert found[0] == good
    assert len(reports) == (0 if damage == "no manifest" else 1), (
        "without a manifest it was never a checkpoint"
    )
    writer.prune(root, 2, 0, ALONE)
    assert (bad / "manifest.bad").is_file() == (damage != "no manifest"), (
        "evidence is kept, drafts are not"
    )
    assert step_of(save(root, 2)) == 2


def test_a_save_that_fails_midway_leaves_the_last_one_and_the_next_works(root, monkeypatch):
    good = save(root, 1)
    with monkeypatch.context() as broken:
        broken.setattr(
            writer, "write_text", lambda *_: (_ for _ in ()).throw(OSError("the store went away"))
        )
        with pytest.raises(CheckpointError, match="the store went away"):
            save(root, 2)
    assert store.find_newest(root, ALONE, print)[0] == good  # type: ignore[index]
    save(root, 2)
    assert steps(root) == [1, 2]


def test_retention_and_the_commands_work_on_an_address(root, capsys, tmp_path):
    for step, loss in ((1, 0.5), (2, 0.1), (3, 0.4), (4, 0.3), (5, None)):
        save(root, step, loss)
    writer.prune(root, 1, 3, ALONE, keep_best=1)
    assert steps(root) == [2, 3, 5], "the best, every third, the newest"
    assert main(["verify", str(root)]) == 0
    assert main(["inspect", str(root)]) == 0
    assert "step 5, written by 1 processes" in capsys.readouterr().out
    assert main(["export", str(root), str(tmp_path / "w.safetensors")]) == 0
    assert main(["prune", str(root), "--keep-last", "1"]) == 0
    assert steps(root) == [5]
    flip(store.committed(root)[0] / "rank_00000.safetensors")
    assert main(["verify", str(root)]) == 2


def test_pruning_takes_a_name_literally(root):
    for name in ("run[1]", "run1", "run*", "run2"):
        save(root / name, 1)
    (root / "run[1]").remove()
    (root / "run*").remove()
    assert [folder.name for folder in root.iterdir()] == ["run1", "run2"]


def test_a_store_that_does_not_answer_is_not_an_empty_one(monkeypatch):
    """Else a run would begin anew beside its checkpoints: `isdir` of most stores is False then."""
    root = place("memory://checkpoints/silent")

    def refuse(*_, **__):
        raise RuntimeError("no route to the store")

    monkeypatch.setattr(type(root.fs), "ls", refuse)
    with pytest.raises(OSError, match=r"memory://checkpoints/silent: RuntimeError: no route"):
        store.find_newest(root, ALONE, print)


def test_a_place_has_one_owner(root, monkeypatch):
    monkeypatch.setattr(store_lock, "SETTLE_S", 0.01)
    with store_lock.owned_in_store(root):
        save(root, 1)
        with pytest.raises(OwnedError, match="is owned by process"):
            store_lock.owned_in_store(root).__enter__()
        assert main(["prune", str(root), "--keep-last", "1"]) == 2
        assert steps(root) == [1]
    assert [path.name for path in root.iterdir()] == ["latest", store.committed(root)[0].name]


def test_a_step_of_another_run_is_not_taken_for_ones_own(root):
    save(root, 3)
    with pytest.raises(TakenError, match="another run"):
        save(root, 3, loss=0.5)
    assert steps(root) == [3]


def test_a_login_does_not_reach_messages():
    address = place("ftp://me:secret@host/runs") / "demo"
    assert "secret" not in f"{address} {address!r}"


@pytest.mark.full
def test_a_stage_trains_into_a_store_and_goes_on_from_it(alone, train_here, losses, s3, tmp_path):
    to = f"trainer.checkpoint_to={s3}/runs"
    train_here(tmp_path, to, "recipe.stages.short.steps=10")
    assert not list((tmp_path / "demo" / "short").glob("checkpoints/*"))
    train_here(tmp_path, to)
    assert losses(tmp_path) == alone
    assert steps(place(f"{s3}/runs/demo/short"))[-1] == 20  # type: ignore[arg-type]


DAMAGE = {
    "dtype": ({"dtype": "F8_E4M3"}, r"got tensor model/a of dtype F8_E4M3, expected one of F64"),
    "no dtype": ({"dtype": None}, "got tensor model/a of dtype None"),
    "shape": ({"shape": [3, 3]}, r"got tensor model/a F32 \[3, 3\] in \d+ bytes"),
    "text": ({"shape": "wide"}, "got no tensor model/a"),
    "place": ({"data_offsets": [1]}, "got no tensor model/a"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_a_header_that_says_something_else_is_one_error(root, kind):
    """A dtype that nobody knows was a StopIteration, as bare as that."""
    changed, told = DAMAGE[kind]
    file = save(root, 1) / "rank_00000.safetensors"
    data = file.read(None, None)
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["model/a"] |= changed
    text = json.dumps(header).encode()
    with file.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text + data[8 + length :])
    with pytest.raises(SetupError, match=told) as caught:
        store.RemoteTensors(file).get_tensor("model/a")
    assert file.name in str(caught.value)


@pytest.mark.parametrize("data", [b"\0" * 8, b"\xff" * 20, b"\5" + b"\0" * 7 + b"abcde"])
def test_a_file_without_a_header_is_one_error(root, data):
    file = root / "x.safetensors"
    with file.open("wb") as out:
        out.write(data)
    with pytest.raises(SetupError, match=r"x\.safetensors: got a header"):
        store.RemoteTensors(file)


class Endless(http.server.BaseHTTPRequestHandler):
    """Answers that never end."""

    def do_GET(self):
        self.send_response(206 if "Range" in self.headers else 200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(2**15 if self.command == "GET" else 0):
                self.wfile.write(b"x" * 2**16)

    do_HEAD = do_GET

    def log_message(self, *_):
        pass


def test_an_address_whose_answers_have_no_end_is_an_error(monkeypatch):
    """They were taken into memory, or hashed, for as long as they came."""
    monkeypatch.setattr("data_shards.storage.remote.MOST_WHOLE", 2**20)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Endless)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    there = place(f"http://127.0.0.1:{server.server_address[1]}/runs")
    try:
        for ask in (
            lambda: list(there.iterdir()),
            lambda: (there / "manifest.json").read_text(),
            lambda: (there / "x.safetensors").read(0, 8),
        ):
            with pytest.raises(OSError, match="got more than"):
                ask()
        assert 10**6 < read_digest(there / "x.safetensors", 10**6).size < 10**8
    finally:
        server.shutdown()
        server.server_close()
