"""transformers' continuous batching with an entry and a way of drawing for each request.

Beside `attention.py` this is the one file that uses names of transformers which are not public. `versions.py` has them:
they are checked when this is imported, and those that exist on objects only when a `Worker` makes them.

    loop of its thread:  schedule a step -> _generation_step -> model(1, T) under the step's entries -> _Chooser
                                                                 |
                               tokens of each request are contiguous, decoded ones and pieces of prompts mixed
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import ContinuousBatchingConfig, GenerationConfig

from .. import errors
from ..runtime import Runtime
from . import attention
from .orders import Order, Orders
from .request import Event, SequenceState
from .versions import check_names, has

_SALTS = 1 << 16  # contents with first tokens that are remembered

check_names()

from transformers.generation.continuous_batching.cache import PagedAttentionCache  # noqa: E402
from transformers.generation.continuous_batching.continuous_api import (  # noqa: E402
    ContinuousBatchingManager,
    OutputRouter,
)
from transformers.generation.continuous_batching.input_outputs import ContinuousBatchingIOs  # noqa: E402
from transformers.generation.continuous_batching.model_runner import ModelRunner, infer_max_single_request_tokens  # noqa: E402
from transformers.generation.continuous_batching.scheduler import FIFOScheduler  # noqa: E402


@dataclass(frozen=True)
class Memory:
    """Of keys and values.

    Args:
        tokens: how many there is room for. `page`: how many tokens a block of them has; whole ones are shared.
        batch: most tokens of one step. `share`: whether prompts that begin alike share them.
    """

    tokens: int
    page: int
    batch: int
    share: bool


class Worker(ContinuousBatchingManager):
    """Runs sequences in steps, in a thread of its own, until one fails. On the CPU `attention.check` has passed.

    Args:
        told: takes the events of a step. `left`: takes the ids of cancelled ones that are out of the batches.
        orders: of a model that is split over processes, what carries out what all of them do alike; else None.

    `step` has the sequences of the step that is running, or of the one that failed; else nothing.
    """

    def __init__(
        self,
        runtime: Runtime,
        memory: Memory,
        told: Callable[[Sequence[Event]], None],
        left: Callable[[Sequence[str]], None],
        orders: Orders | None = None,
    ) -> None:
        self._orders = orders
        if orders is not None:
            orders.worker = self
        self._runtime = runtime
        self._told = told
        self._left = left
        self._sequences: dict[str, SequenceState] = {}
        self.step: list[SequenceState] = []
        self._over: list[str] = []
        self.steps = 0
        self.capacity = 0  # tokens that one request can have, when the cache is there
        self.ready = threading.Event()
        config = ContinuousBatchingConfig(
            num_blocks=-(-memory.tokens // memory.page),
            page_size=memory.page,
            max_batch_tokens=memory.batch,
            allow_block_sharing=memory.share,
            auto_switch_to_flash=False,
            use_async_batching=False,
            use_cuda_graph=False,
        )
        super().__init__(runtime.model, GenerationConfig(do_sample=False, eos_token_id=-1), config)  # type: ignore[arg-type]
        has(self, "output_router").output_router = _Nowhere()  # the steps tell what there is to tell
        self._inbox = has(self, "input_queue").input_queue = _Inbox()
        if orders is not None:
            has(self, "input_queue", "_wake_up_loop", "_handle_critical_error", "_fail_all_remaining_requests")
            if has(self, "distributed_helper").distributed_helper.tp_size != runtime.processes:
                raise errors.ServeError(
                    f"transformers' continuous batching sees {self.distributed_helper.tp_size} of the "
                    f"{runtime.processes} processes that the model is split over"
                )
            if not orders.leads:
                self._wake_up_loop = _Awake()  # process 0 sets the pace

    def add(self, sequences: Iterable[SequenceState]) -> None:
        """Run them from the same step on, each from where it is: its prompt, and the tokens that it has."""
        with self._inbox.closed():
            for sequence in sequences:
                self._add(sequence)

    def _add(self, sequence: SequenceState) -> None:
        request = sequence.request
        self._sequences[sequence.id] = sequence
        if self._orders is not None:
            self.send(Order(None, "enter", (sequence.id, request.pin.number, request.starts)))
        self.add_request(
            [*request.prompt, *sequence.tokens],
            request_id=sequence.id,
            max_new_tokens=request.sampling.max_new_tokens - len(sequence.tokens),
            eos_token_id=[-1, *request.ends],
        )

    def follow(self, sequence: SequenceState) -> None:
        """Take part in a sequence that process 0 has added."""
        self._sequences[sequence.id] = sequence

    def send(self, order: Order) -> None:
        """Have it carried out by all processes before their next step; in process 0."""
        self.input_queue.put(order)  # type: ignore[arg-type]
        self._wake_up_loop.set()

    def cancel_request(self, request_id: str) -> None:
        """Before the next step. Where there are several processes, in one order with what else is sent."""
        if self._orders is None:
            super().cancel_request(request_id)
        else:
            self.send(Order(None, "cancel", (request_id,)))

    def cancel_now(self, request_id: str) -> None:
        """Carry out such an order."""
        processor: Any = self.batch_processor
        processor.scheduler.set_request_cancellation(request_id)

    def switch_to_cb_friendly_attn(self, model: Any, auto_switch_to_flash: bool = True) -> None:
        """On the CPU to an attention whose cost grows with the tokens that are read; `stop` gives back the model's."""
        if model.device.type != "cpu":
            super().switch_to_cb_friendly_attn(model, auto_switch_to_flash)
            return
        self._original_attn_impl = model.config._attn_implementation
        model.set_attn_implementation(attention.register())

    def wait(self) -> None:
        """Until its thread has ended, however it did."""
        thread = self._generation_thread
        if thread is not None:
            thread.join()

    def _create_batch_processor(self) -> Any:
        processor = has(super()._create_batch_processor(), "cache", "scheduler", "inputs_and_outputs", "model_runner")
        processor.model_runner.__class__ = _Chooser
        if self._orders is not None:
            processor.model_runner.group = self.distributed_helper.cpu_comm_group
            processor.model_runner.leads = self._orders.leads
        has(processor.inputs_and_outputs, "requests_in_batch").__class__ = _Inputs
        scheduler = has(processor.scheduler, "block_new_requests", "_requests_to_cancel", "_cancellation_lock")
        scheduler.__class__ = _Scheduler
        scheduler.keep(self._sequences, self._gone, None if self._orders is None else self._orders.obey)
        processor.cache.__class__ = _Cache
        if self.model.device.type == "cpu":
            attention.read_in_place(processor.cache)
        processor.cache.keep(self._sequences)
        self.capacity = infer_max_single_request_tokens(processor.cache)
        self.ready.set()
        return processor

    def _generation_step(self) -> None:
        processor: Any = self.batch_processor
        batch, chooser = processor.inputs_and_outputs.requests_in_batch, processor.model_runner
        for id in self._over:
            self._sequences.pop(id, None)
        self.step = step = [self._sequences[one.state.request_id] for one in batch]
        chooser.events, chooser.over = (), []
        chooser.rows = [sequence for one, sequence in zip(batch, step, strict=True) if one.has_new_token]
        lengths = [one.query_length for one in batch]
        starts = [_shifted(sequence.request.starts, one) for one, sequence in zip(batch, step, strict=True)]
        entries = [sequence.request.pin.entry for sequence in step]
        with (
            torch.inference_mode(),
            self._runtime.use_adapters(entries, lengths=lengths, starts=starts if any(starts) else None),
        ):
            super()._generation_step()
        self.steps += 1
        self.step = []
        # Those that end with a token, end in transformers too, by the same rule: before the next step.
        self._over = chooser.over
        self._told(chooser.events)

    def _handle_critical_error(self, error: Exception, batch_processor: Any) -> None:
        """Of several processes none waits for the others here, which may be waiting in the middle of a forward: this
        process ends, and they see that."""
        if self._orders is None:
            super()._handle_critical_error(error, batch_processor)
            return
        self._fail_all_remaining_requests(error, batch_processor)
        self.background_thread_status.record_fatal_error(error)

    def _gone(self, ids: Sequence[str]) -> None:
        for id in ids:
            self._sequences.pop(id, None)
        self._left(ids)


