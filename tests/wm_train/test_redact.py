"""Secrets in whatever is shown or stored: cut at any depth, in keys and in what libraries say."""

import json
import logging
import sys
from dataclasses import replace

import pytest

from wm_train.config.compose import compose
from wm_train.config.typed import public_config
from wm_train.launch import other_arguments
from wm_train.redact import clean_output, clean_text, clean_value, logins_in

LEAKS = {  # what stands there -> parts that must not, parts that must
    "http://robot:hunter2@127.0.0.1:9/x": ("robot hunter2", "127.0.0.1:9/x"),
    "ftp://robot:hunter2@h": ("robot hunter2", "ftp://"),
    "http://u:hun@ter/w0rd@host:1/x": ("hun ter w0rd", "host:1/x"),
    "http://u:hun#ter?w0rd@host/x": ("hun ter w0rd", "host/x"),
    "http://u:hunter@[::1/x": ("hunter", "[::1/x"),
    "s3://AKID:hun/ter+2@bucket/run@3": ("AKID hun ter", "3"),
    "https://user:hunter2@minio.example:9000/": ("user hunter2", "minio.example:9000"),
    "https://b.s3.amazonaws.com/k?X-Amz-Signature=feed&X-Amz-Date=1": ("feed", "b.s3.amazonaws"),
    "http://h/x?sig=hunter2": ("hunter2", "http://h/x"),
    "https://h/back#access_token=hunter2": ("hunter2", "https://h/back"),
    "API request to http://robot:hunter2@127.0.0.1:9/api failed: timeout": (
        "robot hunter2",
        "127.0.0.1:9/api failed: timeout",
    ),
    "Failed to parse: robot:hunter2@127.0.0.1:9, label empty": ("robot hunter2", "127.0.0.1:9"),
    "Max retries exceeded with url: /api/x?key=hunter2 (Caused by Y)": ("hunter2", "Caused by Y"),
    "{'Authorization': 'Basic aHVudGVyMg==', 'Accept': '*/*'}": ("aHVudGVyMg", "Accept"),
    "Authorization: AWS4-HMAC-SHA256 Credential=AK/1, Signature=feed": ("AK/1 feed", "Author"),
    "headers Cookie: session=feed; id=beef": ("feed beef", "headers"),
    "export HF_TOKEN=hunter2": ("hunter2", "export HF_TOKEN="),
    "export AWS_SECRET_ACCESS_KEY='hun ter' A=1": ("hun ter", "A=1"),
    "AWS_ACCESS_KEY_ID=AKIDEXAMPLE srun x": ("AKIDEXAMPLE", "srun x"),
    "PGPASSWORD=hunter2 psql": ("hunter2", "psql"),
    "ValueError: token=hunter2, step=1": ("hunter2", "step=1"),
    '{"api_key": "hunter2", "step": 3}': ("hunter2", '"step": 3'),
    "curl -u me:hunter2 https://h/x": ("hunter2", "https://h/x"),
    "wandb login --api-key hunter2 --relogin": ("hunter2", "--relogin"),
    "sent Bearer hunter2hunter2": ("hunter2", "sent"),
    "using hf_" + "aB3" * 8: ("aB3", "using"),
}
PLAIN = [
    "step 3/10 loss: 0.5, 412 tokens per frame, token: bad, tokens=5",
    "sqlite:////data/a b/mlflow.db",
    "s3://bucket/films@v2/part",
    "git@github.com:x/y.git and bob@example.com",
    "see https://pytorch.org/docs/stable/notes/cuda.html#environment-variables",
    "recipe.stages.short.optimizer.lr=0.5 model.key=3 launcher=ray",
    "image registry/x:1@sha256:ab12",
    '@progress {"stage": "short", "step": 3, "steps": 20, "eta_s": null, "loss": 0.5}',
]


@pytest.mark.parametrize("text", LEAKS)
def test_a_secret_is_cut_and_the_rest_stays(text):
    secrets, rest = LEAKS[text]
    for cleaned in (clean_text(text), clean_value({"k": [{"v": (text,)}]})["k"][0]["v"][0]):
        assert rest in cleaned
        assert not [part for part in secrets.split() if part in cleaned]
        assert clean_text(cleaned) == cleaned, "cleaning twice changes nothing"


