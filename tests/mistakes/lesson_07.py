"""Wrong answers to the exercises of lesson 07, and words of the verdict on each."""

import torch


def solved(text_ids, text_mask, dec):
    ids = text_ids.clone()
    ids[:, 0] = dec
    return ids[:, :-1], ids[:, 1:].masked_fill(text_mask[:, 1:] == 0, -100)


def in_place(text_ids, text_mask, dec):
    text_ids[:, 0] = dec
    return text_ids[:, :-1], text_ids[:, 1:].masked_fill(text_mask[:, 1:] == 0, -100)


def starts_with_cls(text_ids, text_mask, dec):
    return text_ids[:, :-1], solved(text_ids, text_mask, dec)[1]


def unshifted(text_ids, text_mask, dec):
    inputs, _ = solved(text_ids, text_mask, dec)
    return inputs, inputs.masked_fill(text_mask[:, :-1] == 0, -100)


def scores_padding(text_ids, text_mask, dec):
    return solved(text_ids, text_mask, dec)[0], text_ids[:, 1:]


def never_stops(text_ids, text_mask, dec):
    inputs, labels = solved(text_ids, text_mask, dec)
    return inputs, labels.masked_fill(labels == 102, -100)


def full_length(text_ids, text_mask, dec):
    ids = text_ids.clone()
    ids[:, 0] = dec
    return ids, torch.cat([ids[:, 1:], torch.full((len(ids), 1), -100)], dim=1)


def token_scores(logits, labels):
    right = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return right * (labels != -100)


def caption_scores(logits, labels):
    return token_scores(logits, labels).sum(dim=1) / (labels != -100).sum(dim=1)


def smoothed(logits, labels):
    real = labels != -100
    spread = (logits.log_softmax(-1).mean(-1) * real).sum(dim=1) / real.sum(dim=1)
    return 0.9 * caption_scores(logits, labels) + 0.1 * spread


def probabilities(logits, labels):
    real = labels != -100
    return (token_scores(logits, labels).exp() * real).sum(dim=1) / real.sum(dim=1)


def greedy(
    model, image, end, length, start=None, keep_cache=True, fill=True, keep_end=False, rows=False
):
    cache = model.qformer(image).cache
    start = model.config.qformer.vocab_size - 1 if start is None else start
    words = torch.full((image[0][0].shape[0], 1), start)
    ended, caption = torch.zeros(len(words), dtype=torch.bool), []
    for _ in range(length):
        out = model.qformer(text_ids=words, pattern="causal", cache=cache)
        cache = out.cache if keep_cache else cache
        words = model.generate_logits(out.text[:, -1:]).argmax(dim=-1)
        if fill:
            stop = words[:, 0] == end
            words[ended | (stop if not keep_end else torch.zeros_like(stop))] = 0
            ended |= stop
        caption.append(words)
    return torch.cat(caption, dim=1)[0] if rows else torch.cat(caption, dim=1)


def greedy_without_cache(model, image, end, length):
    """Right words, the slow way."""
    ids = torch.full((image[0][0].shape[0], 1), model.config.qformer.vocab_size - 1)
    for _ in range(length):
        text = model.qformer(image, ids, pattern="causal").text
        words = model.generate_logits(text[:, -1:]).argmax(dim=-1)
        ids = torch.cat([ids, words], dim=1)
    ids = ids[:, 1:]
    return ids.masked_fill((ids == end).cumsum(dim=1) > 0, 0)


def greedy_with_long_texts(model, image, end, length):
    """The queries' cache is used, but all words are fed again and again."""
    cache = model.qformer(image).cache
    ids = torch.full((image[0][0].shape[0], 1), model.config.qformer.vocab_size - 1)
    for _ in range(length):
        text = model.qformer(text_ids=ids, pattern="causal", cache=cache).text
        words = model.generate_logits(text[:, -1:]).argmax(dim=-1)
        ids = torch.cat([ids, words], dim=1)
    ids = ids[:, 1:]
    return ids.masked_fill((ids == end).cumsum(dim=1) > 0, 0)


MISTAKES = {
    "check_inputs_and_labels": [
        (in_place, "clone"),
        (starts_with_cls, "begin with [CLS]"),
        (unshifted, "shift them"),
        (scores_padding, "padding is among the labels"),
        (never_stops, "never learns to stop"),
        (full_length, "T - 1"),
        (lambda ids, mask, dec: solved(ids, mask, dec)[0], "return inputs and labels"),
    ],
    "check_caption_scores": [
        (lambda logits, labels: caption_scores(logits, labels).mean(), "one score for each"),
        (lambda logits, labels: -caption_scores(logits, labels), "the sign"),
        (lambda logits, labels: token_scores(logits, labels).sum(dim=1), "you sum"),
        (lambda logits, labels: token_scores(logits, labels).mean(dim=1), "padded length"),
        (smoothed, "for training"),
        (probabilities, "average probabilities"),
    ],
    "check_greedy_captions": [
        (lambda *a: greedy(*a, start=0), "the first word is wrong"),
        (lambda *a: greedy(*a, keep_cache=False), "newest cache"),
        (lambda *a: greedy(*a, fill=False), "has ended goes on"),
        (lambda *a: greedy(*a, keep_end=True), "no word of the caption"),
        (lambda *a: greedy(*a, rows=True), "(B, length)"),
        (greedy_without_cache, "read the image 8 times"),
        (greedy_with_long_texts, "36 text positions"),
    ],
}
