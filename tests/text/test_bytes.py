"""The byte-level text encoder: what reaches the model, and what survives a round trip."""

import dataclasses
import json
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file

from fastvdiff.text import ByteTextEncoder, ByteTextEncoderConfig, TextEncoder
from fastvdiff.text.bytes import BEGIN, END, PAD, VOCABULARY, ngram_numbers

SMALL = ByteTextEncoderConfig(width=32, depth=2, heads=4, max_length=32)


@pytest.fixture
def encoder() -> ByteTextEncoder:
    torch.manual_seed(0)
    return ByteTextEncoder(SMALL)


def test_shapes_and_protocol(encoder):
    assert isinstance(encoder, TextEncoder)
    assert (encoder.dim, encoder.max_length) == (32, 32)
    hidden, mask = encoder(["a red circle", "b"])
    assert hidden.shape == (2, 16, 32)  # 12 bytes and two marks, rounded up to 16
    assert hidden.dtype == torch.float32
    assert mask.dtype == torch.bool
    assert mask.sum(1).tolist() == [14, 3]
    assert (hidden[~mask] == 0).all()
    assert hidden[mask].isfinite().all()


def test_default_config_is_the_tiny_one():
    encoder = ByteTextEncoder()
    assert encoder.config == ByteTextEncoderConfig(width=128, depth=3, heads=4, max_length=64)
    assert encoder(["x"])[0].shape == (1, 8, 128)


def test_empty_batch(encoder):
    hidden, mask = encoder([])
    assert hidden.shape == (0, 8, 32)
    assert mask.shape == (0, 8)


def test_tokens(encoder):
    ids, mask = encoder.encode(["ab", ""])
    assert ids.tolist() == [[BEGIN, 97, 98, END, PAD, PAD, PAD, PAD], [BEGIN, END, *[PAD] * 6]]
    assert torch.equal(mask, ids != PAD)
    assert torch.equal(ids, encoder.encode(["ab", ""])[0])


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("  A Red\n circle ", "a red circle"),
        ("cafe\u0301", "caf\u00e9"),
        ("прыгает 🐈", "прыгает 🐈"),
        ("赤い円", "赤い円"),
        ("\ud800", "?"),
    ],
)
def test_any_language_reaches_the_model_as_its_bytes(encoder, prompt, text):
    ids, mask = encoder.encode([prompt])
    assert bytes(ids[mask][1:-1].tolist()).decode() == text


def test_case_can_matter():
    encoder = ByteTextEncoder(ByteTextEncoderConfig(width=8, depth=1, heads=1, lowercase=False))
    assert encoder.encode(["A"])[0][0, 1] == ord("A")


def test_a_long_prompt_is_cut_between_characters_with_a_warning(encoder):
    with pytest.warns(UserWarning, match=r"prompt of 32 bytes cut to 28 \(max_length 32\): '🐈+' is the last"):
        hidden, mask = encoder(["🐈" * 8])
    assert hidden.shape == (1, 32, 32)
    assert mask.sum() == 30
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        encoder(["x" * 30])


def test_other_prompts_in_the_batch_change_nothing(encoder):
    prompt = "a red circle"
    alone, _ = encoder([prompt])
    together, mask = encoder([prompt, "a much longer prompt beside", ""])
    torch.testing.assert_close(together[0][mask[0]], alone[0, :14], rtol=1e-5, atol=1e-5)


def test_the_unconditional_embedding(encoder):
    hidden, mask = encoder(["a red circle", "", "   ", "blue"], drop=torch.tensor([False, False, False, True]))
    for row in (1, 2, 3):
        assert mask[row].tolist() == [True] + [False] * 15
        assert torch.equal(hidden[row, 0], encoder.null_embedding)
    assert mask[0].sum() == 14
    torch.testing.assert_close(hidden[0], encoder(["a red circle"])[0][0])
    hidden[3].sum().backward()
    assert (encoder.null_embedding.grad == 1).all()
    assert encoder.token_embedding.weight.grad.abs().sum() == 0


def test_every_parameter_gets_a_gradient(encoder):
    hidden, _ = encoder(["red circle", "blue square"], drop=torch.tensor([False, True]))
    (hidden * torch.randn(32)).sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
        assert parameter.grad.isfinite().all(), name


def test_word_order_matters(encoder):
    a, _ = encoder(["red left"])
    b, _ = encoder(["left red"])
    assert (a - b).abs().max() > 1e-2


def test_bfloat16_weights_stay_close(encoder):
    expected, mask = encoder(["a red circle moving up", ""])
    hidden, _ = encoder.bfloat16()(["a red circle moving up", ""])
    assert hidden.dtype == torch.bfloat16
    assert (hidden.float() - expected)[mask].norm() < 0.02 * expected[mask].norm()


def test_autocast(encoder):
    with torch.autocast("cpu", torch.bfloat16):
        hidden, _ = encoder(["a red circle"], drop=torch.tensor([False]))
    assert hidden.isfinite().all()