def _shifted(starts: Mapping[str, int | None], one: Any) -> Mapping[str, int | None]:
    """Where aLoRAs begin to apply, counted from the first of the step's tokens of a request."""
    if not starts:
        return starts
    first = one.state.position_offset - one.query_length  # it has been moved behind them already
    return {name: None if start is None else start - first for name, start in starts.items()}


class _Chooser(ModelRunner):
    """Draws each row's token, and keeps it with its sequence. What transformers' processors do is done by `Drawing`.

    `over` has the ids of the sequences that end with their token. Where there are several processes, all get the tokens
    of the one that `leads`, over `group`.
    """

    rows: Sequence[SequenceState] = ()
    events: Sequence[Event] = ()
    over: Sequence[str] = ()
    group: Any = None
    leads = True

    def _sample(self, scores: Tensor, output_ids: Tensor) -> None:
        if self.leads:
            tokens = self._choose(scores[0])
            self.over = [event.sequence.id for event in self.events if event.finish_reason is not None]
        else:
            tokens = torch.zeros(scores.shape[1], dtype=torch.int64, device=scores.device)
        if self.group is not None and self.rows:
            ended = [sequence.id in self.over for sequence in self.rows]
            told = torch.stack([tokens[: len(ended)].cpu(), torch.tensor(ended, dtype=torch.int64)])
            torch.distributed.broadcast(told, group_src=0, group=self.group)
            tokens[: len(ended)] = told[0].to(tokens.device)
            self.over = [one.id for one, end in zip(self.rows, told[1].tolist(), strict=True) if end]
        output_ids[0, : tokens.numel()].copy_(tokens)

    def _choose(self, scores: Tensor) -> Tensor:
        """(rows,), of scores of (rows, vocabulary)."""
        tokens = scores.argmax(-1)
        finite = scores.gather(1, tokens[:, None])[:, 0].isfinite().tolist()
        likeliest, events = tokens.tolist(), []
        for row, sequence in enumerate(self.rows):
            if sequence.ended:
                continue
            if not finite[row]:
                error = errors.ServeError("the model's scores of the next token are not finite")
                events.append(Event(sequence, error=error))
                continue
            sampling = sequence.request.sampling
            token = likeliest[row]
            own = scores[row, : sequence.request.scores]  # others' heads may be wider
            logprobs = None
            if sampling.logprobs or sampling.top_logprobs:
                logprobs = own.log_softmax(-1)
            if not sequence.drawing.plain:
                token = sequence.drawing.draw(own)
                tokens[row] = token
            if token >= sequence.request.tokens:
                error = errors.ServeError(f"token {token} was drawn; the embedding has {sequence.request.tokens}")
                events.append(Event(sequence, error=error))
                continue
            top = None
            if logprobs is not None and sampling.top_logprobs:
                values, ids = logprobs.topk(min(sampling.top_logprobs, logprobs.numel()))
                top = dict(zip(ids.tolist(), values.tolist(), strict=True))
            logprob = None if logprobs is None else float(logprobs[token])
            events.append(Event(sequence, token, logprob, top, sequence.add(token)))
        self.events = events
        return tokens


