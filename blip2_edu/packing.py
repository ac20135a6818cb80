"""Several texts behind one prompt in one row, as a language model is trained fastest.

`LanguageModel.logits` says plainly what comes out; here it is computed without reading a prompt
twice and without padding between texts.

Axis letters as in `language`, and `C` texts an image, `R` tokens that are read of all texts of an
image.
"""

from typing import TYPE_CHECKING

import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def packed_logits(
    network: "PreTrainedModel", embeddings: Tensor, mask: Tensor, labels: Tensor, copies: int
) -> Tensor:
    """Logits (S, V): the prompt predicts the first token of a text, each token the next.

    What stands where is found out on the CPU, where the labels are: a GPU would be asked and waited
    for row by row.

    The C texts of an image follow its prompt in one row, without padding between them; each
    sees the prompt and itself, as if it stood there alone.
    """
    device = embeddings.device
    place = torch.arange(labels.shape[1])
    text = torch.arange(1, 1 + copies).repeat_interleave(len(place))
    place = place.repeat(copies)  # (C x T) both: which text, and which of its tokens
    labels = rearrange(labels, "(b c) t -> b (c t)", c=copies)
    scored = labels >= 0
    # All tokens are read but the last of each text, behind which nothing is asked.
    read = scored & pad(scored[:, 1:] & (place[1:] > 0), (0, 1))
    words = [row[kept] for row, kept in zip(labels, read, strict=True)]
    ids = pad_sequence(words, batch_first=True).to(device)  # (B, R)
    owner = [text[kept] for kept in read]
    owner = pad_sequence(owner, batch_first=True, padding_value=-1).to(device)
    behind = pad_sequence([place[kept] for kept in read], batch_first=True).to(device)

    owner = torch.cat([mask - 1, owner], dim=1)  # (B, L + R): 0 the prompt, -1 padding
    mine, yours = owner[:, :, None], owner[:, None, :]
    visible = (yours == mine) | (yours == 0)
    hidden = torch.finfo(embeddings.dtype).min
    logits = network(
        inputs_embeds=torch.cat([embeddings, network.get_input_embeddings()(ids)], dim=1),
        attention_mask=(hidden * ~visible.tril()).to(embeddings.dtype)[:, None],
        position_ids=torch.cat([positions(mask), mask.sum(dim=1)[:, None] + behind], dim=1),
        use_cache=False,
        logits_to_keep=1 + ids.shape[1],
    ).logits  # (B, 1 + R, V)
    # A text's first token is predicted in column 0, by the prompt, the others by those before.
    column = torch.where(place > 0, pad(read.cumsum(dim=1)[:, :-1], (1, 0)), 0)
    row = logits.shape[1] * torch.arange(len(logits))[:, None]
    return logits.flatten(0, 1).index_select(0, (row + column)[scored].to(device))


def positions(mask: Tensor) -> Tensor:
    """mask (B, L) -> each token's position (B, L), padding not counted."""
    return (mask.long().cumsum(dim=1) - 1).clamp(min=0)
