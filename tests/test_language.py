"""The frozen language models, against themselves: one text at a time, whole sequences, no cache."""

import pytest
import torch
from helpers import small_models
from helpers.samples import randomise
from safetensors.torch import load_file, save_file
from test_vision import state_hash
from torch import Tensor, nn
from transformers import BloomConfig, BloomForCausalLM, FalconConfig, FalconForCausalLM

from blip2_edu.errors import WeightsError
from blip2_edu.language import IMAGE, LanguageModel, load_language_model, split_prefix
from blip2_edu.packing import packed_logits

PROMPTS = [f"see {IMAGE}:", f"{IMAGE}", f"a longer one {IMAGE} and more behind:"]
TEXTS = ["a dog", "", "two cats on a mat", "x", "a man in red", "snow"]
CLOSE = {"atol": 1e-5, "rtol": 1e-5}


@pytest.fixture(scope="module", params=small_models.KINDS)
def model(request) -> LanguageModel:
    return small_models.language_model(request.param, end_of_text="\n")


def soft_prompts(count: int, width: int = 24, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, 3, width, generator=generator).requires_grad_()


def negative_log_likelihood(
    model: LanguageModel, vectors: Tensor, prompt: str, text: str
) -> tuple[Tensor, int]:
    """Of one text after one prompt, and its number of tokens: no batch, no cache, no padding."""
    network, tokens = model.network, model.tokenizer
    embed = network.get_input_embeddings()
    before, after = prompt.split(IMAGE)
    labels = tokens(text + "\n", add_special_tokens=False).input_ids
    parts = [
        embed(torch.tensor(tokens(before, add_special_tokens=False).input_ids).long()),
        vectors,
        embed(torch.tensor(tokens(after).input_ids).long()),  # with what the tokenizer adds
    ]
    if model.is_encoder_decoder:
        decoder_ids = torch.tensor([[small_models.PAD, *labels[:-1]]])
        logits = network(
            inputs_embeds=torch.cat(parts)[None], decoder_input_ids=decoder_ids
        ).logits[0]
    else:
        sequence = torch.cat([*parts, embed(torch.tensor(labels))])
        logits = network(inputs_embeds=sequence[None], use_cache=False).logits[0]
        logits = logits[-len(labels) - 1 : -1]  # each is told by the position before it
    return -logits.log_softmax(-1)[range(len(labels)), labels].sum(), len(labels)