def test_save_and_load(tmp_path, encoder, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    encoder.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == {
        "width": 32,
        "depth": 2,
        "heads": 4,
        "max_length": 32,
        "mlp_ratio": 4,
        "lowercase": True,
        "ngrams": [],
        "ngram_buckets": 1021,
    }
    assert (tmp_path / "model.safetensors").is_file()
    loaded = ByteTextEncoder.from_pretrained(tmp_path)
    assert loaded.config == SMALL
    assert torch.equal(loaded(["a 🐈", ""])[0], encoder(["a 🐈", ""])[0])


def test_an_incomplete_or_truncated_checkpoint_is_refused(tmp_path, encoder):
    encoder.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: len(data) // 2])
    with pytest.raises(Exception, match=r"(?i)incomplete|invalid|header"):
        ByteTextEncoder.from_pretrained(tmp_path)
    weights.write_bytes(data)
    kept = load_file(weights)
    del kept["null_embedding"]
    save_file(kept, weights)
    with pytest.raises(RuntimeError, match="null_embedding"):
        ByteTextEncoder.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="pickled weights are not read"):
        ByteTextEncoder._load_as_pickle(encoder, "pytorch_model.bin", "cpu", True)


def test_compiles_whole(encoder):
    compiled = torch.compile(encoder.forward_ids, fullgraph=True, backend="eager")
    for drop in (None, torch.tensor([True, False])):
        ids, mask = encoder.encode(["a red circle", "x"])
        for got, expected in zip(compiled(ids, mask, drop), encoder.forward_ids(ids, mask, drop), strict=True):
            torch.testing.assert_close(got, expected)


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        ("a red circle", "prompts: expected a list of str, got one str"),
        (["x", None], r"prompts: expected a list of str, got \['NoneType', 'str'\]"),
        (None, "prompts: expected a list of str, got NoneType"),
    ],
)
def test_prompts_must_be_strings(encoder, prompts, message):
    with pytest.raises(TypeError, match=message):
        encoder(prompts)


def test_drop_must_fit(encoder):
    with pytest.raises(ValueError, match=r"drop: expected a bool tensor of shape \(2,\), got torch.bool \(3,\)"):
        encoder(["a", "b"], drop=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"drop: expected a bool tensor of shape \(1,\), got torch.float32 \(1,\)"):
        encoder(["a"], drop=torch.zeros(1))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 30, "heads": 4}, "heads=4 does not divide width=30"),
        ({"max_length": 2}, "max_length: expected an integer >= 3, got 2"),
        ({"depth": -1}, "depth: expected an integer >= 0, got -1"),
        ({"width": 12.0}, "width: expected an integer >= 1, got 12.0"),
        ({"ngrams": (1,)}, r"ngrams: expected different integers from 2 to 7, got \(1,\)"),
        ({"ngrams": (3, 3)}, r"ngrams: expected different integers from 2 to 7, got \(3, 3\)"),
        ({"ngrams": (3, 8)}, "ngrams: expected different integers from 2 to 7"),
        ({"ngrams": (3,), "ngram_buckets": 0}, "ngram_buckets: expected an integer >= 1, got 0"),
    ],
)
def test_bad_config(options, message):
    with pytest.raises(ValueError, match=message):
        ByteTextEncoderConfig(**options)


@pytest.mark.parametrize("length", [2, 3, 7])
def test_ngram_numbers_are_those_of_python(length):
    ids, _ = ByteTextEncoder(SMALL).encode(["a red circle", "é\x7f"])
    for row, numbers in zip(ids.tolist(), ngram_numbers(ids, length).tolist(), strict=True):
        padded = [PAD] * (length - 1) + row
        for end, number in enumerate(numbers):
            gram = padded[end : end + length]
            assert number == sum(VOCABULARY ** (length - 1 - k) * each for k, each in enumerate(gram))


def test_ngrams_tell_words_apart_before_training(tmp_path):
    prompts = ["a red circle moving right", "a red square moving right", "a red circle moving left"]

    def cosine(config):
        torch.manual_seed(0)
        hidden, mask = ByteTextEncoder(config)(prompts)
        pooled = hidden.sum(1) / mask.sum(1, keepdim=True)
        return torch.nn.functional.cosine_similarity(pooled[1:], pooled[:1])

    plain = ByteTextEncoderConfig(width=128, depth=1)
    with_ngrams = dataclasses.replace(plain, ngrams=(3, 4))
    assert (cosine(with_ngrams) < cosine(plain) - 0.05).all()
    encoder = ByteTextEncoder(with_ngrams)
    encoder.save_pretrained(tmp_path)
    again = ByteTextEncoder.from_pretrained(tmp_path)
    assert again.config == with_ngrams
    assert torch.equal(again(prompts)[0], encoder(prompts)[0])
