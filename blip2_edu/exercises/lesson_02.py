"""Checks of lesson 02: the frozen image encoder."""

from collections.abc import Callable
from copy import deepcopy

import torch
from einops import rearrange
from torch import Tensor, nn

from blip2_edu.exercises import exercise, expect, noise


@exercise
def check_num_tokens(num_tokens: Callable[[int, int], int]) -> str:
    """num_tokens(image_size, patch_size) -> how many tokens a ViT hands over."""
    for image, patch in ((224, 14), (364, 14), (224, 16), (490, 14)):
        tokens, side = num_tokens(image, patch), image // patch
        expect(tokens != side**2, "you left out the class token in front of the patches")
        expect(
            tokens not in (side, side + 1),
            "you counted the patches along one side: there are as many rows as columns",
        )
        expect(tokens != (side + 1) ** 2, "the class token comes once, not once a row and a column")
        expect(
            tokens == side**2 + 1, f"{image} pixels cut into patches of {patch} are not {tokens}"
        )
        expect(isinstance(tokens, int), "tokens are whole: divide with //")
    return "one class token, and one token for every patch."


@exercise
def check_unpatchify(unpatchify: Callable[[Tensor, int, int], Tensor]) -> str:
    """unpatchify(patches (B, N, size x size x 3), rows, size) -> images (B, 3, H, W)."""
    image = noise(2, 3, 8, 12)  # two rows and three columns of patches of 4 x 4 pixels
    patches = rearrange(image, "b c (r p) (k q) -> b (r k) (p q c)", p=4, q=4)
    result = unpatchify(patches, 2, 4)
    expect(isinstance(result, Tensor), "the images should be a tensor")
    expect(
        result.shape != (2, 3, 12, 8),
        "your picture lies on its side: `rows` counts the patches from top to bottom",
    )
    expect(
        result.shape == image.shape,
        f"2 x 3 patches of 4 x 4 pixels make {tuple(image.shape)}, not {tuple(result.shape)}",
    )

    def laid(pattern: str) -> bool:
        return torch.equal(result, rearrange(patches, pattern, r=2, p=4, q=4))

    expect(
        not laid("b (k r) (p q c) -> b c (r p) (k q)"),
        "you laid the patches column by column: they were cut row by row",
    )
    expect(
        not laid("b (r k) (q p c) -> b c (r p) (k q)"),
        "every patch lies on its side: within a patch, too, rows come before columns",
    )
    expect(
        not laid("b (r k) (c p q) -> b c (r p) (k q)"),
        "you read each patch colour by colour: the three colours of a pixel stand together",
    )
    expect(
        not laid("b (r k) (p q c) -> b c (p r) (q k)"),
        "you took one pixel of every patch in turn: the patch comes first, then the pixel in it",
    )
    expect(torch.equal(result, image), "the pixels are all there, but not where they were")
    return "cut up and put together again, not one pixel is lost."


@exercise
def check_freeze(freeze: Callable[[nn.Module], nn.Module]) -> str:
    """freeze(module) -> the same module, which nothing can change any more."""
    network = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 4))
    mean = "1.running_mean"
    network.get_buffer(mean).add_(0.3)
    before = deepcopy(network).eval()
    frozen = freeze(network)
    expect(isinstance(frozen, nn.Module), "give the module back")
    expect(
        not any(p.requires_grad for p in frozen.parameters()),
        "its parameters still take gradients: an optimiser would move them",
    )
    expect(
        not any(module.training for module in frozen.modules()),
        "it is in training mode: BatchNorm counts along and Dropout throws dice",
    )
    parent = nn.Sequential(frozen, nn.Linear(4, 2)).train()
    expect(parent[1].training, "a layer that you were not asked to freeze does not train any more")
    x = noise(16, 6).requires_grad_()
    parent(x).square().sum().backward()
    moved = not torch.equal(network.get_buffer(mean), before.get_buffer(mean))
    expect(
        not moved and not any(module.training for module in frozen.modules()),
        "a parent's .train() woke it up: BatchNorm's statistics have moved",
    )
    expect(
        x.grad is not None and x.grad.any(),
        "no gradient comes through to the input: freeze the parameters, not the computation",
    )
    expect(torch.allclose(frozen(x), before(x)), "it computes something else than before")
    return "no gradient, no statistics and no parent can change it, and gradients pass through."
