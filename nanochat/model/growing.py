"""A model whose vocabulary gets more tokens, such as those of chats."""

from dataclasses import replace

import torch

from nanochat.model.build import build
from nanochat.model.decoder import Decoder


@torch.no_grad()
def grown(model: Decoder, vocab_size: int) -> Decoder:
    """A copy of a model with a larger vocabulary, whose further ids follow the others; the model
    itself if it has that size.

    In each table with a row per token (embedding, value embeddings, head) the new rows are the mean
    of the old ones. As an input, a new token then is an average one. As an output, its logit is the
    mean of the others', so that by Jensen's inequality a new token is at most as likely as the old
    ones on average: k new tokens take at most k / (V + k) of the probability from V old ones, where
    a row of zeros or noise could take nearly all (Hewitt 2021, Initializing New Word Embeddings for
    Pretrained Language Models). A logit softcap bends this bound slightly. The weights of the old
    tokens do not change, nor do their logits.

    Device, compute dtype, attention backend and train or eval mode are the model's. ValueError for
    a smaller vocabulary."""
    n_new = vocab_size - model.config.vocab_size
    if n_new < 0:
        raise ValueError(
            f"a model of {model.config.vocab_size} tokens cannot shrink to {vocab_size}"
        )
    if n_new == 0:
        return model
    larger = build(
        replace(model.config, vocab_size=vocab_size),
        model.embedding.weight.device,
        model.compute_dtype,
        model.blocks[0].attention.backend,
    )
    weights = model.state_dict()
    for name, parameter in larger.state_dict().items():
        rows = weights[name]
        if rows.shape != parameter.shape:
            # in fp64, so that the sum's order does not show; on the CPU, since MPS has no fp64
            mean = rows.cpu().double().mean(dim=0, keepdim=True).to(rows)
            weights[name] = torch.cat((rows, mean.expand(n_new, -1)))
    larger.load_state_dict(weights)
    return larger.train(model.training)
