"""Text from a language model: prefill on the prompts, then one token at a time on an explicit state."""

import codecs
import math
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, SupportsIndex

import torch
from torch import Tensor

from chela.data.tokenizer import load_coder
from chela.evaluation.runs import load_run, place
from chela.models import CausalLM
from chela.models.decoding import Decoder
from chela.training.device import compute_type


def sample(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Draw a token a row.

    Args:
        logits: float [B, vocab].
        temperature: divides the logits; 0 takes the likeliest token.
        top_k: draw among the k likeliest tokens; 0 among all.
        top_p: draw among the fewest likeliest tokens that hold this share of the probability.
        generator: source of randomness on the device of `logits`.

    Returns:
        int64 [B].
    """
    if temperature == 0:
        return logits.argmax(-1)
    values = logits.float() / temperature
    if not top_k and top_p == 1:
        return _draw(values.softmax(-1), generator)
    values, order = values.sort(descending=True, stable=True)  # [B, vocab]
    if top_k:
        values[:, top_k:] = -torch.inf
    probabilities = values.softmax(-1)
    before = probabilities.cumsum(-1) - probabilities  # share of the likelier ones: the first token always stays
    probabilities = probabilities.masked_fill(before >= top_p, 0)
    return order.gather(1, _draw(probabilities, generator).unsqueeze(1)).squeeze(1)


def _draw(probabilities: Tensor, generator: torch.Generator | None) -> Tensor:
    """What `multinomial` draws, without the checks that take ten launches: p / e is largest with probability p."""
    return probabilities.div(torch.empty_like(probabilities).exponential_(generator=generator)).argmax(-1)


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Make tokens that came before less likely: positive logits are divided by the penalty, negative ones multiplied.

    (Keskar et al. 2019, CTRL, section 4.1, in the form that also lowers negative logits.)

    Args:
        logits: float [B, vocab].
        seen: bool [B, vocab], True at tokens that came before.
        penalty: 1 changes nothing, above it repetition gets rarer, below it more frequent.

    Returns:
        float [B, vocab].
    """
    return torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)


def until(pieces: Iterable[str], stops: Sequence[str]) -> Iterator[str]:
    """Pass on text up to the first of the stop strings, which is left out; hold back what may be the start of one."""
    held = ""
    for piece in pieces:
        held += piece
        found = min((place for stop in stops if (place := held.find(stop)) >= 0), default=None)
        if found is not None:
            yield held[:found]
            return
        begun = max((n for stop in stops for n in range(1, len(stop)) if held.endswith(stop[:n])), default=0)
        yield held[: len(held) - begun]
        held = held[len(held) - begun :]
    yield held


