"""Log-likelihoods of continuations, by the conventions of lm-eval."""

import inspect

import torch

from ..errors import EvaluationError, NonFiniteError
from .inference import check_causal, inference, max_length


def loglikelihoods(model, tokenizer, pairs, batch_tokens=2048):
    r"""`sum_t log p(continuation_t | context, continuation_{<t})` of every pair, in nats.

    Args:
        model (`PreTrainedModel`): a causal language model.
        tokenizer (`PreTrainedTokenizer`): its tokenizer.
        pairs (`list[tuple[str, str]]`): contexts and continuations; an empty context is the beginning-of-text token.
        batch_tokens (`int`, defaults to 2048): tokens of a batch, padding included; a longer pair is read alone.

    Returns:
        `list[float]`, in the order of `pairs`.

    Raises:
        EvaluationError: a continuation without tokens, or with more than the model's positions; or a model that is no
            causal language model.
        NonFiniteError: the model's logits are not finite.

    Reference:
        EleutherAI, lm-evaluation-harness 0.4.13, `HFLM.loglikelihood`: the same tokens, and the same truncation from
        the left. Differs in batching: by tokens, and no logits for the context where the model can leave them out.
    """
    check_causal(model)
    limit = max_length(model)
    requests = []
    for context, continuation in pairs:
        context_ids, ids = encode_pair(tokenizer, context, continuation)
        if not ids or (limit is not None and len(ids) > limit):
            raise EvaluationError(
                f"The continuation {continuation[:60]!r} has {len(ids)} tokens; it must have 1 to {limit}, the "
                "positions of the model."
            )
        # The last token is predicted, never read.
        kept = (context_ids + ids)[-(limit + 1) :] if limit is not None else context_ids + ids
        requests.append((kept[:-1], ids))
    results = [0.0] * len(requests)
    # Pairs of like length waste no padding; the longest come first, so that memory runs out early or never.
    order = sorted(range(len(requests)), key=lambda i: -len(requests[i][0]))
    with inference(model) as device:
        for batch in _batches(order, [len(inputs) for inputs, _ in requests], batch_tokens):
            scores = _score(model, [requests[i] for i in batch], device)
            for i, score in zip(batch, scores, strict=True):
                results[i] = score
    return results


def encode_pair(tokenizer, context, continuation):
    """Token ids of context and continuation, split as lm-eval splits them.

    Spaces at the end of the context move to the continuation; both are tokenized together, and the continuation is
    what follows as many tokens as the context has alone.
    """
    prefix = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    bare, whole = context.rstrip(), context + continuation
    if not bare:
        if prefix is None:
            raise EvaluationError("A pair has no context, and the tokenizer no token to begin a text with; give one.")
        ids = tokenizer.encode(whole, add_special_tokens=False)
        return ([prefix], ids) if ids[:1] != [prefix] else (ids[:1], ids[1:])
    # A text that brings its own beginning-of-text token gets no second one.
    special = prefix is None or not whole.startswith(tokenizer.decode([prefix]))
    context_ids = tokenizer.encode(bare, add_special_tokens=special)
    return context_ids, tokenizer.encode(whole, add_special_tokens=special)[len(context_ids) :]


def _batches(order, lengths, batch_tokens):
    batch = []
    for i in order:
        # Lengths fall, so the first of a batch is as wide as the batch.
        if batch and (len(batch) + 1) * lengths[batch[0]] > batch_tokens:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def _score(model, requests, device):
    width = max(len(inputs) for inputs, _ in requests)
    # Padding on the right is behind every scored token, where a causal model cannot see it: no mask is needed.
    padded = torch.tensor([inputs + [0] * (width - len(inputs)) for inputs, _ in requests], device=device)
    first = min(len(inputs) - len(ids) for inputs, ids in requests)
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        logits = model(input_ids=padded, use_cache=False, logits_to_keep=width - first).logits
    else:
        logits = model(input_ids=padded, use_cache=False).logits[:, first:]
    scores = []
    for (inputs, ids), row in zip(requests, logits, strict=True):
        start = len(inputs) - len(ids) - first
        predicted = torch.log_softmax(row[start : start + len(ids)].float(), dim=-1)
        scores.append(predicted.gather(-1, torch.tensor(ids, device=row.device)[:, None]).sum().item())
    if not all(torch.isfinite(torch.tensor(scores))):
        raise NonFiniteError("A log-likelihood is not finite; the model's logits are not.")
    return scores
