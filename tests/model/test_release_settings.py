"""What a model says of its use is read once and goes where the model goes."""

import json

import pytest

from helpers.gguf_files import LLAMA, SPECIAL, TOKENS, network, write
from rorqual import load_model, load_tokenizer, save_model
from rorqual.checkpoint.describe import read_released
from rorqual.checkpoint.gguf_import import import_gguf, import_model
from rorqual.engine import Engine, SamplingParams
from rorqual.engine.generation_defaults import default_sampling
from rorqual.errors import UserError
from rorqual.model.release_settings import SUPPRESS_BIAS
from rorqual.precision.quantize_checkpoint import quantize_checkpoint

R1 = {"temperature": 0.6, "top_p": 0.95, "max_tokens": 512}


@pytest.fixture
def model(tmp_path):
    import_gguf(write(tmp_path / "a.gguf", network()), tmp_path / "model")
    return tmp_path / "model"


def said(model, **generation):
    (model / "generation_config.json").write_text(json.dumps(generation))


@pytest.mark.parametrize(
    ("generation", "expected"),
    [
        ({}, {}),
        ({"temperature": None, "top_p": None, "max_new_tokens": None, "num_beams": None}, {}),
        ({"temperature": 0}, {"temperature": 0}),
        ({"do_sample": False, "temperature": 0.7}, {"temperature": 0}),
        ({"do_sample": True, "temperature": 0.7}, {"temperature": 0.7}),
        ({"top_p": 0.8, "top_k": 20, "min_p": 0.05}, {"top_p": 0.8, "top_k": 20, "min_p": 0.05}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"repetition_penalty": 1.05, "presence_penalty": 1.5}, {"repetition_penalty": 1.05, "presence_penalty": 1.5}),
        ({"max_new_tokens": 7}, {"max_tokens": 7}),
        ({"max_length": 90}, {"max_tokens": 90, "max_length": 90}),
        ({"max_length": 90, "max_new_tokens": 7}, {"max_tokens": 7}),
        ({"stop_strings": "hell"}, {"stop": ("hell",)}),
        ({"stop_strings": ["a", "b"]}, {"stop": ("a", "b")}),
        ({"suppress_tokens": [5, 6]}, {"logit_bias": ((5, SUPPRESS_BIAS), (6, SUPPRESS_BIAS))}),
        ({"num_beams": 1, "length_penalty": 1.0, "typical_p": 1.0, "bad_words_ids": [], "use_cache": True}, {}),
    ],
)
def test_sampling(model, generation, expected):
    said(model, **generation)
    assert default_sampling(model) == SamplingParams(**R1 | expected)
    given = {"temperature": 0.9, "top_p": 0.5, "max_tokens": 3}
    assert default_sampling(model, **given, seed=None) == SamplingParams(
        **{n: v for n, v in expected.items() if n != "max_length"} | given
    )


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", "0.6"), ("temperature", -1), ("temperature", True), ("temperature", float("nan")),
        ("top_p", 0), ("top_p", 1.5), ("top_k", 2.5), ("top_k", "20"), ("min_p", 1), ("repetition_penalty", 0),
        ("max_new_tokens", 0), ("max_new_tokens", "64"), ("max_length", [9]), ("do_sample", "false"),
        ("stop_strings", ""), ("stop_strings", [1]), ("suppress_tokens", 5), ("suppress_tokens", [99999]),
        ("eos_token_id", "2"), ("eos_token_id", [0, "2"]), ("eos_token_id", 99999), ("eos_token_id", 1.5),
        ("eos_token_id", True), ("bos_token_id", {}), ("pad_token_id", "0"),
    ],
)  # fmt: skip
def test_wrong_values_are_said(model, name, value):
    said(model, **{name: value})
    for read in (default_sampling, load_model):
        with pytest.raises(UserError, match=rf"generation_config\.json: {name} = .* must be"):
            read(model)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_beams", 4), ("no_repeat_ngram_size", 3), ("bad_words_ids", [[5, 6]]), ("begin_suppress_tokens", [5]),
        ("typical_p", 0.9), ("penalty_alpha", 0.6), ("min_new_tokens", 5), ("forced_eos_token_id", 2),
        ("guidance_scale", 1.5), ("epsilon_cutoff", 3e-4), ("sequence_bias", [[[5], -1.0]]),
        ("num_return_sequences", 2),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_refused_where_it_would_count(model, name, value):
    said(model, **{name: value})
    with pytest.raises(UserError, match=rf"generation_config\.json: {name} = .* not supported"):
        default_sampling(model)
    save_model(load_model(model), model.parent / "trained")  # which keeps it
    assert json.loads((model.parent / "trained" / "generation_config.json").read_text())[name] == value


