"""`Sampling`: how the tokens of a request are chosen, and when it ends."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NoReturn

from .. import errors

MAX_SEED = 2**63 - 1

# Options of generation configs: those served under the same name, with what `generate` takes where none is given, and
# those that are not served, with what is neutral.
_GENERATE = {"temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
_UNSERVED = {
    "num_beams": 1, "no_repeat_ngram_size": 0, "bad_words_ids": None, "typical_p": 1.0, "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0, "top_h": None, "min_length": 0, "min_new_tokens": None, "suppress_tokens": None,
    "begin_suppress_tokens": None, "forced_bos_token_id": None, "forced_eos_token_id": None, "sequence_bias": None,
    "exponential_decay_length_penalty": None, "guidance_scale": None, "penalty_alpha": None, "dola_layers": None,
    "encoder_repetition_penalty": 1.0, "renormalize_logits": False, "watermarking_config": None, "stop_strings": None,
}  # fmt: skip


@dataclass(frozen=True)
class Sampling:
    """How the tokens of one request are chosen, and when it ends.

    The scores of a token go through, in this order: `logit_bias`, `repetition_penalty`, `frequency_penalty` and
    `presence_penalty`, `min_tokens`, `temperature`, `top_k`, `top_p`, `min_p`; as in `generate` of transformers, whose
    numbers these are where it has the option. What a request draws depends on its seed and on how many tokens it has
    drawn, and on nothing else that runs: with `torch.manual_seed(seed)` before it, `model.generate` of that prompt
    alone draws the same.

    Args:
        max_new_tokens: at most so many tokens are generated; at least 1.
        temperature: the scores are divided by it; 0 takes the likeliest token each time, and draws nothing.
        top_k: draw among the so many likeliest tokens; 0 for all.
        top_p: draw among the likeliest tokens whose probabilities sum up to it, in (0, 1].
        min_p: draw among tokens of at least this share of the likeliest one's probability, in [0, 1].
        repetition_penalty: scores of tokens of the prompt and the answer are divided by it where they are positive, and
            multiplied elsewhere (Keskar et al., 2019); above 0, and 1 changes nothing.
        frequency_penalty: taken off a token's score for each time that it is in the answer (OpenAI); in [-2, 2].
        presence_penalty: taken off the score of a token that is in the answer (OpenAI); in [-2, 2].
        logit_bias: token id -> what is added to its score.
        seed: of what is drawn, from 0 to 2^63 - 1; None takes a random one. Of n answers the i-th has `seed + i`.
        stop: strings that end the answer, which does not contain them; they may span tokens.
        stop_token_ids: tokens that end the answer, beside those that the model's generation config has.
        include_stop: keep the text of what ended the answer at its end.
        ignore_eos: go on after the model's own end tokens.
        min_tokens: no token ends the answer before it has so many.
        n: how many answers, at least 1.
        logprobs: tell each token's log-probability, in the model's own distribution, before all of the above.
        top_logprobs: tell so many of the likeliest tokens beside it, with theirs.
        skip_special_tokens: leave special tokens out of the text.

    Raises:
        RequestError: a value is none of these; it names the field.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    seed: int | None = None
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    n: int = 1
    logprobs: bool = False
    top_logprobs: int = 0
    skip_special_tokens: bool = True

    def __post_init__(self) -> None:
        self._integer("max_new_tokens", 1)
        self._number("temperature", 0.0, math.inf)
        self._integer("top_k", 0)
        self._number("top_p", 0.0, 1.0, above=True)
        self._number("min_p", 0.0, 1.0)
        self._number("repetition_penalty", 0.0, math.inf, above=True)
        self._number("frequency_penalty", -2.0, 2.0)
        self._number("presence_penalty", -2.0, 2.0)
        if self.seed is not None:
            self._integer("seed", 0, MAX_SEED)
        self._integer("min_tokens", 0)
        self._integer("n", 1)
        self._integer("top_logprobs", 0)
        for name in ("include_stop", "ignore_eos", "logprobs", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                self._refuse(name, "True or False")
        if not isinstance(self.logit_bias, Mapping) or not all(
            _is_integer(token) and token >= 0 and _is_number(bias) for token, bias in self.logit_bias.items()
        ):
            self._refuse("logit_bias", "a mapping of token ids to finite numbers")
        stops = (self.stop,) if isinstance(self.stop, str) else self.stop
        if not isinstance(stops, (tuple, list)) or not all(isinstance(stop, str) and stop for stop in stops):
            self._refuse("stop", "a string, or a list of strings that are not empty")
        object.__setattr__(self, "stop", tuple(stops))
        ids = self.stop_token_ids
        if not isinstance(ids, (tuple, list)) or not all(_is_integer(token) and token >= 0 for token in ids):
            self._refuse("stop_token_ids", "a list of token ids")
        object.__setattr__(self, "stop_token_ids", tuple(ids))
        if self.min_tokens > self.max_new_tokens:
            self._refuse("min_tokens", f"at most max_new_tokens, {self.max_new_tokens}")

    @property
    def greedy(self) -> bool:
        """Whether the likeliest token is taken each time."""
        return self.temperature == 0

    def seeded(self, seed: int) -> Sampling:
        """The same with another seed."""
        return replace(self, seed=seed)

    @classmethod
    def like_generate(cls, model: Any, *, do_sample: bool | None = None, **options: Any) -> Sampling:
        """What `model.generate(do_sample=do_sample, **options)` does: what is not given is that of the model's
        generation config, or `generate`'s own. `options` are those that are here under the same name.

        Raises:
            RequestError: the generation config has an option that an engine does not serve.
        """
        config = model.generation_config
        for name, neutral in _UNSERVED.items():
            if (value := getattr(config, name, None)) is not None and value != neutral:
                raise errors.RequestError(f"the model's generation config has {name} {value!r}, which is not served")
        given: dict[str, Any] = {}
        for name, default in _GENERATE.items():
            value = getattr(config, name, None)
            given[name] = default if value is None else value
        given |= options
        if not (config.do_sample if do_sample is None else do_sample):
            given["temperature"] = 0
        return cls(**given)

    def _integer(self, name: str, least: int, most: int | None = None) -> None:
        value = getattr(self, name)
        if not _is_integer(value) or value < least or (most is not None and value > most):
            self._refuse(name, f"an integer of at least {least}" if most is None else f"an integer, {least} to {most}")

    def _number(self, name: str, least: float, most: float, above: bool = False) -> None:
        value = getattr(self, name)
        if not _is_number(value) or not least <= value <= most or (above and value == least):
            bound = f"above {least:g}" if above else f"of at least {least:g}"
            self._refuse(name, f"a number {bound}" + ("" if math.isinf(most) else f" and at most {most:g}"))

    def _refuse(self, name: str, wanted: str) -> NoReturn:
        raise errors.RequestError(f"{name} is {getattr(self, name)!r}; it must be {wanted}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