def generate(
    model: CausalLM,
    prompts: Iterable[Iterable[SupportsIndex]],
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Iterator[Tensor]:
    """Continue several prompts at once, of any lengths; yield the next token of each, int64 [B] on the CPU.

    Args:
        model: in evaluation mode. Merged (`merge`), a token costs hardly more after a long context than after a short
            one.
        prompts: token ids, as lists, arrays, tensors or bytes; shorter ones are padded on the left, which does not
            change their continuation.
        max_new_tokens: tokens a prompt.
        temperature: as `sample`.
        top_k: as `sample`.
        top_p: as `sample`.
        repetition_penalty: as `penalise`, for the tokens of a prompt and its continuation.
        seed: the same seed, prompts, model and machine give the same tokens.
        dtype: of the matrix products, which autocast narrows to it; the states' sums stay float32. float32 leaves the
            model's own.

    Raises:
        ValueError: no prompt or an empty one, a token id out of range, an option out of range.
    """
    ids = [list(map(operator.index, prompt)) for prompt in prompts]
    _check(ids, model.config.vocab, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    return _stream(model, ids, max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed, dtype)


def _check(
    prompts: Sequence[Sequence[int]],
    vocab: int,
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int,
) -> None:
    if not prompts or not all(prompts):
        raise ValueError("a prompt needs at least one token: give --prompt some text")
    for token in {token for prompt in prompts for token in prompt}:
        if not 0 <= token < vocab:
            raise ValueError(f"token id {token} is outside the model's vocabulary 0..{vocab - 1}")
    if max_new_tokens < 1:
        raise ValueError(f"max-new-tokens must be at least 1, got {max_new_tokens}")
    if not 0 <= temperature < math.inf:
        raise ValueError(f"temperature must be finite and not negative (0: the likeliest token), got {temperature}")
    if top_k < 0:
        raise ValueError(f"top-k must not be negative (0 draws among all tokens), got {top_k}")
    if not 0 < top_p <= 1:
        raise ValueError(f"top-p must lie in (0, 1], got {top_p}")
    if not 0 < repetition_penalty < math.inf:
        raise ValueError(
            f"repetition-penalty must be positive and finite (1 leaves the logits alone), got {repetition_penalty}"
        )
    if not 0 <= seed < 1 << 63:
        raise ValueError(f"seed must lie between 0 and 2^63 - 1, got {seed}")


@torch.inference_mode()
def _stream(
    model: CausalLM,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    temperature: float,
    top_k: int,
    top_p: float,
    repetition_penalty: float,
    seed: int,
    dtype: torch.dtype,
) -> Iterator[Tensor]:
    device = next(model.parameters()).device
    narrow = torch.autocast(device.type, dtype, enabled=dtype != torch.float32)  # off where the caller has a turn
    length = max(map(len, prompts))
    tokens = torch.tensor([[0] * (length - len(p)) + list(p) for p in prompts], device=device)
    mask = torch.tensor([[False] * (length - len(p)) + [True] * len(p) for p in prompts], device=device)
    generator = torch.Generator(device).manual_seed(seed)
    with narrow:
        logits, state = model.prefill(tokens, None if bool(mask.all()) else mask, last=1)
        logits, decoder = logits.squeeze(1), Decoder(model, state, room=max_new_tokens)
    del state  # the decoder's, which may have moved it to where there is room
    seen = torch.zeros(len(prompts), model.config.vocab, dtype=torch.bool, device=device)
    for row, prompt in enumerate(prompts):
        seen[row, list(prompt)] = True
    for count in range(max_new_tokens):
        if repetition_penalty != 1:
            logits = penalise(logits, seen, repetition_penalty)
        token = sample(logits, temperature=temperature, top_k=top_k, top_p=top_p, generator=generator)
        if repetition_penalty != 1:
            seen.scatter_(1, token.unsqueeze(1), True)
        yield token.cpu()
        if count + 1 < max_new_tokens:
            with narrow:
                logits = decoder.step(token)


@dataclass(frozen=True)
class Generated:
    """What `generate_run` wrote."""

    text: str
    """The continuation, without the prompt."""
    tokens: int
    """New tokens."""
    seconds: float
    """Time from the prompt to the last token."""

    @property
    def tokens_per_second(self) -> float:
        """New tokens a second, prefill included."""
        return self.tokens / self.seconds


def generate_run(
    folder: Path,
    prompt: str,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    stop: Sequence[str] = (),
    seed: int = 0,
    device: Literal["auto", "cpu", "cuda"] = "auto",
    dtype: Literal["auto", "float32", "bfloat16"] = "auto",
    write: Callable[[str], None] = lambda text: None,
) -> Generated:
    """Continue a prompt with the language model of a run; `write` gets prompt and text as they come.

    Products are computed in `dtype`; "auto" is what the run was trained in: if that was left to the device, bfloat16 on
    a GPU and float32 on a CPU. The text ends before the first of the strings in `stop`, if one comes, or with the
    document, where the tokens know of such an end.

    Raises:
        ValueError: the folder is no run of a language model, or an option is out of range.
    """
    if not all(stop):
        raise ValueError("a stop string needs at least one character: leave --stop out to write all tokens")
    run, model = load_run(folder, place(device))
    if not isinstance(model, CausalLM):
        raise ValueError(f"{folder} holds a {run.model.kind}, not a language model: nothing to generate")
    model.merge()
    coder = load_coder(folder, model.config.vocab)
    started, tokens = time.perf_counter(), 0
    stream = generate(
        model,
        [coder.encode(prompt.encode(errors="surrogateescape")).tolist()],  # bytes of a command line may be no UTF-8
        max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        repetition_penalty=repetition_penalty,
        seed=seed,
        dtype=compute_type(run.train.dtype if dtype == "auto" else dtype, next(model.parameters()).device),
    )

    def decoded() -> Iterator[str]:
        nonlocal tokens
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        for token in stream:
            if int(token) == coder.end:
                break
            tokens += 1
            yield decoder.decode(coder.pieces[int(token)])
        yield decoder.decode(b"", final=True)

    write(prompt)
    pieces = []
    for piece in until(decoded(), stop):
        pieces.append(piece)
        write(piece)
    return Generated("".join(pieces), tokens, time.perf_counter() - started)