class _Inbox(queue.Queue[Any]):
    """Requests that no step has seen yet. What is put into it while it is closed is seen when it opens, all at once."""

    _closed = False

    @contextmanager
    def closed(self) -> Iterator[None]:
        self._closed = True
        try:
            yield
        finally:
            self._closed = False

    def empty(self) -> bool:
        return self._closed or super().empty()

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        if self._closed:
            raise queue.Empty
        return super().get(block, timeout)


class _Awake(threading.Event):
    """Nobody waits for it."""

    def wait(self, timeout: float | None = None) -> bool:
        return True


class _Nowhere(OutputRouter):
    """Takes outputs, which nobody asks for."""

    def deliver(self, output: Any) -> None:
        pass

    def deliver_batch(self, outputs: Any) -> None:
        pass

    def fail_and_deliver(self, state: Any, error: Exception) -> None:
        if not isinstance(state, Order):  # who waits for one hears of it from `Lead`
            super().fail_and_deliver(state, error)


class _Inputs(ContinuousBatchingIOs):
    """Leaves out `is_causal`, which is true here and says nothing: a call that has it sets it in the model's config and
    takes it out at its end, and so it would be with calls of other threads in between."""

    def get_model_kwargs(self, use_padding: bool = False) -> Any:
        kwargs: Any = super().get_model_kwargs(use_padding)
        kwargs.pop("is_causal", None)
        return kwargs


