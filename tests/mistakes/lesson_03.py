"""Wrong attempts at the exercises of lesson 03, and words of the verdict that each must get."""

import torch


def weights(queries, features):
    return (queries @ features.mT / features.shape[-1] ** 0.5).softmax(dim=-1)


def look(queries, features):
    return weights(queries, features) @ features


def softmax_over_queries(queries, features):
    return (queries @ features.mT / features.shape[-1] ** 0.5).softmax(dim=1) @ features


def unscaled(queries, features):
    return (queries @ features.mT).softmax(dim=-1) @ features


def mean_of_features(queries, features):
    return features.mean(dim=1, keepdim=True).expand(-1, queries.shape[1], -1)


def one_image_only(queries, features):
    return look(queries, features)[:1]


def outputs_in_the_old_order(read, queries, features):
    order = torch.arange(queries.shape[1]).flip(0)
    return torch.allclose(read(queries[:, order], features), read(queries, features), atol=1e-5)


def features_in_new_order(read, queries, features):
    order = torch.arange(features.shape[1]).flip(0)
    return torch.allclose(read(queries, features[:, order]), read(queries, features), atol=1e-5)


def compares_shapes(read, queries, features):
    order = torch.arange(queries.shape[1]).flip(0)
    changed, as_before = read(queries[:, order], features), read(queries, features)
    return changed.shape == as_before.shape


def compares_outputs(read, loss, queries, features):
    seen = read(queries, features)
    return torch.allclose(seen, seen[:, :1].expand_as(seen), atol=1e-5)


def draws_other_queries(read, loss, queries, features):
    queries = torch.randn(queries.shape).requires_grad_()
    (gradient,) = torch.autograd.grad(loss(read(queries, features)), queries)
    return torch.allclose(gradient, gradient[:, :1].expand_as(gradient), atol=1e-5)


def outputs_of_a_noisy_reader_only(read, loss, queries, features):
    queries = queries.clone().requires_grad_()
    seen = read(queries, features)
    (gradient,) = torch.autograd.grad(seen.sum(), queries)
    return torch.allclose(gradient, gradient[:, :1].expand_as(gradient), atol=1e-5)


MISTAKES = {
    "check_look": [
        (softmax_over_queries, "over the queries"),
        (unscaled, "square root"),
        (mean_of_features, "the queries had no say"),
        (weights, "these are the weights"),
        (one_image_only, "must give (4, 5, 8)"),
        (lambda queries, features: queries, "not (1, 5, 8)"),
        (lambda queries, features: 2 * look(queries, features), "not the softmax-weighted sums"),
    ],
    "check_compression": [
        (lambda n, w, q, d: n / q, "not equally wide"),
        (lambda n, w, q, d: q * d / (n * w), "upside down"),
        (lambda n, w, q, d: (n + w) / (q + d), "you added"),
        (lambda n, w, q, d: n * w - q * d, "the factor is"),
    ],
    "check_queries_are_a_set": [
        (outputs_in_the_old_order, "outputs in the new order too"),
        (features_in_new_order, "leave the features in order"),
        (compares_shapes, "position embedding"),
        (lambda read, queries, features: False, "and you say that it does not"),
    ],
    "check_stays_tied": [
        (compares_outputs, "look at the gradients"),
        (draws_other_queries, "equal gradients"),
        (outputs_of_a_noisy_reader_only, "flattened queries"),
        (lambda read, loss, queries, features: True, "flattened queries"),
    ],
}
