"""Text: captions through small encoders with random weights, loaded as real ones are; null text;
ready embeddings."""

import json

import numpy as np
import pytest
import torch

from data_shards import encode, verify
from data_shards.encoding.text import TextEncoder
from data_shards.schema import DataError
from data_shards.storage.files import from_bfloat16
from data_shards.storage.read import open_dataset

WORDS = ["<pad>", "<bos>", "</s>", "a", "red", "door", "room", "with", "the", "big", "say", ":"]


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """kind -> folder: encoders of an encoder-decoder, with </s> after a caption, of which UMT5 is
    Wan's, and a causal one, with <bos> before it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import (
        GemmaConfig,
        GemmaModel,
        PreTrainedTokenizerFast,
        T5Config,
        T5EncoderModel,
        UMT5Config,
        UMT5EncoderModel,
    )

    folder = tmp_path_factory.mktemp("encoders")
    torch.manual_seed(0)
    small = {"vocab_size": 12, "d_model": 16, "d_kv": 4, "d_ff": 32, "num_layers": 2}
    t5 = T5EncoderModel(T5Config(**small, num_heads=4))
    umt5 = UMT5EncoderModel(UMT5Config(**small, num_heads=4))
    sizes = {
        "hidden_size": 16,
        "intermediate_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    }
    gemma = GemmaModel(GemmaConfig(vocab_size=12, head_dim=4, **sizes))
    for kind, network, template in (
        ("t5", t5, "$A </s>"),
        ("umt5", umt5, "$A </s>"),
        ("gemma", gemma, "<bos> $A"),
    ):
        tokenizer = Tokenizer(
            models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>")
        )
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        special = [("<bos>", 1), ("</s>", 2)]
        tokenizer.post_processor = processors.TemplateProcessing(
            single=template, special_tokens=special
        )
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>").save_pretrained(
            folder / kind
        )
        network.save_pretrained(folder / kind)
    return folder


def direct(folder, kind, ids):
    """The encoder's own output for these ids, without our code."""
    from transformers import GemmaModel, T5EncoderModel, UMT5EncoderModel

    kinds = {"t5": T5EncoderModel, "umt5": UMT5EncoderModel, "gemma": GemmaModel}
    network = kinds[kind].from_pretrained(folder / kind).eval()
    with torch.no_grad():
        return network(input_ids=torch.tensor([ids])).last_hidden_state[0].numpy()


@pytest.mark.parametrize(
    ("kind", "ids", "null"),
    [("t5", [3, 4, 5, 2], [2]), ("umt5", [3, 4, 5, 2], [2]), ("gemma", [1, 3, 4, 5], [1])],
)
def test_embeddings_are_those_of_the_real_tokens(encoders, kind, ids, null):
    encoder = TextEncoder(str(encoders / kind), 6)
    embedding, mask, cut = encoder.encode("a red door")
    assert (embedding.shape, mask.tolist(), cut) == ((6, 16), [1, 1, 1, 1, 0, 0], False)
    np.testing.assert_allclose(embedding[:4], direct(encoders, kind, ids), atol=1e-5)
    assert not embedding[4:].any()
    np.testing.assert_allclose(encoder.tokens("")[0], direct(encoders, kind, null), atol=1e-5)
    assert encoder.encode("a red door with a red door")[2]


def test_the_tokens_of_a_prefix_are_dropped_but_the_first_and_the_last(encoders):
    encoder = TextEncoder(str(encoders / "gemma"), 4, prefix="say the big :")
    whole = direct(encoders, "gemma", [1, 10, 8, 9, 11, 3, 5])  # <bos> say the big : a door
    embedding, mask, cut = encoder.encode(" a door")
    np.testing.assert_allclose(embedding, whole[[0, 4, 5, 6]], atol=1e-5)
    assert (mask.tolist(), cut) == ([1, 1, 1, 1], False)
    assert encoder.encode(" a red door")[2]


@pytest.fixture
def captions(recording, tmp_path):
    keys = [clip["key"] for clip in json.loads((recording / "recording.json").read_text())["clips"]]
    file = tmp_path / "captions.json"
    file.write_text(
        json.dumps({key: "a red door" if i % 2 else "the big room" for i, key in enumerate(keys)})
    )
    return file


