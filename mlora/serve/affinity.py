"""Which of several replicas takes a request: the one that its adapter belongs to, or the next one if that has too much.

Rendezvous hashing (Thaler and Ravishankar, 1998): an adapter prefers replicas in the order of hash(replica, adapter).
It needs no memory and no messages, so that all who route agree. A replica that comes or goes moves only the adapters
that belong to it.

Bounded loads (Mirrokni, Thorup and Zadimoghaddam, 2018): a replica that has `SLACK` times its share of all requests is
passed over. So an adapter that many ask for spreads over as many replicas as it needs, and always over the same ones.
"""

from __future__ import annotations

import hashlib
import math
import random
from collections import Counter
from collections.abc import Mapping
from typing import Any

from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

SLACK = 1.25
"""Requests that a replica may have, over an equal share of all."""


def ranked(adapter: str, requests: Mapping[str, int], most: int) -> list[str]:
    """The replicas, best first.

    Args:
        requests: replica -> how many requests it has.
        most: requests that a replica takes at once.
    """
    share = math.ceil(SLACK * (sum(requests.values()) + 1) / max(len(requests), 1))

    def key(replica: str) -> tuple[bool, bytes]:
        digest = hashlib.blake2b(f"{replica} {adapter}".encode(), digest_size=8).digest()
        return requests[replica] >= min(share, most), digest

    return sorted(requests, key=key)


class AffinityRouter(RequestRouter):
    """Ray Serve's router of requests that carry an adapter as `multiplexed_model_id`. Others go where least is to do.

    When no replica has room, Ray asks again, and waits between. The router counts the requests that it sent itself: the
    lengths of queues that Ray remembers are those of a moment ago, and may stay wrong for seconds.
    """

    # Ray asks a replica for the length of its queue where it has not heard of it for a while, and does without those
    # that are late. A step of the engine may keep one from answering; Ray's 0.1 s would send its requests elsewhere.
    queue_len_response_deadline_s = 1.0

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **options)
        self._sent: Counter[ReplicaID] = Counter()  # and not answered yet

    def on_send_request(self, replica_id: ReplicaID) -> None:
        super().on_send_request(replica_id)
        self._sent[replica_id] += 1

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        super().on_request_completed(replica_id, internal_request_id)
        self._sent -= Counter([replica_id])  # keeps what is above zero

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Groups of replicas. Ray takes the one with the least to do of the first group in which one has room."""
        replicas = {str(replica.replica_id.unique_id): replica for replica in candidate_replicas}
        adapter = ""
        if pending_request is not None:
            adapter = pending_request.metadata.multiplexed_model_id
            pending_request.routing_context.should_backoff = True  # wait before the next call
        if not adapter or not replicas:
            return [random.sample(candidate_replicas, len(candidate_replicas))]  # of equal ones Ray takes the first
        requests = {name: self._sent[replica.replica_id] for name, replica in replicas.items()}
        most = next(iter(replicas.values())).max_ongoing_requests
        return [[replicas[name]] for name in ranked(adapter, requests, most)]
