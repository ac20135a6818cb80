"""Typical mistakes in lesson 04, each with words that the verdict must hold."""

import torch

from blip2_edu.qformer import joint_mask


def count(blocks, image_width=None, biases=4, norms=2):
    def cross_attention_parameters(config):
        width = config.width
        matrices = 2 * width * (width + (config.image_width if image_width is None else width))
        return blocks(config) * (matrices + (biases + norms) * width)

    return cross_attention_parameters


def look(config):
    return -(-config.num_layers // config.cross_attention_every)


def prefix(num_queries, prefix_length, text_length):
    mask = joint_mask(num_queries, torch.ones(1, text_length), "causal")[0]
    known = num_queries + prefix_length
    mask[num_queries:known, num_queries:known] = True
    return mask


def with_part(rows, columns, value):
    """The right mask, but for one of its parts; parts are Q(ueries), P(refix), G(enerated)."""

    def prefix_mask(num_queries, prefix_length, text_length):
        known = num_queries + prefix_length
        part = {
            "Q": slice(num_queries),
            "P": slice(num_queries, known),
            "G": slice(known, None),
        }
        mask = prefix(num_queries, prefix_length, text_length)
        mask[part[rows], part[columns]] = value
        return mask

    return prefix_mask


def no_self(num_queries, prefix_length, text_length):
    mask = prefix(num_queries, prefix_length, text_length)
    generated = torch.arange(num_queries + prefix_length, num_queries + text_length)
    mask[generated, generated] = False
    return mask


def triangle(num_queries, prefix_length, text_length):
    return torch.ones([num_queries + text_length] * 2, dtype=torch.bool).tril()


def by_place(x, is_query, of_queries, of_text):
    n = int(is_query.sum())
    return torch.cat([of_queries(x[:, :n]), of_text(x[:, n:])], dim=1)


def sorted_by_kind(x, is_query, of_queries, of_text):
    return torch.cat([of_queries(x[:, is_query]), of_text(x[:, ~is_query])], dim=1)


def in_place(x, is_query, of_queries, of_text):
    x[:, is_query] = of_queries(x[:, is_query])
    x[:, ~is_query] = of_text(x[:, ~is_query])
    return x


def noticed(run, text_ids, changed):
    """Whether the queries and the first word notice a new word at `changed`."""
    other = text_ids.clone()
    other[0, changed] = other[0, changed] % 63 + 1
    (queries, text), (other_queries, other_text) = run(text_ids), run(other)
    return not torch.equal(queries, other_queries), not torch.equal(text[:, 0], other_text[:, 0])


def first_word_changed(run, text_ids):
    queries, first = noticed(run, text_ids, 0)
    return "bidirectional" if queries else "unimodal" if first else "causal"


def text_alone(run, text_ids):
    return "bidirectional" if noticed(run, text_ids, -1)[1] else "causal"


def queries_alone(run, text_ids):
    return "bidirectional" if noticed(run, text_ids, -1)[0] else "causal"


def swapped_answers(run, text_ids):
    queries, first = noticed(run, text_ids, -1)
    return "bidirectional" if queries else "causal" if first else "unimodal"


MISTAKES = {
    "check_cross_attention_parameters": [
        (count(lambda config: 1), "one block's"),
        (count(lambda config: config.num_layers), "not every block"),
        (count(lambda c: c.num_layers // c.cross_attention_every), "rounded up"),
        (count(look, image_width="forgotten"), "`image_width` wide"),
        (count(look, norms=0), "layer norms"),
        (count(look, biases=0), "biases"),
        (lambda config: 0, "it is"),
    ],
    "check_prefix_mask": [
        (lambda q, p, t: torch.ones(t, t, dtype=torch.bool), "the mask of 8 positions"),
        (lambda q, p, t: prefix(q, p, t).float(), "boolean"),
        (lambda q, p, t: ~prefix(q, p, t), "wrong way round"),
        (lambda q, p, t: prefix(q, p, t).T, "rows and columns are swapped"),
        (triangle, "every query must see all queries"),
        (lambda q, p, t: torch.ones(q + t, q + t, dtype=torch.bool), "a query sees text"),
        (with_part("P", "Q", False), "text must see all queries"),
        (with_part("P", "G", True), "generated after it"),
        (with_part("G", "G", True), "lets text see later"),
        (with_part("G", "P", False), "must see itself and all text before it"),
        (no_self, "must see itself"),
        (
            lambda q, p, t: joint_mask(q, torch.ones(1, t), "causal")[0],
            "see one another in both directions",
        ),
    ],
    "check_route": [
        (lambda x, is_query, q, t: torch.where(is_query[:, None], t(x), q(x)), "swapped"),
        (lambda x, is_query, q, t: q(x), "the text went through"),
        (lambda x, is_query, q, t: t(x), "the queries went through"),
        (by_place, "anywhere"),
        (sorted_by_kind, "stay where it was"),
        (in_place, "you wrote into `x`"),
        (lambda x, is_query, q, t: x.clone(), "did not get"),
        (lambda x, is_query, q, t: q(x)[:, is_query], "shape"),
    ],
    "check_which_mask": [
        (lambda run, text_ids: "multimodal", "none of"),
        (lambda run, text_ids: "unimodal", "not"),
        (first_word_changed, "causal"),
        (text_alone, "not bidirectional but unimodal"),
        (queries_alone, "unimodal, not causal"),
        (swapped_answers, "causal"),
    ],
}