@pytest.mark.parametrize("text", PLAIN)
def test_what_is_no_secret_stays(text):
    assert clean_text(text) == text
    assert clean_value(text) == text


def test_keys_are_cleaned_and_none_is_lost():
    sets = {"s3://b/x?token=hunter2": 1.0, "s3://b/x?token=hunter3": 2.0}
    cleaned = clean_value({"mixture": sets, "lab_password": "hunter4", "tokens": "many"})
    assert "hunter" not in json.dumps(cleaned)
    assert sorted(cleaned["mixture"].values()) == [1.0, 2.0]
    assert cleaned["tokens"] == "many"


def test_no_part_of_the_configuration_leaks(tmp_path):
    """Lists, keys, overrides of pools, addresses with any password: nothing is in what manifests,
    MLflow and --dry-run show, nor in the command to type next."""
    typed = [
        "experiment=demo",
        "recipe=demo",
        f"out={tmp_path}",
        "data.path='https://me:hunter2@store/set?sig=hunter2'",
        "data.selection=['https://h/sel.json?X-Amz-Signature=hunter2']",
        "trainer.checkpoint_to='s3://b/x?token=hunter2'",
        "tracker.uri='http://u:hunter2@[::1/x'",
        "launcher.slurm.setup=['export LAB_TOKEN=hunter2','curl -u me:hunter2 h']",
        "launcher.slurm.options=['--export=WANDB_API_KEY=hunter2']",
        "+pools.low.overrides=['tracker.uri=http://u:hunter2@h']",
        "launcher.kubernetes.image='u:hunter2@registry/x'",
    ]
    run = compose(typed)
    sets = {"s3://k:hunter2@b/x": 1.0, "https://h/x?token=hunter3": 2.0}  # in a file of the user's
    shown = public_config(replace(run, data=replace(run.data, mixture=sets)))
    assert "hunter" not in json.dumps(shown)
    assert shown["launcher"]["slurm"]["setup"][0] == "export LAB_TOKEN=***"
    assert "hunter" not in " ".join(other_arguments(typed))


def test_a_password_is_known_in_every_form():
    """Also where a library repeats a part of an address that it could not read."""
    for address, said in {
        "http://robot:hun%40ter@h": "bad password 'hun@ter', or hun%40ter",
        "http://robot:hun@ter/two@h": "Invalid port: 'hun', host 'ter'",
        "https://hunter2hunter2@h/x": "user hunter2hunter2 is unknown",
    }.items():
        cleaned = clean_text(said, logins_in(address))
        assert "hun" not in cleaned
        assert "ter" not in cleaned
    assert logins_in("sqlite:////a/b.db") == logins_in(None) == []


def test_what_libraries_print_is_clean(capsys, monkeypatch):
    """Their warnings, the environment's own tokens, and the traceback of an uncaught exception."""
    monkeypatch.setenv("LAB_TOKEN", "hunter2hunter2")
    with clean_output():
        print("got hunter2hunter2 and http://me:hunter3@h/x")
        handler = logging.StreamHandler()
        record = logging.LogRecord("urllib3", 30, "", 1, "to http://me:%s@h", ("hunter4",), None)
        handler.emit(record)
        print("line", file=sys.stderr)
    said = capsys.readouterr()
    assert "hunter" not in said.out + said.err
    assert said.out == "got *** and http://h/x\n"
    before = sys.stderr
    with pytest.raises(SystemExit), clean_output():
        raise SystemExit(2)
    assert sys.stderr is before
    with pytest.raises(RuntimeError), clean_output():
        raise RuntimeError("http://me:hunter5@h")
    assert sys.stderr is not before, "the interpreter prints what nobody caught"
    print("http://me:hunter5@h", file=sys.stderr)
    assert "hunter" not in capsys.readouterr().err
    monkeypatch.setattr(sys, "stderr", before)