@pytest.mark.parametrize(
    ("generation", "config", "ends"),
    [
        (None, 2, {2}),
        ({"pad_token_id": 99999, "bos_token_id": None}, 2, {2}),  # beyond the vocabulary, as in some releases
        ({}, 2, {2}),
        ({"eos_token_id": [0, 1]}, 2, {0, 1, 2}),
        ({"eos_token_id": 0}, [1, 2], {0, 1, 2}),
        ({"eos_token_id": -1}, 2, {2}),
        ({"eos_token_id": None}, None, {2}),  # the tokenizer's
    ],
)
def test_every_end_token_ends_an_answer_and_is_released(model, generation, config, ends):
    file = model / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": config}))
    (model / "generation_config.json").unlink()
    if generation is not None:
        said(model, **generation)
    assert set(Engine(model).end_tokens) == ends
    network, tokenizer = load_model(model), load_tokenizer(model)
    assert set(Engine(network, tokenizer).end_tokens) == ends  # as training samples
    save_model(network, model.parent / "trained", tokenizer)
    written = json.loads((model.parent / "trained" / "generation_config.json").read_text())["eos_token_id"]
    assert (set(written) if isinstance(written, list) else {written}) == ends


def test_settings_go_through_every_export(model):
    own = {"do_sample": True, "temperature": 0.25, "top_k": 5, "eos_token_id": [2, 0], "transformers_version": "4.0"}
    said(model, **own)
    (model / "additional_chat_templates").mkdir()
    (model / "additional_chat_templates" / "tool_use.jinja").write_text("tools!")
    quantize_checkpoint(model, model.parent / "packed", "int8")
    import_model(model, model.parent / "imported")
    save_model(load_model(model), model.parent / "trained", load_tokenizer(model))
    save_model(load_model(model), model.parent / "trained", load_tokenizer(model))  # once more, over it
    for name in ("packed", "imported", "trained"):
        found = json.loads((model.parent / name / "generation_config.json").read_text())
        assert {key: found.get(key) for key in own} == own, name
        assert load_tokenizer(model.parent / name).chat_template["tool_use"] == "tools!", name
        assert default_sampling(model.parent / name).temperature == 0.25
    assert Engine(model.parent / "packed").end_tokens == (0, 2)


def test_header_of_a_gguf_file(tmp_path):
    fields = {
        "tokenizer__ggml__eot_token_id": 0, "tokenizer__ggml__eom_token_id": 1, "general__sampling__temp": 0.3,
        "general__sampling__top_k": 40, "general__sampling__penalty_repeat": 1.1,
    }  # fmt: skip
    file = write(tmp_path / "UPPER.GGUF", network(), **fields)
    import_model(file, tmp_path / "model")
    for model in (file, tmp_path / "model"):
        assert Engine(model).end_tokens == (0, 1, 2)
        params = default_sampling(model)
        assert (params.temperature, params.top_k, params.repetition_penalty) == (0.3, 40, 1.1)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"tokenizer__ggml__eot_token_id": 9999}, "eot_token_id = 9999"),
        ({"tokenizer__ggml__add_bos_token": "yes"}, "add_bos_token = 'yes'"),
        (
            {"tokenizer__chat_templates": ["rag"], "tokenizer__chat_template__rag": 3},
            "chat_template.rag is not a string",
        ),
        ({"general__sampling__temp": -1.0}, "temperature = -1.0"),
        ({"general__sampling__top_k": "many"}, "top_k = 'many'"),
        ({"general__sampling__penalty_last_n": "all"}, "penalty_last_n = 'all'"),
        ({"llama__attention__sliding_window": 16}, "attention.sliding_window = 16"),
        ({"llama__rope__dimension_count": 4}, "rope.dimension_count = 4"),
        ({"llama__attention__causal": False}, "attention.causal = False"),
        ({"llama__final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0"),
        ({"llama__logit_scale": 0.5}, "logit_scale = 0.5"),
        ({"llama__rope__scaling__attn_factor": 1.5}, "attn_factor = 1.5"),
    ],
)
def test_what_a_gguf_file_may_not_say(tmp_path, fields, words):
    file = write(tmp_path / "a.gguf", network(), **fields)
    with pytest.raises(UserError, match=rf"a\.gguf: .*{words}"):
        import_gguf(file, tmp_path / "model")
    if not words.startswith(("add_bos", "chat_template")):  # of the tokenizer, which sampling does not need
        with pytest.raises(UserError, match=rf"a\.gguf: .*{words}"):
            default_sampling(file)