class _Scheduler(FIFOScheduler):
    """Tells which of the requests that were to be cancelled are out of the batches, be it that they ended before. Of
    what comes as new requests, orders are carried out."""

    def keep(
        self,
        sequences: Mapping[str, SequenceState],
        gone: Callable[[Sequence[str]], None],
        obey: Callable[[Order], None] | None,
    ) -> None:
        self._sequences = sequences
        self._gone = gone
        self._obey = obey
        self._came: set[str] = set()
        self._cancellation_lock: Any = threading.RLock()

    def add_waiting_request(self, state: Any) -> None:
        if isinstance(state, Order):
            assert self._obey is not None
            self._obey(state)
            return
        self._came.add(state.request_id)
        super().add_waiting_request(state)

    def clear_cancelled_requests(self) -> list[Any]:
        states = []
        with self._cancellation_lock:  # from other threads more may come at any time
            wanted = set(self._requests_to_cancel)
            for id in sorted(wanted):  # in the order of all processes, as their blocks are free in that order
                self._requests_to_cancel = {id}
                states += super().clear_cancelled_requests()
        self._came &= self._sequences.keys()
        gone = wanted & self._came
        for id in wanted - gone:
            if id in self._sequences:  # it is on its way still
                self.set_request_cancellation(id)
        if gone:
            self._came -= gone
            self.block_new_requests = False  # as when a request ends, which leaves room too
            self._gone(sorted(gone))
        return states


class _Cache(PagedAttentionCache):
    """Shares blocks between requests of the same content only.

    The hash of a request's first block, on which those of all others depend, takes in place of its first token a
    negative number that stands for that token and the content of the request's entry (`Pin.content`).
    """

    def keep(self, sequences: dict[str, SequenceState]) -> None:
        self._sequences = sequences
        self._salts: dict[Hashable, int] = {}
        self._last = -1  # which transformers uses itself
        for allocator in self.cache_allocators.values():
            has(allocator, "mark_complete_blocks", "match_prefix_blocks")

    def _salt(self, id: str, first: int) -> int:
        if len(self._salts) >= _SALTS:
            self._salts.clear()  # numbers are not used again: blocks of forgotten ones are not found any more
        key = (self._sequences[id].request.content, first)
        if key not in self._salts:
            self._last -= 1
            self._salts[key] = self._last
        return self._salts[key]

    def search_prefix_match(self, request_id: str, prompt_ids: list[int]) -> int:
        found = super().search_prefix_match(request_id, [self._salt(request_id, prompt_ids[0]), *prompt_ids[1:]])
        sequence = self._sequences[request_id]
        if not sequence.tokens:
            sequence.cached = found
        return found

    def mark_complete_blocks(self, state: Any, complete_blocks: Any) -> None:
        """Also of requests that end with this step, which transformers leaves out."""
        if self.use_prefix_sharing and complete_blocks:
            first, *rest = state.initial_tokens
            tokens = [self._salt(state.request_id, first), *rest, *state.generated_tokens]
            for name, count in complete_blocks.items():
                self.cache_allocators[name].mark_complete_blocks(state.request_id, tokens, count)