def test_a_data_set_with_text(encoders, captions, recording, tmp_path, capsys):
    out = tmp_path / "set"
    arguments = [
        f"source={recording}",
        f"out={out}",
        f"text={encoders / 'gemma'}",
        "text_length=3",
        f"captions={captions}",
        "negative_text=the dark",
        "psnr=no",
    ]
    assert encode.main(arguments) == 0
    assert "6 captions were longer than text_length=3" in capsys.readouterr().out
    assert verify.main([f"path={out}"]) == 0
    dataset = open_dataset(str(out))
    info, encoder = dataset.info, TextEncoder(str(encoders / "gemma"), 3)
    assert (info.text_length, info.text_width, info.null_text) == (3, 16, "null_text.npy")
    assert {"text.npy", "text_mask.npy"} < set(info.fields)
    for key, caption in json.loads(captions.read_text()).items():
        entry = dataset.find(key)
        members = dataset.members(entry)
        stored = from_bfloat16(dataset.whole(entry, [members["text.npy"]])["text.npy"])
        np.testing.assert_allclose(stored, encoder.encode(caption)[0], rtol=2**-8)
        assert dataset.whole(entry, [members["text_mask.npy"]])["text_mask.npy"].tolist() == [
            1,
            1,
            1,
        ]
        assert dataset.description(entry)["caption"] == caption
    np.testing.assert_allclose(np.load(out / "null_text.npy"), encoder.tokens("")[0])
    np.testing.assert_allclose(dataset.negative_text(), encoder.tokens("the dark")[0])
    assert dataset.negative_text().shape != dataset.null_text().shape
    assert (
        len({encoder.encode(caption)[0].tobytes() for caption in ("a red door", "the big room")})
        == 2
    )
    data = bytearray((out / "null_text.npy").read_bytes())
    data[-3] ^= 1
    (out / "null_text.npy").write_bytes(data)
    assert [problem.field for problem in verify.verify_dataset(str(out))[1]] == ["null_text.npy"]
    with pytest.raises(DataError, match="null text: got other bytes"):
        dataset.null_text()
    (out / "null_text.npy").unlink()
    (out / "negative_text.npy").write_bytes(data)
    with pytest.raises(DataError, match="negative text: got other bytes"):
        dataset.negative_text()
    problems = verify.verify_dataset(str(out))[1]
    assert {problem.field for problem in problems} == {"null_text.npy", "negative_text.npy"}


def test_ready_embeddings(write_video, tmp_path, capsys):
    folder, out, null = tmp_path / "videos", tmp_path / "set", tmp_path / "null.npy"
    folder.mkdir()
    text, mask = np.arange(20, dtype=np.float32).reshape(4, 5), np.array([1, 1, 0, 0])
    for name in ("a", "b"):
        write_video(folder / f"{name}.mp4", frames=9)
        np.savez(folder / f"{name}.npz", text=text, text_mask=mask, caption="a room")
    np.save(null, np.ones((1, 5), np.float32))
    arguments = [
        f"source={folder}",
        f"out={out}",
        "text=ready",
        "text_length=4",
        "text_dtype=float32",
    ]
    assert encode.main(arguments) == 2
    assert "null_text: got none" in capsys.readouterr().err
    assert not list(tmp_path.glob("set*")), "nothing has been encoded before the mistake was seen"
    assert encode.main([*arguments, f"null_text={null}", f"negative_text={null}"]) == 0
    dataset = open_dataset(str(out))
    np.testing.assert_array_equal(dataset.negative_text(), np.ones((1, 5)))
    clip = dataset.find("b")
    found = dataset.whole(
        clip, [dataset.members(clip)[field] for field in ("text.npy", "text_mask.npy")]
    )
    np.testing.assert_array_equal(found["text.npy"], text)
    np.testing.assert_array_equal(found["text_mask.npy"], mask)
    assert (
        encode.main(
            [
                f"source={folder}",
                f"out={tmp_path / 'other'}",
                "text=ready",
                "text_length=3",
                f"null_text={null}",
            ]
        )
        == 2
    )
    assert "got (4, 5) with a mask (4,), expected [3, E]" in capsys.readouterr().err


def test_captions_in_tars(encoders, write_video, tmp_path):
    import webdataset

    write_video(tmp_path / "a.mp4", frames=9)
    captions = {"x": "a red door", "y": "the big room"}
    with webdataset.TarWriter(str(tmp_path / "a.tar")) as tar:
        for key, caption in captions.items():
            tar.write({"__key__": key, "mp4": (tmp_path / "a.mp4").read_bytes(), "txt": caption})
    out, model = tmp_path / "set", str(encoders / "t5")
    arguments = [f"source={tmp_path / 'a.tar'}", f"out={out}", f"text={model}", "text_length=5"]
    assert encode.main([*arguments, "text_dtype=float32", "validation=0"]) == 0
    dataset, encoder = open_dataset(str(out)), TextEncoder(model, 5)
    for entry, caption in zip(dataset.clips("train"), captions.values(), strict=True):
        assert dataset.description(entry)["caption"] == caption
        stored = dataset.whole(entry, [dataset.members(entry)["text.npy"]])["text.npy"]
        np.testing.assert_allclose(stored, encoder.encode(caption)[0], rtol=1e-6)


def test_what_is_missing_is_one_report(encoders, recording, tmp_path, capsys):
    arguments = [f"source={recording}", f"out={tmp_path / 'set'}", "psnr=no"]
    assert encode.main([*arguments, f"text={encoders / 't5'}"]) == 2
    assert "text: got no caption" in capsys.readouterr().err
    with pytest.raises(DataError, match="text: cannot load"):
        TextEncoder(str(tmp_path), 3).encode("a")