@pytest.mark.parametrize(
    ("fields", "scaling"),
    [
        ({"llama__rope__scaling__factor": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama__rope__scale_linear": 4.0}, {"rope_type": "linear", "factor": 4.0}),
        ({"llama__rope__scaling__factor": 1.0}, None),
        ({"llama__attention__sliding_window": 128, "llama__rope__dimension_count": 8}, None),  # change nothing
    ],
)
def test_rope_of_a_gguf_file(tmp_path, fields, scaling):
    import_gguf(write(tmp_path / "a.gguf", network(), **fields), tmp_path / "model")
    assert load_model(tmp_path / "model").config.rope_scaling == scaling


@pytest.mark.parametrize("name", ["mirostat", "xtc_probability", "penalty_last_n"])
def test_samplers_of_a_gguf_file_that_we_do_not_have(tmp_path, name):
    fields = {f"general__sampling__{name}": 1, "general__sampling__penalty_repeat": 1.1}
    file = write(tmp_path / "a.gguf", network(), **fields)
    import_gguf(file, tmp_path / "model")  # which keeps it
    for model, source in ((file, r"a\.gguf: general\.sampling"), (tmp_path / "model", r"generation_config\.json")):
        with pytest.raises(UserError, match=f"{source}: {name} = 1 is not supported"):
            default_sampling(model)
        assert Engine(model).end_tokens == (2,)


def test_templates_by_name_in_a_gguf_file(tmp_path):
    fields = {"tokenizer__chat_templates": ["tool_use"], "tokenizer__chat_template__tool_use": "tools!"}
    import_gguf(write(tmp_path / "a.gguf", network(), **fields), tmp_path / "model")
    assert load_tokenizer(tmp_path / "model").chat_template["tool_use"] == "tools!"


@pytest.mark.parametrize(("where", "in_tokenizer"), [("gguf", True), ("config", True), ("config", False)])
def test_bos_before_a_bare_text_once(tmp_path, where, in_tokenizer):
    """tokenizer_config.json's add_bos_token wins over tokenizer.json; a chat begins as its template says."""
    bos = TOKENS.index(SPECIAL[1])
    begins = (where == "gguf" and in_tokenizer) or (where == "config" and not in_tokenizer)
    file = write(tmp_path / "a.gguf", network(), tokenizer__ggml__add_bos_token=begins)
    if where == "gguf":
        engine, expected = Engine(file), in_tokenizer
    else:
        import_gguf(file, tmp_path / "model")
        settings = tmp_path / "model" / "tokenizer_config.json"
        settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": in_tokenizer}))
        engine, expected = Engine(tmp_path / "model"), in_tokenizer
        save_model(engine.model, tmp_path / "trained", engine.tokenizer)
        assert Engine(tmp_path / "trained").encode("12") == engine.encode("12")
    bare = engine.encode("12", begin=False)
    assert bos not in bare
    assert engine.encode("12") == ([bos, *bare] if expected else bare)
    assert engine.encode(f"{SPECIAL[1]}12") == [bos, *bare]
    request = engine.submit("12", SamplingParams(max_tokens=1))
    assert list(request.prompt) == engine.encode("12")


def test_a_wrong_add_bos_token_is_said(model):
    settings = model / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"add_bos_token": "true"}))
    with pytest.raises(UserError, match=r"tokenizer_config\.json: add_bos_token = 'true' must be true or false"):
        load_tokenizer(model)


def test_max_length_counts_the_prompt(model):
    engine = Engine(model)
    params = SamplingParams(max_tokens=50, max_length=6, ignore_eos=True)
    assert len(engine.generate([[5, 6, 7, 8]], params)[0].tokens) == 2
    with pytest.raises(UserError, match="max_length allows 4"):
        engine.generate([[5, 6, 7, 8]], SamplingParams(max_length=4))


@pytest.mark.parametrize("inner", ["", "model", "student/model"])
def test_a_runs_folder_stands_for_its_model(tmp_path, inner):
    save_model(network(), tmp_path / "run" / inner) if inner else save_model(network(), tmp_path / "run")
    assert load_model(tmp_path / "run").config == LLAMA
    assert read_released(tmp_path / "run").end_tokens == (2,)
