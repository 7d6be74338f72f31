"""A folder as Wan's are released, made from small configurations with random weights: both experts
train from it on clips of the public autoencoder and text encoder, and go back into the public
class."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from wm_train.config.compose import compose
from wm_train.config.pools import pool_runs
from wm_train.config.typed import to_json
from wm_train.models.wan.config import WanConfig
from wm_train.models.wan.public import public_from_config

ROOT = Path(__file__).resolve().parents[4]
FILE = "diffusion_pytorch_model.safetensors"
SUBFOLDERS = {"high": "transformer", "low": "transformer_2"}
SHORT = "recipe.stages.short."
SIZES = {
    "latent_channels": 4,
    "depth": 2,
    "width": 96,
    "heads": 4,
    "ffn_width": 160,
    "text_width": 16,
    "image_condition_mode": "channels",
}
WORDS = ["<pad>", "</s>", "a", "red", "door", "the", "big", "room"]


def run(*words: object) -> None:
    done = subprocess.run(
        [sys.executable, *map(str, words)], cwd=ROOT, capture_output=True, text=True, timeout=400
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


@pytest.fixture(scope="module")
def release(tmp_path_factory, small_autoencoder) -> Path:
    """The folders transformer/, transformer_2/, vae/ and text_encoder/, saved by the libraries of
    the public classes."""
    from diffusers import WanTransformer3DModel
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, UMT5Config, UMT5EncoderModel

    folder = tmp_path_factory.mktemp("release")
    public = public_from_config(WanConfig(**SIZES))
    del public["_class_name"]
    torch.manual_seed(0)
    for name in SUBFOLDERS.values():
        WanTransformer3DModel(**public).save_pretrained(folder / name)
    shutil.copytree(small_autoencoder, folder / "vae")
    small = {"vocab_size": len(WORDS), "d_model": 16, "d_kv": 4, "d_ff": 32}
    UMT5EncoderModel(UMT5Config(**small, num_layers=2, num_heads=4)).save_pretrained(
        folder / "text_encoder"
    )
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", 1)]
    )
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(
        folder / "text_encoder"
    )
    return folder


@pytest.fixture(scope="module")
def clips(release, tmp_path_factory) -> Path:
    """Recorded clips, encoded by the release's autoencoder and text encoder."""
    folder = tmp_path_factory.mktemp("clips")
    recording, captions = folder / "recording", folder / "captions.json"
    run("-m", "data_shards.record", "vizdoom", f"out={recording}", "clips=4", "frames=17")
    found = json.loads((recording / "recording.json").read_text())["clips"]
    captions.write_text(json.dumps({clip["key"]: "a red door" for clip in found}))
    images = ("codec=wan", f"model={release / 'vae'}", "resize=32x48", "start_video=yes")
    text = (f"text={release / 'text_encoder'}", "text_length=512", f"captions={captions}")
    how = ("psnr=no", "validation=0", f"out={folder / 'set'}")
    run("-m", "data_shards.encode", f"source={recording}", *images, *text, *how)
    return folder / "set"


@pytest.mark.full
def test_both_experts_train_from_it_and_load_in_the_public_class(release, clips, tmp_path):
    from diffusers import WanTransformer3DModel

    model = "{name:wan," + ",".join(f"{key}:{value}" for key, value in SIZES.items()) + "}"
    inherit = [
        f'pools.{pool}.overrides=["{SHORT}inherit={release / name}"]'
        for pool, name in SUBFOLDERS.items()
    ]
    lines = [
        "experiment=demo",
        "recipe=demo",
        "stage=short",
        f"data.path={clips}",
        f"out={tmp_path / 'runs'}",
        "tracker=none",
        "trainer.samples=0",
        "trainer.validation_clips=0",
        "trainer.validate_every=0",
        "+pools={high:{sigma_min:0.9,sigma_max:1.0},low:{sigma_min:0.0,sigma_max:0.9}}",
        f"{SHORT}model={model}",
        f"{SHORT}frames=17",
        f"{SHORT}steps=3",
        f"{SHORT}global_batch=2",
        f"{SHORT}objective={{name:flow_matching,image_condition:0.0}}",
        f"{SHORT}optimizer={{lr:1.0e-3,warmup_steps:0,schedule:constant,ema_decay:0}}",
        *inherit,
    ]
    for pool, own in pool_runs(compose(lines), lines).items():
        config = tmp_path / f"{pool}.json"
        config.write_text(to_json(own))
        run("-m", "wm_train.worker", "--config", config)
        trained, source = tmp_path / pool, release / SUBFOLDERS[pool]
        checkpoints = tmp_path / "runs" / "demo" / pool / "short" / "checkpoints"
        run("-m", "wm_train.checkpoint", "export", checkpoints, trained, "--layout", "diffusers")
        public, _ = WanTransformer3DModel.load_config(trained, return_unused_kwargs=True)
        before = WanTransformer3DModel.load_config(source)
        assert {key: public[key] for key in before if key[0] != "_"} == {
            key: value for key, value in before.items() if key[0] != "_"
        }
        theirs = WanTransformer3DModel.from_config(public)
        theirs.load_state_dict(load_file(trained / FILE), strict=True)
        old = load_file(source / FILE)
        moved = {name for name, p in theirs.state_dict().items() if not torch.equal(p, old[name])}
        assert moved == set(old), "every tensor has learnt"
        other = load_file(release / SUBFOLDERS["low" if pool == "high" else "high"] / FILE)
        apart = [
            sum(float((p - weights[n]).norm()) for n, p in theirs.state_dict().items())
            for weights in (old, other)
        ]
        assert apart[0] < 0.2 * apart[1], "each began with its own folder"