@pytest.mark.parametrize("copies", [1, 2])
def test_the_loss_and_its_gradient(model, copies):
    soft, texts = soft_prompts(3), TEXTS[: 3 * copies]
    total, count = 0.0, 0
    for i, text in enumerate(texts):
        value, tokens = negative_log_likelihood(
            model, soft[i // copies], PROMPTS[i // copies], text
        )
        total, count = total + value, count + tokens
    (expected,) = torch.autograd.grad(total / count, soft)
    assert expected.abs().sum(dim=(1, 2)).min() > 1e-3  # every image is heard

    loss = model.loss(soft, PROMPTS, texts)
    torch.testing.assert_close(loss, total / count, **CLOSE)
    (gradient,) = torch.autograd.grad(loss, soft)
    torch.testing.assert_close(gradient, expected, **CLOSE)


@pytest.mark.parametrize("kind", small_models.MORE_KINDS)
def test_other_networks(kind):
    model, soft = small_models.language_model(kind, end_of_text="\n"), soft_prompts(3)
    values = [
        negative_log_likelihood(model, soft[i // 2], PROMPTS[i // 2], text)
        for i, text in enumerate(TEXTS)
    ]
    expected = sum(value for value, _ in values) / sum(tokens for _, tokens in values)
    loss = model.loss(soft, PROMPTS, TEXTS)
    torch.testing.assert_close(loss, expected, **CLOSE)
    gradients = [torch.autograd.grad(some, soft)[0] for some in (loss, expected)]
    assert gradients[0].abs().sum(dim=(1, 2)).min() > 0
    torch.testing.assert_close(*gradients, **CLOSE)
    settings = {"num_beams": 3, "do_sample": False, "max_new_tokens": 6}
    together = model.generate(soft, PROMPTS, **settings)
    assert together == [
        model.generate(soft[i : i + 1], PROMPTS[i : i + 1], **settings)[0] for i in range(3)
    ]


def test_texts_that_share_a_prompt_equal_texts_with_their_own(model):
    soft = soft_prompts(2)
    shared = model.loss(soft, PROMPTS[:2], TEXTS)
    own = model.loss(
        soft.repeat_interleave(3, dim=0), [p for p in PROMPTS[:2] for _ in range(3)], TEXTS
    )
    torch.testing.assert_close(shared, own, **CLOSE)
    gradients = [torch.autograd.grad(loss, soft)[0] for loss in (shared, own)]
    torch.testing.assert_close(*gradients, **CLOSE)


def test_empty_texts_teach_the_end_alone(model):
    soft = soft_prompts(2)
    values = [negative_log_likelihood(model, s, PROMPTS[0], "")[0] for s in soft]
    loss = model.loss(soft, [PROMPTS[0]] * 2, [""] * 4)
    torch.testing.assert_close(loss, sum(values) / 2, **CLOSE)


def test_only_the_text_and_its_end_have_labels(model):
    labels = model.label_ids(["ab", "", "abcd"])
    assert labels.shape == (3, 5)
    assert (labels != -100).sum(dim=1).tolist() == [3, 1, 5]
    assert labels[0, 2] == labels[1, 0] == labels[2, 4] == model.end_token
    assert model.tokenizer.decode([model.end_token]) == "\n"
    assert not set(labels.flatten().tolist()) & set(range(len(small_models.SPECIAL)))


def test_the_end_is_the_tokenizers_own_unless_told():
    assert small_models.language_model("llama").end_token == small_models.END


def test_prompts_are_padded_where_it_does_no_harm(model):
    """On the left, where a text follows; in an encoder on the right."""
    soft = soft_prompts(3)
    embeddings, mask = model.embed_prompts(soft, PROMPTS)
    lengths = mask.sum(dim=1)
    assert embeddings.shape[:2] == mask.shape and embeddings.shape[1] == lengths.max()
    for i, length in enumerate(lengths):
        padding, ones = [0] * (mask.shape[1] - length), [1] * length
        encoder = model.is_encoder_decoder
        assert mask[i].tolist() == (ones + padding if encoder else padding + ones)
        alone, _ = model.embed_prompts(soft[i : i + 1], PROMPTS[i : i + 1])
        assert torch.equal(embeddings[i, :length] if encoder else embeddings[i, -length:], alone[0])


def test_what_the_tokenizer_adds_stands_behind_the_image():
    embeddings = {
        kind: small_models.language_model(kind).embed_prompts(soft_prompts(1), [IMAGE + "ab"])[0]
        for kind in small_models.KINDS
    }
    assert [e.shape[1] for e in embeddings.values()] == [3 + 2, 3 + 3, 3 + 3]
    for kind, place, token in (("opt", 3, small_models.START), ("t5", -1, small_models.END)):
        words = small_models.language_network(kind).get_input_embeddings().weight
        assert torch.equal(embeddings[kind][0, place], words[token])
        assert torch.equal(embeddings[kind][0, :3], soft_prompts(1)[0])


DECODING = {
    "greedy": {"num_beams": 1},
    "beam": {"num_beams": 3, "length_penalty": -1.0},
}


@pytest.mark.parametrize("decoding", DECODING)
def test_generation_does_not_depend_on_the_batch(model, decoding):
    settings = {"do_sample": False, "max_new_tokens": 12} | DECODING[decoding]
    soft = soft_prompts(3)
    together = model.generate(soft, PROMPTS, **settings)
    alone = [
        model.generate(soft[i : i + 1], [prompt], **settings)[0] for i, prompt in enumerate(PROMPTS)
    ]
    assert together == alone
    assert len(set(together)) > 1


@pytest.mark.parametrize("prompts", [PROMPTS, [IMAGE]], ids=["several", "of the image alone"])
def test_a_prompt_read_once_for_all_beams_gives_the_same_texts(model, prompts):
    soft = soft_prompts(len(prompts))[:, : 1 if prompts == [IMAGE] else None]
    embeddings, mask = model.embed_prompts(soft, prompts)
    settings = {"num_beams": 3, "num_return_sequences": 2, "do_sample": False, "max_new_tokens": 9}
    ids = model.network.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        eos_token_id=model.end_token,
        pad_token_id=small_models.PAD,
        **settings,
    )
    plain = [text.strip() for text in model.tokenizer.batch_decode(ids, skip_special_tokens=True)]
    assert model.generate(soft, prompts, **settings) == plain
    assert len(plain) == 2 * len(prompts)


def test_log_likelihoods_add_up_to_the_loss(model):
    soft, texts = soft_prompts(3), ["ab", "", "abcab"]
    scores = model.log_likelihoods(soft, PROMPTS, texts)
    real = model.label_ids(texts) >= 0
    assert (scores[~real] == 0).all() and (scores[real] < 0).all()
    torch.testing.assert_close(-scores[real].mean(), model.loss(soft, PROMPTS, texts))


def test_every_token_belongs_to_a_word(model):
    text = "ab cab  b"
    words = model.word_of_token(text)
    assert len(words) == len(model.token_ids(text))
    assert words == sorted(words) and set(words) == {0, 1, 2}


def test_generation_writes_what_the_loss_finds_likeliest(model):
    embeddings, mask = model.embed_prompts(soft_prompts(2), PROMPTS[:2])
    ids = model.network.generate(
        inputs_embeds=embeddings,
        attention_mask=mask,
        do_sample=False,
        max_new_tokens=6,
        eos_token_id=None,
        pad_token_id=small_models.PAD,
    )[:, -6:].contiguous()
    assert torch.equal(model.logits(embeddings, mask, ids).argmax(dim=-1), ids.flatten())


def test_sampling_follows_the_seed(model):
    def sample(seed: int) -> list[str]:
        torch.manual_seed(seed)
        soft = soft_prompts(2).detach()
        return model.generate(soft, PROMPTS[:2], do_sample=True, top_p=0.9, max_new_tokens=12)

    assert sample(1) == sample(1)
    assert len({tuple(sample(seed)) for seed in range(4)}) > 1


def test_generation_stops_at_the_end_of_text(model):
    """With an output layer that always says newline, nothing is written."""
    soft = soft_prompts(2)
    stubborn = small_models.language_model(model.name, end_of_text="\n")
    head = nn.Linear(24, small_models.VOCABULARY)
    nn.init.zeros_(head.weight)
    head.bias.data = nn.functional.one_hot(
        torch.tensor(stubborn.end_token), small_models.VOCABULARY
    ).float()
    stubborn.network.set_output_embeddings(head)
    assert stubborn.generate(soft, PROMPTS[:2], max_new_tokens=50, do_sample=False) == ["", ""]


def test_words_as_a_soft_prompt_are_words(model):
    """A soft prompt made of a word's own embeddings does what the word does."""
    words = model.token_ids("a red dog")
    settings = {"do_sample": False, "max_new_tokens": 12}
    soft = model.generate(model.embed(words)[None], [f"see {IMAGE}:"], **settings)
    hard = model.generate(model.embed(words)[None, :0], [f"see {IMAGE}a red dog:"], **settings)
    if model.name != "opt":  # its first token stands behind the image, wherever that is
        assert soft == hard
    else:
        assert soft != hard


def test_frozen(model):
    """A step on the soft prompt: gradients flow through the model, and nothing in it moves."""
    before = state_hash(model.network)
    soft = nn.Parameter(soft_prompts(2).detach())
    parent = nn.ModuleDict({"language": model})
    parent["soft"] = nn.ParameterList([soft])
    parent.train()
    assert parent.training and not any(module.training for module in model.modules())
    learning = [p for p in parent.parameters() if p.requires_grad]
    assert len(learning) == 1 and learning[0] is soft
    optimizer = torch.optim.AdamW(learning, lr=0.1)
    first = model.loss(soft, PROMPTS[:2], TEXTS[2:4])
    assert torch.equal(first, model.loss(soft, PROMPTS[:2], TEXTS[2:4]))  # no dropout
    first.backward()
    assert (soft.grad.abs().amax(dim=2) > 0).all()  # every vector of every soft prompt
    optimizer.step()
    assert all(p.grad is None for p in model.parameters())
    assert state_hash(model.network) == before
    assert model.loss(soft, PROMPTS[:2], TEXTS[2:4]) < first


@pytest.mark.parametrize(
    "prompts, texts, what",
    [
        (["no image here"], ["a"], "has no {image}"),
        ([IMAGE] * 2, ["a"] * 2, "zip"),
        ([IMAGE], [], "texts"),
    ],
)
def test_arguments_that_do_not_go_together(model, prompts, texts, what):
    with pytest.raises(ValueError, match=what):
        model.loss(soft_prompts(1), prompts, texts)


def test_texts_must_divide_among_the_prompts(model):
    with pytest.raises(ValueError, match="3 texts do not divide among 2 prompts"):
        model.loss(soft_prompts(2), PROMPTS[:2], TEXTS[:3])


@pytest.mark.parametrize("text", ["one", "one two", "a b c d e", "  a  dog\truns over the  hill "])
def test_split_prefix(text):
    words = text.split()
    cuts = set()
    for seed in range(60):
        prefix, suffix = split_prefix(text, torch.Generator().manual_seed(seed))
        assert prefix.split() + suffix.split() == words and suffix
        cuts.add(len(prefix.split()))
    last = max(1, len(words) // 2)
    assert cuts == (set(range(1, last + 1)) if len(words) > 1 else {0})
    again = [split_prefix(text, torch.Generator().manual_seed(5)) for _ in range(2)]
    assert again[0] == again[1]


def test_split_prefix_of_nothing():
    assert split_prefix("") == ("", "")


@pytest.mark.parametrize("kind", small_models.KINDS)
def test_load(kind, tmp_path):
    name = small_models.save_language_model(kind, tmp_path)
    loaded, made = load_language_model(name), small_models.language_model(kind, "\n")
    loaded.end_with("\n")
    assert loaded.name == name and loaded.is_encoder_decoder == (kind == "t5")
    soft = soft_prompts(3)
    loss = loaded.loss(soft, PROMPTS, TEXTS)
    torch.testing.assert_close(loss, made.loss(soft, PROMPTS, TEXTS), **CLOSE)


def damaged(kind: str, folder) -> str:
    small_models.save_language_model("llama", folder)
    weights = folder / "model.safetensors"
    if kind == "truncated":
        weights.write_bytes(weights.read_bytes()[:1000])
    elif kind == "no weights":
        weights.unlink()
    elif kind == "a tensor less":
        tensors = load_file(weights)
        del tensors["model.norm.weight"]
        save_file(tensors, weights, {"format": "pt"})
    elif kind == "no tokenizer":
        for file in folder.glob("tokenizer*"):
            file.unlink()
    elif kind == "text as config":
        (folder / "config.json").write_text("Dear reader,\n\nthis is a letter.\n")
    elif kind == "vision tower":
        small_models.vision_network().save_pretrained(folder)
    return str(folder)


DAMAGES = (
    "truncated",
    "no weights",
    "a tensor less",
    "no tokenizer",
    "text as config",
    "vision tower",
)


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_is_no_language_model_is_one_sentence(kind, tmp_path):
    with pytest.raises(WeightsError) as error:
        load_language_model(damaged(kind, tmp_path))
    assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


@pytest.mark.slow
def test_smollm2_reads_a_soft_prompt():
    """The real one: words turned into vectors are still understood, the chat form is its own."""
    model = load_language_model()
    assert model.width == 576 and not model.is_encoder_decoder
    prompt = f"<|im_start|>user\nWhat is the capital of {IMAGE}?<|im_end|>\n<|im_start|>assistant\n"
    countries = [model.embed(model.token_ids(name))[None] for name in (" France", " Italy")]
    soft = torch.cat(countries)
    answers = model.generate(soft, [prompt] * 2, do_sample=False, max_new_tokens=12)
    assert "Paris" in answers[0] and "Rome" in answers[1]
    assert model.loss(soft, [prompt] * 2, answers) < 0.5


ALIBI = {
    "bloom": (BloomForCausalLM, BloomConfig(hidden_size=24, n_layer=2, n_head=3)),
    "falcon": (
        FalconForCausalLM,
        FalconConfig(hidden_size=24, num_hidden_layers=2, num_attention_heads=3, alibi=True),
    ),
}


@pytest.mark.parametrize("kind", ALIBI)
def test_a_model_that_tells_positions_by_alibi(kind):
    """It takes no position numbers, so its texts are read one by one: as if each stood alone."""
    network_class, config = ALIBI[kind]
    config.vocab_size = small_models.VOCABULARY
    network = randomise(network_class(config), 1).eval()
    model = LanguageModel(kind, network, small_models.tokenizer("opt"), "\n")
    assert model.uses_alibi
    soft, texts = soft_prompts(2), ["a dog", "", "two cats on a mat", "snow"]
    each = [
        negative_log_likelihood(model, soft[i // 2], PROMPTS[i // 2], text)
        for i, text in enumerate(texts)
    ]
    expected = sum(one for one, _ in each) / sum(count for _, count in each)
    loss = model.loss(soft, PROMPTS[:2], texts)
    torch.testing.assert_close(loss, expected, **CLOSE)
    gradients = [torch.autograd.grad(x, soft)[0] for x in (loss, expected)]
    torch.testing.assert_close(*gradients, **CLOSE)
    settings = {"do_sample": False, "max_new_tokens": 5}
    for beams in (1, 3):
        both = model.generate(soft.detach(), PROMPTS[:2], num_beams=beams, **settings)
        alone = [
            model.generate(soft[i : i + 1].detach(), [PROMPTS[i]], num_beams=beams, **settings)[0]
            for i in range(2)
        ]
        assert both == alone


@pytest.mark.parametrize("copies", [1, 3])
def test_the_packed_logits_equal_the_plain_ones(model, copies):
    if model.is_encoder_decoder:
        pytest.skip("only decoders are packed")
    soft = soft_prompts(2)
    embeddings, mask = model.embed_prompts(soft, PROMPTS[:2])
    labels = model.label_ids(["a dog", "the cat runs in snow", "on", "a", "red car", "grass"])
    labels = labels[: 2 * copies]
    packed = packed_logits(model.network, embeddings, mask, labels, copies)
    repeated = (x.repeat_interleave(copies, dim=0) for x in (embeddings, mask))
    plain = model.logits(*repeated, labels)
    torch.testing.assert_close(packed, plain, atol=1e-5, rtol=1e-5)
    weights = torch.randn(packed.shape, generator=torch.Generator().manual_seed(0))
    gradients = [
        torch.autograd.grad((x * weights).sum(), soft, retain_graph=True)[0]
        for x in (packed, plain)
    ]
    torch.testing.assert_close(*gradients, atol=1e-4, rtol=1e-4)


def test_an_end_that_the_tokenizer_does_not_know_is_one_sentence():
    with pytest.raises(WeightsError, match="has no token for ''") as error:
        small_models.language_model("opt", end_of_text="")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "end, words", [("the end", "has 7 tokens for 'the end'"), ("</s></s>", "has 2 tokens")]
)
def test_an_end_of_several_tokens_is_refused(end, words):
    with pytest.raises(WeightsError, match=words) as error:
        small_models.language_model("llama", end_of_text=end)
    assert "\n" not in str(error.value)


def test_an_end_that_is_an_ordinary_piece_does_not_stay_in_the_answer(model):
    """With an output layer that says a, b and then the end for ever."""
    writer = small_models.language_model(model.name, end_of_text=".")
    a, b = writer.token_ids("ab").tolist()
    steps = iter([a, b, writer.end_token])
    calls = []

    def speak(_, inputs, output):
        calls.append(1)
        logits = torch.full_like(output, -100.0)
        logits[..., next(steps)] = 100.0
        return logits

    writer.network.get_output_embeddings().register_forward_hook(speak)
    settings = {"max_new_tokens": 9, "do_sample": False}
    assert writer.generate(soft_prompts(1), PROMPTS[:1], **settings) == ["ab"]
    assert len(calls) == 3


def test_a_control_token_in_a_text_is_only_text(model):
    text = "a </s><pad> <image>b"
    labels = model.label_ids([text])[0]
    assert labels[:-1].min() >= len(small_models.SPECIAL) and labels[-1] == model.end_token
    assert model.tokenizer.decode(labels[:-1]) == text
    words = model.word_of_token(text)
    assert len(words) == len(labels) - 1 and set(words) == {0, 1, 2}
    # and the tokenizer reads the next prompt as ever
    assert model.token_ids("</s>").tolist() == [small_models.END]


@pytest.mark.parametrize("end", [[7], 7])
def test_a_published_checkpoint_decides_its_end_token(end):
    model = small_models.language_model("opt", end_of_text=end)
    assert model.end_token == 7
